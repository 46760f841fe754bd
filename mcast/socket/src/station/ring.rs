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
pub(super) struct Ring<K> {
    ring: SocketRing<InFlight<K>>,
    to: SocketAddr,
    offload: bool,
    /// What the kernel had no memory for, until when.
    later: VecDeque<(Instant, InFlight<K>)>,
    /// The buffer that is lent out.
    lent: Option<u16>,
}

/// A burst under way.
struct InFlight<K> {
    burst: Burst<K>,
    control: bool,
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
        Ok(Self { ring, to, offload, later: VecDeque::new(), lent: None })
    }

    pub(super) fn offload(&self) -> bool {
        self.offload
    }

    pub(super) fn submit(&mut self, burst: Burst<K>, control: bool) {
        self.send(InFlight { burst, control, tries: 0 });
    }

    pub(super) fn wait(
        &mut self,
        _socket: BorrowedFd<'_>,
        timeout: Option<Duration>,
        ready: &mut VecDeque<Ready<K>>,
    ) -> io::Result<()> {
        self.take_back();
        let now = Instant::now();
        while let Some((_, send)) = self.later.pop_front_if(|(time, _)| *time <= now) {
            self.send(send);
        }
        let pause = self.later.front().map(|(time, _)| time.saturating_duration_since(now));
        self.ring.wait(timeout.into_iter().chain(pause).min())?;
        while let Some(completion) = self.ring.next()? {
            match completion {
                Completion::Sent { what, result } => ready.extend(self.sent(what, result)),
                Completion::Received(buffer) => ready.push_back(Ready::Feedback(buffer)),
                Completion::Woken => ready.push_back(Ready::Woken),
            }
        }
        Ok(())
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

    fn send(&mut self, send: InFlight<K>) {
        let (to, offload) = (self.to, self.offload);
        self.ring.send(send, |send, outgoing| outgoing.set(to, &send.burst, offload));
    }

    /// Sends it once more, where that may help.
    fn sent(&mut self, mut send: InFlight<K>, result: io::Result<()>) -> Option<Ready<K>> {
        match result {
            Err(error) if is_no_offload(&error, &send.burst) => {
                self.offload = false;
                self.later.push_front((Instant::now(), send));
                None
            }
            Err(error) if is_passing(&error) && send.tries < TRIES => {
                send.tries += 1;
                self.later.push_back((Instant::now() + PAUSE, send));
                None
            }
            result => Some(Ready::Sent { burst: send.burst, result, control: send.control }),
        }
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
            let send = InFlight { burst, control: false, tries: 0 };
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
        let send = InFlight { burst, control: false, tries: TRIES };
        let ready = ring.sent(send, Err(io::Error::from_raw_os_error(libc::ENOBUFS)));
        assert!(matches!(ready, Some(Ready::Sent { result: Err(_), .. })));
    }
}
