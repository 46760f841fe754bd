//! Receives by plain system calls, for kernels without what the ring needs.

use std::io;
use std::os::fd::BorrowedFd;

use super::SIZE;
use crate::sys::{Batch, Message};

/// Messages that are received at a time. Coalesced, sixteen are close to a megabyte.
const MESSAGES: usize = 16;

/// The lane of plain system calls.
pub(super) struct Plain {
    batch: Batch,
    next: usize,
    filled: usize,
}

impl Plain {
    pub(super) fn new() -> Self {
        Self { batch: Batch::new(MESSAGES, SIZE), next: 0, filled: 0 }
    }

    /// The place of the next message. The one before it is gone then.
    pub(super) fn next(&mut self, socket: BorrowedFd<'_>) -> io::Result<Option<u16>> {
        if self.next == self.filled {
            (self.next, self.filled) = (0, 0);
            self.filled = match self.batch.receive(socket) {
                Ok(count) => count,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
                Err(error) => return Err(error),
            };
        }
        if self.filled == 0 {
            return Ok(None);
        }
        self.next += 1;
        Ok(Some((self.next - 1) as u16))
    }

    /// The message at that place.
    pub(super) fn message(&self, place: u16) -> Message<'_> {
        self.batch.message(place.into()).unwrap_or_default()
    }

    /// True when a message was received that nobody has looked at.
    pub(super) fn has_more(&self) -> bool {
        self.next < self.filled
    }
}
