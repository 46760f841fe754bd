use std::time::Duration;

use descriptor::Gfn;
use descriptor::fetch::Class;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::structs::{self, MemberHeader, PulseBody, ReportBody, SenderHeader, ShardHeader, flag, how, kind};
use super::{HEAD, MAX_DATAGRAM, MAX_ENTRIES, VERSION, WireError};
use crate::{BlockId, ChunkSet, Geometry, Member, Serial, Shard, ShardSet, class_index};

/// A datagram, borrowing from the buffer that it was received in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Datagram<'a> {
    /// DATA, REPAIR or PARITY: a shard.
    Shard(ShardDatagram<'a>),
    /// HEARTBEAT or END.
    Pulse(Pulse),
    /// CONFIRM: how NACKs are answered.
    Confirm(Confirm<'a>),
    /// NACK: what a member asks for again.
    Nack(Nack<'a>),
    /// REPORT: how a member fares.
    Report(Report<'a>),
}

/// Why a shard is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ShardKind {
    /// For the first time.
    Data,
    /// Again.
    Repair,
    /// It is a row of parity.
    Parity,
}

/// A shard of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardDatagram<'a> {
    /// The session of the sender.
    pub session: u64,
    /// The number of this datagram.
    pub seq: Serial,
    /// Why it is sent.
    pub kind: ShardKind,
    /// The block.
    pub block: BlockId,
    /// The shard's index, below `count`, or the row of parity, below [`Geometry::MAX_PARITY`].
    pub index: u8,
    /// Source shards of the block, 1 to [`Geometry::MAX_SHARDS`].
    pub count: u8,
    /// The frame of the first page byte in the shard; zero in parity and where there is none.
    pub gfn: Gfn,
    /// The shard's bytes, at least one.
    pub payload: &'a [u8],
}

/// Which of the two messages a [`Pulse`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PulseKind {
    /// HEARTBEAT: the sender is there.
    Heartbeat,
    /// END: a burst of bulk has ended, and members report what they lack.
    End,
}

/// What the sender says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pulse {
    /// HEARTBEAT or END.
    pub kind: PulseKind,
    /// The session of the sender.
    pub session: u64,
    /// The number of the next datagram with a shard.
    pub next_seq: Serial,
    /// A burst of bulk is under way.
    pub bursting: bool,
    /// What is lacking is to be fetched by unicast.
    pub endgame: bool,
    /// The next block of each class, see [`class_index`]: all before it were sent.
    pub next_block: [Serial; 2],
    /// The oldest block of each class that can be repaired.
    pub oldest_block: [Serial; 2],
    /// Members of the channel.
    pub members: u32,
    /// The round trip of the group; at most 71 minutes, as the other spans of 32 bits.
    pub round_trip: Duration,
    /// The time between two reports of a member.
    pub report_interval: Duration,
    /// Bytes after which a member reports early; zero for never.
    pub report_bytes: u32,
    /// The number of the burst.
    pub burst: u32,
    /// When this was sent, by the sender's clock.
    pub sent: Duration,
}

/// How the sender answers NACKs.
#[derive(Clone, Copy, Debug)]
pub struct Confirm<'a> {
    /// The session of the sender.
    pub session: u64,
    /// The number of the next datagram with a shard.
    pub next_seq: Serial,
    entries: &'a [structs::Confirmation],
}

/// How the sender answers the NACKs for one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confirmation {
    /// The block.
    pub block: BlockId,
    /// What comes.
    pub answer: Answer,
}

/// What comes in answer to a NACK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// So many rows of parity, 1 to [`Geometry::MAX_PARITY`].
    Parity(u8),
    /// These source shards, at least one.
    Originals(ShardSet),
    /// Nothing: the block can no longer be repaired.
    Gone,
}

/// What a member asks for again.
#[derive(Clone, Copy, Debug)]
pub struct Nack<'a> {
    /// The session of the sender.
    pub session: u64,
    /// The member.
    pub member: Member,
    entries: &'a [structs::Lack],
}

