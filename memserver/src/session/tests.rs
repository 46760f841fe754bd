use std::sync::Arc;

use descriptor::fetch::{Class, Delivery, MAX_RANGES, Tag, VERSION};
use descriptor::{FrameRange, Gfn};
use proptest::prelude::*;

use super::*;

const IMAGE: ImageId = ImageId::from_bytes([7; 16]);
const SECOND: Duration = Duration::from_secs(1);

fn find(image: ImageId) -> Option<ImageFacts> {
    (image == IMAGE).then_some(ImageFacts { frames: PageCount::new(1000), local: true, multicast: true })
}

fn range(start: u64, count: u64) -> FrameRange {
    FrameRange::new(Gfn::new(start), PageCount::new(count))
}

fn hello(image: ImageId, capabilities: Capabilities, ticket: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Preamble.encode(&mut bytes);
    Message::Hello(Hello { image, capabilities, ticket }).encode(&mut bytes);
    bytes
}

fn request(tag: Tag, ranges: &[FrameRange]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Request::encode(tag, Class::Demand, Delivery::Unicast, ranges, &mut bytes);
    bytes
}

fn multicast_request(tag: Tag, ranges: &[FrameRange]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Request::encode(tag, Class::Demand, Delivery::Multicast, ranges, &mut bytes);
    bytes
}

fn offer() -> ChannelOffer {
    ChannelOffer {
        group: "239.1.2.3:7071".parse().unwrap(),
        feedback: None,
        feedback_port: 4321,
        payload: 1448,
        chunk_frames: PageCount::new(256),
        session: 1,
        member: 2,
        start_seq: 3,
        start_block: [4, 5],
    }
}

fn session(change: impl FnOnce(&mut SessionConfig)) -> Session {
    let mut config = SessionConfig { capabilities: Capabilities::LZ4, ..SessionConfig::default() };
    change(&mut config);
    Session::new(Duration::ZERO, Arc::new(config))
}

/// A session past its handshake.
fn open(change: impl FnOnce(&mut SessionConfig)) -> Session {
    let mut session = session(change);
    session.receive(Duration::ZERO, &hello(IMAGE, Capabilities::default(), b""), &find);
    assert!(matches!(session.poll(), Some(Event::Welcomed { .. })));
    session.control().clear();
    session
}

/// The control messages, without the preamble if there is one.
fn said(session: &mut Session) -> Vec<String> {
    let bytes = std::mem::take(session.control());
    let mut rest = bytes.strip_prefix(b"SFfe\x01\0\x02\0").unwrap_or(&bytes);
    let mut messages = Vec::new();
    while let Some((message, length)) = decode(rest).unwrap() {
        messages.push(match message {
            Message::Welcome(welcome) => format!("welcome {:?}", welcome.capabilities),
            Message::Refused(reason, _) => format!("refused {reason:?}"),
            Message::Error(tag, code, _) => format!("error {tag} {code:?}"),
            Message::Goodbye(reason, _) => format!("goodbye {reason:?}"),
            other => format!("{other:?}").to_lowercase(),
        });
        rest = &rest[length..];
    }
    assert!(rest.is_empty());
    messages
}

#[test]
fn handshake() {
    let mut session = session(|_| {});
    let bytes = hello(IMAGE, Capabilities::LZ4.union(Capabilities::LOCAL), b"any");
    for byte in &bytes {
        assert_eq!(session.poll(), None);
        session.receive(Duration::ZERO, &[*byte], &find);
    }
    assert_eq!(session.poll(), Some(Event::Welcomed { image: IMAGE, capabilities: Capabilities::LZ4 }));
    assert_eq!(said(&mut session), ["welcome Capabilities(1)"]);
}

#[test]
fn a_ticket_is_asked_before_anything_else() {
    let ticket = |config: &mut SessionConfig| config.ticket = Some(b"secret".to_vec());
    for (image, shown, expected) in [
        (IMAGE, &b"secret"[..], "welcome Capabilities(0)"),
        (IMAGE, b"Secret", "refused Ticket"),
        (IMAGE, b"", "refused Ticket"),
        (ImageId::from_bytes([0; 16]), b"", "refused Ticket"),
        (ImageId::from_bytes([0; 16]), b"secret", "refused UnknownImage"),
    ] {
        let mut session = session(ticket);
        session.receive(Duration::ZERO, &hello(image, Capabilities::default(), shown), &find);
        assert_eq!(said(&mut session), [expected]);
    }
    assert!(!format!("{:?}", session(ticket)).contains("115"), "the ticket is not shown");
}

