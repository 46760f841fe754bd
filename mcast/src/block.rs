use std::ops::Range;

use descriptor::fetch::Class;
use descriptor::image::Content;
use descriptor::{FrameRange, Gfn, PageCount};
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

use crate::{Geometry, Serial, wire};

/// A block: the unit of repair. Each class numbers its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockId {
    /// Whether someone waits for its pages.
    pub class: Class,
    /// Its number in the class.
    pub number: Serial,
}

/// The place of a class in the arrays that have one element for each: demand, then bulk.
pub const fn class_index(class: Class) -> usize {
    match class {
        Class::Demand => 0,
        Class::Bulk => 1,
    }
}

/// Which frames are in a block: up to [`BlockMap::MAX_RUNS`] runs in ascending order, each of stored or of zero frames.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct BlockMap {
    runs: [Run; Self::MAX_RUNS],
    length: u8,
}

/// A piece of a shard, for whoever gathers its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// These bytes of [`BlockMap::encode`].
    Map(Range<usize>),
    /// `length` bytes of `frames`, which follow each other, after the first `skip`; every frame has some of them.
    Pages {
        /// The frames, stored ones.
        frames: FrameRange,
        /// Bytes of the first frame that are not part of the piece.
        skip: usize,
        /// Bytes of the piece.
        length: usize,
    },
}

/// Why bytes are no map.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MapError {
    /// Not as long as a map.
    #[error("a block map of {0} bytes")]
    Length(usize),
    /// A map without a run.
    #[error("a block map without frames")]
    Empty,
    /// A kind that this version does not know.
    #[error("run {run} of a block map has kind {kind}")]
    Kind {
        /// The run.
        run: usize,
        /// Its kind.
        kind: u16,
    },
    /// A run after an unused one, or an unused one that is not blank.
    #[error("run {0} of a block map stands after the end")]
    AfterEnd(usize),
    /// A run without frames.
    #[error("run {0} of a block map is empty")]
    NoFrames(usize),
    /// A run that begins before the one before it ends.
    #[error("run {0} of a block map is out of order")]
    Order(usize),
    /// A run that ends beyond the image.
    #[error("run {0} of a block map lies beyond the image")]
    Beyond(usize),
    /// More stored pages than a block has.
    #[error("a block map with {0} stored pages")]
    Pages(u32),
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Run {
    gfn: u32,
    count: u16,
    content: Content,
}

const UNUSED: Run = Run { gfn: 0, count: 0, content: Content::Zero };

impl BlockMap {
    /// Runs in a map.
    pub const MAX_RUNS: usize = Geometry::MAP / size_of::<wire::MapRun>();

    /// Bytes of a map.
    pub const LENGTH: usize = Geometry::MAP;

    /// Frames in a run of zeros, at most.
    pub const MAX_RUN: PageCount = PageCount::new(u16::MAX as u64);

    /// A map without frames.
    pub const fn new() -> Self {
        Self { runs: [UNUSED; Self::MAX_RUNS], length: 0 }
    }

    /// Adds `frames` behind those that are there, to the last run where they continue it; false when there is no room for all
    /// of them in the runs, or for stored ones in [`Geometry::MAX_PAGES`], and the map is then as it was.
    ///
    /// # Panics
    /// When the frames are not behind those that are there, none, or beyond [`crate::ChannelParameters::MAX_FRAMES`].
    pub fn push(&mut self, frames: FrameRange, content: Content) -> bool {
        let (start, count) = (frames.start().index(), frames.count().get());
        assert!(count > 0 && frames.end().index() <= u32::MAX.into(), "frames {frames} in a block");
        assert!(self.end() <= start, "frames {frames} in a block that reaches to {:#x}", self.end());
        if count > Self::MAX_RUN.get()
            || (content == Content::Stored && u64::from(self.pages()) + count > Geometry::MAX_PAGES.into())
        {
            return false;
        }
        if let Some(last) = self.used_mut().last_mut()
            && last.content == content
            && last.end() == start
            && u64::from(last.count) + count <= Self::MAX_RUN.get()
        {
            last.count += count as u16;
            return true;
        }
        let Some(free) = self.runs.get_mut(usize::from(self.length)) else {
            return false;
        };
        *free = Run { gfn: start as u32, count: count as u16, content };
        self.length += 1;
        true
    }

