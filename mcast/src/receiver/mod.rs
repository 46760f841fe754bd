//! The receiving side of a channel: which shards have arrived, which are asked for again, what is reported. Pure: no I/O, no
//! clock, no page bytes.
//!
//! ```text
//!   group ──datagram──▶ ┌──────────┐ ──Placement: copy the shard there──▶ ┌───────────┐
//!                       │ Receiver │ ◀─────────────────map────────────────│ Assembler │ ──bytes of Pages──▶ installed
//!   server ◀───Send──── └──────────┘ ──Recover, Pages, Release───────────▶└───────────┘
//! ```
//!
//! Whoever runs it hands each datagram to [`Receiver::handle`], does what the answer says, and after some of them obeys
//! [`Receiver::poll`] until there is nothing. [`crate::intake`] does that together with the bytes.
//!
//! - `sequence`: what is lost, by the numbers of the datagrams, and what came before;
//! - `window`, `block`, `pages`: from the first shard of a block to its last page;
//! - `blocks`, `nack`: what is missing, when it is asked for, and when that is given up;
//! - `report`: how this member fares and what it lacks; `liveness`: whether anything comes at all.
//!
//! **When pages come out.** Those of demand as soon as they are complete and their frames are known. Those of bulk when their
//! block is complete, since large installs are cheap ones, or, when something is missing or takes longer than 2 ms, as soon
//! as they are complete, too.
//!
//! **When something is asked for again.** A shard is missing when a later one of its demand block came, when one of a later
//! block of the class came, or when a pulse says that the block was sent. After a tolerance for reordering and a random
//! back-off it is asked for, unless the sender confirms meanwhile that enough is coming. Demand blocks of which nothing came
//! are not asked for: whoever waits for them has a deadline. Bulk that is not [lacking](Receiver::set_lacks) is not either.
//!
//! Invariants, each tested: no datagram makes this panic; every u32 of the wire may wrap; a page goes out once; every drop is
//! counted; incomplete blocks, NACKs and what waits to be polled are bounded, whatever a sender does.

mod block;
mod blocks;
mod config;
mod liveness;
mod nack;
mod pages;
mod report;
mod sequence;
mod stats;
#[cfg(test)]
mod tests;
mod window;

use std::collections::VecDeque;
use std::time::Duration;

use descriptor::FrameRange;
use fastrand::Rng;

pub use config::ReceiverConfig;
pub use stats::{Drops, ReceiverStats};

use self::blocks::{Blocks, Refusal};
use self::liveness::Liveness;
use self::nack::Timing;
use self::report::{Reports, Seen};
use self::sequence::{Arrival, Sequence};
use crate::wire::{Confirm, Datagram, Nack, Pulse, PulseKind, ShardDatagram, ShardKind};
use crate::{BlockId, BlockMap, Lacks, Shard};

/// The receiver of one member of a channel.
#[derive(Debug)]
pub struct Receiver {
    config: ReceiverConfig,
    sequence: Sequence,
    blocks: Blocks,
    timing: Timing,
    reports: Reports,
    liveness: Liveness,
    /// The last question of the sender that was heard.
    question: Option<u32>,
    endgame: bool,
    events: VecDeque<ChannelEvent>,
    rng: Rng,
    stats: ReceiverStats,
    /// The latest time that was told.
    clock: Duration,
}

/// Where a shard belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The block.
    pub block: BlockId,
    /// The shard. When it is source shard 0 the block's map is now readable, and [`Receiver::map`] waits for it.
    pub shard: Shard,
    /// Source shards of the block.
    pub count: u8,
}

/// What is to be done, from [`Receiver::poll`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// These frames are there: they are consecutive stored pages of the block.
    Pages {
        /// The block.
        block: BlockId,
        /// The place of the first among the block's stored pages.
        first_page: u32,
        /// The frames.
        frames: FrameRange,
    },
    /// These frames are zeros.
    Zeros {
        /// The frames.
        frames: FrameRange,
    },
    /// Enough is there to compute the missing shards of the block, which is to be done before the next poll. If the block's
    /// map was not readable before it is now, and [`Receiver::map`] waits for it.
    Recover {
        /// The block.
        block: BlockId,
    },
    /// The bytes of the block are not needed any more.
    Release {
        /// The block.
        block: BlockId,
    },
    /// A datagram for the sender.
    Send {
        /// Its bytes.
        datagram: Vec<u8>,
    },
    /// Something happened to the channel.
    Event(ChannelEvent),
}

