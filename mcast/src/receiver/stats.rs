/// What a receiver did and saw, since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReceiverStats {
    /// Datagrams with shards that arrived, each once.
    pub received: u64,
    /// Bytes of their shards.
    pub received_bytes: u64,
    /// Datagrams with shards that did not arrive. Goes down when one comes late.
    pub lost: u64,
    /// Of those received, the ones that were sent as a repair: shards again, or parity.
    pub repaired: u64,
    /// Of those received, the ones that told nothing new: repairs for others, mostly.
    pub useless: u64,
    /// Shards computed from parity.
    pub recovered: u64,
    /// Blocks that became complete.
    pub blocks: u64,
    /// Blocks of which something was missing when they were given up.
    pub given_up: u64,
    /// Blocks of which nothing at all arrived, and that were not asked for.
    pub missed: u64,
    /// NACKs sent.
    pub nacks: u64,
    /// Entries in them.
    pub nacked: u64,
    /// Entries not sent since the sender had confirmed enough.
    pub suppressed: u64,
    /// Reports sent.
    pub reports: u64,
    /// Datagrams that were left aside.
    pub dropped: Drops,
}

/// Datagrams that were left aside, by the reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops {
    /// No datagram of the protocol.
    pub malformed: u64,
    /// Of another version of it.
    pub version: u64,
    /// Of another session.
    pub session: u64,
    /// What only members send.
    pub direction: u64,
    /// Sent before this member joined.
    pub early: u64,
    /// Arrived before.
    pub replayed: u64,
    /// Too old to tell whether it arrived before.
    pub old: u64,
    /// Numbered farther ahead than can be.
    pub ahead: u64,
    /// A shard that cannot be one of its block, or contradicts others.
    pub contradicting: u64,
    /// There was no room, since nobody took what was there.
    pub full: u64,
}

impl Drops {
    /// All of them.
    pub const fn total(&self) -> u64 {
        self.malformed
            + self.version
            + self.session
            + self.direction
            + self.early
            + self.replayed
            + self.old
            + self.ahead
            + self.contradicting
            + self.full
    }
}
