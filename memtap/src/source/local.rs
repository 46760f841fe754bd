use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use descriptor::fetch::{Class, LocalImage, Tag};
use descriptor::image::{Extent, ExtentTable, Span};
use descriptor::{FrameRange, PAGE_SIZE, PageCount};

use super::SessionError;
use super::sys::Mapping;

/// The piece of a file that the kernel is told to map at once before bulk pages are taken from it, in bytes. Runs between
/// zero pages are often shorter than what a fault maps, and a fault within an installation costs more than the copy.
const WINDOW: u64 = 2 << 20;

/// The local lane: the image's files, mapped, and the requests that are yet to be answered from them.
pub(super) struct LocalLane {
    files: Vec<Mapping>,
    extents: ExtentTable,
    demand: VecDeque<Pending>,
    bulk: VecDeque<Pending>,
    /// The file and window that was mapped last.
    window: Option<(u16, u64)>,
    /// The longest run in one answer; runs end at multiples of it, so that whole huge pages stay together.
    piece: PageCount,
}

/// A request, or what is left of it.
struct Pending {
    tag: Tag,
    ranges: VecDeque<FrameRange>,
}

/// A piece of an answer; without bytes its pages are zeros.
pub(super) struct LocalPages<'a> {
    pub(super) tag: Tag,
    pub(super) frames: FrameRange,
    pub(super) bytes: Option<&'a [u8]>,
    pub(super) last: bool,
}

impl LocalLane {
    /// Maps the files that came with an IMAGE message, after checking that they are as long as its extents say.
    pub(super) fn new(image: LocalImage, files: &[OwnedFd], piece: PageCount) -> Result<Self, SessionError> {
        if files.len() != usize::from(image.files) {
            return Err(SessionError::Files { announced: image.files, came: files.len() });
        }
        let lengths: Vec<u64> = files
            .iter()
            .map(|file| rustix::fs::fstat(file).map(|stat| u64::try_from(stat.st_size).unwrap_or(0)))
            .collect::<Result<_, _>>()
            .map_err(|error| SessionError::Map(error.into()))?;
        let extents =
            ExtentTable::new(image.extents, &lengths).map_err(|error| SessionError::Protocol(error.into()))?;
        let files = files
            .iter()
            .zip(&lengths)
            .map(|(file, length)| Mapping::new(file.as_fd(), usize::try_from(*length).unwrap_or(usize::MAX)))
            .collect::<Result<_, _>>()
            .map_err(SessionError::Map)?;
        Ok(Self { files, extents, demand: VecDeque::new(), bulk: VecDeque::new(), window: None, piece })
    }

    /// Notes a request.
    pub(super) fn request(&mut self, tag: Tag, class: Class, ranges: &[FrameRange]) {
        let pending = Pending { tag, ranges: ranges.iter().copied().collect() };
        match class {
            Class::Demand => self.demand.push_back(pending),
            Class::Bulk => self.bulk.push_back(pending),
        }
    }

    /// True when no request is open.
    pub(super) fn is_idle(&self) -> bool {
        self.demand.is_empty() && self.bulk.is_empty()
    }

    /// The next piece of an answer, demand before bulk.
    pub(super) fn next(&mut self) -> Option<LocalPages<'_>> {
        let Self { files, extents, demand, bulk, window, piece } = self;
        let is_bulk = demand.is_empty();
        let queue = if is_bulk { bulk } else { demand };
        let pending = queue.front_mut()?;
        let range = *pending.ranges.front()?;
        let to_boundary = PageCount::new(piece.get() - range.start().index() % piece.get());
        let span = extents.spans(range.split_at(to_boundary).0).next()?;
        let (frames, bytes) = match span {
            Span::Hole(frames) => (frames, None),
            Span::Stored(extent) => {
                let next = (extent.file, extent.offset / WINDOW);
                if is_bulk && window.replace(next) != Some(next) {
                    populate(files, next);
                }
                stored(files, &extent)?
            }
        };
        let rest = range.split_at(frames.count()).1;
        pending.ranges.pop_front();
        if !rest.is_empty() {
            pending.ranges.push_front(rest);
        }
        let (tag, last) = (pending.tag, pending.ranges.is_empty());
        if last {
            queue.pop_front();
        }
        Some(LocalPages { tag, frames, bytes, last })
    }
}

/// The first pages of `extent` that lie together, as bytes of the mapping.
fn stored<'a>(files: &'a [Mapping], extent: &Extent) -> Option<(FrameRange, Option<&'a [u8]>)> {
    let together = if extent.is_contiguous() { extent.frames.count() } else { PageCount::ONE };
    let frames = extent.frames.split_at(together).0;
    let file = files.get(usize::from(extent.file))?;
    let place: Range<u64> = extent.offset..extent.offset + together.get() * PAGE_SIZE;
    Some((frames, Some(file.bytes(place)?)))
}

/// Has the kernel map a window of a file.
fn populate(files: &[Mapping], (file, window): (u16, u64)) {
    if let Some(file) = files.get(usize::from(file)) {
        file.populate(window * WINDOW..(window + 1) * WINDOW);
    }
}