/// Something that happened to the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChannelEvent {
    /// The sender is heard, for the first time or again.
    Live,
    /// Nothing was heard for three heartbeats.
    Silent,
    /// The sender asks what is lacking after a burst, which [`Receiver::set_lacks`] should tell now; or what it says of the
    /// end game has changed.
    BurstEnded {
        /// What is lacking is to be fetched by unicast.
        endgame: bool,
    },
}

impl Receiver {
    /// Blocks that are complete or given up and wait to be polled, at most; further blocks are dropped.
    pub const MAX_UNTAKEN: usize = Blocks::MAX_UNTAKEN;

    /// Events that wait to be polled, at most. More can only repeat them.
    const MAX_EVENTS: usize = 16;

    /// A receiver. `seed` makes the random waits of members differ.
    ///
    /// # Panics
    /// When the parameters make [no channel](crate::ChannelParameters::check).
    pub fn new(now: Duration, config: ReceiverConfig, seed: u64) -> Self {
        assert_eq!(config.channel.check(), Ok(()), "parameters of a channel");
        Self {
            sequence: Sequence::new(config.start.seq),
            blocks: Blocks::new(&config),
            timing: Timing::new(),
            reports: Reports::new(now),
            liveness: Liveness::new(now),
            question: None,
            endgame: false,
            events: VecDeque::new(),
            rng: Rng::with_seed(seed),
            stats: ReceiverStats::default(),
            clock: now,
            config,
        }
    }

    /// Takes in a datagram. When it carries a shard that is of use, the answer says where that belongs; the caller has to keep
    /// it there before the next poll.
    pub fn handle(&mut self, now: Duration, datagram: &Datagram<'_>) -> Option<Placement> {
        self.clock = self.clock.max(now);
        if datagram.session() != self.config.channel.session {
            self.stats.dropped.session += 1;
            return None;
        }
        match datagram {
            Datagram::Shard(shard) => self.shard(shard),
            Datagram::Pulse(pulse) => {
                // First of all the size of the group, by which the first reports of its members are spread.
                self.timing.learn(pulse);
                self.heard();
                self.pulse(pulse);
                None
            }
            Datagram::Confirm(confirm) => {
                self.heard();
                self.confirm(confirm);
                None
            }
            Datagram::Nack(_) | Datagram::Report(_) => {
                self.stats.dropped.direction += 1;
                None
            }
        }
    }

    /// Takes in the map of a block, when its first source shard was placed or recovered.
    pub fn map(&mut self, now: Duration, block: BlockId, map: BlockMap) {
        self.clock = self.clock.max(now);
        self.blocks.map(block, map, &mut self.stats);
    }

    /// Gives up a block whose bytes make no sense.
    pub fn spoiled(&mut self, now: Duration, block: BlockId) {
        self.clock = self.clock.max(now);
        self.blocks.spoiled(block, &mut self.stats);
    }

    /// What is to be done now, if anything.
    pub fn poll(&mut self, now: Duration) -> Option<Output> {
        self.clock = self.clock.max(now);
        let now = self.clock;
        if let Some(event) = self.events.pop_front() {
            return Some(Output::Event(event));
        }
        if let Some(output) = self.blocks.next_output(&mut self.stats) {
            return Some(output);
        }
        if let Some(datagram) = self.nack(now).or_else(|| self.report(now)) {
            return Some(Output::Send { datagram });
        }
        // What is to be asked for may also show which pages are there.
        if let Some(output) = self.blocks.next_output(&mut self.stats) {
            return Some(output);
        }
        if self.liveness.fell_silent(now) {
            self.reports.stop();
            return Some(Output::Event(ChannelEvent::Silent));
        }
        None
    }

    /// When [`Receiver::poll`] may have something although no datagram comes. A time that is past means now.
    pub fn next_timeout(&self) -> Option<Duration> {
        if !self.events.is_empty() || self.blocks.has_output() {
            return Some(self.clock);
        }
        let due = [self.blocks.next_timeout(), self.reports.next_timeout(), self.liveness.next_timeout()];
        due.into_iter().flatten().min()
    }

    /// Says which chunks of the image have pages that are lacking and wanted in bulk; none at all until this is called. What it
    /// names may be more than is lacking, never less.
    ///
    /// # Panics
    /// When the chunks are not those of the channel.
    pub fn set_lacks(&mut self, now: Duration, lacks: Option<Lacks>) {
        let universe = lacks.as_ref().map(|lacks| lacks.chunks.universe());
        assert!(universe.is_none_or(|chunks| chunks == self.config.channel.chunks()), "chunks of another channel");
        self.clock = self.clock.max(now);
        if self.reports.set_lacks(lacks) && self.liveness.is_live() {
            self.introduce();
        }
    }

