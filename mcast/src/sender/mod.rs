//! The sending side of a channel: what is multicast next, and how fast. Pure: no I/O, no clock, no page bytes.
//!
//! ```text
//!   unicast lane ──join, leave, demand──▶ ┌────────┐ ──Transmit::Shards──▶ shell gathers the bytes ──▶ group
//!   members ──NACK, REPORT──feedback────▶ │ Sender │ ──Transmit::Control─────────────────────────────▶ group
//!   unicast lane ◀──────SenderEvent────── └────────┘
//! ```
//!
//! The shell feeds what arrives, then obeys [`Sender::poll`] until there is nothing, and looks for new feedback between
//! two of its answers, each a burst of at most [`SenderConfig::burst`] bytes. It sleeps until [`Sender::next_timeout`].
//!
//! What goes first: answers to NACKs that need no shards and heartbeats, which are small; repairs of demand; demand; repairs
//! of bulk; bulk. Of one block everything is sent before the next of its class begins.
//!
//! - `demand`: what somebody waits for, each frame once for all who ask within a moment;
//! - `bulk`: what somebody lacks, in passes;
//! - `repair` and `history`: what was lost;
//! - `members` and `pace`: how fast.
//!
//! Invariants, each tested: every u32 of the wire may wrap; nothing that a member reports stops the others for more than a second;
//! a sender to which nobody reports sends heartbeats and what is demanded, within its rate, but no bulk; all state is bounded
//! by the members and the configuration.

mod bulk;
mod config;
mod demand;
mod heartbeat;
mod history;
mod members;
mod pace;
mod repair;
mod shards;
mod stats;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

use descriptor::FrameRange;
use descriptor::fetch::Class;
use descriptor::image::Layout;
use thiserror::Error;

pub use config::SenderConfig;
pub use members::{ExpelReason, MemberStatus};
pub use shards::Shards;
pub use stats::SenderStats;

use self::bulk::{Bulk, Step, Timing};
use self::demand::Demand;
use self::heartbeat::Heartbeat;
use self::history::History;
use self::members::{Members, Reported, Sending};
use self::pace::Pace;
use self::repair::{Noted, RepairTiming, Repairs};
use crate::wire::{self, Confirm, Datagram, HEAD, Nack, Pulse, PulseKind, Report, ShardKind};
use crate::{BlockId, BlockMap, Geometry, Member, Serial, Start, class_index};

/// The sender of one channel.
#[derive(Debug)]
pub struct Sender {
    config: SenderConfig,
    geometry: Geometry,
    /// The number of the next datagram with a shard, without wrap.
    seq: u64,
    histories: [History; 2],
    /// What is partly sent: by class, repairs then data.
    under_way: [[Option<Work>; 2]; 2],
    demand: Demand,
    bulk: Bulk,
    repairs: Repairs,
    members: Members,
    pace: Pace,
    heartbeat: Heartbeat,
    events: VecDeque<SenderEvent>,
    stats: SenderStats,
    /// The latest time that was told.
    clock: Duration,
}

/// What is to be sent next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transmit {
    /// Shards of one block, a datagram each, with consecutive numbers. The bytes of a source shard are
    /// [`BlockMap::pieces`] of [`Sender::block`]; those of parity are made from all source shards.
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

/// Shards of one block that are still to be sent.
#[derive(Debug)]
struct Work {
    block: u64,
    kind: ShardKind,
    shards: Shards,
}

/// What the windows allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Room {
    Closed,
    Urgent,
    All,
}

const REPAIR: usize = 0;
const DATA: usize = 1;

impl Sender {
    /// The lockstep window is at least this: clones of one parent fault on the same page within a few milliseconds.
    const LOCKSTEP: Duration = Duration::from_millis(5);

