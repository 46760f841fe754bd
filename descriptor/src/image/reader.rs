use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::{Extent, ImageIndex, Span};
use crate::file::FileError;
use crate::memory::MemoryMap;
use crate::{FrameRange, Gfn, PAGE_SIZE, PageCount};

/// Pages read at once: 1 MiB keeps the buffer in the second-level cache and a system call's price out of sight.
const BATCH: PageCount = PageCount::new(256);

/// Pages farther apart than this are read one by one, because most of what lies between would be read in vain.
const DENSE_STRIDE: u32 = 2 * PAGE_SIZE as u32;

/// Reads pages of an image from its files, with `pread`.
#[derive(Debug)]
pub struct ImageReader {
    index: ImageIndex,
    files: Vec<OpenFile>,
}

#[derive(Debug)]
struct OpenFile {
    path: PathBuf,
    file: File,
}

/// An image that cannot be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The index cannot be read.
    #[error("cannot read the image's index")]
    Index(#[from] FileError),
    /// A file cannot be opened.
    #[error("cannot open {path}, a file of the image", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file is not the one that was indexed.
    #[error("{path} has {actual} bytes, but {expected} were indexed: it is not the image's file, or was changed", path = path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// The length that was indexed.
        expected: u64,
        /// The length it has.
        actual: u64,
    },
    /// A piece of a file cannot be read.
    #[error("cannot read {length} bytes at byte {offset} of {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Where the piece begins.
        offset: u64,
        /// Its length in bytes.
        length: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// Frames that the image does not have.
    #[error("not all of the frames {0} are in the image's memory map")]
    Absent(FrameRange),
}

/// Pages by frame, from an image's files or from wherever else they are.
pub trait ReadPages {
    /// The regions of memory.
    fn memory(&self) -> &MemoryMap;

    /// Reads the pages of `frames`, one behind the other, into `buffer`, which is as long as they are together.
    ///
    /// # Errors
    /// When a frame is absent, or cannot be read.
    fn read_pages(&self, frames: FrameRange, buffer: &mut [u8]) -> Result<(), ImageError>;
}

impl ReadPages for ImageReader {
    fn memory(&self) -> &MemoryMap {
        &self.index.memory
    }

    fn read_pages(&self, frames: FrameRange, buffer: &mut [u8]) -> Result<(), ImageError> {
        ImageReader::read_pages(self, frames, buffer)
    }
}

