use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use descriptor::FrameRange;
use descriptor::fetch::{
    Capabilities, ChannelGoneReason, ChannelOffer, Class, Delivery, Encoding, ErrorCode, GoodbyeReason, Hello, Limits,
    LocalImage, Message, PageRun, Preamble, Request, Tag, Touched, Welcome, decode, decode_preamble,
};
use descriptor::working_set::Merged;

use super::inbox::Inbox;
use super::socket::{Received, Socket};
use super::{Lane, SessionError, SourceConfig};

/// How long connecting and the handshake may take, each: a server in the same data centre answers within a millisecond,
/// one that is paging or starting within a second or two.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);

/// Silence after which the server is asked whether it is there.
const PING_AFTER: Duration = Duration::from_secs(2);

/// Silence after which it is not.
const SILENCE_LIMIT: Duration = Duration::from_secs(6);

/// No ping is answered while more bytes than this are unsent: a multiple of what the requests that a pager has open take.
const OUTBOX_MAX: usize = 1 << 20;

/// How often the socket is read for one [`Connection::next`], so that a flood of messages that do not matter cannot keep the
/// pager from its guest.
const READS_MAX: usize = 4;

/// Capabilities that change what comes, so that a server must not take them up unasked.
const SWITCHED: Capabilities = Capabilities::LOCAL.union(Capabilities::MULTICAST).union(Capabilities::WORKING_SET);

/// Runs of an order that are kept; no server has more.
const MAX_ORDER: usize = Merged::MAX_ENTRIES;

/// One connection from its first byte to its last.
pub(super) struct Connection {
    socket: Socket,
    stage: Stage,
    inbox: Inbox,
    files: Vec<OwnedFd>,
    outbox: Vec<u8>,
    sent: usize,
    readable: bool,
    /// The inbox may hold another whole message.
    buffered: bool,
    /// What HELLO offers.
    offered: Capabilities,
    /// What of it was taken up.
    agreed: Capabilities,
    /// What came of the order, and whether that is all.
    order: Vec<FrameRange>,
    ordered: bool,
    ping_after: Duration,
    began: Duration,
    heard: Duration,
    spoke: Duration,
    /// The last ping, and whether nothing was heard since.
    pinged: Option<Duration>,
}

enum Stage {
    Connecting,
    Preamble,
    Welcome,
    Image(Welcome),
    Open,
}

/// What a connection brings, without the bytes.
pub(super) enum Incoming {
    /// The session is open. Where the server has a multicast channel, it will be offered; where it keeps working sets, an order
    /// follows.
    Open { limits: Limits, local: Option<(LocalImage, Vec<OwnedFd>)>, multicast: bool, ordered: bool },
    /// What to fetch ahead of need.
    Order(Vec<FrameRange>),
    /// A multicast channel.
    Channel(ChannelOffer),
    /// It has ended for us.
    ChannelGone { reason: ChannelGoneReason, text: String },
    /// Pages, whose payload lies in the inbox.
    Pages { tag: Tag, frames: FrameRange, encoding: Encoding, last: bool, payload: Range<usize> },
    /// A request failed.
    Failed { tag: Tag, code: ErrorCode, text: String },
}

