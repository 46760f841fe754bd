use descriptor::memory::{MemoryMap, PageSize};
use descriptor::{FrameRange, Gfn, PAGE_SIZE, PageCount};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::port::uffd::{HostRegion, HostRegions, HostRegionsError};

/// The longest message: some hundred bytes for each of some thousand regions, where virtual machines have one to a dozen.
pub const MAX_MESSAGE: usize = 128 << 10;

/// A region of guest memory as a VMM describes it; all sizes and addresses are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(from = "WireRegion")]
pub struct VmmRegion {
    /// Where it lies in the VMM's address space.
    pub base_host_virt_addr: u64,
    /// Its size.
    pub size: u64,
    /// Where it lies in the snapshot's memory file.
    pub offset: u64,
    /// The size of its pages.
    pub page_size: u64,
}

/// A region as it stands in the message.
#[derive(Deserialize)]
struct WireRegion {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    /// The older name, which says KiB but has always held bytes.
    page_size_kib: Option<u64>,
}

impl From<WireRegion> for VmmRegion {
    fn from(region: WireRegion) -> Self {
        let WireRegion { base_host_virt_addr, size, offset, page_size, page_size_kib } = region;
        // The oldest messages have no size at all; there were only small pages then.
        let page_size = page_size.or(page_size_kib).unwrap_or(PAGE_SIZE);
        Self { base_host_virt_addr, size, offset, page_size }
    }
}

/// A message that cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// No JSON array of regions.
    #[error("the message is no JSON array of memory regions")]
    Json(#[source] serde_json::Error),
    /// No end in sight.
    #[error("the message is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    /// Pages of a size that no VMM uses.
    #[error("the region at offset {offset:#x} has pages of {page_size} bytes (4096 and 2097152 are possible)")]
    PageSize {
        /// The region's place in the memory file.
        offset: u64,
        /// The size of its pages in bytes.
        page_size: u64,
    },
    /// A region that does not consist of whole pages.
    #[error("the region at offset {offset:#x} has a size or offset that is no multiple of 4096 (size {size:#x})")]
    Unaligned {
        /// The region's place in the memory file.
        offset: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// A region that reaches beyond the image.
    #[error("the region at offset {offset:#x} of {size:#x} bytes reaches beyond the {image:#x} bytes of the image")]
    Beyond {
        /// The region's place in the memory file.
        offset: u64,
        /// Its size in bytes.
        size: u64,
        /// The bytes of the image's memory map.
        image: u64,
    },
    /// More or less memory than the image has.
    #[error(
        "the regions have {regions:#x} bytes together, the image {image:#x}: this is not the snapshot of the descriptor"
    )]
    Sum {
        /// The bytes of all regions.
        regions: u64,
        /// The bytes of the image's memory map.
        image: u64,
    },
    /// Regions that overlap or are misaligned.
    #[error(transparent)]
    Regions(#[from] HostRegionsError),
}

/// The regions in a message; `None` when `bytes` are only the beginning of one.
///
/// # Errors
/// When `bytes` are no JSON array of regions, or go on behind its end.
pub fn parse(bytes: &[u8]) -> Result<Option<Vec<VmmRegion>>, HandshakeError> {
    match serde_json::from_slice(bytes) {
        Ok(regions) => Ok(Some(regions)),
        Err(error) if error.is_eof() && bytes.len() < MAX_MESSAGE => Ok(None),
        Err(error) if error.is_eof() => Err(HandshakeError::TooLong),
        Err(error) => Err(HandshakeError::Json(error)),
    }
}

