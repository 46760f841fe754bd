use std::collections::VecDeque;

use crate::{FrameRange, FrameSet, PageCount};

/// The frames that a clone needed, each once, in the order in which it first did.
#[derive(Clone, Debug)]
pub struct WorkingSet {
    frames: FrameSet,
    order: VecDeque<FrameRange>,
    /// Runs noted, whether they were taken since or not.
    runs: usize,
}

impl WorkingSet {
    /// Runs that are noted: the working set of a guest of some GiB, in at most 256 KiB. What comes after is left to chance.
    pub const MAX_RUNS: usize = 16 << 10;

    /// Nothing of an image of `frames` frames.
    pub fn new(frames: PageCount) -> Self {
        Self { frames: FrameSet::empty(frames), order: VecDeque::new(), runs: 0 }
    }

    /// Notes that `range` is needed; frames beyond the image are ignored.
    pub fn note(&mut self, range: FrameRange) {
        let range = range.intersection(self.frames.bounds());
        let mut from = range.start();
        while from < range.end() && self.runs < Self::MAX_RUNS {
            let rest = FrameRange::between(from, range.end());
            let Some(new) = self.frames.gaps_in(rest).next() else { return };
            self.frames.insert_range(new);
            match self.order.back_mut() {
                Some(last) if last.end() == new.start() => *last = FrameRange::between(last.start(), new.end()),
                _ => {
                    self.order.push_back(new);
                    self.runs += 1;
                }
            }
            from = new.end();
        }
    }

    /// True when it may lack frames, as it takes no more runs.
    pub fn is_full(&self) -> bool {
        self.runs == Self::MAX_RUNS
    }

    /// Every frame that was noted.
    pub fn frames(&self) -> &FrameSet {
        &self.frames
    }

    /// The runs in the order of need, without those that were [taken](WorkingSet::take).
    pub fn order(&self) -> impl ExactSizeIterator<Item = FrameRange> + '_ {
        self.order.iter().copied()
    }

    /// Takes out the first runs, at most `limit`, to be reported. They count as noted still.
    pub fn take(&mut self, limit: usize) -> Vec<FrameRange> {
        let count = limit.min(self.order.len());
        self.order.drain(..count).collect()
    }
}
