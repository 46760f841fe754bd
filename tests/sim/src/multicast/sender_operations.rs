//! The sender as a list of operations against a simple model: what fuzzing and property tests share.
//!
//! The operations come from arbitrary bytes and in any order: members that come and go, ask, report and complain, truly or not,
//! and a shell that polls when it likes. The model knows which numbers were sent and which frames somebody waits for. At the
//! end everybody falls silent; what was demanded must then go, and the sender must come to rest.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::time::Duration;

use arbitrary::{Arbitrary, Result, Unstructured};
use descriptor::fetch::Class;
use descriptor::image::{Content, Layout};
use descriptor::{FrameRange, FrameSet, Gfn, PageCount};
use mcast::sender::{Sender, SenderConfig, SenderEvent, Transmit};
use mcast::wire::{Answer, Datagram, HEAD, Lack, LackBits, Nack, PulseKind, Report, ShardKind};
use mcast::{BlockId, ChannelParameters, Geometry, Member, Serial, ShardSet, class_index};

/// Operations of one run; longer lists find nothing new and slow the search down.
const MAX_OPERATIONS: usize = 512;

/// The longest that a frame may count as just sent: twice the longest round trip, and what a repair takes.
const MEMORY: Duration = Duration::from_secs(2);

/// When a sender must be at rest although all members fell silent in the middle of something.
const REST: Duration = Duration::from_secs(60);

/// Wake-ups within that time.
const MAX_STEPS: usize = 200_000;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Operation {
    Join { member: u8 },
    Leave { member: u8 },
    Demand { member: u8, start: u16, count: u8 },
    Order { start: u16, count: u16 },
    Nack { member: u8, bulk: bool, back: u8, need: u8, shards: [u8; 3], far: bool },
    Truth { member: u8, lacks: u8, missing: u16 },
    Report { member: u8, ahead: i16, received: u32, lost: u32, overflow: u16, buffer: u32, echo_us: u32, lacks: u8 },
    Raw { length: u8, first: [u8; 4] },
    Wait { us: u16 },
    WaitForTimeout,
    Poll { count: u8 },
}

struct Striped {
    frames: u64,
}

impl Layout for Striped {
    fn head(&self, range: FrameRange, limit: PageCount) -> (FrameRange, Content) {
        assert!(!range.is_empty() && range.end().index() <= self.frames, "the layout of {range} is asked for");
        let into = range.start().index() % 64;
        let (length, content) = if into < 8 { (8 - into, Content::Zero) } else { (64 - into, Content::Stored) };
        let length = if content == Content::Stored { length.min(limit.get()) } else { length };
        (range.split_at(PageCount::new(length)).0, content)
    }
}

struct Model {
    config: SenderConfig,
    layout: Striped,
    now: Duration,
    members: BTreeSet<Member>,
    next_seq: Serial,
    /// The next block of each class, and the next shard of the last one.
    next_block: [Serial; 2],
    unsent: [Option<(Serial, u8, u8)>; 2],
    /// The next row of parity of each block.
    rows: BTreeMap<(usize, u32), u8>,
    owed: FrameSet,
    sent_at: Vec<Option<Duration>>,
    bytes: u64,
    controls: u64,
}

/// Runs the operations that `bytes` stand for.
///
/// # Panics
/// When the sender does what it must not.
pub fn run(bytes: &[u8]) {
    // Bytes that end too early make a shorter run.
    let _ended = run_unstructured(&mut Unstructured::new(bytes));
}

