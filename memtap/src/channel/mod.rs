//! The shell of the multicast channel: a socket that has joined the group, and what makes pages of its datagrams.
//!
//! It takes datagrams in small portions, so that whoever runs it can look after faults in between, and sends what the channel
//! has to say to the server. Which pages are asked for here, and what happens when none come, is decided in
//! [`lanes`](crate::lanes).

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use descriptor::FrameRange;
use mcast::intake::{Intake, IntakeEvent};
use mcast::receiver::{ChannelEvent, ReceiverConfig, ReceiverStats};
use mcast::{ChannelParameters, Lacks, Member, Serial, Start};
use mcast_socket::{Group, ReceiveConfig, Receiving};
use thiserror::Error;

use crate::lanes::PROBE;
use crate::source::ChannelPeer;

/// Datagrams between two looks at what they make: about one block of bulk, or what the kernel coalesces some times over.
const PORTION: usize = 128;

const _: () = assert!(PORTION <= Intake::MAX_BATCH);

/// A channel that cannot be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The offer names what is no group.
    #[error(transparent)]
    Group(#[from] mcast_socket::ParseGroupError),
    /// The group cannot be joined.
    #[error(transparent)]
    Socket(#[from] mcast_socket::SocketError),
    /// The offer does not suit the image.
    #[error(transparent)]
    Parameters(#[from] mcast::ChannelError),
}

/// What comes out of a channel.
#[derive(Debug)]
pub enum Arrival<'a> {
    /// Pages; without bytes they are zeros.
    Pages {
        /// The frames.
        frames: FrameRange,
        /// Their bytes.
        bytes: Option<&'a [u8]>,
    },
    /// Something happened to the channel.
    Event(ChannelEvent),
}

/// One clone's end of a multicast channel. It belongs to the thread that opens it.
pub struct Channel {
    parameters: ChannelParameters,
    receiving: Receiving,
    intake: Intake,
    /// The socket was found readable and not drained since.
    readable: bool,
    /// When to join for any source, should nothing have come from the server's own address.
    widen_at: Option<Duration>,
}

impl Channel {
    /// Joins the group that a server offers, on `interface` where one is given.
    ///
    /// # Errors
    /// When the group cannot be joined, or the offer does not suit the image.
    pub fn open(now: Duration, peer: &ChannelPeer, interface: Option<&str>) -> Result<Self, OpenError> {
        let offer = &peer.offer;
        let parameters = ChannelParameters {
            session: offer.session,
            payload: offer.payload,
            frames: peer.frames,
            chunk_frames: offer.chunk_frames,
        };
        parameters.check()?;
        let group = Group::new(offer.group.ip(), offer.group.port(), interface.map(str::to_owned))?;
        let receiving =
            Receiving::open(&ReceiveConfig { local: peer.local, ..ReceiveConfig::new(group, peer.server) })?;
        let start = Start { seq: Serial::new(offer.start_seq), next_block: offer.start_block.map(Serial::new) };
        let buffer = u32::try_from(receiving.buffer_bytes()).unwrap_or(u32::MAX);
        let config = ReceiverConfig::new(parameters, Member(offer.member), start, buffer);
        // The member's number is random, and so is what it spreads.
        let intake = Intake::new(now, config, offer.member);
        Ok(Self { parameters, receiving, intake, readable: true, widen_at: Some(now + PROBE / 2) })
    }

    /// The group and the interface it was joined on, for people.
    pub fn group(&self) -> (&Group, Option<&str>) {
        (self.receiving.group(), self.receiving.interface())
    }

    /// What to do about a socket that holds less than it was to.
    pub fn advice(&self) -> Option<String> {
        self.receiving.buffer_advice()
    }

    /// The descriptor to watch.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.receiving.fd()
    }

    /// Notes that the descriptor was found readable.
    pub fn set_readable(&mut self) {
        self.readable = true;
    }

    /// True when [`Channel::take`] may have something that the descriptor does not tell of.
    pub fn has_work(&self) -> bool {
        self.readable || self.receiving.has_more()
    }

    /// When [`Channel::deliver`] wants to be called at the latest.
    pub fn next_timeout(&self) -> Option<Duration> {
        [self.intake.next_timeout(), self.widen_at].into_iter().flatten().min()
    }

    /// Takes some datagrams from the socket; false when there are no more.
    ///
    /// # Errors
    /// When the socket does not receive any more.
    pub fn take(&mut self, now: Duration) -> io::Result<bool> {
        for _ in 0..PORTION {
            let Some(datagram) = self.receiving.receive()? else {
                self.readable = false;
                return Ok(false);
            };
            if let Some(total) = datagram.overflow {
                self.intake.set_overflow(total);
            }
            self.intake.handle(now, datagram.bytes);
        }
        Ok(true)
    }

    /// Hands out what came of the datagrams so far, and sends what is due.
    ///
    /// # Errors
    /// What `sink` returns.
    pub fn deliver<E>(&mut self, now: Duration, mut sink: impl FnMut(Arrival<'_>) -> Result<(), E>) -> Result<(), E> {
        self.widen(now);
        while let Some(event) = self.intake.poll(now) {
            match event {
                IntakeEvent::Pages { frames, bytes } => sink(Arrival::Pages { frames, bytes })?,
                IntakeEvent::Channel(event) => {
                    self.widen_at = self.widen_at.filter(|_| event != ChannelEvent::Live);
                    sink(Arrival::Event(event))?;
                }
                IntakeEvent::Send { datagram } => match self.receiving.send_to_server(&datagram) {
                    Ok(true) => {}
                    Ok(false) => tracing::debug!("feedback was dropped: the socket is full"),
                    Err(error) => tracing::debug!(%error, "feedback cannot be sent"),
                },
            }
        }
        Ok(())
    }

    /// Frames that one bit of a report stands for.
    pub fn parameters(&self) -> &ChannelParameters {
        &self.parameters
    }

    /// Tells the server what is wanted by push.
    pub fn set_lacks(&mut self, now: Duration, lacks: Option<Lacks>) {
        self.intake.set_lacks(now, lacks);
    }

    /// What was received so far.
    pub fn stats(&self) -> &ReceiverStats {
        self.intake.stats()
    }

    /// Clones in the channel, as the server last said; 0 before it did.
    pub fn members(&self) -> u32 {
        self.intake.members()
    }

    fn widen(&mut self, now: Duration) {
        if self.widen_at.is_none_or(|at| now < at) {
            return;
        }
        self.widen_at = None;
        match self.receiving.widen() {
            Ok(true) => tracing::debug!("nothing came from the server's own address; any source will do"),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "the group cannot be joined for any source"),
        }
    }
}
