use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use descriptor::fetch::Class;
use descriptor::image::{Content, Layout};
use descriptor::{FrameRange, FrameSet, PageCount};

use super::history::History;
use crate::{BlockMap, Geometry, class_index};

/// The frames that somebody asked for, and those that were multicast a moment ago.
#[derive(Debug)]
pub(super) struct Demand {
    /// What a stopped vCPU waits for.
    urgent: Queue,
    /// What was asked for ahead of need; goes when nothing is urgent.
    patient: Queue,
    sent: Sent,
    /// Room for the pieces of a block, kept between blocks.
    pieces: Vec<(FrameRange, Content)>,
}

/// Frames in the order in which they were asked for.
#[derive(Debug)]
struct Queue {
    /// May still name frames that are no longer queued.
    runs: VecDeque<FrameRange>,
    queued: FrameSet,
}

/// Which block the frames that were sent lately went with. Runs that do not overlap, by their first frame.
#[derive(Debug, Default)]
struct Sent {
    runs: BTreeMap<u64, SentRun>,
    swept: Duration,
}

#[derive(Clone, Copy, Debug)]
struct SentRun {
    end: u64,
    class: Class,
    block: u64,
    at: Duration,
}

/// What became of frames that were asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) queued: u64,
    pub(super) suppressed: u64,
    pub(super) refused: u64,
}

impl Demand {
    /// Runs that are remembered as sent, at most: a window of 50 ms at 1 GB/s in single pages. Beyond, some are sent again.
    const MAX_SENT: usize = 16 << 10;

    /// Pieces that one range may fall into. Requests of a few bytes could keep the sender busy for milliseconds otherwise;
    /// whoever asks for what is scattered like that has the rest by unicast.
    const MAX_PIECES: usize = 256;

    pub(super) fn new(frames: PageCount) -> Self {
        let queue = || Queue { runs: VecDeque::new(), queued: FrameSet::empty(frames) };
        Self { urgent: queue(), patient: queue(), sent: Sent::default(), pieces: Vec::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.urgent.is_empty() && self.patient.is_empty()
    }

    /// Queues the frames of `range` unless they are queued, or went with a block that the asking member, whose first blocks
    /// are `start`, can still make use of: one that is no older than `window`, or whose repair is under way. What is urgent
    /// (`class`) overtakes what is not, itself included.
    pub(super) fn ask(
        &mut self,
        now: Duration,
        (range, class): (FrameRange, Class),
        start: [u64; 2],
        window: Duration,
        histories: &[History; 2],
    ) -> Taken {
        let inside = range.intersection(self.urgent.queued.bounds());
        let mut taken = Taken { refused: (range.count() - inside.count()).get(), ..Taken::default() };
        let mut rest = inside;
        for _ in 0..Self::MAX_PIECES {
            if rest.is_empty() {
                break;
            }
            let (mut piece, mut known) = self.urgent.head(rest);
            if !known && class == Class::Bulk {
                (piece, known) = self.patient.head(piece);
            }
            if !known {
                (piece, known) = self.sent.head(piece, |run| {
                    let entry = histories[class_index(run.class)].get(run.block);
                    let repairing = entry.is_some_and(|entry| entry.pending.is_some());
                    run.block >= start[class_index(run.class)] && (now < run.at + window || repairing)
                });
            }
            let count = piece.count().get();
            let queue = if class == Class::Demand { &mut self.urgent } else { &mut self.patient };
            match known {
                true => taken.suppressed += count,
                false if !queue.push(piece) => break,
                false => {
                    taken.queued += count;
                    if class == Class::Demand {
                        self.patient.queued.remove_range(piece);
                    }
                }
            }
            rest = FrameRange::between(piece.end(), rest.end());
        }
        taken.refused += rest.count().get();
        taken
    }

    /// The next block: what has waited longest of what is most urgent, as far as it fits.
    pub(super) fn next_block(&mut self, layout: &dyn Layout, geometry: Geometry) -> Option<BlockMap> {
        let queue = if self.urgent.is_empty() { &mut self.patient } else { &mut self.urgent };
        let mut left = u64::from(Geometry::MAX_DEMAND_PAGES.min(geometry.pages_per_block()));
        self.pieces.clear();
        while left > 0 && self.pieces.len() < BlockMap::MAX_RUNS {
            let Some((head, content)) = queue.pop(layout, PageCount::new(left)) else { break };
            if content == Content::Stored {
                left -= head.count().get().min(left);
            }
            self.pieces.push((head, content));
        }
        self.pieces.sort_unstable_by_key(|(frames, _)| frames.start());
        let mut map = BlockMap::new();
        for (frames, content) in self.pieces.drain(..) {
            let fits = map.push(frames, content);
            debug_assert!(fits, "as many pieces as runs");
        }
        (!map.is_empty()).then_some(map)
    }

    /// Notes that `map` goes as block number `block`, or is repaired.
    pub(super) fn sent(&mut self, now: Duration, class: Class, block: u64, map: &BlockMap) {
        for (frames, _) in map.runs() {
            self.sent.insert(frames, SentRun { end: frames.end().index(), class, block, at: now });
        }
    }

    /// Forgets what was sent more than `window` ago and is not being repaired.
    pub(super) fn sweep(&mut self, now: Duration, window: Duration, histories: &[History; 2]) {
        if now < self.sent.swept + window && self.sent.runs.len() < Self::MAX_SENT {
            return;
        }
        self.sent.swept = now;
        self.sent.runs.retain(|_, run| {
            let pending = || histories[class_index(run.class)].get(run.block).is_some_and(|e| e.pending.is_some());
            now < run.at + window || pending()
        });
        if self.sent.runs.len() >= Self::MAX_SENT {
            self.sent.runs.clear();
        }
    }
}

impl Queue {
    /// Runs that wait, at most. Whoever asks for more has it by unicast when its deadline passes.
    const MAX_RUNS: usize = 16 << 10;

