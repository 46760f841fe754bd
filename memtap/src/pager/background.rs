//! What nobody waits for: eager frames before the clone runs, pages ahead of streams of faults, the rest.

use std::time::Duration;

use descriptor::fetch::{Class, MAX_RANGES, Tag};
use descriptor::{FrameRange, Gfn, PageCount};

use super::presence::State;
use super::requests::Origin;
use super::{Output, Pager, Phase};

/// Frames of zeros installed in one operation without a fault: 8 MiB, some 200 µs during which no fault is answered.
const MAX_ZERO_RUN: PageCount = PageCount::new(2048);

/// Pages in one bulk request: 2 MiB, so that four requests fill the bulk window and the source is never idle between two.
const BULK_BATCH: u64 = 512;

/// Ranges in one bulk request, so that a look at the requests under way stays short.
const BULK_RANGES: usize = 32;

/// Staging buffers beyond which no more bulk is asked for: 64 MiB of them.
pub(super) const MAX_STAGED: usize = 32;

impl Pager {
    /// What must be there before the clone may run.
    pub(super) fn next_eager(&mut self, now: Duration) -> Option<Output> {
        if self.phase != Phase::Eager {
            return None;
        }
        if self.eager.is_empty() {
            if self.head_start.is_some() {
                return None;
            }
            self.phase = Phase::Running;
            return Some(Output::Ready);
        }
        let room = self.bulk_room();
        let mut asked = Gathered::new(room);
        while let Some(start) = self.eager.first_member_from(self.eager_cursor) {
            let end = self.eager.first_gap_from(start).unwrap_or(self.eager.bounds().end());
            let run = FrameRange::between(start, end);
            if self.presence.state(start) == State::Blank {
                let zeros = self.presence.blank().runs_in(run).map(|run| self.presence.inward(run)).next();
                let zeros = zeros.filter(|run| run.contains(start)).unwrap_or(self.presence.granule_of(start));
                if !asked.ranges.is_empty() {
                    break;
                }
                let range = zeros.split_at(MAX_ZERO_RUN).0;
                self.eager_cursor = range.end();
                return Some(Output::InstallZeros { range });
            }
            // Up to the next granule of zeros.
            let next_blank = self.presence.next_blank(start, self.presence.granule()).map(|blank| blank.start());
            let run = FrameRange::between(start, next_blank.filter(|blank| *blank > start).unwrap_or(end).min(end));
            self.eager_cursor = self.gather(Origin::Demand, run, &mut asked);
            if asked.is_full() {
                break;
            }
        }
        let (tag, ranges) = self.requests.ask(now, Origin::Demand, asked.ranges)?;
        self.stats.demand_requests += 1;
        Some(Output::Request { tag, class: Class::Demand, ranges })
    }

    /// What nobody waits for.
    pub(super) fn next_background(&mut self, now: Duration) -> Option<Output> {
        let bulk = self.next_bulk(now);
        if let Some((tag, ranges)) = bulk {
            self.stats.bulk_requests += 1;
            return Some(Output::Request { tag, class: Class::Bulk, ranges });
        }
        if self.phase != Phase::Running {
            return None;
        }
        if let Some(cursor) = self.zero_sweep
            && let Some(range) = self.presence.next_blank(cursor, MAX_ZERO_RUN)
        {
            self.zero_sweep = Some(range.end());
            return Some(Output::InstallZeros { range });
        }
        let there = self.presence.cold().is_empty() && (!self.needs_zeros || self.presence.blank().is_empty());
        (there && self.waiting.is_empty()).then(|| {
            self.phase = Phase::Complete;
            Output::Complete
        })
    }

