use std::collections::VecDeque;
use std::time::Duration;

use descriptor::fetch::Class;

use super::Shards;
use super::history::{Entry, History, Repaired};
use super::shards::Work;
use crate::wire::{Answer, Confirmation, Lack, ShardKind};
use crate::{BlockId, Geometry, Serial, ShardSet, class_index};

/// What members ask for again, gathered per block for a moment, confirmed at once, and how it is answered.
///
/// One row of parity repairs another loss at each member, so that what a block costs is the greatest need, not the sum.
#[derive(Debug)]
pub(super) struct Repairs {
    /// Blocks by the time their repair is due, demand then bulk.
    due: [VecDeque<(Duration, u64)>; 2],
    /// Answers to be confirmed.
    confirms: VecDeque<(Class, u64)>,
    gone: VecDeque<(Class, u64)>,
    /// Shards of blocks that were lost as a whole which may still be sent again.
    whole: f64,
    /// Parts of a row owed for the losses of the repairs themselves.
    owed: f64,
    /// The last time that a repair was asked for or sent.
    active: Duration,
}

/// What is asked for of one block and not yet on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pending {
    /// The greatest need.
    need: u8,
    /// The greatest share of what is missing at someone that it needs, in 255ths: below 255 where it has parity.
    share: u8,
    /// All that is missing at someone.
    missing: ShardSet,
    /// Someone does not say what is missing.
    unknown: bool,
    /// The group is so large that others will ask for it too.
    crowd: bool,
    /// What was promised so far.
    promised: Option<Plan>,
    /// Its confirmation waits in the queue.
    queued: bool,
}

/// How a block is repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    Parity(u8),
    Originals(ShardSet),
}

/// What became of an entry of a NACK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Noted {
    /// It added so many shards to what is asked for.
    Needed(u8),
    /// A repair on its way answers it.
    Late,
    /// The block can not be repaired, which is going to be confirmed.
    Gone,
    /// There is no such block, or no such shard of it.
    Nonsense,
}

/// The times that repairs depend on.
#[derive(Clone, Copy, Debug)]
pub(super) struct RepairTiming {
    /// How long NACKs for a block are gathered.
    pub(super) gather: Duration,
    /// How long a repair may take to reach everybody: a NACK that comes sooner does not know of it.
    pub(super) flight: Duration,
    /// The group is a [crowd](Repairs::CROWD).
    pub(super) crowd: bool,
}

impl Repairs {
    /// Members of a group beyond which a loss is hardly ever one member's alone. A row of parity then serves all that lack
    /// something of the block, an original only those that lack this very one.
    pub(super) const CROWD: usize = 16;

    /// Repairs of a block by originals, demand then bulk; those by parity end with the rows. At 30 % of losses one in 15,000
    /// shards is lost in eight of them; those of demand are gathered for a shorter time.
    const ROUNDS: [u8; 2] = [32, 8];

    /// Blocks whose refusal waits to be confirmed, at most; whoever misses it asks again.
    const MAX_GONE: usize = 256;

    /// Shards of wholly lost blocks that may be sent again at once: ten blocks, what a hiccup of a millisecond or two costs.
    /// Whoever lost more was away, and the next pass or the end game is cheaper than holding up all others.
    const WHOLE: f64 = 2000.0;

    /// What a datagram sent adds to that.
    const WHOLE_SHARE: f64 = 1.0 / 16.0;

    /// Blocks so small are always sent again as a whole.
    const SMALL: u8 = 16;

    pub(super) fn new() -> Self {
        Self {
            due: [VecDeque::new(), VecDeque::new()],
            confirms: VecDeque::new(),
            gone: VecDeque::new(),
            whole: Self::WHOLE,
            owed: 0.0,
            active: Duration::ZERO,
        }
    }

    /// Notes that `datagrams` with shards were sent.
    pub(super) fn sent(&mut self, datagrams: u8) {
        self.whole = (self.whole + f64::from(datagrams) * Self::WHOLE_SHARE).min(Self::WHOLE);
    }

    /// The last time that a repair was asked for or sent; `now` while one is waited for.
    pub(super) fn active(&self, now: Duration) -> Duration {
        if self.due.iter().all(VecDeque::is_empty) { self.active } else { now }
    }

    /// True when there is something to confirm.
    pub(super) fn has_confirms(&self) -> bool {
        !self.confirms.is_empty() || !self.gone.is_empty()
    }