/// What a member lacks of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lack {
    /// The block.
    pub block: BlockId,
    /// Shards needed to complete it, 1 to [`Geometry::MAX_SHARDS`], or [`Lack::EVERYTHING`].
    pub need: u8,
    /// The source shards that are missing; empty where that is not known.
    pub missing: ShardSet,
}

/// How a member fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report<'a> {
    /// The session of the sender.
    pub session: u64,
    /// The member.
    pub member: Member,
    /// It leaves.
    pub leaving: bool,
    /// One more than the highest number of a shard's datagram seen.
    pub next_seq: Serial,
    /// Datagrams with shards received; wraps.
    pub received: u32,
    /// Such datagrams lost; wraps.
    pub lost: u32,
    /// Datagrams that the socket dropped for want of room; wraps.
    pub overflow: u32,
    /// Bytes of the socket's buffer.
    pub buffer: u32,
    /// KiB a second received lately.
    pub rate_kib: u32,
    /// `sent` of the last pulse; zero before any.
    pub echo: Duration,
    /// The time since that came.
    pub held: Duration,
    /// Pages lacking and wanted in bulk.
    pub missing: u32,
    /// The chunks with such pages, if the report tells; what it tells replaces what the member told before.
    pub lacks: Option<LackBits<'a>>,
}

/// The bits of the chunks that a member lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LackBits<'a> {
    /// The chunk that the first bit stands for.
    pub first: u32,
    /// The number of bits, at most [`ChunkSet::MAX`].
    pub chunks: u16,
    /// The bits, the lowest of the first byte first; as many bytes as they take.
    pub bits: &'a [u8],
}

impl<'a> Datagram<'a> {
    /// The datagram that `bytes` are.
    ///
    /// # Errors
    /// When they are of another version or break the protocol.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, WireError> {
        let &[version, raw_kind, ..] = bytes else {
            return Err(WireError::Length { kind: "a", length: bytes.len() });
        };
        if version != VERSION {
            return Err(WireError::Version(version));
        }
        match raw_kind {
            kind::HEARTBEAT => Pulse::decode(PulseKind::Heartbeat, bytes).map(Datagram::Pulse),
            kind::END => Pulse::decode(PulseKind::End, bytes).map(Datagram::Pulse),
            kind::CONFIRM => Confirm::decode(bytes).map(Datagram::Confirm),
            kind::NACK => Nack::decode(bytes).map(Datagram::Nack),
            kind::REPORT => Report::decode(bytes).map(Datagram::Report),
            _ => match raw_kind & !kind::BULK {
                kind::DATA => ShardDatagram::decode(ShardKind::Data, bytes).map(Datagram::Shard),
                kind::REPAIR => ShardDatagram::decode(ShardKind::Repair, bytes).map(Datagram::Shard),
                kind::PARITY => ShardDatagram::decode(ShardKind::Parity, bytes).map(Datagram::Shard),
                _ => Err(WireError::Kind(raw_kind)),
            },
        }
    }

    /// The session that it belongs to.
    pub fn session(&self) -> u64 {
        match self {
            Datagram::Shard(shard) => shard.session,
            Datagram::Pulse(pulse) => pulse.session,
            Datagram::Confirm(confirm) => confirm.session,
            Datagram::Nack(nack) => nack.session,
            Datagram::Report(report) => report.session,
        }
    }

    /// Appends the datagram.
    ///
    /// # Panics
    /// When a number is beyond what the wire allows.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Datagram::Shard(shard) => {
                out.extend_from_slice(&shard.head());
                out.extend_from_slice(shard.payload);
            }
            Datagram::Pulse(pulse) => pulse.encode(out),
            Datagram::Confirm(confirm) => {
                let entries: Vec<_> = confirm.entries().collect();
                Confirm::encode(confirm.session, confirm.next_seq, &entries, out);
            }
            Datagram::Nack(nack) => {
                let entries: Vec<_> = nack.entries().collect();
                Nack::encode(nack.session, nack.member, &entries, out);
            }
            Datagram::Report(report) => report.encode(out),
        }
    }
}

