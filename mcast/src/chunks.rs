use descriptor::PageCount;

/// A set of chunks of an image, the coarse unit in which receivers report what they lack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChunkSet {
    bits: Vec<u8>,
    count: u32,
}

/// What a receiver lacks and wants to be pushed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lacks {
    /// The chunks with at least one such page.
    pub chunks: ChunkSet,
    /// The pages.
    pub pages: PageCount,
}

impl ChunkSet {
    /// Chunks of an image, at most: their bits make 1 KiB, so that a report fits into one datagram.
    pub const MAX: u16 = 8192;

    /// A set for the chunks below `count`, of which it has none.
    ///
    /// # Panics
    /// When there are more than [`ChunkSet::MAX`].
    pub fn new(count: u32) -> Self {
        assert!(count <= Self::MAX.into(), "{count} chunks");
        Self { bits: vec![0; count.div_ceil(8) as usize], count }
    }

    /// All of the chunks below `count`.
    pub fn full(count: u32) -> Self {
        let mut set = Self::new(count);
        (0..count).for_each(|chunk| set.insert(chunk));
        set
    }

    /// The set that the wire's bits mean, the first of which stands for chunk `first`; chunks at and beyond `count` are ignored.
    pub fn from_bits(count: u32, first: u32, chunks: u16, bits: &[u8]) -> Self {
        let mut set = Self::new(count);
        for at in (0..u32::from(chunks)).filter(|at| is_set(bits, *at)) {
            if let Some(chunk) = first.checked_add(at) {
                set.insert(chunk);
            }
        }
        set
    }

    /// The number that all chunks lie below.
    pub fn universe(&self) -> u32 {
        self.count
    }

    /// Adds a chunk; one at or beyond the universe is ignored.
    pub fn insert(&mut self, chunk: u32) {
        if chunk < self.count {
            self.bits[chunk as usize / 8] |= 1 << (chunk % 8);
        }
    }

    /// Takes a chunk out.
    pub fn remove(&mut self, chunk: u32) {
        if chunk < self.count {
            self.bits[chunk as usize / 8] &= !(1 << (chunk % 8));
        }
    }

    /// True when the chunk is in the set.
    pub fn contains(&self, chunk: u32) -> bool {
        chunk < self.count && is_set(&self.bits, chunk)
    }

    /// Adds the chunks of `other`.
    pub fn unite(&mut self, other: &ChunkSet) {
        if self.count == other.count {
            self.bits.iter_mut().zip(&other.bits).for_each(|(byte, more)| *byte |= more);
        } else {
            other.iter().for_each(|chunk| self.insert(chunk));
        }
    }

    /// The number of chunks in the set.
    pub fn len(&self) -> u32 {
        self.bits.iter().map(|byte| byte.count_ones()).sum()
    }

    /// True for no chunk.
    pub fn is_empty(&self) -> bool {
        self.bits.iter().all(|byte| *byte == 0)
    }

    /// The chunks in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        let bytes = self.bits.iter().zip(0_u32..).filter(|(byte, _)| **byte != 0);
        bytes.flat_map(|(byte, at)| (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| at * 8 + bit))
    }

    /// The set as it is on the wire, a bit for each chunk of the universe, the lowest first.
    pub fn bits(&self) -> &[u8] {
        &self.bits
    }
}

fn is_set(bits: &[u8], at: u32) -> bool {
    bits.get(at as usize / 8).is_some_and(|byte| byte >> (at % 8) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn behaves_like_a_set(count in 1..300_u32, a: Vec<u16>, b: Vec<u16>) {
            let model = |chunks: &[u16]| chunks.iter().map(|c| u32::from(*c) % count).collect::<BTreeSet<_>>();
            let set = |model: &BTreeSet<u32>| {
                let mut set = ChunkSet::new(count);
                model.iter().for_each(|chunk| set.insert(*chunk));
                set
            };
            let (a, b) = (model(&a), model(&b));
            let mut both = set(&a);
            prop_assert_eq!(both.iter().collect::<BTreeSet<_>>(), a.clone());
            prop_assert_eq!(ChunkSet::from_bits(count, 0, count as u16, both.bits()), both.clone());
            both.unite(&set(&b));
            prop_assert_eq!(&both, &set(&(&a | &b)));
            prop_assert_eq!(both.len() as usize, (&a | &b).len());
            b.iter().for_each(|chunk| both.remove(*chunk));
            prop_assert_eq!(&both, &set(&(&a - &b)));
            prop_assert_eq!(both.is_empty(), a.is_subset(&b));
        }
    }

    #[test]
    fn bits_beyond_the_image_are_ignored() {
        let set = ChunkSet::from_bits(10, 8, 8192, &[0xff; 1024]);
        assert_eq!(set.iter().collect::<Vec<_>>(), [8, 9]);
        assert!(ChunkSet::from_bits(10, u32::MAX, 8, &[0xff]).is_empty());
        assert!(!set.contains(10) && !set.contains(u32::MAX));
    }
}