    /// A sender that begins with the numbers in `config`, or with numbers that `seed` makes.
    ///
    /// # Panics
    /// When the channel's parameters are not valid, see [`crate::ChannelParameters::check`].
    pub fn new(now: Duration, config: SenderConfig, seed: u64) -> Self {
        let checked = config.channel.check();
        assert!(checked.is_ok(), "a sender for {:?}", config.channel);
        let mut random = fastrand::Rng::with_seed(seed);
        let start = config.start.unwrap_or_else(|| Start {
            seq: Serial::new(random.u32(..)),
            next_block: [Serial::new(random.u32(..)), Serial::new(random.u32(..))],
        });
        // One turn of the wire's numbers above zero, so that no number from a peer extends to one below it.
        let unwrapped = |number: Serial| (1 << 32) + u64::from(number.get());
        Self {
            geometry: config.channel.geometry(),
            seq: unwrapped(start.seq),
            histories: start.next_block.map(|number| History::new(unwrapped(number), config.history)),
            under_way: Default::default(),
            demand: Demand::new(config.channel.frames),
            bulk: Bulk::new(config.channel),
            repairs: Repairs::new(),
            members: Members::new(now, config.channel),
            pace: Pace::new(now, &config),
            heartbeat: Heartbeat::new(now),
            events: VecDeque::new(),
            stats: SenderStats::default(),
            clock: now,
            config,
        }
    }

    /// Where a member that joins now begins.
    pub fn start(&self) -> Start {
        Start {
            seq: wire_number(self.seq),
            next_block: self.histories.each_ref().map(|history| wire_number(history.next())),
        }
    }

    /// Adds a member, which begins at [`Sender::start`]. One that is there begins again.
    ///
    /// # Errors
    /// When there are too many.
    pub fn join(&mut self, now: Duration, member: Member) -> Result<(), Full> {
        self.tick(now);
        if self.members.len() >= self.config.max_members && !self.members.contains(member) {
            return Err(Full(self.members.len()));
        }
        let blocks = self.histories.each_ref().map(History::next);
        self.members.join(now, member, self.seq, blocks, self.blocks());
        self.heartbeat.now(now);
        Ok(())
    }

    /// Takes a member out; one that is not there is ignored.
    pub fn leave(&mut self, now: Duration, member: Member) {
        self.tick(now);
        if self.members.remove(member) {
            self.departed();
        }
    }

    /// Answers what `member` waits for by multicast, unless that is about to happen, or just did.
    pub fn demand(&mut self, now: Duration, member: Member, ranges: impl IntoIterator<Item = FrameRange>) {
        self.tick(now);
        let window = self.lockstep();
        let start = self.members.start(member);
        for range in ranges {
            self.stats.demanded += range.count().get();
            let Some(start) = start else {
                self.stats.demand_refused += range.count().get();
                continue;
            };
            let taken = self.demand.ask(now, range, start, window, &self.histories);
            self.stats.suppressed += taken.suppressed;
            self.stats.demand_refused += taken.refused;
        }
    }

    /// Pushes these frames first, then the rest by address.
    pub fn set_order(&mut self, order: Vec<FrameRange>) {
        self.bulk.set_order(order);
    }

    /// Takes in a NACK or REPORT; anything else is counted and dropped.
    pub fn feedback(&mut self, now: Duration, datagram: &[u8]) {
        self.tick(now);
        let datagram = Datagram::decode(datagram);
        let session = datagram.as_ref().map_or(0, Datagram::session);
        match datagram {
            Ok(Datagram::Nack(_) | Datagram::Report(_)) if session != self.config.channel.session => {
                self.stats.other_session += 1;
            }
            Ok(Datagram::Nack(nack)) => self.nack(now, &nack),
            Ok(Datagram::Report(report)) => self.report(now, &report),
            _ => self.stats.malformed += 1,
        }
    }

    /// What is to be sent now, if anything.
    pub fn poll(&mut self, now: Duration, layout: &dyn Layout) -> Option<Transmit> {
        self.tick(now);
        self.advance(now);
        self.control(now).or_else(|| self.shards(now, layout))
    }

    /// When [`Sender::poll`] may have something although nothing else happens. A time that is past means now.
    pub fn next_timeout(&self) -> Option<Duration> {
        let now = self.clock;
        if self.repairs.has_confirms() {
            return Some(now);
        }
        let mut next = self.heartbeat.due();
        let room = self.room();
        let started = |class: Class| self.under_way[class_index(class)].iter().any(Option::is_some);
        let urgent = started(Class::Demand) || !self.demand.is_empty();
        let bulk = started(Class::Bulk) || self.bulk.has_work() && !self.members.is_empty();
        if room == Room::All && bulk || room >= Room::Urgent && urgent {
            next = next.min(self.pace.ready_at());
        }
        for class in [Class::Demand, Class::Bulk] {
            if room >= Room::Urgent
                && let Some(due) = self.repairs.due(class)
            {
                next = next.min(due.max(self.pace.ready_at()));
            }
        }
        if self.bulk.is_bursting() {
            let timing = self.timing(now);
            // What depends on the members' silence is looked at again as often as they are swept.
            let step = self.bulk.next_timeout(&timing, self.members.joined());
            next = step.map_or(next, |step| next.min(step.max(now + Duration::from_micros(1))));
        }
        Some(self.members.next_timeout().map_or(next, |sweep| next.min(sweep)))
    }

