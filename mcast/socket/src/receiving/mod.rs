//! The receiver's side: joins the group, and takes apart what the kernel has coalesced.

mod plain;
mod ring;
mod segments;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::SendFlags;

use self::plain::Plain;
use self::ring::Ring;
use self::segments::Segments;
use crate::Features;
use crate::control::{self, Facts};
use crate::error::SocketError;
use crate::group::Group;
use crate::interface::Chosen;
use crate::open::{self, ReceiverOptions, ReceiverSocket, system};
use crate::sys::{self, Message};

/// Bytes of a message: all that one can have.
const SIZE: usize = 1 << 16;

/// How a receiver is to be.
#[derive(Clone, Debug)]
pub struct ReceiveConfig {
    /// The group to join.
    pub group: Group,
    /// The address and port that feedback goes to, which datagrams come from.
    pub server: SocketAddr,
    /// This host's own address in the session with the server. Where the group names no interface, it is joined on the one
    /// that this address is of, unless the server turns out to be on this host.
    pub local: Option<IpAddr>,
    /// Join for datagrams from the server's address alone, which IGMPv3 and MLDv2 switches and routers make use of.
    pub source_specific: bool,
    /// Bytes of datagrams that the socket is to hold while nobody reads them.
    pub buffer: usize,
    /// What may be used; for tests.
    pub features: Features,
}

impl ReceiveConfig {
    /// The usual for `group`: joined for the server's datagrams alone, with 8 MiB of buffer.
    pub fn new(group: Group, server: SocketAddr) -> Self {
        Self { group, server, local: None, source_specific: true, buffer: 8 << 20, features: Features::ALL }
    }
}

/// A datagram that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// Its bytes.
    pub bytes: &'a [u8],
    /// How often the socket had no room so far, where it ever happened: see [`Receiving::drops`].
    pub overflow: Option<u32>,
}

/// A socket that has joined a group. It belongs to the thread that opens it.
pub struct Receiving {
    group: Group,
    socket: OwnedFd,
    server: SocketAddr,
    interface: Option<Chosen>,
    buffer: Buffer,
    lane: Lane,
    offload: bool,
    /// The rest of the message that datagrams are being taken from.
    message: Option<(u16, Segments)>,
    source: Option<IpAddr>,
    drops: u32,
    truncated: u64,
}

enum Lane {
    Ring(Box<Ring>),
    Plain(Box<Plain>),
}

/// What a socket can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Buffer {
    wanted: usize,
    got: usize,
}

impl Receiving {
    /// Opens a socket and joins.
    ///
    /// Any number of receivers on a host may do that; each gets a copy of every datagram.
    ///
    /// # Errors
    /// When there is no such interface, the port is taken, the group cannot be joined, or the kernel refuses a call.
    pub fn open(config: &ReceiveConfig) -> Result<Self, SocketError> {
        let ReceiveConfig { group, server, local, source_specific, buffer: wanted, features } = config;
        let options =
            ReceiverOptions { server: *server, local: *local, source_specific: *source_specific, buffer: *wanted };
        let ReceiverSocket { fd, server, interface, source, buffer: got } = open::receiver(group, &options)?;
        let offload = features.offload && sys::set_int(fd.as_fd(), libc::SOL_UDP, libc::UDP_GRO, 1).is_ok();
        let lane = match features.ring.then(|| Ring::new(fd.as_fd())).transpose() {
            Ok(Some(ring)) => Lane::Ring(Box::new(ring)),
            Ok(None) => Lane::Plain(Box::new(Plain::new())),
            Err(error) => {
                tracing::info!(%error, "no io_uring of Linux 6.0 for the group; plain system calls serve");
                Lane::Plain(Box::new(Plain::new()))
            }
        };
        Ok(Self {
            group: group.clone(),
            socket: fd,
            server,
            interface,
            buffer: Buffer { wanted: *wanted, got },
            lane,
            offload,
            message: None,
            source,
            drops: 0,
            truncated: 0,
        })
    }