impl<'a> ShardDatagram<'a> {
    /// The shard that it carries.
    pub fn shard(&self) -> Shard {
        if self.kind == ShardKind::Parity { Shard::Parity(self.index) } else { Shard::Source(self.index) }
    }

    /// The bytes that precede the payload, to be gathered with it into one datagram.
    ///
    /// # Panics
    /// When the frame is beyond [`crate::ChannelParameters::MAX_FRAMES`].
    pub fn head(&self) -> [u8; HEAD] {
        let plain = match self.kind {
            ShardKind::Data => kind::DATA,
            ShardKind::Repair => kind::REPAIR,
            ShardKind::Parity => kind::PARITY,
        };
        let class = if self.block.class == Class::Bulk { kind::BULK } else { 0 };
        let header = ShardHeader {
            version: VERSION,
            kind: plain | class,
            index: self.index,
            count: self.count,
            seq: self.seq.get().into(),
            session: self.session.into(),
            block: self.block.number.get().into(),
            gfn: u32::try_from(self.gfn.index()).expect("images of channels have fewer than 2^32 frames").into(),
        };
        zerocopy::transmute!(header)
    }

    fn decode(kind: ShardKind, bytes: &'a [u8]) -> Result<Self, WireError> {
        let name = match kind {
            ShardKind::Data => "DATA",
            ShardKind::Repair => "REPAIR",
            ShardKind::Parity => "PARITY",
        };
        let (header, payload) = split::<ShardHeader>(name, bytes)?;
        if payload.is_empty() || bytes.len() > MAX_DATAGRAM {
            return Err(WireError::Length { kind: name, length: bytes.len() });
        }
        let class = if header.kind & kind::BULK == 0 { Class::Demand } else { Class::Bulk };
        if !(1..=Geometry::MAX_SHARDS).contains(&header.count) {
            return Err(field(name, "shard count", header.count));
        }
        let below = if kind == ShardKind::Parity { Geometry::MAX_PARITY } else { header.count };
        if header.index >= below {
            return Err(field(name, "shard index", header.index));
        }
        Ok(Self {
            session: header.session.get(),
            seq: header.seq.get().into(),
            kind,
            block: BlockId { class, number: header.block.get().into() },
            index: header.index,
            count: header.count,
            gfn: Gfn::new(if kind == ShardKind::Parity { 0 } else { header.gfn.get().into() }),
            payload,
        })
    }
}

impl Pulse {
    /// Appends the message. Spans of time are cut to microseconds, and to what 32 bits of them hold.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let kind = match self.kind {
            PulseKind::Heartbeat => kind::HEARTBEAT,
            PulseKind::End => kind::END,
        };
        let flags = if self.bursting { flag::BURST } else { 0 } | if self.endgame { flag::ENDGAME } else { 0 };
        push(sender_header(kind, flags, 0, self.session, self.next_seq), out);
        let body = PulseBody {
            next_block: self.next_block.map(|number| number.get().into()),
            oldest_block: self.oldest_block.map(|number| number.get().into()),
            members: self.members.into(),
            round_trip_us: micros(self.round_trip).into(),
            report_us: micros(self.report_interval).into(),
            report_bytes: self.report_bytes.into(),
            burst: self.burst.into(),
            reserved: 0.into(),
            sent_us: (self.sent.as_micros() as u64).into(),
        };
        push(body, out);
    }

    fn decode(kind: PulseKind, bytes: &[u8]) -> Result<Self, WireError> {
        let name = if kind == PulseKind::Heartbeat { "HEARTBEAT" } else { "END" };
        let (header, rest) = split::<SenderHeader>(name, bytes)?;
        let (body, _) = split_body::<PulseBody>(name, bytes, rest)?;
        Ok(Self {
            kind,
            session: header.session.get(),
            next_seq: header.seq.get().into(),
            bursting: header.flags & flag::BURST != 0,
            endgame: header.flags & flag::ENDGAME != 0,
            next_block: body.next_block.map(|number| number.get().into()),
            oldest_block: body.oldest_block.map(|number| number.get().into()),
            members: body.members.get(),
            round_trip: Duration::from_micros(body.round_trip_us.get().into()),
            report_interval: Duration::from_micros(body.report_us.get().into()),
            report_bytes: body.report_bytes.get(),
            burst: body.burst.get(),
            sent: Duration::from_micros(body.sent_us.get()),
        })
    }
}

