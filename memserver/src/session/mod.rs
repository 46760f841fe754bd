//! The server's side of one fetch session: bytes in, decisions out, no I/O and no clock.
//!
//! ```text
//!   opening ── preamble ──▶ hello ── HELLO ──▶ serving ── drain ──▶ draining ── answered ──▶ closing
//!      └── time-out, strange bytes ──┴── refusal ──┴── goodbye, limits, silence ─────────────▶┘
//! ```
//!
//! A shell feeds what the socket gave ([`Session::receive`]), takes events out ([`Session::poll`]) and sends the control
//! bytes ([`Session::control`]) between two answers. Requests come out as [`Event::Request`]; which of them is answered next
//! is the business of [`crate::schedule`], and the bytes of pages pass neither of the two.
//!
//! A client that took the multicast capability up may be offered a channel ([`Session::offer_channel`]). From then on, and until
//! it is told that the channel has gone ([`Session::channel_gone`]), what it asks to be multicast comes out as
//! [`Event::Multicast`], and the session owes nothing for it.
//!
//! A client that took working sets up is told an order ([`Session::give_order`]), and what it tells comes out as [`Event::Touched`].

mod config;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use descriptor::fetch::{
    Capabilities, ChannelGoneReason, ChannelOffer, Class, Delivery, ErrorCode, FetchError, GoodbyeReason, Hello,
    Message, OrderPart, Preamble, Refusal, Request, Touched, Welcome, decode, decode_preamble, wire,
};
use descriptor::working_set::{Merged, WorkingSet};
use descriptor::{FrameRange, ImageId, PageCount};

pub use config::SessionConfig;

use crate::schedule::Answer;

/// The longest message that a client may send: a request with all of its ranges.
pub const MAX_CLIENT_MESSAGE: usize =
    size_of::<wire::Header>() + descriptor::fetch::MAX_RANGES * size_of::<wire::Range>();

/// Control bytes that may wait to be sent. A client that makes the server owe more (errors that it does not read) is cut off;
/// it is far above what the request limit lets an honest one cause, with the longest order on top.
const MAX_CONTROL: usize = (256 << 10) + Merged::MAX_ENTRIES * (size_of::<wire::Range>() + 1);

/// What the session must know of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageFacts {
    /// One more than the highest frame.
    pub frames: PageCount,
    /// Its files may be handed to a client of the same host.
    pub local: bool,
    /// It can have a multicast channel.
    pub multicast: bool,
}

/// Something for the shell to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// The handshake succeeded. With [`Capabilities::LOCAL`] among the capabilities, the IMAGE message is to follow the
    /// control bytes of this moment. With [`Capabilities::MULTICAST`], [`Session::offer_channel`] or
    /// [`Session::channel_gone`] is due some time. With [`Capabilities::WORKING_SET`], [`Session::give_order`] is due now.
    Welcomed {
        /// The image.
        image: ImageId,
        /// What both sides can do.
        capabilities: Capabilities,
    },
    /// Pages to be sent; [`Session::answered`] is due when they were.
    Request(Answer),
    /// Frames to be sent to the channel's group; nothing more is due for them.
    Multicast {
        /// Whether someone waits.
        class: Class,
        /// The frames.
        ranges: Vec<FrameRange>,
    },
    /// What the client needed, further to what it told before; at most [`WorkingSet::MAX_RUNS`] ranges in a session.
    Touched {
        /// The frames, within the image, in the order of first need.
        ranges: Vec<FrameRange>,
        /// It has ended and told everything.
        last: bool,
        /// It fetched nothing ahead because of its order.
        declined: bool,
    },
    /// Unsent answers are to be forgotten and no more bytes fed; when the control bytes are out, the sending direction is
    /// to be shut. What the client still sends is to be read and thrown away.
    Finish,
    /// The connection is to be closed at once.
    Abort(AbortReason),
}

/// Why a connection is closed without further words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AbortReason {
    /// It said nothing sensible in time.
    Handshake,
    /// It does not read what it asked for.
    Stalled,
    /// All was said; it did not close its side in time.
    Lingering,
    /// It makes the server owe it more than is good.
    Flood,
}