fn run_unstructured(u: &mut Unstructured<'_>) -> Result<()> {
    let frames = u.int_in_range(1..=3000)?;
    let payload = *u.choose(&[512, 1448, 8948, 61_440])?;
    let channel = ChannelParameters::new(7, payload, PageCount::new(frames)).expect("possible parameters");
    let config = SenderConfig {
        max_rate: if u.arbitrary()? { NonZeroU64::new(u.int_in_range(100_000..=1_000_000_000)?) } else { None },
        history: u.int_in_range(1..=64)?,
        max_members: u.int_in_range(1..=8)?,
        ..SenderConfig::new(channel)
    };
    let mut sender = Sender::new(Duration::ZERO, config.clone(), u.arbitrary()?);
    let start = sender.start();
    let mut model = Model {
        config,
        layout: Striped { frames },
        now: Duration::ZERO,
        members: BTreeSet::new(),
        next_seq: start.seq,
        next_block: start.next_block,
        unsent: [None; 2],
        rows: BTreeMap::new(),
        owed: FrameSet::empty(channel.frames),
        sent_at: vec![None; frames as usize],
        bytes: 0,
        controls: 0,
    };
    for _ in 0..MAX_OPERATIONS {
        if u.is_empty() {
            break;
        }
        let Ok(operation) = u.arbitrary() else { break };
        model.apply(&mut sender, operation);
        model.check(&mut sender);
    }
    model.finish(&mut sender);
    Ok(())
}

impl Model {
    fn apply(&mut self, sender: &mut Sender, operation: Operation) {
        match operation {
            Operation::Join { member } => {
                let member = named(member);
                let full = self.members.len() >= self.config.max_members && !self.members.contains(&member);
                assert_eq!(sender.join(self.now, member).is_err(), full, "{} members", self.members.len());
                if !full {
                    self.members.insert(member);
                }
            }
            Operation::Leave { member } => {
                sender.leave(self.now, named(member));
                self.members.remove(&named(member));
            }
            Operation::Demand { member, start, count } => self.demand(sender, named(member), start, count),
            Operation::Order { start, count } => {
                sender.set_order(vec![FrameRange::new(Gfn::new(start.into()), PageCount::new(count.into()))]);
            }
            Operation::Nack { member, bulk, back, need, shards, far } => {
                let class = if bulk { Class::Bulk } else { Class::Demand };
                let back = if far { u32::from(back) << 24 } else { u32::from(back % 70) };
                let number = self.next_block[class_index(class)].minus(back);
                let missing: ShardSet = shards.into_iter().filter(|shard| *shard < Geometry::MAX_SHARDS).collect();
                let entry = Lack { block: BlockId { class, number }, need: need.max(1), missing };
                let mut datagram = Vec::new();
                // Lists of the wire's own bounds are what members make; the decoder keeps the others out.
                if need <= Geometry::MAX_SHARDS || need == Lack::EVERYTHING {
                    Nack::encode(7, named(member), &[entry; 3], &mut datagram);
                    sender.feedback(self.now, &datagram);
                }
            }
            Operation::Truth { member, lacks, missing } => {
                self.report(sender, named(member), self.next_seq, (0, 0, 0), lacks, missing.into());
            }
            Operation::Report { member, ahead, received, lost, overflow, buffer, echo_us, lacks } => {
                let next_seq = if ahead < 0 {
                    self.next_seq.minus(u32::from(ahead.unsigned_abs()))
                } else {
                    self.next_seq.plus(u32::from(ahead.unsigned_abs()))
                };
                let _unused = (buffer, echo_us);
                self.report(sender, named(member), next_seq, (received, lost, overflow.into()), lacks, buffer);
            }
            Operation::Raw { length, first } => {
                let bytes: Vec<u8> = (0..length).map(|at| first.get(usize::from(at)).copied().unwrap_or(at)).collect();
                sender.feedback(self.now, &bytes);
            }
            Operation::Wait { us } => self.now += Duration::from_micros(us.into()),
            Operation::WaitForTimeout => self.now = sender.next_timeout().unwrap_or(self.now).max(self.now),
            Operation::Poll { count } => {
                for _ in 0..count {
                    if !self.poll(sender) {
                        break;
                    }
                }
            }
        }
    }

