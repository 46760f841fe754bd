//! The pager of one clone: takes its page faults from a fault port, fetches the pages, installs them.
//!
//! - [`pager`]: the core, a state machine without I/O: which pages to ask for, which to install, whom to let go on;
//! - [`port`]: where faults come from and pages go: a userfaultfd, handed over by a VMM or our own;
//! - [`source`]: where pages come from: a page server, or the image's own files on the same host;
//! - [`channel`]: the multicast channel that clones share; [`lanes`] decides, without I/O, what is asked for there;
//! - [`engine`]: the event loop that joins these in one thread, and how it ends;
//! - [`guest`]: whose memory it is, as something that ends and that can be stopped.
//!
//! [`cli`] is the `memtap` command over all of them, [`admin`] its socket, [`stats`] what it tells there.
//!
//! What this crate deliberately does not do: it serves no page, and knows no `memserver` but by the fetch protocol.

pub mod admin;
pub mod channel;
pub mod cli;
pub mod engine;
pub mod guest;
pub mod lanes;
pub mod pager;
pub mod port;
pub mod source;
pub mod stats;
