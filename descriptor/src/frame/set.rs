use std::fmt;

use bitvec::{BitArr, array::BitArray, order::Lsb0};

use super::{FrameRange, Gfn, PageCount};

/// Frames in a chunk: 16 MiB of guest memory, 512 bytes of bitmap. Small enough that one hostile byte in a file, which can
/// break at most one chunk, buys half a kilobyte of memory; large enough that the table for 1 TiB takes 1 MiB.
const CHUNK: u64 = 4096;

type Bits = BitArr!(for CHUNK as usize, in u64, Lsb0);

/// A set of frames below a fixed limit, its *universe*: presence, avoidance, zero frames.
///
/// It is a bitmap in chunks, where a chunk that holds all of its frames or none takes no bitmap; so the set of all frames of
/// a large guest is as cheap as the empty one. Membership is a table look-up; counting is free.
///
/// ```
/// use descriptor::{FrameRange, FrameSet, Gfn, PageCount};
///
/// let mut present = FrameSet::empty(PageCount::new(1 << 18));
/// present.insert_range(FrameRange::new(Gfn::new(0x100), PageCount::new(512)));
/// assert!(present.contains(Gfn::new(0x101)));
/// assert_eq!(present.count(), PageCount::new(512));
/// assert_eq!(present.runs().count(), 1);
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct FrameSet {
    universe: PageCount,
    count: PageCount,
    chunks: Vec<Chunk>,
}

#[derive(Clone, PartialEq, Eq)]
enum Chunk {
    Empty,
    Full,
    Mixed { count: u16, bits: Box<Bits> },
}

impl FrameSet {
    /// The largest universe: 16 TiB of guest memory, whose chunk table takes 16 MiB.
    pub const MAX_UNIVERSE: PageCount = PageCount::new(1 << 32);

    /// No frames of the `universe` frames from 0 on.
    ///
    /// # Panics
    /// When `universe` is above [`FrameSet::MAX_UNIVERSE`].
    pub fn empty(universe: PageCount) -> Self {
        Self { universe, count: PageCount::ZERO, chunks: vec![Chunk::Empty; chunk_count(universe)] }
    }

    /// All of the `universe` frames from 0 on.
    ///
    /// # Panics
    /// When `universe` is above [`FrameSet::MAX_UNIVERSE`].
    pub fn full(universe: PageCount) -> Self {
        Self { universe, count: universe, chunks: vec![Chunk::Full; chunk_count(universe)] }
    }

    /// The frames of `ranges`, which may overlap.
    ///
    /// # Panics
    /// When a range reaches beyond the universe, or as [`FrameSet::empty`].
    pub fn from_ranges(universe: PageCount, ranges: impl IntoIterator<Item = FrameRange>) -> Self {
        let mut set = Self::empty(universe);
        for range in ranges {
            set.insert_range(range);
        }
        set
    }

    /// The number of frames that could be members; all of them lie below it.
    pub fn universe(&self) -> PageCount {
        self.universe
    }

    /// The range of all frames that could be members.
    pub fn bounds(&self) -> FrameRange {
        FrameRange::new(Gfn::new(0), self.universe)
    }

    /// The number of members.
    pub fn count(&self) -> PageCount {
        self.count
    }

    /// True when there is no member.
    pub fn is_empty(&self) -> bool {
        self.count.is_zero()
    }

    /// True when every frame of the universe is a member.
    pub fn is_full(&self) -> bool {
        self.count == self.universe
    }

    /// True when `gfn` is a member; false beyond the universe.
    pub fn contains(&self, gfn: Gfn) -> bool {
        gfn.index() < self.universe.get() && self.chunks[chunk_of(gfn)].contains(bit_of(gfn))
    }

    /// Makes `gfn` a member; false when it was one already.
    ///
    /// # Panics
    /// When `gfn` is beyond the universe.
    pub fn insert(&mut self, gfn: Gfn) -> bool {
        !self.insert_range(FrameRange::single(gfn)).is_zero()
    }

    /// Takes `gfn` out; false when it was no member.
    ///
    /// # Panics
    /// When `gfn` is beyond the universe.
    pub fn remove(&mut self, gfn: Gfn) -> bool {
        !self.remove_range(FrameRange::single(gfn)).is_zero()
    }

