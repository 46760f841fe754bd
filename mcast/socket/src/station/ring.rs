//! Sends and receives by an io_uring.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::ready::Ready;
use super::{FEEDBACK_SIZE, PAUSE, TRIES, is_no_offload, is_passing};
use crate::address;
use crate::burst::Burst;
use crate::sys::{Completion, SocketRing, Waiting};

/// Buffers for feedback: more than what comes while one turn of the loop goes by. The rest waits in the socket.
const BUFFERS: u16 = 256;

/// The lane of an io_uring.
///
/// Sends never block, and are chained: what comes after one that finds the socket full is not sent either, so that the order
/// stays. It is then sent when the socket has room.
pub(super) struct Ring<K> {
    ring: SocketRing<InFlight<K>>,
    to: SocketAddr,
    offload: bool,
    /// What is still to be sent, by number.
    queue: VecDeque<InFlight<K>>,
    /// The number of the next.
    next: u64,
    /// The socket is full.
    full: bool,
    /// The kernel was out of memory; it is asked again at that time.
    pause: Option<Instant>,
    /// The buffer that is lent out.
    lent: Option<u16>,
}

/// A burst under way.
struct InFlight<K> {
    number: u64,
    burst: Burst<K>,
    control: bool,
    /// Datagrams of it that are sent already, where they go one by one.
    sent: usize,
    /// How often the kernel had no memory for it.
    tries: u32,
}

impl<K> Ring<K> {
    pub(super) fn new(
        socket: BorrowedFd<'_>,
        to: SocketAddr,
        wake: Option<BorrowedFd<'_>>,
        offload: bool,
    ) -> io::Result<Self> {
        let ring = SocketRing::new(Waiting::Inside, socket, wake, BUFFERS, FEEDBACK_SIZE)?;
        Ok(Self { ring, to, offload, queue: VecDeque::new(), next: 0, full: false, pause: None, lent: None })
    }

    pub(super) fn offload(&self) -> bool {
        self.offload
    }

    pub(super) fn submit(&mut self, burst: Burst<K>, control: bool) {
        self.queue.push_back(InFlight { number: self.next, burst, control, sent: 0, tries: 0 });
        self.next += 1;
    }

    pub(super) fn wait(
        &mut self,
        _socket: BorrowedFd<'_>,
        timeout: Option<Duration>,
        ready: &mut VecDeque<Ready<K>>,
    ) -> io::Result<()> {
        self.take_back();
        let entered = self.flush(ready)?;
        if entered && !ready.is_empty() {
            return Ok(());
        }
        let timeout = if ready.is_empty() { timeout } else { Some(Duration::ZERO) };
        let pause = self.pause.map(|end| end.saturating_duration_since(Instant::now()));
        self.ring.wait(1, timeout.into_iter().chain(pause).min())?;
        self.reap(ready)?;
        self.flush(ready).map(drop)
    }

    /// Lends the datagram at that place; false when it is no feedback: too long, or without an address of a source.
    pub(super) fn lend(&mut self, place: u16) -> bool {
        self.take_back();
        self.lent = Some(place);
        self.feedback(place).is_some()
    }

    /// The datagram that is lent, and its source.
    pub(super) fn feedback(&self, place: u16) -> Option<(SocketAddr, &[u8])> {
        let message = self.ring.message(place);
        let payload = Some(message.payload).filter(|payload| !message.truncated && payload.len() <= FEEDBACK_SIZE)?;
        Some((address::decode(message.name)?, payload))
    }

    fn take_back(&mut self) {
        if let Some(buffer) = self.lent.take() {
            self.ring.give_back(buffer);
        }
    }

    /// Sends what is queued, as far as the socket takes it; tells whether that was anything.
    fn flush(&mut self, ready: &mut VecDeque<Ready<K>>) -> io::Result<bool> {
        let mut entered = false;
        self.pause = self.pause.filter(|end| Instant::now() < *end);
        while !self.queue.is_empty() && !self.full && self.pause.is_none() && self.ring.sends() == 0 {
            let (to, offload) = (self.to, self.offload);
            while let Some(send) = self.queue.pop_front() {
                self.ring.send(send, !self.queue.is_empty(), |send, outgoing| {
                    outgoing.set(to, &send.burst, offload);
                    send.sent
                });
            }
            // They do not block, so this takes no longer than they do.
            self.ring.wait(self.ring.sends(), Some(Duration::ZERO))?;
            self.reap(ready)?;
            entered = true;
        }
        Ok(entered)
    }

    fn reap(&mut self, ready: &mut VecDeque<Ready<K>>) -> io::Result<()> {
        while let Some(completion) = self.ring.next()? {
            match completion {
                Completion::Sent { mut what, messages, result } => {
                    what.sent += messages;
                    ready.extend(self.sent(what, result));
                }
                Completion::Received(buffer) => ready.push_back(Ready::Feedback(buffer)),
                Completion::Woken => ready.push_back(Ready::Woken),
                Completion::Writable => self.full = false,
            }
        }
        Ok(())
    }

    /// Queues it once more, where that may help.
    fn sent(&mut self, mut send: InFlight<K>, result: io::Result<()>) -> Option<Ready<K>> {
        match result {
            Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.ring.watch_writable();
                self.full = true;
            }
            Err(error) if self.offload && is_no_offload(&error, &send.burst) => self.offload = false,
            Err(error) if is_passing(&error) && send.tries < TRIES => {
                send.tries += 1;
                self.pause = Some(Instant::now() + PAUSE);
            }
            result => return Some(Ready::Sent { burst: send.burst, result, control: send.control }),
        }
        let place = self.queue.partition_point(|queued| queued.number < send.number);
        self.queue.insert(place, send);
        None
    }
}

impl<K> std::fmt::Debug for Ring<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("offload", &self.offload).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_burst_that_may_go_otherwise_is_sent_again() {
        let (socket, receiver) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        let mut ring = Ring::new(socket.as_fd(), receiver.local_addr().unwrap(), None, true).unwrap();
        for error in [libc::EIO, libc::ENOBUFS] {
            let mut burst = Burst::<()>::new(100);
            burst.copy(&[7; 250]);
            let send = InFlight { number: 0, burst, control: false, sent: 0, tries: 0 };
            assert!(ring.sent(send, Err(io::Error::from_raw_os_error(error))).is_none());
            assert!(!ring.offload());
            let mut ready = VecDeque::new();
            while ready.is_empty() {
                ring.wait(socket.as_fd(), None, &mut ready).unwrap();
            }
            assert!(matches!(ready.pop_front(), Some(Ready::Sent { result: Ok(()), .. })));
            let lengths = [0; 3].map(|_| receiver.recv(&mut [0; 1000]).unwrap());
            assert_eq!(lengths, [100, 100, 50]);
        }
    }

    #[test]
    fn a_burst_that_never_goes_is_given_up() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut ring = Ring::new(socket.as_fd(), socket.local_addr().unwrap(), None, true).unwrap();
        let mut burst = Burst::<()>::new(100);
        burst.copy(&[7; 100]);
        let send = InFlight { number: 0, burst, control: false, sent: 0, tries: TRIES };
        let ready = ring.sent(send, Err(io::Error::from_raw_os_error(libc::ENOBUFS)));
        assert!(matches!(ready, Some(Ready::Sent { result: Err(_), .. })));
    }
}
