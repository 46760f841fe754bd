use std::fmt;

use super::channel::ChannelOffer;
use super::local::LocalImage;
use super::wire;
use crate::{FrameRange, Gfn, ImageId, PageCount};

/// The version that this code speaks.
pub const VERSION: Version = Version { major: 1, minor: 2 };

/// Pages in one run: 1 MiB, large enough that a send is bounded by the copy and not by the system call, small enough
/// that a demand page waits for no more than a fraction of a millisecond behind it.
pub const MAX_PAGES_PER_RUN: u32 = 256;

/// Ranges in one message: a batch of demand faults from every vCPU of a large guest.
pub const MAX_RANGES: usize = 256;

/// Bytes of text in a refusal, an error, a goodbye.
pub const MAX_TEXT: usize = 512;

/// Bytes of a ticket.
pub const MAX_TICKET: usize = 256;

/// A version of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// Peers must agree on it.
    pub major: u16,
    /// Tells of additions.
    pub minor: u16,
}

/// The first bytes of each direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble;

/// The number by which a client knows its request again; any but zero.
pub type Tag = u64;

/// What a peer can do beyond the plain protocol, as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(u32);

/// Whether someone waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// A stopped vCPU waits.
    Demand,
    /// The page is fetched ahead of need.
    Bulk,
}

/// Which way an answer comes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Delivery {
    /// Over this connection.
    #[default]
    Unicast,
    /// To the multicast group that CHANNEL named, for every clone at once; nothing of it comes over this connection.
    Multicast,
}

/// How the payload of a run is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// The pages as they are.
    Raw = 0,
    /// No payload: every byte is zero.
    Zero = 1,
    /// The pages together as one lz4 block, the run's pages telling the size.
    Lz4 = 2,
}

/// Why a server refuses a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Refusal {
    /// The ticket is missing or wrong.
    Ticket = 1,
    /// No such image is served.
    UnknownImage = 2,
    /// As many sessions as the server takes.
    Busy = 3,
    /// The server is about to stop.
    Draining = 4,
    /// The client broke the protocol.
    Protocol = 5,
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum ErrorCode {
    /// A range reaches beyond the image.
    OutOfRange = 1,
    /// The page could not be read from the image's file.
    Unreadable = 2,
    /// The image is no longer served.
    ImageGone = 3,
}

/// Why a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum GoodbyeReason {
    /// The side is done.
    Done = 1,
    /// The server is about to stop.
    Draining = 2,
    /// Too long without a message.
    Idle = 3,
    /// The peer broke the protocol or its limits.
    Protocol = 4,
    /// The image is no longer served.
    ImageGone = 5,
}

/// Why the multicast channel has ended for a client, whose session goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum ChannelGoneReason {
    /// The client takes in so little that it would hold the others up.
    TooSlow = 1,
    /// The server gives the channel up.
    Closed = 2,
    /// The channel has as many members as it takes.
    Full = 3,
    /// Nothing was heard of the client.
    Silent = 4,
}

/// What a client opens with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello<'a> {
    /// The image that it wants pages of.
    pub image: ImageId,
    /// What it can do.
    pub capabilities: Capabilities,
    /// The ticket; empty for none.
    pub ticket: &'a [u8],
}

/// What a client must keep to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests without a complete answer at one time.
    pub max_requests: u32,
    /// Pages asked for and not yet received at one time.
    pub max_pages: u32,
    /// Milliseconds of silence after which the server ends the session.
    pub idle_timeout_ms: u32,
}

/// The server's consent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The image that is served.
    pub image: ImageId,
    /// The frames of the image, one more than its highest.
    pub frames: PageCount,
    /// The offered capabilities that the server takes up.
    pub capabilities: Capabilities,
    /// What the client must keep to.
    pub limits: Limits,
}

/// A batch of ranges that a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// The request's number.
    pub tag: Tag,
    /// Whether someone waits.
    pub class: Class,
    /// Which way the answer is to come.
    pub delivery: Delivery,
    pub(super) ranges: Ranges<'a>,
}

/// Further frames that a clone needed, in the order in which it first did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touched<'a> {
    /// The frames; none only in the last report.
    pub ranges: Ranges<'a>,
    /// The clone has ended, and has said everything: whatever else it was to say something about it did not need.
    pub last: bool,
    /// It fetched nothing ahead because of ORDER.
    pub declined: bool,
}

/// A part of the order in which a clone is best to fetch ahead of need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrderPart<'a> {
    /// The frames; none only in an order that is empty.
    pub ranges: Ranges<'a>,
    /// No further part follows.
    pub last: bool,
}

/// Ranges in a message, none of them empty.
#[derive(Clone, Copy, Debug)]
pub struct Ranges<'a>(pub(super) &'a [wire::Range]);

