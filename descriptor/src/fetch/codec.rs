//! Messages to bytes and back.

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::channel::ChannelOffer;
use super::error::FetchError;
use super::local::LocalImage;
use super::message::{
    Capabilities, ChannelGoneReason, Class, Delivery, Encoding, ErrorCode, GoodbyeReason, Hello, Limits,
    MAX_PAGES_PER_RUN, MAX_RANGES, MAX_TEXT, MAX_TICKET, Message, OrderPart, PageRun, Preamble, Ranges, Refusal,
    Request, Tag, Touched, VERSION, Version, Welcome,
};
use super::wire::{self, flag, kind};
use crate::{FrameRange, Gfn, ImageId, PAGE_SIZE, PageCount};

/// The longest message that is received as a whole, header included: a full run of raw pages.
pub const MAX_MESSAGE: usize = HEADER + RUN + MAX_PAGES_PER_RUN as usize * PAGE_SIZE as usize;

const HEADER: usize = size_of::<wire::Header>();
const RUN: usize = size_of::<wire::Run>();
const HEAD: usize = HEADER + RUN;

/// The message at the head of `bytes` and its length in bytes; `None` when more bytes are needed.
///
/// The length is known to be within [`MAX_MESSAGE`] as soon as the header is there (IMAGE has its own limit), so a
/// buffer of that size always suffices.
///
/// # Errors
/// When the bytes break the protocol; the session cannot go on.
pub fn decode(bytes: &[u8]) -> Result<Option<(Message<'_>, usize)>, FetchError> {
    let Ok((header, rest)) = wire::Header::read_from_prefix(bytes) else {
        return Ok(None);
    };
    let kind = KindName::of(header.kind)?;
    let length = header.length.get();
    if length as usize > kind.max_body() {
        return Err(FetchError::TooLong { kind: kind.name(), length, limit: kind.max_body() });
    }
    let Some(body) = rest.get(..length as usize) else {
        return Ok(None);
    };
    let message = decode_body(kind, &header, body)?;
    Ok(Some((message, HEADER + body.len())))
}

/// The version in the peer's preamble, and its length; `None` when more bytes are needed.
///
/// # Errors
/// When the peer speaks another protocol or another major version.
pub fn decode_preamble(bytes: &[u8]) -> Result<Option<(Version, usize)>, FetchError> {
    let Ok((preamble, _)) = wire::Preamble::read_from_prefix(bytes) else {
        return Ok(None);
    };
    if preamble.magic != wire::Preamble::MAGIC {
        return Err(FetchError::Magic(preamble.magic));
    }
    let peer = Version { major: preamble.major.get(), minor: preamble.minor.get() };
    if peer.major != VERSION.major {
        return Err(FetchError::Version { peer, ours: VERSION });
    }
    Ok(Some((peer, size_of::<wire::Preamble>())))
}

impl Preamble {
    /// Appends this side's preamble.
    pub fn encode(self, out: &mut Vec<u8>) {
        let (major, minor) = (VERSION.major.into(), VERSION.minor.into());
        let preamble = wire::Preamble { magic: wire::Preamble::MAGIC, major, minor };
        out.extend_from_slice(preamble.as_bytes());
    }
}

impl Request<'_> {
    /// Appends a request for `ranges`, of which there must be 1 to [`MAX_RANGES`], each of 1 to `u32::MAX` frames.
    ///
    /// # Panics
    /// When there are more or fewer.
    pub fn encode(tag: Tag, class: Class, delivery: Delivery, ranges: &[FrameRange], out: &mut Vec<u8>) {
        assert!((1..=MAX_RANGES).contains(&ranges.len()), "{} ranges in a request", ranges.len());
        let bulk = if class == Class::Bulk { flag::BULK } else { 0 };
        let multicast = if delivery == Delivery::Multicast { flag::MULTICAST } else { 0 };
        push_ranges(out, kind::REQUEST, bulk | multicast, tag, ranges.iter().copied());
    }
}

