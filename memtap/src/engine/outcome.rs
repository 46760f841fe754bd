use std::fmt;

use thiserror::Error;

use crate::guest::GuestError;
use crate::pager::Failure;
use crate::port::PortError;
use crate::source::SourceError;

/// How a clone's pager ended.
#[derive(Debug)]
pub enum Outcome {
    /// Every page is there; the guest goes on alone.
    Complete,
    /// The guest ended first.
    GuestGone,
    /// Someone asked the pager to stop before the clone was complete. The guest was failed by policy.
    Stopped(StopReason),
    /// The pager could not go on. The guest was failed by policy.
    Failed(EngineError),
}

/// Who asked a pager to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// A signal, by its number.
    Signal(i32),
    /// The admin socket.
    Admin,
}

/// Why a pager cannot go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The fault port failed.
    #[error("the fault port failed")]
    Port(#[from] PortError),
    /// No server will serve the image.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The guest has what it needs and cannot be let go.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The pager's core gave up.
    #[error(transparent)]
    Pager(#[from] Failure),
    /// Waiting for events failed.
    #[error("waiting for events failed")]
    Wait(#[source] std::io::Error),
    /// The pager panicked.
    #[error("the pager panicked, which is a defect in it: report the message in its log")]
    Panicked,
}

/// What to do with a guest whose memory does not come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnFailure {
    /// Stop it (SIGSTOP, QMP `stop`), so that it can be looked at, and end.
    Pause,
    /// Kill it, and end.
    #[default]
    Kill,
    /// Leave it waiting for its pages, stay, and try on; the log and the admin socket say so.
    Hold,
}

/// The exit codes of the commands that serve a clone.
pub mod exit_code {
    /// The clone is complete, or its guest ended.
    pub const DONE: u8 = 0;
    /// Set-up failed: the socket, the descriptor, a permission.
    pub const SETUP: u8 = 1;
    /// The command line was wrong.
    pub const USAGE: u8 = 2;
    /// The page servers were gone for longer than `--patience`.
    pub const SOURCE_GONE: u8 = 3;
    /// The page servers refuse to serve the image: ticket, unknown image, another version.
    pub const REFUSED: u8 = 4;
    /// The fault port failed: the kernel, the hypervisor, or its protocol.
    pub const PORT: u8 = 5;
    /// A page that the guest waits for could not be had.
    pub const PAGE: u8 = 6;
    /// A page of the guest was found to be wrong.
    pub const MISMATCH: u8 = 7;
    /// Stopped by a signal or the admin socket before the clone was complete.
    pub const STOPPED: u8 = 8;
}

impl Outcome {
    /// The exit code that tells of it, see [`exit_code`].
    pub fn exit_code(&self) -> u8 {
        match self {
            Outcome::Complete | Outcome::GuestGone => exit_code::DONE,
            Outcome::Stopped(_) => exit_code::STOPPED,
            Outcome::Failed(error) => error.exit_code(),
        }
    }
}

impl EngineError {
    fn exit_code(&self) -> u8 {
        match self {
            EngineError::Port(_) | EngineError::Guest(_) | EngineError::Wait(_) | EngineError::Panicked => {
                exit_code::PORT
            }
            EngineError::Source(_) => exit_code::REFUSED,
            EngineError::Pager(Failure::SourceGone { .. }) => exit_code::SOURCE_GONE,
            EngineError::Pager(_) => exit_code::PAGE,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Complete => f.write_str("complete: every page is there"),
            Outcome::GuestGone => f.write_str("the guest ended"),
            Outcome::Stopped(reason) => write!(f, "stopped by {reason} before the clone was complete"),
            Outcome::Failed(error) => {
                write!(f, "failed: {error}")?;
                let mut source = std::error::Error::source(error);
                while let Some(error) = source {
                    write!(f, ": {error}")?;
                    source = error.source();
                }
                Ok(())
            }
        }
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StopReason::Signal(number) => write!(f, "signal {number}"),
            StopReason::Admin => f.write_str("the admin socket"),
        }
    }
}
