//! A fault port as the kernel's userfaultfd behaves, or one whose waiters must be resumed by hand.

use std::collections::{BTreeMap, VecDeque};

use descriptor::{FrameRange, Gfn, PAGE_SIZE, PageCount};
use fastrand::Rng;
use memtap::port::{Event, Installed, Stop, Waiter};

/// The memory of a clone and its faults.
#[derive(Debug)]
pub struct Port {
    granule: u64,
    memory: Vec<u8>,
    present: Vec<bool>,
    /// Times that bytes from the server were installed.
    fetched: Vec<u8>,
    /// The pager read that these were given up.
    given_up: Vec<bool>,
    /// The pager was told that these will be overwritten, when they were not there.
    forgone: Vec<bool>,
    events: VecDeque<Event>,
    unread_discards: usize,
    blocked: BTreeMap<u64, Vec<u32>>,
    woken: Vec<u32>,
    wakes: bool,
    busy: u32,
    rng: Rng,
}

impl Port {
    /// A port over `frames` absent frames that are installed in granules. `wakes`: installing wakes the waiters. `busy`: the
    /// installations in a thousand that stop early.
    pub fn new(frames: u64, granule: u64, wakes: bool, busy: u32, rng: Rng) -> Self {
        let size = frames as usize;
        Self {
            granule,
            memory: vec![0; size * PAGE_SIZE as usize],
            present: vec![false; size],
            fetched: vec![0; size],
            given_up: vec![false; size],
            forgone: vec![false; size],
            events: VecDeque::new(),
            unread_discards: 0,
            blocked: BTreeMap::new(),
            woken: Vec::new(),
            wakes,
            busy,
            rng,
        }
    }

    /// True when the clone has the page.
    pub fn is_present(&self, gfn: Gfn) -> bool {
        self.present[gfn.index() as usize]
    }

    /// A word of a page.
    pub fn word(&self, gfn: Gfn, index: u64) -> u64 {
        let at = (gfn.address() + index * 8) as usize;
        u64::from_le_bytes(self.memory[at..at + 8].try_into().expect("eight bytes"))
    }

    /// Writes a word of a page that is there.
    pub fn write(&mut self, gfn: Gfn, index: u64, value: u64) {
        assert!(self.is_present(gfn), "the guest writes to absent page {gfn}");
        let at = (gfn.address() + index * 8) as usize;
        self.memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// A thread touches an absent page and waits.
    pub fn fault(&mut self, gfn: Gfn, thread: u32, write: bool) {
        let granule = self.granule_of(gfn);
        self.blocked.entry(granule).or_default().push(thread);
        // The kernel reports a page whose waiter it does not name.
        let (gfn, waiter) = if self.wakes { (Gfn::new(granule), 0) } else { (gfn, thread) };
        self.events.push_back(Event::Fault { gfn, waiter: Waiter(waiter), write });
    }

    /// A thread gives whole granules up; it goes on when the pages were [taken](Port::take).
    pub fn discard(&mut self, range: FrameRange) {
        self.events.push_back(Event::Discard { range });
        self.unread_discards += 1;
    }

    /// Takes pages away some time after the discard was read.
    pub fn take(&mut self, range: FrameRange) {
        for gfn in range.frames() {
            self.present[gfn.index() as usize] = false;
        }
        let bytes = range.start().address() as usize..range.end().address() as usize;
        self.memory[bytes].fill(0);
    }

    /// From now on no bytes of the server's may be installed at `gfn`, unless they come with others of a granule.
    pub fn forgo(&mut self, gfn: Gfn) {
        self.forgone[gfn.index() as usize] = self.granule == 1;
    }

    /// True when events are unread.
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// Unread events, at times in another order than they happened in.
    pub fn read_events(&mut self) -> Vec<Event> {
        let count = self.rng.usize(1..=self.events.len().max(1)).min(self.events.len());
        let mut events: Vec<Event> = self.events.drain(..count).collect();
        if self.rng.u8(0..4) == 0 {
            self.rng.shuffle(&mut events);
        }
        for event in &events {
            if let Event::Discard { range } = event {
                self.unread_discards -= 1;
                range.frames().for_each(|gfn| self.given_up[gfn.index() as usize] = true);
            }
        }
        events
    }

    /// Installs pages from the server.
    pub fn install(&mut self, start: Gfn, pages: &[u8]) -> Installed {
        let count = pages.len() as u64 / PAGE_SIZE;
        assert_eq!(pages.len() as u64 % PAGE_SIZE, 0, "part of a page is installed");
        self.install_with(FrameRange::new(start, PageCount::new(count)), Some(pages))
    }

    /// Installs pages of zeros.
    pub fn install_zeros(&mut self, range: FrameRange) -> Installed {
        self.install_with(range, None)
    }

    /// Lets a waiter go on.
    pub fn resume(&mut self, gfn: Gfn, waiter: Waiter) {
        let granule = self.granule_of(gfn);
        if self.wakes {
            self.wake(granule);
        } else if let Some(threads) = self.blocked.get_mut(&granule) {
            self.woken.extend(threads.extract_if(.., |thread| *thread == waiter.0));
        }
    }

    /// Threads that may go on since the last call.
    pub fn take_woken(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.woken)
    }

    fn install_with(&mut self, range: FrameRange, pages: Option<&[u8]>) -> Installed {
        let granule = PageCount::new(self.granule);
        assert!(range.start().index().is_multiple_of(self.granule), "{range} is not aligned to the granule");
        assert!(range.count().get().is_multiple_of(self.granule), "{range} is no whole granules");
        let stopped = |count: u64, stop| Installed { count: PageCount::new(count), stopped: Some(stop) };
        if self.unread_discards > 0 {
            return stopped(0, Stop::Busy);
        }
        for piece in range.chunks(granule) {
            let done = (piece.start() - range.start()).get();
            if self.rng.u32(0..1000) < self.busy {
                return stopped(done, Stop::Busy);
            }
            if self.is_present(piece.start()) {
                let again = piece.frames().all(|gfn| self.given_up[gfn.index() as usize]);
                assert!(pages.is_none() && again, "page {piece} is installed although it is there");
                return stopped(done, Stop::AlreadyPresent);
            }
            for gfn in piece.frames() {
                let index = gfn.index() as usize;
                self.present[index] = true;
                if let Some(pages) = pages {
                    assert!(!self.given_up[index], "page {gfn} is installed although it was given up");
                    assert!(!self.forgone[index], "page {gfn} is installed although it is about to be overwritten");
                    self.fetched[index] += 1;
                    assert_eq!(self.fetched[index], 1, "page {gfn} is installed twice");
                    let from = (gfn - range.start()).bytes() as usize;
                    let to = gfn.address() as usize;
                    self.memory[to..to + PAGE_SIZE as usize].copy_from_slice(&pages[from..from + PAGE_SIZE as usize]);
                }
            }
            if self.wakes {
                self.wake(piece.start().index());
            }
        }
        Installed { count: range.count(), stopped: None }
    }

    fn wake(&mut self, granule: u64) {
        self.woken.extend(self.blocked.remove(&granule).unwrap_or_default());
    }

    fn granule_of(&self, gfn: Gfn) -> u64 {
        gfn.index() / self.granule * self.granule
    }
}