impl Touched<'_> {
    /// Appends reports of `ranges`, of any number and length; with `last`, one at least, and the final one says so.
    pub fn encode(ranges: &[FrameRange], last: bool, declined: bool, out: &mut Vec<u8>) {
        let declined = if declined { flag::DECLINED } else { 0 };
        push_parts(out, kind::TOUCHED, declined, ranges, last);
    }
}

impl OrderPart<'_> {
    /// Appends a whole order of any length: one message at least.
    pub fn encode(ranges: &[FrameRange], out: &mut Vec<u8>) {
        push_parts(out, kind::ORDER, 0, ranges, true);
    }
}

impl PageRun<'_> {
    /// The size of header and run, which precede the payload.
    pub const HEAD: usize = HEAD;

    /// The bytes that precede a payload of `payload` bytes, to be gathered with it into one send.
    ///
    /// # Panics
    /// When the run is longer than a message may be.
    pub fn head(tag: Tag, frames: FrameRange, encoding: Encoding, last: bool, payload: usize) -> [u8; HEAD] {
        let pages = u32::try_from(frames.count().get()).expect("a run has at most 2^32 frames");
        let header = wire::Header {
            kind: kind::PAGES,
            flags: self::last(last),
            reserved: 0.into(),
            length: u32::try_from(RUN + payload).expect("a run is at most a megabyte").into(),
            tag: tag.into(),
        };
        let run = wire::Run {
            gfn: frames.start().index().into(),
            pages: pages.into(),
            encoding: encoding as u8,
            reserved: [0; 3],
        };
        let mut head = [0; HEAD];
        head[..HEADER].copy_from_slice(header.as_bytes());
        head[HEADER..].copy_from_slice(run.as_bytes());
        head
    }
}

impl Message<'_> {
    /// Appends the message.
    ///
    /// # Panics
    /// When a text, ticket or run is longer than the protocol allows; texts are cut by [`Message::text`].
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Message::Hello(hello) => {
                let length = u16::try_from(hello.ticket.len()).ok().filter(|l| usize::from(*l) <= MAX_TICKET);
                let fixed = wire::Hello {
                    image: hello.image.to_bytes(),
                    capabilities: hello.capabilities.bits().into(),
                    ticket_length: length.expect("a ticket of at most 256 bytes").into(),
                    reserved: 0.into(),
                };
                push_header(out, kind::HELLO, 0, 0, size_of::<wire::Hello>() + hello.ticket.len());
                out.extend_from_slice(fixed.as_bytes());
                out.extend_from_slice(hello.ticket);
            }
            Message::Welcome(welcome) => {
                let fixed = wire::Welcome {
                    image: welcome.image.to_bytes(),
                    frames: welcome.frames.get().into(),
                    capabilities: welcome.capabilities.bits().into(),
                    max_requests: welcome.limits.max_requests.into(),
                    max_pages: welcome.limits.max_pages.into(),
                    idle_timeout_ms: welcome.limits.idle_timeout_ms.into(),
                };
                push_header(out, kind::WELCOME, 0, 0, size_of::<wire::Welcome>());
                out.extend_from_slice(fixed.as_bytes());
            }
            Message::Refused(reason, text) => push_reason(out, kind::REFUSED, 0, *reason as u16, text),
            Message::Request(request) => {
                let ranges: Vec<_> = request.ranges().collect();
                Request::encode(request.tag, request.class, request.delivery, &ranges, out);
            }
            Message::Touched(touched) => {
                let declined = if touched.declined { flag::DECLINED } else { 0 };
                push_ranges(out, kind::TOUCHED, declined | last(touched.last), 0, touched.ranges.iter());
            }
            Message::Order(part) => push_ranges(out, kind::ORDER, last(part.last), 0, part.ranges.iter()),
            Message::Pages(run) => {
                let head = PageRun::head(run.tag, run.frames, run.encoding, run.last, run.payload.len());
                out.extend_from_slice(&head);
                out.extend_from_slice(run.payload);
            }
            Message::Error(tag, code, text) => push_reason(out, kind::ERROR, *tag, *code as u16, text),
            Message::Ping => push_header(out, kind::PING, 0, 0, 0),
            Message::Pong => push_header(out, kind::PONG, 0, 0, 0),
            Message::Goodbye(reason, text) => push_reason(out, kind::GOODBYE, 0, *reason as u16, text),
            Message::Image(image) => {
                let body = image.encode();
                push_header(out, kind::IMAGE, 0, 0, body.len());
                out.extend_from_slice(&body);
            }
            Message::Channel(offer) => {
                let body = offer.encode();
                push_header(out, kind::CHANNEL, 0, 0, size_of_val(&body));
                out.extend_from_slice(body.as_bytes());
            }
            Message::ChannelGone(reason, text) => push_reason(out, kind::CHANNEL_GONE, 0, *reason as u16, text),
        }
    }
}

