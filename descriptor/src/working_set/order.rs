use std::collections::BTreeMap;

use crate::{FrameRange, FrameSet, Gfn, PageCount};

/// Frames that are sorted among themselves where an order goes to a clone: 2 MiB, which arrive within milliseconds of each other,
/// so that what is next to each other in memory can be one range.
const WINDOW: u64 = 512;

/// What clones of an image have in common, in the order in which it is best fetched ahead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    entries: Vec<FrameRange>,
    frames: FrameSet,
}

impl Order {
    /// One entry in so many is left out of a clone's order to see whether the clone needs it: it costs 3 % of the faults that
    /// the order saves, and asks about each entry once in some thirty clones.
    pub const PROBES: u64 = 32;

    /// `entries`, disjoint and not empty, of an image of `universe` frames.
    pub(super) fn new(universe: PageCount, entries: Vec<FrameRange>) -> Self {
        Self { frames: FrameSet::from_ranges(universe, entries.iter().copied()), entries }
    }

    /// Nothing of an image of `universe` frames.
    pub fn empty(universe: PageCount) -> Self {
        Self::new(universe, Vec::new())
    }

    /// True when nothing is known.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All frames of it.
    pub fn frames(&self) -> &FrameSet {
        &self.frames
    }

    /// All of it as runs, for those of whom nothing is to be learnt.
    pub fn runs(&self) -> Vec<FrameRange> {
        joined(self.entries.iter().copied())
    }

    /// What the clone with this seed is told: runs in their order, without its probes.
    pub fn for_clone(&self, seed: u64) -> Vec<FrameRange> {
        joined(self.entries.iter().copied().filter(|entry| !is_probe(seed, entry.start())))
    }

    /// True when the clone with this seed, which was told this order, would say if it needed `entry`.
    pub(super) fn asks(&self, seed: u64, entry: FrameRange) -> bool {
        is_probe(seed, entry.start()) || self.frames.runs_in(entry).next().is_none()
    }
}

/// `entries` as runs, joined where they are neighbours within a window of the order.
fn joined(entries: impl Iterator<Item = FrameRange>) -> Vec<FrameRange> {
    let mut runs = Vec::new();
    let mut window = BTreeMap::new();
    let mut frames = 0;
    for entry in entries {
        frames += entry.count().get();
        window.insert(entry.start(), entry);
        if frames >= WINDOW {
            flush(&mut window, &mut runs);
            frames = 0;
        }
    }
    flush(&mut window, &mut runs);
    runs
}

fn flush(window: &mut BTreeMap<Gfn, FrameRange>, runs: &mut Vec<FrameRange>) {
    let first = runs.len();
    for (_, entry) in std::mem::take(window) {
        match runs.get_mut(first..).and_then(<[FrameRange]>::last_mut) {
            Some(last) if last.end() == entry.start() => *last = FrameRange::between(last.start(), entry.end()),
            _ => runs.push(entry),
        }
    }
}

/// Whether the entry from `start` on is a probe for the clone with this seed (the finalizer of splitmix64 as a hash).
fn is_probe(seed: u64, start: Gfn) -> bool {
    let mut hash = seed ^ start.index().wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (hash ^ (hash >> 31)).is_multiple_of(Order::PROBES)
}