impl Connection {
    /// Takes a socket that is connecting.
    pub(super) fn new(socket: Socket, wants_local: bool, config: &SourceConfig, now: Duration) -> Self {
        let mut outbox = Vec::with_capacity(4096);
        Preamble.encode(&mut outbox);
        let local = if wants_local { Capabilities::LOCAL } else { Capabilities::default() };
        let multicast = if config.multicast { Capabilities::MULTICAST } else { Capabilities::default() };
        let working_set = if config.working_set { Capabilities::WORKING_SET } else { Capabilities::default() };
        let offered = Capabilities::LZ4.union(local).union(multicast).union(working_set);
        let hello = Hello { image: config.image, capabilities: offered, ticket: &config.ticket };
        Message::Hello(hello).encode(&mut outbox);
        Self {
            socket,
            stage: Stage::Connecting,
            inbox: Inbox::new(),
            files: vec![],
            outbox,
            sent: 0,
            readable: false,
            buffered: false,
            offered,
            agreed: Capabilities::default(),
            order: vec![],
            ordered: false,
            ping_after: PING_AFTER,
            began: now,
            heard: now,
            spoke: now,
            pinged: None,
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.fd()
    }

    /// True when the socket is to be watched for room to send.
    pub(super) fn wants_write(&self) -> bool {
        matches!(self.stage, Stage::Connecting) || self.sent < self.outbox.len()
    }

    /// Notes that the socket was found readable.
    pub(super) fn set_readable(&mut self) {
        self.readable = true;
    }

    /// True when [`Connection::next`] may have something.
    pub(super) fn has_work(&self) -> bool {
        self.readable || self.buffered
    }

    /// The bytes of a payload that was the last to come out of [`Connection::next`].
    pub(super) fn payload(&self, place: Range<usize>) -> &[u8] {
        self.inbox.consumed(place)
    }

    /// Queues a request; [`Connection::flush`] sends it.
    pub(super) fn request(&mut self, tag: Tag, class: Class, delivery: Delivery, ranges: &[FrameRange]) {
        Request::encode(tag, class, delivery, ranges, &mut self.outbox);
    }

    /// True when the server wants to know what the guest needs.
    pub(super) fn listens(&self) -> bool {
        matches!(self.stage, Stage::Open) && self.agreed.contains(Capabilities::WORKING_SET)
    }

    /// Queues a report of what the guest needs.
    pub(super) fn touched(&mut self, ranges: &[FrameRange], last: bool, declined: bool) {
        Touched::encode(ranges, last, declined, &mut self.outbox);
    }

    /// Takes leave: sends what is queued and waits until the server has read it, for `patience` at most.
    pub(super) fn leave(mut self, patience: Duration) {
        if matches!(self.stage, Stage::Open) {
            Message::Goodbye(GoodbyeReason::Done, "").encode(&mut self.outbox);
            let rest = self.outbox.split_off(self.sent);
            if let Err(error) = self.socket.finish(&rest, patience) {
                tracing::debug!(%error, "the server did not hear the last words");
            }
        }
    }

    /// The address of the server's end and of this one, where the connection has such.
    pub(super) fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        self.socket.addresses()
    }

    /// Goes on with connecting, and sends what is queued.
    pub(super) fn flush(&mut self, now: Duration) -> Result<(), SessionError> {
        if matches!(self.stage, Stage::Connecting) {
            return Ok(());
        }
        while self.sent < self.outbox.len() {
            match self.socket.send(&self.outbox[self.sent..]).map_err(SessionError::Broken)? {
                0 => {
                    self.outbox.drain(..self.sent);
                    self.sent = 0;
                    return Ok(());
                }
                count => self.sent += count,
            }
            self.spoke = now;
        }
        self.outbox.clear();
        self.sent = 0;
        Ok(())
    }

    /// Notes that the socket was found writable.
    pub(super) fn set_writable(&mut self, now: Duration) -> Result<(), SessionError> {
        if matches!(self.stage, Stage::Connecting) {
            self.socket.connected().map_err(SessionError::Connect)?;
            self.stage = Stage::Preamble;
            (self.began, self.heard, self.spoke) = (now, now, now);
        }
        self.flush(now)
    }

    /// When [`Connection::tick`] wants to be called.
    pub(super) fn deadline(&self) -> Duration {
        match self.stage {
            Stage::Open => {
                let quiet = self.heard.min(self.spoke);
                let ping = self.pinged.map_or(quiet, |pinged| pinged.max(quiet)) + self.ping_after;
                ping.min(self.heard + SILENCE_LIMIT)
            }
            _ => self.began + HANDSHAKE_TIMEOUT,
        }
    }