    fn is_empty(&self) -> bool {
        self.queued.is_empty()
    }

    /// The longest head of `range` that is, or is not, queued, and which of the two.
    fn head(&self, range: FrameRange) -> (FrameRange, bool) {
        let queued = self.queued.contains(range.start());
        let mut gaps = self.queued.gaps_in(range);
        let mut runs = self.queued.runs_in(range);
        let other = if queued { gaps.next() } else { runs.next() };
        let end = other.map_or(range.end(), FrameRange::start);
        (FrameRange::between(range.start(), end), queued)
    }

    /// Queues frames that are not; false when there is no room.
    fn push(&mut self, frames: FrameRange) -> bool {
        if self.is_empty() {
            self.runs.clear();
        }
        if self.runs.len() >= Self::MAX_RUNS {
            return false;
        }
        self.queued.insert_range(frames);
        self.runs.push_back(frames);
        true
    }

    /// Takes out what has waited longest: frames of one kind, at most `limit` stored ones.
    fn pop(&mut self, layout: &dyn Layout, limit: PageCount) -> Option<(FrameRange, Content)> {
        while let Some(run) = self.runs.pop_front() {
            let Some(queued) = self.queued.runs_in(run).next() else { continue };
            let (head, content) = layout.head(queued.split_at(BlockMap::MAX_RUN).0, limit);
            self.queued.remove_range(head);
            let rest = FrameRange::between(head.end(), run.end());
            if !rest.is_empty() {
                self.runs.push_front(rest);
            }
            return Some((head, content));
        }
        None
    }
}

impl Sent {
    fn insert(&mut self, frames: FrameRange, run: SentRun) {
        let (start, end) = (frames.start().index(), frames.end().index());
        if let Some((_, before)) = self.runs.range_mut(..start).next_back()
            && before.end > start
        {
            let tail = *before;
            before.end = start;
            if tail.end > end {
                self.runs.insert(end, tail);
            }
        }
        while let Some((&at, &over)) = self.runs.range(start..end).next() {
            self.runs.remove(&at);
            if over.end > end {
                self.runs.insert(end, over);
            }
        }
        self.runs.insert(start, run);
    }

