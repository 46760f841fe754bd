//! Takes apart what the kernel has coalesced.

/// Datagrams of one size that arrived as one message; the last may be shorter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segments {
    /// Where the next one begins.
    next: usize,
    end: usize,
    size: usize,
    fresh: bool,
}

impl Segments {
    /// The datagrams in a message of `length` bytes, each of `size` bytes where it is coalesced.
    pub(super) fn new(length: usize, size: Option<u16>) -> Self {
        let size = size.map_or(length, usize::from).max(1);
        Self { next: 0, end: length, size, fresh: true }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.next >= self.end && !self.fresh
    }
}

impl Iterator for Segments {
    type Item = std::ops::Range<usize>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_empty() {
            return None;
        }
        // A message of no bytes is one datagram of none.
        self.fresh = false;
        let start = self.next;
        self.next = self.end.min(start + self.size);
        Some(start..self.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_cut_at_the_size_that_the_kernel_tells() {
        let cut = |length, size| Segments::new(length, size).map(|range| (range.start, range.end)).collect::<Vec<_>>();
        assert_eq!(cut(10, None), [(0, 10)]);
        assert_eq!(cut(10, Some(10)), [(0, 10)]);
        assert_eq!(cut(10, Some(4)), [(0, 4), (4, 8), (8, 10)]);
        assert_eq!(cut(8, Some(4)), [(0, 4), (4, 8)]);
        assert_eq!(cut(3, Some(4)), [(0, 3)]);
        assert_eq!(cut(0, None), [(0, 0)]);
        assert_eq!(cut(0, Some(4)), [(0, 0)]);
    }
}
