use thiserror::Error;

use crate::{FrameRange, Gfn, PAGE_SIZE, PageCount};

/// A run of frames whose pages lie at equal distances in one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The frames, never none.
    pub frames: FrameRange,
    /// The index of the file in the image's list of files.
    pub file: u16,
    /// The offset in bytes of the first frame's page; any number, pages in a stream are not aligned.
    pub offset: u64,
    /// The distance in bytes from one page to the next, at least [`PAGE_SIZE`]; equal to it where pages are contiguous.
    pub stride: u32,
}

impl Extent {
    /// True when the pages follow each other without gaps, so that they can be sent or mapped as one piece.
    pub fn is_contiguous(&self) -> bool {
        u64::from(self.stride) == PAGE_SIZE || self.frames.count() == PageCount::ONE
    }

    /// The offset in bytes of the page of `gfn`, which must be one of the extent's frames.
    pub fn offset_of(&self, gfn: Gfn) -> u64 {
        self.offset + (gfn - self.frames.start()).get() * u64::from(self.stride)
    }

    /// The part of the extent that holds `range`, which must lie within its frames.
    pub fn slice(&self, range: FrameRange) -> Extent {
        Extent { frames: range, offset: self.offset_of(range.start()), ..*self }
    }

    /// The offset after the last byte of the last page; `None` when it overflows.
    fn end(&self) -> Option<u64> {
        let steps = self.frames.count().get().checked_sub(1)?;
        steps.checked_mul(u64::from(self.stride))?.checked_add(PAGE_SIZE)?.checked_add(self.offset)
    }
}

/// The extents of an image in ascending order of frames; a frame in none of them has no bytes: it is zero, free or absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtentTable {
    extents: Vec<Extent>,
}

/// What a table says of a run of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// Pages in a file.
    Stored(Extent),
    /// Frames without bytes.
    Hole(FrameRange),
}

/// Extents that make no table.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExtentError {
    /// An extent without frames.
    #[error("the extent at frame {0} is empty")]
    Empty(Gfn),
    /// An extent that begins below the end of the one before.
    #[error("the extent at frame {0} overlaps the one before it")]
    Overlap(Gfn),
    /// Pages that would overlap in the file.
    #[error("the extent at frame {gfn} has its pages {stride} bytes apart, less than a page")]
    Stride {
        /// The first frame.
        gfn: Gfn,
        /// The distance between two pages in bytes.
        stride: u32,
    },
    /// A file that the image does not have.
    #[error("the extent at frame {gfn} lies in file {file}, but the image has {files} files")]
    NoSuchFile {
        /// The first frame.
        gfn: Gfn,
        /// The file's index.
        file: u16,
        /// How many files there are.
        files: usize,
    },
    /// Pages beyond the end of the file.
    #[error("the extent at frame {gfn} reaches beyond the {length} bytes of file {file}")]
    BeyondFile {
        /// The first frame.
        gfn: Gfn,
        /// The file's index.
        file: u16,
        /// The file's length in bytes.
        length: u64,
    },
}

impl ExtentTable {
    /// The table of these extents, in ascending order, over files of these lengths in bytes.
    ///
    /// # Errors
    /// When an extent is empty, out of order, or does not lie in its file as a whole.
    pub fn new(extents: Vec<Extent>, file_lengths: &[u64]) -> Result<Self, ExtentError> {
        let table = Self { extents };
        table.check(file_lengths)?;
        Ok(table)
    }

