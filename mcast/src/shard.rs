use std::fmt;

use crate::Geometry;

/// A shard of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Shard {
    /// A piece of the block's stream, by its index.
    Source(u8),
    /// A row of parity, by its index.
    Parity(u8),
}

/// A set of the source shards of one block.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct ShardSet([u64; 3]);

impl ShardSet {
    /// No shard.
    pub const EMPTY: ShardSet = ShardSet([0; 3]);

    /// Bytes of a set on the wire: a bit for each possible shard, the lowest first.
    pub const LENGTH: usize = Geometry::MAX_SHARDS as usize / 8;

    /// The shards below `count`.
    ///
    /// # Panics
    /// When `count` is above [`Geometry::MAX_SHARDS`].
    pub fn first(count: u8) -> Self {
        assert!(count <= Geometry::MAX_SHARDS, "the first {count} shards of a block");
        Self(std::array::from_fn(|word| match count.saturating_sub(word as u8 * 64) {
            64.. => u64::MAX,
            rest => (1 << rest) - 1,
        }))
    }

    /// Adds a shard; true when it is new.
    ///
    /// # Panics
    /// When `index` is not below [`Geometry::MAX_SHARDS`].
    pub fn insert(&mut self, index: u8) -> bool {
        let (word, bit) = place(index);
        let new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        new
    }

    /// Takes a shard out; true when it was there.
    ///
    /// # Panics
    /// When `index` is not below [`Geometry::MAX_SHARDS`].
    pub fn remove(&mut self, index: u8) -> bool {
        let (word, bit) = place(index);
        let there = self.0[word] & bit != 0;
        self.0[word] &= !bit;
        there
    }

    /// True when the shard is in the set.
    pub fn contains(&self, index: u8) -> bool {
        index < Geometry::MAX_SHARDS && self.0[usize::from(index) / 64] & (1 << (index % 64)) != 0
    }

    /// The number of shards.
    pub fn len(&self) -> u8 {
        self.0.iter().map(|word| word.count_ones() as u8).sum()
    }

    /// True for no shard.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; 3]
    }

    /// The highest shard.
    pub fn last(&self) -> Option<u8> {
        (0..3_u8).rev().find(|word| self.0[usize::from(*word)] != 0).map(|word| {
            let top = 63 - self.0[usize::from(word)].leading_zeros() as u8;
            word * 64 + top
        })
    }

    /// The shards in either set.
    #[must_use]
    pub fn union(self, other: ShardSet) -> ShardSet {
        ShardSet(std::array::from_fn(|word| self.0[word] | other.0[word]))
    }

    /// The shards in both sets.
    #[must_use]
    pub fn intersection(self, other: ShardSet) -> ShardSet {
        ShardSet(std::array::from_fn(|word| self.0[word] & other.0[word]))
    }

    /// The shards that are not in `other`.
    #[must_use]
    pub fn without(self, other: ShardSet) -> ShardSet {
        ShardSet(std::array::from_fn(|word| self.0[word] & !other.0[word]))
    }

    /// True when every shard is in `other` too.
    pub fn is_subset(self, other: ShardSet) -> bool {
        self.without(other).is_empty()
    }

    /// The shards in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u8> + use<> {
        let words = self.0;
        (0..3_u8).flat_map(move |word| {
            let mut rest = words[usize::from(word)];
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros() as u8)?;
                rest &= rest - 1;
                Some(word * 64 + bit)
            })
        })
    }

    /// The set as it is on the wire.
    pub fn to_bytes(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        for (piece, word) in bytes.chunks_exact_mut(8).zip(self.0) {
            piece.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The set that `bytes` mean; every value is one.
    pub fn from_bytes(bytes: [u8; Self::LENGTH]) -> Self {
        Self(std::array::from_fn(|word| u64::from_le_bytes(std::array::from_fn(|at| bytes[word * 8 + at]))))
    }
}

impl FromIterator<u8> for ShardSet {
    fn from_iter<I: IntoIterator<Item = u8>>(shards: I) -> Self {
        let mut set = Self::EMPTY;
        shards.into_iter().for_each(|index| {
            set.insert(index);
        });
        set
    }
}

impl fmt::Debug for ShardSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

fn place(index: u8) -> (usize, u64) {
    assert!(index < Geometry::MAX_SHARDS, "shard {index} of a block");
    (usize::from(index) / 64, 1 << (index % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn behaves_like_a_set(a: Vec<u8>, b: Vec<u8>) {
            let model = |shards: &[u8]| shards.iter().map(|s| s % 192).collect::<BTreeSet<_>>();
            let (a, b) = (model(&a), model(&b));
            let set = |model: &BTreeSet<u8>| model.iter().copied().collect::<ShardSet>();
            let (sa, sb) = (set(&a), set(&b));
            prop_assert_eq!(sa.iter().collect::<BTreeSet<_>>(), a.clone());
            prop_assert_eq!(usize::from(sa.len()), a.len());
            prop_assert_eq!(sa.last(), a.last().copied());
            prop_assert_eq!(sa.union(sb), set(&(&a | &b)));
            prop_assert_eq!(sa.intersection(sb), set(&(&a & &b)));
            prop_assert_eq!(sa.without(sb), set(&(&a - &b)));
            prop_assert_eq!(sa.is_subset(sb), a.is_subset(&b));
            prop_assert_eq!(ShardSet::from_bytes(sa.to_bytes()), sa);
            prop_assert!((0..=255).all(|s| sa.contains(s) == a.contains(&s)));
        }
    }

    #[test]
    fn insert_and_remove_tell_what_changed() {
        let mut set = ShardSet::first(3);
        assert!(!set.insert(2) && set.insert(191) && set.remove(0) && !set.remove(0));
        assert_eq!(set.iter().collect::<Vec<_>>(), [1, 2, 191]);
    }
}
