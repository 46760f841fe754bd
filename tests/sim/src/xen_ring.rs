//! The back end of a Xen paging ring against any front end: what fuzzing and a test by seed share.
//!
//! The input is a list of operations of a hypervisor gone wrong: requests as they should be, slots and indices of any bytes, and
//! answers of ours in between. A model counts requests and answers beside the ring. Checked: no panic; a request that was
//! written as it should be is read as it was written, in order, once; there are never more answers than requests; an answer is
//! in its slot before it is counted; a ring that is told to be broken stays so.

use std::collections::VecDeque;

use memtap::port::xen::ring::{
    BackRing, FLAG_VCPU_PAUSED, Index, Request, SLOT, SLOTS, SharedPage, VERSION, slot_offset,
};

/// The page, and what Xen would know of it.
struct Page {
    bytes: Vec<u8>,
    produced: u32,
    /// Well-formed requests that were not read.
    unread: VecDeque<(u32, u64)>,
    /// Someone wrote where Xen does not.
    spoiled: bool,
}

impl Page {
    fn put(&mut self, offset: usize, value: u32) {
        self.bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn ask(&mut self, vcpu: u32, gfn: u64, paging: u32) {
        let slot = slot_offset(self.produced % SLOTS);
        for (offset, value) in [(0, VERSION), (4, FLAG_VCPU_PAUSED), (8, 3), (12, vcpu), (32, 0xb), (36, paging)] {
            self.put(slot + offset, value);
        }
        self.bytes[slot + 24..slot + 32].copy_from_slice(&gfn.to_le_bytes());
        self.produced = self.produced.wrapping_add(1);
        self.put(Index::Requests.offset(), self.produced);
        self.unread.push_back((vcpu, gfn));
    }
}

impl SharedPage for Page {
    fn load(&self, index: Index) -> u32 {
        let offset = index.offset();
        self.bytes[offset..offset + 4].iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
    }

    fn store(&mut self, index: Index, value: u32) {
        assert_eq!(index, Index::Responses, "the index of requests is Xen's");
        self.put(index.offset(), value);
    }

    fn read(&self, slot: u32) -> [u8; SLOT] {
        let mut bytes = [0; SLOT];
        bytes.copy_from_slice(&self.bytes[slot_offset(slot)..slot_offset(slot) + SLOT]);
        bytes
    }

    fn write(&mut self, slot: u32, bytes: &[u8; SLOT]) {
        self.bytes[slot_offset(slot)..slot_offset(slot) + SLOT].copy_from_slice(bytes);
    }
}

/// Runs the operations that `bytes` stand for.
///
/// # Panics
/// When a property does not hold.
pub fn run(bytes: &[u8]) {
    let mut page = Page { bytes: vec![0; 4096], produced: 0, unread: VecDeque::new(), spoiled: false };
    let mut ring = BackRing::new();
    let mut held: Vec<Request> = Vec::new();
    let mut answered = 0u32;
    for operation in bytes.chunks(4) {
        let [kind, first, second, third] = std::array::from_fn(|n| operation.get(n).copied().unwrap_or_default());
        match kind % 8 {
            // Xen asks, as long as it has a free slot by its own count.
            0..=2 if page.produced.wrapping_sub(answered) < SLOTS || page.spoiled => {
                page.ask(u32::from(first), u64::from(second) << 8 | u64::from(third), u32::from(first % 4));
            }
            3 | 4 => match ring.next_request(&page) {
                Ok(None) => assert!(page.unread.is_empty() || page.spoiled, "a request was not read"),
                Ok(Some(request)) => {
                    let expected = page.unread.pop_front();
                    let found = (request.vcpu, request.gfn.index());
                    assert!(page.spoiled || expected == Some(found), "{expected:?} was read as {request:?}");
                    held.push(request);
                }
                Err(error) => {
                    assert!(page.spoiled, "{error} in a ring that nobody spoiled");
                    assert_eq!(ring.next_request(&page), Err(error));
                }
            },
            5 if !held.is_empty() => {
                let request = held.swap_remove(usize::from(first) % held.len());
                let outcome = ring.answer(&mut page, &request);
                assert_eq!(outcome, Ok(()), "{} held", held.len() + 1);
                let slot = page.read(answered % SLOTS);
                answered = answered.wrapping_add(1);
                assert_eq!(page.load(Index::Responses), answered);
                assert_eq!(slot[..4], VERSION.to_le_bytes());
                assert_eq!(slot[12..16], request.vcpu.to_le_bytes());
                assert_eq!(slot[24..32], request.gfn.index().to_le_bytes());
            }
            5 => {
                let request = Request::release(u32::from(first));
                assert!(ring.answer(&mut page, &request).is_err(), "an answer to nothing");
            }
            6 if first.is_multiple_of(4) => {
                page.spoiled = true;
                page.put(Index::Requests.offset(), page.produced.wrapping_add(u32::from(second)).wrapping_sub(8));
            }
            7 if first.is_multiple_of(4) => {
                page.spoiled = true;
                let offset = slot_offset(u32::from(second)) + usize::from(third);
                page.bytes[offset] ^= first | 1;
            }
            _ => {}
        }
        assert_eq!(ring.held() as usize, held.len());
        assert!(held.len() <= SLOTS as usize);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn xen_ring_by_seed() {
        for seed in 0..20_000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut bytes = vec![0; random.usize(..400)];
            random.fill(&mut bytes);
            // Half of the runs are of a Xen that does nothing wrong.
            if seed % 2 == 0 {
                bytes.chunks_mut(4).for_each(|operation| operation[0] %= 6);
            }
            if std::panic::catch_unwind(|| super::run(&bytes)).is_err() {
                panic!("seed {seed}");
            }
        }
    }
}
