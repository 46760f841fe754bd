use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Order;
use crate::{FrameRange, FrameSet, Gfn, ImageId, PageCount};

/// The working sets of an image's clones in one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    image: ImageId,
    frames: PageCount,
    /// Clones that told anything, whether they told everything or not.
    heard: u64,
    witnesses: u64,
    /// Disjoint, in the order of need.
    entries: Vec<Entry>,
}

/// Neighbouring frames that are needed together or not at all, and how many clones needed them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The frames, all within one block of [`Entry::BLOCK`].
    pub range: FrameRange,
    /// Clones that needed some of them, at least one.
    pub needed: u8,
    /// Clones that would have said so, at least as many; at most [`Entry::MAX_ASKED`].
    pub asked: u8,
}

/// What one clone said so far.
#[derive(Clone, Debug)]
pub struct Witness {
    touched: FrameSet,
    /// The order that it was told and followed, and the seed by which its probes were drawn.
    followed: Option<(Arc<Order>, u64)>,
    /// What it needed last.
    last: Option<Gfn>,
}

/// What is known, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Clones that told something of what they needed.
    #[serde(default)]
    pub heard: u64,
    /// Clones whose whole record was taken.
    pub clones: u64,
    /// Entries, whether they are common or not.
    pub entries: u64,
    /// Frames in them.
    pub frames: u64,
    /// Frames that the next clone is told to fetch ahead.
    pub common: u64,
}

/// Parts that make no merged working set.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MergedError {
    /// More frames than an image can have.
    #[error("an image of {0} frames is larger than any")]
    Universe(PageCount),
    /// More entries than are kept.
    #[error("there are more than {max} entries", max = Merged::MAX_ENTRIES)]
    TooMany,
    /// More clones that told everything than clones that told anything.
    #[error("{whole} clones told everything, but only {heard} told anything")]
    Clones {
        /// Clones that told anything.
        heard: u64,
        /// Clones that told everything.
        whole: u64,
    },
    /// An entry that lies outside of the image, is empty, or crosses the bounds of a block.
    #[error("frames {0} are no entry: empty, beyond the image, or of two blocks of 16 frames")]
    Range(FrameRange),
    /// An entry some of whose frames are in another.
    #[error("frames {0} are in two entries")]
    Twice(FrameRange),
    /// Counts that cannot be.
    #[error("frames {range} were needed by {needed} clones of {asked}")]
    Counts {
        /// The frames.
        range: FrameRange,
        /// Clones that needed them.
        needed: u8,
        /// Clones that were asked.
        asked: u8,
    },
}

impl Entry {
    /// Frames in a block: 64 KiB. Larger blocks would fetch more that is not needed, smaller ones take more room and learn more
    /// slowly, as fewer frames speak for each other.
    pub const BLOCK: u64 = 16;

    /// Answers that count: about those of the last so many clones that were asked.
    pub const MAX_ASKED: u8 = 16;

    /// True when the next clone is to fetch it ahead: a quarter of the clones need it, and not a single one by chance, unless
    /// no other could have said that it does not.
    pub fn is_common(&self) -> bool {
        self.needed * 4 >= self.asked && (self.needed >= 2 || self.asked == 1)
    }

    /// True when three quarters of the clones need it, or all that could be asked.
    fn is_most_common(&self) -> bool {
        self.needed * 4 >= self.asked * 3
    }

    /// True when it is not worth the room any more.
    fn is_forgotten(&self) -> bool {
        self.needed * 8 < self.asked
    }

    fn answer(&mut self, needed: bool) {
        self.needed += u8::from(needed);
        self.asked += 1;
        if self.asked > Self::MAX_ASKED {
            (self.needed, self.asked) = (self.needed.div_ceil(2), self.asked.div_ceil(2));
        }
    }
}

impl Witness {
    /// A clone of an image of `frames` frames that is told `order`, whose probes are drawn by `seed`.
    pub fn new(frames: PageCount, order: Arc<Order>, seed: u64) -> Self {
        let followed = (!order.is_empty()).then_some((order, seed));
        Self { touched: FrameSet::empty(frames), followed, last: None }
    }

    /// Notes that the clone fetches nothing ahead by what it was told, so that it is asked about everything.
    pub fn declines(&mut self) {
        self.followed = None;
    }

    fn is_asked(&self, entry: FrameRange) -> bool {
        self.followed.as_ref().is_none_or(|(order, seed)| order.asks(*seed, entry))
    }