    /// Tells how many datagrams the socket dropped so far, a counter that wraps.
    pub fn set_overflow(&mut self, total: u32) {
        self.reports.set_overflow(total);
    }

    /// Members of the channel, as the sender last said; zero before it did.
    pub fn members(&self) -> u32 {
        if self.timing.is_known() { self.timing.members() } else { 0 }
    }

    /// What was done and seen so far.
    pub fn stats(&self) -> &ReceiverStats {
        &self.stats
    }

    /// The statistics, for whoever decodes datagrams to count those that are none.
    pub(crate) fn drops(&mut self) -> &mut Drops {
        &mut self.stats.dropped
    }

    fn heard(&mut self) {
        if self.liveness.heard(self.clock) {
            self.tell(ChannelEvent::Live);
            self.introduce();
        }
    }

    fn shard(&mut self, shard: &ShardDatagram<'_>) -> Option<Placement> {
        let drops = &mut self.stats.dropped;
        match self.sequence.arrived(shard.seq) {
            Arrival::New => {}
            Arrival::Early => drops.early += 1,
            Arrival::Replayed => drops.replayed += 1,
            Arrival::Old => drops.old += 1,
            Arrival::Ahead => drops.ahead += 1,
        }
        let received = self.sequence.received();
        if received == self.stats.received {
            return None;
        }
        let now = self.clock;
        self.heard();
        self.stats.received = received;
        self.stats.received_bytes += shard.payload.len() as u64;
        self.stats.repaired += u64::from(shard.kind != ShardKind::Data);
        self.stats.lost = self.sequence.lost();
        self.timing.received(now, shard.payload.len());
        self.reports.received(now, shard.payload.len(), &mut self.rng);
        match self.blocks.shard(now, shard, (&self.timing, &mut self.rng), &mut self.stats) {
            Ok(Some(placement)) => return Some(placement),
            Ok(None) => self.stats.useless += 1,
            Err(Refusal::Contradicting) => self.stats.dropped.contradicting += 1,
            Err(Refusal::Ahead) => self.stats.dropped.ahead += 1,
            Err(Refusal::Full) => self.stats.dropped.full += 1,
        }
        None
    }

    fn pulse(&mut self, pulse: &Pulse) {
        let now = self.clock;
        self.sequence.sent(pulse.next_seq);
        self.stats.lost = self.sequence.lost();
        self.reports.pulse(now, pulse, &mut self.rng);
        self.blocks.pulse(now, pulse, (&self.timing, &mut self.rng), &mut self.stats);
        let asked = pulse.kind == PulseKind::End && self.question != Some(pulse.burst);
        if asked {
            self.question = Some(pulse.burst);
            self.answer();
        }
        if asked || pulse.endgame != self.endgame {
            self.endgame = pulse.endgame;
            self.tell(ChannelEvent::BurstEnded { endgame: pulse.endgame });
        }
    }

    fn confirm(&mut self, confirm: &Confirm<'_>) {
        for entry in confirm.entries() {
            self.blocks.confirmed(self.clock, &entry, &self.timing);
        }
    }

    /// Tells the sender unasked what is lacking.
    fn introduce(&mut self) {
        self.reports.repeat();
        self.answer();
    }

    fn answer(&mut self) {
        let (members, round_trip) = (self.timing.members(), self.timing.round_trip());
        self.reports.answer(self.clock, members, round_trip, &mut self.rng);
    }

    fn tell(&mut self, event: ChannelEvent) {
        if self.events.len() >= Self::MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn nack(&mut self, now: Duration) -> Option<Vec<u8>> {
        if self.blocks.next_timeout().is_none_or(|due| due > now) {
            return None;
        }
        let lacks = self.blocks.asks(now, self.reports.lacks(), (&self.timing, &mut self.rng), &mut self.stats);
        if lacks.is_empty() {
            return None;
        }
        self.stats.nacks += 1;
        self.stats.nacked += lacks.len() as u64;
        let mut datagram = Vec::new();
        Nack::encode(self.config.channel.session, self.config.member, &lacks, &mut datagram);
        Some(datagram)
    }

    fn report(&mut self, now: Duration) -> Option<Vec<u8>> {
        let seen = Seen { next: self.sequence.next(), received: self.sequence.received(), lost: self.sequence.lost() };
        self.reports.poll(now, &self.config, seen, &mut self.rng, &mut self.stats)
    }
}
