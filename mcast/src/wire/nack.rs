use super::WireError;
use super::codec::{block, count, field, member_header, push, split, split_entries};
use super::structs::{self, MemberHeader, kind};
use crate::{BlockId, Geometry, Member, ShardSet, class_index};

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

impl<'a> Nack<'a> {
    /// Appends a NACK with `entries`, of which there must be 1 to [`super::MAX_ENTRIES`].
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

    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self, WireError> {
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

impl PartialEq for Nack<'_> {
    fn eq(&self, other: &Self) -> bool {
        (self.session, self.member) == (other.session, other.member) && self.entries().eq(other.entries())
    }
}
