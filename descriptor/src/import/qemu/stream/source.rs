use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::{PAGE_SIZE, PageCount};

/// A file that holds a migration stream, or something like it.
pub trait Source {
    /// The length in bytes.
    ///
    /// # Errors
    /// When it cannot be found out.
    fn length(&self) -> io::Result<u64>;

    /// Fills `buffer` with the bytes at `offset`.
    ///
    /// # Errors
    /// When they cannot be read, or the source ends before.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// The first piece within `range` that is not a hole; `None` when all of it is one. A hole reads as zeros, but not all
    /// zeros need to be holes.
    ///
    /// # Errors
    /// When it cannot be found out.
    fn data_within(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>>;
}

/// The pages of an area of `size` pages from byte `start` on that are not holes, as runs of (number of the first page in the
/// area, how many). A page counts when any byte of it does.
pub(crate) fn data_pages<S: Source + ?Sized>(
    source: &S,
    start: u64,
    size: PageCount,
) -> impl Iterator<Item = io::Result<(u64, PageCount)>> + '_ {
    let end = start.saturating_add(size.bytes());
    let mut from = start;
    std::iter::from_fn(move || {
        if from >= end {
            return None;
        }
        let data = match source.data_within(from..end) {
            Ok(data) => data?,
            Err(error) => {
                from = end;
                return Some(Err(error));
            }
        };
        // At least one page, so that the iteration ends whatever the source answers.
        let first = (data.start.clamp(from, end - 1) - start) / PAGE_SIZE;
        let last = (data.end.min(end).saturating_sub(start)).div_ceil(PAGE_SIZE).max(first + 1);
        from = start + last * PAGE_SIZE;
        Some(Ok((first, PageCount::new(last - first))))
    })
}

impl Source for File {
    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }

    fn data_within(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        crate::image::sparse::data_within(self, range)
    }
}

/// Bytes in memory, in which every page of zeros at a multiple of 4096 is a hole.
impl Source for &[u8] {
    fn length(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = usize::try_from(offset).ok().and_then(|offset| self.get(offset..)?.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn data_within(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let end = range.end.min(self.len() as u64);
        let is_data = |page: u64| {
            let bytes = self.get((page * PAGE_SIZE) as usize..).unwrap_or_default();
            bytes.iter().take(PAGE_SIZE as usize).any(|byte| *byte != 0)
        };
        let pages = range.start / PAGE_SIZE..end.div_ceil(PAGE_SIZE);
        let Some(first) = pages.clone().find(|page| is_data(*page)) else {
            return Ok(None);
        };
        let last = (first..pages.end).find(|page| !is_data(*page)).unwrap_or(pages.end);
        Ok(Some((first * PAGE_SIZE).max(range.start)..(last * PAGE_SIZE).min(end)))
    }
}
