//! The system calls of the server apart from io_uring: mappings, event counters, process limits.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// A mapping of memory, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread, and `Mapping` hands out nothing but its address.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method changes the mapping through a shared reference.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `length` bytes of `file` for reading.
    ///
    /// The bytes must only ever be read by the kernel, as the source of a send: a page beyond the end of a file that
    /// somebody truncated makes a system call fail with EFAULT, where reading it directly would raise SIGBUS.
    pub(crate) fn of_file(file: &File, length: usize) -> io::Result<Self> {
        Self::map(length, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd())
    }

    /// Maps `file` for reading and writing; only so does the kernel let its pages be pinned for long, and only of files
    /// that live in memory.
    pub(crate) fn of_file_writable(file: &File, length: usize) -> io::Result<Self> {
        Self::map(length, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file.as_raw_fd())
    }

    /// Maps `length` bytes of zeros.
    pub(crate) fn anonymous(length: usize) -> io::Result<Self> {
        Self::map(length, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    fn map(length: usize, protection: i32, flags: i32, fd: i32) -> io::Result<Self> {
        // The kernel refuses an empty mapping.
        let length = length.max(1);
        // SAFETY: without MAP_FIXED the kernel chooses an unused range, so no memory of the program is replaced.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, length })
    }

    /// The address of the first byte.
    pub(crate) fn address(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// Reads the bytes from `offset` on into memory and maps them; `length` is cut at the end of the mapping.
    pub(crate) fn populate(&self, offset: usize, length: usize) -> io::Result<()> {
        let length = length.min(self.length.saturating_sub(offset));
        let advise = |advice| {
            // SAFETY: the range lies within this mapping; reading it in changes no byte.
            check(unsafe { libc::madvise(self.start.as_ptr().add(offset).cast(), length, advice) })
        };
        match advise(libc::MADV_POPULATE_READ) {
            // Linux before 5.14 only reads ahead.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => advise(libc::MADV_WILLNEED),
            result => result,
        }
    }

    /// Keeps the mapping in memory.
    pub(crate) fn lock(&self) -> io::Result<()> {
        // SAFETY: the range is this mapping's own; locking changes no byte.
        check(unsafe { libc::mlock(self.start.as_ptr().cast(), self.length) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map` and is unmapped once. Addresses given out are used by the kernel alone, on
        // behalf of operations that keep the mapping's owner alive.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// A counter that wakes whoever polls its descriptor.
#[derive(Debug)]
pub(crate) struct EventCounter(File);

impl EventCounter {
    /// A counter at zero.
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        check(fd)?;
        // SAFETY: the descriptor was just made and belongs to nobody else.
        Ok(Self(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// Wakes.
    pub(crate) fn signal(&self) {
        // It fails only when the counter is full, and then the other side is awake for long.
        let _ = io::Write::write(&mut &self.0, &1u64.to_ne_bytes());
    }

    /// Sets the counter back to zero.
    pub(crate) fn reset(&self) {
        // It fails only when the counter is zero already.
        let _ = io::Read::read(&mut &self.0, &mut [0; 8]);
    }
}

impl AsFd for EventCounter {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Opens the file behind `file` for writing too, if it lives in memory (tmpfs); `None` for others.
pub(crate) fn reopen_in_memory(file: &File) -> io::Result<Option<File>> {
    // SAFETY: all of its fields are integers, for which zero is a value.
    let mut facts: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and `facts` a valid place for the answer.
    check(unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut facts) })?;
    if facts.f_type != libc::TMPFS_MAGIC {
        return Ok(None);
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(true).write(true).open(path).map(Some)
}

/// A number that nobody can guess.
pub(crate) fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    // SAFETY: `bytes` is a valid place for as many bytes as it is said to have.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    // So few bytes come whole.
    if got == 8 { Ok(u64::from_ne_bytes(bytes)) } else { Err(io::Error::last_os_error()) }
}

/// Raises the limit of open files to what the process may have, and tells it.
pub(crate) fn raise_file_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for the answer.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is initialised.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    Ok(limit.rlim_cur)
}

/// Sets the mode of the file behind a descriptor. For a Unix socket this must come before it is bound, so that its file
/// never has a wider one.
pub(crate) fn set_mode(fd: impl AsFd, mode: u32) -> io::Result<()> {
    // SAFETY: takes no pointers, and the descriptor is open.
    check(unsafe { libc::fchmod(fd.as_fd().as_raw_fd(), mode) })
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