/// The state machine of one session.
#[derive(Debug)]
pub struct Session {
    config: Arc<SessionConfig>,
    phase: Phase,
    /// The head of a message whose rest has not come yet.
    partial: Vec<u8>,
    events: VecDeque<Event>,
    control: Vec<u8>,
    heard: Duration,
    pinged: bool,
    requests: u32,
    pages: u64,
    /// Since when a send makes no progress.
    sending: Option<Duration>,
    /// When set, the next HELLO is refused for this reason.
    refusal: Option<Refusal>,
    refused: Option<Refusal>,
    channel: Membership,
    /// Ranges that the client may tell still as needed; `None` when nothing of the kind was agreed on, or all is told.
    touchable: Option<usize>,
}

/// What the client is to the multicast channel of its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Membership {
    /// Nothing: there is none, or it did not ask, or it has gone.
    None,
    /// It waits for CHANNEL.
    Waiting,
    /// It was told of the channel.
    Member,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Preamble { deadline: Duration },
    Hello { deadline: Duration },
    Serving { frames: PageCount },
    Draining { frames: PageCount },
    Closing { deadline: Duration },
    Closed,
}

impl Session {
    /// A session whose client has just connected.
    pub fn new(now: Duration, config: Arc<SessionConfig>) -> Self {
        Self {
            phase: Phase::Preamble { deadline: now + config.handshake_timeout },
            config,
            partial: Vec::new(),
            events: VecDeque::new(),
            control: Vec::new(),
            heard: now,
            pinged: false,
            requests: 0,
            pages: 0,
            sending: None,
            refusal: None,
            refused: None,
            channel: Membership::None,
            touchable: None,
        }
    }

    /// Lets the handshake end in a refusal: the server is full, or about to stop.
    pub fn refuse(&mut self, reason: Refusal) {
        self.refusal = Some(reason);
    }

