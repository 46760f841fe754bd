use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use descriptor::fetch::Class;
use descriptor::{FrameRange, FrameSet};

use super::{SESSION, ms};
use crate::wire::{HEAD, Lack, LackBits, Nack, Pulse, Report, ShardKind};
use crate::{BlockId, BlockMap, ChannelParameters, ChunkSet, Member, Serial, ShardSet, Start, class_index};

/// How a member behaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Manner {
    Honest,
    /// Does nothing at all.
    Stopped,
    /// Reports, but no multicast reaches it.
    Deaf,
    /// Says that it receives, but never gets on.
    Frozen,
    /// Asks for all of every block again and again.
    Greedy,
    /// Claims to be far away.
    Far,
    /// Claims to have seen what was not sent yet.
    Prophet,
}

/// A member that reports when asked to, and asks again for what a pulse shows to be lost, without any back-off.
pub(super) struct Peer {
    pub(super) member: Member,
    pub(super) manner: Manner,
    pub(super) loss: f64,
    pub(super) feedback_loss: f64,
    /// Takes so many bytes a second out of its socket.
    pub(super) speed: f64,
    pub(super) buffer: u32,
    pub(super) wanted: FrameSet,
    pub(super) received: u32,
    pub(super) overflow: u32,
    pub(super) next_report: Duration,
    random: fastrand::Rng,
    next_seq: Serial,
    lost: u32,
    /// Bytes since the last report.
    pub(super) unreported: u32,
    socket: VecDeque<Arrival>,
    idle_since: Duration,
    pulse: Option<(Pulse, Duration)>,
    answered: Option<u32>,
    blocks: BTreeMap<(usize, u32), Seen>,
    /// The first block of each class that it has not looked at yet.
    looked: [Serial; 2],
}

struct Arrival {
    block: BlockId,
    count: u8,
    kind: ShardKind,
    index: u8,
    seq: Serial,
    map: BlockMap,
}

#[derive(Default)]
struct Seen {
    shards: ShardSet,
    rows: BTreeSet<u8>,
    count: u8,
    asked: u32,
    after: Duration,
}

impl Peer {
    pub(super) fn new(now: Duration, member: Member, start: Start, loss: f64, wanted: FrameSet) -> Self {
        Self {
            member,
            manner: Manner::Honest,
            loss,
            feedback_loss: 0.0,
            speed: f64::INFINITY,
            buffer: 4 << 20,
            wanted,
            received: 0,
            overflow: 0,
            next_report: now,
            random: fastrand::Rng::with_seed(member.0),
            next_seq: start.seq,
            lost: 0,
            unreported: 0,
            socket: VecDeque::new(),
            idle_since: now,
            pulse: None,
            answered: None,
            blocks: BTreeMap::new(),
            looked: start.next_block,
        }
    }

    pub(super) fn reports(&self) -> bool {
        self.manner != Manner::Stopped
    }

    pub(super) fn hears(&self) -> bool {
        !matches!(self.manner, Manner::Stopped | Manner::Deaf)
    }

    /// True when its report gets through.
    pub(super) fn sends(&mut self) -> bool {
        self.random.f64() >= self.feedback_loss
    }

    /// True when it has received enough for a report.
    pub(super) fn is_due(&self) -> bool {
        self.pulse.is_some_and(|(pulse, _)| (1..=self.unreported).contains(&pulse.report_bytes))
    }

    /// A shard arrives at its socket.
    pub(super) fn arrive(
        &mut self,
        now: Duration,
        (block, count, kind): (BlockId, u8, ShardKind),
        index: u8,
        seq: Serial,
        map: &BlockMap,
    ) {
        if self.random.f64() < self.loss {
            return;
        }
        // The kernel counts about half as much again as the bytes.
        if self.socket.len() * (HEAD + 1448) * 3 / 2 > self.buffer as usize {
            self.overflow += 1;
            return;
        }
        if self.socket.is_empty() {
            self.idle_since = self.idle_since.max(now);
        }
        self.socket.push_back(Arrival { block, count, kind, index, seq, map: *map });
    }

    /// Takes out of the socket what it had the time for.
    pub(super) fn work(&mut self, now: Duration) {
        let each = Duration::from_secs_f64((HEAD + 1448) as f64 / self.speed);
        while now >= self.idle_since + each {
            let Some(arrival) = self.socket.pop_front() else { break };
            self.idle_since += each;
            self.take(&arrival);
        }
    }

    fn take(&mut self, arrival: &Arrival) {
        assert!(!arrival.seq.is_before(self.next_seq), "a number for each datagram");
        self.lost = self.lost.wrapping_add(arrival.seq.since(self.next_seq) as u32);
        self.next_seq = arrival.seq.next();
        self.received = self.received.wrapping_add(1);
        self.unreported += (HEAD + 1448) as u32;
        let key = (class_index(arrival.block.class), arrival.block.number.get());
        if arrival.block.number.is_before(self.looked[key.0]) && !self.blocks.contains_key(&key) {
            return;
        }
        let seen = self.blocks.entry(key).or_default();
        seen.count = arrival.count;
        match arrival.kind {
            ShardKind::Parity => seen.rows.insert(arrival.index),
            _ => seen.shards.insert(arrival.index),
        };
        if seen.need() == 0 {
            arrival.map.runs().for_each(|(frames, _)| {
                self.wanted.remove_range(frames);
            });
        }
    }

