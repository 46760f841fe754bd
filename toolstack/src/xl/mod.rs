//! Xen: capture a running domain by the stock `xl`, start clones of it.

mod capture;
mod cfg;
mod clones;
mod config;
mod disk;
mod domain;
mod error;
mod fork;
mod identity;
mod options;
mod pause;
mod program;
mod receiver;
mod take;
mod watch;

pub use self::capture::capture;
pub use self::config::ConfigError;
pub use self::error::XlError;
pub use self::fork::{fork, run};
pub use self::identity::DomainReport;
pub use self::options::{CaptureOptions, ForkOptions, RunOptions};
pub use self::receiver::{RECEIVER_ROLE, receive};