    /// Does what is due: pings, gives a silent server up.
    pub(super) fn tick(&mut self, now: Duration) -> Result<(), SessionError> {
        if now < self.deadline() {
            return Ok(());
        }
        if !matches!(self.stage, Stage::Open) {
            return Err(SessionError::Silent(HANDSHAKE_TIMEOUT));
        }
        let silence = now.saturating_sub(self.heard);
        if silence >= SILENCE_LIMIT {
            return Err(SessionError::Silent(silence));
        }
        Message::Ping.encode(&mut self.outbox);
        self.pinged = Some(now);
        self.flush(now)
    }

    /// The next message that matters, from what was received or what the socket has.
    pub(super) fn next(&mut self, now: Duration, config: &SourceConfig) -> Result<Option<Incoming>, SessionError> {
        for _ in 0..READS_MAX {
            if let Some(incoming) = self.parse(config)? {
                self.buffered = true;
                return Ok(Some(incoming));
            }
            self.buffered = false;
            if !self.readable {
                return Ok(None);
            }
            let spare = self.inbox.spare();
            let room = spare.len();
            match self.socket.receive(spare, &mut self.files).map_err(SessionError::Broken)? {
                Received::Nothing => self.readable = false,
                Received::End => return Err(SessionError::Closed),
                Received::Bytes(count) => {
                    self.inbox.received(count);
                    self.buffered = true;
                    self.heard = now;
                    // Less than there was room for: the socket is drained, unless files cut the bytes short.
                    self.readable = count == room || !matches!(self.stage, Stage::Open);
                }
            }
        }
        Ok(None)
    }

    /// Handles what lies in the inbox up to a message that matters; `None` when more bytes are needed.
    fn parse(&mut self, config: &SourceConfig) -> Result<Option<Incoming>, SessionError> {
        loop {
            if matches!(self.stage, Stage::Preamble) {
                let Some((_, length)) = decode_preamble(self.inbox.unread())? else { return Ok(None) };
                self.inbox.consume(length);
                self.stage = Stage::Welcome;
            }
            if matches!(self.stage, Stage::Open) && std::mem::take(&mut self.ordered) {
                return Ok(Some(Incoming::Order(std::mem::take(&mut self.order))));
            }
            let Some((message, length)) = decode(self.inbox.unread())? else { return Ok(None) };
            let incoming = match (&self.stage, message) {
                (Stage::Open, Message::Pages(run)) => {
                    let PageRun { tag, frames, encoding, last, payload } = run;
                    let payload_length = payload.len();
                    let place = self.inbox.consume(length);
                    let payload = place.end - payload_length..place.end;
                    return Ok(Some(Incoming::Pages { tag, frames, encoding, last, payload }));
                }
                (Stage::Open, Message::Error(tag, code, text)) => {
                    Some(Incoming::Failed { tag, code, text: text.to_owned() })
                }
                (Stage::Welcome, Message::Welcome(welcome)) => {
                    check_image(&welcome, config)?;
                    let local = welcome.capabilities.contains(Capabilities::LOCAL);
                    let multicast = welcome.capabilities.contains(Capabilities::MULTICAST);
                    if !self.offered.contains(welcome.capabilities.intersection(SWITCHED)) {
                        return Err(SessionError::OutOfTurn("WELCOME with a capability that was not offered"));
                    }
                    if !local && config.lane == Lane::Local {
                        return Err(SessionError::NoLocalLane);
                    }
                    self.agreed = welcome.capabilities.intersection(self.offered);
                    self.ping_after = ping_after(welcome.limits);
                    if local {
                        self.stage = Stage::Image(welcome);
                        None
                    } else {
                        self.stage = Stage::Open;
                        let ordered = self.agreed.contains(Capabilities::WORKING_SET);
                        Some(Incoming::Open { limits: welcome.limits, local: None, multicast, ordered })
                    }
                }
                (Stage::Image(welcome), Message::Image(image)) => {
                    let limits = welcome.limits;
                    self.stage = Stage::Open;
                    Some(Incoming::Open {
                        limits,
                        local: Some((image, std::mem::take(&mut self.files))),
                        multicast: false,
                        ordered: self.agreed.contains(Capabilities::WORKING_SET),
                    })
                }
                (Stage::Open | Stage::Image(_), Message::Order(part))
                    if self.agreed.contains(Capabilities::WORKING_SET) =>
                {
                    let room = MAX_ORDER - self.order.len();
                    self.order.extend(part.ranges.iter().take(room));
                    self.ordered = part.last;
                    None
                }
                (Stage::Open, Message::Channel(offer)) if self.offered.contains(Capabilities::MULTICAST) => {
                    Some(Incoming::Channel(offer))
                }
                (Stage::Open, Message::ChannelGone(reason, text)) => {
                    Some(Incoming::ChannelGone { reason, text: text.to_owned() })
                }
                (Stage::Welcome, Message::Refused(reason, text)) => {
                    return Err(SessionError::Refused { reason, text: text.to_owned() });
                }
                (_, Message::Goodbye(reason, text)) => {
                    return Err(SessionError::Goodbye { reason, text: text.to_owned() });
                }
                (_, Message::Ping) => {
                    if self.outbox.len() - self.sent > OUTBOX_MAX {
                        return Err(SessionError::Backlog(self.outbox.len() - self.sent));
                    }
                    Message::Pong.encode(&mut self.outbox);
                    None
                }
                (_, Message::Pong) => None,
                (_, other) => return Err(SessionError::OutOfTurn(name(&other))),
            };
            self.inbox.consume(length);
            if incoming.is_some() {
                return Ok(incoming);
            }
        }
    }
}

