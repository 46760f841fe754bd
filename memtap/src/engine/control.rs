use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use descriptor::FrameRange;
use rustix::event::EventfdFlags;
use thiserror::Error;

use super::outcome::StopReason;
use crate::pager::{Hydrate, NotMemory, Overwritten};
use crate::stats::Status;

/// Commands that may wait for the data plane, which takes them between two installations: more than a handful means that
/// nobody reads the answers.
const QUEUE: usize = 32;

/// How long the engine may take to answer: it does between two installations.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A command that an engine did not answer.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Unanswered {
    /// It was not taken, or forgotten at the engine's end.
    #[error("the pager has ended, or is overwhelmed")]
    Ended,
    /// It was taken.
    #[error("the pager does not answer")]
    Silent,
}

/// Overwrites that were not noted.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(transparent)]
pub enum OverwriteError {
    /// The engine did not answer.
    Unanswered(#[from] Unanswered),
    /// Some of the frames are none of the guest's.
    NotMemory(#[from] NotMemory),
}

/// What an engine can be told from other threads.
pub enum Command {
    /// Say how things are.
    Status(SyncSender<Status>),
    /// Fetch the rest in this way from now on.
    Hydrate(Hydrate),
    /// Note that these frames will be wholly overwritten, see [`Pager::overwrite`](crate::pager::Pager::overwrite).
    Overwrite(Vec<FrameRange>, SyncSender<Result<Overwritten, NotMemory>>),
    /// Stop; the guest is failed by policy unless it is complete.
    Stop(StopReason),
}

/// The engine's end of its control channel.
pub struct Control {
    wake: Arc<OwnedFd>,
    commands: Receiver<Command>,
}

/// The other end, for any thread.
#[derive(Clone)]
pub struct ControlHandle {
    wake: Arc<OwnedFd>,
    commands: SyncSender<Command>,
}

/// Both ends of a new channel.
///
/// # Errors
/// When the process has no descriptor left.
pub fn control() -> std::io::Result<(Control, ControlHandle)> {
    let wake = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, receiver) = sync_channel(QUEUE);
    Ok((Control { wake: Arc::clone(&wake), commands: receiver }, ControlHandle { wake, commands: sender }))
}

impl ControlHandle {
    /// Hands a command over; false when the engine has ended or has too many of them.
    pub fn send(&self, command: Command) -> bool {
        let sent = match self.commands.try_send(command) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        };
        // Fails only when the counter is full, and then the engine is about to wake up.
        let _full = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        sent
    }

    /// Hands over a command that is answered, and waits for its answer.
    ///
    /// # Errors
    /// When the engine does not take it, or does not answer.
    pub fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> Result<T, Unanswered> {
        let (sender, receiver) = sync_channel(1);
        if !self.send(command(sender)) {
            return Err(Unanswered::Ended);
        }
        receiver.recv_timeout(ANSWER_TIMEOUT).map_err(|error| match error {
            RecvTimeoutError::Disconnected => Unanswered::Ended,
            RecvTimeoutError::Timeout => Unanswered::Silent,
        })
    }

    /// Says that `ranges` will be wholly overwritten, see [`Pager::overwrite`](crate::pager::Pager::overwrite).
    ///
    /// # Errors
    /// When the engine did not answer, or some of the frames are none of the guest's.
    pub fn overwrite(&self, ranges: Vec<FrameRange>) -> Result<Overwritten, OverwriteError> {
        Ok(self.ask(|answer| Command::Overwrite(ranges, answer))??)
    }
}

impl Control {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The next command, once [`Control::fd`] was found readable.
    pub(super) fn next(&self) -> Option<Command> {
        // Reading resets the counter; what is sent from now on sets it again.
        let _empty = rustix::io::read(&*self.wake, &mut [0u8; 8]);
        self.commands.try_recv().ok()
    }
}
