//! Xen: capture a running domain by the stock `xl`, start clones of it.

mod capture;
mod domain;
mod error;
mod options;
mod pause;
mod program;
mod receiver;
mod take;

pub use self::capture::capture;
pub use self::error::XlError;
pub use self::options::CaptureOptions;
pub use self::receiver::{RECEIVER_ROLE, receive};
