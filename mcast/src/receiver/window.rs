use std::collections::VecDeque;

use super::block::Block;
use crate::Serial;

/// The blocks of one class, from the oldest that is not finished to the newest. Numbers are without wrap here.
#[derive(Debug)]
pub(super) struct Window {
    base: u64,
    slots: VecDeque<Slot>,
    /// All blocks before are known to have been sent.
    ended: u64,
}

/// Where one block stands.
#[derive(Debug)]
pub(super) enum Slot {
    /// Nothing is expected of it any more.
    Finished,
    /// Nothing of it arrived, and nothing is expected.
    Unseen,
    /// It is being received, or waited for.
    Open(Box<Block>),
}

impl Window {
    /// How far a shard may lead, unless a pulse says so.
    pub(super) const MAX_LEAD: u64 = 65_536;

    /// Blocks from the oldest to the newest, at most: as many as the sender can repair.
    pub(super) const SPAN: u64 = 4096;

    /// How far behind the newest a block may begin to arrive; then it is lost as a whole.
    const LATE: u64 = 32;

    pub(super) fn new(start: Serial) -> Self {
        let start = (1 << 32) + u64::from(start.get());
        Self { base: start, slots: VecDeque::new(), ended: start }
    }

    pub(super) fn extend(&self, number: Serial) -> u64 {
        number.extend(self.next())
    }

    /// The oldest that is not finished.
    pub(super) fn base(&self) -> u64 {
        self.base
    }

    /// One more than the newest.
    pub(super) fn next(&self) -> u64 {
        self.base + self.slots.len() as u64
    }

    pub(super) fn ended(&self) -> u64 {
        self.ended
    }

    /// The slot of a block; what is outside the window is finished.
    pub(super) fn slot(&self, number: u64) -> &Slot {
        let at = number.checked_sub(self.base).and_then(|at| self.slots.get(at as usize));
        at.unwrap_or(&Slot::Finished)
    }

    pub(super) fn block(&mut self, number: u64) -> Option<&mut Block> {
        match self.slots.get_mut(number.checked_sub(self.base)? as usize)? {
            Slot::Open(block) => Some(block),
            _ => None,
        }
    }

    /// The open blocks.
    pub(super) fn open(&self) -> impl Iterator<Item = u64> {
        let open = self.slots.iter().zip(self.base..).filter(|(slot, _)| matches!(slot, Slot::Open(_)));
        open.map(|(_, number)| number)
    }

    /// The open blocks that are not complete, oldest first.
    pub(super) fn incomplete(&mut self) -> impl Iterator<Item = (u64, &mut Block)> {
        self.slots.iter_mut().zip(self.base..).filter_map(|(slot, number)| match slot {
            Slot::Open(block) if !block.is_complete() => Some((number, &mut **block)),
            _ => None,
        })
    }

    /// Makes room for all blocks before `next`.
    pub(super) fn grow(&mut self, next: u64) {
        while self.next() < next {
            self.slots.push_back(Slot::Unseen);
        }
    }

    /// Notes that all blocks before `to` were sent; how many of them are beyond reach.
    pub(super) fn end(&mut self, to: u64) -> u64 {
        let skipped = to.saturating_sub(self.next() + Self::SPAN);
        if skipped > 0 {
            // Whoever skips has no open blocks left.
            self.base = self.next() + skipped;
            self.slots.clear();
        }
        self.grow(to);
        self.ended = self.ended.max(to);
        skipped
    }

    pub(super) fn put(&mut self, number: u64, block: Block) {
        if let Some(slot) = number.checked_sub(self.base).and_then(|at| self.slots.get_mut(at as usize)) {
            *slot = Slot::Open(Box::new(block));
        }
    }

    /// Forgets a block for good.
    pub(super) fn finish(&mut self, number: u64) {
        if let Some(slot) = number.checked_sub(self.base).and_then(|at| self.slots.get_mut(at as usize)) {
            *slot = Slot::Finished;
        }
        self.shift();
    }

    /// Gives up waiting for blocks of which nothing came for long; how many these are.
    pub(super) fn settle(&mut self) -> u64 {
        let mut missed = 0;
        while let Some(Slot::Unseen) = self.slots.front()
            && self.base + Self::LATE < self.ended
        {
            self.slots.pop_front();
            self.base += 1;
            missed += 1;
            self.shift();
        }
        missed
    }

    pub(super) fn is_long(&self) -> bool {
        self.slots.len() as u64 > Self::SPAN
    }

    fn shift(&mut self) {
        while let Some(Slot::Finished) = self.slots.front() {
            self.slots.pop_front();
            self.base += 1;
        }
    }
}