    /// Makes all of `range` members and tells how many were not.
    ///
    /// # Panics
    /// When `range` reaches beyond the universe.
    pub fn insert_range(&mut self, range: FrameRange) -> PageCount {
        let before = self.count;
        self.for_each_chunk(range, |chunk, from, to, capacity| chunk.fill(from, to, capacity, true));
        self.count - before
    }

    /// Takes all of `range` out and tells how many were members.
    ///
    /// # Panics
    /// When `range` reaches beyond the universe.
    pub fn remove_range(&mut self, range: FrameRange) -> PageCount {
        let before = self.count;
        self.for_each_chunk(range, |chunk, from, to, capacity| chunk.fill(from, to, capacity, false));
        before - self.count
    }

    /// Adds the members of `other`.
    ///
    /// # Panics
    /// When the universes differ.
    pub fn union_with(&mut self, other: &FrameSet) {
        self.combine(other, |mine, theirs| mine | theirs);
    }

    /// Takes the members of `other` out.
    ///
    /// # Panics
    /// When the universes differ.
    pub fn subtract(&mut self, other: &FrameSet) {
        self.combine(other, |mine, theirs| mine & !theirs);
    }

    /// Keeps only the members of `other`.
    ///
    /// # Panics
    /// When the universes differ.
    pub fn intersect_with(&mut self, other: &FrameSet) {
        self.combine(other, |mine, theirs| mine & theirs);
    }

    /// The members as maximal runs, in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = FrameRange> + '_ {
        self.runs_in(self.bounds())
    }

    /// The members within `range` as maximal runs, in ascending order.
    pub fn runs_in(&self, range: FrameRange) -> impl Iterator<Item = FrameRange> + '_ {
        self.runs_of(range, true)
    }

    /// The frames within `range` that are no members, as maximal runs in ascending order.
    pub fn gaps_in(&self, range: FrameRange) -> impl Iterator<Item = FrameRange> + '_ {
        self.runs_of(range, false)
    }

    /// The first member at or above `from`.
    pub fn first_member_from(&self, from: Gfn) -> Option<Gfn> {
        self.find(from, self.bounds().end(), true)
    }

    /// The first frame of the universe at or above `from` that is no member.
    pub fn first_gap_from(&self, from: Gfn) -> Option<Gfn> {
        self.find(from, self.bounds().end(), false)
    }

    /// The number of members within `range`.
    pub fn count_in(&self, range: FrameRange) -> PageCount {
        self.runs_in(range).map(FrameRange::count).sum()
    }

    fn runs_of(&self, range: FrameRange, member: bool) -> impl Iterator<Item = FrameRange> + '_ {
        let end = range.intersection(self.bounds()).end();
        let mut from = range.start();
        std::iter::from_fn(move || {
            let start = self.find(from, end, member)?;
            from = self.find(start, end, !member).unwrap_or(end);
            Some(FrameRange::between(start, from))
        })
    }

    /// The first frame from `from` up to `end`, which lies within the universe, that is or is not a member.
    fn find(&self, from: Gfn, end: Gfn, member: bool) -> Option<Gfn> {
        let mut bit = bit_of(from);
        let chunks = end.index().div_ceil(CHUNK) as usize;
        for (index, chunk) in self.chunks.iter().enumerate().take(chunks).skip(chunk_of(from)) {
            if let Some(found) = chunk.find(bit, member) {
                let found = index as u64 * CHUNK + found as u64;
                return (found < end.index()).then(|| Gfn::new(found));
            }
            bit = 0;
        }
        None
    }

    /// Calls `change` with every chunk that `range` touches, the first and one past the last bit within it, and the frames
    /// that the chunk can hold; keeps the total count.
    fn for_each_chunk(&mut self, range: FrameRange, mut change: impl FnMut(&mut Chunk, usize, usize, usize)) {
        assert!(self.bounds().covers(range), "frames {range} lie beyond the universe of {} frames", self.universe);
        let mut rest = range;
        while !rest.is_empty() {
            let from = bit_of(rest.start());
            let (head, tail) = rest.split_at(PageCount::new(CHUNK - from as u64));
            let index = chunk_of(rest.start());
            let capacity = self.capacity(index);
            let chunk = &mut self.chunks[index];
            let before = chunk.count(capacity);
            change(chunk, from, from + head.count().get() as usize, capacity);
            let after = chunk.count(capacity);
            self.count += PageCount::new(after as u64);
            self.count -= PageCount::new(before as u64);
            rest = tail;
        }
    }

    fn combine(&mut self, other: &FrameSet, op: impl Fn(u64, u64) -> u64) {
        assert_eq!(self.universe, other.universe, "sets over different universes");
        let mut count = 0;
        for index in 0..self.chunks.len() {
            let capacity = self.capacity(index);
            let (mine, theirs) = (&mut self.chunks[index], &other.chunks[index]);
            match (&*mine, theirs) {
                (Chunk::Mixed { .. }, _) | (_, Chunk::Mixed { .. }) => {
                    let mut bits = mine.to_bits(capacity);
                    let words = theirs.to_bits(capacity).into_inner();
                    for (word, other) in bits.as_raw_mut_slice().iter_mut().zip(words) {
                        *word = op(*word, other);
                    }
                    *mine = Chunk::from_bits(bits, capacity);
                }
                (mine_uniform, _) => {
                    let all = |chunk: &Chunk| if matches!(chunk, Chunk::Full) { u64::MAX } else { 0 };
                    *mine = if op(all(mine_uniform), all(theirs)) == 0 { Chunk::Empty } else { Chunk::Full };
                }
            }
            count += self.chunks[index].count(capacity) as u64;
        }
        self.count = PageCount::new(count);
    }

    fn capacity(&self, chunk: usize) -> usize {
        (self.universe.get() - chunk as u64 * CHUNK).min(CHUNK) as usize
    }
}

