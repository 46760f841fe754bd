use std::time::Duration;

use super::codec::{bytes_for, field, member_header, micros, push, split, split_body};
use super::structs::{MemberHeader, ReportBody, flag, kind};
use super::{HEAD, WireError};
use crate::{ChunkSet, Member, Serial};

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

    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self, WireError> {
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