/// The names of the kinds of message in errors, and how long their bodies may be.
#[derive(Clone, Copy)]
enum KindName {
    Hello,
    Welcome,
    Refused,
    Request,
    Pages,
    Error,
    Ping,
    Pong,
    Goodbye,
    Image,
    Channel,
    ChannelGone,
    Touched,
    Order,
}

impl KindName {
    fn of(number: u8) -> Result<Self, FetchError> {
        Ok(match number {
            kind::HELLO => Self::Hello,
            kind::WELCOME => Self::Welcome,
            kind::REFUSED => Self::Refused,
            kind::REQUEST => Self::Request,
            kind::PAGES => Self::Pages,
            kind::ERROR => Self::Error,
            kind::PING => Self::Ping,
            kind::PONG => Self::Pong,
            kind::GOODBYE => Self::Goodbye,
            kind::IMAGE => Self::Image,
            kind::CHANNEL => Self::Channel,
            kind::CHANNEL_GONE => Self::ChannelGone,
            kind::TOUCHED => Self::Touched,
            kind::ORDER => Self::Order,
            unknown => return Err(FetchError::Kind(unknown)),
        })
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Hello => "HELLO",
            Self::Welcome => "WELCOME",
            Self::Refused => "REFUSED",
            Self::Request => "REQUEST",
            Self::Pages => "PAGES",
            Self::Error => "ERROR",
            Self::Ping => "PING",
            Self::Pong => "PONG",
            Self::Goodbye => "GOODBYE",
            Self::Image => "IMAGE",
            Self::Channel => "CHANNEL",
            Self::ChannelGone => "CHANNEL_GONE",
            Self::Touched => "TOUCHED",
            Self::Order => "ORDER",
        }
    }

    const fn max_body(self) -> usize {
        match self {
            Self::Hello => size_of::<wire::Hello>() + MAX_TICKET,
            Self::Welcome => size_of::<wire::Welcome>(),
            Self::Refused | Self::Error | Self::Goodbye | Self::ChannelGone => size_of::<wire::Reason>() + MAX_TEXT,
            Self::Request | Self::Touched | Self::Order => MAX_RANGES * size_of::<wire::Range>(),
            Self::Pages => MAX_MESSAGE - HEADER,
            Self::Ping | Self::Pong => 0,
            Self::Image => LocalImage::MAX_BODY,
            Self::Channel => size_of::<wire::Channel>(),
        }
    }
}