impl Chunk {
    fn contains(&self, bit: usize) -> bool {
        match self {
            Chunk::Empty => false,
            Chunk::Full => true,
            Chunk::Mixed { bits, .. } => bits[bit],
        }
    }

    fn count(&self, capacity: usize) -> usize {
        match self {
            Chunk::Empty => 0,
            Chunk::Full => capacity,
            Chunk::Mixed { count, .. } => usize::from(*count),
        }
    }

    /// The first bit at or above `from` that is `member`; beyond the capacity of a last chunk the answer means nothing.
    fn find(&self, from: usize, member: bool) -> Option<usize> {
        match self {
            Chunk::Empty => (!member).then_some(from),
            Chunk::Full => member.then_some(from),
            Chunk::Mixed { bits, .. } => {
                let tail = &bits[from..];
                let found = if member { tail.first_one() } else { tail.first_zero() };
                found.map(|bit| from + bit)
            }
        }
    }

    fn fill(&mut self, from: usize, to: usize, capacity: usize, value: bool) {
        match (&mut *self, value) {
            (Chunk::Empty, false) | (Chunk::Full, true) => {}
            _ if to - from == capacity => *self = if value { Chunk::Full } else { Chunk::Empty },
            (Chunk::Mixed { count, bits }, _) if to - from == 1 => {
                if bits.replace(from, value) != value {
                    *count = if value { *count + 1 } else { *count - 1 };
                    if *count == 0 || usize::from(*count) == capacity {
                        *self = if value { Chunk::Full } else { Chunk::Empty };
                    }
                }
            }
            _ => {
                let mut bits = self.to_bits(capacity);
                bits[from..to].fill(value);
                *self = Chunk::from_bits(bits, capacity);
            }
        }
    }

    fn to_bits(&self, capacity: usize) -> Bits {
        match self {
            Chunk::Empty => BitArray::ZERO,
            Chunk::Full => {
                let mut bits: Bits = BitArray::ZERO;
                bits[..capacity].fill(true);
                bits
            }
            Chunk::Mixed { bits, .. } => **bits,
        }
    }

    fn from_bits(bits: Bits, capacity: usize) -> Self {
        match bits.count_ones() {
            0 => Chunk::Empty,
            count if count == capacity => Chunk::Full,
            count => Chunk::Mixed { count: count as u16, bits: Box::new(bits) },
        }
    }
}

impl fmt::Debug for FrameSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FrameSet({} of {}: ", self.count, self.universe)?;
        f.debug_list().entries(self.runs().take(16)).finish()?;
        f.write_str(")")
    }
}

fn chunk_count(universe: PageCount) -> usize {
    assert!(universe <= FrameSet::MAX_UNIVERSE, "{universe} frames are more than a frame set can hold");
    universe.get().div_ceil(CHUNK) as usize
}

fn chunk_of(gfn: Gfn) -> usize {
    (gfn.index() / CHUNK) as usize
}