/// Leads from the image's frames to the VMM's addresses.
///
/// A snapshot's memory file holds the regions of the memory map end to end, in ascending order of frames.
///
/// # Errors
/// When the regions are not the memory of this image, or contradict each other.
pub fn host_regions(message: &[VmmRegion], memory: &MemoryMap) -> Result<HostRegions, HandshakeError> {
    let image = memory.frame_count().bytes();
    let mut regions = Vec::new();
    let mut sum = 0u64;
    for region in message {
        let VmmRegion { base_host_virt_addr, size, offset, page_size } = *region;
        let page_size = match page_size {
            PAGE_SIZE => PageSize::Base,
            bytes if bytes == PageSize::Huge.frames().bytes() => PageSize::Huge,
            page_size => return Err(HandshakeError::PageSize { offset, page_size }),
        };
        if !size.is_multiple_of(PAGE_SIZE) || !offset.is_multiple_of(PAGE_SIZE) {
            return Err(HandshakeError::Unaligned { offset, size });
        }
        let end = offset.checked_add(size).filter(|end| *end <= image);
        let end = end.ok_or(HandshakeError::Beyond { offset, size, image })?;
        sum = sum.saturating_add(size);
        for (frames, at) in frames_in_file(memory, offset, end) {
            let address = base_host_virt_addr.saturating_add(at - offset);
            regions.push(HostRegion { frames, address, page_size });
        }
    }
    let regions = HostRegions::new(regions)?;
    if sum != image {
        return Err(HandshakeError::Sum { regions: sum, image });
    }
    Ok(regions)
}

/// What a VMM says of its memory: the other side of [`host_regions`].
pub fn describe(regions: &HostRegions, memory: &MemoryMap) -> Vec<VmmRegion> {
    let mut offset = 0;
    let mut message = Vec::new();
    for frames in memory.regions().iter().map(|region| region.frames) {
        for region in regions.regions() {
            let part = region.frames.intersection(frames);
            if !part.is_empty() {
                message.push(VmmRegion {
                    base_host_virt_addr: region.address + (part.start() - region.frames.start()).bytes(),
                    size: part.count().bytes(),
                    offset: offset + (part.start() - frames.start()).bytes(),
                    page_size: region.page_size.frames().bytes(),
                });
            }
        }
        offset += frames.count().bytes();
    }
    message
}

/// The frames whose pages lie at `start..end` of the memory file, in runs, each with its offset in the file.
fn frames_in_file(memory: &MemoryMap, start: u64, end: u64) -> impl Iterator<Item = (FrameRange, u64)> {
    let mut file_offset = 0;
    memory.regions().iter().filter_map(move |region| {
        let (from, to) = (file_offset, file_offset + region.frames.count().bytes());
        file_offset = to;
        let (from_here, to_here) = (start.max(from), end.min(to));
        let count = PageCount::from_bytes_exact(to_here.checked_sub(from_here)?).filter(|count| !count.is_zero())?;
        let first: Gfn = region.frames.start() + PageCount::from_bytes_exact(from_here - from)?;
        Some((FrameRange::new(first, count), from_here))
    })
}

#[cfg(test)]
mod tests {
    use descriptor::memory::{Region, RegionKind};
    use proptest::prelude::*;

    use super::*;

    fn memory(regions: &[(u64, u64)]) -> MemoryMap {
        let region = |(index, (start, count)): (usize, &(u64, u64))| Region {
            name: format!("ram{index}"),
            frames: FrameRange::new(Gfn::new(*start), PageCount::new(*count)),
            kind: RegionKind::Ram,
            page_size: PageSize::Base,
        };
        MemoryMap::new(regions.iter().enumerate().map(region).collect()).unwrap()
    }

    fn region(address: u64, size: u64, offset: u64) -> VmmRegion {
        VmmRegion { base_host_virt_addr: address, size, offset, page_size: 4096 }
    }

    #[test]
    fn a_message_seen_from_firecracker() {
        let text = br#"[{"base_host_virt_addr":140503009984512,"size":134217728,"offset":0,"page_size":4096,"page_size_kib":4096}]"#;
        let message = parse(text).unwrap().unwrap();
        assert_eq!(message, [region(140_503_009_984_512, 128 << 20, 0)]);
        let regions = host_regions(&message, &memory(&[(0, 32768)])).unwrap();
        assert_eq!(regions.frame_at(140_503_009_984_512 + 4096), Some(Gfn::new(1)));
        assert!(parse(&text[..50]).unwrap().is_none());
    }

