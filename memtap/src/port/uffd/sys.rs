//! The kernel interface of userfaultfd: structures, numbers, and calls that tell what became of them.
//!
//! The `userfaultfd` crate is not used: it casts negative results to unsigned numbers and lacks operations that we need.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, KnownLayout};

/// A message as the kernel writes it: an event and up to three numbers whose meaning depends on it.
#[derive(Clone, Copy, Debug, Default, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct RawMessage {
    pub(super) event: u8,
    reserved: [u8; 7],
    pub(super) arguments: [u64; 3],
}

pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
pub(super) const EVENT_FORK: u8 = 0x13;
pub(super) const EVENT_REMAP: u8 = 0x14;
pub(super) const EVENT_REMOVE: u8 = 0x15;
pub(super) const EVENT_UNMAP: u8 = 0x16;

pub(super) const PAGEFAULT_FLAG_WRITE: u64 = 1;

pub(super) const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
pub(super) const FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
pub(super) const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
pub(super) const FEATURE_EVENT_UNMAP: u64 = 1 << 6;

const API: u64 = 0xaa;
const USER_MODE_ONLY: libc::c_int = 1;
const REGISTER_MODE_MISSING: u64 = 1;

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    length: u64,
}

#[repr(C)]
struct RegisterArgument {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArgument {
    destination: u64,
    source: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct ZeroArgument {
    range: Range,
    mode: u64,
    zeroed: i64,
}

const IOC_API: libc::Ioctl = read_write(0x3f, size_of::<ApiArgument>());
const IOC_REGISTER: libc::Ioctl = read_write(0x00, size_of::<RegisterArgument>());
const IOC_UNREGISTER: libc::Ioctl = read(0x01, size_of::<Range>());
const IOC_WAKE: libc::Ioctl = read(0x02, size_of::<Range>());
const IOC_COPY: libc::Ioctl = read_write(0x03, size_of::<CopyArgument>());
const IOC_ZEROPAGE: libc::Ioctl = read_write(0x04, size_of::<ZeroArgument>());
/// Of /dev/userfaultfd.
const IOC_NEW: libc::Ioctl = 0xaa00;

const _: () = {
    assert!(size_of::<RawMessage>() == 32);
    assert!(size_of::<ApiArgument>() == 24);
    assert!(size_of::<Range>() == 16);
    assert!(size_of::<RegisterArgument>() == 32);
    assert!(size_of::<CopyArgument>() == 40);
    assert!(size_of::<ZeroArgument>() == 32);
    assert!(IOC_API == 0xc018_aa3f);
    assert!(IOC_REGISTER == 0xc020_aa00);
    assert!(IOC_UNREGISTER == 0x8010_aa01);
    assert!(IOC_WAKE == 0x8010_aa02);
    assert!(IOC_COPY == 0xc028_aa03);
    assert!(IOC_ZEROPAGE == 0xc020_aa04);
};

/// A userfaultfd by the system call, for faults of user mode alone, which needs no privilege.
pub(super) fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
    // SAFETY: the call takes one integer and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    owned(fd)
}

/// A userfaultfd from /dev/userfaultfd, whose file mode says who may have one (Linux 6.1).
pub(super) fn open_device() -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open("/dev/userfaultfd")?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
    // SAFETY: the descriptor is open and the request takes an integer, no pointer.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW, flags) };
    owned(fd.into())
}

/// Enables `features` and returns those that the kernel has; to be done once, before anything else.
pub(super) fn handshake(fd: BorrowedFd<'_>, features: u64) -> Result<u64, Errno> {
    let mut argument = ApiArgument { api: API, features, ioctls: 0 };
    // SAFETY: the request takes a pointer to this structure, whose size is in its number.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), IOC_API, &raw mut argument) };
    check(result)?;
    Ok(argument.features)
}

