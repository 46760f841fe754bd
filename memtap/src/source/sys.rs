//! A file mapped for reading, for the local lane.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

/// A whole file, read-only.
pub(super) struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping is read-only memory that belongs to nobody but this value.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps the first `length` bytes of a file, all of which it must have.
    pub(super) fn new(file: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        if length == 0 {
            return Ok(Self { start: NonNull::dangling(), length });
        }
        // SAFETY: a new mapping at an address of the kernel's choice changes no memory that exists.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address zero"))?;
        Ok(Self { start, length })
    }

    /// The bytes at these offsets; `None` when the mapping is shorter.
    pub(super) fn bytes(&self, range: Range<u64>) -> Option<&[u8]> {
        self.whole().get(usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?)
    }

    /// Has the kernel enter the pages of these bytes, as far as there are any, into the page table at once: cheaper than a
    /// fault for each sixteen. Only advice; a failure costs time later and nothing else.
    pub(super) fn populate(&self, range: Range<u64>) {
        let end = usize::try_from(range.end).unwrap_or(usize::MAX).min(self.length);
        let Some(bytes) = usize::try_from(range.start).ok().and_then(|start| self.whole().get(start..end)) else {
            return;
        };
        let start = bytes.as_ptr().addr() & !0xfff;
        let length = bytes.as_ptr().addr() + bytes.len() - start;
        // SAFETY: the range lies in our mapping (its first page begins at most a page before `bytes`, as the mapping begins at
        // a page), and this advice changes nothing that can be read there.
        let _advice =
            unsafe { libc::madvise(self.start.as_ptr().with_addr(start).cast(), length, libc::MADV_POPULATE_READ) };
    }

    fn whole(&self) -> &[u8] {
        // SAFETY: `length` bytes are mapped for as long as `self` lives. They do not change: an image never does once it is
        // served, which is what the server promises with the descriptor.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: the mapping is ours, and nothing borrows from it any more.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
        }
    }
}
