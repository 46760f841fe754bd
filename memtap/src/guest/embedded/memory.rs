use std::io;
use std::sync::atomic::Ordering;

use descriptor::memory::{MemoryMap, PageSize};
use descriptor::{FrameRange, Gfn, PAGE_SIZE, PageCount};

use super::sys::{Mapping, Page, WORDS};
use super::{Backing, EmbeddedError};
use crate::port::uffd::{HostRegion, HostRegions};

/// The memory of an embedded guest: a mapping for each region of its memory map.
pub(super) struct GuestMemory {
    regions: Vec<(FrameRange, Mapping)>,
    backing: Backing,
}

impl GuestMemory {
    pub(super) fn new(map: &MemoryMap, backing: Backing) -> Result<Self, EmbeddedError> {
        let regions = map
            .regions()
            .iter()
            .map(|region| {
                let pages = usize::try_from(region.frames.count().get()).unwrap_or(usize::MAX);
                let mapping = Mapping::new(pages, backing).map_err(|source| EmbeddedError::Map {
                    frames: region.frames,
                    backing,
                    source,
                })?;
                Ok((region.frames, mapping))
            })
            .collect::<Result<_, EmbeddedError>>()?;
        Ok(Self { regions, backing })
    }

    /// Where its frames lie in this process.
    pub(super) fn host_regions(&self) -> Result<HostRegions, EmbeddedError> {
        let page_size = match self.backing {
            Backing::Anon | Backing::Memfd => PageSize::Base,
            Backing::Huge => PageSize::Huge,
        };
        let region = |(frames, mapping): &(FrameRange, Mapping)| HostRegion {
            frames: *frames,
            address: mapping.address(),
            page_size,
        };
        Ok(HostRegions::new(self.regions.iter().map(region).collect())?)
    }

    /// The number of frames.
    pub(super) fn frame_count(&self) -> u64 {
        self.regions.iter().map(|(frames, _)| frames.count().get()).sum()
    }

    /// The frame with this index among those that exist.
    pub(super) fn frame(&self, index: u64) -> Option<Gfn> {
        let mut rest = index;
        for (frames, _) in &self.regions {
            match rest.checked_sub(frames.count().get()) {
                None => return Some(frames.start() + PageCount::new(rest)),
                Some(further) => rest = further,
            }
        }
        None
    }

    /// The pages that one discard takes at least.
    pub(super) fn granule(&self) -> PageCount {
        match self.backing {
            Backing::Anon | Backing::Memfd => PageCount::ONE,
            Backing::Huge => PageSize::Huge.frames(),
        }
    }

    /// The page of `gfn`, which must exist.
    pub(super) fn page(&self, gfn: Gfn) -> Option<&Page> {
        let (frames, mapping) = self.region(gfn)?;
        mapping.pages().get((gfn - frames.start()).get() as usize)
    }

    /// A copy of the page of `gfn`, which must exist.
    pub(super) fn copy(&self, gfn: Gfn, buffer: &mut [u8; PAGE_SIZE as usize]) {
        let Some(page) = self.page(gfn) else { return };
        for (bytes, word) in buffer.as_chunks_mut::<8>().0.iter_mut().zip(page) {
            *bytes = word.load(Ordering::Relaxed).to_ne_bytes();
        }
    }

    /// What of `range` lies in the region of its first frame.
    pub(super) fn within_region(&self, range: FrameRange) -> FrameRange {
        let region = self.region(range.start()).map(|(frames, _)| frames.intersection(range));
        region.unwrap_or(FrameRange::new(range.start(), PageCount::ZERO))
    }

    /// Gives up what of `range` lies in the region of its first frame; returns the frames given up.
    pub(super) fn discard(&self, range: FrameRange) -> io::Result<FrameRange> {
        let Some((frames, mapping)) = self.region(range.start()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let range = frames.intersection(range);
        mapping.discard((range.start() - frames.start()).get() as usize, range.count().get() as usize)?;
        Ok(range)
    }

    fn region(&self, gfn: Gfn) -> Option<&(FrameRange, Mapping)> {
        let index = self.regions.partition_point(|(frames, _)| frames.end() <= gfn);
        self.regions.get(index).filter(|(frames, _)| frames.contains(gfn))
    }
}

const _: () = assert!(WORDS * 8 == PAGE_SIZE as usize);