#[test]
fn another_version_gets_our_preamble() {
    let mut session = session(|_| {});
    session.receive(Duration::ZERO, b"SFfe\x02\0\0\0", &find);
    let bytes = std::mem::take(session.control());
    assert_eq!(decode_preamble(&bytes), Ok(Some((VERSION, bytes.len()))));
    assert_eq!(session.poll(), Some(Event::Finish));
}

#[test]
fn a_server_that_is_full_or_stops_says_so() {
    let mut full = session(|_| {});
    full.refuse(Refusal::Busy);
    full.receive(Duration::ZERO, &hello(IMAGE, Capabilities::default(), b""), &find);
    assert_eq!(said(&mut full), ["refused Busy"]);
    let mut late = session(|_| {});
    late.drain(Duration::ZERO);
    late.receive(Duration::ZERO, &hello(IMAGE, Capabilities::default(), b""), &find);
    assert_eq!(said(&mut late), ["refused Draining"]);
    assert_eq!(late.refused_for(), Some(Refusal::Draining));
}

#[test]
fn limits_hold() {
    let mut session = open(|config| (config.limits.max_requests, config.limits.max_pages) = (3, 10));
    let ask = |session: &mut Session, tag, pages| {
        session.receive(Duration::ZERO, &request(tag, &[range(0, pages)]), &find);
        session.poll()
    };
    assert!(matches!(ask(&mut session, 1, 5), Some(Event::Request(_))));
    assert!(matches!(ask(&mut session, 2, 5), Some(Event::Request(_))));
    session.answered(Duration::ZERO, 5, true);
    assert!(matches!(ask(&mut session, 3, 4), Some(Event::Request(_))));
    assert!(matches!(ask(&mut session, 4, 1), Some(Event::Request(_))));
    assert_eq!(ask(&mut session, 5, 1), Some(Event::Finish));
    assert_eq!(said(&mut session), ["goodbye Protocol"]);
    // Bytes that come later are thrown away.
    assert_eq!(ask(&mut session, 6, 1), None);
}

#[test]
fn a_range_beyond_the_image_is_an_error_and_no_more() {
    let mut session = open(|_| {});
    session.receive(Duration::ZERO, &request(9, &[range(0, 1), range(999, 2)]), &find);
    assert_eq!(session.poll(), None);
    assert_eq!(said(&mut session), ["error 9 OutOfRange"]);
    session.receive(Duration::ZERO, &request(10, &[range(999, 1)]), &find);
    assert!(matches!(session.poll(), Some(Event::Request(_))));
}

#[test]
fn errors_that_are_not_read_are_bounded() {
    let mut session = open(|_| {});
    for tag in 1..100_000 {
        session.receive(Duration::ZERO, &request(tag, &[range(1000, 1)]), &find);
        assert!(session.control().len() <= MAX_CONTROL + MAX_CLIENT_MESSAGE);
    }
    assert_eq!(session.poll(), Some(Event::Abort(AbortReason::Flood)));
}

#[test]
fn the_longest_request_fits_and_a_longer_message_is_not_waited_for() {
    let mut session = open(|_| {});
    let longest = request(1, &vec![range(0, 1); MAX_RANGES]);
    assert_eq!(longest.len(), MAX_CLIENT_MESSAGE);
    session.receive(Duration::ZERO, &longest, &find);
    assert!(matches!(session.poll(), Some(Event::Request(_))));
    session.receive(Duration::ZERO, &[descriptor::fetch::wire::kind::PAGES], &find);
    assert_eq!(said(&mut session), ["goodbye Protocol"]);
}

#[test]
fn silence_is_asked_about_and_then_ends() {
    let mut session = open(|config| config.limits.idle_timeout_ms = 10_000);
    assert_eq!(session.next_timeout(), Some(5 * SECOND));
    session.handle_timeout(4 * SECOND);
    assert!(session.control().is_empty());
    session.handle_timeout(5 * SECOND);
    assert_eq!(said(&mut session), ["ping"]);
    let mut pong = Vec::new();
    Message::Pong.encode(&mut pong);
    session.receive(6 * SECOND, &pong, &find);
    session.handle_timeout(11 * SECOND);
    assert_eq!(said(&mut session), ["ping"]);
    assert_eq!(session.next_timeout(), Some(16 * SECOND));
    session.handle_timeout(16 * SECOND);
    assert_eq!(said(&mut session), ["goodbye Idle"]);
    assert_eq!(session.poll(), Some(Event::Finish));
    assert_eq!(session.next_timeout(), Some(17 * SECOND));
    session.handle_timeout(17 * SECOND);
    assert_eq!(session.poll(), Some(Event::Abort(AbortReason::Lingering)));
    assert_eq!(session.next_timeout(), None);
}

