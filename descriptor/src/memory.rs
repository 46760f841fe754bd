//! The memory map: which frames exist, and what each region of them is called.
//!
//! A region is what the hypervisor gives a name: a guest-physical range, or one of QEMU's RAM blocks. QEMU's migration
//! stream addresses memory as (block, offset) and the same block can appear at several guest-physical addresses, so a QEMU
//! image lays its blocks end to end in frame space, each at a multiple of 2 MiB, and the region's name leads back to the block.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{FrameRange, FrameSet, Gfn, PageCount};

/// What a region of guest memory is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RegionKind {
    /// Memory of the guest.
    Ram,
    /// Firmware, option ROMs, ACPI tables, video memory: small blocks that the hypervisor also keeps in pages.
    Rom,
}

/// The size of the pages that back a region on the host; frames are numbered in 4 KiB all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PageSize {
    /// 4 KiB.
    #[serde(rename = "4K")]
    Base,
    /// 2 MiB huge pages.
    #[serde(rename = "2M")]
    Huge,
}

impl PageSize {
    /// The frames in one page.
    pub const fn frames(self) -> PageCount {
        match self {
            PageSize::Base => PageCount::ONE,
            PageSize::Huge => PageCount::new(512),
        }
    }
}

/// A named run of frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// The name, at most [`Region::MAX_NAME`] bytes: QEMU's RAM block, or a plain word such as `ram`.
    pub name: String,
    /// The frames.
    pub frames: FrameRange,
    /// What they are used for.
    pub kind: RegionKind,
    /// The size of the host pages behind them.
    pub page_size: PageSize,
}

impl Region {
    /// The longest name in bytes, as QEMU's one-byte length allows.
    pub const MAX_NAME: usize = 255;
}

/// The regions of an image in ascending order, none of which overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryMap {
    regions: Vec<Region>,
}

/// Regions that make no memory map.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryMapError {
    /// No region at all.
    #[error("the memory map has no regions")]
    NoRegions,
    /// Too many regions.
    #[error("the memory map has {0} regions, more than {max}", max = MemoryMap::MAX_REGIONS)]
    TooMany(usize),
    /// An empty name or one that is too long.
    #[error("the region at {frames} has a name of {length} bytes (1 to {max} are allowed)", max = Region::MAX_NAME)]
    Name {
        /// The region's frames.
        frames: FrameRange,
        /// The length of its name in bytes.
        length: usize,
    },
    /// A region without frames.
    #[error("region {0:?} is empty")]
    Empty(String),
    /// A region whose bounds are no multiple of its page size.
    #[error("region {name:?} at {frames} is not aligned to its page size of {pages} frames")]
    Unaligned {
        /// The region's name.
        name: String,
        /// Its frames.
        frames: FrameRange,
        /// The frames in one of its pages.
        pages: PageCount,
    },
    /// Two regions that share frames or stand in the wrong order.
    #[error("region {second:?} begins below the end of region {first:?}")]
    Overlap {
        /// The region before.
        first: String,
        /// The region that begins too low.
        second: String,
    },
    /// Two regions of one name.
    #[error("two regions are called {0:?}")]
    DuplicateName(String),
    /// More memory than can be handled.
    #[error("the memory map reaches to frame {0}, beyond the limit of {max} frames", max = FrameSet::MAX_UNIVERSE)]
    TooLarge(Gfn),
}

impl MemoryMap {
    /// The most regions in a map; QEMU's largest machines have some dozens of RAM blocks.
    pub const MAX_REGIONS: usize = 1024;

    /// The map of these regions, which must be in ascending order.
    ///
    /// # Errors
    /// When they overlap, are unordered, misaligned, empty, ill-named, or too many.
    pub fn new(regions: Vec<Region>) -> Result<Self, MemoryMapError> {
        let Some(last) = regions.last() else {
            return Err(MemoryMapError::NoRegions);
        };
        if regions.len() > Self::MAX_REGIONS {
            return Err(MemoryMapError::TooMany(regions.len()));
        }
        if last.frames.end().index() > FrameSet::MAX_UNIVERSE.get() {
            return Err(MemoryMapError::TooLarge(last.frames.end()));
        }
        for region in &regions {
            check_region(region)?;
        }
        for pair in regions.windows(2) {
            if pair[1].frames.start() < pair[0].frames.end() {
                let (first, second) = (pair[0].name.clone(), pair[1].name.clone());
                return Err(MemoryMapError::Overlap { first, second });
            }
        }
        let mut names: Vec<&str> = regions.iter().map(|region| region.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(MemoryMapError::DuplicateName(pair[0].to_owned()));
        }
        Ok(Self { regions })
    }

    /// The regions in ascending order.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The universe of frame sets over this map: one more than its highest frame.
    pub fn universe(&self) -> PageCount {
        self.regions.last().map_or(PageCount::ZERO, |region| region.frames.end() - Gfn::new(0))
    }

