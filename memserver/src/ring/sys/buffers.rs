//! The buffers that a ring receives into.

use std::io;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::IoUring;
use io_uring::types::BufRingEntry;

use crate::sys::Mapping;

/// Bytes in a receive buffer: a burst of a hundred small requests, or one of the largest.
pub(super) const BUFFER: usize = 4096;

/// Receive buffers of a ring. They are empty again before the ring sleeps, so they bound a burst, not the sessions.
pub(super) const BUFFERS: u16 = 256;

/// The group number of the receive buffers.
pub(super) const GROUP: u16 = 0;

pub(super) enum Buffers {
    /// Buffers that the kernel picks from, with the ring that tells it which are free.
    Shared { ring: Mapping, memory: Mapping, tail: u16 },
    /// One for each session that receives, by slot.
    Own(Vec<Option<Box<[u8]>>>),
}

pub(super) fn shared_buffers(ring: &IoUring) -> io::Result<Buffers> {
    let entries = Mapping::anonymous(usize::from(BUFFERS) * size_of::<BufRingEntry>())?;
    let memory = Mapping::anonymous(usize::from(BUFFERS) * BUFFER)?;
    // SAFETY: the mapping is page-aligned, has room for that many entries, and lives in `Uring` until the ring is closed and
    // idle, or is leaked.
    unsafe { ring.submitter().register_buf_ring_with_flags(entries.address() as u64, BUFFERS, GROUP, 0)? };
    let mut tail = 0;
    (0..BUFFERS).for_each(|buffer| provide(&entries, &memory, &mut tail, buffer));
    Ok(Buffers::Shared { ring: entries, memory, tail })
}

/// Tells the kernel that a shared buffer is free.
pub(super) fn provide(ring: &Mapping, memory: &Mapping, tail: &mut u16, buffer: u16) {
    let entries = ring.address().cast::<BufRingEntry>();
    let index = usize::from(*tail % BUFFERS);
    // SAFETY: the index lies within the BUFFERS entries of the mapping, which is zeroed memory at first and so a valid
    // entry. The kernel reads it only once the tail says so. Only this thread writes entries and tail.
    let entry = unsafe { &mut *entries.add(index) };
    entry.set_addr(memory.address().wrapping_add(usize::from(buffer) * BUFFER) as u64);
    entry.set_len(BUFFER as u32);
    entry.set_bid(buffer);
    *tail = tail.wrapping_add(1);
    // SAFETY: the tail lies in the first entry of the mapping, aligned to two bytes; this thread is its only writer, and
    // the kernel reads it atomically.
    let shared = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(entries).cast_mut()) };
    shared.store(*tail, Ordering::Release);
}
