//! The receiver, with its bytes, as a list of operations against a simple model: what fuzzing and property tests share.
//!
//! The operations come from arbitrary bytes and in any order: a sender's blocks, of which any datagram may be lost, late, or come
//! twice; repairs and parity that nobody asked for; pulses and confirmations that need not be true; foreign bytes. The
//! model knows every block and which of its shards arrived. At the end everything falls silent, and so must the receiver.

use std::time::Duration;

use arbitrary::{Arbitrary, Result, Unstructured};
use descriptor::fetch::Class;
use descriptor::image::Content;
use descriptor::{FrameRange, Gfn, PageCount};
use mcast::intake::{Intake, IntakeEvent};
use mcast::receiver::ReceiverConfig;
use mcast::wire::{self, Answer, Confirm, Confirmation, Datagram, Lack, Pulse, PulseKind, ShardDatagram, ShardKind};
use mcast::{
    BlockId, BlockMap, ChannelParameters, ChunkSet, Geometry, Lacks, Member, Serial, Shard, ShardSet, Start,
    class_index, fec,
};

use crate::image::Image;

/// Operations of one run; longer lists find nothing new and slow the search down.
const MAX_OPERATIONS: usize = 256;

/// Blocks that are remembered; operations reach no farther back.
const MAX_BLOCKS: usize = 64;

/// Datagrams that are remembered, to come late or again.
const MAX_SENT: usize = 256;

/// Wake-ups after the last operation until the receiver must be at rest.
const MAX_STEPS: usize = 20_000;

const SESSION: u64 = 7;
const MEMBER: Member = Member(9);

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Operation {
    Block { bulk: bool, start: u16, runs: [(u8, u8); 3] },
    Send { bulk: bool, count: u8, lost: u32 },
    Again { back: u8 },
    Repair { bulk: bool, back: u8, shard: u8, lost: bool },
    Parity { bulk: bool, back: u8, row: u8, count: u8 },
    Pulse { end: bool, endgame: bool, members: u16, round_trip: u16, burst: u8, whole: bool, old: bool },
    Confirm { bulk: bool, back: u8, answer: u8, count: u8 },
    Forge { back: u8, how: u8, at: u16 },
    Lacks { bits: u8 },
    Nothing,
    Wait { us: u16 },
    WaitForTimeout,
    Poll { count: u8 },
}

struct Model {
    image: Image,
    channel: ChannelParameters,
    now: Duration,
    seq: Serial,
    start: Start,
    blocks: [Vec<Block>; 2],
    sent: Vec<(Vec<u8>, Shard, BlockId)>,
    delivered: u32,
    unpolled: usize,
    /// How often each frame may come out, and did.
    frames: Vec<(u32, u32)>,
    lacks: Option<ChunkSet>,
}

struct Block {
    map: BlockMap,
    stream: Vec<u8>,
    count: u8,
    /// Shards sent for the first time.
    next: u8,
    here: ShardSet,
    rows: u64,
}

/// Runs the operations that `bytes` stand for.
///
/// # Panics
/// When the receiver does what it must not.
pub fn run(bytes: &[u8]) {
    // Bytes that end too early make a shorter run.
    let _ended = run_unstructured(&mut Unstructured::new(bytes));
}

fn run_unstructured(u: &mut Unstructured<'_>) -> Result<()> {
    let frames = u.int_in_range(1..=1000)?;
    let payload = *u.choose(&[512, 1448, 8948, 61_440])?;
    let channel = ChannelParameters::new(SESSION, payload, PageCount::new(frames)).expect("possible parameters");
    let (seq, block) = (Serial::new(u.arbitrary()?), Serial::new(u.arbitrary()?));
    let start = Start { seq, next_block: [block, block.plus(1000)] };
    let mut config = ReceiverConfig::new(channel, MEMBER, start, 1 << 20);
    config.max_blocks = u.int_in_range(1..=20)?;
    let mut model = Model {
        image: Image::solid(frames, 3),
        channel,
        now: Duration::ZERO,
        seq,
        start,
        blocks: [Vec::new(), Vec::new()],
        sent: Vec::new(),
        delivered: 0,
        unpolled: 0,
        frames: vec![(0, 0); frames as usize],
        lacks: None,
    };
    let mut intake = Intake::new(Duration::ZERO, config, u.arbitrary()?);
    for _ in 0..MAX_OPERATIONS {
        if u.is_empty() {
            break;
        }
        let Ok(operation) = u.arbitrary() else { break };
        model.apply(&mut intake, operation);
    }
    model.finish(&mut intake);
    Ok(())
}

