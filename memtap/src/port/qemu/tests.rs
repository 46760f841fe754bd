//! The port against a destination that reads the stream as QEMU does: every page arrives exactly once, whatever is asked for
//! and in whatever order pages are installed, and the end comes after the last; it is complete once it says so.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::return_path::Message;
use super::return_path::testing::encode;
use super::testing::{Destination, Received, descriptor};
use super::*;

const PATIENCE: Duration = Duration::from_secs(60);

fn byte_of(gfn: Gfn) -> u8 {
    (gfn.index() % 251) as u8
}

fn is_zero(gfn: Gfn) -> bool {
    (gfn.index() / 3).is_multiple_of(2)
}

/// What a clone has in the end.
fn whole(memory: &descriptor::memory::MemoryMap) -> Received {
    memory
        .present()
        .runs()
        .flat_map(FrameRange::frames)
        .map(|gfn| (gfn, if is_zero(gfn) { 0 } else { byte_of(gfn) }))
        .collect()
}

/// The page sizes decide whether a page stands alone.
fn granule_of(descriptor: &Descriptor, gfn: Gfn) -> FrameRange {
    let page = descriptor.memory.region_of(gfn).unwrap().page_size.frames();
    FrameRange::new(Gfn::new(gfn.index() / page.get() * page.get()), page)
}

/// Installs one page, or the whole huge page, waiting where the port is busy; what it reports goes to `events`.
fn install(port: &mut QemuPort, descriptor: &Descriptor, gfn: Gfn, events: &mut Vec<Event>) {
    let range = granule_of(descriptor, gfn);
    let huge = range.count() > PageCount::ONE;
    if port.sent().contains(gfn) {
        return;
    }
    let mut pages = vec![0; range.count().bytes() as usize];
    for (page, gfn) in pages.chunks_mut(4096).zip(range.frames()).filter(|(_, gfn)| !is_zero(*gfn)) {
        page.fill(byte_of(gfn));
    }
    loop {
        let outcome =
            if is_zero(gfn) && !huge { port.install_zeros(range) } else { port.install(range.start(), &pages) };
        match outcome.unwrap() {
            Installed { stopped: Some(Stop::Busy), count } => {
                assert!(count.is_zero());
                port.wait(PATIENCE).unwrap();
                port.read_events(events).unwrap();
            }
            _ => return,
        }
    }
}

/// Serves what is asked for, pushes `order` and then the rest, ends the migration, and returns when QEMU
/// has everything.
fn serve(port: &mut QemuPort, descriptor: &Descriptor, mut events: Vec<Event>, order: &[Gfn]) {
    let rest: Vec<Gfn> = descriptor.memory.present().runs().flat_map(FrameRange::frames).collect();
    let mut push = order.iter().chain(&rest);
    loop {
        port.read_events(&mut events).unwrap();
        for event in std::mem::take(&mut events) {
            match event {
                Event::Fault { gfn, .. } => install(port, descriptor, gfn, &mut events),
                Event::Closed => return,
                Event::Discard { .. } => panic!("QEMU discards nothing"),
            }
        }
        match push.next() {
            Some(gfn) => install(port, descriptor, *gfn, &mut events),
            None if port.session.has_ended() => port.wait(PATIENCE).unwrap(),
            None => port.complete().unwrap(),
        }
    }
}

fn destination(descriptor: &Descriptor, wants: &[u64]) -> Arc<Destination> {
    let wants = wants.iter().map(|gfn| Gfn::new(*gfn)).collect();
    let memory = descriptor.memory.clone();
    Arc::new(Destination { memory, received: Mutex::default(), preempted: Mutex::default(), wants })
}

fn pair() -> (OwnedFd, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    (near.into(), far)
}

const MACHINE: &[(&str, u64, bool)] =
    &[("pc.ram", 1024, true), ("pc.bios", 64, false), ("/rom@etc/acpi/tables", 1, false)];

