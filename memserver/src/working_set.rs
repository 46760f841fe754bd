//! What clones of an image have waited for, in the order in which they first did: clones that come later will want it first.

use descriptor::{FrameRange, FrameSet, PageCount};

/// Runs that are kept: the working set of a guest of some GiB, in at most 256 KiB. What comes after is left to chance.
const MAX_RUNS: usize = 16 << 10;

/// The frames that somebody waited for, each once.
#[derive(Debug)]
pub(crate) struct WorkingSet {
    frames: FrameSet,
    order: Vec<FrameRange>,
}

impl WorkingSet {
    /// Nothing of an image of `frames` frames.
    pub(crate) fn new(frames: PageCount) -> Self {
        Self { frames: FrameSet::empty(frames), order: Vec::new() }
    }

    /// Notes that somebody waits for `range`, which lies in the image.
    pub(crate) fn note(&mut self, range: FrameRange) {
        let mut from = range.start();
        while from < range.end() && self.order.len() < MAX_RUNS {
            let rest = FrameRange::between(from, range.end());
            let Some(new) = self.frames.gaps_in(rest).next() else { return };
            self.frames.insert_range(new);
            match self.order.last_mut() {
                Some(last) if last.end() == new.start() => *last = FrameRange::between(last.start(), new.end()),
                _ => self.order.push(new),
            }
            from = new.end();
        }
    }

    /// The frames in their order.
    pub(crate) fn order(&self) -> Vec<FrameRange> {
        self.order.clone()
    }
}

#[cfg(test)]
mod tests {
    use descriptor::Gfn;

    use super::*;

    fn range(start: u64, count: u64) -> FrameRange {
        FrameRange::new(Gfn::new(start), PageCount::new(count))
    }

    #[test]
    fn frames_are_kept_once_in_the_order_of_their_first_use() {
        let mut set = WorkingSet::new(PageCount::new(100));
        for wanted in [range(50, 2), range(52, 3), range(10, 1), range(48, 10), range(10, 1)] {
            set.note(wanted);
        }
        assert_eq!(set.order(), [range(50, 5), range(10, 1), range(48, 2), range(55, 3)]);
    }

    #[test]
    fn the_runs_are_bounded() {
        let mut set = WorkingSet::new(PageCount::new(1 << 20));
        (0..40_000).for_each(|frame| set.note(range(frame * 3, 1)));
        assert_eq!(set.order().len(), MAX_RUNS);
    }
}
