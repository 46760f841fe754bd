//! Goal: every rule of the sender, by the datagrams that go in and come out. Method: a channel with simple members, which
//! lose what a seed says, and a clock that jumps to the next timeout or report.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;

use descriptor::image::Content;
use descriptor::{FrameSet, Gfn, PageCount};

use super::*;
use crate::wire::{Answer, HEAD, Lack, LackBits, Pulse, PulseKind, ShardKind};
use crate::{ChannelParameters, ChunkSet, ShardSet};

/// Stored throughout.
pub(super) struct Solid;

impl Layout for Solid {
    fn head(&self, range: FrameRange, limit: PageCount) -> (FrameRange, Content) {
        (range.split_at(limit).0, Content::Stored)
    }
}

/// Zero in every fourth run of ten frames.
struct Striped;

impl Layout for Striped {
    fn head(&self, range: FrameRange, limit: PageCount) -> (FrameRange, Content) {
        let into = range.start().index() % 40;
        let (length, content) = if into < 10 { (10 - into, Content::Zero) } else { (40 - into, Content::Stored) };
        let length = if content == Content::Stored { length.min(limit.get()) } else { length };
        (range.split_at(PageCount::new(length)).0, content)
    }
}

pub(super) fn range(start: u64, count: u64) -> FrameRange {
    FrameRange::new(Gfn::new(start), PageCount::new(count))
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

const SESSION: u64 = 7;

/// A member that reports when asked to, and asks again for what a pulse shows to be lost.
struct Clone {
    member: Member,
    loss: f64,
    random: fastrand::Rng,
    wanted: FrameSet,
    next_seq: Serial,
    received: u32,
    lost: u32,
    buffer: u32,
    unreported: u32,
    next_report: Duration,
    pulse: Option<(Pulse, Duration)>,
    answered: Option<u32>,
    blocks: BTreeMap<(usize, u32), Seen>,
    /// The first block of each class that it has not looked at yet.
    looked: [Serial; 2],
    /// Does not send or receive while set.
    stopped: bool,
    /// Takes so many bytes a second.
    speed: f64,
}

#[derive(Default)]
struct Seen {
    shards: ShardSet,
    rows: BTreeSet<u8>,
    count: u8,
    asked: u32,
    after: Duration,
}

/// A sender and its members, with a delay of 100 us each way.
struct Group {
    sender: Sender,
    layout: Box<dyn Layout>,
    now: Duration,
    clones: Vec<Clone>,
    /// What is on its way to the sender.
    feedback: Vec<(Duration, Vec<u8>)>,
    expelled: Vec<(Member, ExpelReason)>,
    nacks: u64,
    pulses: Vec<(Duration, Pulse)>,
    sent_frames: Vec<(Duration, Class, FrameRange)>,
    kinds: Vec<(Duration, Class, ShardKind)>,
}

const DELAY: Duration = Duration::from_micros(100);

impl Group {
    fn with(frames: u64, change: impl FnOnce(&mut SenderConfig)) -> Self {
        let channel = ChannelParameters::new(SESSION, 1448, PageCount::new(frames)).unwrap();
        let mut config = SenderConfig::new(channel);
        // All of the wire's numbers wrap in every test.
        let near = Serial::new(0).minus(3);
        config.start = Some(Start { seq: Serial::new(0).minus(100), next_block: [near, near] });
        change(&mut config);
        Self {
            sender: Sender::new(Duration::ZERO, config, 1),
            layout: Box::new(Solid),
            now: Duration::ZERO,
            clones: Vec::new(),
            feedback: Vec::new(),
            expelled: Vec::new(),
            nacks: 0,
            pulses: Vec::new(),
            sent_frames: Vec::new(),
            kinds: Vec::new(),
        }
    }

    fn new(frames: u64) -> Self {
        Self::with(frames, |_| {})
    }

    fn join(&mut self, loss: f64) -> Member {
        let member = Member(self.clones.len() as u64 + 100);
        let start = self.sender.start();
        self.sender.join(self.now, member).unwrap();
        self.clones.push(Clone {
            member,
            loss,
            random: fastrand::Rng::with_seed(member.0),
            wanted: FrameSet::full(self.sender.config.channel.frames),
            next_seq: start.seq,
            received: 0,
            lost: 0,
            buffer: 4 << 20,
            unreported: 0,
            next_report: self.now,
            pulse: None,
            answered: None,
            blocks: BTreeMap::new(),
            looked: start.next_block,
            stopped: false,
            speed: f64::INFINITY,
        });
        member
    }

    fn join_all(&mut self, members: u32, loss: f64) {
        (0..members).for_each(|_| {
            self.join(loss);
        });
    }

    fn run_until(&mut self, end: Duration) {
        let mut polls = 0;
        while self.now < end {
            self.step(end);
            polls += 1;
            assert!(polls < 1_000_000, "no busy loop");
        }
    }

    /// Runs until all members have everything, and tells when that was.
    fn complete(&mut self, end: Duration) -> Duration {
        while self.now < end && self.clones.iter().any(|clone| !clone.wanted.is_empty() && !clone.stopped) {
            self.step(end);
        }
        assert!(self.now < end, "complete: {:?}", self.sender.stats());
        self.now
    }

    fn step(&mut self, end: Duration) {
        let (arrived, later) = std::mem::take(&mut self.feedback).into_iter().partition(|(at, _)| *at <= self.now);
        self.feedback = later;
        arrived.into_iter().for_each(|(_, datagram): (_, Vec<u8>)| self.sender.feedback(self.now, &datagram));
        while let Some(SenderEvent::Expelled { member, reason }) = self.sender.poll_event() {
            self.expelled.push((member, reason));
        }
        let mut sent = false;
        if let Some(transmit) = self.sender.poll(self.now, &*self.layout) {
            self.deliver(&transmit);
            sent = true;
        }
        let channel = self.sender.config.channel;
        for clone in self.clones.iter_mut().filter(|clone| !clone.stopped) {
            if self.now >= clone.next_report {
                self.feedback.push((self.now + DELAY, clone.report(self.now, channel, false)));
            }
        }
        if sent {
            return;
        }
        let reports = self.clones.iter().filter(|clone| !clone.stopped).map(|clone| clone.next_report);
        let next = reports.chain(self.feedback.iter().map(|(at, _)| *at)).chain(self.sender.next_timeout()).min();
        self.now = next.unwrap_or(end).clamp(self.now + Duration::from_nanos(100), end.max(self.now + DELAY));
    }

    fn deliver(&mut self, transmit: &Transmit) {
        let (now, channel) = (self.now, self.sender.config.channel);
        match transmit {
            Transmit::Shards { block, count, kind, shards, first_seq } => {
                assert!(!shards.is_empty());
                assert!(usize::from(shards.len()) * (HEAD + 1448) <= self.sender.config.burst);
                let map = *self.sender.block(*block).expect("a block under way is known");
                assert_eq!(u32::from(*count), map.shards(channel.geometry()));
                if *kind == ShardKind::Data && shards.iter().next() == Some(0) {
                    self.sent_frames.extend(map.runs().map(|(frames, _)| (now, block.class, frames)));
                }
                self.kinds.push((now, block.class, *kind));
                for clone in self.clones.iter_mut().filter(|clone| !clone.stopped) {
                    for (seq, index) in (0..).zip(shards.iter()) {
                        clone.take(*block, *count, *kind, index, first_seq.plus(seq), &map);
                    }
                    let threshold = clone.pulse.map_or(0, |(pulse, _)| pulse.report_bytes);
                    if threshold > 0 && clone.unreported >= threshold {
                        let held = f64::from(clone.unreported) / clone.speed;
                        let report = clone.report(now, channel, false);
                        self.feedback.push((now + DELAY + Duration::from_secs_f64(held), report));
                    }
                }
            }
            Transmit::Control { datagram } => match Datagram::decode(datagram).unwrap() {
                Datagram::Pulse(pulse) => {
                    self.pulses.push((now, pulse));
                    for clone in self.clones.iter_mut().filter(|clone| !clone.stopped) {
                        if clone.random.f64() < clone.loss {
                            continue;
                        }
                        clone.pulse = Some((pulse, now));
                        clone.see(pulse.next_seq);
                        for datagram in clone.nacks(now, &pulse) {
                            self.nacks += 1;
                            self.feedback.push((now + DELAY, datagram));
                        }
                        if pulse.kind == PulseKind::End && clone.answered != Some(pulse.burst) {
                            clone.answered = Some(pulse.burst);
                            self.feedback.push((now + DELAY, clone.report(now, channel, true)));
                        }
                        if pulse.endgame {
                            // It gets the rest by unicast.
                            clone.wanted = FrameSet::empty(channel.frames);
                        }
                    }
                }
                Datagram::Confirm(confirm) => {
                    for entry in confirm.entries().filter(|entry| entry.answer == Answer::Gone) {
                        let key = (class_index(entry.block.class), entry.block.number.get());
                        self.clones.iter_mut().for_each(|clone| {
                            clone.blocks.remove(&key);
                        });
                    }
                }
                other => panic!("a sender sends no {other:?}"),
            },
        }
    }
}

impl Clone {
    fn see(&mut self, next: Serial) {
        if next.is_after(self.next_seq) {
            self.next_seq = next;
        }
    }

    fn take(&mut self, block: BlockId, count: u8, kind: ShardKind, index: u8, seq: Serial, map: &BlockMap) {
        assert!(!seq.is_before(self.next_seq), "a number for each datagram");
        self.see(seq.next());
        if self.random.f64() < self.loss {
            self.lost = self.lost.wrapping_add(1);
            return;
        }
        self.received = self.received.wrapping_add(1);
        self.unreported += 1472;
        let key = (class_index(block.class), block.number.get());
        if block.number.is_before(self.looked[key.0]) && !self.blocks.contains_key(&key) {
            return;
        }
        let seen = self.blocks.entry(key).or_default();
        seen.count = count;
        match kind {
            ShardKind::Parity => seen.rows.insert(index),
            _ => seen.shards.insert(index),
        };
        if seen.need() == 0 {
            map.runs().for_each(|(frames, _)| {
                self.wanted.remove_range(frames);
            });
        }
    }

    /// Asks for what is not complete of the blocks that were sent, but not twice within two milliseconds.
    fn nacks(&mut self, now: Duration, pulse: &Pulse) -> Vec<Vec<u8>> {
        let mut lacks = Vec::new();
        for class in [Class::Demand, Class::Bulk] {
            let at = class_index(class);
            while self.looked[at].is_before(pulse.next_block[at]) {
                self.blocks.entry((at, self.looked[at].get())).or_default();
                self.looked[at] = self.looked[at].next();
            }
            for ((_, number), seen) in self.blocks.iter_mut().filter(|((of, _), _)| *of == at) {
                let number = Serial::new(*number);
                if number.is_before(pulse.next_block[at]) && seen.need() > 0 && seen.asked < 6 && now >= seen.after {
                    seen.asked += 1;
                    seen.after = now + ms(2) * (1 << seen.asked);
                    let block = BlockId { class, number };
                    let missing = ShardSet::first(seen.count).without(seen.shards);
                    lacks.push(Lack { block, need: seen.need(), missing });
                }
            }
        }
        self.blocks.retain(|_, seen| seen.need() > 0 && seen.asked < 6);
        lacks
            .chunks(40)
            .map(|lacks| {
                let mut datagram = Vec::new();
                Nack::encode(SESSION, self.member, lacks, &mut datagram);
                datagram
            })
            .collect()
    }

    fn report(&mut self, now: Duration, channel: ChannelParameters, lacks: bool) -> Vec<u8> {
        let mut set = ChunkSet::new(channel.chunks());
        self.wanted.runs().flat_map(FrameRange::frames).for_each(|gfn| set.insert(channel.chunk_of(gfn)));
        let interval = self.pulse.map_or(ms(10), |(pulse, _)| pulse.report_interval);
        let first = self.unreported == 0 && self.received == 0 && self.answered.is_none();
        (self.unreported, self.next_report) = (0, now + interval);
        let mut datagram = Vec::new();
        let (echo, held) = self.pulse.map_or_else(Default::default, |(pulse, at)| (pulse.sent, now - at));
        Report {
            session: SESSION,
            member: self.member,
            leaving: false,
            next_seq: self.next_seq,
            received: self.received,
            lost: self.lost,
            overflow: 0,
            buffer: self.buffer,
            rate_kib: 0,
            echo,
            held,
            missing: self.wanted.count().get() as u32,
            lacks: (lacks || first).then(|| LackBits::of(&set)),
        }
        .encode(&mut datagram);
        datagram
    }
}

impl Seen {
    fn need(&self) -> u8 {
        let have = self.shards.len() + self.rows.len() as u8;
        if self.count == 0 { Lack::EVERYTHING } else { self.count.saturating_sub(have) }
    }
}

/// Bytes sent, per byte of an image of `frames` pages.
fn ratio(group: &Group, frames: u64) -> f64 {
    group.sender.stats().bytes as f64 / (frames * 4096) as f64
}

#[test]
fn a_clean_group_gets_everything_once() {
    for members in [1, 2, 8] {
        let mut group = Group::new(20_000);
        group.join_all(members, 0.0);
        let end = group.complete(ms(2000));
        assert!(end < ms(200), "{members} members took {end:?}");
        let ratio = ratio(&group, 20_000);
        assert!(ratio < 1.03, "{members} members: {ratio}");
        group.run_until(ms(2000));
        let stats = group.sender.stats();
        assert_eq!((stats.passes, stats.nonsense, stats.strangers, stats.stale), (1, 0, 0, 0), "{stats:?}");
        assert!(!group.sender.bulk.is_bursting() && !group.sender.bulk.endgame());
    }
}

#[test]
fn losses_cost_what_the_worst_member_needs() {
    for (loss, most) in [(0.01, 1.08), (0.05, 1.22), (0.3, 2.7)] {
        let mut group = Group::new(20_000);
        group.join_all(8, loss);
        let end = group.complete(ms(10_000));
        let ratio = ratio(&group, 20_000);
        println!("{loss}: {ratio} in {end:?}, {} NACKs, {:?}", group.nacks, group.sender.stats());
        assert!(ratio < most, "{loss}: {ratio}, {:?}", group.sender.stats());
    }
}

#[test]
fn zero_frames_cost_next_to_nothing() {
    let mut group = Group::new(40_000);
    group.layout = Box::new(Striped);
    group.join_all(3, 0.0);
    group.complete(ms(2000));
    let ratio = ratio(&group, 40_000);
    assert!((0.75..0.78).contains(&ratio), "{ratio}");
}

#[test]
fn lockstep_demand_is_answered_once() {
    let mut group = Group::new(10_000);
    let members: Vec<_> = (0..32).map(|_| group.join(0.0)).collect();
    group.clones.iter_mut().for_each(|clone| clone.wanted = FrameSet::empty(PageCount::new(10_000)));
    group.run_until(ms(50));
    for fault in 0..50 {
        for member in &members {
            group.sender.demand(group.now, *member, [range(fault * 100, 1)]);
            group.run_until(group.now + Duration::from_micros(100));
        }
    }
    group.run_until(group.now + ms(10));
    let stats = group.sender.stats();
    assert_eq!((stats.demanded, stats.suppressed), (1600, 1550));
    assert_eq!(group.sent_frames.len(), 50);
    assert_eq!(stats.data, [150, 0]);
}

#[test]
fn the_cap_holds_and_demand_overtakes_bulk() {
    let mut group = Group::with(10_000, |config| config.max_rate = NonZeroU64::new(20_000_000));
    let member = group.join(0.0);
    group.run_until(ms(200));
    let before = group.sender.stats().bytes;
    for fault in 0..100 {
        let now = group.now;
        group.sender.demand(now, member, [range(9_000 + fault * 3, 1)]);
        group.run_until(now + ms(7));
        let sent = group.sent_frames.iter().rev().find(|(at, class, _)| *class == Class::Demand && *at >= now);
        let sent = sent.expect("it is sent at once").0;
        assert!(sent < now + ms(4), "asked at {now:?}, sent at {sent:?}");
    }
    let sent = group.sender.stats().bytes - before;
    assert!((13_500_000..14_200_000).contains(&sent), "{sent} bytes in 0.7 s");
    group.complete(ms(5000));
}
