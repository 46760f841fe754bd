use std::io;

use thiserror::Error;

use super::stream::{BlockPages, PagePlace, RamBlock, Source, Stream, data_pages};
use crate::image::{Extent, ExtentError, ExtentTable};
use crate::memory::{MemoryMap, MemoryMapError, PageSize, Region, RegionKind};
use crate::{FrameRange, FrameSet, Gfn, PAGE_SIZE, PageCount};

/// Every region starts at a multiple of this, so that a clone may back it with 2 MiB pages.
const ALIGNMENT: u64 = PageSize::Huge.frames().get();
/// A block of this size is memory of the guest, whatever its name: no ROM is as large.
const SURELY_RAM: PageCount = PageCount::new((64 << 20) / PAGE_SIZE);

/// The RAM blocks of a stream as regions of frames, and where their pages lie.
#[derive(Debug)]
pub struct Layout {
    /// One region for each RAM block, of the same name, in the order of the stream.
    pub memory: MemoryMap,
    /// Where the pages lie.
    pub extents: ExtentTable,
    /// Frames that are stored nowhere, and so are zero.
    pub holes: FrameSet,
    /// Stored frames of which nobody has said yet that they are not zero.
    pub unscanned: FrameSet,
}

/// The pages of a RAM block that `x-ignore-shared` left out of the stream.
pub struct ExternalBlock<'s> {
    /// The name of the block.
    pub block: String,
    /// The file that backs it.
    pub source: &'s dyn Source,
    /// The index of that file in the image's list.
    pub file: u16,
    /// The offset in bytes of the block's first page.
    pub offset: u64,
}

