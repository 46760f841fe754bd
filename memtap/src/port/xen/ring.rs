//! The ring through which Xen tells of faults: the back end of a `vm_event` ring, over any page.
//!
//! ```text
//!   offset 0   u32 requests produced    by Xen       8 u32 responses produced   by us
//!          4   u32 (hold-off, unused)               12 u32 (hold-off, unused)
//!         64   8 slots of 400 bytes, each a request, then a response
//! ```
//!
//! Both indices count on for ever and wrap; an index modulo 8 is its slot. Xen fills a slot, then counts it as produced; we copy
//! the request, and at some time put a response into the next slot in order of responses, then count that. **Xen's slot is free
//! again when it has taken a response**, not when we have taken the request: so every request gets one response, and never are
//! there more responses than requests, or Xen would count slots that do not exist.
//!
//! **Order of accesses.** A load of Xen's index acquires, so that the slot is read after it; a store of ours releases, so that
//! the slot is written before it. A response may go into a slot whose request was not read yet only if there were 8
//! requests ahead of it, which [`BackRing::next_request`] rules out: responses never overtake requests that were read.
//! Xen notifies after each request, whatever the hold-off says, so nothing is lost when the notification is acknowledged
//! *before* the ring is looked at.
//!
//! The other side is the hypervisor, which we trust with everything, but its version may differ and memory may be damaged: any
//! bytes are a request, or an error that says what is wrong.

use descriptor::Gfn;
use thiserror::Error;

/// Slots in the ring: as many as fit into a page, rounded down to a power of two.
pub const SLOTS: u32 = 8;

/// Bytes of a request and of a response.
pub const SLOT: usize = 400;

/// The version of requests and responses, the first word of each; 7 from Xen 4.15 to 4.21 at least.
pub const VERSION: u32 = 7;

const DATA: usize = 64;

const _: () = assert!(SLOT.is_multiple_of(8) && slot_offset(SLOTS - 1) + SLOT <= 4096);

/// The vCPU is stopped until a response says the same.
pub const FLAG_VCPU_PAUSED: u32 = 1 << 0;
/// Another domain than the guest needs the page.
pub const FLAG_FOREIGN: u32 = 1 << 1;

const REASON_MEM_PAGING: u32 = 3;
const DROP_PAGE: u32 = 1 << 0;
const EVICT_FAIL: u32 = 1 << 1;

/// Where a slot begins in the page.
pub const fn slot_offset(slot: u32) -> usize {
    DATA + (slot % SLOTS) as usize * SLOT
}

/// An index at the beginning of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Index {
    /// How many requests Xen has produced.
    Requests,
    /// How many responses we have produced.
    Responses,
}

impl Index {
    /// Where it lies in the page.
    pub const fn offset(self) -> usize {
        match self {
            Index::Requests => 0,
            Index::Responses => 8,
        }
    }
}

/// The page that both sides see.
pub trait SharedPage {
    /// Reads an index; what is read later is not older.
    fn load(&self, index: Index) -> u32;
    /// Writes an index after everything that was written before.
    fn store(&mut self, index: Index, value: u32);
    /// Copies a slot, of which the other side may be writing.
    fn read(&self, slot: u32) -> [u8; SLOT];
    /// Writes a slot.
    fn write(&mut self, slot: u32, bytes: &[u8; SLOT]);
}

/// A request as Xen made it, as far as paging needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The vCPU that needs the page, of the guest or, with [`FLAG_FOREIGN`], of whoever does.
    pub vcpu: u32,
    /// [`FLAG_VCPU_PAUSED`], [`FLAG_FOREIGN`]; others are left out.
    pub flags: u32,
    /// The frame.
    pub gfn: Gfn,
    /// What Xen's tables have the frame as, by a number of its own.
    pub frame_type: u32,
    /// What is to happen, as bits.
    paging: u32,
}

impl Request {
    /// A vCPU of the guest is stopped until it is answered.
    pub fn is_paused(&self) -> bool {
        self.flags & FLAG_VCPU_PAUSED != 0
    }

    /// The guest gave the page up.
    pub fn is_drop(&self) -> bool {
        self.paging & DROP_PAGE != 0
    }

    /// The frame was nominated and is in use again: it cannot be evicted any more.
    pub fn is_evict_failure(&self) -> bool {
        self.paging & EVICT_FAIL != 0
    }

    /// A request as Xen would make it.
    #[cfg(test)]
    pub(super) fn new(vcpu: u32, flags: u32, gfn: Gfn, paging: u32) -> Self {
        Self { vcpu, flags, gfn, frame_type: 0, paging }
    }

    /// A response that lets `vcpu` go on wherever it waits, and says nothing of any frame: for vCPUs that another ring left
    /// behind.
    pub fn release(vcpu: u32) -> Self {
        Self { vcpu, flags: FLAG_VCPU_PAUSED, gfn: Gfn::new(0), frame_type: 0, paging: DROP_PAGE }
    }