    /// The frames that exist; the others are absent.
    pub fn present(&self) -> FrameSet {
        FrameSet::from_ranges(self.universe(), self.regions.iter().map(|region| region.frames))
    }

    /// The number of frames that exist.
    pub fn frame_count(&self) -> PageCount {
        self.regions.iter().map(|region| region.frames.count()).sum()
    }

    /// True when every frame of `range` exists.
    pub fn covers(&self, range: FrameRange) -> bool {
        let mut rest = range;
        while !rest.is_empty() {
            let Some(region) = self.region_of(rest.start()) else {
                return false;
            };
            rest = FrameRange::between(region.frames.end().min(rest.end()), rest.end());
        }
        true
    }

    /// The region that holds `gfn`.
    pub fn region_of(&self, gfn: Gfn) -> Option<&Region> {
        let index = self.regions.partition_point(|region| region.frames.end() <= gfn);
        self.regions.get(index).filter(|region| region.frames.contains(gfn))
    }

    /// The region called `name`.
    pub fn region_named(&self, name: &str) -> Option<&Region> {
        self.regions.iter().find(|region| region.name == name)
    }
}

impl fmt::Display for RegionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RegionKind::Ram => "ram",
            RegionKind::Rom => "rom",
        })
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PageSize::Base => "4K",
            PageSize::Huge => "2M",
        })
    }
}

fn check_region(region: &Region) -> Result<(), MemoryMapError> {
    let frames = region.frames;
    if region.name.is_empty() || region.name.len() > Region::MAX_NAME {
        return Err(MemoryMapError::Name { frames, length: region.name.len() });
    }
    if frames.is_empty() {
        return Err(MemoryMapError::Empty(region.name.clone()));
    }
    let pages = region.page_size.frames();
    if !frames.start().index().is_multiple_of(pages.get()) || !frames.count().get().is_multiple_of(pages.get()) {
        return Err(MemoryMapError::Unaligned { name: region.name.clone(), frames, pages });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(name: &str, start: u64, count: u64) -> Region {
        Region {
            name: name.to_owned(),
            frames: FrameRange::new(Gfn::new(start), PageCount::new(count)),
            kind: RegionKind::Ram,
            page_size: PageSize::Base,
        }
    }

    #[test]
    fn regions_are_found_by_frame_and_name() {
        let map = MemoryMap::new(vec![region("low", 0, 10), region("high", 512, 100)]).unwrap();
        assert_eq!(map.universe(), PageCount::new(612));
        assert_eq!(map.frame_count(), PageCount::new(110));
        assert_eq!(map.region_of(Gfn::new(9)).map(|r| r.name.as_str()), Some("low"));
        assert_eq!(map.region_of(Gfn::new(10)), None);
        assert_eq!(map.region_of(Gfn::new(512)).map(|r| r.name.as_str()), Some("high"));
        assert_eq!(map.region_of(Gfn::new(612)), None);
        assert_eq!(map.region_named("high"), map.region_of(Gfn::new(600)));
        assert_eq!(map.present().count(), PageCount::new(110));
        let range = |start, count| FrameRange::new(Gfn::new(start), PageCount::new(count));
        assert!(map.covers(range(0, 10)) && map.covers(range(520, 92)) && map.covers(range(11, 0)));
        assert!(!map.covers(range(0, 11)) && !map.covers(range(10, 1)) && !map.covers(range(520, 93)));
        let adjacent = MemoryMap::new(vec![region("a", 0, 10), region("b", 10, 10)]).unwrap();
        assert!(adjacent.covers(range(5, 10)) && !adjacent.covers(range(5, 16)));
    }

    #[test]
    fn ill_formed_maps_are_refused() {
        let huge = Region { page_size: PageSize::Huge, ..region("huge", 512, 100) };
        let refused = |regions: Vec<Region>| MemoryMap::new(regions).unwrap_err();
        assert_eq!(refused(vec![]), MemoryMapError::NoRegions);
        assert!(matches!(refused(vec![region("", 0, 1)]), MemoryMapError::Name { length: 0, .. }));
        assert!(matches!(refused(vec![region("a", 0, 0)]), MemoryMapError::Empty(_)));
        assert!(matches!(refused(vec![huge]), MemoryMapError::Unaligned { .. }));
        let overlapping = vec![region("a", 0, 2), region("b", 1, 2)];
        assert!(matches!(refused(overlapping), MemoryMapError::Overlap { .. }));
        let twins = vec![region("a", 0, 2), region("a", 2, 2)];
        assert!(matches!(refused(twins), MemoryMapError::DuplicateName(_)));
        assert!(matches!(refused(vec![region("a", 1 << 32, 2)]), MemoryMapError::TooLarge(_)));
    }
}
