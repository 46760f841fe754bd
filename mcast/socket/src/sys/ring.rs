//! An io_uring with what this crate needs of one.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};

/// Entries in the submission queue: for the datagrams of all bursts that can be under way, where they are sent one by one, so
/// that they are one chain.
const SUBMISSIONS: u32 = 1024;

/// Entries in the completion queue: for the buffers too. More is caught by the kernel, at a cost.
const COMPLETIONS: u32 = 2048;

/// How a ring's thread waits for completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiting {
    /// By [`Uring::wait`] alone.
    Inside,
    /// By polling [`Uring::fd`], among others.
    Poll,
}

/// An io_uring that belongs to the first thread that enters it.
pub(super) struct Uring {
    ring: IoUring,
    enabled: bool,
    /// Entries that are still to be submitted.
    backlog: VecDeque<squeue::Entry>,
    /// Operations whose last completion is still to come.
    outstanding: usize,
}

impl Uring {
    /// A ring that is not yet anybody's, to be waited for as `waiting` says.
    ///
    /// # Errors
    /// When the kernel has no io_uring, forbids it, or is older than 6.0, which brought multishot receives.
    pub(super) fn new(waiting: Waiting) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        // The task-run flag lets a submission that does not wait still reap what is ready.
        builder.setup_single_issuer().setup_taskrun_flag();
        match waiting {
            Waiting::Inside => builder.setup_defer_taskrun(),
            // Deferred work would not wake whoever polls the descriptor.
            Waiting::Poll => builder.setup_coop_taskrun(),
        };
        let ring = builder.setup_r_disabled().setup_cqsize(COMPLETIONS).build(SUBMISSIONS);
        let ring =
            ring.or_else(|_| IoUring::builder().setup_r_disabled().setup_cqsize(COMPLETIONS).build(SUBMISSIONS))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        // Multishot receives have no probe of their own; zero-copy sends came in the same release.
        if !probe.is_supported(opcode::SendZc::CODE) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self { ring, enabled: false, backlog: VecDeque::new(), outstanding: 0 })
    }

    pub(super) fn inner(&self) -> &IoUring {
        &self.ring
    }

    /// What becomes readable when there are completions, once the ring was entered.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as the ring lives, which the borrow of `self` ensures.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// Operations that are not over.
    pub(super) fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// Queues an operation for the next wait.
    ///
    /// # Safety
    /// What the entry refers to must stay as it is until its last completion.
    pub(super) unsafe fn push(&mut self, entry: squeue::Entry) {
        self.outstanding += 1;
        self.backlog.push_back(entry);
    }

    /// Submits what is queued, and waits for `wanted` completions: at most `timeout`, for ever where that is `None`.
    pub(super) fn wait(&mut self, wanted: usize, timeout: Option<Duration>) -> io::Result<()> {
        if !self.enabled {
            self.ring.submitter().register_enable_rings()?;
            self.enabled = true;
        }
        self.flush()?;
        let result = match timeout {
            Some(Duration::ZERO) if wanted == 0 => self.ring.submit(),
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                self.ring.submitter().submit_with_args(wanted, &SubmitArgs::new().timespec(&timespec))
            }
            None => self.ring.submit_and_wait(wanted),
        };
        passing(result)
    }

    /// The next completion, without waiting.
    pub(super) fn next(&mut self) -> Option<cqueue::Entry> {
        let entry = self.ring.completion().next()?;
        if !cqueue::more(entry.flags()) {
            self.outstanding = self.outstanding.saturating_sub(1);
        }
        Some(entry)
    }

    fn flush(&mut self) -> io::Result<()> {
        while let Some(entry) = self.backlog.front() {
            // SAFETY: what the entry refers to stays as it is until its last completion, by the promise given to `push`.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                self.backlog.pop_front();
                continue;
            }
            passing(self.ring.submit())?;
            if self.ring.submission().is_full() {
                // Completions must be worked off first; the next wait tries again.
                break;
            }
        }
        Ok(())
    }
}

/// Takes a time-out, a signal, and completions that must be reaped first for what they are.
fn passing(result: io::Result<usize>) -> io::Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {
            Ok(())
        }
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
            Err(io::Error::other("the socket's io_uring belongs to the thread that waited first"))
        }
        Err(error) => Err(error),
    }
}
