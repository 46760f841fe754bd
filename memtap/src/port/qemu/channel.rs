//! One socket to the destination: a bounded queue of whole messages, in which demand overtakes bulk.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use socket2::Socket;

/// Bulk is refused while this much is queued: large enough to keep the socket busy between two turns of the event loop,
/// small enough to be written, and overtaken in the socket's own buffer, within a millisecond.
const BULK_QUEUE_MAX: usize = 256 << 10;

/// Demand is refused while this much is queued: the pages of a thousand vCPUs, or two huge ones.
const DEMAND_QUEUE_MAX: usize = 4 << 20;

/// The most messages gathered into one write; more gain nothing, as a page alone is 4 KiB.
const GATHER_MAX: usize = 64;

/// The most parts that Linux takes in one write (`UIO_MAXIOV`).
const PARTS_MAX: usize = 1024;

/// How urgent a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urgency {
    /// Before all bulk.
    Demand,
    /// In its turn, and not before the socket is next looked at.
    Bulk,
}

#[derive(Debug)]
pub(super) struct Channel {
    socket: Socket,
    demand: VecDeque<Vec<u8>>,
    bulk: VecDeque<Vec<u8>>,
    /// The rest of a message whose beginning was written: nothing may come between.
    begun: VecDeque<Vec<u8>>,
    /// How much of the first message in `begun` was written.
    written: usize,
    queued: usize,
}

impl Channel {
    /// Makes the socket non-blocking.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        let socket = Socket::from(socket);
        socket.set_nonblocking(true)?;
        let (demand, bulk, begun) = (VecDeque::new(), VecDeque::new(), VecDeque::with_capacity(1));
        Ok(Self { socket, demand, bulk, begun, written: 0, queued: 0 })
    }

    /// True when a message may be queued or sent.
    pub(super) fn has_room(&self, urgency: Urgency) -> bool {
        match urgency {
            Urgency::Demand => self.queued < DEMAND_QUEUE_MAX,
            Urgency::Bulk => self.queued < BULK_QUEUE_MAX,
        }
    }

    /// True when something waits to be written.
    pub(super) fn is_pending(&self) -> bool {
        self.queued > 0
    }

    /// Queues a message.
    pub(super) fn push(&mut self, urgency: Urgency, message: Vec<u8>) {
        self.queued += message.len();
        match urgency {
            Urgency::Demand => self.demand.push_back(message),
            Urgency::Bulk => self.bulk.push_back(message),
        }
    }

    /// Writes the message that `parts` make at once as far as that is possible, and queues the rest; so its bytes are
    /// copied only where the socket is full. A message that must wait for others is queued whole.
    pub(super) fn send(&mut self, urgency: Urgency, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let overtakes =
            self.begun.is_empty() && (!self.is_pending() || urgency == Urgency::Demand && self.demand.is_empty());
        let written = if overtakes { self.write(parts)? } else { 0 };
        let total: usize = parts.iter().map(|part| part.len()).sum();
        if written == total {
            return Ok(());
        }
        let mut rest = Vec::with_capacity(total - written);
        let mut skip = written;
        for part in parts {
            let skipped = skip.min(part.len());
            rest.extend_from_slice(&part[skipped..]);
            skip -= skipped;
        }
        if written == 0 {
            self.push(urgency, rest);
        } else {
            self.queued += rest.len();
            self.begun.push_back(rest);
        }
        Ok(())
    }

    /// Writes what is queued, as far as the socket takes it.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while self.is_pending() {
            let queues = [&self.begun, &self.demand, &self.bulk];
            let messages = queues.into_iter().flatten().take(GATHER_MAX);
            let skips = std::iter::once(self.written).chain(std::iter::repeat(0));
            let parts: Vec<IoSlice<'_>> =
                messages.zip(skips).map(|(message, skip)| IoSlice::new(&message[skip..])).collect();
            let count = self.write(&parts)?;
            if count == 0 {
                return Ok(());
            }
            self.wrote(count);
        }
        Ok(())
    }

    /// Reads what is there: 0 bytes when nothing is, `None` at the end of the stream.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match (&self.socket).read(buffer) {
                Ok(0) => return Ok(None),
                Ok(count) => return Ok(Some(count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Some(0)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Removes `count` written bytes from the queues.
    fn wrote(&mut self, mut count: usize) {
        self.queued -= count;
        count += self.written;
        self.written = 0;
        while count > 0 {
            let queues = [&mut self.begun, &mut self.demand, &mut self.bulk];
            let Some(message) = queues.into_iter().find_map(VecDeque::pop_front) else {
                return;
            };
            if count < message.len() {
                self.begun.push_front(message);
                self.written = count;
                return;
            }
            count -= message.len();
        }
    }

    /// Writes as much as the socket takes, 0 when it is full.
    fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let parts = &parts[..parts.len().min(PARTS_MAX)];
        loop {
            match (&self.socket).write_vectored(parts) {
                Ok(count) => return Ok(count),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(0),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn drain(peer: &mut UnixStream, channel: &mut Channel) -> Vec<u8> {
        peer.set_nonblocking(true).unwrap();
        let mut all = Vec::new();
        loop {
            let mut buffer = vec![0; 1 << 16];
            match peer.read(&mut buffer) {
                Ok(count) => all.extend_from_slice(&buffer[..count]),
                Err(_) if channel.is_pending() => channel.flush().unwrap(),
                Err(_) => return all,
            }
        }
    }

    #[test]
    fn demand_overtakes_bulk_but_never_cuts_a_message() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(near.into()).unwrap();
        let large = vec![b'a'; 1 << 20];
        channel.send(Urgency::Bulk, &[IoSlice::new(&large[..7]), IoSlice::new(&large[7..])]).unwrap();
        assert!(channel.is_pending() && !channel.has_room(Urgency::Bulk) && channel.has_room(Urgency::Demand));
        channel.push(Urgency::Bulk, b"bulk".to_vec());
        channel.send(Urgency::Demand, &[IoSlice::new(b"dem"), IoSlice::new(b"and")]).unwrap();
        channel.send(Urgency::Demand, &[IoSlice::new(b"second")]).unwrap();
        let received = drain(&mut far, &mut channel);
        assert_eq!(received.len(), large.len() + 16);
        assert_eq!(&received[large.len()..], b"demandsecondbulk");
        assert!(channel.has_room(Urgency::Bulk));
    }

    #[test]
    fn demand_goes_straight_past_queued_bulk() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(near.into()).unwrap();
        channel.push(Urgency::Bulk, b"bulk".to_vec());
        channel.send(Urgency::Demand, &[IoSlice::new(b"demand")]).unwrap();
        assert_eq!(drain(&mut far, &mut channel), b"demandbulk");
    }

    #[test]
    fn an_ended_stream_is_told_apart_from_an_empty_one() {
        let (near, far) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(near.into()).unwrap();
        assert_eq!(channel.read(&mut [0; 8]).unwrap(), Some(0));
        drop(far);
        assert_eq!(channel.read(&mut [0; 8]).unwrap(), None);
    }
}
