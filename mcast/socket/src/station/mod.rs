//! The sender's side: bursts and control datagrams go out to the group, feedback comes in, in one place to wait.

mod plain;
mod ready;
mod ring;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use self::plain::Plain;
use self::ready::Ready;
use self::ring::Ring;
use crate::Features;
use crate::burst::Burst;
use crate::error::{SendError, SocketError};
use crate::group::Group;
use crate::open::{self, SenderOptions, SenderSocket, system};
use crate::sys;

/// Bursts under way at most. They only queue up while the socket's buffer is full, and then a few keep the device busy; more
/// would only stand before demand.
const BURSTS: usize = 8;

/// Control datagrams under way at most. What exceeds them is dropped, as the network might have done.
const CONTROLS: usize = 32;

/// The longest feedback datagram that is taken; longer ones are dropped. They are to fit every path.
const FEEDBACK_SIZE: usize = 2048;

/// Feedback datagrams that are received at a time.
const FEEDBACK: usize = 64;

/// The kernel is asked again after so long when it is out of memory for a datagram, and so often; then the burst fails.
const PAUSE: Duration = Duration::from_millis(1);
const TRIES: u32 = 10;

/// Bytes of feedback datagrams that wait to be read: some thousand, for the reports of many members may come at once.
const FEEDBACK_BUFFER: usize = 4 << 20;

/// How a station is to be.
#[derive(Clone, Debug)]
pub struct StationConfig {
    /// Where it sends to.
    pub group: Group,
    /// How many routers its datagrams may cross, and one: 1 keeps them in the local network, 0 on this host.
    pub ttl: u8,
    /// Receivers on this host get the datagrams too.
    pub loopback: bool,
    /// Bytes that the socket queues for the device. More smooths bulk; demand stands behind it.
    pub send_buffer: usize,
    /// What may be used; for tests.
    pub features: Features,
}

impl StationConfig {
    /// The usual for `group`.
    pub fn new(group: Group) -> Self {
        Self { group, ttl: 1, loopback: true, send_buffer: 1 << 20, features: Features::ALL }
    }
}

/// What happened at a station.
#[derive(Debug)]
pub enum Event<'a, K> {
    /// The kernel is done with a burst: it is sent, or why it is not (or not all of it). The burst may be used again.
    Sent {
        /// The burst with what it kept.
        burst: Burst<K>,
        /// What became of it.
        result: Result<(), SendError>,
    },
    /// A control datagram was not sent.
    ControlFailed(SendError),
    /// A datagram came to the station's own address.
    Feedback {
        /// Its source.
        from: SocketAddr,
        /// Its bytes.
        bytes: &'a [u8],
    },
    /// The event counter that the station watches is signalled. This comes again until it is reset.
    Woken,
}

/// A socket that sends to a group and takes feedback.
///
/// The turn of a loop is: [`submit`](Station::submit) and [`send`](Station::send) what there is, [`wait`](Station::wait), and
/// take events with [`next_event`](Station::next_event) until there are none. Whatever was submitted goes out in the wait, in its order.
/// The station belongs to the thread that waits first.
#[derive(Debug)]
pub struct Station<K> {
    socket: OwnedFd,
    facts: Facts,
    lane: Lane<K>,
    /// Bursts under way.
    bursts: usize,
    controls: usize,
    /// Control datagrams for use again.
    spare: Vec<Burst<K>>,
    ready: VecDeque<Ready<K>>,
}

#[derive(Debug)]
enum Lane<K> {
    Ring(Box<Ring<K>>),
    Plain(Box<Plain<K>>),
}

/// Calls a method of whichever lane it is.
macro_rules! of_lane {
    ($lane:expr, $method:ident($($argument:expr),*)) => {
        match $lane {
            Lane::Ring(lane) => lane.$method($($argument),*),
            Lane::Plain(lane) => lane.$method($($argument),*),
        }
    };
}

#[derive(Debug)]
struct Facts {
    local: SocketAddr,
    interface: Option<String>,
    max_datagram: u16,
}

impl<K> Station<K> {
    /// Opens a station; `wake` is an event counter to watch (its descriptor is duplicated).
    ///
    /// # Errors
    /// When there is no such interface, no route to the group, or the kernel refuses a call.
    pub fn open(config: &StationConfig, wake: Option<BorrowedFd<'_>>) -> Result<Self, SocketError> {
        let StationConfig { group, ttl, loopback, send_buffer, features } = config;
        let options = SenderOptions { ttl: *ttl, loopback: *loopback, buffer: *send_buffer };
        let SenderSocket { fd, group: to, local, interface, max_datagram } = open::sender(group, &options)?;
        // The kernel's own default serves where it allows no more.
        let _smaller = open::receive_buffer(fd.as_fd(), FEEDBACK_BUFFER);
        let wake = wake.map(|wake| wake.try_clone_to_owned()).transpose();
        let wake = wake.map_err(system(group, "watch the event counter"))?;
        let offload = features.offload && sys::get_int(fd.as_fd(), libc::SOL_UDP, libc::UDP_SEGMENT).is_ok();
        let ring = features.ring.then(|| Ring::new(fd.as_fd(), to, wake.as_ref().map(AsFd::as_fd), offload));
        let lane = match ring.transpose() {
            Ok(Some(ring)) => Lane::Ring(Box::new(ring)),
            Ok(None) => Lane::Plain(Box::new(Plain::new(to, wake, offload))),
            Err(error) => {
                tracing::info!(%error, "no io_uring of Linux 6.0 for the group; plain system calls serve");
                Lane::Plain(Box::new(Plain::new(to, wake, offload)))
            }
        };
        Ok(Self {
            socket: fd,
            facts: Facts { local, interface, max_datagram },
            lane,
            bursts: 0,
            controls: 0,
            spare: Vec::new(),
            ready: VecDeque::new(),
        })
    }