fn bit_of(gfn: Gfn) -> usize {
    (gfn.index() % CHUNK) as usize
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const UNIVERSE: u64 = 3 * CHUNK + 100;

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u64, u64),
        Remove(u64, u64),
        Union(u64, u64),
        Subtract(u64, u64),
        Intersect(u64, u64),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let length = prop_oneof![Just(1), 2..300u64, 3000..2 * CHUNK];
        let range = (0..UNIVERSE, length).prop_map(|(start, length)| (start, length.min(UNIVERSE - start)));
        let op = (0..5, range).prop_map(|(kind, (start, length))| match kind {
            0 | 1 => Op::Insert(start, length),
            2 => Op::Remove(start, length),
            3 => Op::Union(start, length),
            _ if length % 2 == 0 => Op::Subtract(start, length),
            _ => Op::Intersect(start, length),
        });
        proptest::collection::vec(op, 0..40)
    }

    fn range(start: u64, length: u64) -> FrameRange {
        FrameRange::new(Gfn::new(start), PageCount::new(length))
    }

    fn set(start: u64, length: u64) -> FrameSet {
        FrameSet::from_ranges(PageCount::new(UNIVERSE), [range(start, length)])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn behaves_as_a_set_of_numbers(ops in ops(), probe in 0..UNIVERSE) {
            let mut frames = FrameSet::empty(PageCount::new(UNIVERSE));
            let mut model = BTreeSet::new();
            for op in ops {
                match op {
                    Op::Insert(start, length) => {
                        let fresh = (start..start + length).filter(|n| model.insert(*n)).count();
                        prop_assert_eq!(frames.insert_range(range(start, length)).get(), fresh as u64);
                    }
                    Op::Remove(start, length) => {
                        let gone = (start..start + length).filter(|n| model.remove(n)).count();
                        prop_assert_eq!(frames.remove_range(range(start, length)).get(), gone as u64);
                    }
                    Op::Union(start, length) => {
                        frames.union_with(&set(start, length));
                        model.extend(start..start + length);
                    }
                    Op::Subtract(start, length) => {
                        frames.subtract(&set(start, length));
                        model.retain(|n| !(start..start + length).contains(n));
                    }
                    Op::Intersect(start, length) => {
                        frames.intersect_with(&set(start, length));
                        model.retain(|n| (start..start + length).contains(n));
                    }
                }
                prop_assert_eq!(frames.count().get(), model.len() as u64);
            }
            let members: Vec<u64> = frames.runs().flat_map(FrameRange::frames).map(Gfn::index).collect();
            prop_assert_eq!(members, model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(frames.contains(Gfn::new(probe)), model.contains(&probe));
            let first = frames.first_member_from(Gfn::new(probe)).map(Gfn::index);
            prop_assert_eq!(first, model.range(probe..).next().copied());
            let gap = frames.first_gap_from(Gfn::new(probe)).map(Gfn::index);
            prop_assert_eq!(gap, (probe..UNIVERSE).find(|n| !model.contains(n)));
            let rebuilt = FrameSet::from_ranges(frames.universe(), frames.runs());
            prop_assert_eq!(rebuilt, frames);
        }
    }

    #[test]
    fn uniform_sets_take_no_bitmaps() {
        let full = FrameSet::full(FrameSet::MAX_UNIVERSE);
        assert!(full.is_full());
        assert_eq!(full.runs().count(), 1);
        let mut emptied = full.clone();
        emptied.subtract(&full);
        assert_eq!(emptied, FrameSet::empty(FrameSet::MAX_UNIVERSE));
    }

    #[test]
    fn beyond_the_universe_nothing_is_a_member() {
        let full = FrameSet::full(PageCount::new(5));
        assert!(!full.contains(Gfn::new(5)));
        assert_eq!(full.first_gap_from(Gfn::new(0)), None);
        assert_eq!(full.runs_in(range(3, 100)).collect::<Vec<_>>(), [range(3, 2)]);
        assert_eq!(FrameSet::empty(PageCount::ZERO).runs().count(), 0);
    }

    #[test]
    #[should_panic(expected = "beyond the universe of 5 frames")]
    fn insertion_beyond_the_universe_is_a_bug() {
        FrameSet::empty(PageCount::new(5)).insert(Gfn::new(5));
    }
}
