//! Memory at an address of its own.

use std::io;
use std::ptr::NonNull;

/// Zeroed memory, whole pages of it, unmapped when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread, and `Mapping` hands out nothing but its address.
unsafe impl Send for Mapping {}

impl Mapping {
    pub(super) fn new(length: usize) -> io::Result<Self> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: without MAP_FIXED the kernel chooses an unused range, so no memory of the program is replaced.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, length })
    }

    pub(super) fn address(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` and is unmapped once; whoever gave its address to the kernel keeps the mapping
        // until the kernel is done with it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}
