//! Which frames the clone has, and which of the others need no fetch.

use descriptor::memory::MemoryMap;
use descriptor::{FrameRange, FrameSet, Gfn, PageCount};

/// Every frame of the memory map is either *cold* (its bytes must be fetched), *blank* (it reads as zeros and needs no
/// fetch) or present. A granule with both cold and blank frames counts as cold until all of it is installed.
#[derive(Debug)]
pub(super) struct Presence {
    memory: FrameSet,
    cold: FrameSet,
    blank: FrameSet,
    discarded: FrameSet,
    granule: u64,
}

/// What a granule is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Not in the memory map.
    Outside,
    /// Some of its bytes must be fetched.
    Cold,
    /// It reads as zeros.
    Blank,
    /// The clone has it.
    Present,
    /// The clone had it and gave it up once; whether the host took it away before or after it was last installed is unknown.
    Doubtful,
}

impl Presence {
    /// Frames of `zero` or `free` are blank, those of `present` are present, the others of `map` cold.
    pub(super) fn new(
        map: &MemoryMap,
        granule: PageCount,
        zero: &FrameSet,
        free: &FrameSet,
        present: &FrameSet,
    ) -> Self {
        let memory = map.present();
        let mut blank = zero.clone();
        blank.union_with(free);
        blank.intersect_with(&memory);
        blank.subtract(present);
        let mut cold = memory.clone();
        cold.subtract(&blank);
        cold.subtract(present);
        Self { discarded: FrameSet::empty(memory.universe()), memory, cold, blank, granule: granule.get() }
    }

    pub(super) fn memory(&self) -> &FrameSet {
        &self.memory
    }

    pub(super) fn cold(&self) -> &FrameSet {
        &self.cold
    }

    pub(super) fn blank(&self) -> &FrameSet {
        &self.blank
    }

    pub(super) fn granule(&self) -> PageCount {
        PageCount::new(self.granule)
    }

    /// The granule that holds `gfn`.
    pub(super) fn granule_of(&self, gfn: Gfn) -> FrameRange {
        FrameRange::new(Gfn::new(gfn.index() & !(self.granule - 1)), self.granule())
    }

    /// The whole granules that `range` lies in.
    pub(super) fn outward(&self, range: FrameRange) -> FrameRange {
        if range.is_empty() {
            return range;
        }
        let last = range.end().index() - 1;
        FrameRange::between(self.granule_of(range.start()).start(), self.granule_of(Gfn::new(last)).end())
    }

    /// The whole granules within `range`.
    pub(super) fn inward(&self, range: FrameRange) -> FrameRange {
        let start = range.start().index().next_multiple_of(self.granule);
        let end = range.end().index() & !(self.granule - 1);
        if start >= end {
            return FrameRange::new(range.start(), PageCount::ZERO);
        }
        FrameRange::between(Gfn::new(start), Gfn::new(end))
    }

    /// The first `count` frames of `range`, as far as they make whole granules, and the rest.
    pub(super) fn inward_count(&self, range: FrameRange, count: PageCount) -> (FrameRange, FrameRange) {
        let count = count.min(range.count()).get();
        range.split_at(PageCount::new(count - count % self.granule))
    }

    /// What the granule of `gfn` is.
    pub(super) fn state(&self, gfn: Gfn) -> State {
        if !self.memory.contains(gfn) {
            return State::Outside;
        }
        let granule = self.granule_of(gfn);
        if self.cold.contains(gfn) || self.cold.runs_in(granule).next().is_some() {
            State::Cold
        } else if self.blank.contains(gfn) {
            State::Blank
        } else if self.discarded.contains(gfn) {
            State::Doubtful
        } else {
            State::Present
        }
    }

    /// The blank granules around that of `gfn`, at most the aligned block of `around` frames. Frames that the guest gave up
    /// are given back one granule at a time: it may not want the others, and they may cost host memory.
    pub(super) fn blank_around(&self, gfn: Gfn, around: PageCount) -> FrameRange {
        let granule = self.granule_of(gfn);
        if self.discarded.contains(gfn) || around.get() <= self.granule {
            return granule;
        }
        let size = around.get();
        let block = FrameRange::new(Gfn::new(gfn.index() / size * size), around).intersection(self.blank.bounds());
        let fits = |run: &FrameRange| run.covers(granule);
        let run = self.blank.runs_in(block).map(|run| self.inward(run)).find(fits).unwrap_or(granule);
        self.discarded.gaps_in(run).map(|run| self.inward(run)).find(fits).unwrap_or(granule)
    }

    /// The first blank granules at or above `from`, at most `limit` frames.
    pub(super) fn next_blank(&self, from: Gfn, limit: PageCount) -> Option<FrameRange> {
        let mut from = from;
        loop {
            let start = self.blank.first_member_from(from)?;
            let end = self.blank.first_gap_from(start).unwrap_or(self.blank.bounds().end());
            let run = self.inward(FrameRange::between(start, end));
            if !run.is_empty() {
                return Some(run.split_at(limit.max(self.granule())).0);
            }
            from = end;
        }
    }

    /// Notes that the clone has all of `range`.
    pub(super) fn installed(&mut self, range: FrameRange) {
        let range = range.intersection(self.cold.bounds());
        self.cold.remove_range(range);
        self.blank.remove_range(range);
    }

    /// Notes that what the image holds in `range` is not needed any more, and tells which of its frames were cold.
    pub(super) fn forgo(&mut self, range: FrameRange) -> Vec<FrameRange> {
        let runs: Vec<FrameRange> = self.cold.runs_in(range.intersection(self.cold.bounds())).collect();
        for run in &runs {
            self.cold.remove_range(*run);
            self.blank.insert_range(*run);
        }
        runs
    }

    /// Notes that the guest gave `range` up, and tells which whole granules of it now read as zeros. Part of a granule cannot
    /// be given up: the host has no way to take it.
    pub(super) fn discard(&mut self, range: FrameRange) -> Vec<FrameRange> {
        let range = self.inward(range.intersection(self.memory.bounds()));
        let runs: Vec<FrameRange> = self.memory.runs_in(range).collect();
        for run in &runs {
            self.cold.remove_range(*run);
            self.blank.insert_range(*run);
            self.discarded.insert_range(*run);
        }
        runs
    }
}
