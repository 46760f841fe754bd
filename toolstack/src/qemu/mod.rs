//! QEMU: capture a running guest, start clones of it.

mod capture;
mod clones;
mod fork;
mod options;
mod state;
pub mod template;
mod watch;

pub use self::capture::capture;
pub use self::fork::{fork, run};
pub use self::options::{CaptureOptions, ForkOptions, RunOptions};
pub use self::template::Identity;
