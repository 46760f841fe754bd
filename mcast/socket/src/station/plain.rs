//! Sends and receives by plain system calls, for kernels without what the ring needs.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::ready::Ready;
use super::{FEEDBACK, FEEDBACK_SIZE, PAUSE, TRIES, is_no_offload, is_passing};
use crate::address;
use crate::burst::Burst;
use crate::sys::{self, Batch, Outgoing};

/// The lane of plain system calls.
pub(super) struct Plain<K> {
    to: SocketAddr,
    wake: Option<OwnedFd>,
    offload: bool,
    /// What is still to be sent, in its order.
    queue: VecDeque<(Burst<K>, bool)>,
    /// The first of them, as the kernel wants it, and how many of its messages are sent.
    outgoing: Box<Outgoing>,
    sent: Option<usize>,
    /// The kernel was out of memory so often; it is asked again at that time.
    tries: u32,
    pause: Option<Instant>,
    batch: Batch,
}

impl<K> Plain<K> {
    pub(super) fn new(to: SocketAddr, wake: Option<OwnedFd>, offload: bool) -> Self {
        Self {
            to,
            wake,
            offload,
            queue: VecDeque::new(),
            outgoing: Outgoing::new(),
            sent: None,
            tries: 0,
            pause: None,
            batch: Batch::new(FEEDBACK, FEEDBACK_SIZE),
        }
    }

    pub(super) fn offload(&self) -> bool {
        self.offload
    }

    pub(super) fn submit(&mut self, burst: Burst<K>, control: bool) {
        self.queue.push_back((burst, control));
    }

    pub(super) fn wait(
        &mut self,
        socket: BorrowedFd<'_>,
        timeout: Option<Duration>,
        ready: &mut VecDeque<Ready<K>>,
    ) -> io::Result<()> {
        // What was received and not looked at stays where it is until it is.
        let reads = !ready.iter().any(|ready| matches!(ready, Ready::Feedback(_)));
        self.flush(socket, ready);
        let timeout = if ready.is_empty() { timeout } else { Some(Duration::ZERO) };
        let pause = self.pause.map(|end| end.saturating_duration_since(Instant::now()));
        let timeout = timeout.into_iter().chain(pause).min();
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, reads);
        wanted.set(PollFlags::OUT, !self.queue.is_empty() && self.pause.is_none());
        let wake = self.wake.as_ref().map(|wake| PollFd::new(wake, PollFlags::IN));
        let mut fds: Vec<_> = [PollFd::from_borrowed_fd(socket, wanted)].into_iter().chain(wake).collect();
        let timeout = timeout.map(|timeout| Timespec::try_from(timeout).unwrap_or(FOREVER));
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let (came, woken) = (fds[0].revents(), fds.get(1).is_some_and(|wake| !wake.revents().is_empty()));
        if woken {
            ready.push_back(Ready::Woken);
        }
        if came.contains(PollFlags::OUT) || self.pause.is_some_and(|end| Instant::now() >= end) {
            self.flush(socket, ready);
        }
        if reads && came.intersects(PollFlags::IN | PollFlags::ERR) {
            match self.batch.receive(socket) {
                Ok(count) => ready.extend((0..count as u16).map(Ready::Feedback)),
                // Reading has taken the error off the socket.
                Err(error) => tracing::debug!(%error, "no feedback received"),
            }
        }
        Ok(())
    }

    /// Lends the datagram at that place; false when it is no feedback: too long, or without an address of a source.
    pub(super) fn lend(&mut self, place: u16) -> bool {
        self.feedback(place).is_some()
    }

    /// The datagram that is lent, and its source.
    pub(super) fn feedback(&self, place: u16) -> Option<(SocketAddr, &[u8])> {
        let message = self.batch.message(place.into()).filter(|message| !message.truncated)?;
        Some((address::decode(message.name)?, message.payload))
    }

    /// Sends as much as the socket takes.
    fn flush(&mut self, socket: BorrowedFd<'_>, ready: &mut VecDeque<Ready<K>>) {
        self.pause = None;
        while let Some((burst, _)) = self.queue.front() {
            let first = *self.sent.get_or_insert_with(|| {
                self.outgoing.set(self.to, burst, self.offload);
                0
            });
            let result = match sys::send(socket, &mut self.outgoing, first) {
                Ok(sent) if first + sent < self.outgoing.len() => {
                    self.sent = Some(first + sent);
                    continue;
                }
                Ok(_) => Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if is_passing(&error) && self.tries < TRIES => {
                    self.tries += 1;
                    self.pause = Some(Instant::now() + PAUSE);
                    return;
                }
                Err(error) if self.offload && is_no_offload(&error, burst) => {
                    (self.offload, self.sent) = (false, None);
                    continue;
                }
                Err(error) => Err(error),
            };
            (self.sent, self.tries) = (None, 0);
            ready.extend(self.queue.pop_front().map(|(burst, control)| Ready::Sent { burst, result, control }));
        }
    }
}

/// A timeout longer than the kernel can tell.
const FOREVER: Timespec = Timespec { tv_sec: i64::MAX, tv_nsec: 0 };

impl<K> std::fmt::Debug for Plain<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plain")
            .field("offload", &self.offload)
            .field("queued", &self.queue.len())
            .finish_non_exhaustive()
    }
}
