//! A client of the page server that sends anything: what fuzzing and property tests share.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use arbitrary::{Arbitrary, Result, Unstructured};
use descriptor::fetch::{
    Capabilities, ChannelGoneReason, ChannelOffer, Class, Delivery, Hello, Limits, MAX_RANGES, Message, Preamble,
    Request, Touched, decode, decode_preamble,
};
use descriptor::image::{Content, Layout};
use descriptor::{FrameRange, Gfn, PageCount};
use memserver::schedule::Schedule;
use memserver::session::{Event, ImageFacts, Session, SessionConfig};

use crate::server::IMAGE;

/// Frames of the image.
const FRAMES: u64 = 1000;

/// What the session allows, little enough to be exceeded soon.
const LIMITS: Limits = Limits { max_requests: 4, max_pages: 600, idle_timeout_ms: 1000 };

/// What the session takes up.
const TAKEN_UP: Capabilities = Capabilities::MULTICAST.union(Capabilities::WORKING_SET);

/// A channel as a server offers it.
const OFFER: ChannelOffer = ChannelOffer {
    group: SocketAddr::new(IpAddr::V4(Ipv4Addr::new(239, 1, 2, 3)), 7071),
    feedback: None,
    feedback_port: 4321,
    payload: 1448,
    chunk_frames: PageCount::new(256),
    session: 1,
    member: 2,
    start_seq: 3,
    start_block: [4, 5],
};

/// Operations of one run.
const MAX_OPERATIONS: usize = 200;

#[derive(Arbitrary, Debug)]
enum Operation<'a> {
    Preamble,
    Hello {
        known: bool,
        ticket: bool,
    },
    Request {
        tag: u8,
        bulk: bool,
        multicast: bool,
        start: u16,
        count: u16,
    },
    Touched {
        start: u16,
        count: u8,
        last: bool,
        declined: bool,
    },
    Ping,
    Goodbye,
    Anything(&'a [u8]),
    /// The bytes so far are received in two pieces.
    Cut {
        at: u8,
    },
    Send,
    Wait {
        ms: u16,
    },
    Drain,
    ImageGone,
    OfferChannel,
    ChannelGone,
}

/// Frames of the image are zero in every other block of eight.
struct Blocks;

impl Layout for Blocks {
    fn head(&self, range: FrameRange, limit: PageCount) -> (FrameRange, Content) {
        let start = range.start().index();
        let (run, _) = range.split_at(PageCount::new(8 - start % 8));
        if (start / 8).is_multiple_of(2) { (run.split_at(limit).0, Content::Stored) } else { (run, Content::Zero) }
    }
}

/// Runs the client that `bytes` stand for.
///
/// # Panics
/// When the session does what it must not: sends what is no message, answers what nobody asked for, forgets an answer.
pub fn run(bytes: &[u8]) {
    // Bytes that end too early make a shorter run.
    let _ended = run_unstructured(&mut Unstructured::new(bytes));
}

fn run_unstructured(u: &mut Unstructured<'_>) -> Result<()> {
    let ticket = Some(b"secret".to_vec());
    let config = SessionConfig { ticket, limits: LIMITS, capabilities: TAKEN_UP, ..SessionConfig::default() };
    let mut now = Duration::ZERO;
    let mut session = Session::new(now, Arc::new(config));
    let mut schedule = Schedule::default();
    let mut owed: BTreeMap<u64, u64> = BTreeMap::new();
    let mut sent = Vec::new();
    let mut member = false;
    let mut pending = Vec::new();
    let facts = ImageFacts { frames: PageCount::new(FRAMES), local: false, multicast: true };
    for _ in 0..MAX_OPERATIONS {
        if u.is_empty() {
            break;
        }
        let mut cut = None;
        match u.arbitrary()? {
            Operation::Preamble => Preamble.encode(&mut pending),
            Operation::Hello { known, ticket } => {
                let image = if known { IMAGE } else { descriptor::ImageId::from_bytes([7; 16]) };
                let ticket = if ticket { &b"secret"[..] } else { b"guess" };
                let capabilities = Capabilities::from_bits(u.arbitrary()?);
                Message::Hello(Hello { image, capabilities, ticket }).encode(&mut pending);
            }
            Operation::Request { tag, bulk, multicast, start, count } => {
                let delivery = if multicast { Delivery::Multicast } else { Delivery::Unicast };
                let class = if bulk { Class::Bulk } else { Class::Demand };
                let range = FrameRange::new(Gfn::new(start.into()), PageCount::new(u64::from(count) + 1));
                Request::encode(u64::from(tag) + 1, class, delivery, &[range], &mut pending);
            }
            Operation::Touched { start, count, last, declined } => {
                let range = |n: u64| FrameRange::new(Gfn::new(u64::from(start) + 2 * n), PageCount::ONE);
                let ranges: Vec<FrameRange> = (0..count.into()).map(range).collect();
                Touched::encode(&ranges, last, declined, &mut pending);
            }
            Operation::Ping => Message::Ping.encode(&mut pending),
            Operation::Goodbye => {
                Message::Goodbye(descriptor::fetch::GoodbyeReason::Done, "").encode(&mut pending);
            }
            Operation::Anything(bytes) => pending.extend_from_slice(bytes),
            Operation::Cut { at } => cut = Some(usize::from(at)),
            Operation::Send => send(now, &mut session, &mut schedule, &mut owed, &mut sent),
            Operation::Wait { ms } => {
                now += Duration::from_millis(ms.into());
                session.handle_timeout(now);
            }
            Operation::Drain => session.drain(now),
            Operation::ImageGone => session.image_gone(now, owed.keys().copied()),
            Operation::OfferChannel => member |= session.offer_channel(OFFER),
            Operation::ChannelGone => {
                session.channel_gone(ChannelGoneReason::TooSlow, "too slow");
                member = false;
            }
        }
        let at = cut.map_or(pending.len(), |at| at.min(pending.len()));
        let tail = pending.split_off(at);
        session.receive(now, &pending, &|image| (image == IMAGE).then_some(facts));
        pending = tail;
        if !take_events(&mut session, &mut schedule, &mut owed, member) {
            return Ok(());
        }
    }
    for _ in 0..LIMITS.max_pages {
        send(now, &mut session, &mut schedule, &mut owed, &mut sent);
    }
    assert!(owed.is_empty() || session.is_closing(), "requests {owed:?} are not answered");
    check_sent(&sent);
    Ok(())
}