    fn next_bulk(&mut self, now: Duration) -> Option<(Tag, Vec<FrameRange>)> {
        // Also when all staging buffers are taken: what comes again completes one of them.
        let room = self.requests.bulk_room();
        if room == 0 {
            return None;
        }
        if let Some(again) = self.requests.next_again(now, room.min(BULK_BATCH), !self.pushed) {
            return Some(again);
        }
        let room = self.bulk_room();
        if room == 0 {
            return None;
        }
        let mut asked = Gathered::new(room);
        while !asked.is_full()
            && let Some(run) = self.ahead.pop_front()
        {
            let end = self.gather(Origin::Prefetch, run, &mut asked);
            let rest = FrameRange::between(end, run.end());
            if !rest.is_empty() {
                self.ahead.push_front(rest);
            }
        }
        if !asked.ranges.is_empty() {
            return self.requests.ask(now, Origin::Prefetch, asked.ranges);
        }
        while self.has_course() {
            let origin = self.course_origin();
            let mut asked = match origin {
                // A guest is about to need it.
                Origin::Order => Gathered { most: MAX_RANGES, ..Gathered::new(room) },
                _ => Gathered::new(room.min(self.pace.allowed(now))),
            };
            while !asked.is_full()
                && self.course_origin() == origin
                && let Some(run) = self.course.rest()
            {
                let end = self.gather(origin, run, &mut asked);
                self.course.advance(end);
            }
            if asked.is_full() || !asked.ranges.is_empty() {
                if origin != Origin::Order {
                    self.pace.spend(asked.pages());
                }
                return self.requests.ask(now, origin, asked.ranges);
            }
        }
        None
    }

    /// True when there is something to be asked for that no fault has shown to be needed.
    pub(super) fn has_course(&mut self) -> bool {
        self.course.rest().is_some()
            && match self.course_origin() {
                // A push begins with the same pages.
                Origin::Order => !self.pushed,
                Origin::Hydrate => self.phase != Phase::Eager && !self.pushed,
                Origin::Prefetch | Origin::Demand => self.phase != Phase::Eager,
            }
    }

    fn course_origin(&self) -> Origin {
        match (self.course.is_told(), self.course.is_in_order()) {
            (true, _) => Origin::Order,
            (false, true) => Origin::Prefetch,
            (false, false) => Origin::Hydrate,
        }
    }

    pub(super) fn bulk_room(&self) -> u64 {
        if self.staging.len() < MAX_STAGED { self.requests.bulk_room() } else { 0 }
    }

    /// Adds to `asked` what is worth asking for in `run`; tells up to where it came.
    fn gather(&mut self, origin: Origin, run: FrameRange, asked: &mut Gathered) -> Gfn {
        let mut rest = run;
        while let Some(piece) = self.first_unasked(rest) {
            if asked.is_full() {
                return piece.start();
            }
            let piece = asked.add(piece);
            self.requests.claim(origin, piece);
            rest = FrameRange::between(piece.end(), run.end());
        }
        run.end()
    }

    fn first_unasked(&self, run: FrameRange) -> Option<FrameRange> {
        let missing = self.presence.cold().runs_in(run).flat_map(|cold| self.staging.missing(cold));
        missing.flat_map(|missing| self.requests.unasked_bulk(missing)).next()
    }
}

/// The ranges of a bulk request in the making.
struct Gathered {
    ranges: Vec<FrameRange>,
    room: u64,
    /// Ranges that it may have.
    most: usize,
}

impl Gathered {
    fn new(room: u64) -> Self {
        Self { ranges: Vec::new(), room: room.min(BULK_BATCH), most: BULK_RANGES }
    }

    fn is_full(&self) -> bool {
        self.room == 0 || self.ranges.len() == self.most
    }

    fn pages(&self) -> PageCount {
        self.ranges.iter().map(|range| range.count()).sum()
    }

    /// Adds as much of `range` as there is room for, and tells how much that is.
    fn add(&mut self, range: FrameRange) -> FrameRange {
        let (range, _) = range.split_at(PageCount::new(self.room));
        self.room -= range.count().get();
        self.ranges.push(range);
        range
    }
}