#[test]
fn handshakes_and_sends_have_their_time() {
    let mut silent = session(|_| {});
    silent.handle_timeout(silent.next_timeout().unwrap());
    assert_eq!(silent.poll(), Some(Event::Abort(AbortReason::Handshake)));
    let mut slow = session(|_| {});
    slow.receive(SECOND, b"SFfe\x01\0\0\0", &find);
    slow.handle_timeout(slow.next_timeout().unwrap());
    assert_eq!(said(&mut slow), ["refused Protocol"]);
    let mut stopped = open(|config| config.stall_timeout = 2 * SECOND);
    stopped.sending(SECOND, true);
    stopped.handle_timeout(2 * SECOND);
    assert_eq!(stopped.poll(), None);
    stopped.handle_timeout(3 * SECOND);
    assert_eq!(stopped.poll(), Some(Event::Abort(AbortReason::Stalled)));
}

#[test]
fn a_channel_takes_what_is_to_be_multicast() {
    let mut session = session(|config| {
        config.capabilities = Capabilities::MULTICAST;
        (config.limits.max_requests, config.limits.max_pages) = (1, 10);
    });
    session.receive(Duration::ZERO, &hello(IMAGE, Capabilities::MULTICAST, b""), &find);
    assert_eq!(session.poll(), Some(Event::Welcomed { image: IMAGE, capabilities: Capabilities::MULTICAST }));
    assert_eq!(said(&mut session), ["welcome Capabilities(4)"]);
    // Before CHANNEL it is a request like any other.
    session.receive(Duration::ZERO, &multicast_request(1, &[range(0, 8)]), &find);
    assert!(matches!(session.poll(), Some(Event::Request(answer)) if answer.tag() == 1));
    assert!(session.offer_channel(offer()));
    assert!(!session.offer_channel(offer()), "once");
    assert!(said(&mut session)[0].starts_with("channel(channeloffer"));
    // Beside a full load of unicast requests, and as often as it likes.
    for tag in 2..20 {
        session.receive(Duration::ZERO, &multicast_request(tag, &[range(8, 4), range(20, 6)]), &find);
        let ranges = vec![range(8, 4), range(20, 6)];
        assert_eq!(session.poll(), Some(Event::Multicast { class: Class::Demand, ranges }));
    }
    session.receive(Duration::ZERO, &multicast_request(20, &[range(999, 2)]), &find);
    assert_eq!(said(&mut session), ["error 20 OutOfRange"]);
    session.answered(Duration::ZERO, 8, true);
    session.channel_gone(ChannelGoneReason::TooSlow, "slow");
    session.channel_gone(ChannelGoneReason::Closed, "once");
    assert_eq!(said(&mut session), ["channelgone(tooslow, \"slow\")"]);
    session.receive(Duration::ZERO, &multicast_request(21, &[range(8, 4)]), &find);
    assert!(matches!(session.poll(), Some(Event::Request(answer)) if answer.tag() == 21));
    session.receive(Duration::ZERO, &multicast_request(22, &[range(8, 4)]), &find);
    assert_eq!(said(&mut session), ["goodbye Protocol"], "the limits hold again");
}

#[test]
fn no_request_to_a_channel_is_larger_than_the_limit() {
    let mut session = session(|config| {
        config.capabilities = Capabilities::MULTICAST;
        config.limits.max_pages = 10;
    });
    session.receive(Duration::ZERO, &hello(IMAGE, Capabilities::MULTICAST, b""), &find);
    session.offer_channel(offer());
    session.control().clear();
    session.receive(Duration::ZERO, &multicast_request(1, &[range(0, 11)]), &find);
    assert_eq!(said(&mut session), ["goodbye Protocol"]);
    assert!(!session.offer_channel(offer()));
}