    /// Takes in an entry of a NACK; `budget` is how much its member may add.
    pub(super) fn note(
        &mut self,
        now: Duration,
        history: &mut History,
        (number, lack): (u64, &Lack),
        timing: RepairTiming,
        budget: u8,
    ) -> Option<Noted> {
        let class = lack.block.class;
        if number >= history.next() {
            return Some(Noted::Nonsense);
        }
        let entry = match history.get_mut(number) {
            Some(entry) if entry.rounds < Self::ROUNDS[class_index(class)] => entry,
            _ => return Some(self.refuse(class, number)),
        };
        let Some((need, missing)) = wanted(now, entry, lack, timing.flight) else {
            return Some(if lack_is_nonsense(entry, lack) { Noted::Nonsense } else { Noted::Late });
        };
        let whole = lack.need == Lack::EVERYTHING && entry.count > Self::SMALL;
        let known = entry.pending.unwrap_or_default();
        let added = need.saturating_sub(known.need);
        if added > budget {
            return None;
        }
        if whole && added > 0 {
            if self.whole < added.into() {
                return Some(self.refuse(class, number));
            }
            self.whole -= f64::from(added);
        }
        self.active = now;
        if entry.pending.is_none() {
            self.due[class_index(class)].push_back((now + timing.gather, number));
        }
        let pending = entry.pending.get_or_insert_default();
        pending.need = pending.need.max(need);
        let share = (u32::from(need) * 255).div_ceil(u32::from(missing.len().max(1)));
        pending.share = pending.share.max(share.min(255) as u8);
        pending.missing = pending.missing.union(missing);
        pending.unknown |= missing.is_empty();
        pending.crowd = timing.crowd;
        let plan = plan(class, entry.count, entry.rows, pending);
        if !pending.queued && !pending.promised.is_some_and(|promised| promised.covers(plan)) {
            pending.queued = true;
            self.confirms.push_back((class, number));
        }
        Some(Noted::Needed(added))
    }

    /// The next confirmations, at most `most`.
    pub(super) fn confirmations(&mut self, histories: &mut [History; 2], most: usize) -> Vec<Confirmation> {
        let mut out = Vec::new();
        while out.len() < most {
            let Some((class, number)) = self.confirms.pop_front() else { break };
            let entry = histories[class_index(class)].get_mut(number);
            let Some((entry, mut pending)) = entry.and_then(|entry| entry.pending.map(|pending| (entry, pending)))
            else {
                continue;
            };
            let plan = plan(class, entry.count, entry.rows, &pending);
            (pending.promised, pending.queued) = (Some(plan), false);
            entry.pending = Some(pending);
            let answer = match plan {
                Plan::Parity(rows) => Answer::Parity(rows),
                Plan::Originals(shards) => Answer::Originals(shards),
            };
            out.push(Confirmation { block: id(class, number), answer });
        }
        while out.len() < most {
            let Some((class, number)) = self.gone.pop_front() else { break };
            out.push(Confirmation { block: id(class, number), answer: Answer::Gone });
        }
        out
    }

    /// When the next repair of a class is due.
    pub(super) fn due(&self, class: Class) -> Option<Duration> {
        self.due[class_index(class)].front().map(|(due, _)| *due)
    }

    /// The next repair of a class that is due. `loss` is what the repairs themselves are expected to lose.
    pub(super) fn next(&mut self, now: Duration, class: Class, history: &mut History, loss: f64) -> Option<Work> {
        let queue = &mut self.due[class_index(class)];
        while let Some((_, number)) = queue.pop_front_if(|(due, _)| *due <= now) {
            let Some(entry) = history.get_mut(number) else { continue };
            let Some(pending) = entry.pending.take() else { continue };
            self.active = now;
            let (kind, shards) = match plan(class, entry.count, entry.rows, &pending) {
                Plan::Originals(shards) => {
                    entry.rounds += 1;
                    entry.last = Repaired { at: now, rows: 0, originals: shards };
                    (ShardKind::Repair, Shards::Set(shards))
                }
                Plan::Parity(rows) => {
                    self.owed += f64::from(rows) * (1.0 / (1.0 - loss.clamp(0.0, 0.5)) - 1.0);
                    let rows = (rows + self.owed as u8).min(Geometry::MAX_PARITY - entry.rows);
                    self.owed = self.owed.fract();
                    let from = entry.rows;
                    entry.rows += rows;
                    entry.last = Repaired { at: now, rows, originals: ShardSet::EMPTY };
                    (ShardKind::Parity, Shards::Range(from..from + rows))
                }
            };
            return Some(Work { block: number, kind, shards });
        }
        None
    }