    /// Takes bytes from the client. `find` looks an image up.
    pub fn receive(&mut self, now: Duration, bytes: &[u8], find: &dyn Fn(ImageId) -> Option<ImageFacts>) {
        if self.is_closing() {
            return;
        }
        if self.partial.is_empty() {
            let used = self.consume(now, bytes, find);
            if !self.is_closing() {
                self.partial.extend_from_slice(bytes.get(used..).unwrap_or_default());
            }
            return;
        }
        let mut buffer = std::mem::take(&mut self.partial);
        buffer.extend_from_slice(bytes);
        let used = self.consume(now, &buffer, find);
        buffer.drain(..used);
        if !self.is_closing() {
            self.partial = buffer;
        }
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Bytes to be sent before any further answer; the shell takes them out.
    pub fn control(&mut self) -> &mut Vec<u8> {
        &mut self.control
    }

    /// A request was answered in part: `pages` of it were handed to the kernel, and nothing is left when `last`.
    pub fn answered(&mut self, now: Duration, pages: u64, last: bool) {
        self.pages = self.pages.saturating_sub(pages);
        if last {
            self.requests = self.requests.saturating_sub(1);
        }
        self.finish_draining(now);
    }

    /// A send begins (`true`), or has ended (`false`).
    pub fn sending(&mut self, now: Duration, under_way: bool) {
        self.sending = under_way.then_some(now);
    }

    /// Ends the session when what was asked for is answered; a handshake under way is refused.
    pub fn drain(&mut self, now: Duration) {
        match self.phase {
            Phase::Preamble { .. } | Phase::Hello { .. } => self.refusal = Some(Refusal::Draining),
            Phase::Serving { frames } => {
                self.phase = Phase::Draining { frames };
                self.finish_draining(now);
            }
            Phase::Draining { .. } | Phase::Closing { .. } | Phase::Closed => {}
        }
    }

    /// Ends the session because its image is no longer served. `unanswered` are the tags of requests without a full answer.
    pub fn image_gone(&mut self, now: Duration, unanswered: impl Iterator<Item = u64>) {
        if !matches!(self.phase, Phase::Serving { .. } | Phase::Draining { .. }) {
            return;
        }
        for tag in unanswered {
            Message::Error(tag, ErrorCode::ImageGone, "the image is no longer served").encode(&mut self.control);
        }
        self.goodbye(now, GoodbyeReason::ImageGone, "the image is no longer served");
    }

    /// Tells the client of the channel, if it still waits to be told; true if so.
    pub fn offer_channel(&mut self, offer: ChannelOffer) -> bool {
        let waits = self.is_serving() && self.channel == Membership::Waiting;
        if waits {
            self.channel = Membership::Member;
            self.push_control(&Message::Channel(offer));
        }
        waits
    }

    /// Tells a client that has or awaits a channel that there is none for it any more.
    pub fn channel_gone(&mut self, reason: ChannelGoneReason, text: &str) {
        if self.is_serving() && self.channel != Membership::None {
            self.push_control(&Message::ChannelGone(reason, Message::text(text)));
        }
        self.channel = Membership::None;
    }

    /// Tells a client that took working sets up what to fetch ahead; due once, right after it was welcomed.
    pub fn give_order(&mut self, order: &[FrameRange]) {
        if self.is_serving() {
            OrderPart::encode(order, &mut self.control);
        }
    }

    /// When [`Session::handle_timeout`] is due next; it may be later by then, but never earlier than told.
    pub fn next_timeout(&self) -> Option<Duration> {
        let stalled = self.sending.map(|since| since + self.config.stall_timeout);
        let own = match self.phase {
            Phase::Preamble { deadline } | Phase::Hello { deadline } | Phase::Closing { deadline } => Some(deadline),
            Phase::Serving { .. } | Phase::Draining { .. } if self.pinged => {
                Some(self.heard + self.config.idle_timeout())
            }
            Phase::Serving { .. } | Phase::Draining { .. } => Some(self.heard + self.config.idle_timeout() / 2),
            Phase::Closed => return None,
        };
        [own, stalled].into_iter().flatten().min()
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, now: Duration) {
        if self.phase == Phase::Closed {
            return;
        }
        if self.sending.is_some_and(|since| now >= since + self.config.stall_timeout) {
            return self.abort(AbortReason::Stalled);
        }
        match self.phase {
            Phase::Preamble { deadline } if now >= deadline => self.abort(AbortReason::Handshake),
            Phase::Hello { deadline } if now >= deadline => {
                self.refused(now, Refusal::Protocol, "no HELLO came in time");
            }
            Phase::Closing { deadline } if now >= deadline => self.abort(AbortReason::Lingering),
            Phase::Serving { .. } | Phase::Draining { .. } => self.check_silence(now),
            _ => {}
        }
    }

    /// True once nothing more is read from the client.
    pub fn is_closing(&self) -> bool {
        matches!(self.phase, Phase::Closing { .. } | Phase::Closed)
    }

    /// True while the client may ask for pages.
    pub fn is_serving(&self) -> bool {
        matches!(self.phase, Phase::Serving { .. } | Phase::Draining { .. })
    }

    /// Why the handshake ended in a refusal, if it did.
    pub fn refused_for(&self) -> Option<Refusal> {
        self.refused
    }

    /// Handles every whole message in `bytes` and tells how many bytes they took.
    fn consume(&mut self, now: Duration, bytes: &[u8], find: &dyn Fn(ImageId) -> Option<ImageFacts>) -> usize {
        let mut used = 0;
        while !self.is_closing() {
            let rest = bytes.get(used..).unwrap_or_default();
            let step = match self.phase {
                Phase::Preamble { deadline } => self.preamble(now, deadline, rest),
                _ => self.message(now, rest, find),
            };
            match step {
                Some(length) => used += length,
                None => break,
            }
        }
        used
    }

    fn preamble(&mut self, now: Duration, deadline: Duration, bytes: &[u8]) -> Option<usize> {
        match decode_preamble(bytes) {
            Ok(Some((_, length))) => {
                Preamble.encode(&mut self.control);
                self.phase = Phase::Hello { deadline };
                Some(length)
            }
            Ok(None) => None,
            // The layout of the preamble never changes, so ours tells a strange client all that it can understand.
            Err(error) => {
                tracing::debug!(%error, "strange client");
                Preamble.encode(&mut self.control);
                self.finish(now);
                None
            }
        }
    }

    fn message(&mut self, now: Duration, bytes: &[u8], find: &dyn Fn(ImageId) -> Option<ImageFacts>) -> Option<usize> {
        match client_message(bytes) {
            Ok(Some((message, length))) => {
                self.heard = now;
                self.pinged = false;
                match message {
                    Message::Hello(hello) => self.hello(now, &hello, find),
                    Message::Request(request) => self.request(now, request),
                    Message::Touched(touched) => self.touched(now, touched),
                    Message::Ping if self.is_serving() => self.push_control(&Message::Pong),
                    Message::Pong if self.is_serving() => {}
                    Message::Goodbye(..) => self.finish(now),
                    _ => self.violation(now, "that message has no place here"),
                }
                Some(length)
            }
            Ok(None) => None,
            Err(error) => {
                self.violation(now, &error.to_string());
                None
            }
        }
    }

    fn hello(&mut self, now: Duration, hello: &Hello<'_>, find: &dyn Fn(ImageId) -> Option<ImageFacts>) {
        if self.is_serving() {
            return self.violation(now, "a second HELLO");
        }
        // The ticket first: without it a client learns nothing, not even which images there are.
        if !self.config.admits(hello.ticket) {
            return self.refused(now, Refusal::Ticket, "the ticket is missing or wrong");
        }
        match self.refusal {
            Some(Refusal::Draining) => return self.refused(now, Refusal::Draining, "the server is about to stop"),
            Some(reason) => return self.refused(now, reason, "the server has as many sessions as it takes"),
            None => {}
        }
        let Some(facts) = find(hello.image) else {
            let text = format!("image {} is not served here", hello.image);
            return self.refused(now, Refusal::UnknownImage, &text);
        };
        let mut capabilities = hello.capabilities.intersection(self.config.capabilities);
        if !facts.local {
            capabilities = capabilities.without(Capabilities::LOCAL);
        }
        // Whoever has the image at hand needs nobody to send it.
        if !facts.multicast || capabilities.contains(Capabilities::LOCAL) {
            capabilities = capabilities.without(Capabilities::MULTICAST);
        }
        if capabilities.contains(Capabilities::MULTICAST) {
            self.channel = Membership::Waiting;
        }
        let reports = capabilities.contains(Capabilities::WORKING_SET);
        self.touchable = reports.then_some(WorkingSet::MAX_RUNS);
        let (image, limits) = (hello.image, self.config.limits);
        Message::Welcome(Welcome { image, frames: facts.frames, capabilities, limits }).encode(&mut self.control);
        self.phase = Phase::Serving { frames: facts.frames };
        self.events.push_back(Event::Welcomed { image, capabilities });
    }

    fn request(&mut self, now: Duration, request: Request<'_>) {
        let frames = match self.phase {
            Phase::Serving { frames } => frames,
            // GOODBYE is on its way; the client asks its next server.
            Phase::Draining { .. } => return,
            _ => return self.violation(now, "a request before HELLO"),
        };
        let limits = self.config.limits;
        let pages: u64 = request.ranges().map(|range| range.count().get()).sum();
        let multicast = request.delivery == Delivery::Multicast && self.channel == Membership::Member;
        // What is multicast counts as answered at once.
        let (requests_before, pages_before) = if multicast { (0, 0) } else { (self.requests, self.pages) };
        if requests_before >= limits.max_requests || pages_before.saturating_add(pages) > limits.max_pages.into() {
            let text = format!(
                "more than {} requests or {} pages asked for at one time",
                limits.max_requests, limits.max_pages
            );
            return self.goodbye(now, GoodbyeReason::Protocol, &text);
        }
        if let Some(range) = request.ranges().find(|range| range.end().index() > frames.get()) {
            let text = format!("frames {range} reach beyond the {frames} frames of the image");
            return self.push_control(&Message::Error(request.tag, ErrorCode::OutOfRange, &text));
        }
        let ranges = request.ranges().collect();
        if multicast {
            return self.events.push_back(Event::Multicast { class: request.class, ranges });
        }
        self.requests += 1;
        self.pages += pages;
        self.events.push_back(Event::Request(Answer::new(request.tag, request.class, ranges, now)));
    }

    fn touched(&mut self, now: Duration, touched: Touched<'_>) {
        let (Phase::Serving { frames } | Phase::Draining { frames }) = self.phase else {
            return self.violation(now, "a report before HELLO");
        };
        let Some(left) = self.touchable else {
            return self.violation(now, "a report that was not agreed on, or after the last");
        };
        if let Some(range) = touched.ranges.iter().find(|range| range.end().index() > frames.get()) {
            let text = format!("frames {range} reach beyond the {frames} frames of the image");
            return self.violation(now, &text);
        }
        // What goes beyond the bound is left to chance.
        let ranges: Vec<FrameRange> = touched.ranges.iter().take(left).collect();
        self.touchable = if touched.last { None } else { Some(left - ranges.len()) };
        if !ranges.is_empty() || touched.last {
            let Touched { last, declined, .. } = touched;
            self.events.push_back(Event::Touched { ranges, last, declined });
        }
    }

    fn check_silence(&mut self, now: Duration) {
        let silence = now.saturating_sub(self.heard);
        if silence >= self.config.idle_timeout() {
            let text = format!("nothing was heard for {} ms", self.config.limits.idle_timeout_ms);
            self.goodbye(now, GoodbyeReason::Idle, &text);
        } else if silence >= self.config.idle_timeout() / 2 && !self.pinged {
            self.pinged = true;
            self.push_control(&Message::Ping);
        }
    }

    fn finish_draining(&mut self, now: Duration) {
        if matches!(self.phase, Phase::Draining { .. }) && self.requests == 0 {
            self.goodbye(now, GoodbyeReason::Draining, "the server is about to stop");
        }
    }

    fn violation(&mut self, now: Duration, text: &str) {
        if self.is_serving() {
            self.goodbye(now, GoodbyeReason::Protocol, text);
        } else {
            self.refused(now, Refusal::Protocol, text);
        }
    }

    fn refused(&mut self, now: Duration, reason: Refusal, text: &str) {
        Message::Refused(reason, Message::text(text)).encode(&mut self.control);
        self.refused = Some(reason);
        self.finish(now);
    }

    fn goodbye(&mut self, now: Duration, reason: GoodbyeReason, text: &str) {
        Message::Goodbye(reason, Message::text(text)).encode(&mut self.control);
        self.finish(now);
    }

    fn finish(&mut self, now: Duration) {
        self.partial = Vec::new();
        self.phase = Phase::Closing { deadline: now + self.config.linger };
        self.events.retain(|event| !matches!(event, Event::Request(_) | Event::Multicast { .. }));
        self.channel = Membership::None;
        self.events.push_back(Event::Finish);
    }

    fn abort(&mut self, reason: AbortReason) {
        self.phase = Phase::Closed;
        self.events.push_back(Event::Abort(reason));
    }

    fn push_control(&mut self, message: &Message<'_>) {
        message.encode(&mut self.control);
        if self.control.len() > MAX_CONTROL {
            self.abort(AbortReason::Flood);
        }
    }
}

/// As [`decode`], but refuses what no client sends before its body is waited for, which could be large.
fn client_message(bytes: &[u8]) -> Result<Option<(Message<'_>, usize)>, FetchError> {
    use wire::kind::{GOODBYE, HELLO, PING, PONG, REQUEST, TOUCHED};
    match bytes.first() {
        Some(&kind) if ![HELLO, REQUEST, PING, PONG, GOODBYE, TOUCHED].contains(&kind) => Err(FetchError::Kind(kind)),
        _ => decode(bytes),
    }
}