    /// The address and port that feedback is to be sent to.
    pub fn local(&self) -> SocketAddr {
        self.facts.local
    }

    /// The interface that datagrams leave by, where it could be found out.
    pub fn interface(&self) -> Option<&str> {
        self.facts.interface.as_deref()
    }

    /// The size of the largest datagram in bytes, by the interface's MTU: without the headers of IP and UDP, with those of the
    /// protocol. At most 60 KiB, for loopback.
    pub fn max_datagram(&self) -> u16 {
        self.facts.max_datagram
    }

    /// What is in use. Offload goes when the device turns out not to do it.
    pub fn features(&self) -> Features {
        Features { ring: matches!(self.lane, Lane::Ring(_)), offload: of_lane!(&self.lane, offload()) }
    }

    /// How many bursts can be submitted at present.
    pub fn room(&self) -> usize {
        BURSTS - self.bursts
    }

    /// Sends a burst to the group; [`Event::Sent`] brings it back.
    ///
    /// # Errors
    /// Gives it back when there is no room.
    ///
    /// # Panics
    /// When the burst does not [fit](Burst::fits), or its datagrams are larger than [`Station::max_datagram`].
    pub fn submit(&mut self, burst: Burst<K>) -> Result<(), Burst<K>> {
        assert!(burst.fits(), "a burst of {} bytes in {} datagrams", burst.len(), burst.datagrams());
        assert!(
            burst.len().min(burst.segment().into()) <= self.facts.max_datagram.into(),
            "datagrams of {} bytes",
            burst.segment()
        );
        if self.room() == 0 {
            return Err(burst);
        }
        self.bursts += 1;
        of_lane!(&mut self.lane, submit(burst, false));
        Ok(())
    }

    /// Sends one small datagram to the group, after the bursts that were submitted; false when too many are under way, and it
    /// is dropped.
    ///
    /// # Panics
    /// When it is empty, or larger than [`Station::max_datagram`].
    pub fn send(&mut self, datagram: &[u8]) -> bool {
        assert!(!datagram.is_empty() && datagram.len() <= self.facts.max_datagram.into(), "a control datagram's size");
        if self.controls == CONTROLS {
            return false;
        }
        let mut burst = self.spare.pop().unwrap_or_else(|| Burst::new(1));
        burst.reset(datagram.len() as u16);
        burst.copy(datagram);
        self.controls += 1;
        of_lane!(&mut self.lane, submit(burst, true));
        true
    }

    /// Sends what was submitted, and waits for an event: at most `timeout`, for ever where that is `None`.
    ///
    /// # Errors
    /// When the kernel refuses to wait or to receive; never because of something that was sent.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let timeout = if self.ready.is_empty() { timeout } else { Some(Duration::ZERO) };
        of_lane!(&mut self.lane, wait(self.socket.as_fd(), timeout, &mut self.ready))
    }

    /// The next event, without waiting.
    pub fn next_event(&mut self) -> Option<Event<'_, K>> {
        let place = loop {
            match self.ready.pop_front()? {
                Ready::Sent { burst, result, control: false } => {
                    self.bursts -= 1;
                    let segment = burst.segment();
                    let result = result.map_err(|error| SendError::new(segment, error));
                    return Some(Event::Sent { burst, result });
                }
                Ready::Sent { burst, result, control: true } => {
                    self.controls -= 1;
                    let segment = burst.segment();
                    self.spare.push(burst);
                    if let Err(error) = result {
                        return Some(Event::ControlFailed(SendError::new(segment, error)));
                    }
                }
                Ready::Feedback(place) => {
                    if of_lane!(&mut self.lane, lend(place)) {
                        break place;
                    }
                }
                Ready::Woken => return Some(Event::Woken),
            }
        };
        let (from, bytes) = of_lane!(&self.lane, feedback(place))?;
        Some(Event::Feedback { from, bytes })
    }
}

/// True where a burst of several datagrams failed because the device does no checksums, so that the kernel does no
/// segmentation for it.
fn is_no_offload<K>(error: &io::Error, burst: &Burst<K>) -> bool {
    let lacking = error.raw_os_error() == Some(libc::EIO) && burst.datagrams() > 1;
    if lacking {
        tracing::info!("the interface does not take bursts; sending datagram by datagram");
    }
    lacking
}

/// True for what is over in a moment: no memory for a datagram, a queue that is full.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM))
}
