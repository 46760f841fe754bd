//! The userfaultfd port against the kernel, one property at a time.
//!
//! Goal: the kernel's answers mean what the port makes of them. Method: the memory of an embedded guest, touched by single
//! threads while the test plays the pager.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use descriptor::memory::{PageSize, Region, RegionKind};

use super::*;
use crate::port::{Event, FaultPort, Installed, Stop, Waiter};

const PAGE: [u8; PAGE_SIZE as usize] = [0x5a; PAGE_SIZE as usize];

fn guest(backing: Backing) -> (GuestMemory, UffdPort) {
    let region = |(name, start): (&str, u64)| Region {
        name: name.into(),
        frames: range(start, 512),
        kind: RegionKind::Ram,
        page_size: PageSize::Base,
    };
    let map = MemoryMap::new([("low", 0), ("high", 1024)].map(region).into()).unwrap();
    let (guest, port, _) = EmbeddedGuest::new(&map, backing).unwrap();
    (guest.memory, port)
}

fn range(start: u64, count: u64) -> FrameRange {
    FrameRange::new(Gfn::new(start), PageCount::new(count))
}

fn installed(count: u64, stopped: Option<Stop>) -> Installed {
    Installed { count: PageCount::new(count), stopped }
}

fn word(memory: &GuestMemory, gfn: u64) -> u64 {
    memory.page(Gfn::new(gfn)).unwrap()[0].load(Ordering::Relaxed)
}

/// Waits for events.
fn events(port: &mut UffdPort) -> Vec<Event> {
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut events = Vec::new();
    while events.is_empty() {
        assert!(Instant::now() < deadline, "no event came");
        port.read_events(&mut events).unwrap();
        std::thread::yield_now();
    }
    events
}

/// Installs, however long a discard keeps the port busy.
fn install(port: &mut UffdPort, gfn: u64, pages: &[u8]) -> Installed {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let outcome = port.install(Gfn::new(gfn), pages).unwrap();
        if outcome.stopped != Some(Stop::Busy) {
            return outcome;
        }
        assert!(Instant::now() < deadline, "the port stayed busy");
        std::thread::yield_now();
    }
}

#[test]
fn a_page_is_never_replaced() {
    for backing in [Backing::Anon, Backing::Memfd] {
        let (memory, mut port) = guest(backing);
        assert_eq!(port.install(Gfn::new(5), &PAGE).unwrap(), installed(1, None));
        memory.page(Gfn::new(5)).unwrap()[0].store(7, Ordering::Relaxed);
        assert_eq!(port.install(Gfn::new(5), &PAGE).unwrap(), installed(0, Some(Stop::AlreadyPresent)));
        assert_eq!(port.install_zeros(range(5, 1)).unwrap(), installed(0, Some(Stop::AlreadyPresent)));
        assert_eq!(port.install(Gfn::new(3), &PAGE.repeat(4)).unwrap(), installed(2, Some(Stop::AlreadyPresent)));
        assert_eq!(port.install_zeros(range(6, 4)).unwrap(), installed(4, None));
        assert_eq!((word(&memory, 5), word(&memory, 4), word(&memory, 6)), (7, 0x5a5a_5a5a_5a5a_5a5a, 0));
        // Nothing lies between the regions.
        assert!(port.install(Gfn::new(511), &PAGE.repeat(2)).is_err());
    }
}

#[test]
fn a_fault_is_told_and_answered() {
    let (memory, mut port) = guest(Backing::Anon);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| word(&memory, 1030));
        let fault = Event::Fault { gfn: Gfn::new(1030), waiter: Waiter(0), write: false };
        assert_eq!(events(&mut port), [fault]);
        install(&mut port, 1030, &PAGE);
        port.resume(Gfn::new(1030), Waiter(0)).unwrap();
        assert_eq!(reader.join().unwrap(), 0x5a5a_5a5a_5a5a_5a5a);
    });
}

#[test]
fn an_unread_discard_keeps_the_port_busy() {
    let (memory, mut port) = guest(Backing::Anon);
    install(&mut port, 8, &PAGE.repeat(4));
    std::thread::scope(|scope| {
        let discarder = scope.spawn(|| memory.discard(range(8, 4)).unwrap());
        // The thread stands in its discard until that is read, so that this ends.
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut gfn = 100;
        while port.install(Gfn::new(gfn), &PAGE).unwrap() == installed(1, None) {
            assert!(Instant::now() < deadline, "no discard came");
            gfn = if gfn == 500 { 100 } else { gfn + 1 };
            if gfn == 100 {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(events(&mut port), [Event::Discard { range: range(8, 4) }]);
        discarder.join().unwrap();
    });
    assert_eq!(install(&mut port, 8, &PAGE), installed(1, None));
}

#[test]
fn a_page_believed_present_reads_as_zeros_after_its_discard() {
    let (memory, mut port) = guest(Backing::Anon);
    install(&mut port, 8, &PAGE);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            memory.discard(range(8, 1)).unwrap();
            word(&memory, 8)
        });
        assert_eq!(events(&mut port), [Event::Discard { range: range(8, 1) }]);
        let fault = Event::Fault { gfn: Gfn::new(8), waiter: Waiter(0), write: false };
        assert_eq!(events(&mut port), [fault]);
        // As a pager would that took the page for present again.
        port.resume(Gfn::new(8), Waiter(0)).unwrap();
        assert_eq!(thread.join().unwrap(), 0);
    });
}

#[test]
fn a_completed_guest_goes_on_alone() {
    let (memory, mut port) = guest(Backing::Anon);
    install(&mut port, 0, &PAGE);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| word(&memory, 1));
        events(&mut port);
        port.complete().unwrap();
        assert_eq!(reader.join().unwrap(), 0);
    });
    assert_eq!(events(&mut port), [Event::Closed]);
    memory.discard(range(0, 1)).unwrap();
    assert_eq!(word(&memory, 0), 0);
}