#[test]
fn a_clone_gets_every_page_once() {
    let descriptor = descriptor(MACHINE);
    let destination = destination(&descriptor, &[1030, 513, 1536, 1031]);
    let (near, far) = pair();
    let mut port = QemuPort::start(&descriptor, near, None).unwrap();
    assert_eq!(port.traits(), PortTraits { granule: PageCount::new(512), needs_zeros: true });
    let thread = std::thread::spawn({
        let destination = Arc::clone(&destination);
        move || destination.load(&far)
    });
    serve(&mut port, &descriptor, vec![], &[]);
    assert!(thread.join().unwrap());
    assert_eq!(*destination.received.lock().unwrap(), whole(&descriptor.memory));
}

#[test]
fn asked_for_pages_and_no_others_take_the_preempt_channel() {
    let descriptor = descriptor(&[("pc.ram", 600, false), ("pc.bios", 64, false)]);
    let wants = [5, 1030, 599];
    let destination = destination(&descriptor, &wants);
    let (near, far) = pair();
    let (near_preempt, far_preempt) = pair();
    let mut port = QemuPort::start(&descriptor, near, Some(near_preempt)).unwrap();
    let preempt_thread = std::thread::spawn({
        let destination = Arc::clone(&destination);
        move || destination.load_preempt(&far_preempt)
    });
    let thread = std::thread::spawn({
        let destination = Arc::clone(&destination);
        move || destination.load(&far)
    });
    // All requests must be known before pages are pushed.
    let mut events = Vec::new();
    while events.len() < 2 * wants.len() {
        port.wait(PATIENCE).unwrap();
        port.read_events(&mut events).unwrap();
    }
    serve(&mut port, &descriptor, events, &[]);
    assert!(thread.join().unwrap());
    preempt_thread.join().unwrap();
    let mut frames: Vec<u64> = destination.preempted.lock().unwrap().iter().map(|gfn| gfn.index()).collect();
    frames.sort_unstable();
    assert_eq!(frames, [5, 599, 1030]);
    assert_eq!(*destination.received.lock().unwrap(), whole(&descriptor.memory));
}

#[test]
fn a_fresh_source_takes_over() {
    let descriptor = descriptor(MACHINE);
    let destination = destination(&descriptor, &[600]);
    let had: Vec<u64> = (512..1024).chain([1025, 1031, 1087]).collect();
    let received: Received =
        whole(&descriptor.memory).into_iter().filter(|(gfn, _)| had.contains(&gfn.index())).collect();
    *destination.received.lock().unwrap() = received.clone();
    let (near, far) = pair();
    let thread = std::thread::spawn({
        let destination = Arc::clone(&destination);
        move || destination.go_on(&far)
    });
    let mut port = QemuPort::recover(&descriptor, near, None, PATIENCE).unwrap();
    let sent: Vec<Gfn> = port.sent().runs().flat_map(FrameRange::frames).collect();
    assert_eq!(sent, received.keys().copied().collect::<Vec<_>>());
    serve(&mut port, &descriptor, vec![], &[]);
    assert!(thread.join().unwrap());
    assert_eq!(*destination.received.lock().unwrap(), whole(&descriptor.memory));
}

#[test]
fn a_recovery_that_is_not_answered_ends() {
    let descriptor = descriptor(MACHINE);
    let (near, far) = pair();
    let refused = QemuPort::recover(&descriptor, near, None, Duration::from_millis(20)).unwrap_err();
    assert!(matches!(refused, QemuError::TimedOut(_)), "{refused}");
    drop(far);
    let (near, far) = pair();
    drop(far);
    let refused = QemuPort::recover(&descriptor, near, None, PATIENCE).unwrap_err();
    assert!(matches!(refused, QemuError::Port(PortError::Closed { .. })), "{refused}");
}

#[test]
fn the_end_never_comes_before_the_last_page() {
    let descriptor = descriptor(&[("pc.ram", 3, false)]);
    let (near, _far) = pair();
    let mut port = QemuPort::start(&descriptor, near, None).unwrap();
    let two = FrameRange::new(Gfn::new(0), PageCount::new(2));
    assert_eq!(port.install_zeros(two).unwrap(), Installed { count: PageCount::new(2), stopped: None });
    let early = port.complete().unwrap_err().to_string();
    assert!(early.contains("1 pages missing"), "{early}");
    let all = FrameRange::new(Gfn::new(0), PageCount::new(3));
    let again = Installed { count: PageCount::ZERO, stopped: Some(Stop::AlreadyPresent) };
    assert_eq!(port.install_zeros(all).unwrap(), again);
    port.install_zeros(FrameRange::single(Gfn::new(2))).unwrap();
    port.complete().unwrap();
}