impl Model {
    fn apply(&mut self, intake: &mut Intake, operation: Operation) {
        match operation {
            Operation::Block { bulk, start, runs } => self.begin(class(bulk), start, runs),
            Operation::Send { bulk, count, lost } => {
                for at in 0..u32::from(count) {
                    if !self.send_next(intake, class(bulk), lost >> (at % 32) & 1 == 1) {
                        break;
                    }
                }
            }
            Operation::Again { back } => {
                if let Some(at) = self.sent.len().checked_sub(1 + usize::from(back)) {
                    let (datagram, shard, block) = self.sent[at].clone();
                    self.deliver(intake, &datagram, shard, block);
                }
            }
            Operation::Repair { bulk, back, shard, lost } => {
                if let Some((id, count)) = self.block(class(bulk), back) {
                    self.send(intake, id, ShardKind::Repair, shard % count, lost);
                }
            }
            Operation::Parity { bulk, back, row, count } => {
                if let Some((id, _)) = self.block(class(bulk), back) {
                    for row in (row % Geometry::MAX_PARITY..Geometry::MAX_PARITY).take(usize::from(count % 8)) {
                        self.send(intake, id, ShardKind::Parity, row, false);
                    }
                }
            }
            Operation::Pulse { end, endgame, members, round_trip, burst, whole, old } => {
                let next = |class: Class| {
                    let at = class_index(class);
                    let sent = self.blocks[at].iter().filter(|block| whole || block.next == block.count).count();
                    self.start.next_block[at].plus(sent as u32)
                };
                let next_block = [next(Class::Demand), next(Class::Bulk)];
                let pulse = Pulse {
                    kind: if end { PulseKind::End } else { PulseKind::Heartbeat },
                    session: SESSION,
                    next_seq: self.seq,
                    bursting: end,
                    endgame,
                    next_block,
                    oldest_block: if old { next_block.map(|number| number.minus(2)) } else { self.start.next_block },
                    members: members.into(),
                    round_trip: Duration::from_micros(u64::from(round_trip) * 8),
                    report_interval: Duration::from_millis(10),
                    report_bytes: u32::from(round_trip) << 8,
                    burst: burst.into(),
                    sent: self.now,
                };
                let mut datagram = Vec::new();
                pulse.encode(&mut datagram);
                self.hand(intake, &datagram);
            }
            Operation::Confirm { bulk, back, answer, count } => {
                let Some((block, _)) = self.block(class(bulk), back) else { return };
                let answer = match answer % 4 {
                    0 => Answer::Parity(count.clamp(1, Geometry::MAX_PARITY)),
                    1 => Answer::Gone,
                    _ => Answer::Originals(ShardSet::first(count.clamp(1, Geometry::MAX_SHARDS))),
                };
                let mut datagram = Vec::new();
                Confirm::encode(SESSION, self.seq, &[Confirmation { block, answer }], &mut datagram);
                self.hand(intake, &datagram);
            }
            Operation::Forge { back, how, at } => self.forge(intake, back, how, at),
            Operation::Lacks { bits } => {
                let mut chunks = ChunkSet::new(self.channel.chunks());
                (0..self.channel.chunks()).filter(|at| bits >> (at % 8) & 1 == 1).for_each(|at| chunks.insert(at));
                let pages = PageCount::new(u64::from(chunks.len()));
                intake.set_lacks(self.now, Some(Lacks { chunks: chunks.clone(), pages }));
                self.lacks = Some(chunks);
            }
            Operation::Nothing => {
                intake.set_lacks(self.now, None);
                self.lacks = None;
            }
            Operation::Wait { us } => self.now += Duration::from_micros(us.into()),
            Operation::WaitForTimeout => self.now = intake.next_timeout().unwrap_or(self.now).max(self.now),
            Operation::Poll { count } => {
                for _ in 0..count {
                    if !self.poll(intake) {
                        break;
                    }
                }
            }
        }
    }

    fn begin(&mut self, class: Class, start: u16, runs: [(u8, u8); 3]) {
        let at = class_index(class);
        if self.blocks[at].len() >= MAX_BLOCKS || self.blocks[at].last().is_some_and(|block| block.next < block.count) {
            return;
        }
        let frames = self.channel.frames.get();
        let geometry = self.channel.geometry();
        let most = if class == Class::Demand { Geometry::MAX_DEMAND_PAGES } else { geometry.pages_per_block() };
        let (mut map, mut next) = (BlockMap::new(), u64::from(start) % frames);
        for (gap, count) in runs {
            next += u64::from(gap % 16);
            let left = u64::from(most.min(geometry.pages_per_block()) - map.pages());
            let count = u64::from(count).min(left).min(frames.saturating_sub(next));
            if count > 0 && map.push(FrameRange::new(Gfn::new(next), PageCount::new(count)), Content::Stored) {
                next += count;
            }
        }
        if map.is_empty() {
            return;
        }
        let mut stream = map.encode().to_vec();
        for (frames, _) in map.runs() {
            for gfn in frames.frames() {
                self.image.push_page(gfn, &mut stream);
                self.frames[gfn.index() as usize].0 += 1;
            }
        }
        let count = map.shards(geometry) as u8;
        self.blocks[at].push(Block { map, stream, count, next: 0, here: ShardSet::EMPTY, rows: 0 });
    }