impl<'a> Confirm<'a> {
    /// Appends a CONFIRM with `entries`, of which there must be 1 to [`MAX_ENTRIES`].
    ///
    /// # Panics
    /// When there are more or fewer, or one says that nothing comes by another answer than [`Answer::Gone`].
    pub fn encode(session: u64, next_seq: Serial, entries: &[Confirmation], out: &mut Vec<u8>) {
        push(sender_header(kind::CONFIRM, 0, count(entries.len()), session, next_seq), out);
        for entry in entries {
            let (how, count, mask) = match entry.answer {
                Answer::Parity(rows) => (how::PARITY, rows, ShardSet::EMPTY),
                Answer::Originals(shards) => (how::ORIGINALS, shards.len(), shards),
                Answer::Gone => (how::GONE, 0, ShardSet::EMPTY),
            };
            assert!((how == how::GONE) == (count == 0), "an answer of no shards");
            let (block, class) = (entry.block.number.get().into(), class_index(entry.block.class) as u8);
            push(structs::Confirmation { block, class, how, count, reserved: 0, mask: mask.to_bytes() }, out);
        }
    }

    /// The answers, at least one.
    pub fn entries(&self) -> impl Iterator<Item = Confirmation> + use<'a> {
        self.entries.iter().filter_map(|entry| Confirmation::try_from(entry).ok())
    }

    fn decode(bytes: &'a [u8]) -> Result<Self, WireError> {
        let (header, rest) = split::<SenderHeader>("CONFIRM", bytes)?;
        let entries = split_entries::<structs::Confirmation>("CONFIRM", header.entries, bytes, rest)?;
        entries.iter().try_for_each(|entry| Confirmation::try_from(entry).map(drop))?;
        Ok(Self { session: header.session.get(), next_seq: header.seq.get().into(), entries })
    }
}

impl TryFrom<&structs::Confirmation> for Confirmation {
    type Error = WireError;

    fn try_from(entry: &structs::Confirmation) -> Result<Self, WireError> {
        let block = block("CONFIRM", entry.class, entry.block.get())?;
        let answer = match (entry.how, entry.count) {
            (how::PARITY, 1..=Geometry::MAX_PARITY) => Answer::Parity(entry.count),
            (how::ORIGINALS, count) => {
                let shards = ShardSet::from_bytes(entry.mask);
                if count == 0 || shards.len() != count {
                    return Err(field("CONFIRM", "count of originals", count));
                }
                Answer::Originals(shards)
            }
            (how::GONE, _) => Answer::Gone,
            (how::PARITY, rows) => return Err(field("CONFIRM", "count of parity rows", rows)),
            (how, _) => return Err(field("CONFIRM", "kind of answer", how)),
        };
        Ok(Self { block, answer })
    }
}

impl<'a> Nack<'a> {
    /// Appends a NACK with `entries`, of which there must be 1 to [`MAX_ENTRIES`].
    ///
    /// # Panics
    /// When there are more or fewer.
    pub fn encode(session: u64, member: Member, entries: &[Lack], out: &mut Vec<u8>) {
        push(member_header(kind::NACK, 0, count(entries.len()), session, member), out);
        for entry in entries {
            let (block, class) = (entry.block.number.get().into(), class_index(entry.block.class) as u8);
            let (need, missing) = (entry.need, entry.missing.to_bytes());
            push(structs::Lack { block, class, need, reserved: 0.into(), missing }, out);
        }
    }

