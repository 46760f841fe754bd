use super::cursor::Cursor;
use super::pages::PageLog;
use super::source::data_pages;
use super::{Source, StreamError};
use crate::{PAGE_SIZE, PageCount};

const MAPPED_RAM_VERSION: u32 = 1;
/// How much of a bitmap is read at once.
const BITMAP_CHUNK: u64 = 64 << 10;

/// Where a block lies in a file of `mapped-ram`, in bytes.
pub(super) struct Mapped {
    size: PageCount,
    bitmap: u64,
    pages: u64,
}

impl Mapped {
    /// The header of a block in a `mapped-ram` file; afterwards the cursor stands behind the block's pages. `None` for a block
    /// that `x-ignore-shared` has left out.
    pub(super) fn header<S: Source + ?Sized>(
        cursor: &mut Cursor<'_, S>,
        size: PageCount,
    ) -> Result<Option<Self>, StreamError> {
        let offset = cursor.position();
        let version = cursor.u32("mapped-ram version")?;
        if version != MAPPED_RAM_VERSION {
            return Err(StreamError::value("mapped-ram version", offset, version));
        }
        let page_size = cursor.u64("mapped-ram page size")?;
        if page_size != PAGE_SIZE {
            return Err(StreamError::value("mapped-ram page size", offset + 4, page_size));
        }
        let bitmap = cursor.u64("mapped-ram bitmap offset")?;
        let pages = cursor.u64("mapped-ram pages offset")?;
        if bitmap == 0 && pages == 0 {
            return Ok(None);
        }
        let bitmap_end = bitmap.checked_add(size.get().div_ceil(64) * 8);
        if bitmap < cursor.position() || bitmap_end.is_none_or(|end| end > pages) {
            return Err(StreamError::value("mapped-ram bitmap offset", offset + 12, bitmap));
        }
        cursor.seek(pages.saturating_add(size.bytes()), "mapped-ram pages")?;
        Ok(Some(Self { size, bitmap, pages }))
    }

    /// Notes the pages whose bits are set: bit n of the little-endian bitmap is page n.
    pub(super) fn pages_by_bitmap<S: Source + ?Sized>(
        &self,
        cursor: &Cursor<'_, S>,
        log: &mut PageLog,
        block: u16,
    ) -> Result<(), StreamError> {
        let length = self.size.get().div_ceil(8);
        let mut open: Option<u64> = None;
        let mut close = |open: &mut Option<u64>, end: u64| match open.take() {
            Some(first) => log.run(block, first, PageCount::new(end - first), self.pages + first * PAGE_SIZE),
            None => Ok(()),
        };
        for chunk in (0..length).step_by(BITMAP_CHUNK as usize) {
            let mut bytes = vec![0; BITMAP_CHUNK.min(length - chunk) as usize];
            cursor.read_at(&mut bytes, self.bitmap + chunk, "mapped-ram bitmap")?;
            for (byte, at) in bytes.into_iter().zip(chunk..) {
                match byte {
                    0 => close(&mut open, at * 8)?,
                    0xff if open.is_some() => {}
                    _ => {
                        for page in at * 8..(at * 8 + 8).min(self.size.get()) {
                            if byte >> (page % 8) & 1 == 0 {
                                close(&mut open, page)?;
                            } else {
                                open.get_or_insert(page);
                            }
                        }
                    }
                }
            }
        }
        close(&mut open, self.size.get())
    }

    /// Notes the pages that the file has bytes for.
    pub(super) fn pages_by_holes<S: Source + ?Sized>(
        &self,
        cursor: &Cursor<'_, S>,
        log: &mut PageLog,
        block: u16,
    ) -> Result<(), StreamError> {
        for run in data_pages(cursor.source(), self.pages, self.size) {
            let read = |source| StreamError::Read { field: "mapped-ram pages", offset: self.pages, source };
            let (first, count) = run.map_err(read)?;
            log.run(block, first, count, self.pages + first * PAGE_SIZE)?;
        }
        Ok(())
    }
}
