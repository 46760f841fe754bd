use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::super::stream::data_pages;
use crate::{PAGE_SIZE, PageCount};

/// How much is copied at once.
const CHUNK: u64 = 1 << 20;
const ZERO: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

/// Copies `size` bytes, a multiple of 4096, from `offset` of `source` to the start of `target`, an empty file, and leaves out
/// holes and pages of zeros. On file systems that share blocks (btrfs, XFS) nothing is copied at all.
///
/// `goes_on` is told how many bytes are done; false when it broke the copy off.
pub(super) fn copy_memory(
    source: &File,
    offset: u64,
    size: u64,
    target: &File,
    goes_on: &mut dyn FnMut(u64) -> bool,
) -> io::Result<bool> {
    let whole = offset == 0 && source.metadata()?.len() == size;
    if whole && rustix::fs::ioctl_ficlone(target, source).is_ok() {
        return Ok(true);
    }
    target.set_len(size)?;
    let mut buffer = vec![0; CHUNK as usize];
    let pages = PageCount::from_bytes_exact(size).ok_or(io::ErrorKind::InvalidInput)?;
    for run in data_pages(source, offset, pages) {
        let (first, count) = run?;
        let (start, end) = (first * PAGE_SIZE, first * PAGE_SIZE + count.bytes());
        for at in (start..end).step_by(CHUNK as usize) {
            if !goes_on(at) {
                return Ok(false);
            }
            let chunk = &mut buffer[..CHUNK.min(end - at) as usize];
            source.read_exact_at(chunk, offset + at)?;
            let mut from = at;
            for (is_data, piece) in pieces(chunk) {
                if is_data {
                    target.write_all_at(piece, from)?;
                }
                from += piece.len() as u64;
            }
        }
    }
    Ok(true)
}

/// `chunk` in the longest pieces whose pages are all data (true) or all zero (false).
fn pieces(chunk: &[u8]) -> impl Iterator<Item = (bool, &[u8])> {
    let is_data = |page: &[u8]| *page != ZERO;
    let mut rest = chunk;
    std::iter::from_fn(move || {
        let mut pages = rest.chunks(PAGE_SIZE as usize);
        let data = is_data(pages.next()?);
        let count = 1 + pages.take_while(|page| is_data(page) == data).count();
        let (piece, after) = rest.split_at((count * PAGE_SIZE as usize).min(rest.len()));
        rest = after;
        Some((data, piece))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::qemu::stream::Source;

    #[test]
    fn holes_and_zeros_are_left_out() {
        let (source, target) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let size = 3 << 20;
        source.set_len(4096 + size).unwrap();
        source.write_all_at(&[1; 100], 4096).unwrap();
        source.write_all_at(&[0; 65536], 4096 + (1 << 20)).unwrap();
        source.write_all_at(&[2; 8192], 4096 + (1 << 20) + 32768).unwrap();
        assert!(copy_memory(&source, 4096, size, &target, &mut |_| true).unwrap());
        assert!(!copy_memory(&source, 4096, size, &target, &mut |_| false).unwrap());
        let read = |file: &File, offset| {
            let mut bytes = vec![0; size as usize];
            FileExt::read_exact_at(file, &mut bytes, offset).unwrap();
            bytes
        };
        assert!(read(&source, 4096) == read(&target, 0));
        assert_eq!(target.length().unwrap(), size);
        let after_first = target.data_within(65536..size).unwrap();
        assert!(after_first.as_ref().is_none_or(|data| data.start >= (1 << 20)), "{after_first:?}");
    }
}