fn decode_body<'a>(kind: KindName, header: &wire::Header, body: &'a [u8]) -> Result<Message<'a>, FetchError> {
    let bad_length = || FetchError::Length { kind: kind.name(), length: body.len() };
    let field = |field, value| FetchError::Field { kind: kind.name(), field, value };
    let tag = header.tag.get();
    Ok(match kind {
        KindName::Hello => {
            let (fixed, ticket) = wire::Hello::read_from_prefix(body).map_err(|_| bad_length())?;
            if ticket.len() != usize::from(fixed.ticket_length.get()) {
                return Err(bad_length());
            }
            let capabilities = Capabilities::from_bits(fixed.capabilities.get());
            Message::Hello(Hello { image: ImageId::from_bytes(fixed.image), capabilities, ticket })
        }
        KindName::Welcome => {
            let fixed = wire::Welcome::read_from_bytes(body).map_err(|_| bad_length())?;
            let limits = Limits {
                max_requests: fixed.max_requests.get(),
                max_pages: fixed.max_pages.get(),
                idle_timeout_ms: fixed.idle_timeout_ms.get(),
            };
            if limits.max_requests == 0 || limits.max_pages == 0 {
                return Err(field("limit", 0));
            }
            Message::Welcome(Welcome {
                image: ImageId::from_bytes(fixed.image),
                frames: PageCount::new(fixed.frames.get()),
                capabilities: Capabilities::from_bits(fixed.capabilities.get()),
                limits,
            })
        }
        KindName::Refused => {
            let (code, text) = decode_reason(body).ok_or_else(bad_length)?;
            Message::Refused(Refusal::of(code).ok_or_else(|| field("reason", code.into()))?, text)
        }
        KindName::Request => Message::Request(decode_request(header, body)?),
        KindName::Pages => Message::Pages(decode_run(header, body)?),
        KindName::Error => {
            let (code, text) = decode_reason(body).ok_or_else(bad_length)?;
            Message::Error(tag, ErrorCode::of(code).ok_or_else(|| field("code", code.into()))?, text)
        }
        KindName::Ping => Message::Ping,
        KindName::Pong => Message::Pong,
        KindName::Goodbye => {
            let (code, text) = decode_reason(body).ok_or_else(bad_length)?;
            Message::Goodbye(GoodbyeReason::of(code).ok_or_else(|| field("reason", code.into()))?, text)
        }
        KindName::Image => Message::Image(LocalImage::decode(body)?),
        KindName::Channel => {
            let body = wire::Channel::read_from_bytes(body).map_err(|_| bad_length())?;
            Message::Channel(ChannelOffer::decode(&body)?)
        }
        KindName::ChannelGone => {
            let (code, text) = decode_reason(body).ok_or_else(bad_length)?;
            Message::ChannelGone(ChannelGoneReason::of(code).ok_or_else(|| field("reason", code.into()))?, text)
        }
        KindName::Touched | KindName::Order => {
            let ranges = decode_ranges(kind.name(), body)?;
            let (last, declined) = (header.flags & flag::LAST != 0, header.flags & flag::DECLINED != 0);
            if ranges.is_empty() && !last {
                return Err(bad_length());
            }
            match kind {
                KindName::Touched => Message::Touched(Touched { ranges, last, declined }),
                _ => Message::Order(OrderPart { ranges, last }),
            }
        }
    })
}

fn decode_request<'a>(header: &wire::Header, body: &'a [u8]) -> Result<Request<'a>, FetchError> {
    let kind = KindName::Request.name();
    let ranges = decode_ranges(kind, body)?;
    if ranges.is_empty() {
        return Err(FetchError::Length { kind, length: 0 });
    }
    let tag = match header.tag.get() {
        0 => return Err(FetchError::Field { kind, field: "tag", value: 0 }),
        tag => tag,
    };
    let class = if header.flags & flag::BULK != 0 { Class::Bulk } else { Class::Demand };
    let delivery = if header.flags & flag::MULTICAST != 0 { Delivery::Multicast } else { Delivery::Unicast };
    Ok(Request { tag, class, delivery, ranges })
}

fn decode_ranges<'a>(kind: &'static str, body: &'a [u8]) -> Result<Ranges<'a>, FetchError> {
    let field = |field, value| FetchError::Field { kind, field, value };
    let ranges = <[wire::Range]>::ref_from_bytes(body).map_err(|_| FetchError::Length { kind, length: body.len() })?;
    for range in ranges {
        if range.pages.get() == 0 {
            return Err(field("page count", 0));
        }
        let start = Gfn::checked(range.gfn.get());
        start
            .and_then(|start| FrameRange::checked(start, PageCount::new(range.pages.get().into())))
            .ok_or_else(|| field("frame number", range.gfn.get()))?;
    }
    Ok(Ranges(ranges))
}