/// Registers `length` bytes from address `start` on for missing pages.
pub(super) fn register(fd: BorrowedFd<'_>, start: u64, length: u64) -> Result<(), Errno> {
    let range = Range { start, length };
    let mut argument = RegisterArgument { range, mode: REGISTER_MODE_MISSING, ioctls: 0 };
    // SAFETY: the request takes a pointer to this structure. Registering changes when accesses to the range complete, not
    // what memory holds; a range that is not mapped is an error.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), IOC_REGISTER, &raw mut argument) };
    check(result)
}

/// Takes a range out; missing pages of it are the kernel's business again and read as zeros. Wakes all who wait there.
pub(super) fn unregister(fd: BorrowedFd<'_>, start: u64, length: u64) -> Result<(), Errno> {
    let mut argument = Range { start, length };
    // SAFETY: the request takes a pointer to this structure.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), IOC_UNREGISTER, &raw mut argument) };
    check(result)
}

/// Wakes all who wait for a page of the range.
pub(super) fn wake(fd: BorrowedFd<'_>, start: u64, length: u64) -> Result<(), Errno> {
    let mut argument = Range { start, length };
    // SAFETY: the request takes a pointer to this structure.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), IOC_WAKE, &raw mut argument) };
    check(result)
}

/// Copies `bytes` to missing pages at `destination`, wakes their waiters, and returns the bytes copied; fewer than asked for
/// when the next page failed, for a reason that the next attempt will tell.
pub(super) fn copy(fd: BorrowedFd<'_>, destination: u64, bytes: &[u8]) -> Result<usize, Errno> {
    let length = bytes.len() as u64;
    let mut argument = CopyArgument { destination, source: bytes.as_ptr() as u64, length, mode: 0, copied: 0 };
    // SAFETY: the request takes a pointer to this structure and reads `length` bytes at `source`, which `bytes` borrows. The
    // kernel writes to pages that are missing from a range registered with this descriptor and to nothing else, so no
    // memory that anyone could have read or borrowed changes.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), IOC_COPY, &raw mut argument) };
    progress(result, argument.copied)
}

/// Like [`copy`] with zeros; not for huge pages.
pub(super) fn zero(fd: BorrowedFd<'_>, start: u64, length: u64) -> Result<usize, Errno> {
    let mut argument = ZeroArgument { range: Range { start, length }, mode: 0, zeroed: 0 };
    // SAFETY: the request takes a pointer to this structure; which memory changes is argued in `copy`.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), IOC_ZEROPAGE, &raw mut argument) };
    progress(result, argument.zeroed)
}

/// What a copying request did. After a failure the kernel leaves in `done` the bytes copied before it, or the negated error
/// (some kernels leave it untouched on an early EAGAIN), so only a positive number is progress.
fn progress(result: libc::c_int, done: i64) -> Result<usize, Errno> {
    match (check(result), usize::try_from(done)) {
        (_, Ok(done)) if done > 0 => Ok(done),
        (Err(error), _) => Err(error),
        // Nothing done and no error: not what the interface promises, so let the caller see it as a failure.
        (Ok(()), _) => Err(Errno::IO),
    }
}

fn check(result: libc::c_int) -> Result<(), Errno> {
    if result == 0 { Ok(()) } else { Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)) }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    match libc::c_int::try_from(fd) {
        // SAFETY: the kernel just made this descriptor, and nobody else knows of it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes the descriptor of the new userfaultfd that a FORK event carries, so that it does not stay open.
pub(super) fn adopt(number: u64) -> Option<OwnedFd> {
    let fd = libc::c_int::try_from(number).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: reading the event made this descriptor in our process for us to own, and each event is handled once.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

const fn read_write(number: libc::Ioctl, size: usize) -> libc::Ioctl {
    3 << 30 | (size as libc::Ioctl) << 16 | 0xaa << 8 | number
}

const fn read(number: libc::Ioctl, size: usize) -> libc::Ioctl {
    2 << 30 | (size as libc::Ioctl) << 16 | 0xaa << 8 | number
}