    /// A pulse arrives; gives the NACKs that follow. What is in the socket is before it.
    pub(super) fn pulse(&mut self, now: Duration, pulse: &Pulse) -> Vec<Vec<u8>> {
        if self.random.f64() < self.loss {
            return Vec::new();
        }
        if self.socket.is_empty() && self.manner != Manner::Frozen {
            self.pulse = Some((*pulse, now));
            self.lost = self.lost.wrapping_add(pulse.next_seq.since(self.next_seq).max(0) as u32);
            self.next_seq = self.next_seq.later(pulse.next_seq);
        } else if self.pulse.is_none() {
            self.pulse = Some((*pulse, now));
        }
        if self.socket.is_empty() { self.nacks(now, pulse) } else { Vec::new() }
    }

    /// True when the pulse asks what it lacks, for the first time.
    pub(super) fn is_asked(&mut self, pulse: &Pulse) -> bool {
        let heard = self.pulse.is_some_and(|(last, _)| last.burst == pulse.burst);
        heard && self.answered.replace(pulse.burst) != Some(pulse.burst)
    }

    pub(super) fn gone(&mut self, block: BlockId) {
        self.blocks.remove(&(class_index(block.class), block.number.get()));
    }

    /// Asks for what is not complete of the blocks that were sent, at doubling intervals.
    fn nacks(&mut self, now: Duration, pulse: &Pulse) -> Vec<Vec<u8>> {
        let mut lacks = Vec::new();
        for class in [Class::Demand, Class::Bulk] {
            let at = class_index(class);
            while self.looked[at].is_before(pulse.next_block[at]) {
                self.blocks.entry((at, self.looked[at].get())).or_default();
                self.looked[at] = self.looked[at].next();
            }
            for ((_, number), seen) in self.blocks.iter_mut().filter(|((of, _), _)| *of == at) {
                let block = BlockId { class, number: Serial::new(*number) };
                if self.manner == Manner::Greedy {
                    lacks.push(Lack { block, need: seen.count.max(1), missing: ShardSet::EMPTY });
                } else if block.number.is_before(pulse.next_block[at]) && seen.need() > 0 && now >= seen.after {
                    seen.asked += 1;
                    seen.after = now + ms(2) * (1 << seen.asked);
                    let missing = ShardSet::first(seen.count).without(seen.shards);
                    lacks.push(Lack { block, need: seen.need(), missing });
                }
            }
        }
        if self.manner != Manner::Greedy {
            let looked = self.looked;
            self.blocks.retain(|(at, number), seen| {
                !Serial::new(*number).is_before(looked[*at]) || seen.need() > 0 && seen.asked < 6
            });
        }
        let nack = |lacks: &[Lack]| {
            let mut datagram = Vec::new();
            Nack::encode(SESSION, self.member, lacks, &mut datagram);
            datagram
        };
        lacks.chunks(40).map(nack).collect()
    }

    pub(super) fn report(&mut self, now: Duration, channel: ChannelParameters, lacks: bool) -> Vec<u8> {
        let mut set = ChunkSet::new(channel.chunks());
        (0..channel.chunks())
            .filter(|chunk| self.wanted.runs_in(channel.chunk(*chunk)).next().is_some())
            .for_each(|chunk| set.insert(chunk));
        let interval = self.pulse.map_or(ms(10), |(pulse, _)| pulse.report_interval);
        let first = self.received == 0 && self.answered.is_none();
        (self.unreported, self.next_report) = (0, now + interval);
        let (mut echo, mut held) = self.pulse.map_or_else(Default::default, |(pulse, at)| (pulse.sent, now - at));
        let mut next_seq = self.next_seq;
        match self.manner {
            Manner::Far => (echo, held) = (ms(1), Duration::ZERO),
            Manner::Prophet => next_seq = next_seq.plus(100_000),
            Manner::Frozen => (next_seq, echo) = (Serial::new(0).minus(90), Duration::ZERO),
            _ => {}
        }
        let mut datagram = Vec::new();
        let report = Report {
            session: SESSION,
            member: self.member,
            leaving: false,
            next_seq,
            received: self.received,
            lost: self.lost,
            overflow: self.overflow,
            buffer: self.buffer,
            rate_kib: 0,
            echo,
            held,
            missing: self.wanted.count().get() as u32,
            lacks: (lacks || first).then(|| LackBits::of(&set)),
        };
        report.encode(&mut datagram);
        datagram
    }

    /// It gets the rest by unicast.
    pub(super) fn fetch(&mut self) {
        self.wanted.remove_range(FrameRange::new(self.wanted.bounds().start(), self.wanted.universe()));
    }
}

impl Seen {
    fn need(&self) -> u8 {
        let have = self.shards.len() + self.rows.len() as u8;
        if self.count == 0 { Lack::EVERYTHING } else { self.count.saturating_sub(have) }
    }
}
