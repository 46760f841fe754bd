use descriptor::Gfn;
use descriptor::fetch::Class;

use super::codec::{field, split};
use super::structs::{ShardHeader, kind};
use super::{HEAD, MAX_DATAGRAM, VERSION, WireError};
use crate::{BlockId, Geometry, Serial, Shard};

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

    pub(super) fn decode(kind: ShardKind, bytes: &'a [u8]) -> Result<Self, WireError> {
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
