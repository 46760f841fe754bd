//! Buffers that the kernel picks from when datagrams arrive.

use std::io;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::IoUring;
use io_uring::types::BufRingEntry;

use super::mapping::Mapping;

/// The group number of the buffers; a ring has but one.
pub(super) const GROUP: u16 = 0;

/// Receive buffers of one size, with the ring that tells the kernel which are free.
pub(super) struct SharedBuffers {
    ring: Mapping,
    memory: Mapping,
    tail: u16,
    count: u16,
    size: usize,
    /// How many the kernel has.
    free: u16,
    /// Bytes that it filled, by buffer, of those that it has not.
    filled: Vec<usize>,
}

impl SharedBuffers {
    /// Registers `count` buffers, a power of two, of `size` bytes.
    pub(super) fn new(ring: &IoUring, count: u16, size: usize) -> io::Result<Self> {
        assert!(count.is_power_of_two(), "the kernel counts buffers by a mask");
        let entries = Mapping::new(usize::from(count) * size_of::<BufRingEntry>())?;
        let memory = Mapping::new(usize::from(count) * size)?;
        // SAFETY: the mapping is page-aligned, has room for that many entries, and lives until the ring is closed and idle, or
        // is leaked: see `SocketRing`.
        unsafe { ring.submitter().register_buf_ring_with_flags(entries.address() as u64, count, GROUP, 0)? };
        let filled = vec![0; usize::from(count)];
        let mut buffers = Self { ring: entries, memory, tail: 0, count, size, free: 0, filled };
        (0..count).for_each(|buffer| buffers.provide(buffer));
        Ok(buffers)
    }

    /// True when the kernel has one to fill.
    pub(super) fn any_free(&self) -> bool {
        self.free > 0
    }

    /// Notes that the kernel filled a buffer; false when there is no such, or it was not the kernel's.
    pub(super) fn take(&mut self, buffer: u16, length: usize) -> bool {
        let Some(filled) = self.filled.get_mut(usize::from(buffer)).filter(|filled| **filled == 0) else {
            return false;
        };
        *filled = length.min(self.size);
        self.free -= 1;
        *filled > 0
    }

    /// The bytes in a buffer that was taken; none of any other.
    pub(super) fn bytes(&self, buffer: u16) -> &[u8] {
        let length = self.filled.get(usize::from(buffer)).copied().unwrap_or_default();
        if length == 0 {
            return &[];
        }
        // SAFETY: the buffer lies in `memory`, for it has a place in `filled`, and the length is at most its size. The kernel
        // filled that much of it and leaves it alone until `give_back`, which needs a unique borrow.
        unsafe { std::slice::from_raw_parts(self.memory.address().add(usize::from(buffer) * self.size), length) }
    }

    /// Gives a buffer that was taken back to the kernel.
    pub(super) fn give_back(&mut self, buffer: u16) {
        if self.filled.get(usize::from(buffer)).is_some_and(|filled| *filled > 0) {
            self.provide(buffer);
        }
    }

    fn provide(&mut self, buffer: u16) {
        let entries = self.ring.address().cast::<BufRingEntry>();
        let index = usize::from(self.tail % self.count);
        // SAFETY: the index lies within the `count` entries of the mapping, which is zeroed memory at first and so a valid
        // entry. The kernel reads it only once the tail says so. Only this value's owner writes entries and tail.
        let entry = unsafe { &mut *entries.add(index) };
        entry.set_addr(self.memory.address().wrapping_add(usize::from(buffer) * self.size) as u64);
        entry.set_len(self.size as u32);
        entry.set_bid(buffer);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the tail lies in the first entry of the mapping, aligned to two bytes; this value's owner is its only
        // writer, and the kernel reads it atomically.
        let shared = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(entries).cast_mut()) };
        shared.store(self.tail, Ordering::Release);
        self.free += 1;
        self.filled[usize::from(buffer)] = 0;
    }
}