    fn send_next(&mut self, intake: &mut Intake, class: Class, lost: bool) -> bool {
        let at = class_index(class);
        let number = self.start.next_block[at].plus((self.blocks[at].len() as u32).wrapping_sub(1));
        let Some(block) = self.blocks[at].last_mut().filter(|block| block.next < block.count) else { return false };
        let shard = block.next;
        block.next += 1;
        self.send(intake, BlockId { class, number }, ShardKind::Data, shard, lost);
        true
    }

    fn send(&mut self, intake: &mut Intake, id: BlockId, kind: ShardKind, index: u8, lost: bool) {
        let geometry = self.channel.geometry();
        let block = &self.blocks[class_index(id.class)][self.place(id)];
        let mut row = Vec::new();
        let (payload, gfn) = if kind == ShardKind::Parity {
            row.resize(geometry.payload(), 0);
            fec::parity(index..index + 1, geometry.payload(), &block.stream, &mut row);
            (&row[..], Gfn::new(0))
        } else {
            (&block.stream[geometry.shard_span(index, block.map.pages())], block.map.named_by(geometry, index))
        };
        let shard =
            ShardDatagram { session: SESSION, seq: self.seq, kind, block: id, index, count: block.count, gfn, payload };
        let datagram = [&shard.head()[..], payload].concat();
        let shard = shard.shard();
        self.seq = self.seq.next();
        if !lost {
            self.deliver(intake, &datagram, shard, id);
        }
        if self.sent.len() >= MAX_SENT {
            self.sent.remove(0);
        }
        self.sent.push((datagram, shard, id));
    }

    fn deliver(&mut self, intake: &mut Intake, datagram: &[u8], shard: Shard, id: BlockId) {
        self.delivered += 1;
        let place = self.place(id);
        let block = &mut self.blocks[class_index(id.class)][place];
        match shard {
            Shard::Source(index) => {
                block.here.insert(index);
            }
            Shard::Parity(row) => block.rows |= 1 << row,
        }
        self.hand(intake, datagram);
    }

    fn hand(&mut self, intake: &mut Intake, datagram: &[u8]) {
        intake.handle(self.now, datagram);
        self.unpolled += 1;
        if self.unpolled >= Intake::MAX_BATCH {
            while self.poll(intake) {}
        }
    }

    /// Bytes that are none of the channel's.
    fn forge(&mut self, intake: &mut Intake, back: u8, how: u8, at: u16) {
        let before = intake.stats().dropped.total();
        let mut bytes = match self.sent.len().checked_sub(1 + usize::from(back)) {
            Some(place) => self.sent[place].0.clone(),
            None => vec![how; usize::from(back)],
        };
        match how % 4 {
            0 => bytes.truncate(usize::from(at) % wire::HEAD),
            1 => bytes.first_mut().into_iter().for_each(|version| *version = version.wrapping_add(how | 1)),
            2 => bytes.get_mut(8).into_iter().for_each(|session| *session ^= how | 1),
            _ => {
                bytes.clear();
                let block = BlockId { class: Class::Bulk, number: self.start.next_block[1] };
                let lack = Lack { block, need: 1, missing: ShardSet::EMPTY };
                wire::Nack::encode(SESSION, MEMBER, &[lack], &mut bytes);
            }
        }
        intake.handle(self.now, &bytes);
        assert_eq!(intake.stats().dropped.total(), before + 1, "foreign bytes are counted: {bytes:?}");
    }