    /// The longest head of `range` that lies in one run, or between runs, and whether it lies in a run that is `fresh`.
    fn head(&self, range: FrameRange, fresh: impl Fn(&SentRun) -> bool) -> (FrameRange, bool) {
        let (start, end) = (range.start().index(), range.end().index());
        let cut = |at: u64| range.split_at(PageCount::new(at.min(end) - start)).0;
        match self.runs.range(..=start).next_back() {
            Some((_, run)) if run.end > start => (cut(run.end), fresh(run)),
            _ => {
                let next = self.runs.range(start..end).next().map_or(end, |(at, _)| *at);
                (cut(next), false)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use descriptor::Gfn;
    use proptest::prelude::*;

    use super::super::tests::{Solid, range};
    use super::*;

    const WINDOW: Duration = Duration::from_millis(5);

    fn parts() -> (Demand, [History; 2]) {
        (Demand::new(PageCount::new(1000)), [History::new(10, 100), History::new(10, 100)])
    }

    fn frames(map: &BlockMap) -> Vec<FrameRange> {
        map.runs().map(|(frames, _)| frames).collect()
    }

    #[test]
    fn what_is_queued_is_not_queued_again() {
        let (mut demand, histories) = parts();
        let mut ask = |start, count| {
            demand.ask(Duration::ZERO, (range(start, count), Class::Demand), [10, 10], WINDOW, &histories)
        };
        assert_eq!(ask(10, 10), Taken { queued: 10, ..Taken::default() });
        assert_eq!(ask(5, 20), Taken { queued: 10, suppressed: 10, refused: 0 });
        assert_eq!(ask(990, 20), Taken { queued: 10, suppressed: 0, refused: 10 });
        assert_eq!(ask(2000, 20), Taken { refused: 20, ..Taken::default() });
    }

    #[test]
    fn a_block_takes_from_several_requests_in_ascending_order() {
        let (mut demand, histories) = parts();
        for start in [500, 20, 300, 21] {
            demand.ask(Duration::ZERO, (range(start, 1), Class::Demand), [10, 10], WINDOW, &histories);
        }
        demand.ask(Duration::ZERO, (range(600, 40), Class::Demand), [10, 10], WINDOW, &histories);
        let map = demand.next_block(&Solid, Geometry::new(1448)).unwrap();
        assert_eq!(frames(&map), [range(20, 2), range(300, 1), range(500, 1), range(600, 12)]);
        let map = demand.next_block(&Solid, Geometry::new(1448)).unwrap();
        assert_eq!(frames(&map), [range(612, 16)]);
        assert!(demand.next_block(&Solid, Geometry::new(1448)).is_some() && demand.is_empty());
    }

    #[test]
    fn what_was_just_sent_is_not_sent_again_except_to_those_who_were_not_there() {
        let (mut demand, histories) = parts();
        let mut map = BlockMap::new();
        map.push(range(100, 50), Content::Stored);
        demand.sent(Duration::from_millis(10), Class::Bulk, 10, &map);
        let mut ask = |now, start| {
            demand.ask(Duration::from_millis(now), (range(140, 1), Class::Demand), start, WINDOW, &histories)
        };
        assert_eq!(ask(14, [10, 10]).suppressed, 1);
        assert_eq!(ask(14, [10, 11]).queued, 1, "it begins with block 11");
        let mut ask = |now, frame| {
            demand.ask(Duration::from_millis(now), (range(frame, 1), Class::Demand), [10, 10], WINDOW, &histories)
        };
        assert_eq!(ask(15, 141).queued, 1, "the window is over");
    }

    #[test]
    fn what_a_range_costs_is_bounded() {
        let mut demand = Demand::new(PageCount::new(100_000));
        let histories = [History::new(10, 100), History::new(10, 100)];
        let mut ask = |start, count| {
            demand.ask(Duration::ZERO, (range(start, count), Class::Demand), [10, 10], WINDOW, &histories)
        };
        (0..1000).for_each(|at| assert_eq!(ask(2 * at, 1).queued, 1));
        assert_eq!(ask(0, 2000), Taken { queued: 128, suppressed: 128, refused: 1744 });
        (1128..Queue::MAX_RUNS as u64).for_each(|at| assert_eq!(ask(3 * at, 1).queued, 1));
        assert_eq!(ask(90_000, 5000), Taken { refused: 5000, ..Taken::default() }, "it is full");
    }

    #[test]
    fn what_is_urgent_overtakes_what_is_not() {
        let (mut demand, histories) = parts();
        let mut ask = |start, count, class| {
            demand.ask(Duration::ZERO, (range(start, count), class), [10, 10], WINDOW, &histories)
        };
        assert_eq!(ask(0, 100, Class::Bulk).queued, 100);
        assert_eq!(ask(50, 100, Class::Bulk), Taken { queued: 50, suppressed: 50, refused: 0 });
        assert_eq!(ask(40, 2, Class::Demand).queued, 2);
        assert_eq!(ask(40, 3, Class::Bulk).suppressed, 3);
        let blocks = std::iter::from_fn(|| demand.next_block(&Solid, Geometry::new(1448)));
        let blocks: Vec<_> = blocks.map(|map| frames(&map)).collect();
        assert_eq!(
            blocks[..4],
            [vec![range(40, 2)], vec![range(0, 16)], vec![range(16, 16)], vec![range(32, 8), range(42, 8)]]
        );
        let total: u64 = blocks.concat().iter().map(|frames| frames.count().get()).sum();
        assert_eq!((total, demand.is_empty()), (150, true));
    }

    proptest! {
        /// A request is split exactly at the borders of what was sent, whatever overlapped what.
        #[test]
        fn sent_runs_behave_as_a_map(
            runs in prop::collection::vec((0..900_u64, 1..100_u64), 0..40),
            asked in (0..900_u64, 1..100_u64),
        ) {
            let (mut demand, histories) = parts();
            let mut model = BTreeMap::new();
            for (at, (start, count)) in (0..).zip(runs) {
                let mut map = BlockMap::new();
                map.push(range(start, count), Content::Stored);
                demand.sent(Duration::from_millis(at), Class::Demand, 10, &map);
                model.extend((start..start + count).map(|frame| (frame, at)));
            }
            let now = Duration::from_millis(40);
            let asked = range(asked.0, asked.1);
            let fresh = |frame: &Gfn| {
                model.get(&frame.index()).is_some_and(|at| now < Duration::from_millis(*at) + WINDOW * 4)
            };
            let expected = asked.frames().filter(fresh).count() as u64;
            let taken = demand.ask(now, (asked, Class::Demand), [10, 10], WINDOW * 4, &histories);
            prop_assert_eq!(taken.suppressed, expected);
            prop_assert_eq!(taken.queued, asked.count().get() - expected);
        }
    }
}