    /// The next datagram, without waiting; `None` when there is none at the moment.
    ///
    /// Several may come as one from the kernel: [`Receiving::fd`] does not tell of those that are left of it, so take
    /// datagrams until there are none, or ask [`Receiving::has_more`] before waiting.
    ///
    /// # Errors
    /// When the kernel refuses to receive.
    pub fn receive(&mut self) -> io::Result<Option<Datagram<'_>>> {
        let (place, range) = loop {
            if let Some((place, segments)) = &mut self.message {
                if let Some(range) = segments.next() {
                    break (*place, range);
                }
                self.message = None;
            }
            let Some(place) = self.lane.next(self.socket.as_fd())? else { return Ok(None) };
            let message = self.lane.message(place);
            let Facts { segment, overflow } = control::read(message.control);
            self.drops = overflow.unwrap_or(self.drops);
            if message.truncated {
                self.truncated += 1;
            } else {
                self.message = Some((place, Segments::new(message.payload.len(), segment)));
            }
        };
        let bytes = self.lane.message(place).payload.get(range).unwrap_or_default();
        Ok(Some(Datagram { bytes, overflow: (self.drops > 0).then_some(self.drops) }))
    }

    /// True when a datagram can be had that [`Receiving::fd`] does not tell of.
    pub fn has_more(&self) -> bool {
        self.message.as_ref().is_some_and(|(_, segments)| !segments.is_empty())
            || matches!(&self.lane, Lane::Plain(lane) if lane.has_more())
    }

    /// What becomes readable when datagrams arrive.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match &self.lane {
            Lane::Ring(lane) => lane.fd(),
            Lane::Plain(_) => self.socket.as_fd(),
        }
    }

    /// Sends a datagram to the server; false when it had to be dropped because the socket is full.
    ///
    /// # Errors
    /// When the network does not take it.
    pub fn send_to_server(&self, datagram: &[u8]) -> io::Result<bool> {
        use rustix::io::Errno;
        match rustix::net::sendto(&self.socket, datagram, SendFlags::DONTWAIT | SendFlags::NOSIGNAL, &self.server) {
            Ok(_) => Ok(true),
            Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM | Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Joins for datagrams from any source, where it was for the server's alone; true when that changed something.
    ///
    /// For networks where the server's datagrams come from another address than feedback goes to.
    ///
    /// # Errors
    /// When the group cannot be joined so; then nothing arrives any more.
    pub fn widen(&mut self) -> Result<bool, SocketError> {
        let Some(source) = self.source.take() else { return Ok(false) };
        let (fd, index) = (self.socket.as_fd(), self.interface.as_ref().map_or(0, |chosen| chosen.index));
        sys::leave(fd, self.group.address, index, source)
            .map_err(system(&self.group, "leave the group for its source"))?;
        sys::join(fd, self.group.address, index, None).map_err(|source| {
            let interface = self.interface.as_ref().map(|chosen| chosen.name.clone());
            SocketError::Join { group: self.group.clone(), interface, source }
        })?;
        Ok(true)
    }

    /// The group.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// The interface that the group was joined on; `None` when the routing table chose it.
    pub fn interface(&self) -> Option<&str> {
        self.interface.as_ref().map(|chosen| chosen.name.as_str())
    }

    /// What is in use.
    pub fn features(&self) -> Features {
        Features { ring: matches!(self.lane, Lane::Ring(_)), offload: self.offload }
    }

    /// Bytes of datagrams that the socket holds while nobody reads them, as far as one can say: the kernel counts its
    /// own bookkeeping too, which is as much again for datagrams that come one by one.
    pub fn buffer_bytes(&self) -> usize {
        self.buffer.got
    }

    /// What to do about a buffer that is smaller than it was to be, in words.
    pub fn buffer_advice(&self) -> Option<String> {
        let Buffer { wanted, got } = self.buffer;
        (got < wanted).then(|| {
            format!(
                "the socket of {} holds {got} bytes instead of {wanted}: raise it with `sysctl -w net.core.rmem_max={wanted}`",
                self.group
            )
        })
    }

    /// How often the socket had no room so far, wrapping, as told by what was received last. Each time counts once, a single
    /// datagram as well as a coalesced burst of them.
    pub fn drops(&self) -> u32 {
        self.drops
    }

    /// Datagrams that were too long for any buffer, and dropped.
    pub fn truncated(&self) -> u64 {
        self.truncated
    }
}

impl Lane {
    fn next(&mut self, socket: BorrowedFd<'_>) -> io::Result<Option<u16>> {
        match self {
            Self::Ring(lane) => lane.next(),
            Self::Plain(lane) => lane.next(socket),
        }
    }

    fn message(&self, place: u16) -> Message<'_> {
        match self {
            Self::Ring(lane) => lane.message(place),
            Self::Plain(lane) => lane.message(place),
        }
    }
}

impl fmt::Debug for Receiving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiving").field("group", &self.group).field("server", &self.server).finish_non_exhaustive()
    }
}
