use std::ops::Range;

use crate::ShardSet;
use crate::wire::ShardKind;

/// Shards of one block, in ascending order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shards {
    /// Those that follow each other, or rows of parity.
    Range(Range<u8>),
    /// Some.
    Set(ShardSet),
}

/// Shards of one block that are still to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Work {
    pub(super) block: u64,
    pub(super) kind: ShardKind,
    pub(super) shards: Shards,
}

impl Shards {
    /// How many they are.
    pub fn len(&self) -> u8 {
        match self {
            Shards::Range(range) => range.end.saturating_sub(range.start),
            Shards::Set(set) => set.len(),
        }
    }

    /// True for none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their indices, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u8> {
        let (range, set) = match self {
            Shards::Range(range) => (range.clone(), ShardSet::EMPTY),
            Shards::Set(set) => (0..0, *set),
        };
        range.chain(set.iter())
    }

    /// The highest index.
    pub(super) fn last(&self) -> Option<u8> {
        match self {
            Shards::Range(range) => range.end.checked_sub(1).filter(|last| range.contains(last)),
            Shards::Set(set) => set.last(),
        }
    }

    /// Takes the first `count` out.
    pub(super) fn take(&mut self, count: u8) -> Shards {
        match self {
            Shards::Range(range) => {
                let middle = range.end.min(range.start.saturating_add(count));
                Shards::Range(std::mem::replace(&mut range.start, middle)..middle)
            }
            Shards::Set(set) => {
                let head: ShardSet = set.iter().take(count.into()).collect();
                *set = set.without(head);
                Shards::Set(head)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taking_leaves_the_rest() {
        for mut shards in [Shards::Range(3..9), Shards::Set((3..9).collect())] {
            assert_eq!(shards.take(4).iter().collect::<Vec<_>>(), [3, 4, 5, 6]);
            assert_eq!((shards.len(), shards.iter().collect::<Vec<_>>()), (2, vec![7, 8]));
            assert_eq!(shards.last(), Some(8));
            assert_eq!(shards.take(200).len(), 2);
            assert!(shards.is_empty() && shards.take(1).is_empty() && shards.last().is_none());
        }
    }
}