    /// Notes when the last shard of a repair went.
    pub(super) fn finished(&mut self, now: Duration, entry: &mut Entry) {
        self.active = now;
        entry.last.at = now;
    }

    fn refuse(&mut self, class: Class, number: u64) -> Noted {
        if self.gone.len() < Self::MAX_GONE && !self.gone.contains(&(class, number)) {
            self.gone.push_back((class, number));
        }
        Noted::Gone
    }
}

impl Plan {
    /// True when whoever waits for `self` need not hear of `other`.
    fn covers(self, other: Plan) -> bool {
        match (self, other) {
            (Plan::Parity(promised), Plan::Parity(rows)) => rows <= promised,
            (Plan::Originals(promised), Plan::Originals(shards)) => shards.is_subset(promised),
            _ => false,
        }
    }
}

/// What a NACK asks for beyond what is on its way; `None` when that is nothing.
fn wanted(now: Duration, entry: &Entry, lack: &Lack, flight: Duration) -> Option<(u8, ShardSet)> {
    let all = ShardSet::first(entry.count);
    let everything = lack.need == Lack::EVERYTHING;
    let mut missing = if everything { all } else { lack.missing.intersection(all) };
    let mut need = lack.need.min(entry.count);
    if missing.is_empty() && !lack.missing.is_empty() {
        return None;
    }
    let known = !missing.is_empty();
    if known {
        need = need.min(missing.len());
    }
    let last = &entry.last;
    if now < last.at + flight && (last.rows > 0 || !last.originals.is_empty()) {
        let coming = last.rows + missing.intersection(last.originals).len();
        need = need.saturating_sub(coming);
        missing = missing.without(last.originals);
    }
    (need > 0 && (!known || !missing.is_empty())).then_some((need, missing))
}

/// True when a NACK names none but shards that the block does not have.
fn lack_is_nonsense(entry: &Entry, lack: &Lack) -> bool {
    lack.need != Lack::EVERYTHING
        && !lack.missing.is_empty()
        && lack.missing.intersection(ShardSet::first(entry.count)).is_empty()
}

/// Originals for demand, where a block is small and somebody waits, and for few losses of a small group; else parity, as long
/// as there are rows.
fn plan(class: Class, count: u8, rows: u8, pending: &Pending) -> Plan {
    let few = u32::from(pending.missing.len()) * 4 <= u32::from(pending.need) * 5;
    if class == Class::Demand || few && !pending.unknown && !pending.crowd {
        let all = ShardSet::first(count);
        return Plan::Originals(if pending.unknown { all } else { pending.missing });
    }
    let left = Geometry::MAX_PARITY - rows;
    // Rows that do not suffice are still worth more than originals of which each member lacks only some.
    if left >= pending.need || left >= Geometry::MAX_PARITY / 4 {
        return Plan::Parity(pending.need.min(left));
    }
    let missing = if pending.unknown { ShardSet::first(count) } else { pending.missing };
    // Whoever needs some of what it lacks gets them with as large a part of all that is lacking, and a tenth for bad luck.
    let share = if pending.unknown { 255 } else { u32::from(pending.share) };
    let part = (u32::from(missing.len()) * share * 11).div_ceil(255 * 10) + 1;
    Plan::Originals(spread(missing, part.min(192) as u8))
}

/// `count` of the shards, evenly spread, or all of them if there are not as many.
fn spread(shards: ShardSet, count: u8) -> ShardSet {
    let (length, count) = (u32::from(shards.len()), u32::from(count));
    let chosen = |at: u32| count >= length || at * count / length != (at + 1) * count / length;
    (0..).zip(shards.iter()).filter(|(at, _)| chosen(*at)).map(|(_, shard)| shard).collect()
}

