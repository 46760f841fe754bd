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
mod member;
mod members;
mod message;
mod pace;
mod repair;
mod send;
mod shards;
mod stats;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

use descriptor::FrameRange;
use descriptor::fetch::Class;
use descriptor::image::Layout;

pub use config::SenderConfig;
pub use members::{ExpelReason, MemberStatus};
pub use message::{Full, SenderEvent, Transmit};
pub use shards::Shards;
pub use stats::SenderStats;

use self::bulk::{Bulk, Step, Timing};
use self::demand::Demand;
use self::heartbeat::Heartbeat;
use self::history::History;
use self::member::Sent;
use self::members::{Members, Reported};
use self::pace::Pace;
use self::repair::{Noted, RepairTiming, Repairs};
use self::send::{DATA, REPAIR, Room};
use self::shards::Work;
use crate::back_off::longest_back_off;
use crate::wire::{Datagram, Nack, Report};
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
    /// The windows hold something back.
    held: bool,
    events: VecDeque<SenderEvent>,
    stats: SenderStats,
    /// The latest time that was told.
    clock: Duration,
}

impl Sender {
    /// The lockstep window is at least this: clones of one parent fault on the same page within a few milliseconds.
    const LOCKSTEP: Duration = Duration::from_millis(5);

    /// A sender that begins with the numbers in `config`, or with numbers that `seed` makes.
    ///
    /// # Panics
    /// When the channel's parameters are not valid, see [`crate::ChannelParameters::check`].
    pub fn new(now: Duration, config: SenderConfig, seed: u64) -> Self {
        let checked = config.channel.check();
        assert!(checked.is_ok(), "a sender for {:?}: {checked:?}", config.channel);
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
            held: false,
            events: VecDeque::new(),
            stats: SenderStats::default(),
            clock: now,
            config,
        }
    }

    /// Where a member that joins now begins.
    pub fn start(&self) -> Start {
        let next_block = self.histories.each_ref().map(|history| wire_number(history.next()));
        Start { seq: wire_number(self.seq), next_block }
    }

    /// Adds a member, which begins at [`Sender::start`]. One that is there begins again.
    ///
    /// # Errors
    /// When there are too many.
    pub fn join(&mut self, now: Duration, member: Member) -> Result<(), Full> {
        self.tick(now);
        if self.members.len() >= self.config.max_members && self.members.get(member).is_none() {
            return Err(Full(self.members.len()));
        }
        let blocks = self.histories.each_ref().map(History::next);
        self.members.join(member, blocks, self.sent(now));
        self.heartbeat.now(now);
        Ok(())
    }

    /// Takes a member out; one that is not there is ignored.
    pub fn leave(&mut self, now: Duration, member: Member) {
        self.tick(now);
        if self.members.remove(now, member) {
            self.departed();
        }
    }

    /// Answers what `member` waits for by multicast, unless that is about to happen, or just did.
    pub fn demand(&mut self, now: Duration, member: Member, ranges: impl IntoIterator<Item = FrameRange>) {
        self.ask(now, member, Class::Demand, ranges);
    }

    /// Answers what `member` asks for ahead of need, as [`Sender::demand`] but after all that somebody waits for.
    pub fn prefetch(&mut self, now: Duration, member: Member, ranges: impl IntoIterator<Item = FrameRange>) {
        self.ask(now, member, Class::Bulk, ranges);
    }

    /// Pushes these frames first, then the rest by address.
    pub fn set_order(&mut self, order: Vec<FrameRange>) {
        self.bulk.set_order(order);
    }

    /// Takes in a NACK or REPORT; anything else is counted and dropped.
    pub fn feedback(&mut self, now: Duration, datagram: &[u8]) {
        self.tick(now);
        let session = self.config.channel.session;
        match Datagram::decode(datagram) {
            Ok(Datagram::Nack(Nack { session: other, .. }) | Datagram::Report(Report { session: other, .. }))
                if other != session =>
            {
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
        if self.has_work(room) {
            next = next.min(self.pace.ready_at());
        }
        if room > Room::Closed {
            let due = [Class::Demand, Class::Bulk].into_iter().filter_map(|class| self.repairs.due(class)).min();
            next = due.map_or(next, |due| next.min(due.max(self.pace.ready_at())));
        }
        let phase = self.bulk.next_timeout(&self.timing(now), self.members.joined());
        // A phase that waits for something else is looked at again with the members.
        next = phase.filter(|phase| *phase > now).map_or(next, |phase| next.min(phase));
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

    fn ask(&mut self, now: Duration, member: Member, class: Class, ranges: impl IntoIterator<Item = FrameRange>) {
        self.tick(now);
        let window = self.lockstep();
        let start = self.members.get(member).map(|state| state.start);
        for range in ranges {
            self.stats.demanded += range.count().get();
            let Some(start) = start else {
                self.stats.demand_refused += range.count().get();
                continue;
            };
            let taken = self.demand.ask(now, (range, class), start, window, &self.histories);
            self.stats.suppressed += taken.suppressed;
            self.stats.demand_refused += taken.refused;
        }
    }

    fn nack(&mut self, now: Duration, nack: &Nack<'_>) {
        self.stats.nacks += 1;
        let sent = self.sent(now);
        let round_trip = self.members.round_trip();
        let crowd = self.members.len() > Repairs::CROWD;
        let Some(state) = self.members.get_mut(nack.member) else {
            self.stats.strangers += 1;
            return;
        };
        for lack in nack.entries() {
            self.stats.nacked += 1;
            let (entries, shards) = state.credit(sent);
            let timing = RepairTiming { gather: gather(lack.block.class, round_trip), flight: round_trip, crowd };
            let history = &mut self.histories[class_index(lack.block.class)];
            let number = lack.block.number.extend(history.next());
            let noted = (entries > 0).then(|| self.repairs.note(now, history, (number, &lack), timing, shards));
            let mut needed = 0;
            match noted.flatten() {
                None => self.stats.nacked_beyond += 1,
                Some(Noted::Needed(shards)) => needed = shards,
                Some(Noted::Late) => self.stats.nacked_late += 1,
                Some(Noted::Gone) => {}
                Some(Noted::Nonsense) => {
                    self.stats.nonsense += 1;
                    state.nonsense += 1;
                }
            }
            if noted.is_some() {
                state.charge(needed);
            }
        }
    }

    fn report(&mut self, now: Duration, report: &Report<'_>) {
        self.stats.reports += 1;
        let echoed = self.heartbeat.echoed(report.echo);
        match self.members.report(report, self.sent(now), echoed) {
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
        let (floor, active) = (self.config.floor as f64, self.bulk.has_work());
        let expelled = self.members.sweep(now, floor, self.pace.rate(), active);
        self.stats.expelled += expelled.len() as u64;
        if !expelled.is_empty() {
            self.departed();
        }
        let events = expelled.into_iter().map(|(member, reason)| SenderEvent::Expelled { member, reason });
        self.events.extend(events);
        self.demand.sweep(now, self.lockstep(), &self.histories);
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
        let wants = self.members.wants(now);
        match self.bulk.step(now, &wants, &self.timing(now)) {
            None => return,
            Some(Step::Begin) => {
                self.stats.passes += 1;
                self.bulk.begin(&self.members.union(now));
            }
            Some(Step::Ask) => self.members.forget_lacks(now),
            Some(Step::EndGame) => self.members.tell(now),
            Some(Step::Rest) => {}
        }
        self.heartbeat.now(now);
    }

    fn timing(&self, now: Duration) -> Timing {
        let round_trip = self.members.round_trip();
        let bulk = &self.under_way[class_index(Class::Bulk)];
        let spread = (Duration::from_micros(100) * self.members.len() as u32).max(round_trip);
        Timing {
            now,
            gather: self.config.gather,
            sending: bulk[DATA].is_some(),
            repaired: if bulk[REPAIR].is_some() { now } else { self.repairs.active(now) },
            quiet: Duration::from_millis(5) + round_trip * 2 + longest_back_off(self.members.len() as u32, round_trip),
            answers: spread + round_trip * 2 + Duration::from_millis(20),
        }
    }

    /// Frames sent less than this ago are not sent again.
    fn lockstep(&self) -> Duration {
        Self::LOCKSTEP.max(self.members.round_trip() * 2)
    }

    fn sent(&self, now: Duration) -> Sent {
        let (blocks, data) = (self.stats.blocks.iter().sum(), self.stats.data.iter().sum());
        Sent { now, seq: self.seq, blocks, data }
    }
}

/// How long the NACKs for a block are gathered. Somebody waits for demand, and each lost shard of it goes again anyway.
fn gather(class: Class, round_trip: Duration) -> Duration {
    const MOST_OF_DEMAND: Duration = Duration::from_micros(200);
    match class {
        Class::Demand => (round_trip / 4).min(MOST_OF_DEMAND),
        Class::Bulk => (round_trip / 2).max(Duration::from_millis(1)),
    }
}

fn wire_number(number: u64) -> Serial {
    Serial::new(number as u32)
}