    /// The frames of a block that is still known.
    pub fn block(&self, id: BlockId) -> Option<&BlockMap> {
        let history = &self.histories[class_index(id.class)];
        history.get(id.number.extend(history.next())).map(|entry| &entry.map)
    }

    /// Something that happened.
    pub fn poll_event(&mut self) -> Option<SenderEvent> {
        self.events.pop_front()
    }

    /// What was done and seen so far.
    pub fn stats(&self) -> &SenderStats {
        &self.stats
    }

    /// The members, in the order of their numbers.
    pub fn members(&self) -> impl Iterator<Item = MemberStatus> {
        self.members.statuses(self.clock, self.seq)
    }

    /// Bytes a second that may be sent.
    pub fn rate(&self) -> u64 {
        self.pace.rate() as u64
    }

    /// The round trip of the group.
    pub fn round_trip(&self) -> Duration {
        self.members.round_trip()
    }

    fn nack(&mut self, now: Duration, nack: &Nack<'_>) {
        self.stats.nacks += 1;
        if !self.members.contains(nack.member) {
            self.stats.strangers += 1;
            return;
        }
        let round_trip = self.members.round_trip();
        let timing = RepairTiming { gather: (round_trip / 2).max(Duration::from_millis(1)), flight: round_trip };
        let blocks = self.blocks();
        for lack in nack.entries() {
            self.stats.nacked += 1;
            let (entries, shards) = self.members.credit(now, nack.member, blocks, self.seq).unwrap_or_default();
            if entries == 0 {
                self.stats.nacked_beyond += 1;
                continue;
            }
            let history = &mut self.histories[class_index(lack.block.class)];
            let number = lack.block.number.extend(history.next());
            let noted = self.repairs.note(now, history, (number, &lack), timing, shards);
            match noted {
                None => self.stats.nacked_beyond += 1,
                Some(Noted::Late) => self.stats.nacked_late += 1,
                Some(Noted::Nonsense) => {
                    self.stats.nonsense += 1;
                    self.members.nonsense(nack.member);
                }
                Some(Noted::Needed(_) | Noted::Gone) => {}
            }
            let shards = if let Some(Noted::Needed(shards)) = noted { shards } else { 0 };
            self.members.charge(nack.member, shards);
        }
    }

    fn report(&mut self, now: Duration, report: &Report<'_>) {
        self.stats.reports += 1;
        let sending = Sending { seq: self.seq, echoed: self.heartbeat.echoed(report.echo) };
        match self.members.report(now, report, sending) {
            Reported::Taken => {}
            Reported::Stale => self.stats.stale += 1,
            Reported::Nonsense => self.stats.nonsense += 1,
            Reported::Stranger => self.stats.strangers += 1,
            Reported::Leaving => self.leave(now, report.member),
        }
    }

    /// Does what time alone brings about.
    fn tick(&mut self, now: Duration) {
        self.clock = self.clock.max(now);
        if !self.members.is_due(now) {
            return;
        }
        let interval = Duration::from_millis(10).max(self.members.round_trip() * 2);
        if now >= self.pace.adapted() + interval {
            let strain = self.members.strain(now);
            self.pace.adapt(now, strain);
        }
        let active = self.bulk.has_work();
        let floor = self.config.floor as f64;
        let expelled = self.members.sweep(now, floor, self.pace.rate(), active);
        for (member, reason) in &expelled {
            self.stats.expelled += 1;
            self.events.push_back(SenderEvent::Expelled { member: *member, reason: *reason });
        }
        if !expelled.is_empty() {
            self.departed();
        }
        let window = self.lockstep();
        self.demand.sweep(now, window, &self.histories);
    }

    /// Ends what was done for members that are gone.
    fn departed(&mut self) {
        if self.members.is_empty() {
            self.bulk.reset();
        } else if self.bulk.has_work() && self.members.len() <= Members::WINDOWED {
            self.bulk.keep(&self.members.union_of_all());
        }
    }