    /// The map in `bytes`, for an image of `frames` frames.
    ///
    /// # Errors
    /// When the bytes are no map, or one that leads out of the image.
    pub fn decode(bytes: &[u8], frames: PageCount) -> Result<Self, MapError> {
        let runs =
            <[wire::MapRun; Self::MAX_RUNS]>::read_from_bytes(bytes).map_err(|_| MapError::Length(bytes.len()))?;
        let mut map = Self::new();
        for (at, run) in runs.iter().enumerate() {
            let content = match run.kind.get() {
                wire::MapRun::UNUSED if run.gfn.get() == 0 && run.count.get() == 0 => continue,
                wire::MapRun::STORED => Content::Stored,
                wire::MapRun::ZERO => Content::Zero,
                wire::MapRun::UNUSED => return Err(MapError::AfterEnd(at)),
                kind => return Err(MapError::Kind { run: at, kind }),
            };
            map.append(at, Run { gfn: run.gfn.get(), count: run.count.get(), content }, frames)?;
        }
        match map.pages() {
            _ if map.is_empty() => Err(MapError::Empty),
            pages if pages > Geometry::MAX_PAGES => Err(MapError::Pages(pages)),
            _ => Ok(map),
        }
    }

    /// The map as it opens the block's stream.
    pub fn encode(&self) -> [u8; Self::LENGTH] {
        let runs: [wire::MapRun; Self::MAX_RUNS] = std::array::from_fn(|at| match self.used().get(at) {
            None => wire::MapRun { gfn: 0.into(), count: 0.into(), kind: wire::MapRun::UNUSED.into() },
            Some(run) => {
                let kind = if run.content == Content::Stored { wire::MapRun::STORED } else { wire::MapRun::ZERO };
                wire::MapRun { gfn: run.gfn.into(), count: run.count.into(), kind: kind.into() }
            }
        });
        let mut bytes = [0; Self::LENGTH];
        bytes.copy_from_slice(runs.as_bytes());
        bytes
    }

    /// True for a map without frames.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The runs in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = (FrameRange, Content)> {
        self.used().iter().map(|run| (run.frames(), run.content))
    }

    /// The number of stored pages.
    pub fn pages(&self) -> u32 {
        self.stored().map(|run| u32::from(run.count)).sum()
    }

    /// The number of shards.
    pub fn shards(&self, geometry: Geometry) -> u32 {
        geometry.shards_of(self.pages())
    }

    /// The frame of a stored page.
    pub fn frame_of(&self, page: u32) -> Option<Gfn> {
        self.frames_of(page..page.checked_add(1)?).next().map(|(_, frames)| frames.start())
    }

    /// The frames of these stored pages, each run of them with its first page; pages that the block has not are left out.
    pub fn frames_of(&self, pages: Range<u32>) -> impl Iterator<Item = (u32, FrameRange)> {
        let mut before = 0;
        self.stored().filter_map(move |run| {
            let first = before;
            before += u32::from(run.count);
            let (start, end) = (pages.start.max(first), pages.end.min(before));
            let frames = (start < end).then(|| {
                FrameRange::new(Gfn::new(u64::from(run.gfn + (start - first))), PageCount::new(u64::from(end - start)))
            })?;
            Some((start, frames))
        })
    }

    /// The frame of the first page byte in `shard`, which the shard's header names; zero where there is none.
    pub fn named_by(&self, geometry: Geometry, shard: u8) -> Gfn {
        self.frame_of(geometry.first_page(shard)).unwrap_or(Gfn::new(0))
    }

    /// The pieces that make `shard`, in order; together they are as long as [`Geometry::shard_span`] says.
    pub fn pieces(&self, geometry: Geometry, shard: u8) -> impl Iterator<Item = Piece> {
        let pages = self.pages();
        let span = geometry.shard_span(shard, pages);
        let map = (span.start < Self::LENGTH).then(|| Piece::Map(span.start..span.end.min(Self::LENGTH)));
        let pages = self.frames_of(geometry.pages_in(shard, pages)).map(move |(page, frames)| {
            let stream = geometry.page_span(page).start;
            let end = stream + frames.count().bytes() as usize;
            let (from, to) = (span.start.max(stream), span.end.min(end));
            Piece::Pages { frames, skip: from - stream, length: to - from }
        });
        map.into_iter().chain(pages)
    }

    fn append(&mut self, at: usize, run: Run, frames: PageCount) -> Result<(), MapError> {
        if at != usize::from(self.length) {
            return Err(MapError::AfterEnd(at));
        }
        if run.count == 0 {
            return Err(MapError::NoFrames(at));
        }
        if u64::from(run.gfn) < self.end() {
            return Err(MapError::Order(at));
        }
        if run.end() > frames.get().min(u32::MAX.into()) {
            return Err(MapError::Beyond(at));
        }
        self.runs[at] = run;
        self.length += 1;
        Ok(())
    }

    /// The frame after the last.
    fn end(&self) -> u64 {
        self.used().last().map_or(0, |run| run.end())
    }

    fn used(&self) -> &[Run] {
        &self.runs[..usize::from(self.length)]
    }

    fn used_mut(&mut self) -> &mut [Run] {
        &mut self.runs[..usize::from(self.length)]
    }

    fn stored(&self) -> impl Iterator<Item = &Run> {
        self.used().iter().filter(|run| run.content == Content::Stored)
    }
}