    /// True when nothing of an entry was in the order that it followed, so that it waits for the entry as soon as it needs it.
    fn is_without(&self, entry: FrameRange) -> bool {
        self.followed.as_ref().is_none_or(|(order, _)| order.frames().runs_in(entry).next().is_none())
    }

    fn needed(&self, entry: FrameRange) -> bool {
        self.touched.runs_in(entry).next().is_some()
    }
}

impl Merged {
    /// Entries that are kept, in about 300 KiB; what comes after them takes the place of the least common.
    pub const MAX_ENTRIES: usize = 16 << 10;

    /// For how many clones an entry counts as not needed before the first that needs it, at most. With more of them, what
    /// clones begin to need would be forgotten before it could become common.
    const MAX_EARLIER: u64 = 5;

    /// Nothing of an image of `frames` frames.
    pub fn new(image: ImageId, frames: PageCount) -> Self {
        Self { image, frames, heard: 0, witnesses: 0, entries: Vec::new() }
    }

    /// What stands in a file: `heard` clones told anything, and `witnesses` of them everything.
    ///
    /// # Errors
    /// When it does not fit together.
    pub fn from_parts(
        image: ImageId,
        frames: PageCount,
        heard: u64,
        witnesses: u64,
        entries: Vec<Entry>,
    ) -> Result<Self, MergedError> {
        if frames > FrameSet::MAX_UNIVERSE {
            return Err(MergedError::Universe(frames));
        }
        if entries.len() > Self::MAX_ENTRIES {
            return Err(MergedError::TooMany);
        }
        if heard < witnesses {
            return Err(MergedError::Clones { heard, whole: witnesses });
        }
        let mut seen = FrameSet::empty(frames);
        for Entry { range, needed, asked } in entries.iter().copied() {
            let block = |gfn: u64| gfn / Entry::BLOCK;
            let (start, end) = (range.start().index(), range.end().index());
            if range.is_empty() || end > frames.get() || block(start) != block(end - 1) {
                return Err(MergedError::Range(range));
            }
            if seen.insert_range(range) != range.count() {
                return Err(MergedError::Twice(range));
            }
            if needed == 0 || needed > asked || asked > Entry::MAX_ASKED {
                return Err(MergedError::Counts { range, needed, asked });
            }
        }
        Ok(Self { image, frames, heard, witnesses, entries })
    }

    /// The image.
    pub fn image(&self) -> ImageId {
        self.image
    }

    /// The frames of the image, one more than its highest.
    pub fn frames(&self) -> PageCount {
        self.frames
    }

    /// Clones that told anything of what they needed; some of them broke off, and some are still at it.
    pub fn heard(&self) -> u64 {
        self.heard
    }

    /// Clones whose whole record was taken.
    pub fn witnesses(&self) -> u64 {
        self.witnesses
    }

    /// What clones needed, in the order of need.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// What is known, in numbers.
    pub fn summary(&self) -> Summary {
        let count = |entries: &mut dyn Iterator<Item = &Entry>| entries.map(|entry| entry.range.count().get()).sum();
        Summary {
            heard: self.heard,
            clones: self.witnesses,
            entries: self.entries.len() as u64,
            frames: count(&mut self.entries.iter()),
            common: count(&mut self.entries.iter().filter(|entry| entry.is_common())),
        }
    }

    /// What the next clone is to fetch ahead: the most common first, then what is less so, each in the order of need.
    pub fn order(&self) -> Order {
        let common = self.entries.iter().filter(|entry| entry.is_common());
        let (most, less): (Vec<&Entry>, Vec<&Entry>) = common.partition(|entry| entry.is_most_common());
        Order::new(self.frames, most.into_iter().chain(less).map(|entry| entry.range).collect())
    }