fn check_image(welcome: &Welcome, config: &SourceConfig) -> Result<(), SessionError> {
    if welcome.image == config.image && welcome.frames == config.universe {
        return Ok(());
    }
    let (image, frames) = (welcome.image, welcome.frames);
    Err(SessionError::OtherImage { image, frames, expected: config.image, universe: config.universe })
}

/// Well within the server's patience.
fn ping_after(limits: Limits) -> Duration {
    match limits.idle_timeout_ms {
        0 => PING_AFTER,
        idle => PING_AFTER.min(Duration::from_millis(idle.into()) / 3).max(Duration::from_millis(10)),
    }
}

fn name(message: &Message<'_>) -> &'static str {
    match message {
        Message::Hello(_) => "HELLO",
        Message::Welcome(_) => "WELCOME",
        Message::Refused(..) => "REFUSED",
        Message::Request(_) => "REQUEST",
        Message::Pages(_) => "PAGES",
        Message::Error(..) => "ERROR",
        Message::Ping => "PING",
        Message::Pong => "PONG",
        Message::Goodbye(..) => "GOODBYE",
        Message::Image(_) => "IMAGE",
        Message::Channel(_) => "CHANNEL",
        Message::ChannelGone(..) => "CHANNEL_GONE",
        Message::Touched(_) => "TOUCHED",
        Message::Order(_) => "ORDER",
    }
}

/// Replaces `pages` by the bytes of a compressed run, whose encoding and length were checked when it was decoded.
pub(super) fn decompress(payload: &[u8], frames: FrameRange, pages: &mut Vec<u8>) -> Result<(), SessionError> {
    // A run has at most a megabyte of pages.
    let length = frames.count().bytes() as usize;
    pages.resize(length, 0);
    let error = |text| SessionError::Compression { frames: frames.count(), text };
    match lz4_flex::block::decompress_into(payload, pages) {
        Ok(written) if written == length => Ok(()),
        Ok(written) => Err(error(format!("it holds {written} bytes, not {length}"))),
        Err(source) => Err(error(source.to_string())),
    }
}