#[test]
fn part_of_a_huge_page_is_refused() {
    let descriptor = descriptor(&[("pc.ram", 1024, true)]);
    let (near, _far) = pair();
    let mut port = QemuPort::start(&descriptor, near, None).unwrap();
    for (start, count) in [(0, 511), (1, 512), (4096, 1)] {
        assert!(port.install_zeros(FrameRange::new(Gfn::new(start), PageCount::new(count))).is_err());
    }
}

#[test]
fn a_destination_that_does_not_read_makes_the_port_busy_and_not_the_pager_wait() {
    let descriptor = descriptor(&[("pc.ram", 4096, false)]);
    let (near, far) = pair();
    let mut port = QemuPort::start(&descriptor, near, None).unwrap();
    let outcome = port.install(Gfn::new(0), &vec![1; 16 << 20]).unwrap();
    assert_eq!(outcome.stopped, Some(Stop::Busy));
    assert!(outcome.count < PageCount::new(1024), "{outcome:?}");
    let destination = destination(&descriptor, &[]);
    let thread = std::thread::spawn(move || destination.load(&far));
    let mut done = outcome.count;
    let mut events = Vec::new();
    while done < PageCount::new(4096) {
        port.wait(PATIENCE).unwrap();
        port.read_events(&mut events).unwrap();
        let rest = PageCount::new(4096) - done;
        done += port.install(Gfn::new(0) + done, &vec![1; rest.bytes() as usize]).unwrap().count;
    }
    port.complete().unwrap();
    while events.is_empty() {
        port.wait(PATIENCE).unwrap();
        port.read_events(&mut events).unwrap();
    }
    assert_eq!(events, [Event::Closed]);
    assert!(thread.join().unwrap());
}

#[test]
fn a_clone_that_goes_away_is_told_apart_from_one_that_is_complete() {
    let descriptor = descriptor(MACHINE);
    let (near, far) = pair();
    let mut port = QemuPort::start(&descriptor, near, None).unwrap();
    drop(far);
    port.wait(PATIENCE).unwrap();
    let error = port.read_events(&mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("1089 pages missing"), "{error}");
}

/// A port whose migration ended, and the other end of its socket, which everything was read from.
fn ended() -> (QemuPort, UnixStream) {
    let descriptor = descriptor(&[("pc.ram", 3, false)]);
    let (near, far) = pair();
    let mut port = QemuPort::start(&descriptor, near, None).unwrap();
    port.install_zeros(FrameRange::new(Gfn::new(0), PageCount::new(3))).unwrap();
    port.complete().unwrap();
    port.read_events(&mut Vec::new()).unwrap();
    (port, far)
}

#[test]
fn a_clone_that_goes_away_after_the_end_is_complete_only_if_it_said_so() {
    for says in [false, true] {
        let (mut port, mut far) = ended();
        if says {
            far.write_all(&encode(&Message::Shut { error: 0 })).unwrap();
        }
        // Closed with the stream unread, as by a QEMU that failed while it loaded.
        drop(far);
        port.wait(PATIENCE).unwrap();
        let mut events = Vec::new();
        let result = port.read_events(&mut events);
        if says {
            result.unwrap();
            assert_eq!(events, [Event::Closed]);
        } else {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("0 pages missing") && error.contains("--recover"), "{error}");
            assert!(events.is_empty());
        }
    }
}

#[test]
fn a_clone_that_never_says_that_it_is_complete_is_given_up() {
    let (mut port, _far) = ended();
    let written = port.written.unwrap();
    port.read_events(&mut Vec::new()).unwrap();
    port.written = written.checked_sub(SHUT_TIMEOUT);
    let error = port.read_events(&mut Vec::new()).unwrap_err();
    assert!(matches!(error, PortError::Unconfirmed { .. }), "{error}");
}