#[test]
fn a_channel_is_for_those_who_ask_and_have_not_the_image_itself() {
    let all = Capabilities::LOCAL.union(Capabilities::MULTICAST);
    let without = |_| Some(ImageFacts { frames: PageCount::new(1000), local: false, multicast: false });
    for (offered, taken, find, expected) in [
        (Capabilities::default(), all, &find as &dyn Fn(ImageId) -> _, "welcome Capabilities(0)"),
        (all, all, &find, "welcome Capabilities(2)"),
        (all, Capabilities::MULTICAST, &find, "welcome Capabilities(4)"),
        (all, Capabilities::LZ4, &find, "welcome Capabilities(0)"),
        (all, all, &without, "welcome Capabilities(0)"),
    ] {
        let mut session = session(|config| config.capabilities = taken);
        session.receive(Duration::ZERO, &hello(IMAGE, offered, b""), find);
        assert_eq!(said(&mut session), [expected]);
        let multicast = expected.contains('4');
        assert_eq!(session.offer_channel(offer()), multicast);
        session.channel_gone(ChannelGoneReason::Closed, "");
        assert_eq!(said(&mut session).len(), if multicast { 2 } else { 0 });
    }
}

#[test]
fn draining_finishes_what_was_asked_for() {
    let mut session = open(|_| {});
    session.receive(Duration::ZERO, &request(1, &[range(0, 8)]), &find);
    assert!(matches!(session.poll(), Some(Event::Request(_))));
    session.drain(Duration::ZERO);
    session.receive(Duration::ZERO, &request(2, &[range(8, 8)]), &find);
    session.answered(Duration::ZERO, 4, false);
    assert_eq!(session.poll(), None);
    session.answered(Duration::ZERO, 4, true);
    assert_eq!(said(&mut session), ["goodbye Draining"]);
    assert_eq!(session.poll(), Some(Event::Finish));
}

#[test]
fn an_image_that_goes_takes_its_sessions_along() {
    let mut session = open(|_| {});
    session.image_gone(Duration::ZERO, [4, 5].into_iter());
    assert_eq!(said(&mut session), ["error 4 ImageGone", "error 5 ImageGone", "goodbye ImageGone"]);
}

#[derive(Clone, Debug)]
enum Operation {
    Bytes(Vec<u8>),
    Hello,
    Request(u8, u16),
    Multicast(u8, u16),
    Offer,
    ChannelGone,
    Wait(u16),
    Answer,
    Drain,
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        1 => prop::collection::vec(any::<u8>(), 0..40).prop_map(Operation::Bytes),
        2 => Just(Operation::Hello),
        6 => (1..5u8, 1..400u16).prop_map(|(tag, pages)| Operation::Request(tag, pages)),
        3 => (1..5u8, 1..400u16).prop_map(|(tag, pages)| Operation::Multicast(tag, pages)),
        1 => Just(Operation::Offer),
        1 => Just(Operation::ChannelGone),
        2 => (0..20_000u16).prop_map(Operation::Wait),
        3 => Just(Operation::Answer),
        1 => Just(Operation::Drain),
    ]
}

proptest! {
    /// Whatever comes, what is owed stays within the limits, and the last event is the last.
    #[test]
    fn bounds_hold_in_any_order(operations in prop::collection::vec(operation(), 0..60)) {
        let mut session = session(|config| {
            (config.limits.max_requests, config.limits.max_pages) = (4, 1000);
            config.capabilities = Capabilities::MULTICAST;
        });
        let mut member = false;
        let (mut now, mut owed) = (Duration::ZERO, VecDeque::new());
        let (mut finished, mut aborted) = (false, false);
        for operation in operations {
            match operation {
                Operation::Bytes(bytes) => session.receive(now, &bytes, &find),
                Operation::Hello => session.receive(now, &hello(IMAGE, Capabilities::MULTICAST, b""), &find),
                Operation::Request(tag, pages) => {
                    session.receive(now, &request(tag.into(), &[range(0, pages.into())]), &find);
                }
                Operation::Multicast(tag, pages) => {
                    session.receive(now, &multicast_request(tag.into(), &[range(0, pages.into())]), &find);
                }
                Operation::Offer => member |= session.offer_channel(offer()),
                Operation::ChannelGone => {
                    session.channel_gone(ChannelGoneReason::Silent, "");
                    member = false;
                }
                Operation::Wait(ms) => {
                    now += Duration::from_millis(ms.into());
                    if session.next_timeout().is_some_and(|due| due <= now) {
                        session.handle_timeout(now);
                        prop_assert!(session.next_timeout().is_none_or(|due| due > now));
                    }
                }
                Operation::Answer => if let Some(pages) = owed.pop_front() {
                    session.answered(now, pages, true);
                },
                Operation::Drain => session.drain(now),
            }
            while let Some(event) = session.poll() {
                prop_assert!(!aborted, "{:?} after the end", event);
                match event {
                    Event::Request(_) => {
                        prop_assert!(!finished);
                        // The test's requests have one range; the limits bound how many wait.
                        owed.push_back(1);
                        prop_assert!(owed.len() <= 4);
                    }
                    Event::Multicast { .. } => prop_assert!(member && !finished),
                    Event::Touched { .. } => prop_assert!(!finished),
                    Event::Finish => finished = true,
                    Event::Abort(_) => aborted = true,
                    Event::Welcomed { .. } => prop_assert!(!finished),
                }
            }
            prop_assert!(session.control().len() <= MAX_CONTROL + MAX_CLIENT_MESSAGE);
        }
    }
}

