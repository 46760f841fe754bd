//! The guest as something that can end, and that can be stopped when its memory does not come.

pub mod embedded;
mod process;
mod xen;

use std::io;
use std::os::fd::BorrowedFd;

use thiserror::Error;

pub use process::ProcessGuest;
pub use xen::XenGuest;

/// A guest that could not be stopped.
#[derive(Debug, Error)]
#[error("{operation} failed for {guest}")]
pub struct GuestError {
    /// What was tried.
    pub operation: &'static str,
    /// On whom.
    pub guest: String,
    /// The answer.
    #[source]
    pub source: io::Error,
}

/// A guest, or the hypervisor's process that runs it. A port knows its memory, this its life.
pub trait Guest {
    /// What becomes readable when the guest is gone, for ports whose own descriptor does not tell.
    fn watch(&self) -> Option<BorrowedFd<'_>>;

    /// Takes note that every page is there which the guest needs before its first instruction.
    ///
    /// # Errors
    /// When it cannot be let go; one that is gone is no error, as that is noticed anyway.
    fn ready(&mut self) -> Result<(), GuestError>;

    /// Stops the guest so that it can be looked at, and perhaps go on one day.
    ///
    /// # Errors
    /// When it cannot be stopped; it is gone, or still there.
    fn pause(&mut self) -> Result<(), GuestError>;

    /// Ends the guest.
    ///
    /// # Errors
    /// When it cannot be ended; it is gone, or still there.
    fn kill(&mut self) -> Result<(), GuestError>;
}
