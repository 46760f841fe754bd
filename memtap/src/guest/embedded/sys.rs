//! Memory for an embedded guest: mappings that nobody reads or writes but as atomic words.
#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use descriptor::PAGE_SIZE;

use super::Backing;

/// Words in a page.
pub(super) const WORDS: usize = PAGE_SIZE as usize / size_of::<u64>();

/// A page as its guest sees it.
pub(super) type Page = [AtomicU64; WORDS];

/// A mapping of missing pages.
pub(super) struct Mapping {
    start: NonNull<Page>,
    pages: usize,
    backing: Backing,
}

// SAFETY: the memory is reached through atomic words alone, from whatever thread.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `pages` pages that are all missing; none of them takes memory before it is touched.
    pub(super) fn new(pages: usize, backing: Backing) -> io::Result<Self> {
        let length = pages.checked_mul(PAGE_SIZE as usize).ok_or(io::ErrorKind::OutOfMemory)?;
        let file = match backing {
            Backing::Memfd => Some(memfd(length)?),
            Backing::Anon | Backing::Huge => None,
        };
        let kind = match backing {
            Backing::Anon => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            Backing::Huge => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
            Backing::Memfd => libc::MAP_SHARED,
        };
        let fd = file.as_ref().map_or(-1, std::os::fd::AsRawFd::as_raw_fd);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // Huge pages are reserved now, so that a shortage is an error here and no SIGBUS later.
        let reserve = if backing == Backing::Huge { 0 } else { libc::MAP_NORESERVE };
        // SAFETY: a new mapping at an address of the kernel's choice changes no memory that exists.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, kind | reserve, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address zero"))?;
        Ok(Self { start, pages, backing })
    }

    /// The address of the first page.
    pub(super) fn address(&self) -> u64 {
        self.start.as_ptr().addr() as u64
    }

    /// The pages.
    pub(super) fn pages(&self) -> &[Page] {
        // SAFETY: so many pages are mapped, aligned to their size, for as long as `self` lives. Atomic words may change under a
        // shared reference; a missing page makes the access wait, until the pager or the kernel puts one there.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.pages) }
    }

    /// Gives `count` pages from the `first` on back to the kernel: they read as zeros from now on.
    pub(super) fn discard(&self, first: usize, count: usize) -> io::Result<()> {
        let Some(pages) = first.checked_add(count).and_then(|end| self.pages().get(first..end)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let advice = match self.backing {
            // The file would keep its pages.
            Backing::Memfd => libc::MADV_REMOVE,
            Backing::Anon | Backing::Huge => libc::MADV_DONTNEED,
        };
        // SAFETY: the range lies in our mapping. Its words become zero, which is a change like any other to atomic words.
        let result = unsafe { libc::madvise(pages.as_ptr().cast_mut().cast(), size_of_val(pages), advice) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing borrows from it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.pages * PAGE_SIZE as usize) };
    }
}

/// The page faults that the calling thread has had, those included that a pager resolved.
pub(super) fn faults_of_thread() -> i64 {
    // SAFETY: all bytes zero are a valid `rusage`.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one `rusage`.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    usage.ru_minflt + usage.ru_majflt
}

fn memfd(length: usize) -> io::Result<std::os::fd::OwnedFd> {
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, length as u64)?;
    Ok(file)
}
