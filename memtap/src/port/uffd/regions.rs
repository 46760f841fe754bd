use std::fmt;

use descriptor::memory::PageSize;
use descriptor::{FrameRange, Gfn, PAGE_SIZE, PageCount};
use thiserror::Error;

/// A run of frames and where the guest's memory for it lies in the address space that faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRegion {
    /// The frames, never none.
    pub frames: FrameRange,
    /// The virtual address of the first frame's page.
    pub address: u64,
    /// The size of the pages that back it.
    pub page_size: PageSize,
}

/// All regions of a guest: leads from faulting addresses to frames and back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRegions {
    by_frame: Vec<HostRegion>,
    /// Indices into `by_frame`.
    by_address: Vec<usize>,
    granule: PageCount,
}

/// Regions that make no sense together.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostRegionsError {
    /// None at all.
    #[error("no memory region")]
    None,
    /// A region without frames, or one that ends beyond the address space.
    #[error("region of {frames} at address {address:#x} is empty or ends beyond the address space", frames = .0.frames, address = .0.address)]
    Bounds(HostRegion),
    /// A region whose address, first frame or length is no multiple of what can be installed at once.
    #[error("region of {frames} at address {address:#x} is not aligned to pages of {granule} frames", frames = region.frames, address = region.address)]
    Unaligned {
        /// The region.
        region: HostRegion,
        /// The frames that can be installed at once, given the largest page size of all regions.
        granule: PageCount,
    },
    /// Two regions share frames.
    #[error("two memory regions share frame {0}")]
    FramesOverlap(Gfn),
    /// Two regions share addresses.
    #[error("two memory regions share address {0:#x}")]
    AddressesOverlap(u64),
}

impl HostRegion {
    /// The size in bytes.
    pub fn length(&self) -> u64 {
        self.frames.count().bytes()
    }

    fn end(&self) -> u64 {
        // Checked when the table was made.
        self.address + self.length()
    }
}

impl HostRegions {
    /// The table of these regions, in any order.
    ///
    /// # Errors
    /// When regions are empty, misaligned or overlap.
    pub fn new(mut regions: Vec<HostRegion>) -> Result<Self, HostRegionsError> {
        let granule = regions.iter().map(|region| region.page_size.frames()).max().ok_or(HostRegionsError::None)?;
        for region in &regions {
            let length = region.frames.count().get().checked_mul(PAGE_SIZE);
            if region.frames.is_empty() || length.is_none_or(|length| region.address.checked_add(length).is_none()) {
                return Err(HostRegionsError::Bounds(*region));
            }
            let frames = [region.frames.start().index(), region.frames.count().get()];
            let aligned = frames.iter().all(|number| number.is_multiple_of(granule.get()));
            if !aligned || !region.address.is_multiple_of(granule.bytes()) {
                return Err(HostRegionsError::Unaligned { region: *region, granule });
            }
        }
        regions.sort_by_key(|region| region.frames.start());
        if let Some(pair) = regions.windows(2).find(|pair| pair[1].frames.start() < pair[0].frames.end()) {
            return Err(HostRegionsError::FramesOverlap(pair[1].frames.start()));
        }
        let mut by_address: Vec<usize> = (0..regions.len()).collect();
        by_address.sort_by_key(|index| regions[*index].address);
        if let Some(pair) = by_address.windows(2).find(|pair| regions[pair[1]].address < regions[pair[0]].end()) {
            return Err(HostRegionsError::AddressesOverlap(regions[pair[1]].address));
        }
        Ok(Self { by_frame: regions, by_address, granule })
    }

    /// The regions in ascending order of frames.
    pub fn regions(&self) -> &[HostRegion] {
        &self.by_frame
    }

    /// The frames that can be installed at once: those of the largest page of any region.
    pub fn granule(&self) -> PageCount {
        self.granule
    }

    /// The frame whose page lies at `address`.
    pub fn frame_at(&self, address: u64) -> Option<Gfn> {
        let index = self.by_address.partition_point(|index| self.by_frame[*index].end() <= address);
        let region = &self.by_frame[*self.by_address.get(index)?];
        let offset = address.checked_sub(region.address)?;
        Some(region.frames.start() + PageCount::new(offset / PAGE_SIZE))
    }