    /// Checks the table against files of these lengths in bytes.
    ///
    /// # Errors
    /// As [`ExtentTable::new`].
    pub fn check(&self, file_lengths: &[u64]) -> Result<(), ExtentError> {
        let mut end = Gfn::new(0);
        for extent in &self.extents {
            let (gfn, file, stride) = (extent.frames.start(), extent.file, extent.stride);
            if extent.frames.is_empty() {
                return Err(ExtentError::Empty(gfn));
            }
            if gfn < end {
                return Err(ExtentError::Overlap(gfn));
            }
            if u64::from(stride) < PAGE_SIZE {
                return Err(ExtentError::Stride { gfn, stride });
            }
            let Some(&length) = file_lengths.get(usize::from(file)) else {
                return Err(ExtentError::NoSuchFile { gfn, file, files: file_lengths.len() });
            };
            if extent.end().is_none_or(|end| end > length) {
                return Err(ExtentError::BeyondFile { gfn, file, length });
            }
            end = extent.frames.end();
        }
        Ok(())
    }

    /// The extents in ascending order.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The extent that holds the page of `gfn`.
    pub fn find(&self, gfn: Gfn) -> Option<&Extent> {
        let index = self.extents.partition_point(|extent| extent.frames.end() <= gfn);
        self.extents.get(index).filter(|extent| extent.frames.contains(gfn))
    }

    /// `range` as a sequence of stored pieces and holes, in ascending order.
    pub fn spans(&self, range: FrameRange) -> impl Iterator<Item = Span> + '_ {
        let mut index = self.extents.partition_point(|extent| extent.frames.end() <= range.start());
        let mut rest = range;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let next = self.extents.get(index);
            let stored = next.map_or(FrameRange::new(rest.end(), PageCount::ZERO), |e| e.frames.intersection(rest));
            if stored.is_empty() || stored.start() > rest.start() {
                let end = if stored.is_empty() { rest.end() } else { stored.start() };
                let hole = FrameRange::between(rest.start(), end);
                rest = FrameRange::between(end, rest.end());
                return Some(Span::Hole(hole));
            }
            index += 1;
            rest = FrameRange::between(stored.end(), rest.end());
            next.map(|extent| Span::Stored(extent.slice(stored)))
        })
    }
}

/// Collects pages as an importer meets them, in any order; the last copy of a frame wins, as in a live migration's stream.
#[derive(Debug, Default)]
pub struct ExtentTableBuilder {
    pages: Vec<(Gfn, u16, u64)>,
    extents: Vec<Extent>,
}

impl ExtentTableBuilder {
    /// Notes that the page of `gfn` lies at byte `offset` of `file`.
    pub fn page(&mut self, gfn: Gfn, file: u16, offset: u64) {
        self.pages.push((gfn, file, offset));
    }

    /// Notes a run of contiguous pages. Runs must not overlap each other or single pages.
    pub fn run(&mut self, frames: FrameRange, file: u16, offset: u64) {
        if !frames.is_empty() {
            self.extents.push(Extent { frames, file, offset, stride: PAGE_SIZE as u32 });
        }
    }

    /// The table over files of these lengths in bytes, pages joined to extents wherever their distances allow.
    ///
    /// # Errors
    /// As [`ExtentTable::new`].
    pub fn finish(mut self, file_lengths: &[u64]) -> Result<ExtentTable, ExtentError> {
        // Stable, so that the copies of a frame stay in the order of their arrival.
        self.pages.sort_by_key(|(gfn, ..)| *gfn);
        let mut extents = self.extents;
        let mut pages = self.pages.into_iter().peekable();
        let mut open: Option<Extent> = None;
        while let Some((gfn, file, offset)) = pages.next() {
            if pages.peek().is_some_and(|(next, ..)| *next == gfn) {
                continue;
            }
            match open.as_mut().and_then(|extent| extended(extent, gfn, file, offset)) {
                Some(extent) => open = Some(extent),
                None => {
                    let single = FrameRange::single(gfn);
                    let next = Extent { frames: single, file, offset, stride: PAGE_SIZE as u32 };
                    extents.extend(open.replace(next));
                }
            }
        }
        extents.extend(open);
        extents.sort_by_key(|extent| extent.frames.start());
        ExtentTable::new(extents, file_lengths)
    }
}

