use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::process::Signal;

use super::{Guest, GuestError};

/// A VMM as a process, held by its pidfd: a process id may be given to another process, a pidfd is not.
#[derive(Debug)]
pub struct ProcessGuest {
    pid: i32,
    pidfd: OwnedFd,
}

impl ProcessGuest {
    /// The process of `pidfd`; `pid` is for people.
    pub fn new(pid: i32, pidfd: OwnedFd) -> Self {
        Self { pid, pidfd }
    }

    /// The process id that it had when it was met.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    fn signal(&self, signal: Signal, operation: &'static str) -> Result<(), GuestError> {
        rustix::process::pidfd_send_signal(&self.pidfd, signal).map_err(|error| GuestError {
            operation,
            guest: format!("the VMM (process {})", self.pid),
            source: error.into(),
        })
    }
}

impl Guest for ProcessGuest {
    fn watch(&self) -> Option<BorrowedFd<'_>> {
        Some(self.pidfd.as_fd())
    }

    /// A VMM that handed its memory over runs already, and faults on what it needs.
    fn ready(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.signal(Signal::STOP, "SIGSTOP")
    }

    fn kill(&mut self) -> Result<(), GuestError> {
        self.signal(Signal::KILL, "SIGKILL")
    }
}