    /// Moves the push on from phase to phase.
    fn advance(&mut self, now: Duration) {
        let timing = self.timing(now);
        let wants = self.members.wants(now);
        match self.bulk.step(now, &wants, &timing) {
            None => {}
            Some(Step::Begin) => {
                self.stats.passes += 1;
                let union = self.members.union(now);
                self.bulk.begin(&union);
                self.heartbeat.now(now);
            }
            Some(Step::Ask) => self.members.forget_lacks(),
            Some(Step::EndGame) => {
                self.members.tell();
                self.heartbeat.now(now);
            }
            Some(Step::Rest) => self.heartbeat.now(now),
        }
    }

    fn timing(&self, now: Duration) -> Timing {
        let round_trip = self.members.round_trip();
        let bulk = &self.under_way[class_index(Class::Bulk)];
        let repaired = if bulk[REPAIR].is_some() { now } else { self.repairs.active(now) };
        let spread = (Duration::from_micros(100) * self.members.len() as u32).max(round_trip);
        Timing {
            now,
            gather: self.config.gather,
            sending: bulk[DATA].is_some(),
            repaired,
            quiet: Duration::from_millis(6) + round_trip * 6,
            answers: spread + round_trip * 2 + Duration::from_millis(20),
        }
    }

    fn control(&mut self, now: Duration) -> Option<Transmit> {
        let mut datagram = Vec::new();
        if self.repairs.has_confirms() {
            let most = wire::max_entries(self.config.channel.payload);
            let entries = self.repairs.confirmations(&mut self.histories, most);
            if !entries.is_empty() {
                self.stats.confirmed += entries.len() as u64;
                self.stats.refused += entries.iter().filter(|entry| entry.answer == wire::Answer::Gone).count() as u64;
                Confirm::encode(self.config.channel.session, wire_number(self.seq), &entries, &mut datagram);
                return Some(self.control_sent(datagram));
            }
        }
        let spacing = self.members.round_trip().max(Duration::from_millis(2));
        let kind = if self.bulk.take_end(now, spacing) {
            PulseKind::End
        } else if now >= self.heartbeat.due() {
            PulseKind::Heartbeat
        } else {
            return None;
        };
        self.pulse(now, kind).encode(&mut datagram);
        let busy = self.bulk.is_bursting() || !self.demand.is_empty();
        self.heartbeat.sent(now, self.seq, busy);
        Some(self.control_sent(datagram))
    }

    fn control_sent(&mut self, datagram: Vec<u8>) -> Transmit {
        self.stats.control += 1;
        self.stats.bytes += datagram.len() as u64;
        self.pace.spend(datagram.len());
        Transmit::Control { datagram }
    }

    fn pulse(&self, now: Duration, kind: PulseKind) -> Pulse {
        // A block that is partly sent is not yet before the next.
        let next = |class: Class| match &self.under_way[class_index(class)][DATA] {
            Some(work) if work.kind == ShardKind::Data => work.block,
            _ => self.histories[class_index(class)].next(),
        };
        Pulse {
            kind,
            session: self.config.channel.session,
            next_seq: wire_number(self.seq),
            bursting: self.bulk.is_bursting(),
            endgame: self.bulk.endgame(),
            next_block: [Class::Demand, Class::Bulk].map(|class| wire_number(next(class))),
            oldest_block: self.histories.each_ref().map(|history| wire_number(history.oldest())),
            members: self.members.len() as u32,
            round_trip: self.members.round_trip(),
            report_interval: self.members.report_interval(),
            report_bytes: self.members.report_bytes(),
            burst: self.bulk.burst(),
            sent: now,
        }
    }

    fn shards(&mut self, now: Duration, layout: &dyn Layout) -> Option<Transmit> {
        let room = self.room();
        if room < Room::All {
            self.members.held();
        }
        if room == Room::Closed || !self.pace.ready(now) {
            return None;
        }
        if self.refill(now, Class::Demand, layout, room) {
            return self.burst(now, Class::Demand);
        }
        if self.refill(now, Class::Bulk, layout, room) {
            return self.burst(now, Class::Bulk);
        }
        None
    }

    /// What the windows allow: bulk up to the smallest, what is urgent some beyond.
    fn room(&self) -> Room {
        match self.members.limit() {
            Some((limit, extra)) if self.seq >= limit + extra => Room::Closed,
            Some((limit, _)) if self.seq >= limit => Room::Urgent,
            _ => Room::All,
        }
    }