    /// What is asked for, at least one block.
    pub fn entries(&self) -> impl Iterator<Item = Lack> + use<'a> {
        self.entries.iter().filter_map(|entry| Lack::try_from(entry).ok())
    }

    fn decode(bytes: &'a [u8]) -> Result<Self, WireError> {
        let (header, rest) = split::<MemberHeader>("NACK", bytes)?;
        let entries = split_entries::<structs::Lack>("NACK", header.entries, bytes, rest)?;
        entries.iter().try_for_each(|entry| Lack::try_from(entry).map(drop))?;
        Ok(Self { session: header.session.get(), member: Member(header.member.get()), entries })
    }
}

impl Lack {
    /// As `need`: nothing of the block was seen, so that not even the number of its shards is known.
    pub const EVERYTHING: u8 = 255;
}

impl TryFrom<&structs::Lack> for Lack {
    type Error = WireError;

    fn try_from(entry: &structs::Lack) -> Result<Self, WireError> {
        let block = block("NACK", entry.class, entry.block.get())?;
        if !matches!(entry.need, 1..=Geometry::MAX_SHARDS | Self::EVERYTHING) {
            return Err(field("NACK", "count of shards", entry.need));
        }
        Ok(Self { block, need: entry.need, missing: ShardSet::from_bytes(entry.missing) })
    }
}

impl<'a> Report<'a> {
    /// The bits that fit into a report on a channel whose shards have `payload` bytes, so that it needs no larger path than
    /// they do.
    pub const fn max_chunks(payload: u16) -> u16 {
        let room = (HEAD + payload as usize).saturating_sub(size_of::<MemberHeader>() + size_of::<ReportBody>()) * 8;
        if room < ChunkSet::MAX as usize { room as u16 } else { ChunkSet::MAX }
    }

    /// Appends the message. Spans of time are cut to microseconds, `held` also to what 32 bits of them hold.
    ///
    /// # Panics
    /// When there are too many bits, or not as many bytes as they take.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let flags = if self.lacks.is_some() { flag::LACKS } else { 0 } | if self.leaving { flag::LEAVING } else { 0 };
        push(member_header(kind::REPORT, flags, 0, self.session, self.member), out);
        let lacks = self.lacks.unwrap_or(LackBits { first: 0, chunks: 0, bits: &[] });
        assert!(lacks.chunks <= ChunkSet::MAX && lacks.bits.len() == bytes_for(lacks.chunks), "bits of a report");
        let body = ReportBody {
            next_seq: self.next_seq.get().into(),
            received: self.received.into(),
            lost: self.lost.into(),
            overflow: self.overflow.into(),
            buffer: self.buffer.into(),
            rate: self.rate_kib.into(),
            echo_us: (self.echo.as_micros() as u64).into(),
            held_us: micros(self.held).into(),
            first_chunk: lacks.first.into(),
            chunks: lacks.chunks.into(),
            reserved: 0.into(),
            missing: self.missing.into(),
            reserved_end: 0.into(),
        };
        push(body, out);
        out.extend_from_slice(lacks.bits);
    }

    fn decode(bytes: &'a [u8]) -> Result<Self, WireError> {
        let (header, rest) = split::<MemberHeader>("REPORT", bytes)?;
        let (body, rest) = split_body::<ReportBody>("REPORT", bytes, rest)?;
        let chunks = body.chunks.get();
        if chunks > ChunkSet::MAX {
            return Err(field("REPORT", "count of chunks", chunks));
        }
        let lacks = if header.flags & flag::LACKS == 0 {
            None
        } else {
            let bits = rest.get(..bytes_for(chunks));
            let bits = bits.ok_or(WireError::Length { kind: "REPORT", length: bytes.len() })?;
            Some(LackBits { first: body.first_chunk.get(), chunks, bits })
        };
        Ok(Self {
            session: header.session.get(),
            member: Member(header.member.get()),
            leaving: header.flags & flag::LEAVING != 0,
            next_seq: body.next_seq.get().into(),
            received: body.received.get(),
            lost: body.lost.get(),
            overflow: body.overflow.get(),
            buffer: body.buffer.get(),
            rate_kib: body.rate.get(),
            echo: Duration::from_micros(body.echo_us.get()),
            held: Duration::from_micros(body.held_us.get().into()),
            missing: body.missing.get(),
            lacks,
        })
    }
}