    fn decode(bytes: &[u8; SLOT]) -> Result<Self, RingError> {
        let word = |offset: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[offset..offset + 4]);
            u32::from_le_bytes(word)
        };
        let (version, reason) = (word(0), word(8));
        if version != VERSION {
            return Err(RingError::Version { version });
        }
        if reason != REASON_MEM_PAGING {
            return Err(RingError::Reason { reason });
        }
        let frame = u64::from(word(24)) | u64::from(word(28)) << 32;
        Ok(Self {
            vcpu: word(12),
            flags: word(4) & (FLAG_VCPU_PAUSED | FLAG_FOREIGN),
            gfn: Gfn::checked(frame).ok_or(RingError::Frame { frame })?,
            frame_type: word(32),
            paging: word(36) & (DROP_PAGE | EVICT_FAIL),
        })
    }

    /// The response to it: the same but for what only the request says.
    fn encode_response(&self) -> [u8; SLOT] {
        let mut bytes = [0; SLOT];
        let mut put = |offset: usize, value: u32| bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        put(0, VERSION);
        put(4, self.flags);
        put(8, REASON_MEM_PAGING);
        put(12, self.vcpu);
        put(24, self.gfn.index() as u32);
        put(28, (self.gfn.index() >> 32) as u32);
        put(32, self.frame_type);
        put(36, self.paging);
        bytes
    }
}

/// A ring that is none, or of another kind.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RingError {
    /// A request of another version.
    #[error("a request of vm_event version {version}, where memtap knows {VERSION}")]
    Version {
        /// Its version.
        version: u32,
    },
    /// A request that is not about paging.
    #[error("a request for reason {reason}, which a paging ring does not have")]
    Reason {
        /// Its reason.
        reason: u32,
    },
    /// A frame number that no address has.
    #[error("a request for frame {frame:#x}, which no address reaches")]
    Frame {
        /// The number.
        frame: u64,
    },
    /// An index that the ring cannot have.
    #[error("{produced} requests produced, with {consumed} read and {answered} answered: the ring has {SLOTS} slots")]
    Overrun {
        /// Xen's index.
        produced: u32,
        /// How many we read.
        consumed: u32,
        /// How many we answered.
        answered: u32,
    },
    /// A response without a request.
    #[error("a response for vCPU {vcpu} and frame {gfn}, with every request answered")]
    Unasked {
        /// The vCPU.
        vcpu: u32,
        /// The frame.
        gfn: Gfn,
    },
}

/// Our end of a ring.
#[derive(Clone, Debug, Default)]
pub struct BackRing {
    consumed: u32,
    answered: u32,
}

impl BackRing {
    /// A ring that begins at zero, over a page of zeros.
    pub fn new() -> Self {
        Self::default()
    }

    /// The next request, if there is one.
    ///
    /// # Errors
    /// When the ring is broken, or of another version. It stays so.
    pub fn next_request(&mut self, page: &impl SharedPage) -> Result<Option<Request>, RingError> {
        let produced = page.load(Index::Requests);
        let unread = produced.wrapping_sub(self.consumed);
        if unread > SLOTS - self.held() {
            let Self { consumed, answered } = *self;
            return Err(RingError::Overrun { produced, consumed, answered });
        }
        if unread == 0 {
            return Ok(None);
        }
        let request = Request::decode(&page.read(self.consumed % SLOTS))?;
        self.consumed = self.consumed.wrapping_add(1);
        Ok(Some(request))
    }

    /// True when there is a request to be read, or the ring is broken.
    pub fn has_requests(&self, page: &impl SharedPage) -> bool {
        page.load(Index::Requests) != self.consumed
    }

    /// Requests that were read and not answered.
    pub fn held(&self) -> u32 {
        self.consumed.wrapping_sub(self.answered)
    }

    /// Answers a request; Xen is to be notified then. Answers may come in any order.
    ///
    /// # Errors
    /// When every request was answered.
    pub fn answer(&mut self, page: &mut impl SharedPage, request: &Request) -> Result<(), RingError> {
        if self.held() == 0 {
            return Err(RingError::Unasked { vcpu: request.vcpu, gfn: request.gfn });
        }
        self.push(page, request);
        Ok(())
    }

    /// Has Xen let go on a vCPU that waits for the answer to a request of another, earlier ring; nothing where it does not
    /// wait. Xen's count of slots is wrong after this: the ring must be disabled before the guest runs.
    pub fn release(&mut self, page: &mut impl SharedPage, vcpu: u32) {
        self.push(page, &Request::release(vcpu));
        self.consumed = self.answered;
    }

    fn push(&mut self, page: &mut impl SharedPage, response: &Request) {
        page.write(self.answered % SLOTS, &response.encode_response());
        self.answered = self.answered.wrapping_add(1);
        page.store(Index::Responses, self.answered);
    }
}

#[cfg(test)]
mod tests;