fn id(class: Class, number: u64) -> BlockId {
    BlockId { class, number: Serial::new(number as u32) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::BlockMap;

    const TIMING: RepairTiming =
        RepairTiming { gather: Duration::from_millis(1), flight: Duration::from_millis(2), crowd: false };

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn parts() -> (Repairs, History) {
        let mut history = History::new(5, 4);
        (0..4).for_each(|_| {
            history.push(BlockMap::new(), 190);
        });
        (Repairs::new(), history)
    }

    fn lack(class: Class, number: u64, need: u8, missing: &[u8]) -> Lack {
        Lack { block: id(class, number), need, missing: missing.iter().copied().collect() }
    }

    fn note(repairs: &mut Repairs, history: &mut History, at: Duration, lack: Lack) -> Option<Noted> {
        let number = lack.block.number.get().into();
        repairs.note(at, history, (number, &lack), TIMING, 255)
    }

    fn confirms(repairs: &mut Repairs, history: &mut History) -> Vec<Answer> {
        let mut histories = [History::new(0, 1), History::new(0, 1)];
        std::mem::swap(&mut histories[1], history);
        let answers = repairs.confirmations(&mut histories, 40).into_iter().map(|entry| entry.answer).collect();
        std::mem::swap(&mut histories[1], history);
        answers
    }

    #[test]
    fn nacks_are_gathered_confirmed_and_answered_by_the_greatest_need() {
        let (mut repairs, mut history) = parts();
        let bulk = |need, missing: &[u8]| lack(Class::Bulk, 6, need, missing);
        assert_eq!(note(&mut repairs, &mut history, ms(0), bulk(2, &[1, 2])), Some(Noted::Needed(2)));
        assert_eq!(confirms(&mut repairs, &mut history), [Answer::Originals([1, 2].into_iter().collect())]);
        assert_eq!(note(&mut repairs, &mut history, ms(0), bulk(3, &[10, 11, 12])), Some(Noted::Needed(1)));
        assert_eq!(note(&mut repairs, &mut history, ms(0), bulk(2, &[20, 21])), Some(Noted::Needed(0)));
        assert_eq!(confirms(&mut repairs, &mut history), [Answer::Parity(3)]);
        assert_eq!(note(&mut repairs, &mut history, ms(0), bulk(3, &[40, 41, 42])), Some(Noted::Needed(0)));
        assert_eq!(confirms(&mut repairs, &mut history), [], "it was promised");
        assert_eq!(repairs.next(Duration::from_micros(999), Class::Bulk, &mut history, 0.0), None);
        let repair = repairs.next(ms(1), Class::Bulk, &mut history, 0.0).unwrap();
        assert_eq!(repair, Work { block: 6, kind: ShardKind::Parity, shards: Shards::Range(0..3) });
        assert_eq!(note(&mut repairs, &mut history, ms(2), bulk(3, &[40, 41, 42])), Some(Noted::Late));
        assert_eq!(note(&mut repairs, &mut history, ms(2), bulk(4, &[50, 51, 52, 53])), Some(Noted::Needed(1)));
        assert_eq!(note(&mut repairs, &mut history, ms(3), bulk(2, &[40, 41])), Some(Noted::Needed(1)));
        let repair = repairs.next(ms(4), Class::Bulk, &mut history, 0.0).unwrap();
        assert_eq!(repair.shards, Shards::Range(3..5), "other rows than before");
    }

    #[test]
    fn demand_is_repaired_by_originals() {
        let (mut repairs, mut history) = parts();
        note(&mut repairs, &mut history, ms(0), lack(Class::Demand, 8, 1, &[3]));
        note(&mut repairs, &mut history, ms(0), lack(Class::Demand, 8, 1, &[9]));
        let repair = repairs.next(ms(1), Class::Demand, &mut history, 0.0).unwrap();
        assert_eq!(
            repair,
            Work { block: 8, kind: ShardKind::Repair, shards: Shards::Set([3, 9].into_iter().collect()) }
        );
        assert_eq!(note(&mut repairs, &mut history, ms(1), lack(Class::Demand, 8, 1, &[3])), Some(Noted::Late));
        assert_eq!(note(&mut repairs, &mut history, ms(1), lack(Class::Demand, 8, 2, &[3, 4])), Some(Noted::Needed(1)));
    }

    #[test]
    fn when_the_rows_are_used_up_originals_come() {
        let (mut repairs, mut history) = parts();
        let many: Vec<u8> = (0..100).collect();
        let mut kinds = Vec::new();
        for at in (0..60).step_by(10) {
            note(&mut repairs, &mut history, ms(at), lack(Class::Bulk, 7, 20, &many));
            let repair = repairs.next(ms(at + 1), Class::Bulk, &mut history, 0.0).unwrap();
            kinds.push((repair.kind, repair.shards.len()));
        }
        // As large a part of all that is lacking as of what this one lacks.
        let (parity, originals) = ((ShardKind::Parity, 20), (ShardKind::Repair, 23));
        assert_eq!(kinds, [parity, parity, parity, originals, originals, originals]);
    }

    #[test]
    fn what_is_gone_or_was_repaired_too_often_is_refused() {
        let (mut repairs, mut history) = parts();
        assert_eq!(note(&mut repairs, &mut history, ms(0), lack(Class::Bulk, 4, 1, &[])), Some(Noted::Gone));
        assert_eq!(note(&mut repairs, &mut history, ms(0), lack(Class::Bulk, 4, 1, &[])), Some(Noted::Gone));
        assert_eq!(confirms(&mut repairs, &mut history), [Answer::Gone]);
        assert_eq!(note(&mut repairs, &mut history, ms(0), lack(Class::Bulk, 9, 1, &[])), Some(Noted::Nonsense));
        assert_eq!(note(&mut repairs, &mut history, ms(0), lack(Class::Bulk, 6, 1, &[191])), Some(Noted::Nonsense));
        for at in 0..8 {
            let noted = note(&mut repairs, &mut history, ms(at * 10), lack(Class::Bulk, 5, 1, &[7]));
            assert_eq!(noted, Some(Noted::Needed(1)));
            assert!(repairs.next(ms(at * 10 + 1), Class::Bulk, &mut history, 0.0).is_some());
        }
        assert_eq!(note(&mut repairs, &mut history, ms(100), lack(Class::Bulk, 5, 1, &[7])), Some(Noted::Gone));
    }

    #[test]
    fn wholly_lost_blocks_are_sent_again_within_bounds() {
        let (mut repairs, _) = parts();
        let mut history = History::new(0, 100);
        (0..100).for_each(|_| {
            history.push(BlockMap::new(), 190);
        });
        let everything = |number| lack(Class::Bulk, number, Lack::EVERYTHING, &[]);
        let noted: Vec<_> = (0..20).map(|at| note(&mut repairs, &mut history, ms(0), everything(at))).collect();
        assert_eq!(noted.iter().filter(|noted| **noted == Some(Noted::Needed(190))).count(), 10);
        assert_eq!(noted[19], Some(Noted::Gone));
        (0..100).for_each(|_| repairs.sent(190));
        assert_eq!(note(&mut repairs, &mut history, ms(0), everything(30)), Some(Noted::Needed(190)));
        let repair = repairs.next(ms(1), Class::Bulk, &mut history, 0.0).unwrap();
        assert_eq!(repair.shards, Shards::Set(ShardSet::first(190)));
    }

    #[test]
    fn lossy_paths_get_more_parity() {
        let (mut repairs, mut history) = parts();
        let many: Vec<u8> = (0..100).collect();
        note(&mut repairs, &mut history, ms(0), lack(Class::Bulk, 6, 20, &many));
        let repair = repairs.next(ms(1), Class::Bulk, &mut history, 0.2).unwrap();
        assert_eq!(repair.shards.len(), 25);
    }

    proptest! {
        /// Whatever is asked for, each repair gets the greatest asker on, no row goes twice, and every block's repairs are
        /// bounded.
        #[test]
        fn repairs_suffice_and_end(
            asks in prop::collection::vec(
                (0..4_u64, 1..=190_u8, prop::collection::vec(0..190_u8, 0..30), 0..10_u64), 1..120),
        ) {
            let (mut repairs, mut history) = parts();
            let mut rows = std::collections::BTreeMap::<u64, u8>::new();
            let mut rounds = std::collections::BTreeMap::<u64, u32>::new();
            let mut now = ms(100);
            for (block, need, missing, pause) in asks {
                now += ms(pause);
                while let Some(repair) = repairs.next(now, Class::Bulk, &mut history, 0.01) {
                    *rounds.entry(repair.block).or_default() += 1;
                    prop_assert!(!repair.shards.is_empty());
                    if let (ShardKind::Parity, Shards::Range(range)) = (repair.kind, &repair.shards) {
                        let next = rows.entry(repair.block).or_default();
                        prop_assert_eq!(range.start, *next);
                        prop_assert!(range.end <= Geometry::MAX_PARITY);
                        *next = range.end;
                    }
                }
                let lack = lack(Class::Bulk, block + 5, need, &missing);
                let noted = note(&mut repairs, &mut history, now, lack);
                if noted == Some(Noted::Needed(need)) {
                    let entry = history.get(block + 5).unwrap();
                    let pending = entry.pending.unwrap();
                    let enough = match plan(Class::Bulk, entry.count, entry.rows, &pending) {
                        Plan::Parity(rows) => rows >= need.min(15),
                        Plan::Originals(shards) => shards.len() >= need.min(pending.missing.len()),
                    };
                    prop_assert!(enough, "{pending:?}");
                }
            }
            let most = u32::from(Repairs::ROUNDS[1]) + u32::from(Geometry::MAX_PARITY);
            prop_assert!(rounds.values().all(|rounds| *rounds <= most));
        }
    }
}