fn decode_run<'a>(header: &wire::Header, body: &'a [u8]) -> Result<PageRun<'a>, FetchError> {
    let kind = KindName::Pages.name();
    let field = |field, value| FetchError::Field { kind, field, value };
    let bad_length = || FetchError::Length { kind, length: body.len() };
    let (run, payload) = wire::Run::read_from_prefix(body).map_err(|_| bad_length())?;
    let pages = run.pages.get();
    let encoding = Encoding::of(run.encoding).ok_or_else(|| field("encoding", run.encoding.into()))?;
    if pages == 0 || (pages > MAX_PAGES_PER_RUN && encoding != Encoding::Zero) {
        return Err(field("page count", pages.into()));
    }
    let frames = Gfn::checked(run.gfn.get())
        .and_then(|start| FrameRange::checked(start, PageCount::new(pages.into())))
        .ok_or_else(|| field("frame number", run.gfn.get()))?;
    let fits = match encoding {
        Encoding::Raw => payload.len() as u64 == frames.count().bytes(),
        Encoding::Zero => payload.is_empty(),
        Encoding::Lz4 => !payload.is_empty() && (payload.len() as u64) < frames.count().bytes(),
    };
    if !fits {
        return Err(bad_length());
    }
    let last = header.flags & flag::LAST != 0;
    Ok(PageRun { tag: header.tag.get(), frames, encoding, last, payload })
}

fn decode_reason(body: &[u8]) -> Option<(u16, &str)> {
    let (fixed, text) = wire::Reason::read_from_prefix(body).ok()?;
    Some((fixed.code.get(), std::str::from_utf8(text).ok()?))
}

fn push_header(out: &mut Vec<u8>, kind: u8, flags: u8, tag: Tag, length: usize) {
    let mut header = wire::Header::new_zeroed();
    header.kind = kind;
    header.flags = flags;
    header.length = u32::try_from(length).expect("a message is at most some megabytes").into();
    header.tag = tag.into();
    out.extend_from_slice(header.as_bytes());
}

fn push_ranges(out: &mut Vec<u8>, kind: u8, flags: u8, tag: Tag, ranges: impl ExactSizeIterator<Item = FrameRange>) {
    push_header(out, kind, flags, tag, ranges.len() * size_of::<wire::Range>());
    for range in ranges {
        let pages = u32::try_from(range.count().get()).expect("a range of a message has at most 2^32 frames");
        assert!(pages > 0, "an empty range in a message");
        let range = wire::Range { gfn: range.start().index().into(), pages: pages.into(), reserved: 0.into() };
        out.extend_from_slice(range.as_bytes());
    }
}

/// Appends `ranges` in as many messages as they need; none is split unless it is longer than a message can name.
fn push_parts(out: &mut Vec<u8>, kind: u8, flags: u8, ranges: &[FrameRange], is_last: bool) {
    let pieces = ranges.iter().flat_map(|range| range.chunks(PageCount::new(u32::MAX.into())));
    let pieces: Vec<FrameRange> = pieces.collect();
    let mut parts = pieces.chunks(MAX_RANGES).peekable();
    if parts.peek().is_none() && is_last {
        push_ranges(out, kind, flags | flag::LAST, 0, [].into_iter());
    }
    while let Some(part) = parts.next() {
        let end = last(is_last && parts.peek().is_none());
        push_ranges(out, kind, flags | end, 0, part.iter().copied());
    }
}

const fn last(is_last: bool) -> u8 {
    if is_last { flag::LAST } else { 0 }
}

fn push_reason(out: &mut Vec<u8>, kind: u8, tag: Tag, code: u16, text: &str) {
    assert!(text.len() <= MAX_TEXT, "a text of {} bytes in a message", text.len());
    push_header(out, kind, 0, tag, size_of::<wire::Reason>() + text.len());
    let fixed = wire::Reason { code: code.into(), reserved: 0.into() };
    out.extend_from_slice(fixed.as_bytes());
    out.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests;
