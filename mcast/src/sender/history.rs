use std::collections::VecDeque;
use std::time::Duration;

use super::repair::Pending;
use crate::{BlockMap, ShardSet};

/// The recent blocks of one class, by their numbers without wrap.
#[derive(Debug)]
pub(super) struct History {
    blocks: VecDeque<Entry>,
    oldest: u64,
    limit: usize,
}

/// A block that can be repaired. The image does not change, so its map is all that has to be kept.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) map: BlockMap,
    /// Source shards.
    pub(super) count: u8,
    /// Rows of parity sent or promised so far; the next repair goes on behind them.
    pub(super) rows: u8,
    /// Repairs by originals so far.
    pub(super) rounds: u8,
    /// The last of them.
    pub(super) last: Repaired,
    /// What is asked for and not yet on its way.
    pub(super) pending: Option<Pending>,
}

/// What the last repair of a block consisted of.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Repaired {
    pub(super) at: Duration,
    pub(super) rows: u8,
    pub(super) originals: ShardSet,
}

impl History {
    pub(super) fn new(next: u64, limit: usize) -> Self {
        Self { blocks: VecDeque::new(), oldest: next, limit: limit.max(1) }
    }

    /// The number of the next block.
    pub(super) fn next(&self) -> u64 {
        self.oldest + self.blocks.len() as u64
    }

    /// The oldest that can be repaired.
    pub(super) fn oldest(&self) -> u64 {
        self.oldest
    }

    /// Adds a block and tells its number.
    pub(super) fn push(&mut self, map: BlockMap, count: u8) -> u64 {
        if self.blocks.len() == self.limit {
            self.blocks.pop_front();
            self.oldest += 1;
        }
        let number = self.next();
        let last = Repaired::default();
        self.blocks.push_back(Entry { map, count, rows: 0, rounds: 0, last, pending: None });
        number
    }

    pub(super) fn get(&self, number: u64) -> Option<&Entry> {
        self.blocks.get(usize::try_from(number.checked_sub(self.oldest)?).ok()?)
    }

    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut Entry> {
        self.blocks.get_mut(usize::try_from(number.checked_sub(self.oldest)?).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_make_room() {
        let mut history = History::new(u64::from(u32::MAX), 3);
        let numbers: Vec<_> = (0..5).map(|count| history.push(BlockMap::new(), count)).collect();
        assert_eq!(numbers, (0..5).map(|at| u64::from(u32::MAX) + at).collect::<Vec<_>>());
        assert_eq!((history.oldest(), history.next()), (numbers[2], numbers[4] + 1));
        assert!(history.get(numbers[1]).is_none() && history.get(numbers[4] + 1).is_none());
        assert_eq!(history.get(numbers[3]).unwrap().count, 3);
    }
}