/// `extent` with one page more, when the page continues it.
fn extended(extent: &Extent, gfn: Gfn, file: u16, offset: u64) -> Option<Extent> {
    let last = extent.offset + (extent.frames.count().get() - 1) * u64::from(extent.stride);
    let distance = offset.checked_sub(last).filter(|distance| *distance >= PAGE_SIZE)?;
    let stride = u32::try_from(distance).ok()?;
    let continues = file == extent.file
        && gfn == extent.frames.end()
        && (stride == extent.stride || extent.frames.count() == PageCount::ONE);
    let frames = FrameRange::between(extent.frames.start(), gfn + PageCount::ONE);
    continues.then_some(Extent { frames, stride, ..*extent })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, length: u64) -> FrameRange {
        FrameRange::new(Gfn::new(start), PageCount::new(length))
    }

    #[test]
    fn pages_of_a_stream_become_few_extents() {
        let mut builder = ExtentTableBuilder::default();
        for index in 0..100 {
            builder.page(Gfn::new(10 + index), 0, 50 + 4104 * index);
        }
        builder.page(Gfn::new(12), 0, 1_000_000);
        builder.run(range(500, 20), 1, 0);
        let table = builder.finish(&[2_000_000, 81920]).unwrap();
        let expected = [
            Extent { frames: range(10, 2), file: 0, offset: 50, stride: 4104 },
            Extent { frames: range(12, 1), file: 0, offset: 1_000_000, stride: 4096 },
            Extent { frames: range(13, 97), file: 0, offset: 50 + 3 * 4104, stride: 4104 },
            Extent { frames: range(500, 20), file: 1, offset: 0, stride: 4096 },
        ];
        assert_eq!(table.extents(), expected);
        assert_eq!(table.find(Gfn::new(20)).map(|e| e.offset_of(Gfn::new(20))), Some(50 + 10 * 4104));
        assert_eq!(table.find(Gfn::new(110)), None);
    }

    #[test]
    fn spans_cover_a_range_in_order() {
        let mut builder = ExtentTableBuilder::default();
        builder.run(range(10, 10), 0, 0);
        builder.run(range(20, 10), 1, 0);
        let table = builder.finish(&[40960, 40960]).unwrap();
        let extent = |frames, file, offset| Span::Stored(Extent { frames, file, offset, stride: 4096 });
        let spans: Vec<_> = table.spans(range(5, 40)).collect();
        let expected = [
            Span::Hole(range(5, 5)),
            extent(range(10, 10), 0, 0),
            extent(range(20, 10), 1, 0),
            Span::Hole(range(30, 15)),
        ];
        assert_eq!(spans, expected);
        assert_eq!(table.spans(range(12, 3)).collect::<Vec<_>>(), [extent(range(12, 3), 0, 8192)]);
        assert_eq!(table.spans(range(100, 3)).collect::<Vec<_>>(), [Span::Hole(range(100, 3))]);
        assert_eq!(table.spans(range(100, 0)).count(), 0);
    }

    #[test]
    fn extents_must_lie_in_their_files() {
        let extent = Extent { frames: range(0, 2), file: 0, offset: 1, stride: 4096 };
        let refused = |extents: Vec<Extent>| ExtentTable::new(extents, &[8192]).unwrap_err();
        assert!(matches!(refused(vec![extent]), ExtentError::BeyondFile { length: 8192, .. }));
        let wild = Extent { offset: u64::MAX, ..extent };
        assert!(matches!(refused(vec![wild]), ExtentError::BeyondFile { .. }));
        assert!(matches!(refused(vec![Extent { file: 1, ..extent }]), ExtentError::NoSuchFile { .. }));
        assert!(matches!(refused(vec![Extent { stride: 4095, ..extent }]), ExtentError::Stride { .. }));
        let good = Extent { offset: 0, ..extent };
        assert!(matches!(refused(vec![good, good]), ExtentError::Overlap(_)));
    }
}