    /// True when there is something of `class` to send.
    fn refill(&mut self, now: Duration, class: Class, layout: &dyn Layout, room: Room) -> bool {
        let at = class_index(class);
        if self.under_way[at][REPAIR].is_none() {
            let loss = self.members.mean_loss(1);
            let repair = self.repairs.next(now, class, &mut self.histories[at], loss);
            self.under_way[at][REPAIR] =
                repair.map(|repair::Repair { block, kind, shards }| Work { block, kind, shards });
        }
        if self.under_way[at][REPAIR].is_some() {
            return true;
        }
        if class == Class::Bulk && room < Room::All {
            return false;
        }
        if self.under_way[at][DATA].is_none() {
            let map = match class {
                Class::Demand => self.demand.next_block(layout, self.geometry),
                Class::Bulk => self.bulk.next_block(layout),
            };
            self.under_way[at][DATA] = map.map(|map| self.begin(now, class, map));
        }
        self.under_way[at][DATA].is_some()
    }

    fn begin(&mut self, now: Duration, class: Class, map: BlockMap) -> Work {
        let count = map.shards(self.geometry) as u8;
        let block = self.histories[class_index(class)].push(map, count);
        self.demand.sent(now, class, block, &map);
        if class == Class::Demand {
            self.bulk.sent(&map);
        }
        self.stats.blocks[class_index(class)] += 1;
        Work { block, kind: ShardKind::Data, shards: Shards::Range(0..count) }
    }

    /// The next burst of what is under way in `class`.
    fn burst(&mut self, now: Duration, class: Class) -> Option<Transmit> {
        let at = class_index(class);
        let slot = if self.under_way[at][REPAIR].is_some() { REPAIR } else { DATA };
        let mut work = self.under_way[at][slot].take()?;
        let datagram = HEAD + self.geometry.payload();
        let shards = work.shards.take((self.config.burst / datagram).clamp(1, 255) as u8);
        let (block, kind, first_seq) = (work.block, work.kind, wire_number(self.seq));
        let entry = self.histories[at].get_mut(block)?;
        let count = entry.count;
        let bytes = usize::from(shards.len()) * datagram;
        let over = work.shards.is_empty();
        if over && slot == REPAIR {
            self.repairs.finished(now, entry);
        }
        if over {
            let map = entry.map;
            self.demand.sent(now, class, block, &map);
            self.finished(now, class, slot, &work);
        } else {
            self.under_way[at][slot] = Some(work);
        }
        self.seq += u64::from(shards.len());
        self.repairs.sent(shards.len());
        self.pace.spend(bytes);
        self.stats.bytes += bytes as u64;
        let counter = match kind {
            ShardKind::Data => &mut self.stats.data,
            ShardKind::Repair => &mut self.stats.repaired,
            ShardKind::Parity => &mut self.stats.parity,
        };
        counter[at] += u64::from(shards.len());
        let block = BlockId { class, number: wire_number(block) };
        Some(Transmit::Shards { block, count, kind, shards, first_seq })
    }

    /// Sees to what follows a block or repair whose last shard goes now.
    fn finished(&mut self, now: Duration, class: Class, slot: usize, work: &Work) {
        let at = class_index(class);
        if slot == DATA
            && work.kind == ShardKind::Data
            && class == Class::Bulk
            && let Some(entry) = self.histories[at].get_mut(work.block)
        {
            // Parity that follows the losses saves the round trip of asking for it.
            let rows =
                ((f64::from(entry.count) * self.members.mean_loss(5)) as u8).min(Geometry::MAX_PARITY - entry.rows);
            if rows > 0 {
                let shards = Shards::Range(entry.rows..entry.rows + rows);
                entry.rows += rows;
                self.under_way[at][DATA] = Some(Work { block: work.block, kind: ShardKind::Parity, shards });
                return;
            }
        }
        if class == Class::Demand || slot == REPAIR || !self.bulk.has_work() {
            self.heartbeat.soon(now);
        }
    }

    /// Frames sent less than this ago are not sent again.
    fn lockstep(&self) -> Duration {
        Self::LOCKSTEP.max(self.members.round_trip() * 2)
    }

    fn blocks(&self) -> u64 {
        self.stats.blocks.iter().sum()
    }
}

fn wire_number(number: u64) -> Serial {
    Serial::new(number as u32)
}
