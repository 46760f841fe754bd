use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

/// A mapping of our own, unmapped when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread, and `Mapping` hands out nothing but its address.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `length` bytes of a device.
    pub(super) fn of_device(device: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        Self::new(length, libc::MAP_SHARED, device.as_raw_fd())
    }

    /// Zeroed memory that stays where it is and is not given to a child.
    pub(super) fn locked(length: usize) -> io::Result<Self> {
        let mapping = Self::new(length, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_LOCKED, -1)?;
        // SAFETY: the range is ours, and the advice changes nothing that this process can read there.
        let result = unsafe { libc::madvise(mapping.start.as_ptr().cast(), length, libc::MADV_DONTFORK) };
        if result == 0 { Ok(mapping) } else { Err(io::Error::last_os_error()) }
    }

    fn new(length: usize, flags: libc::c_int, fd: libc::c_int) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: without MAP_FIXED the kernel chooses an unused range, so no memory of the program is replaced.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, length })
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` and is unmapped once. Xen and the kernel touch it only in calls that borrow it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}