impl Default for BlockMap {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for BlockMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.runs()).finish()
    }
}

impl Run {
    fn frames(self) -> FrameRange {
        FrameRange::new(Gfn::new(self.gfn.into()), PageCount::new(self.count.into()))
    }

    fn end(self) -> u64 {
        u64::from(self.gfn) + u64::from(self.count)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ChannelParameters;

    const FRAMES: PageCount = PageCount::new(1 << 20);

    fn range(start: u64, count: u64) -> FrameRange {
        FrameRange::new(Gfn::new(start), PageCount::new(count))
    }

    fn map(runs: &[(u64, u64, Content)]) -> BlockMap {
        let mut map = BlockMap::new();
        runs.iter().for_each(|(start, count, content)| assert!(map.push(range(*start, *count), *content)));
        map
    }

    fn any_map() -> impl Strategy<Value = BlockMap> {
        let run = (0..3_u64, 1..30_u64, any::<bool>());
        proptest::collection::vec(run, 1..20).prop_map(|runs| {
            let (mut map, mut at) = (BlockMap::new(), 5);
            for (gap, count, stored) in runs {
                let content = if stored { Content::Stored } else { Content::Zero };
                if !map.push(range(at + gap, count), content) {
                    break;
                }
                at += gap + count;
            }
            map
        })
    }

    #[test]
    fn golden_map() {
        let map = map(&[(0x1234, 3, Content::Stored), (0x1237, 0xffff, Content::Zero)]);
        let mut expected = b"\x34\x12\0\0\x03\0\x01\0\x37\x12\0\0\xff\xff\x02\0".to_vec();
        expected.resize(128, 0);
        assert_eq!(map.encode()[..], expected);
        assert_eq!(BlockMap::decode(&expected, FRAMES), Ok(map));
    }

    #[test]
    fn runs_that_continue_are_one() {
        let mut map = map(&[(10, 5, Content::Stored), (15, 5, Content::Stored)]);
        assert_eq!(map.runs().collect::<Vec<_>>(), [(range(10, 10), Content::Stored)]);
        assert!(!map.push(range(20, 247), Content::Stored), "more pages than a block has");
        assert!(!map.push(range(20, 0x10000), Content::Zero), "more than a run has");
        assert!(map.push(range(20, 246), Content::Stored) && map.push(range(266, 0xffff), Content::Zero));
        assert!(map.push(range(0x10109, 1), Content::Zero), "a second run of zeros, for the first is full");
        assert_eq!(map.runs().count(), 3);
        for at in 0..13 {
            assert!(map.push(range(0x20000 + 2 * at, 1), Content::Zero));
        }
        let full = map;
        assert!(!map.push(range(0x30000, 1), Content::Zero) && map == full);
    }

    #[test]
    fn pages_are_counted_over_stored_runs() {
        let map = map(&[(10, 2, Content::Stored), (12, 9, Content::Zero), (30, 3, Content::Stored)]);
        assert_eq!(map.pages(), 5);
        assert_eq!((map.frame_of(1), map.frame_of(2), map.frame_of(5)), (Some(Gfn::new(11)), Some(Gfn::new(30)), None));
        assert_eq!(map.frames_of(1..4).collect::<Vec<_>>(), [(1, range(11, 1)), (2, range(30, 2))]);
    }

    #[test]
    fn pieces_of_shards() {
        let geometry = Geometry::new(1448);
        let map = map(&[(10, 1, Content::Stored), (30, 3, Content::Stored)]);
        let pieces = |shard| map.pieces(geometry, shard).collect::<Vec<_>>();
        assert_eq!(pieces(0), [Piece::Map(0..128), Piece::Pages { frames: range(10, 1), skip: 0, length: 1320 }]);
        assert_eq!(
            pieces(2),
            [
                Piece::Pages { frames: range(10, 1), skip: 2768, length: 1328 },
                Piece::Pages { frames: range(30, 1), skip: 0, length: 120 }
            ]
        );
        assert_eq!((map.named_by(geometry, 2), map.named_by(geometry, 3)), (Gfn::new(10), Gfn::new(30)));
        let zeros = self::map(&[(10, 1, Content::Zero)]);
        assert_eq!(zeros.pieces(geometry, 0).collect::<Vec<_>>(), [Piece::Map(0..128)]);
        assert_eq!(zeros.named_by(geometry, 0), Gfn::new(0));
    }

    #[test]
    fn malformed_maps_name_their_fault() {
        let good = map(&[(10, 5, Content::Stored), (20, 5, Content::Zero)]).encode();
        let broken = |changes: &[(usize, u8)]| {
            let mut bytes = good;
            changes.iter().for_each(|(at, value)| bytes[*at] = *value);
            BlockMap::decode(&bytes, FRAMES).unwrap_err()
        };
        assert_eq!(BlockMap::decode(&good[1..], FRAMES), Err(MapError::Length(127)));
        assert_eq!(BlockMap::decode(&[0; 128], FRAMES), Err(MapError::Empty));
        assert_eq!(broken(&[(6, 3)]), MapError::Kind { run: 0, kind: 3 });
        assert_eq!(broken(&[(0, 0), (4, 0), (6, 0)]), MapError::AfterEnd(1));
        assert_eq!(broken(&[(120, 9)]), MapError::AfterEnd(15));
        assert_eq!(broken(&[(12, 0)]), MapError::NoFrames(1));
        assert_eq!(broken(&[(8, 14)]), MapError::Order(1));
        assert_eq!(broken(&[(10, 0x10)]), MapError::Beyond(1));
        assert_eq!(broken(&[(5, 1), (9, 2)]), MapError::Pages(261));
        assert_eq!(BlockMap::decode(&good, PageCount::new(24)), Err(MapError::Beyond(1)));
        assert!(BlockMap::decode(&good, PageCount::new(25)).is_ok());
        let last = ChannelParameters::MAX_FRAMES.get() - 1;
        let end = map(&[(last, 1, Content::Stored)]);
        assert_eq!(BlockMap::decode(&end.encode(), PageCount::new(1 << 40)), Ok(end));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn maps_come_back(map in any_map()) {
            prop_assert_eq!(BlockMap::decode(&map.encode(), FRAMES), Ok(map));
        }

        #[test]
        fn any_bytes_make_a_map_or_an_error(bytes in proptest::collection::vec(0..3_u8, 128)) {
            if let Ok(map) = BlockMap::decode(&bytes, FRAMES) {
                prop_assert_eq!(&map.encode()[..], bytes);
            }
        }

        #[test]
        fn pieces_make_the_stream(map in any_map(), payload in 512..10000_u16) {
            let geometry = Geometry::new(payload);
            prop_assume!(map.pages() <= geometry.pages_per_block());
            // A byte of the stream by what it is: a byte of the map, or of a frame.
            let (mut got, mut expected) = (Vec::new(), Vec::new());
            expected.extend((0..128).map(|at| (None, at)));
            for (_, frames) in map.frames_of(0..256) {
                expected.extend(frames.frames().flat_map(|gfn| (0..4096).map(move |at| (Some(gfn), at))));
            }
            for shard in 0..map.shards(geometry) as u8 {
                let start = got.len();
                for piece in map.pieces(geometry, shard) {
                    match piece {
                        Piece::Map(bytes) => got.extend(bytes.map(|at| (None, at))),
                        Piece::Pages { frames, skip, length } => {
                            prop_assert!(skip < 4096 && skip + length > (frames.count().get() as usize - 1) * 4096);
                            got.extend((skip..skip + length).map(|at| (Some(frames.start() + PageCount::new((at / 4096) as u64)), at % 4096)));
                        }
                    }
                }
                prop_assert_eq!(start..got.len(), geometry.shard_span(shard, map.pages()));
                let first = got[start..].iter().find_map(|(gfn, _)| *gfn);
                prop_assert_eq!(map.named_by(geometry, shard), first.unwrap_or(Gfn::new(0)));
            }
            prop_assert!(got == expected);
        }
    }
}
