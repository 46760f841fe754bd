//! The bytes of the fetch protocol: fixed-width little-endian structures without padding.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first bytes of each direction, the same in every version.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Preamble {
    /// [`Preamble::MAGIC`].
    pub magic: [u8; 4],
    /// Peers must agree on it.
    pub major: U16,
    /// Tells of additions.
    pub minor: U16,
}

impl Preamble {
    /// "SnowFlock fetch".
    pub const MAGIC: [u8; 4] = *b"SFfe";
}

/// What precedes every body.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// The kind of message, see [`kind`].
    pub kind: u8,
    /// Flags of this kind of message, see [`flag`]; others are zero.
    pub flags: u8,
    /// Zero.
    pub reserved: U16,
    /// The length of the body in bytes.
    pub length: U32,
    /// The request that the message belongs to; zero where there is none.
    pub tag: U64,
}

/// Kinds of message.
pub mod kind {
    #![allow(missing_docs)]
    pub const HELLO: u8 = 1;
    pub const WELCOME: u8 = 2;
    pub const REFUSED: u8 = 3;
    pub const REQUEST: u8 = 4;
    pub const PAGES: u8 = 5;
    pub const ERROR: u8 = 6;
    pub const PING: u8 = 7;
    pub const PONG: u8 = 8;
    pub const GOODBYE: u8 = 9;
    pub const IMAGE: u8 = 10;
    pub const CHANNEL: u8 = 11;
    pub const CHANNEL_GONE: u8 = 12;
    pub const TOUCHED: u8 = 13;
    pub const ORDER: u8 = 14;
}

/// Flags in a header.
pub mod flag {
    /// In REQUEST: nobody waits for these pages.
    pub const BULK: u8 = 1;
    /// In REQUEST: the answer is to go to the multicast group, nothing of it comes here.
    pub const MULTICAST: u8 = 2;
    /// In PAGES: no further run belongs to this request. In ORDER: no further part of it follows. In TOUCHED: the clone has ended,
    /// and this is the whole of what it needed.
    pub const LAST: u8 = 1;
    /// In TOUCHED: nothing was fetched ahead because of ORDER.
    pub const DECLINED: u8 = 2;
}

/// The fixed part of HELLO; the ticket follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Hello {
    /// The image that the client wants pages of.
    pub image: [u8; 16],
    /// What the client can do, bits of [`super::Capabilities`].
    pub capabilities: U32,
    /// The length of the ticket in bytes.
    pub ticket_length: U16,
    /// Zero.
    pub reserved: U16,
}

/// WELCOME.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Welcome {
    /// The image that is served.
    pub image: [u8; 16],
    /// The frames of the image, one more than its highest.
    pub frames: U64,
    /// The capabilities of HELLO that the server takes up.
    pub capabilities: U32,
    /// Requests without a complete answer that the client may have.
    pub max_requests: U32,
    /// Pages that the client may have asked for and not yet got.
    pub max_pages: U32,
    /// Milliseconds of silence after which the server ends the session.
    pub idle_timeout_ms: U32,
}

/// The fixed part of REFUSED, ERROR, GOODBYE and CHANNEL_GONE; UTF-8 text for people follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Reason {
    /// The reason, by kind of message.
    pub code: U16,
    /// Zero.
    pub reserved: U16,
}

/// A range in REQUEST, TOUCHED or ORDER.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Range {
    /// The first frame.
    pub gfn: U64,
    /// The number of frames.
    pub pages: U32,
    /// Zero.
    pub reserved: U32,
}

/// The fixed part of PAGES; the payload follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Run {
    /// The first frame.
    pub gfn: U64,
    /// The number of frames.
    pub pages: U32,
    /// How the payload is encoded, see [`super::Encoding`].
    pub encoding: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// The fixed part of IMAGE; [`Extent`]s follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Image {
    /// Files attached, in the order of their indices.
    pub files: U16,
    /// Zero.
    pub reserved: U16,
    /// Extents that follow.
    pub extents: U32,
}

/// An extent in IMAGE.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Extent {
    /// The first frame.
    pub gfn: U64,
    /// The number of frames.
    pub pages: U64,
    /// The offset of the first page in bytes.
    pub offset: U64,
    /// The distance between pages in bytes.
    pub stride: U32,
    /// The index of the file.
    pub file: U16,
    /// Zero.
    pub reserved: U16,
}

/// CHANNEL.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Channel {
    /// The group's address; IPv4 as an IPv4-mapped IPv6 address.
    pub group: [u8; 16],
    /// Where feedback goes, in the same form; unspecified: to the address of the server's end of this connection.
    pub feedback: [u8; 16],
    /// The group's UDP port.
    pub port: U16,
    /// The UDP port that feedback goes to.
    pub feedback_port: U16,
    /// Bytes of a block that a datagram carries.
    pub payload: U16,
    /// Zero.
    pub flags: U16,
    /// Frames that one bit of a report stands for.
    pub chunk_frames: U32,
    /// The sender's session.
    pub session: U64,
    /// The client's name in its feedback.
    pub member: U64,
    /// The number of the next datagram.
    pub start_seq: U32,
    /// The numbers of the next block of each class, demand first.
    pub start_block: [U32; 2],
}

const _: () = {
    assert!(size_of::<Preamble>() == 8);
    assert!(size_of::<Header>() == 16);
    assert!(size_of::<Hello>() == 24);
    assert!(size_of::<Welcome>() == 40);
    assert!(size_of::<Reason>() == 4);
    assert!(size_of::<Range>() == 16);
    assert!(size_of::<Run>() == 16);
    assert!(size_of::<Image>() == 8);
    assert!(size_of::<Extent>() == 32);
    assert!(size_of::<Channel>() == 72);
};