    fn report(
        &self,
        sender: &mut Sender,
        member: Member,
        next_seq: Serial,
        (received, lost, overflow): (u32, u32, u32),
        lacks: u8,
        missing: u32,
    ) {
        let chunks = self.config.channel.chunks() as u16;
        let bits = vec![lacks; usize::from(chunks).div_ceil(8)];
        let lacks = (lacks != 1).then_some(LackBits { first: 0, chunks, bits: &bits });
        let report = Report {
            session: 7,
            member,
            leaving: received == 3,
            next_seq,
            received,
            lost,
            overflow,
            buffer: missing.wrapping_mul(64),
            rate_kib: 0,
            echo: if lost == 1 { self.now } else { Duration::ZERO },
            held: Duration::ZERO,
            missing,
            lacks,
        };
        let mut datagram = Vec::new();
        report.encode(&mut datagram);
        sender.feedback(self.now, &datagram);
    }

    fn demand(&mut self, sender: &mut Sender, member: Member, start: u16, count: u8) {
        let range = FrameRange::new(Gfn::new(start.into()), PageCount::new(count.into()));
        let before = sender.stats().clone();
        let known = sender.members().any(|status| status.member == member);
        sender.demand(self.now, member, [range]);
        let stats = sender.stats();
        let refused = stats.demand_refused - before.demand_refused;
        let inside = range.intersection(self.owed.bounds());
        assert_eq!(stats.demanded - before.demanded, range.count().get());
        assert_eq!(refused, if known { (range.count() - inside.count()).get() } else { range.count().get() });
        if known {
            let old = |at: Option<Duration>| at.is_none_or(|at| self.now > at + MEMORY);
            inside.frames().filter(|gfn| old(self.sent_at[gfn.index() as usize])).for_each(|gfn| {
                self.owed.insert(gfn);
            });
        }
    }

    /// Obeys one output; false when there is none.
    fn poll(&mut self, sender: &mut Sender) -> bool {
        let Some(transmit) = sender.poll(self.now, &self.layout) else {
            return false;
        };
        match transmit {
            Transmit::Control { datagram } => self.control(&datagram),
            Transmit::Shards { block, count, kind, shards, first_seq } => {
                assert_eq!(first_seq, self.next_seq, "a gap in the numbers");
                assert!(!shards.is_empty(), "a burst of nothing");
                let datagram = HEAD + usize::from(self.config.channel.payload);
                let bytes = usize::from(shards.len()) * datagram;
                assert!(bytes <= self.config.burst.max(datagram), "a burst of {bytes} bytes");
                self.next_seq = self.next_seq.plus(shards.len().into());
                let map = sender.block(block).expect("what is sent is known");
                assert_eq!(map.shards(self.config.channel.geometry()), u32::from(count));
                let indices: Vec<u8> = shards.iter().collect();
                let geometry = self.config.channel.geometry();
                let length = |index: &u8| match kind {
                    ShardKind::Parity => geometry.payload(),
                    ShardKind::Data | ShardKind::Repair => geometry.shard_span(*index, map.pages()).len(),
                };
                self.bytes += indices.iter().map(|index| (HEAD + length(index)) as u64).sum::<u64>();
                let at = class_index(block.class);
                match kind {
                    ShardKind::Data => {
                        for (frames, content) in map.runs() {
                            frames.frames().for_each(|gfn| {
                                let zero = gfn.index() % 64 < 8;
                                assert_eq!(zero, content == Content::Zero, "page {gfn}");
                                self.sent_at[gfn.index() as usize] = Some(self.now);
                            });
                            self.owed.remove_range(frames);
                        }
                        self.data(at, block.number, count, &indices);
                    }
                    ShardKind::Repair => assert!(indices.iter().all(|index| *index < count)),
                    ShardKind::Parity => {
                        let next = self.rows.entry((at, block.number.get())).or_default();
                        assert_eq!(
                            indices,
                            (*next..*next + shards.len()).collect::<Vec<_>>(),
                            "rows follow each other"
                        );
                        *next += shards.len();
                        assert!(*next <= Geometry::MAX_PARITY);
                    }
                }
            }
        }
        true
    }