    /// Takes note of what a clone needed, in the order of first need. Frames beyond the image are ignored, and so is what it
    /// said before.
    ///
    /// What nobody needed before gets its place in the order behind what the clone needed just before.
    pub fn touched(&mut self, witness: &mut Witness, ranges: &[FrameRange]) {
        let places: BTreeMap<Gfn, usize> =
            self.entries.iter().enumerate().map(|(place, entry)| (entry.range.start(), place)).collect();
        let holding = |entries: &[Entry], gfn: Gfn| {
            let (_, place) = places.range(..=gfn).next_back()?;
            entries[*place].range.contains(gfn).then_some(*place)
        };
        // New entries, and the place in the order before which each is to stand.
        let mut new: Vec<(usize, FrameRange)> = Vec::new();
        let mut next = match witness.last {
            None => 0,
            Some(last) => holding(&self.entries, last).map_or(self.entries.len(), |place| place + 1),
        };
        let is_new = witness.touched.is_empty();
        let bounds = witness.touched.bounds();
        for range in ranges.iter().map(|range| range.intersection(bounds)) {
            let runs: Vec<FrameRange> = witness.touched.gaps_in(range).collect();
            for run in runs {
                let first = holding(&self.entries, run.start());
                let others = places.range(run.start()..run.end()).map(|(_, place)| *place);
                let mut from = run.start();
                for place in first.into_iter().chain(others.filter(|place| Some(*place) != first)) {
                    let entry = &mut self.entries[place];
                    if !witness.needed(entry.range) && witness.is_asked(entry.range) {
                        entry.answer(true);
                    }
                    let start = entry.range.start().max(from);
                    add(&mut new, next, FrameRange::between(from, start));
                    (from, next) = (entry.range.end().min(run.end()), place + 1);
                }
                add(&mut new, next, FrameRange::between(from, run.end()));
                witness.touched.insert_range(run);
                witness.last = Some(Gfn::new(run.end().index() - 1));
            }
        }
        if is_new && !witness.touched.is_empty() {
            self.heard = self.heard.saturating_add(1);
            self.doubt(witness);
        }
        self.insert(new);
        self.forget();
    }

    /// Takes note that what a clone alone needed so far was not the first need of another that was told nothing of it. Many
    /// clones never come to an end that says more, and without this what the first of them needed by chance would stay common.
    /// It is one doubt for an entry, whoever comes later, as the clone may need it still.
    fn doubt(&mut self, witness: &Witness) {
        for entry in self.entries.iter_mut().filter(|entry| entry.asked == 1) {
            if !witness.needed(entry.range) && witness.is_without(entry.range) {
                entry.answer(false);
            }
        }
    }

    /// Takes note of a clone's end. `whole`: it has said everything, so that it did not need what it was asked about and did
    /// not name. Without, it may have broken off.
    pub fn ended(&mut self, witness: &Witness, whole: bool) {
        if !whole {
            return;
        }
        self.witnesses = self.witnesses.saturating_add(1);
        // One that needed nothing is heard only now.
        self.heard = self.heard.saturating_add(u64::from(witness.touched.is_empty()));
        for entry in &mut self.entries {
            if !witness.needed(entry.range) && witness.is_asked(entry.range) {
                entry.answer(false);
            }
        }
        self.forget();
    }

    /// Puts new entries into their places. A clone that is heard needs them, and those heard before it did not.
    fn insert(&mut self, mut new: Vec<(usize, FrameRange)>) {
        if new.is_empty() {
            return;
        }
        let asked = 1 + self.heard.saturating_sub(1).min(Self::MAX_EARLIER) as u8;
        // Stable: what was needed in turn stays in turn.
        new.sort_by_key(|(place, _)| *place);
        let mut new = new.into_iter().peekable();
        let old = std::mem::take(&mut self.entries);
        for (place, entry) in old.into_iter().map(Some).chain([None]).enumerate() {
            while let Some((_, range)) = new.next_if(|(at, _)| *at <= place) {
                self.entries.push(Entry { range, needed: 1, asked });
            }
            self.entries.extend(entry);
        }
    }

    /// Drops what hardly a clone needs, and then the least common of what is too many.
    fn forget(&mut self) {
        self.entries.retain(|entry| !entry.is_forgotten());
        let excess = self.entries.len().saturating_sub(Self::MAX_ENTRIES);
        if excess == 0 {
            return;
        }
        let mut least: Vec<usize> = (0..self.entries.len()).collect();
        // Of those that are equally common, what is needed late.
        let share = |entry: &Entry| u32::from(entry.needed) * 1000 / u32::from(entry.asked.max(1));
        least.sort_by_key(|place| (share(&self.entries[*place]), std::cmp::Reverse(*place)));
        let mut dropped: Vec<bool> = vec![false; self.entries.len()];
        least.into_iter().take(excess).for_each(|place| dropped[place] = true);
        let mut place = 0;
        self.entries.retain(|_| {
            place += 1;
            !dropped[place - 1]
        });
    }
}

/// Adds new entries for `range`, one for each block, as far as there is room for them.
fn add(new: &mut Vec<(usize, FrameRange)>, place: usize, range: FrameRange) {
    let mut rest = range;
    while !rest.is_empty() && new.len() < Merged::MAX_ENTRIES {
        let to_end = Entry::BLOCK - rest.start().index() % Entry::BLOCK;
        let (head, tail) = rest.split_at(PageCount::new(to_end));
        new.push((place, head));
        rest = tail;
    }
}