/// Some of the pages that a request asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun<'a> {
    /// The request's number.
    pub tag: Tag,
    /// The frames, at least one and at most [`MAX_PAGES_PER_RUN`] unless they are zero.
    pub frames: FrameRange,
    /// How `payload` is encoded.
    pub encoding: Encoding,
    /// No further run belongs to the request.
    pub last: bool,
    /// The encoded pages: `frames.count().bytes()` bytes when raw, none when zero.
    pub payload: &'a [u8],
}

/// A message of the protocol, borrowing from the buffer that it was received in.
#[derive(Clone, Debug, PartialEq)]
pub enum Message<'a> {
    /// The client's opening.
    Hello(Hello<'a>),
    /// The server's consent.
    Welcome(Welcome),
    /// The server's refusal, with text for people.
    Refused(Refusal, &'a str),
    /// The client wants pages.
    Request(Request<'a>),
    /// Pages for a request.
    Pages(PageRun<'a>),
    /// A request failed, with text for people.
    Error(Tag, ErrorCode, &'a str),
    /// Are you there?
    Ping,
    /// I am.
    Pong,
    /// The session ends, with text for people.
    Goodbye(GoodbyeReason, &'a str),
    /// Where the pages lie in the files attached.
    Image(LocalImage),
    /// The multicast channel that the client may join.
    Channel(ChannelOffer),
    /// The channel has ended for this client, with text for people.
    ChannelGone(ChannelGoneReason, &'a str),
    /// What the clone needed.
    Touched(Touched<'a>),
    /// What it is best to fetch ahead.
    Order(OrderPart<'a>),
}

impl Capabilities {
    /// lz4 blocks.
    pub const LZ4: Capabilities = Capabilities(1);
    /// The local lane: the image as file descriptors, over a Unix socket.
    pub const LOCAL: Capabilities = Capabilities(2);
    /// The multicast lane: answers that go to a group.
    pub const MULTICAST: Capabilities = Capabilities(4);
    /// Working sets: what siblings needed is told, and what this clone needs is listened to.
    pub const WORKING_SET: Capabilities = Capabilities(8);

    /// The capabilities of these bits, unknown ones included.
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// The bits as they stand in messages.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// True when all of `other` are there.
    pub const fn contains(self, other: Capabilities) -> bool {
        self.0 & other.0 == other.0
    }

    /// Those of either.
    pub const fn union(self, other: Capabilities) -> Self {
        Self(self.0 | other.0)
    }

    /// Those of both.
    pub const fn intersection(self, other: Capabilities) -> Self {
        Self(self.0 & other.0)
    }

    /// These without `other`.
    pub const fn without(self, other: Capabilities) -> Self {
        Self(self.0 & !other.0)
    }
}

impl<'a> Request<'a> {
    /// The ranges, at least one, none empty.
    pub fn ranges(self) -> impl ExactSizeIterator<Item = FrameRange> + 'a {
        self.ranges.iter()
    }
}

impl<'a> Ranges<'a> {
    /// Each of them.
    pub fn iter(self) -> impl ExactSizeIterator<Item = FrameRange> + 'a {
        // Checked when the message was decoded.
        self.0.iter().map(|range| FrameRange::new(Gfn::new(range.gfn.get()), PageCount::new(range.pages.get().into())))
    }

    /// True when there is none.
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }
}

/// Reserved bytes, which mean nothing, make no difference.
impl PartialEq for Ranges<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Ranges<'_> {}

impl Message<'_> {
    /// `text` cut to what a message may carry.
    pub fn text(text: &str) -> &str {
        &text[..text.floor_char_boundary(MAX_TEXT)]
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl Encoding {
    pub(super) fn of(number: u8) -> Option<Self> {
        [Self::Raw, Self::Zero, Self::Lz4].into_iter().find(|encoding| *encoding as u8 == number)
    }
}

impl Refusal {
    pub(super) fn of(number: u16) -> Option<Self> {
        [Self::Ticket, Self::UnknownImage, Self::Busy, Self::Draining, Self::Protocol]
            .into_iter()
            .find(|reason| *reason as u16 == number)
    }
}

impl ErrorCode {
    pub(super) fn of(number: u16) -> Option<Self> {
        [Self::OutOfRange, Self::Unreadable, Self::ImageGone].into_iter().find(|code| *code as u16 == number)
    }
}

impl GoodbyeReason {
    pub(super) fn of(number: u16) -> Option<Self> {
        [Self::Done, Self::Draining, Self::Idle, Self::Protocol, Self::ImageGone]
            .into_iter()
            .find(|reason| *reason as u16 == number)
    }
}

impl ChannelGoneReason {
    pub(super) fn of(number: u16) -> Option<Self> {
        [Self::TooSlow, Self::Closed, Self::Full, Self::Silent].into_iter().find(|reason| *reason as u16 == number)
    }
}
