//! The bytes of the datagrams: fixed-width little-endian structures without padding.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What precedes a shard, in DATA, REPAIR and PARITY.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ShardHeader {
    /// [`super::VERSION`].
    pub version: u8,
    /// See [`kind`].
    pub kind: u8,
    /// The shard, or the row of parity.
    pub index: u8,
    /// Source shards of the block.
    pub count: u8,
    /// The number of this datagram.
    pub seq: U32,
    /// The session of the sender.
    pub session: U64,
    /// The block's number in its class.
    pub block: U32,
    /// The frame of the first page byte in the shard; zero in parity and where there is none.
    pub gfn: U32,
}

/// What HEARTBEAT, END and CONFIRM begin with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SenderHeader {
    /// [`super::VERSION`].
    pub version: u8,
    /// See [`kind`].
    pub kind: u8,
    /// See [`flag`].
    pub flags: u8,
    /// Entries of a CONFIRM; zero in others.
    pub entries: u8,
    /// The number of the next datagram with a shard.
    pub seq: U32,
    /// The session of the sender.
    pub session: U64,
}

/// The body of HEARTBEAT and END.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct PulseBody {
    /// The next block of each class, demand first: all before it were sent.
    pub next_block: [U32; 2],
    /// The oldest block of each class that can be repaired.
    pub oldest_block: [U32; 2],
    /// Members of the channel.
    pub members: U32,
    /// The round trip of the group in microseconds.
    pub round_trip_us: U32,
    /// Microseconds between two reports of a member.
    pub report_us: U32,
    /// Bytes after which a member reports early; zero for never.
    pub report_bytes: U32,
    /// The number of the burst.
    pub burst: U32,
    /// Zero.
    pub reserved: U32,
    /// When this was sent, in microseconds of the sender's clock.
    pub sent_us: U64,
}

/// An entry of CONFIRM.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Confirmation {
    /// The block's number.
    pub block: U32,
    /// Its class, 0 demand or 1 bulk.
    pub class: u8,
    /// See [`how`].
    pub how: u8,
    /// Shards that come.
    pub count: u8,
    /// Zero.
    pub reserved: u8,
    /// Which originals come; zero unless they do.
    pub mask: [u8; 24],
}

/// What NACK and REPORT begin with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MemberHeader {
    /// [`super::VERSION`].
    pub version: u8,
    /// See [`kind`].
    pub kind: u8,
    /// See [`flag`].
    pub flags: u8,
    /// Entries of a NACK; zero in others.
    pub entries: u8,
    /// Zero.
    pub reserved: U32,
    /// The session of the sender.
    pub session: U64,
    /// The member.
    pub member: U64,
}

/// An entry of NACK.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Lack {
    /// The block's number.
    pub block: U32,
    /// Its class, 0 demand or 1 bulk.
    pub class: u8,
    /// Shards needed to complete it; 255 when nothing of it was seen.
    pub need: u8,
    /// Zero.
    pub reserved: U16,
    /// The source shards that are missing; zero where that is not known.
    pub missing: [u8; 24],
}

/// The body of REPORT; the bits of what is lacking follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ReportBody {
    /// One more than the highest number of a shard's datagram seen.
    pub next_seq: U32,
    /// Datagrams with shards received, a counter that wraps.
    pub received: U32,
    /// Such datagrams lost, a counter that wraps.
    pub lost: U32,
    /// Datagrams that the socket dropped for want of room, a counter that wraps.
    pub overflow: U32,
    /// Bytes of the socket's buffer.
    pub buffer: U32,
    /// KiB a second received lately.
    pub rate: U32,
    /// `sent_us` of the last pulse; zero before any.
    pub echo_us: U64,
    /// Microseconds since that came.
    pub held_us: U32,
    /// The chunk that the first bit stands for.
    pub first_chunk: U32,
    /// Bits that follow.
    pub chunks: U16,
    /// Zero.
    pub reserved: U16,
    /// Pages lacking and wanted in bulk.
    pub missing: U32,
    /// Zero.
    pub reserved_end: U64,
}

/// A run in the map of a block.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MapRun {
    /// The first frame.
    pub gfn: U32,
    /// The number of frames.
    pub count: U16,
    /// [`MapRun::UNUSED`], [`MapRun::STORED`] or [`MapRun::ZERO`].
    pub kind: U16,
}

impl MapRun {
    /// No run; all of it is zero, and none follows.
    pub const UNUSED: u16 = 0;
    /// Frames whose pages are in the stream.
    pub const STORED: u16 = 1;
    /// Frames of zeros.
    pub const ZERO: u16 = 2;
}

/// Kinds of datagram.
pub mod kind {
    #![allow(missing_docs)]
    pub const DATA: u8 = 1;
    pub const REPAIR: u8 = 2;
    pub const PARITY: u8 = 3;
    pub const HEARTBEAT: u8 = 4;
    pub const END: u8 = 5;
    pub const CONFIRM: u8 = 6;
    pub const NACK: u8 = 7;
    pub const REPORT: u8 = 8;
    /// Beside DATA, REPAIR and PARITY: the block is of class bulk.
    pub const BULK: u8 = 0x80;
}

/// Flags in a header.
pub mod flag {
    /// In HEARTBEAT and END: a burst of bulk is under way.
    pub const BURST: u8 = 1;
    /// In HEARTBEAT and END: fetch what you lack by unicast.
    pub const ENDGAME: u8 = 2;
    /// In REPORT: bits of all that is lacking follow.
    pub const LACKS: u8 = 1;
    /// In REPORT: the member leaves.
    pub const LEAVING: u8 = 2;
}

/// How a NACK is answered, in CONFIRM.
pub mod how {
    /// By rows of parity.
    pub const PARITY: u8 = 1;
    /// By the shards in the mask.
    pub const ORIGINALS: u8 = 2;
    /// Not at all.
    pub const GONE: u8 = 3;
}

const _: () = {
    assert!(size_of::<ShardHeader>() == 24);
    assert!(size_of::<SenderHeader>() == 16);
    assert!(size_of::<PulseBody>() == 48);
    assert!(size_of::<Confirmation>() == 32);
    assert!(size_of::<MemberHeader>() == 24);
    assert!(size_of::<Lack>() == 32);
    assert!(size_of::<ReportBody>() == 56);
    assert!(size_of::<MapRun>() == 8);
};
