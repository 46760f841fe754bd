//! Ctrl-C and its relatives, as a descriptor to wait on instead of code that runs in the middle of other code.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use signal_hook::SigId;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// The signals that ask this process to end, caught for as long as it lives; after that they are ignored.
pub struct Interrupt {
    wake: UnixStream,
    /// Kept so that `wake` is never at its end, which would look like a signal.
    sender: UnixStream,
    signal: Arc<AtomicUsize>,
    handlers: Vec<SigId>,
}

impl Interrupt {
    /// Catches SIGINT, SIGTERM and SIGHUP from now on.
    ///
    /// # Errors
    /// When the kernel refuses a socket pair or a handler.
    pub fn catch() -> io::Result<Self> {
        let (wake, sender) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        let signal = Arc::new(AtomicUsize::new(0));
        let mut interrupt = Self { wake, sender, signal, handlers: Vec::new() };
        for number in [SIGINT, SIGTERM, SIGHUP] {
            // Handlers run in the order of their registration: the number is there before the byte that wakes.
            let flag = Arc::clone(&interrupt.signal);
            interrupt.handlers.push(signal_hook::flag::register_usize(number, flag, number.unsigned_abs() as usize)?);
            interrupt.handlers.push(signal_hook::low_level::pipe::register(number, interrupt.sender.try_clone()?)?);
        }
        Ok(interrupt)
    }

    /// Catches nothing, for tests that share their process with others.
    #[cfg(test)]
    pub(crate) fn none() -> io::Result<Self> {
        let (wake, sender) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        Ok(Self { wake, sender, signal: Arc::default(), handlers: Vec::new() })
    }

    /// Whether a signal came that was not taken yet.
    pub fn is_pending(&self) -> bool {
        self.signal.load(Ordering::Relaxed) != 0
    }

    /// The signal that came and was not taken yet.
    pub fn take(&self) -> Option<i32> {
        let mut bytes = [0; 64];
        while matches!((&self.wake).read(&mut bytes), Ok(1..)) {}
        i32::try_from(self.signal.swap(0, Ordering::Relaxed)).ok().filter(|&signal| signal != 0)
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            signal_hook::low_level::unregister(handler);
        }
    }
}

impl AsFd for Interrupt {
    /// Readable when a signal came.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// A signal's name for people.
pub(crate) fn signal_name(signal: i32) -> String {
    signal_hook::low_level::signal_name(signal).map_or_else(|| format!("signal {signal}"), str::to_owned)
}
