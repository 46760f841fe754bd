//! An image that needs no memory: every word of it follows from the seed.

use descriptor::memory::{MemoryMap, PageSize, Region, RegionKind};
use descriptor::{FrameRange, FrameSet, Gfn, PAGE_SIZE, PageCount};
use fastrand::Rng;

/// Words of 8 bytes in a page.
pub const WORDS: u64 = PAGE_SIZE / 8;

/// The image of a parent.
#[derive(Clone, Debug)]
pub struct Image {
    /// The regions.
    pub memory: MemoryMap,
    /// Frames of zeros.
    pub zero: FrameSet,
    /// Frames whose contents do not matter; the image holds old data there.
    pub free: FrameSet,
    salt: u64,
}

impl Image {
    /// An image of some `frames` in one or two regions, each a multiple of `granule`, with runs of zero and free frames.
    pub fn draw(rng: &mut Rng, frames: u64, granule: u64) -> Self {
        let mut regions = Vec::new();
        let granules = (frames / granule).max(1);
        let first = if granules > 1 && rng.bool() { rng.u64(1..granules) } else { granules };
        let mut add = |name: &str, start: u64, count: u64| {
            let frames = FrameRange::new(Gfn::new(start * granule), PageCount::new(count * granule));
            regions.push(Region { name: name.to_owned(), frames, kind: RegionKind::Ram, page_size: PageSize::Base });
        };
        add("low", 0, first);
        if first < granules {
            add("high", first + rng.u64(0..3), granules - first);
        }
        let memory = MemoryMap::new(regions).expect("regions are ordered and apart");
        let universe = memory.universe();
        let mut runs = |share: u64| {
            let mut set = FrameSet::empty(universe);
            while set.count().get() * 100 < universe.get() * share {
                let start = rng.u64(0..universe.get());
                let count = (1 << rng.u32(0..8)).min(universe.get() - start);
                set.insert_range(FrameRange::new(Gfn::new(start), PageCount::new(count)));
            }
            set.intersect_with(&memory.present());
            set
        };
        let (zero, free) = (runs(20), runs(10));
        Self { memory, zero, free, salt: rng.u64(..) | 1 }
    }

    /// An image of `frames` in one region, all of them stored.
    pub fn solid(frames: u64, salt: u64) -> Self {
        let frames = FrameRange::new(Gfn::new(0), PageCount::new(frames));
        let region = Region { name: "low".to_owned(), frames, kind: RegionKind::Ram, page_size: PageSize::Base };
        let memory = MemoryMap::new(vec![region]).expect("one region");
        let universe = memory.universe();
        Self { memory, zero: FrameSet::empty(universe), free: FrameSet::empty(universe), salt: salt | 1 }
    }

    /// True for a frame that reads as zeros in every clone.
    pub fn is_blank(&self, gfn: Gfn) -> bool {
        self.zero.contains(gfn) || self.free.contains(gfn)
    }

    /// The longest head of `range` that is all zero, or at most `limit` pages of which none is; and whether it is zero.
    pub fn head(&self, range: FrameRange, limit: PageCount) -> (FrameRange, bool) {
        let (run, zero) = match self.zero.runs_in(range).next() {
            Some(zeros) if zeros.start() == range.start() => (zeros, true),
            Some(zeros) => (FrameRange::between(range.start(), zeros.start()), false),
            None => (range, false),
        };
        (if zero { run } else { run.split_at(limit).0 }, zero)
    }

    /// A word of the image as it is served.
    pub fn word(&self, gfn: Gfn, index: u64) -> u64 {
        if self.zero.contains(gfn) { 0 } else { (gfn.index() + 1).wrapping_mul(self.salt).wrapping_add(index) }
    }

    /// True when `bytes` are the page of `gfn` as it is served.
    pub fn is_page(&self, gfn: Gfn, bytes: &[u8]) -> bool {
        let words = bytes.as_chunks::<8>().0;
        let (first, step) = if self.zero.contains(gfn) { (0, 0) } else { (self.word(gfn, 0), 1) };
        words.len() as u64 == WORDS
            && words.iter().zip(0..).all(|(word, at)| u64::from_le_bytes(*word) == first.wrapping_add(at * step))
    }

    /// Appends the page of `gfn` as it is served.
    pub fn push_page(&self, gfn: Gfn, out: &mut Vec<u8>) {
        if self.zero.contains(gfn) {
            out.resize(out.len() + PAGE_SIZE as usize, 0);
        } else {
            let first = self.word(gfn, 0);
            out.extend((0..WORDS).flat_map(|index| first.wrapping_add(index).to_le_bytes()));
        }
    }
}