    /// Takes one event; false when there is none.
    fn poll(&mut self, intake: &mut Intake) -> bool {
        let Some(event) = intake.poll(self.now) else {
            self.unpolled = 0;
            return false;
        };
        match event {
            IntakeEvent::Pages { frames, bytes } => {
                assert!(!frames.is_empty() && self.channel.holds(frames), "pages {frames}");
                let bytes = bytes.expect("no frame is zero");
                assert_eq!(bytes.len() as u64, frames.count().bytes());
                for (gfn, page) in frames.frames().zip(bytes.chunks(4096)) {
                    assert!(self.image.is_page(gfn, page), "page {gfn} is another");
                    let (allowed, came) = &mut self.frames[gfn.index() as usize];
                    *came += 1;
                    assert!(*came <= *allowed, "page {gfn} came out {came} times of {allowed} blocks");
                }
            }
            IntakeEvent::Send { datagram } => match Datagram::decode(&datagram).expect("its datagrams are sound") {
                Datagram::Nack(nack) => {
                    assert_eq!((nack.session, nack.member), (SESSION, MEMBER));
                    let entries: Vec<_> = nack.entries().collect();
                    assert!((1..=wire::max_entries(self.channel.payload)).contains(&entries.len()));
                    entries.iter().for_each(|lack| self.check_lack(lack));
                }
                Datagram::Report(report) => {
                    assert!(report.received <= self.delivered);
                    assert!(report.next_seq.since(self.seq) <= 0 && self.start.seq.since(report.next_seq) <= 0);
                    assert_eq!(report.received.wrapping_add(report.lost), report.next_seq.since(self.start.seq) as u32);
                }
                other => panic!("{other:?} from a receiver"),
            },
            IntakeEvent::Channel(_) => {}
        }
        true
    }

    /// What is asked for must be missing, and known to have been sent.
    fn check_lack(&self, lack: &Lack) {
        let blocks = &self.blocks[class_index(lack.block.class)];
        let block = blocks.get(self.place(lack.block)).unwrap_or_else(|| panic!("{lack:?} of no block"));
        let missing = ShardSet::first(block.count).without(block.here);
        let rows = block.rows.count_ones() as u8;
        if lack.need == Lack::EVERYTHING {
            assert!(block.here.is_empty() && block.rows == 0, "{lack:?}, but something came");
            assert_eq!(lack.block.class, Class::Bulk, "{lack:?} of demand");
        } else {
            assert!(lack.missing.is_subset(missing), "{lack:?} of {missing:?}");
            assert!(lack.need > 0 && lack.need <= lack.missing.len(), "{lack:?}");
            assert!(missing.len() > rows, "{lack:?}, but {rows} rows of parity are there");
            assert!(lack.need + rows >= lack.missing.len(), "{lack:?} with {rows} rows of parity");
        }
        assert!(lack.block.class == Class::Demand || self.lacks.is_some(), "{lack:?}, but nothing is wanted");
    }

    fn place(&self, id: BlockId) -> usize {
        id.number.since(self.start.next_block[class_index(id.class)]) as usize
    }

    fn block(&self, class: Class, back: u8) -> Option<(BlockId, u8)> {
        let at = class_index(class);
        let place = self.blocks[at].len().checked_sub(1 + usize::from(back) % MAX_BLOCKS)?;
        let number = self.start.next_block[at].plus(place as u32);
        Some((BlockId { class, number }, self.blocks[at][place].count))
    }

    /// Lets the time pass until nothing is to be done.
    fn finish(mut self, intake: &mut Intake) {
        let mut steps = 0;
        loop {
            while self.poll(intake) {
                steps += 1;
                assert!(steps < MAX_STEPS, "no end at {:?}", self.now);
            }
            let Some(due) = intake.next_timeout() else { break };
            self.now = self.now.max(due);
            steps += 1;
            assert!(steps < MAX_STEPS, "no end at {:?}", self.now);
        }
        let stats = intake.stats();
        assert!(stats.received <= u64::from(self.delivered));
        let drops = &stats.dropped;
        if stats.given_up + stats.missed + drops.early + drops.old + drops.ahead + drops.full > 0 {
            return;
        }
        assert_eq!(drops.contradicting, 0, "nothing contradicts");
        let mut due = vec![0_u32; self.frames.len()];
        for block in self.blocks.iter().flatten() {
            let complete = u32::from(block.here.len()) + block.rows.count_ones() >= block.count.into();
            let frames = block.map.runs().filter(|_| complete).flat_map(|(frames, _)| frames.frames());
            frames.for_each(|gfn| due[gfn.index() as usize] += 1);
        }
        for (gfn, (due, (_, came))) in due.into_iter().zip(self.frames).enumerate() {
            assert!(came >= due, "page {gfn} came out {came} times, and {due} blocks with it are complete");
        }
    }
}

fn class(bulk: bool) -> Class {
    if bulk { Class::Bulk } else { Class::Demand }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_receiver_does_what_the_model_allows(bytes in proptest::collection::vec(any::<u8>(), 0..1500)) {
            super::run(&bytes);
        }
    }
}