impl ImageReader {
    /// A reader of the image whose index lies at `path`.
    ///
    /// # Errors
    /// When the index or one of the image's files cannot be opened, or a file's length is not what was indexed.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        Self::new(ImageIndex::read(path)?, path.parent().unwrap_or(Path::new("")))
    }

    /// A reader of the image of `index`, whose relative paths count from the folder `base`.
    ///
    /// # Errors
    /// When one of the image's files cannot be opened, or its length is not what was indexed.
    pub fn new(index: ImageIndex, base: &Path) -> Result<Self, ImageError> {
        let mut files = Vec::with_capacity(index.files.len());
        for image_file in &index.files {
            let path = base.join(&image_file.path);
            let failed = |source| ImageError::Open { path: path.clone(), source };
            let file = File::open(&path).map_err(failed)?;
            files.push(OpenFile { path, file });
        }
        let reader = Self { index, files };
        reader.check_lengths()?;
        Ok(reader)
    }

    /// Checks that the files still have the lengths that were indexed.
    ///
    /// # Errors
    /// Names the first file that has not.
    pub fn check_lengths(&self) -> Result<(), ImageError> {
        for (open, indexed) in self.files.iter().zip(&self.index.files) {
            let path = open.path.clone();
            match open.file.metadata() {
                Ok(metadata) if metadata.len() == indexed.length => {}
                Ok(metadata) => {
                    return Err(ImageError::Length { path, expected: indexed.length, actual: metadata.len() });
                }
                Err(source) => return Err(ImageError::Open { path, source }),
            }
        }
        Ok(())
    }

    /// The index.
    pub fn index(&self) -> &ImageIndex {
        &self.index
    }

    /// The index, when the files are no longer needed.
    pub fn into_index(self) -> ImageIndex {
        self.index
    }

    /// Reads the page of `gfn`.
    ///
    /// # Errors
    /// When the frame is absent, or its file cannot be read.
    pub fn read_page(&self, gfn: Gfn, page: &mut [u8; PAGE_SIZE as usize]) -> Result<(), ImageError> {
        self.read_pages(FrameRange::single(gfn), page)
    }

    /// Reads the pages of `frames`, one behind the other, into `buffer`.
    ///
    /// # Errors
    /// When a frame is absent, or its file cannot be read.
    ///
    /// # Panics
    /// When `buffer` is not as long as the pages are together.
    pub fn read_pages(&self, frames: FrameRange, buffer: &mut [u8]) -> Result<(), ImageError> {
        assert_eq!(buffer.len() as u64, frames.count().bytes(), "the buffer does not fit {frames}");
        if !self.index.memory.covers(frames) {
            return Err(ImageError::Absent(frames));
        }
        let position = |gfn: Gfn| (gfn - frames.start()).bytes() as usize;
        for span in self.index.extents.spans(frames) {
            match span {
                Span::Hole(hole) => buffer[position(hole.start())..position(hole.end())].fill(0),
                Span::Stored(extent) if extent.is_contiguous() => {
                    let pages = &mut buffer[position(extent.frames.start())..position(extent.frames.end())];
                    self.pread(&extent, extent.offset, pages)?;
                }
                Span::Stored(extent) => self.for_each_batch(&extent, &mut Vec::new(), |batch, pages| {
                    buffer[position(batch.start())..position(batch.end())].copy_from_slice(pages);
                })?,
            }
        }
        for zero in self.index.zero.runs_in(frames) {
            buffer[position(zero.start())..position(zero.end())].fill(0);
        }
        Ok(())
    }

    /// Reads all pages of an extent as they are stored, and hands them over in ascending order, some at a time.
    pub(super) fn for_each_batch(
        &self,
        extent: &Extent,
        scratch: &mut Vec<u8>,
        mut each: impl FnMut(FrameRange, &[u8]),
    ) -> Result<(), ImageError> {
        let stride = extent.stride as usize;
        let dense = extent.is_contiguous() || extent.stride <= DENSE_STRIDE;
        for batch in extent.frames.chunks(if dense { BATCH } else { PageCount::ONE }) {
            let count = batch.count().get() as usize;
            let length = (count - 1) * stride + PAGE_SIZE as usize;
            if scratch.len() < length {
                scratch.resize(length, 0);
            }
            let block = &mut scratch[..length];
            self.pread(extent, extent.offset_of(batch.start()), block)?;
            if extent.is_contiguous() {
                each(batch, block);
            } else {
                for (gfn, slot) in batch.frames().zip(block.chunks(stride)) {
                    each(FrameRange::single(gfn), &slot[..PAGE_SIZE as usize]);
                }
            }
        }
        Ok(())
    }

    /// The file of an extent and its path.
    pub(super) fn file_of(&self, extent: &Extent) -> (&File, &Path) {
        // The table was checked against the list of files when it was made.
        let open = &self.files[usize::from(extent.file)];
        (&open.file, &open.path)
    }

    fn pread(&self, extent: &Extent, offset: u64, buffer: &mut [u8]) -> Result<(), ImageError> {
        let (file, path) = self.file_of(extent);
        file.read_exact_at(buffer, offset).map_err(|source| {
            let (path, length) = (path.to_owned(), buffer.len() as u64);
            ImageError::Read { path, offset, length, source }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{ExtentTable, ImageFile};
    use crate::memory::{PageSize, Region, RegionKind};
    use crate::{FrameSet, ImageId};

    const PAGE: usize = PAGE_SIZE as usize;

    fn range(start: u64, count: u64) -> FrameRange {
        FrameRange::new(Gfn::new(start), PageCount::new(count))
    }

    /// Frame n is full of the byte n, but 5 is stored as zeros, 6 is said to be zero, and 30 to 39 are stored nowhere.
    fn image(folder: &Path) -> ImageIndex {
        let page = |gfn: u64| [if gfn == 5 { 0 } else { gfn as u8 }; PAGE];
        let plain: Vec<u8> = (0..10).flat_map(page).collect();
        let strided: Vec<u8> = (10..20).flat_map(|gfn| [&[0xee; 8], page(gfn).as_slice()].concat()).collect();
        let sparse: Vec<u8> = (20..30).flat_map(|gfn| [page(gfn), [0xee; PAGE], [0xee; PAGE]].concat()).collect();
        let contents = [("plain", plain), ("strided", strided), ("sparse", sparse)];
        let files: Vec<ImageFile> = contents
            .into_iter()
            .map(|(name, bytes)| {
                std::fs::write(folder.join(name), &bytes).unwrap();
                ImageFile { path: name.into(), length: bytes.len() as u64 }
            })
            .collect();
        let lengths: Vec<u64> = files.iter().map(|file| file.length).collect();
        let extents = vec![
            Extent { frames: range(0, 10), file: 0, offset: 0, stride: 4096 },
            Extent { frames: range(10, 10), file: 1, offset: 8, stride: 4104 },
            Extent { frames: range(20, 10), file: 2, offset: 0, stride: 3 * 4096 },
        ];
        let ram = Region { name: "ram".into(), frames: range(0, 40), kind: RegionKind::Ram, page_size: PageSize::Base };
        ImageIndex {
            image: ImageId::from_bytes([1; 16]),
            memory: MemoryMap::new(vec![ram]).unwrap(),
            files,
            extents: ExtentTable::new(extents, &lengths).unwrap(),
            zero: FrameSet::from_ranges(PageCount::new(40), [range(6, 1)]),
        }
    }

    fn expected(gfn: u64) -> u8 {
        if matches!(gfn, 5 | 6 | 30..) { 0 } else { gfn as u8 }
    }

    #[test]
    fn pages_come_from_wherever_they_lie() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.snowidx");
        image(folder.path()).write(&path).unwrap();
        let reader = ImageReader::open(&path).unwrap();
        let mut page = [0; PAGE];
        for gfn in 0..40 {
            reader.read_page(Gfn::new(gfn), &mut page).unwrap();
            assert_eq!(page, [expected(gfn); PAGE], "frame {gfn}");
        }
        for (start, count) in [(0, 40), (7, 8), (19, 3), (35, 5), (3, 0)] {
            let mut pages = vec![0xff; count as usize * PAGE];
            reader.read_pages(range(start, count), &mut pages).unwrap();
            let wanted: Vec<u8> = (start..start + count).flat_map(|gfn| [expected(gfn); PAGE]).collect();
            assert!(pages == wanted, "frames {start}+{count}");
        }
        let absent = reader.read_pages(range(39, 2), &mut [0; 2 * PAGE]);
        assert!(matches!(absent, Err(ImageError::Absent(_))));
    }

    #[test]
    fn changed_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let index = image(folder.path());
        let reader = ImageReader::new(index.clone(), folder.path()).unwrap();
        let file = File::options().write(true).open(folder.path().join("strided")).unwrap();
        file.set_len(5 * 4104).unwrap();
        let refused = ImageReader::new(index.clone(), folder.path()).unwrap_err();
        assert!(matches!(refused, ImageError::Length { actual: 20520, expected: 41040, .. }));
        let cut = reader.read_page(Gfn::new(15), &mut [0; PAGE]).unwrap_err();
        assert!(matches!(cut, ImageError::Read { offset: 20528, length: 4096, .. }), "{cut:?}");
        std::fs::remove_file(folder.path().join("plain")).unwrap();
        assert!(matches!(ImageReader::new(index, folder.path()), Err(ImageError::Open { .. })));
    }
}
