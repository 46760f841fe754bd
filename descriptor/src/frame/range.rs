use std::fmt;

use super::{Gfn, PageCount};

/// A run of consecutive frames, possibly empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FrameRange {
    start: Gfn,
    count: PageCount,
}

impl FrameRange {
    /// `count` frames from `start` on; `None` when the end is above [`Gfn::MAX`].
    pub fn checked(start: Gfn, count: PageCount) -> Option<Self> {
        start.checked_add(count).map(|_| Self { start, count })
    }

    /// `count` frames from `start` on.
    ///
    /// # Panics
    /// When the end is above [`Gfn::MAX`]; use [`FrameRange::checked`] for numbers from outside.
    pub fn new(start: Gfn, count: PageCount) -> Self {
        let _end = start + count;
        Self { start, count }
    }

    /// The single frame `gfn`.
    pub fn single(gfn: Gfn) -> Self {
        Self::new(gfn, PageCount::ONE)
    }

    /// The frames from `start` up to, not including, `end`.
    ///
    /// # Panics
    /// When `end` is below `start`.
    pub fn between(start: Gfn, end: Gfn) -> Self {
        Self { start, count: end - start }
    }

    /// The first frame.
    pub const fn start(self) -> Gfn {
        self.start
    }

    /// The frame after the last.
    pub fn end(self) -> Gfn {
        self.start + self.count
    }

    /// The number of frames.
    pub const fn count(self) -> PageCount {
        self.count
    }

    /// True when the range holds no frame.
    pub const fn is_empty(self) -> bool {
        self.count.is_zero()
    }

    /// True when `gfn` lies in the range.
    pub fn contains(self, gfn: Gfn) -> bool {
        self.start <= gfn && gfn < self.end()
    }

    /// True when every frame of `other` lies in the range; an empty `other` always does.
    pub fn covers(self, other: FrameRange) -> bool {
        other.is_empty() || (self.start <= other.start && other.end() <= self.end())
    }

    /// The frames that both ranges hold.
    pub fn intersection(self, other: FrameRange) -> FrameRange {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        FrameRange { start, count: if end > start { end - start } else { PageCount::ZERO } }
    }

    /// The first `count` frames (or all, when there are fewer) and the rest.
    pub fn split_at(self, count: PageCount) -> (FrameRange, FrameRange) {
        let count = count.min(self.count);
        let rest = FrameRange { start: self.start + count, count: self.count - count };
        (FrameRange { start: self.start, count }, rest)
    }

    /// The range in pieces of at most `count` frames.
    ///
    /// # Panics
    /// When `count` is zero.
    pub fn chunks(self, count: PageCount) -> impl Iterator<Item = FrameRange> {
        assert!(!count.is_zero(), "chunks of no pages");
        let mut rest = self;
        std::iter::from_fn(move || {
            let (head, tail) = rest.split_at(count);
            rest = tail;
            (!head.is_empty()).then_some(head)
        })
    }

    /// Every frame of the range in ascending order.
    pub fn frames(self) -> impl Iterator<Item = Gfn> {
        (self.start.index()..self.end().index()).map(Gfn::new)
    }
}

impl fmt::Display for FrameRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, self.count)
    }
}

impl fmt::Debug for FrameRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FrameRange({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, count: u64) -> FrameRange {
        FrameRange::new(Gfn::new(start), PageCount::new(count))
    }

    #[test]
    fn intersections() {
        assert_eq!(range(0, 10).intersection(range(5, 10)), range(5, 5));
        assert!(range(0, 5).intersection(range(5, 5)).is_empty());
        assert!(range(7, 1).intersection(range(2, 3)).is_empty());
        assert!(range(2, 8).covers(range(2, 8)));
        assert!(!range(2, 8).covers(range(2, 9)));
        assert!(range(2, 8).covers(range(100, 0)));
    }

    #[test]
    fn chunks_partition() {
        let pieces: Vec<_> = range(3, 10).chunks(PageCount::new(4)).collect();
        assert_eq!(pieces, [range(3, 4), range(7, 4), range(11, 2)]);
        assert_eq!(range(3, 0).chunks(PageCount::ONE).count(), 0);
    }

    #[test]
    fn ends_beyond_the_address_space_are_refused() {
        assert_eq!(FrameRange::checked(Gfn::MAX, PageCount::ONE), None);
        assert_eq!(FrameRange::checked(Gfn::new(1), PageCount::new(u64::MAX)), None);
    }
}
