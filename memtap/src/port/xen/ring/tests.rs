use super::*;

/// A page in memory, and Xen's end of its ring.
struct Page {
    bytes: Vec<u8>,
    produced: u32,
}

impl Page {
    fn new(begin: u32) -> Self {
        let mut page = Self { bytes: vec![0; 4096], produced: begin };
        page.store(Index::Requests, begin);
        page.store(Index::Responses, begin);
        page
    }

    /// Xen asks for a page.
    fn ask(&mut self, vcpu: u32, flags: u32, gfn: u64, paging: u32) {
        let mut slot = [0xee; SLOT];
        for (offset, value) in [(0, VERSION), (4, flags), (8, 3), (12, vcpu), (32, 0xb), (36, paging)] {
            slot[offset..offset + 4].copy_from_slice(&u32::to_le_bytes(value));
        }
        slot[24..32].copy_from_slice(&gfn.to_le_bytes());
        self.produce(&slot);
    }

    fn produce(&mut self, slot: &[u8; SLOT]) {
        self.write(self.produced % SLOTS, slot);
        self.produced = self.produced.wrapping_add(1);
        self.store(Index::Requests, self.produced);
    }

    fn word(&self, slot: u32, offset: usize) -> u32 {
        let at = slot_offset(slot) + offset;
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap())
    }
}

impl SharedPage for Page {
    fn load(&self, index: Index) -> u32 {
        u32::from_le_bytes(self.bytes[index.offset()..index.offset() + 4].try_into().unwrap())
    }

    fn store(&mut self, index: Index, value: u32) {
        self.bytes[index.offset()..index.offset() + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn read(&self, slot: u32) -> [u8; SLOT] {
        self.bytes[slot_offset(slot)..slot_offset(slot) + SLOT].try_into().unwrap()
    }

    fn write(&mut self, slot: u32, bytes: &[u8; SLOT]) {
        self.bytes[slot_offset(slot)..slot_offset(slot) + SLOT].copy_from_slice(bytes);
    }
}

fn ring_at(begin: u32) -> BackRing {
    BackRing { consumed: begin, answered: begin }
}

#[test]
fn a_request_is_answered_in_kind() {
    let (mut page, mut ring) = (Page::new(0), BackRing::new());
    assert_eq!(ring.next_request(&page), Ok(None));
    page.ask(3, FLAG_VCPU_PAUSED | 1 << 9, 0x1234, 0);
    let request = ring.next_request(&page).unwrap().unwrap();
    assert_eq!((request.vcpu, request.gfn, request.frame_type), (3, Gfn::new(0x1234), 0xb));
    assert!(request.is_paused() && !request.is_drop() && !request.is_evict_failure());
    assert_eq!(ring.next_request(&page), Ok(None));
    ring.answer(&mut page, &request).unwrap();
    assert_eq!(page.load(Index::Responses), 1);
    // The version, which Xen looks at; no flag that paging does not use; nothing of what was in the slot.
    assert_eq!(
        [0, 4, 8, 12, 16, 24, 28, 32, 36, 40].map(|offset| page.word(0, offset)),
        [7, 1, 3, 3, 0, 0x1234, 0, 0xb, 0, 0]
    );
}

#[test]
fn kinds_of_requests_are_told_apart() {
    let (mut page, mut ring) = (Page::new(0), BackRing::new());
    page.ask(0, 0, 5, 1);
    page.ask(1, FLAG_FOREIGN, 6, 2);
    let dropped = ring.next_request(&page).unwrap().unwrap();
    let failed = ring.next_request(&page).unwrap().unwrap();
    assert!(dropped.is_drop() && !dropped.is_paused());
    assert!(failed.is_evict_failure() && failed.flags == FLAG_FOREIGN && !failed.is_paused());
}

#[test]
fn indices_wrap_and_answers_come_in_any_order() {
    let begin = u32::MAX - 2;
    let (mut page, mut ring) = (Page::new(begin), ring_at(begin));
    for round in 0..10 {
        for vcpu in 0..SLOTS {
            page.ask(vcpu, FLAG_VCPU_PAUSED, u64::from(round * SLOTS + vcpu), 0);
        }
        let mut requests: Vec<Request> = std::iter::from_fn(|| ring.next_request(&page).unwrap()).collect();
        assert_eq!(requests.len(), SLOTS as usize);
        assert_eq!(ring.held(), SLOTS);
        requests.reverse();
        for request in &requests {
            ring.answer(&mut page, request).unwrap();
        }
        assert_eq!(page.load(Index::Responses), page.produced);
        let vcpus: Vec<u32> =
            (0..SLOTS).map(|n| page.word(page.produced.wrapping_sub(SLOTS).wrapping_add(n), 12)).collect();
        assert_eq!(vcpus, [7, 6, 5, 4, 3, 2, 1, 0]);
    }
}

#[test]
fn there_are_never_more_answers_than_requests() {
    let (mut page, mut ring) = (Page::new(0), BackRing::new());
    page.ask(2, FLAG_VCPU_PAUSED, 9, 0);
    let request = ring.next_request(&page).unwrap().unwrap();
    ring.answer(&mut page, &request).unwrap();
    assert_eq!(ring.answer(&mut page, &request), Err(RingError::Unasked { vcpu: 2, gfn: Gfn::new(9) }));
    assert_eq!(page.load(Index::Responses), 1);
}

#[test]
fn a_broken_ring_is_told() {
    let broken = |spoil: &dyn Fn(&mut Page)| {
        let (mut page, mut ring) = (Page::new(0), BackRing::new());
        page.ask(0, 0, 1, 0);
        spoil(&mut page);
        let first = ring.next_request(&page).unwrap_err();
        assert_eq!(ring.next_request(&page), Err(first), "and it stays so");
        first
    };
    let slot = |offset: usize, value: u32| {
        move |page: &mut Page| page.bytes[DATA + offset..DATA + offset + 4].copy_from_slice(&value.to_le_bytes())
    };
    assert_eq!(broken(&slot(0, 8)), RingError::Version { version: 8 });
    assert_eq!(broken(&slot(8, 1)), RingError::Reason { reason: 1 });
    assert_eq!(broken(&slot(28, u32::MAX)), RingError::Frame { frame: 0xffff_ffff_0000_0001 });
    for produced in [SLOTS + 1, u32::MAX] {
        let overrun = broken(&|page: &mut Page| page.store(Index::Requests, produced));
        assert_eq!(overrun, RingError::Overrun { produced, consumed: 0, answered: 0 });
    }
}

#[test]
fn vcpus_of_an_earlier_ring_are_released() {
    let (mut page, mut ring) = (Page::new(0), BackRing::new());
    for vcpu in 0..10 {
        ring.release(&mut page, vcpu);
    }
    assert_eq!(page.load(Index::Responses), 10);
    assert_eq!([0, 4, 12, 36].map(|offset| page.word(9, offset)), [7, 1, 9, 1]);
    // Xen takes no frame for filled because of it.
    assert!(Request::release(3).is_drop());
}