/// A stream that makes no image.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// The RAM blocks make no memory map.
    #[error("the RAM blocks make no memory map")]
    Memory(#[from] MemoryMapError),
    /// The pages make no extent table.
    #[error("the pages do not lie in their files")]
    Extents(#[from] ExtentError),
    /// A block's pages are neither in the stream nor given apart.
    #[error("the {size} pages of RAM block {block:?} are not in the stream; name the file that backs it")]
    NoPages {
        /// The block's name.
        block: String,
        /// Its size.
        size: PageCount,
    },
    /// Pages were given for a block that has its own, or that does not exist.
    #[error("RAM block {0:?} has no pages outside of the stream")]
    NotExternal(String),
    /// The file that backs a block could not be looked at.
    #[error("cannot find the data in the file behind RAM block {block:?}")]
    Holes {
        /// The block's name.
        block: String,
        /// Why not.
        source: io::Error,
    },
}

impl Layout {
    /// Lays the blocks of `stream`, which is file 0 of the image, end to end in frame space.
    ///
    /// # Errors
    /// When pages are missing, or lie outside of their files, whose lengths in bytes are `file_lengths`.
    pub fn new(stream: &Stream, external: &[ExternalBlock<'_>], file_lengths: &[u64]) -> Result<Self, LayoutError> {
        let memory = memory_map(&stream.blocks)?;
        let is_external =
            |name: &str| stream.blocks.iter().any(|block| block.name == name && block.pages == BlockPages::External);
        if let Some(stranger) = external.iter().find(|given| !is_external(&given.block)) {
            return Err(LayoutError::NotExternal(stranger.block.clone()));
        }
        let mut extents = stream_extents(stream, &memory);
        let mut unscanned = FrameSet::empty(memory.universe());
        if !stream.zeros_marked {
            extents.iter().for_each(|extent| _ = unscanned.insert_range(extent.frames));
        }
        for (block, region) in stream.blocks.iter().zip(memory.regions()) {
            if block.pages == BlockPages::External {
                let given = external.iter().find(|given| given.block == block.name);
                let missing = || LayoutError::NoPages { block: block.name.clone(), size: block.size };
                for extent in external_extents(region, given.ok_or_else(missing)?)? {
                    unscanned.insert_range(extent.frames);
                    extents.push(extent);
                }
            }
        }
        extents.sort_unstable_by_key(|extent| extent.frames.start());
        let mut holes = memory.present();
        extents.iter().for_each(|extent| _ = holes.remove_range(extent.frames));
        let extents = ExtentTable::new(extents, file_lengths)?;
        Ok(Self { memory, extents, holes, unscanned })
    }
}

fn memory_map(blocks: &[RamBlock]) -> Result<MemoryMap, MemoryMapError> {
    let largest = blocks.iter().map(|block| block.size).max().unwrap_or(PageCount::ZERO);
    let mut regions = Vec::with_capacity(blocks.len());
    let mut start = 0_u64;
    for block in blocks {
        let frames = Gfn::checked(start).and_then(|start| FrameRange::checked(start, block.size));
        let Some(frames) = frames else {
            return Err(MemoryMapError::TooLarge(Gfn::MAX));
        };
        let is_ram = block.size == largest || block.size >= SURELY_RAM || named_ram(&block.name);
        let kind = if is_ram { RegionKind::Ram } else { RegionKind::Rom };
        regions.push(Region { name: block.name.clone(), frames, kind, page_size: PageSize::Base });
        start = frames.end().index().saturating_add(ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
    MemoryMap::new(regions)
}

/// Machines call their memory `pc.ram` or the like, and memory backends are objects.
fn named_ram(block: &str) -> bool {
    block.ends_with(".ram") || block.starts_with("/objects/")
}

/// The pages in the stream; of several copies of a page only the last is taken.
fn stream_extents(stream: &Stream, memory: &MemoryMap) -> Vec<Extent> {
    let mut seen = FrameSet::empty(memory.universe());
    let mut extents = Vec::new();
    for run in stream.pages.iter().rev() {
        let Some(region) = memory.regions().get(usize::from(run.block)) else { continue };
        let first = region.frames.start().checked_add(PageCount::new(run.first));
        let Some(frames) = first.and_then(|first| FrameRange::checked(first, run.count)) else { continue };
        let frames = frames.intersection(region.frames);
        if let PagePlace::Stored { offset, stride } = run.place {
            let whole = Extent { frames, file: 0, offset, stride };
            extents.extend(seen.gaps_in(frames).map(|gap| whole.slice(gap)));
        }
        seen.insert_range(frames);
    }
    extents
}

/// The pages of `region` in the file that backs it.
fn external_extents(region: &Region, given: &ExternalBlock<'_>) -> Result<Vec<Extent>, LayoutError> {
    let failed = |source| LayoutError::Holes { block: region.name.clone(), source };
    let too_far = || failed(io::ErrorKind::UnexpectedEof.into());
    let end = given.offset.checked_add(region.frames.count().bytes()).ok_or_else(too_far)?;
    if end > given.source.length().map_err(failed)? {
        return Err(too_far());
    }
    let stored = data_pages(given.source, given.offset, region.frames.count());
    stored
        .map(|run| {
            let (first, count) = run.map_err(failed)?;
            let frames = FrameRange::new(region.frames.start() + PageCount::new(first), count);
            let offset = given.offset + first * PAGE_SIZE;
            Ok(Extent { frames, file: given.file, offset, stride: PAGE_SIZE as u32 })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Span;
    use crate::import::qemu::stream::testing::{StreamBuilder, sample};

    fn range(start: u64, count: u64) -> FrameRange {
        FrameRange::new(Gfn::new(start), PageCount::new(count))
    }

    /// The byte that fills the page of each frame; `None` where the frame is in no file.
    fn fills(layout: &Layout, files: &[&[u8]], frames: FrameRange) -> Vec<Option<u8>> {
        let fill = |span| match span {
            Span::Hole(hole) => vec![None; hole.count().get() as usize],
            Span::Stored(extent) => {
                let page = |gfn| &files[usize::from(extent.file)][extent.offset_of(gfn) as usize..][..4096];
                extent.frames.frames().map(|gfn| Some(page(gfn)[0]).filter(|fill| page(gfn) == [*fill; 4096])).collect()
            }
        };
        layout.extents.spans(frames).flat_map(fill).collect()
    }

    #[test]
    fn the_last_copy_of_a_page_wins() {
        let bytes = sample();
        let stream = Stream::parse(&bytes.as_slice()).unwrap();
        let layout = Layout::new(&stream, &[], &[bytes.len() as u64]).unwrap();
        let regions: Vec<_> = layout.memory.regions().iter().map(|r| (r.name.as_str(), r.frames, r.kind)).collect();
        assert_eq!(regions, [("pc.ram", range(0, 8), RegionKind::Ram), ("pc.rom", range(512, 2), RegionKind::Rom)]);
        let ram = [Some(0xa0), Some(0xb1), None, None, None, Some(0xa5), None, None];
        assert_eq!(fills(&layout, &[&bytes], range(0, 8)), ram);
        assert_eq!(fills(&layout, &[&bytes], range(512, 2)), [Some(0xc0), Some(0xc1)]);
        assert_eq!(layout.holes.runs().collect::<Vec<_>>(), [range(2, 3), range(6, 2)]);
        assert!(layout.unscanned.is_empty());
    }

    #[test]
    fn pages_outside_of_the_stream_must_be_given() {
        let stream = StreamBuilder::new(&["x-ignore-shared"]).ram_start(5);
        let stream = stream.block("pc.ram", 4).be64(0).block("pc.rom", 1).be64(0xe0000).end_of_section();
        let bytes = stream.part().page(0, Some("pc.rom"), 1).end_of_section().devices().bytes;
        let stream = Stream::parse(&bytes.as_slice()).unwrap();
        let ram = [[9; 4096], [0; 4096], [2; 4096], [0; 4096], [4; 4096]];
        let ram: &[u8] = ram.as_flattened();
        let lengths = [bytes.len() as u64, ram.len() as u64];
        let given = |block: &str, offset| ExternalBlock { block: block.into(), source: &ram, file: 1, offset };
        let layout = Layout::new(&stream, &[given("pc.ram", 4096)], &lengths).unwrap();
        assert_eq!(fills(&layout, &[&bytes, ram], range(0, 4)), [None, Some(2), None, Some(4)]);
        assert_eq!(layout.unscanned.runs().count(), 3, "the ROM has no zero record either");
        let refused = |external: &[ExternalBlock<'_>]| Layout::new(&stream, external, &lengths).unwrap_err();
        assert!(matches!(refused(&[]), LayoutError::NoPages { block, .. } if block == "pc.ram"));
        assert!(matches!(refused(&[given("pc.rom", 0)]), LayoutError::NotExternal(name) if name == "pc.rom"));
        assert!(matches!(refused(&[given("pc.ram", 8192)]), LayoutError::Holes { .. }));
    }
}