/// Takes note of what the session wants; false when the connection is to be closed.
fn take_events(session: &mut Session, schedule: &mut Schedule, owed: &mut BTreeMap<u64, u64>, member: bool) -> bool {
    while let Some(event) = session.poll() {
        match event {
            Event::Welcomed { image, capabilities } => {
                assert_eq!(image, IMAGE);
                if capabilities.contains(Capabilities::WORKING_SET) {
                    session.give_order(&[FrameRange::new(Gfn::new(3), PageCount::new(5))]);
                }
            }
            Event::Request(answer) => {
                assert!(session.is_serving(), "a request is taken before the handshake or after the end");
                *owed.entry(answer.tag()).or_default() += 1;
                schedule.push(0, answer);
            }
            Event::Multicast { ranges, .. } => {
                assert!(member && session.is_serving(), "pages are multicast for a client that has no channel");
                assert!(ranges.iter().all(|range| range.end().index() <= FRAMES), "{ranges:?} are multicast");
            }
            Event::Touched { ranges, .. } => {
                assert!(session.is_serving() || session.is_closing(), "a report is taken before the handshake");
                assert!(ranges.iter().all(|range| range.end().index() <= FRAMES), "{ranges:?} are said to be needed");
                assert!(ranges.len() <= MAX_RANGES);
            }
            Event::Finish => {
                schedule.clear(0);
                owed.clear();
            }
            Event::Abort(_) => return false,
        }
    }
    let requests: u64 = owed.values().sum();
    assert!(requests <= LIMITS.max_requests.into(), "{requests} requests are taken at one time");
    if !session.control().is_empty() {
        schedule.push_control(0);
    }
    true
}

fn send(
    now: Duration,
    session: &mut Session,
    schedule: &mut Schedule,
    owed: &mut BTreeMap<u64, u64>,
    sent: &mut Vec<u8>,
) {
    let mut runs = Vec::new();
    let layout: &dyn Layout = &Blocks;
    let next = schedule.next_urgent(|_| Some(layout), &mut runs);
    if next.or_else(|| schedule.next_bulk(|_| Some(layout), &mut runs)).is_none() {
        return;
    }
    session.sending(now, true);
    sent.append(session.control());
    for run in runs {
        assert!(run.frames.end().index() <= FRAMES, "{} is sent", run.frames);
        session.answered(now, run.frames.count().get(), run.last);
        let left = owed.get_mut(&run.tag).expect("only what is asked for is sent");
        *left -= u64::from(run.last);
        if *left == 0 {
            owed.remove(&run.tag);
        }
    }
    session.sending(now, false);
    schedule.sent(0);
}

/// Checks that control bytes are a preamble and whole messages.
fn check_sent(bytes: &[u8]) {
    let mut rest = bytes;
    if let Ok(Some((_, length))) = decode_preamble(rest) {
        rest = &rest[length..];
    }
    while let Some((_, length)) = decode(rest).expect("the server speaks the protocol") {
        rest = &rest[length..];
    }
    assert!(rest.is_empty(), "part of a message is sent");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_session_does_what_it_may(bytes in proptest::collection::vec(any::<u8>(), 0..1000)) {
            super::run(&bytes);
        }
    }
}