    /// The frames whose pages lie wholly in the bytes from `start` up to `end`, as runs.
    pub fn frames_in(&self, start: u64, end: u64) -> impl Iterator<Item = FrameRange> + '_ {
        self.by_address.iter().filter_map(move |index| {
            let region = &self.by_frame[*index];
            let first = start.max(region.address).checked_sub(region.address)?.div_ceil(PAGE_SIZE);
            let last = end.min(region.end()).checked_sub(region.address)? / PAGE_SIZE;
            let count = last.checked_sub(first).filter(|count| *count > 0)?;
            Some(FrameRange::new(region.frames.start() + PageCount::new(first), PageCount::new(count)))
        })
    }

    /// The first part of `range` that lies in one region, and its address; `None` when its first frame is in no region.
    pub fn locate(&self, range: FrameRange) -> Option<(FrameRange, HostRegion, u64)> {
        let index = self.by_frame.partition_point(|region| region.frames.end() <= range.start());
        let region = self.by_frame.get(index).filter(|region| region.frames.contains(range.start()))?;
        let part = region.frames.intersection(range);
        let address = region.address + (part.start() - region.frames.start()).bytes();
        Some((part, *region, address))
    }
}

impl fmt::Display for HostRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:#x} ({} pages)", self.frames, self.address, self.page_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(start: u64, count: u64, address: u64) -> HostRegion {
        let frames = FrameRange::new(Gfn::new(start), PageCount::new(count));
        HostRegion { frames, address, page_size: PageSize::Base }
    }

    #[test]
    fn addresses_and_frames_lead_to_each_other() {
        // The second region lies lower, as Firecracker's does with 4 GiB.
        let regions = HostRegions::new(vec![region(0, 16, 0x9000_0000), region(32, 16, 0x1000_0000)]).unwrap();
        assert_eq!(regions.frame_at(0x9000_0fff), Some(Gfn::new(0)));
        assert_eq!(regions.frame_at(0x1000_1000), Some(Gfn::new(33)));
        assert_eq!(regions.frame_at(0x1001_0000), None);
        assert_eq!(regions.frame_at(0x0fff_ffff), None);
        let (part, _, address) = regions.locate(FrameRange::new(Gfn::new(40), PageCount::new(100))).unwrap();
        assert_eq!((part, address), (FrameRange::new(Gfn::new(40), PageCount::new(8)), 0x1000_8000));
        assert_eq!(regions.locate(FrameRange::single(Gfn::new(20))), None);
    }

    #[test]
    fn discards_cover_whole_pages_of_any_regions() {
        let regions = HostRegions::new(vec![region(0, 16, 0x10000), region(64, 16, 0x20000)]).unwrap();
        let frames = |start, end| regions.frames_in(start, end).collect::<Vec<_>>();
        let range = |start, count| FrameRange::new(Gfn::new(start), PageCount::new(count));
        assert_eq!(frames(0x10000, 0x12000), [range(0, 2)]);
        assert_eq!(frames(0x10001, 0x12fff), [range(1, 1)]);
        assert_eq!(frames(0x1f000, 0x21000), [range(15, 1), range(64, 1)]);
        assert_eq!(frames(0, u64::MAX), [range(0, 16), range(64, 16)]);
        assert_eq!(frames(0x30000, 0x40000), []);
        assert_eq!(frames(0x12000, 0x11000), []);
    }

    #[test]
    fn ill_formed_tables_are_refused() {
        let refused = |regions| HostRegions::new(regions).unwrap_err();
        assert_eq!(refused(vec![]), HostRegionsError::None);
        assert!(matches!(refused(vec![region(0, 0, 0x1000)]), HostRegionsError::Bounds(_)));
        assert!(matches!(refused(vec![region(0, 2, u64::MAX - 0xfff)]), HostRegionsError::Bounds(_)));
        assert!(matches!(refused(vec![region(0, 2, 0x1001)]), HostRegionsError::Unaligned { .. }));
        let huge = HostRegion { page_size: PageSize::Huge, ..region(512, 512, 0x20_1000) };
        assert!(matches!(refused(vec![huge]), HostRegionsError::Unaligned { .. }));
        let same_frame = vec![region(0, 2, 0x1000), region(1, 2, 0x8000)];
        assert_eq!(refused(same_frame), HostRegionsError::FramesOverlap(Gfn::new(1)));
        let same_address = vec![region(0, 2, 0x1000), region(8, 2, 0x2000)];
        assert_eq!(refused(same_address), HostRegionsError::AddressesOverlap(0x2000));
    }
}
