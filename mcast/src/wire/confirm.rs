use super::WireError;
use super::codec::{block, count, field, push, sender_header, split, split_entries};
use super::structs::{self, SenderHeader, how, kind};
use crate::{BlockId, Geometry, Serial, ShardSet, class_index};

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

impl<'a> Confirm<'a> {
    /// Appends a CONFIRM with `entries`, of which there must be 1 to [`super::MAX_ENTRIES`].
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

    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self, WireError> {
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

impl PartialEq for Confirm<'_> {
    fn eq(&self, other: &Self) -> bool {
        (self.session, self.next_seq) == (other.session, other.next_seq) && self.entries().eq(other.entries())
    }
}