impl<'a> LackBits<'a> {
    /// The bits of a whole set.
    pub fn of(set: &'a ChunkSet) -> Self {
        Self { first: 0, chunks: set.universe() as u16, bits: set.bits() }
    }

    /// The set that the bits mean, for an image of `count` chunks.
    pub fn set(&self, count: u32) -> ChunkSet {
        ChunkSet::from_bits(count, self.first, self.chunks, self.bits)
    }
}

impl PartialEq for Confirm<'_> {
    fn eq(&self, other: &Self) -> bool {
        (self.session, self.next_seq) == (other.session, other.next_seq) && self.entries().eq(other.entries())
    }
}

impl PartialEq for Nack<'_> {
    fn eq(&self, other: &Self) -> bool {
        (self.session, self.member) == (other.session, other.member) && self.entries().eq(other.entries())
    }
}

fn sender_header(kind: u8, flags: u8, entries: u8, session: u64, seq: Serial) -> SenderHeader {
    SenderHeader { version: VERSION, kind, flags, entries, seq: seq.get().into(), session: session.into() }
}

fn member_header(kind: u8, flags: u8, entries: u8, session: u64, member: Member) -> MemberHeader {
    let (session, member) = (session.into(), member.0.into());
    MemberHeader { version: VERSION, kind, flags, entries, reserved: 0.into(), session, member }
}

fn push(value: impl IntoBytes + Immutable, out: &mut Vec<u8>) {
    out.extend_from_slice(value.as_bytes());
}

fn count(entries: usize) -> u8 {
    assert!((1..=MAX_ENTRIES).contains(&entries), "{entries} entries in a datagram");
    entries as u8
}

fn split<'a, T: FromBytes>(kind: &'static str, bytes: &'a [u8]) -> Result<(T, &'a [u8]), WireError> {
    split_body(kind, bytes, bytes)
}

fn split_body<'a, T: FromBytes>(kind: &'static str, whole: &[u8], rest: &'a [u8]) -> Result<(T, &'a [u8]), WireError> {
    T::read_from_prefix(rest).map_err(|_| WireError::Length { kind, length: whole.len() })
}

fn split_entries<'a, T: FromBytes + Immutable + zerocopy::Unaligned>(
    kind: &'static str,
    count: u8,
    whole: &[u8],
    rest: &'a [u8],
) -> Result<&'a [T], WireError> {
    if !(1..=MAX_ENTRIES).contains(&usize::from(count)) {
        return Err(field(kind, "number of entries", count));
    }
    let (entries, _) = <[T]>::ref_from_prefix_with_elems(rest, count.into())
        .map_err(|_| WireError::Length { kind, length: whole.len() })?;
    Ok(entries)
}

fn block(kind: &'static str, class: u8, number: u32) -> Result<BlockId, WireError> {
    let class = match class {
        0 => Class::Demand,
        1 => Class::Bulk,
        _ => return Err(field(kind, "class", class)),
    };
    Ok(BlockId { class, number: number.into() })
}

fn field(kind: &'static str, field: &'static str, value: impl Into<u64>) -> WireError {
    WireError::Field { kind, field, value: value.into() }
}

fn bytes_for(chunks: u16) -> usize {
    usize::from(chunks).div_ceil(8)
}

fn micros(span: Duration) -> u32 {
    u32::try_from(span.as_micros()).unwrap_or(u32::MAX)
}