    /// Blocks come in order, and so do their shards.
    fn data(&mut self, class: usize, number: Serial, count: u8, indices: &[u8]) {
        let (block, next, of) = self.unsent[class].take().unwrap_or_else(|| {
            let number = self.next_block[class];
            self.next_block[class] = number.next();
            (number, 0, count)
        });
        assert_eq!((number, count, indices.first()), (block, of, Some(&next)));
        let end = next + indices.len() as u8;
        assert_eq!(indices, (next..end).collect::<Vec<_>>());
        self.unsent[class] = (end < count).then_some((number, end, count));
    }

    fn control(&mut self, datagram: &[u8]) {
        self.controls += 1;
        match Datagram::decode(datagram).expect("the sender's own datagrams are sound") {
            Datagram::Pulse(pulse) => {
                assert_eq!(pulse.next_seq, self.next_seq);
                for (class, next) in pulse.next_block.into_iter().enumerate() {
                    let expected = self.unsent[class].map_or(self.next_block[class], |(number, _, _)| number);
                    assert_eq!(next, expected, "all blocks before were sent, and no more");
                }
                assert!(pulse.kind == PulseKind::Heartbeat || pulse.bursting || pulse.endgame);
            }
            Datagram::Confirm(confirm) => {
                for entry in confirm.entries() {
                    let before = entry.block.number.is_before(self.next_block[class_index(entry.block.class)]);
                    assert!(before || entry.answer == Answer::Gone, "{entry:?} confirms what was never sent");
                }
            }
            other => panic!("{other:?} from a sender"),
        }
    }

    fn check(&mut self, sender: &mut Sender) {
        while let Some(SenderEvent::Expelled { member, reason }) = sender.poll_event() {
            assert!(self.members.remove(&member), "{member:?} was expelled ({reason:?}) and is no member");
        }
        assert_eq!(sender.members().count(), sender.members().filter(|s| self.members.contains(&s.member)).count());
        for class in [Class::Demand, Class::Bulk] {
            let number = self.next_block[class_index(class)].minus(self.config.history as u32 + 1);
            assert!(sender.block(BlockId { class, number }).is_none(), "a block beyond the history is kept");
        }
        if let Some(rate) = self.config.max_rate {
            // What a burst may be above, and what may be saved up; at high rates that is a slice of time.
            let slack = 4 * (120 << 10) + rate.get() / 1000 + self.controls * 1500;
            let most = (self.now.as_secs_f64() * rate.get() as f64) as u64 + slack;
            assert!(self.bytes <= most, "{} bytes in {:?} at {rate}", self.bytes, self.now);
        }
        // A member that left by its own report.
        self.members.retain(|member| sender.members().any(|status| status.member == *member));
    }

    /// Lets all members fall silent, and the time pass.
    fn finish(mut self, sender: &mut Sender) {
        let end = self.now + REST;
        let mut steps = 0;
        while self.now < end {
            while self.poll(sender) {
                steps += 1;
                assert!(steps < MAX_STEPS, "no end at {:?}", self.now);
            }
            self.check(sender);
            steps += 1;
            assert!(steps < MAX_STEPS, "no end at {:?}", self.now);
            let Some(due) = sender.next_timeout() else { break };
            self.now = self.now.max(due);
        }
        assert_eq!(sender.members().count(), 0, "silent members stay");
        assert!(self.owed.is_empty(), "{:?} was demanded and never sent", self.owed.runs().collect::<Vec<_>>());
        assert_eq!(self.unsent[class_index(Class::Demand)], None, "blocks of demand are sent to their end");
    }
}

fn named(member: u8) -> Member {
    Member(u64::from(member % 12) + 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_sender_does_what_the_model_allows(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            super::run(&bytes);
        }
    }
}
