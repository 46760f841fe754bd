//! The pager of one clone: takes its page faults from a fault port, fetches the pages, installs them.

pub mod pager;
pub mod port;
