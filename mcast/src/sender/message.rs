use thiserror::Error;

use super::{ExpelReason, Shards};
use crate::wire::ShardKind;
use crate::{BlockId, Member, Serial};

/// What is to be sent next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transmit {
    /// Shards of one block, a datagram each, with consecutive numbers. The bytes of a source shard are
    /// [`crate::BlockMap::pieces`] of [`super::Sender::block`]; those of parity are made from all source shards.
    Shards {
        /// The block.
        block: BlockId,
        /// The source shards of the whole block.
        count: u8,
        /// Why they are sent, and whether `shards` are rows of parity.
        kind: ShardKind,
        /// Which shards, ascending.
        shards: Shards,
        /// The number of the first datagram.
        first_seq: Serial,
    },
    /// A whole datagram.
    Control {
        /// Its bytes.
        datagram: Vec<u8>,
    },
}

/// Something that the shell has to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenderEvent {
    /// The member is no longer in the channel and has to be told so by unicast.
    Expelled {
        /// The member.
        member: Member,
        /// Why.
        reason: ExpelReason,
    },
}

/// The channel has as many members as it may.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the channel has {0} members and takes no more")]
pub struct Full(
    /// So many.
    pub usize,
);
