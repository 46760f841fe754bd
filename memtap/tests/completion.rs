//! The end of paging: threads that touch memory at the very moment at which its pager lets go of it must go on.
//!
//! The kernel wakes waiting threads when memory is unregistered, but a fault that comes just then can miss it: clones hung
//! after their last page had arrived, now and then on a busy machine. Here guests are let go again and again at random
//! moments while all of their threads fault.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use descriptor::memory::{MemoryMap, PageSize, Region, RegionKind};
use descriptor::{FrameRange, FrameSet, Gfn, PageCount};
use memtap::guest::embedded::{Backing, EmbeddedGuest, GuestPlan, Workload};
use memtap::port::{Event, FaultPort};

/// Long enough for a machine that does much else.
const LONG: Duration = Duration::from_secs(60);

const ROUNDS: u64 = 300;

#[test]
fn nobody_is_left_waiting_when_paging_ends() {
    let frames = FrameRange::new(Gfn::new(0), PageCount::new(4 * 512));
    let region = Region { name: "ram".into(), frames, kind: RegionKind::Ram, page_size: PageSize::Base };
    let map = MemoryMap::new(vec![region]).unwrap();
    for round in 0..ROUNDS {
        let (guest, mut port, handle) = EmbeddedGuest::new(&map, Backing::Anon).unwrap();
        // A thread that hangs would keep a scope from ending; what it holds is leaked with the failed test.
        let guest: &'static EmbeddedGuest = Box::leak(Box::new(guest));
        let workload: Workload = format!("random,touches=20%,writes=50%,discards=2%,seed={round}").parse().unwrap();
        let free = FrameSet::empty(map.universe());
        let plan = GuestPlan { workload, threads: 4, image: None, free, announce: None, epoch: Instant::now() };
        let (sender, done) = channel();
        std::thread::spawn(move || sender.send(guest.work(&plan).map(|report| report.touches)));
        handle.open();
        let moment = Instant::now() + Duration::from_micros(round * 37 % 500);
        let mut events = Vec::new();
        while Instant::now() < moment {
            port.read_events(&mut events).unwrap();
            for event in events.drain(..) {
                if let Event::Fault { gfn, .. } = event {
                    port.install_zeros(FrameRange::single(gfn)).unwrap();
                }
            }
        }
        port.complete().unwrap();
        let give_up = Instant::now() + LONG;
        while !events.contains(&Event::Closed) {
            assert!(Instant::now() < give_up, "round {round}: the port never closes");
            port.read_events(&mut events).unwrap();
        }
        let touches = done.recv_timeout(LONG).unwrap_or_else(|_| panic!("round {round}: a thread waits for ever"));
        assert!(touches.unwrap() > 0);
    }
}
