//! Receives by an io_uring.

use std::convert::Infallible;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use super::SIZE;
use crate::sys::{Completion, Message, SocketRing, Waiting};

/// Buffers for messages: as many as the kernel fills in one go (`MULTISHOT_MAX_RETRY`). More would only be colder; the rest
/// waits in the socket.
const BUFFERS: u16 = 32;

/// The lane of an io_uring.
pub(super) struct Ring {
    ring: SocketRing<Infallible>,
    /// The buffer that datagrams are being taken from.
    lent: Option<u16>,
}

impl Ring {
    /// Begins to receive, in the calling thread.
    pub(super) fn new(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let mut ring = SocketRing::new(Waiting::Poll, socket, None, BUFFERS, SIZE)?;
        ring.wait(0, Some(Duration::ZERO))?;
        Ok(Self { ring, lent: None })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.ring.fd()
    }

    /// The place of the next message. The one before it is gone then.
    pub(super) fn next(&mut self) -> io::Result<Option<u16>> {
        if let Some(buffer) = self.lent.take() {
            self.ring.give_back(buffer);
        }
        let mut entered = false;
        loop {
            if let Some(Completion::Received(buffer)) = self.ring.next()? {
                self.lent = Some(buffer);
                return Ok(Some(buffer));
            }
            // The descriptor tells of more only while more is received.
            if entered && self.ring.receives() {
                return Ok(None);
            }
            self.ring.wait(0, Some(Duration::ZERO))?;
            entered = true;
        }
    }

    /// The message at that place.
    pub(super) fn message(&self, place: u16) -> Message<'_> {
        self.ring.message(place)
    }
}
