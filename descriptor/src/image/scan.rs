use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::sparse::data_within;
use super::zero::zero_runs;
use super::{Extent, ImageError, ImageReader, Span};
use crate::introspect::is_note;
use crate::{FrameRange, FrameSet, Gfn, PAGE_SIZE, PageCount};

/// What a thread takes on at a time: 16 MiB is some milliseconds of work, so that no thread waits long for the last one.
const PIECE: PageCount = PageCount::new(4096);

/// The most threads; a few of them saturate the memory bus.
const MAX_THREADS: usize = 8;

/// What a look at every page of an image has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// The frames that are stored and hold nothing but zeros.
    pub zero: FrameSet,
    /// The frames that begin like a note of the guest's kernel, in ascending order; see [`crate::introspect`].
    pub notes: Vec<Gfn>,
}

/// Notes kept; a guest may hold any number of forged ones, and an analysis refuses far fewer.
const MAX_NOTES: usize = 1024;

/// Looks at the stored pages of `frames`. Holes of sparse files are not read; whatever the index says of zero frames is not
/// believed.
///
/// `progress` is told of pages that were looked at, a few thousand at a time, from several threads.
///
/// # Errors
/// When a file cannot be read.
pub fn survey(
    image: &ImageReader,
    frames: &FrameSet,
    progress: &(dyn Fn(PageCount) + Sync),
) -> Result<Survey, ImageError> {
    let pieces: Vec<FrameRange> = frames.runs().flat_map(|run| run.chunks(PIECE)).collect();
    let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get).min(MAX_THREADS).min(pieces.len());
    let next = AtomicUsize::new(0);
    let work = || -> Result<Found, ImageError> {
        let mut found = Found::default();
        let mut scratch = Vec::new();
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            for span in image.index().extents.spans(*piece) {
                if let Span::Stored(extent) = span {
                    scan_extent(image, &extent, &mut scratch, &mut found)?;
                }
            }
            progress(piece.count());
        }
        Ok(found)
    };
    let mut survey = Survey { zero: FrameSet::empty(frames.universe()), notes: Vec::new() };
    let mut collect = |found: Result<Found, ImageError>| -> Result<(), ImageError> {
        let Found { zero, notes } = found?;
        zero.into_iter().for_each(|run| _ = survey.zero.insert_range(run));
        survey.notes.extend(notes);
        Ok(())
    };
    if threads <= 1 {
        collect(work())?;
    } else {
        thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            workers.into_iter().try_for_each(|worker| match worker.join() {
                Ok(found) => collect(found),
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })?;
    }
    // A file that was cut meanwhile would look like one with a hole at its end.
    image.check_lengths()?;
    survey.notes.sort_unstable();
    survey.notes.truncate(MAX_NOTES);
    Ok(survey)
}

/// The zero frames that a [`survey`] of `frames` finds.
///
/// # Errors
/// When a file cannot be read.
pub fn zero_frames(
    image: &ImageReader,
    frames: &FrameSet,
    progress: &(dyn Fn(PageCount) + Sync),
) -> Result<FrameSet, ImageError> {
    Ok(survey(image, frames, progress)?.zero)
}

/// What one thread has found.
#[derive(Default)]
struct Found {
    zero: Vec<FrameRange>,
    notes: Vec<Gfn>,
}

/// Appends the runs of zero pages of an extent.
fn scan_extent(
    image: &ImageReader,
    extent: &Extent,
    scratch: &mut Vec<u8>,
    found: &mut Found,
) -> Result<(), ImageError> {
    if !extent.is_contiguous() {
        return scan_stored(image, extent, scratch, found);
    }
    let mut rest = *extent;
    while !rest.frames.is_empty() {
        let data = next_data(image, &rest)?;
        let hole = FrameRange::between(rest.frames.start(), data.start());
        if !hole.is_empty() {
            found.zero.push(hole);
        }
        scan_stored(image, &rest.slice(data), scratch, found)?;
        rest = rest.slice(FrameRange::between(data.end(), rest.frames.end()));
    }
    Ok(())
}

/// The first frames of a contiguous extent that touch data in its file; none at its end when there are no more.
fn next_data(image: &ImageReader, extent: &Extent) -> Result<FrameRange, ImageError> {
    let frames = extent.frames;
    let end = extent.offset + frames.count().bytes();
    let (file, path) = image.file_of(extent);
    let data = data_within(file, extent.offset..end).map_err(|source| {
        let (path, offset, length) = (path.to_owned(), extent.offset, frames.count().bytes());
        ImageError::Read { path, offset, length, source }
    })?;
    let frame_at = |distance: u64| frames.start() + PageCount::new(distance);
    Ok(match data {
        Some(data) => FrameRange::between(
            frame_at((data.start - extent.offset) / PAGE_SIZE),
            frame_at((data.end - extent.offset).div_ceil(PAGE_SIZE)),
        ),
        None => FrameRange::new(frames.end(), PageCount::ZERO),
    })
}

