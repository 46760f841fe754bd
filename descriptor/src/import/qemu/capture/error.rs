use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::super::{ImportError, qmp::QmpError};
use super::method::{Method, MethodError};

/// A capture that failed. Unless the error says otherwise, the parent goes on as before.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// The conversation with QEMU failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The method does not fit the parent.
    #[error("cannot capture by {method}")]
    Method {
        /// The method that was asked for.
        method: Method,
        /// Why not.
        source: MethodError,
    },
    /// The kernel or its settings keep QEMU from tracking writes.
    #[error(
        "QEMU cannot track the guest's writes by userfaultfd, which {method} needs ({description}). Run QEMU as root or \
         with CAP_SYS_PTRACE, or set the sysctl vm.unprivileged_userfaultfd=1; where QEMU opens /dev/userfaultfd (8.1 and \
         newer), give it access to that. Or capture by another method"
    )]
    WriteTracking {
        /// The method that was tried.
        method: Method,
        /// QEMU's own words.
        description: String,
    },
    /// The guest's memory is of a kind whose writes cannot be tracked.
    #[error(
        "the writes to this guest's memory cannot be tracked, which {method} needs ({description}). Shared memory takes \
         Linux 5.19 or newer. Or capture by another method"
    )]
    WriteTrackingMemory {
        /// The method that was tried.
        method: Method,
        /// QEMU's own words.
        description: String,
    },
    /// A migration is under way already.
    #[error("the parent is in a migration already (its status is {0:?})")]
    Busy(String),
    /// The migration failed.
    #[error("the migration to the file ended as {status:?}: {description}")]
    Migration {
        /// QEMU's status of it.
        status: String,
        /// QEMU's own words.
        description: String,
    },
    /// The migration makes no progress.
    #[error("the migration to the file made no progress for {0:?} and was cancelled")]
    Stalled(Duration),
    /// The observer broke the capture off.
    #[error("the capture was broken off")]
    BrokenOff,
    /// A file of the capture could not be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The memory's file could not be copied.
    #[error("cannot copy the memory in {path}")]
    CopyMemory {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The capture makes no image.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// The parent could not be put back as it was.
    #[error("the capture is done with, but the parent could not be put back as it was: look at it with query-status")]
    NotRestored(#[source] QmpError),
    /// The capture failed, and the parent could not be put back as it was.
    #[error("{capture}; and the parent could not be put back as it was: look at it with query-status")]
    FailedAndNotRestored {
        /// Why the capture failed.
        capture: Box<CaptureError>,
        /// Why the parent could not be put back.
        #[source]
        restore: QmpError,
    },
}

impl CaptureError {
    /// `refused`, or what it means where QEMU's words are known.
    pub(super) fn of_capabilities(method: Method, refused: QmpError) -> Self {
        match refused {
            QmpError::Refused { description, .. } if description.contains("not supported by host kernel") => {
                Self::WriteTracking { method, description }
            }
            QmpError::Refused { description, .. } if description.contains("guest memory configuration") => {
                Self::WriteTrackingMemory { method, description }
            }
            other => Self::Qmp(other),
        }
    }

    /// True when another method might do better. Disks are frozen but once, so a migration that fails after that is final.
    pub(super) fn is_of_the_method(&self, disks: bool) -> bool {
        match self {
            Self::Method { .. } | Self::WriteTracking { .. } | Self::WriteTrackingMemory { .. } => true,
            Self::Migration { .. } | Self::Qmp(QmpError::Refused { .. }) => !disks,
            _ => false,
        }
    }
}