    #[test]
    fn the_memory_file_has_no_gap_where_the_guest_has_one() {
        // The VMM's second region lies lower, and begins behind the hole below 4 GiB.
        let map = memory(&[(0, 0xc0000), (0x10_0000, 0x40000)]);
        let message = [region(0x7f00_0000_0000, 0xc000_0000, 0), region(0x7e00_0000_0000, 0x4000_0000, 0xc000_0000)];
        let regions = host_regions(&message, &map).unwrap();
        assert_eq!(regions.frame_at(0x7e00_0000_0000), Some(Gfn::new(0x10_0000)));
        assert_eq!(describe(&regions, &map), message);
        // One region over the hole comes to the same frames.
        let regions = host_regions(&[region(0x7f00_0000_0000, 1 << 32, 0)], &map).unwrap();
        assert_eq!(regions.frame_at(0x7f00_0000_0000 + 0xc000_0000), Some(Gfn::new(0x10_0000)));
    }

    #[test]
    fn messages_that_do_not_add_up_are_refused() {
        let map = memory(&[(0, 16)]);
        let refused = |message: &[VmmRegion]| host_regions(message, &map).unwrap_err();
        assert!(matches!(refused(&[]), HandshakeError::Regions(HostRegionsError::None)));
        assert!(matches!(refused(&[region(0x1000, 0x8000, 0)]), HandshakeError::Sum { .. }));
        assert!(matches!(refused(&[region(0x1000, 0x11000, 0)]), HandshakeError::Beyond { .. }));
        assert!(matches!(refused(&[region(0x1000, !0xfff, 0x1000)]), HandshakeError::Beyond { .. }));
        assert!(matches!(refused(&[region(0x1000, 0x8001, 0)]), HandshakeError::Unaligned { .. }));
        let overlapping = [region(0x10000, 0x8000, 0), region(0x14000, 0x8000, 0x8000)];
        assert!(matches!(refused(&overlapping), HandshakeError::Regions(HostRegionsError::AddressesOverlap(_))));
        let same_offset = [region(0x10000, 0x8000, 0), region(0x40000, 0x8000, 0)];
        assert!(matches!(refused(&same_offset), HandshakeError::Regions(HostRegionsError::FramesOverlap(_))));
        let large = VmmRegion { page_size: 1 << 30, ..region(0, 0x10000, 0) };
        assert!(matches!(refused(&[large]), HandshakeError::PageSize { .. }));
        assert!(matches!(refused(&[region(u64::MAX - 0xfff, 0x10000, 0)]), HandshakeError::Regions(_)));
        assert!(matches!(parse(b"{}"), Err(HandshakeError::Json(_))));
        assert!(matches!(parse(b"[] []"), Err(HandshakeError::Json(_))));
        assert!(matches!(parse(&[b' '; MAX_MESSAGE]), Err(HandshakeError::TooLong)));
    }

    proptest! {
        #[test]
        fn any_regions_give_a_table_or_an_error(
            regions in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), any::<bool>()), 0..4),
            map in proptest::collection::vec((0..64u64, 1..64u64), 1..4),
        ) {
            let mut start = 0;
            let map: Vec<(u64, u64)> = map.into_iter().map(|(gap, count)| {
                let first = start + gap;
                start = first + count;
                (first, count)
            }).collect();
            let message: Vec<VmmRegion> = regions.into_iter().map(|(base, size, offset, small)| {
                // Some values that nearly fit, some that do not at all.
                let mask = if small { 0x3f_f000 } else { u64::MAX };
                region(base & !0xfff, size & mask, offset & mask)
            }).collect();
            if let Ok(table) = host_regions(&message, &memory(&map)) {
                let frames: u64 = table.regions().iter().map(|region| region.frames.count().get()).sum();
                prop_assert_eq!(frames, map.iter().map(|(_, count)| count).sum::<u64>());
            }
        }
    }
}
