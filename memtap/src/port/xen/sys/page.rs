use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use super::abi::{IOC_PRIVCMD_MMAPBATCH_V2, MmapBatch};
use super::mapping::Mapping;
use crate::port::xen::ring::{Index, SLOT, SharedPage, slot_offset};

const PAGE: usize = 4096;

/// A page of a guest, which Xen reads and writes too.
///
/// Nothing borrows from it: indices are atomics, slots are copied by volatile accesses. Other sides may write at any time, so
/// what is read is any bytes, to be checked after it was copied and never read twice.
#[derive(Debug)]
pub(in super::super) struct ForeignPage(Mapping);

impl ForeignPage {
    /// Maps `gfn` of `domain`; `Ok(None)` when the guest has no page there.
    pub(in super::super) fn map(privcmd: BorrowedFd<'_>, domain: u16, gfn: u64) -> io::Result<Option<Self>> {
        let mapping = Mapping::of_device(privcmd, PAGE)?;
        let address = mapping.start().as_ptr().addr() as u64;
        let (frame, mut error) = (gfn, 0);
        let argument = MmapBatch { count: 1, domain, address, frames: &raw const frame, errors: &raw mut error };
        // SAFETY: the request takes a pointer to this structure, reads one frame number and writes one error, and maps a page into
        // the range at `address`, which is ours and of this very device.
        let result = unsafe { libc::ioctl(privcmd.as_raw_fd(), IOC_PRIVCMD_MMAPBATCH_V2, &raw const argument) };
        match (result, error) {
            (0, 0) => Ok(Some(Self(mapping))),
            (_, error) if error < 0 => match io::Error::from_raw_os_error(-error) {
                error if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(None),
                error => Err(error),
            },
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Fills the page with zeros.
    pub(in super::super) fn clear(&mut self) {
        for offset in (0..PAGE).step_by(8) {
            // SAFETY: the eight bytes lie in the page, which is mapped and aligned. A volatile write makes no assumption on who
            // else accesses them, and nothing of ours borrows from the page.
            unsafe { self.0.start().add(offset).cast::<u64>().write_volatile(0) };
        }
    }

    fn index(&self, index: Index) -> &AtomicU32 {
        // SAFETY: the offsets of indices are multiples of four within the page, which stays mapped as long as `self` is borrowed.
        // This process accesses them by atomics alone; so does Xen, whose accesses are aligned words.
        unsafe { AtomicU32::from_ptr(self.0.start().add(index.offset()).cast().as_ptr()) }
    }
}

impl SharedPage for ForeignPage {
    fn load(&self, index: Index) -> u32 {
        self.index(index).load(Ordering::Acquire)
    }

    fn store(&mut self, index: Index, value: u32) {
        self.index(index).store(value, Ordering::Release);
    }

    fn read(&self, slot: u32) -> [u8; SLOT] {
        let mut bytes = [0; SLOT];
        for (word, target) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let offset = slot_offset(slot) + 8 * word;
            // SAFETY: every slot lies in the page (asserted beside `slot_offset`), aligned to eight bytes; for the volatile read see
            // `clear`.
            *target = unsafe { self.0.start().add(offset).cast::<u64>().read_volatile() }.to_ne_bytes();
        }
        bytes
    }

    fn write(&mut self, slot: u32, bytes: &[u8; SLOT]) {
        for (word, source) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let offset = slot_offset(slot) + 8 * word;
            // SAFETY: as in `read`.
            unsafe { self.0.start().add(offset).cast::<u64>().write_volatile(u64::from_ne_bytes(*source)) };
        }
    }
}