fn touched(ranges: &[FrameRange], last: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    Touched::encode(ranges, last, false, &mut bytes);
    bytes
}

fn told(ranges: &[FrameRange], last: bool) -> Option<Event> {
    Some(Event::Touched { ranges: ranges.to_vec(), last, declined: false })
}

/// A session with working sets.
fn reporting() -> Session {
    let mut session = session(|config| config.capabilities = Capabilities::WORKING_SET);
    session.receive(Duration::ZERO, &hello(IMAGE, Capabilities::WORKING_SET, b""), &find);
    let welcomed = Event::Welcomed { image: IMAGE, capabilities: Capabilities::WORKING_SET };
    assert_eq!(session.poll(), Some(welcomed));
    assert_eq!(said(&mut session), ["welcome Capabilities(8)"]);
    session
}

#[test]
fn an_order_is_given_and_reports_are_taken() {
    let mut session = reporting();
    session.give_order(&[range(5, 2)]);
    assert_eq!(said(&mut session).len(), 1);
    session.receive(SECOND, &touched(&[range(5, 2), range(9, 1)], false), &find);
    assert_eq!(session.poll(), told(&[range(5, 2), range(9, 1)], false));
    session.drain(SECOND);
    assert_eq!(said(&mut session), ["goodbye Draining"]);
}

#[test]
fn the_last_report_is_taken_before_the_goodbye() {
    let mut session = reporting();
    session.receive(SECOND, &touched(&[], true), &find);
    let mut goodbye = Vec::new();
    Message::Goodbye(GoodbyeReason::Done, "").encode(&mut goodbye);
    session.receive(SECOND, &goodbye, &find);
    assert_eq!((session.poll(), session.poll()), (told(&[], true), Some(Event::Finish)));
}

#[test]
fn reports_are_bounded() {
    let mut session = reporting();
    let ranges: Vec<FrameRange> = (0..MAX_RANGES as u64).map(|n| range(n, 1)).collect();
    for _ in 0..WorkingSet::MAX_RUNS / MAX_RANGES {
        session.receive(SECOND, &touched(&ranges, false), &find);
        assert_eq!(session.poll(), told(&ranges, false));
    }
    session.receive(SECOND, &touched(&ranges, false), &find);
    assert_eq!(session.poll(), None, "left to chance");
    session.receive(SECOND, &touched(&ranges, true), &find);
    assert_eq!(session.poll(), told(&[], true));
    session.receive(SECOND, &touched(&[], true), &find);
    assert_eq!(said(&mut session), ["goodbye Protocol"], "nothing comes after the last");
}

#[test]
fn strange_reports_end_the_session() {
    for (mut session, bytes) in [
        (reporting(), touched(&[range(999, 2)], false)),
        (open(|config| config.capabilities = Capabilities::WORKING_SET), touched(&[range(1, 1)], false)),
    ] {
        session.receive(SECOND, &bytes, &find);
        assert_eq!(said(&mut session), ["goodbye Protocol"]);
    }
    let mut early = session(|_| {});
    let mut bytes = Vec::new();
    Preamble.encode(&mut bytes);
    bytes.extend(touched(&[range(1, 1)], false));
    early.receive(SECOND, &bytes, &find);
    assert_eq!(said(&mut early), ["refused Protocol"]);
}