fn scan_stored(
    image: &ImageReader,
    extent: &Extent,
    scratch: &mut Vec<u8>,
    found: &mut Found,
) -> Result<(), ImageError> {
    image.for_each_batch(extent, scratch, |batch, pages| {
        let frame = |index: u64| Gfn::new(batch.start().index() + index);
        found.zero.extend(zero_runs(pages).map(|(first, count)| FrameRange::new(frame(first), PageCount::new(count))));
        let notes = pages.chunks_exact(PAGE_SIZE as usize).zip(0..).filter(|(page, _)| is_note(page));
        let room = MAX_NOTES.saturating_sub(found.notes.len());
        found.notes.extend(notes.map(|(_, index)| frame(index)).take(room));
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use std::sync::atomic::AtomicU64;

    use proptest::prelude::*;

    use super::*;
    use crate::ImageId;
    use crate::image::{ExtentTable, ImageFile, ImageIndex};
    use crate::memory::{MemoryMap, PageSize, Region, RegionKind};

    const PAGE: u64 = PAGE_SIZE;

    /// An image of one file with one extent over all of its frames.
    fn image(folder: &Path, pages: u64, offset: u64, stride: u32, data: &[u64], written_zeros: &[u64]) -> ImageReader {
        let path = folder.join("image");
        let file = File::create(&path).unwrap();
        let length = offset + pages * u64::from(stride);
        file.set_len(length).unwrap();
        // One byte alone, at either end of the page in turn.
        for gfn in data {
            file.write_all_at(&[1], offset + gfn * u64::from(stride) + (gfn % 2) * (PAGE - 1)).unwrap();
        }
        for gfn in written_zeros.iter().filter(|gfn| !data.contains(gfn)) {
            file.write_all_at(&[0; PAGE as usize], offset + gfn * u64::from(stride)).unwrap();
        }
        let frames = FrameRange::new(Gfn::new(0), PageCount::new(pages));
        let extents = ExtentTable::new(vec![Extent { frames, file: 0, offset, stride }], &[length]).unwrap();
        let ram = Region { name: "ram".into(), frames, kind: RegionKind::Ram, page_size: PageSize::Base };
        let memory = MemoryMap::new(vec![ram]).unwrap();
        let index = ImageIndex {
            image: ImageId::from_bytes([1; 16]),
            zero: FrameSet::empty(memory.universe()),
            memory,
            files: vec![ImageFile { path, length }],
            extents,
        };
        ImageReader::new(index, folder).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn finds_every_zero_frame_and_no_other(
            data in proptest::collection::vec(0..700u64, 0..60),
            written_zeros in proptest::collection::vec(0..700u64, 0..60),
            offset in prop_oneof![Just(0), Just(4096), 1..5000u64],
            stride in prop_oneof![Just(4096), Just(4104), Just(20_000u32)],
        ) {
            let folder = tempfile::tempdir().unwrap();
            let image = image(folder.path(), 700, offset, stride, &data, &written_zeros);
            let all = image.index().memory.present();
            let zero = zero_frames(&image, &all, &|_| ()).unwrap();
            let mut expected = all;
            data.iter().for_each(|gfn| _ = expected.remove(Gfn::new(*gfn)));
            prop_assert_eq!(zero, expected);
        }
    }

    #[test]
    fn several_threads_find_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let data: Vec<u64> = (0..20_000).filter(|gfn| gfn % 97 == 0).collect();
        let image = image(folder.path(), 20_000, 0, 4096, &data, &[]);
        let seen = AtomicU64::new(0);
        let mut wanted = image.index().memory.present();
        wanted.remove(Gfn::new(5000));
        let zero = zero_frames(&image, &wanted, &|pages| _ = seen.fetch_add(pages.get(), Ordering::Relaxed)).unwrap();
        assert_eq!(seen.into_inner(), 19_999);
        assert_eq!(zero.count().get(), 20_000 - data.len() as u64 - 1);
        assert!(!zero.contains(Gfn::new(97)) && !zero.contains(Gfn::new(5000)) && zero.contains(Gfn::new(98)));
    }

    #[test]
    fn a_file_that_shrinks_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let image = image(folder.path(), 100, 0, 4096, &[99], &[]);
        let file = File::create(folder.path().join("image")).unwrap();
        let scan = || zero_frames(&image, &image.index().memory.present(), &|_| ());
        assert!(matches!(scan(), Err(ImageError::Length { actual: 0, .. })), "{:?}", scan());
        file.write_all_at(&[1], 50).unwrap();
        assert!(matches!(scan(), Err(ImageError::Read { .. })), "{:?}", scan());
    }
}
