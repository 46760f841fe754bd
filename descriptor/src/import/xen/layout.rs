use thiserror::Error;

use super::guest::{Config, special_frames};
use super::stream::{PagePlace, Stream};
use crate::image::{Extent, ExtentError, ExtentTable};
use crate::memory::{MemoryMap, MemoryMapError, PageSize, Region, RegionKind};
use crate::{FrameRange, FrameSet, Gfn, PAGE_SIZE, PageCount};

/// The guest's memory as regions of frames, and where its pages lie. A frame's number is the guest's own.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Runs of ordinary memory, and of special pages (as ROM), which a clone's stream brings along.
    pub memory: MemoryMap,
    /// Where the pages lie, in the stream as file 0.
    pub extents: ExtentTable,
    /// Frames that are stored nowhere, and so are zero.
    pub holes: FrameSet,
}

/// A stream that makes no image.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// The pages make no memory map.
    #[error("the pages make no memory map")]
    Memory(#[from] MemoryMapError),
    /// The pages make no extent table.
    #[error("the pages do not lie in the stream")]
    Extents(#[from] ExtentError),
    /// No page of the toolstack's own, as for the console; `xl restore` could not make a clone.
    #[error("none of the guest's pages is a special one, such as those of its console and store")]
    NoSpecial,
    /// More special pages than can go into a descriptor.
    #[error("the guest has {pages} special pages in {runs} pieces; a descriptor takes {max} in {max_runs}", max = Layout::MAX_SPECIAL, max_runs = Layout::MAX_SPECIAL_RUNS)]
    Special {
        /// How many.
        pages: PageCount,
        /// In how many runs.
        runs: usize,
    },
}

impl Layout {
    /// The most special pages, all of which go into the descriptor: 64 MiB. A PVH guest has 17; virtual graphics memory of a
    /// device model is among them, which has 16 MiB.
    pub const MAX_SPECIAL: PageCount = PageCount::new((64 << 20) / PAGE_SIZE);

    /// The most runs of special pages; the toolstack makes less than ten.
    pub const MAX_SPECIAL_RUNS: usize = 256;

    /// Lays out the pages of a stream.
    ///
    /// # Errors
    /// When there are none, or no special ones, or too many of them.
    pub fn new(stream: &Stream) -> Result<Self, LayoutError> {
        let (present, extents) = last_copies(stream);
        let mut special = FrameSet::empty(present.universe());
        for range in special_frames(stream, &Config::of(stream)) {
            let range = range.intersection(present.bounds());
            present.runs_in(range).for_each(|run| _ = special.insert_range(run));
        }
        let special_runs = special.runs().count();
        if special.is_empty() && !present.is_empty() {
            return Err(LayoutError::NoSpecial);
        }
        if special.count() > Self::MAX_SPECIAL || special_runs > Self::MAX_SPECIAL_RUNS {
            return Err(LayoutError::Special { pages: special.count(), runs: special_runs });
        }
        let mut ram = present;
        ram.subtract(&special);
        let ram = join_runs(&ram, &special, MemoryMap::MAX_REGIONS - special_runs);
        let region = |name, kind| {
            move |frames: FrameRange| {
                let name = format!("{name}-{:x}", frames.start().index());
                Region { name, frames, kind, page_size: PageSize::Base }
            }
        };
        let ram = ram.into_iter().map(region("ram", RegionKind::Ram));
        let mut regions: Vec<Region> = ram.chain(special.runs().map(region("special", RegionKind::Rom))).collect();
        regions.sort_unstable_by_key(|region| region.frames.start());
        let memory = MemoryMap::new(regions)?;
        let mut holes = memory.present();
        extents.iter().for_each(|extent| _ = holes.remove_range(extent.frames));
        Ok(Self { memory, extents: ExtentTable::new(extents, &[stream.length])?, holes })
    }
}

/// The frames that have memory in the end, and where the pages of them lie that are stored.
fn last_copies(stream: &Stream) -> (FrameSet, Vec<Extent>) {
    let frames_of = |first, count| FrameRange::checked(Gfn::checked(first)?, count);
    let ends = stream.pages.iter().filter(|run| run.place != PagePlace::Absent).map(|run| run.first + run.count.get());
    let universe = FrameRange::new(Gfn::new(0), PageCount::new(ends.max().unwrap_or(0)));
    let mut seen = FrameSet::empty(universe.count());
    let mut present = seen.clone();
    let mut extents = Vec::new();
    for run in stream.pages.iter().rev() {
        let Some(frames) = frames_of(run.first, run.count) else { continue };
        let frames = frames.intersection(universe);
        let news: Vec<FrameRange> = seen.gaps_in(frames).collect();
        seen.insert_range(frames);
        if run.place == PagePlace::Absent {
            continue;
        }
        for gap in news {
            present.insert_range(gap);
            if let PagePlace::Stored(offset) = run.place {
                extents.push(Extent { frames, file: 0, offset, stride: PAGE_SIZE as u32 }.slice(gap));
            }
        }
    }
    extents.sort_unstable_by_key(|extent| extent.frames.start());
    (present, extents)
}

/// The runs of `ram`, at most `limit` of them: where there are more, as in a guest that gave single pages back, the smallest
/// gaps are closed. What is in a closed gap is as good as zero, since a guest does not touch what it gave back.
fn join_runs(ram: &FrameSet, special: &FrameSet, limit: usize) -> Vec<FrameRange> {
    let mut runs: Vec<FrameRange> = ram.runs().collect();
    let Some(surplus) = runs.len().checked_sub(limit).filter(|surplus| *surplus > 0) else {
        return runs;
    };
    let gaps = runs.windows(2).map(|pair| FrameRange::between(pair[0].end(), pair[1].start()));
    let closable = |gap: &FrameRange| special.runs_in(*gap).next().is_none();
    let mut gaps: Vec<FrameRange> = gaps.filter(closable).collect();
    gaps.sort_by_key(|gap| gap.count());
    let mut closed: Vec<Gfn> = gaps.into_iter().take(surplus).map(FrameRange::start).collect();
    closed.sort_unstable();
    runs.dedup_by(|next, run| {
        let joined = closed.binary_search(&run.end()).is_ok();
        if joined {
            *run = FrameRange::between(run.start(), next.end());
        }
        joined
    });
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Span;
    use crate::import::xen::stream::testing::{StreamBuilder, XTAB, sample};

    fn range(start: u64, count: u64) -> FrameRange {
        FrameRange::new(Gfn::new(start), PageCount::new(count))
    }

    fn layout(bytes: &[u8]) -> Result<Layout, LayoutError> {
        Layout::new(&Stream::parse(&mut &bytes[..]).unwrap())
    }

    fn regions(layout: &Layout) -> Vec<(&str, FrameRange, RegionKind)> {
        layout.memory.regions().iter().map(|r| (r.name.as_str(), r.frames, r.kind)).collect()
    }

    /// The byte that fills the page of each frame; `None` where the frame is not stored.
    fn fills(layout: &Layout, bytes: &[u8], frames: FrameRange) -> Vec<Option<u8>> {
        let fill = |span| match span {
            Span::Hole(hole) => vec![None; hole.count().get() as usize],
            Span::Stored(extent) => {
                let page = |gfn| &bytes[extent.offset_of(gfn) as usize..][..4096];
                extent.frames.frames().map(|gfn| Some(page(gfn)[0]).filter(|fill| page(gfn) == [*fill; 4096])).collect()
            }
        };
        layout.extents.spans(frames).flat_map(fill).collect()
    }

    #[test]
    fn the_last_copy_of_a_page_wins() {
        let bytes = sample();
        let layout = layout(&bytes).unwrap();
        let expected = [
            ("ram-0", range(0, 4), RegionKind::Ram),
            ("ram-5", range(5, 3), RegionKind::Ram),
            ("special-fc000", range(0xfc000, 2), RegionKind::Rom),
            ("special-feffc", range(0xfeffc, 1), RegionKind::Rom),
            ("ram-100000", range(0x100000, 2), RegionKind::Ram),
        ];
        assert_eq!(regions(&layout), expected);
        let ram = [Some(0xa0), Some(0xb1), Some(0xa2), Some(0xa3), None, Some(0xb5), None, Some(0xa7)];
        assert_eq!(fills(&layout, &bytes, range(0, 8)), ram);
        assert_eq!(fills(&layout, &bytes, range(0x100000, 2)), [Some(0xc0), Some(0xc1)]);
        assert_eq!(layout.holes.runs().collect::<Vec<_>>(), [range(6, 1)]);
    }

    #[test]
    fn pages_in_a_row_are_one_extent() {
        let pages: Vec<_> = (0xfbf9d..0xfc001).map(|pfn| (pfn, Some(pfn as u8))).collect();
        let bytes = StreamBuilder::new("").page_data(&pages).state(1, &[]).end().bytes;
        let layout = layout(&bytes).unwrap();
        assert_eq!(layout.extents.extents().len(), 1);
        assert!(layout.extents.extents()[0].is_contiguous() && layout.holes.is_empty());
    }

    #[test]
    fn a_large_pvh_guest_has_memory_up_to_its_tables() {
        let pages = [0xefff0, 0xf0000, 0xfbfff, 0xfc000, 0xfefff, 0x100000].map(|pfn| (pfn, Some(1)));
        let stream = |config| StreamBuilder::new(config).page_data(&pages).state(1, &[(17, 0xfefff)]).end().bytes;
        let kinds = |bytes: &[u8]| layout(bytes).unwrap().memory.regions().iter().map(|r| r.kind).collect::<Vec<_>>();
        use RegionKind::{Ram, Rom};
        assert_eq!(kinds(&stream(r#"{"c_info": {"type": "pvh"}}"#)), [Ram, Ram, Ram, Rom, Rom, Ram]);
        assert_eq!(kinds(&stream(r#"{"c_info": {"type": "hvm"}}"#)), [Ram, Rom, Rom, Rom, Ram]);
    }

    #[test]
    fn a_guest_in_shreds_is_joined_at_its_smallest_gaps() {
        // Every second page is given back, in one place three in a row.
        let pages: Vec<_> = (0..4000).filter(|pfn| pfn % 2 == 0 && *pfn != 1000).map(|pfn| (pfn, Some(7))).collect();
        let gone: Vec<_> = (0..4000).filter(|pfn| pfn % 2 == 1).map(|pfn| (pfn | XTAB, None)).collect();
        let stream = StreamBuilder::new("").page_data(&pages).page_data(&gone).page_data(&[(0xfc000, Some(1))]);
        let layout = layout(&stream.state(1, &[]).end().bytes).unwrap();
        assert_eq!(layout.memory.regions().len(), MemoryMap::MAX_REGIONS);
        assert!(layout.memory.region_of(Gfn::new(1000)).is_none(), "the large gap stays");
        assert_eq!(layout.memory.frame_count().get(), 2000 + (1999 - MemoryMap::MAX_REGIONS as u64 + 1));
        assert_eq!(layout.holes.count() + PageCount::new(2000), layout.memory.frame_count());
    }

    #[test]
    fn too_many_or_no_special_pages_are_refused() {
        let pages: Vec<_> = (0..600).map(|index| (0xfc000 + 2 * index, Some(1))).collect();
        let bytes = StreamBuilder::new("").page_data(&pages).state(1, &[]).end().bytes;
        assert!(matches!(layout(&bytes), Err(LayoutError::Special { runs: 600, .. })));
        let none = StreamBuilder::new("").page_data(&[(3, Some(1))]).state(1, &[]).end().bytes;
        assert!(matches!(layout(&none), Err(LayoutError::NoSpecial)));
        let gone = StreamBuilder::new("").page_data(&[(3, Some(1))]).page_data(&[(3 | XTAB, None)]);
        let empty = layout(&gone.state(1, &[]).end().bytes);
        assert!(matches!(empty, Err(LayoutError::Memory(MemoryMapError::NoRegions))));
    }
}
