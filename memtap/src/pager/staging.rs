//! Granules whose pages arrive one by one.
//!
//! Huge pages are installed whole, but one answer carries at most half of one. The shell keeps a buffer for each granule that
//! began to arrive; here stands which frames are in those buffers.

use std::collections::{BTreeSet, VecDeque};

use descriptor::{FrameRange, FrameSet, Gfn, PageCount};

#[derive(Debug)]
pub(super) struct Staging {
    granule: PageCount,
    frames: FrameSet,
    granules: BTreeSet<Gfn>,
    complete: VecDeque<Gfn>,
    dropped: VecDeque<Gfn>,
}

impl Staging {
    pub(super) fn new(universe: PageCount, granule: PageCount) -> Self {
        let (complete, dropped) = (VecDeque::new(), VecDeque::new());
        Self { granule, frames: FrameSet::empty(universe), granules: BTreeSet::new(), complete, dropped }
    }

    /// The number of granules that have a buffer.
    pub(super) fn len(&self) -> usize {
        self.granules.len()
    }

    /// The parts of `range` that are in no buffer.
    pub(super) fn missing(&self, range: FrameRange) -> impl Iterator<Item = FrameRange> + '_ {
        self.frames.gaps_in(range)
    }

    /// Notes that `range`, of the granule from `granule` on, is in its buffer.
    pub(super) fn add(&mut self, granule: Gfn, range: FrameRange) {
        self.granules.insert(granule);
        self.frames.insert_range(range.intersection(self.frames.bounds()));
    }

    /// Notes that the buffer of the granule holds all that it needs.
    pub(super) fn complete(&mut self, granule: Gfn) {
        if !self.complete.contains(&granule) {
            self.complete.push_back(granule);
        }
    }

    /// Forgets the granules in `range` that were installed, and their buffers with them.
    pub(super) fn installed(&mut self, range: FrameRange) {
        while let Some(granule) = self.first_in(range) {
            self.forget(granule);
        }
    }

    /// Gives up the granules in `range`; their buffers are to be thrown away.
    pub(super) fn discard(&mut self, range: FrameRange) {
        while let Some(granule) = self.first_in(range) {
            self.forget(granule);
            self.dropped.push_back(granule);
        }
    }

    /// True when a granule in `range` has a buffer.
    pub(super) fn any_in(&self, range: FrameRange) -> bool {
        self.first_in(range).is_some()
    }

    /// The granules in `range` that have a buffer.
    pub(super) fn in_range(&self, range: FrameRange) -> impl Iterator<Item = Gfn> + '_ {
        self.granules.range(range.start()..range.end()).copied()
    }

    /// The next granule to install from its buffer.
    pub(super) fn next_complete(&mut self) -> Option<FrameRange> {
        self.complete.pop_front().map(|granule| FrameRange::new(granule, self.granule))
    }

    /// The next granule whose buffer is to be thrown away.
    pub(super) fn next_dropped(&mut self) -> Option<FrameRange> {
        self.dropped.pop_front().map(|granule| FrameRange::new(granule, self.granule))
    }

    fn first_in(&self, range: FrameRange) -> Option<Gfn> {
        self.in_range(range).next()
    }

    fn forget(&mut self, granule: Gfn) {
        self.granules.remove(&granule);
        self.frames.remove_range(FrameRange::new(granule, self.granule));
        self.complete.retain(|complete| *complete != granule);
    }
}