#[test]
fn what_qemu_may_not_say_is_an_error() {
    let descriptor = descriptor(MACHINE);
    let request = |block: Option<&str>, offset, length| {
        let block = block.map(str::to_owned);
        return_path::testing::encode(&return_path::Message::RequestPages { block, offset, length })
    };
    let cases = [
        (request(None, 0, 4096), "without a block"),
        (request(Some("vga"), 0, 4096), "unknown block \"vga\""),
        (request(Some("pc.ram"), 0, 4096), "no such page"),
        (request(Some("pc.ram"), 4096, 2 << 20), "no such page"),
        (request(Some("pc.ram"), 4 << 20, 2 << 20), "no such page"),
        (request(Some("pc.bios"), !0xfff, 4096), "no such page"),
        (b"\0\x01\0\x04\0\0\0\0".to_vec(), "1089 pages before the end"),
        (b"\0\x02\0\x04\0\0\0\x09".to_vec(), "PONG 9"),
        (b"\0\x06\0\x04\0\0\0\x01".to_vec(), "RESUME"),
        (b"GET / HTTP/1.1\r\n".to_vec(), "unknown type"),
    ];
    for (bytes, expected) in cases {
        let (near, mut far) = pair();
        let mut port = QemuPort::start(&descriptor, near, None).unwrap();
        std::io::Write::write_all(&mut far, &bytes).unwrap();
        let error = port.read_events(&mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_order_of_requests_and_pages_makes_the_same_clone(
        wants in prop::collection::vec(0u64..1089, 0..40),
        order in prop::collection::vec(0u64..1089, 0..200),
    ) {
        let descriptor = descriptor(&[("a", 300, false), ("b", 512, true), ("c", 65, false)]);
        let is_there = |gfn: &u64| descriptor.memory.region_of(Gfn::new(*gfn)).is_some();
        let wants: Vec<u64> = wants.into_iter().filter(is_there).collect();
        let order: Vec<Gfn> = order.into_iter().filter(is_there).map(Gfn::new).collect();
        let destination = destination(&descriptor, &wants);
        let (near, far) = pair();
        let mut port = QemuPort::start(&descriptor, near, None).unwrap();
        let thread = std::thread::spawn({
            let destination = Arc::clone(&destination);
            move || destination.load(&far)
        });
        serve(&mut port, &descriptor, vec![], &order);
        prop_assert!(thread.join().unwrap());
        prop_assert_eq!(&*destination.received.lock().unwrap(), &whole(&descriptor.memory));
    }

    #[test]
    fn whatever_qemu_says_never_panics(said in prop::collection::vec(messages(), 0..12), recovers: bool) {
        let descriptor = descriptor(MACHINE);
        let mut out = Vec::new();
        let session = if recovers { Session::recover(&descriptor, &mut out) } else { Session::start(&descriptor, &mut out) };
        let mut session = session.unwrap();
        let mut events = Vec::new();
        for message in said {
            if session.handle(message, &mut events, &mut out).is_err() {
                break;
            }
        }
        for event in events {
            let Event::Fault { gfn, .. } = event else { panic!("{event:?}") };
            prop_assert!(descriptor.memory.region_of(gfn).is_some());
        }
    }
}

/// Messages that are well-formed, and now and then make sense for [`MACHINE`].
fn messages() -> impl Strategy<Value = return_path::Message> {
    use return_path::Message;
    let block = prop::sample::select(vec!["pc.ram", "pc.bios", "/rom@etc/acpi/tables", "vga"]).prop_map(str::to_owned);
    let offset = prop_oneof![(0u64..1100).prop_map(|page| page * 4096), any::<u64>()];
    let length = prop::sample::select(vec![4096u32, 2 << 20, 0]);
    let words = prop::sample::select(vec![16usize, 1, 2]);
    prop_oneof![
        (0u32..2).prop_map(|error| Message::Shut { error }),
        (0u32..3).prop_map(|value| Message::Pong { value }),
        (0u32..3).prop_map(|value| Message::ResumeAck { value }),
        (prop::option::of(block.clone()), offset, length).prop_map(|(block, offset, length)| Message::RequestPages {
            block,
            offset,
            length
        }),
        (block, words, prop::sample::select(vec![0u8, 0xff, 0x55]))
            .prop_map(|(block, words, byte)| Message::ReceivedBitmap { block, bits: vec![byte; words * 8] }),
    ]
}
