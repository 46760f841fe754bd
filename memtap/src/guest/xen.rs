use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::EventfdFlags;

use super::{Guest, GuestError};
use crate::port::xen::{Domain, XenError};

/// How often it is looked whether the domain is still there. Xen tells nobody but xenstored, and a look is one hypercall.
const LOOK: Duration = Duration::from_millis(100);

/// A Xen domain that is paused until its memory is ready.
#[derive(Debug)]
pub struct XenGuest {
    domain: Domain,
    keep_paused: bool,
    gone: Arc<OwnedFd>,
    /// Tells the thread that looks to end.
    over: Arc<AtomicBool>,
}

impl XenGuest {
    /// The guest of a domain, which is watched from now on. With `keep_paused`, whoever paused it lets it go on.
    ///
    /// # Errors
    /// When the process has no thread or descriptor left, or the domain is gone.
    pub fn new(domain: Domain, keep_paused: bool) -> Result<Self, XenError> {
        let id = domain.id();
        let failed = |source: io::Error| XenError::Call { operation: "watching the end", domain: id, source };
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        let (gone, over) = (Arc::new(eventfd), Arc::new(AtomicBool::new(false)));
        let watched = domain.reopen()?;
        let thread = {
            let (gone, over) = (Arc::clone(&gone), Arc::clone(&over));
            move || watch(watched, &gone, &over)
        };
        std::thread::Builder::new().name("domain".into()).spawn(thread).map_err(failed)?;
        Ok(Self { domain, keep_paused, gone, over })
    }

    fn error(&self, operation: &'static str, error: XenError) -> GuestError {
        GuestError { operation, guest: format!("domain {}", self.domain.id()), source: io::Error::other(error) }
    }
}

fn watch(mut domain: Domain, gone: &OwnedFd, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        if domain.is_gone() {
            // Fails only when the counter is full, and nobody else writes.
            let _full = rustix::io::write(gone, &1u64.to_ne_bytes());
            return;
        }
        std::thread::sleep(LOOK);
    }
}

impl Drop for XenGuest {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

impl Guest for XenGuest {
    fn watch(&self) -> Option<BorrowedFd<'_>> {
        Some(self.gone.as_fd())
    }

    fn ready(&mut self) -> Result<(), GuestError> {
        if self.keep_paused {
            tracing::info!(
                domain = self.domain.id(),
                "the domain is ready, and stays paused until someone unpauses it"
            );
            return Ok(());
        }
        match self.domain.unpause() {
            Ok(()) if self.domain.is_paused() => {
                tracing::warn!(
                    domain = self.domain.id(),
                    "the domain is ready, and paused by someone else: `xl unpause` it"
                );
            }
            Ok(()) => tracing::info!(domain = self.domain.id(), "the domain runs"),
            Err(error) if !self.domain.is_gone() => return Err(self.error("unpausing", error)),
            Err(_) => {}
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.domain.pause().map_err(|error| self.error("pausing", error))
    }

    fn kill(&mut self) -> Result<(), GuestError> {
        self.domain.destroy().map_err(|error| self.error("destroying", error))
    }
}
