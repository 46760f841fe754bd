//! The lanes one rule at a time, then as a list of operations: every request is told of once and in time, whatever happens.

use std::collections::BTreeMap;

use descriptor::{Gfn, PageCount};
use proptest::prelude::*;

use super::*;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn range(start: u64, count: u64) -> FrameRange {
    FrameRange::new(Gfn::new(start), PageCount::new(count))
}

fn live(hydrates: bool) -> Lanes {
    let mut lanes = Lanes::new(hydrates);
    lanes.offered(ms(0));
    lanes.live(ms(0));
    lanes.set_members(8);
    while lanes.poll(ms(0), true, |_| vec![]).is_some() {}
    lanes
}

fn demand(lanes: &mut Lanes, now: Duration, tag: Tag, ranges: &[FrameRange]) -> Delivery {
    lanes.route(now, tag, Class::Demand, ranges)
}

/// The next step, where all of every request is missing that is asked about.
fn step(lanes: &mut Lanes, now: Duration) -> Option<Step> {
    lanes.poll(now, true, |tag| vec![range(tag * 10, 1)])
}

fn ask(tag: Tag) -> Option<Step> {
    Some(Step::Ask { tag, class: Class::Demand, ranges: vec![range(tag * 10, 1)] })
}

#[test]
fn only_a_live_channel_of_several_is_asked() {
    let mut lanes = Lanes::new(false);
    let all = [range(0, 1)];
    assert_eq!(demand(&mut lanes, ms(0), 1, &all), Delivery::Unicast);
    lanes.offered(ms(0));
    assert_eq!(demand(&mut lanes, ms(0), 2, &all), Delivery::Unicast);
    lanes.live(ms(5));
    assert_eq!(demand(&mut lanes, ms(5), 3, &all), Delivery::Multicast);
    lanes.set_members(1);
    assert_eq!(demand(&mut lanes, ms(5), 4, &all), Delivery::Unicast);
    lanes.set_members(2);
    assert_eq!(demand(&mut lanes, ms(5), 5, &all), Delivery::Multicast);
    lanes.set_endgame(ms(5), true);
    assert_eq!(lanes.route(ms(5), 6, Class::Bulk, &all), Delivery::Unicast);
    assert_eq!(demand(&mut lanes, ms(5), 7, &all), Delivery::Multicast);
    lanes.down();
    assert_eq!(demand(&mut lanes, ms(5), 8, &all), Delivery::Unicast);
    assert_eq!((lanes.next_timeout(), lanes.link()), (None, Link::None));
}

#[test]
fn what_comes_in_any_order_and_from_anyone_answers() {
    let mut lanes = live(false);
    demand(&mut lanes, ms(0), 1, &[range(10, 4), range(20, 1)]);
    demand(&mut lanes, ms(0), 2, &[range(12, 1)]);
    lanes.arrived(ms(1), range(11, 2));
    assert_eq!(step(&mut lanes, ms(1)), Some(Step::Came(2)));
    lanes.arrived(ms(1), range(0, 11));
    lanes.arrived(ms(1), range(15, 10));
    assert_eq!(step(&mut lanes, ms(1)), None);
    lanes.arrived(ms(2), range(13, 1));
    assert_eq!(step(&mut lanes, ms(2)), Some(Step::Came(1)));
    assert_eq!((step(&mut lanes, ms(1000)), lanes.next_timeout()), (None, None));
    assert_eq!(*lanes.stats(), LaneStats { requests: 2, answered: 2, fallbacks: 0 });
}

#[test]
fn what_is_late_is_asked_of_the_stream_as_far_as_it_is_missing() {
    let mut lanes = live(false);
    demand(&mut lanes, ms(0), 1, &[range(10, 1), range(30, 5)]);
    demand(&mut lanes, ms(0), 2, &[range(20, 1)]);
    assert_eq!(lanes.next_timeout(), Some(ms(20)));
    assert_eq!(step(&mut lanes, ms(19)), None);
    assert_eq!(lanes.poll(ms(20), false, |_| panic!("not before all was looked at")), None);
    assert_eq!(step(&mut lanes, ms(20)), ask(1));
    assert_eq!(lanes.poll(ms(20), true, |_| vec![]), Some(Step::Came(2)), "it came by the stream, or was given up");
    lanes.arrived(ms(21), range(0, 100));
    assert_eq!(step(&mut lanes, ms(21)), None);
    // A flood does not keep it from the stream for ever.
    demand(&mut lanes, ms(100), 3, &[range(30, 1)]);
    let wait = lanes.next_timeout().unwrap() - ms(100);
    assert!(wait > ms(20), "{wait:?}: more patience after a loss");
    assert!(lanes.poll(ms(100) + wait * 2, false, |_| vec![range(30, 1)]).is_some());
}

#[test]
fn deadlines_follow_what_answers_take() {
    let mut lanes = live(false);
    let mut wait = |took: u64, count: u64| {
        for tag in 0..count {
            demand(&mut lanes, ms(0), tag + 1, &[range(0, 1)]);
            lanes.arrived(ms(took), range(0, 1));
            assert_eq!(step(&mut lanes, ms(took)), Some(Step::Came(tag + 1)));
        }
        demand(&mut lanes, ms(0), 100, &[range(0, 1)]);
        let demand = lanes.next_timeout().unwrap();
        lanes.arrived(ms(took), range(0, 1));
        lanes.route(ms(0), 101, Class::Bulk, &[range(0, 1)]);
        let bulk = lanes.next_timeout().unwrap();
        lanes.arrived(ms(took), range(0, 1));
        while step(&mut lanes, ms(took)).is_some() {}
        (demand, bulk)
    };
    assert_eq!(wait(0, 20), (ms(5), ms(50)));
    let (demand, bulk) = wait(5, 30);
    assert!(demand >= ms(13) && demand <= ms(20), "{demand:?}");
    assert!(bulk >= demand * 8);
    assert_eq!(wait(100, 30), (ms(50), ms(500)));
}

#[test]
fn a_channel_that_never_answers_is_given_rests() {
    let mut lanes = live(false);
    let mut rests = Vec::new();
    let mut now = ms(0);
    for tag in 1..300 {
        match demand(&mut lanes, now, tag, &[range(tag * 10, 1)]) {
            Delivery::Multicast => {
                now = lanes.next_timeout().unwrap();
                assert_eq!(step(&mut lanes, now), ask(tag));
            }
            Delivery::Unicast => now += ms(200),
        }
        if let Some(Step::Say(notice)) = step(&mut lanes, now) {
            rests.push(notice);
        }
    }
    let expected: Vec<_> = [1, 2, 4, 8, 16].map(|seconds| Notice::Resting(ms(seconds * 1000))).into();
    assert_eq!(rests[..5], expected);
    // One answer, and it is trusted again.
    now += ms(40_000);
    demand(&mut lanes, now, 1000, &[range(0, 1)]);
    lanes.arrived(now, range(0, 1));
    assert_eq!(step(&mut lanes, now), Some(Step::Came(1000)));
    assert_eq!(lanes.rest, ms(1000));
}

#[test]
fn a_blocked_channel_is_told_of_once_and_listened_to_on() {
    let mut lanes = Lanes::new(true);
    lanes.offered(ms(0));
    assert_eq!(step(&mut lanes, ms(0)), Some(Step::Pushed(true)), "the background waits for the probe");
    assert_eq!((step(&mut lanes, ms(0)), lanes.next_timeout()), (None, Some(PROBE)));
    assert_eq!(step(&mut lanes, PROBE), Some(Step::Pushed(false)));
    assert_eq!(step(&mut lanes, PROBE), Some(Step::Say(Notice::Blocked)));
    assert_eq!((step(&mut lanes, PROBE), lanes.next_timeout()), (None, None));
    lanes.live(ms(5000));
    assert_eq!(step(&mut lanes, ms(5000)), Some(Step::Pushed(true)));
    assert_eq!(step(&mut lanes, ms(5000)), Some(Step::Say(Notice::Live)));
}

#[test]
fn silence_sends_everything_to_the_stream_at_once() {
    let mut lanes = live(true);
    demand(&mut lanes, ms(0), 1, &[range(10, 1)]);
    demand(&mut lanes, ms(0), 2, &[range(20, 1)]);
    lanes.silent(ms(1));
    assert_eq!(lanes.next_timeout(), Some(ms(1)));
    assert_eq!(step(&mut lanes, ms(1)), Some(Step::Pushed(false)));
    assert_eq!(step(&mut lanes, ms(1)), ask(1));
    assert_eq!(step(&mut lanes, ms(1)), ask(2));
    assert_eq!(step(&mut lanes, ms(1)), Some(Step::Say(Notice::Silent)));
    assert_eq!(demand(&mut lanes, ms(1), 3, &[range(0, 1)]), Delivery::Unicast);
    lanes.live(ms(2));
    assert_eq!(step(&mut lanes, ms(2)), Some(Step::Pushed(true)));
    assert_eq!(step(&mut lanes, ms(2)), Some(Step::Say(Notice::Back)));
    demand(&mut lanes, ms(2), 4, &[range(40, 1)]);
    lanes.gone(ms(3));
    assert_eq!(step(&mut lanes, ms(3)), Some(Step::Pushed(false)));
    assert_eq!(step(&mut lanes, ms(3)), ask(4));
    assert_eq!((step(&mut lanes, ms(3)), lanes.next_timeout()), (None, None));
}

#[test]
fn a_push_that_brings_nothing_is_not_waited_for() {
    let mut lanes = live(true);
    lanes.arrived(ms(500), range(0, 256));
    assert_eq!(lanes.next_timeout(), Some(ms(500) + STALL));
    assert_eq!(step(&mut lanes, ms(500) + STALL), Some(Step::Pushed(false)));
    assert_eq!(step(&mut lanes, ms(500) + STALL), Some(Step::Say(Notice::Stalled)));
    assert_eq!(lanes.next_timeout(), None);
    lanes.arrived(ms(9000), range(0, 256));
    assert_eq!(step(&mut lanes, ms(9000)), Some(Step::Pushed(true)));
    lanes.set_endgame(ms(9000), true);
    assert_eq!(step(&mut lanes, ms(9000)), Some(Step::Pushed(false)));
    assert_eq!(step(&mut lanes, ms(20_000)), None, "nothing is expected in the end game");
    lanes.set_endgame(ms(20_000), false);
    assert_eq!(step(&mut lanes, ms(20_000)), Some(Step::Pushed(true)));
    lanes.set_hydrates(ms(20_000), false);
    assert_eq!(step(&mut lanes, ms(20_000)), Some(Step::Pushed(false)));
}

#[test]
fn a_new_session_forgets_the_old_ones_requests() {
    let mut lanes = live(true);
    demand(&mut lanes, ms(0), 1, &[range(10, 1)]);
    lanes.down();
    assert_eq!(step(&mut lanes, ms(100)), Some(Step::Pushed(false)));
    assert_eq!(step(&mut lanes, ms(100)), None);
    lanes.offered(ms(200));
    assert_eq!(step(&mut lanes, ms(200)), Some(Step::Pushed(true)));
}

#[derive(Clone, Debug)]
enum Operation {
    Ask { bulk: bool, start: u64, count: u64 },
    Arrive { start: u64, count: u64 },
    Wait { ms: u64 },
    Poll { drained: bool },
    Offer,
    Down,
    Gone,
    Live,
    Silent,
    Members(u32),
    Endgame(bool),
}

fn operation() -> impl Strategy<Value = Operation> {
    let frames = || (0..200u64, 1..40u64);
    prop_oneof![
        6 => (any::<bool>(), frames()).prop_map(|(bulk, (start, count))| Operation::Ask { bulk, start, count }),
        6 => frames().prop_map(|(start, count)| Operation::Arrive { start, count }),
        4 => (0..60u64).prop_map(|ms| Operation::Wait { ms }),
        6 => any::<bool>().prop_map(|drained| Operation::Poll { drained }),
        1 => Just(Operation::Offer),
        1 => prop_oneof![Just(Operation::Down), Just(Operation::Gone), Just(Operation::Silent)],
        3 => Just(Operation::Live),
        1 => (0..4u32).prop_map(Operation::Members),
        1 => any::<bool>().prop_map(Operation::Endgame),
    ]
}

proptest! {
    #[test]
    fn every_request_is_told_of_once(operations in proptest::collection::vec(operation(), 0..300)) {
        let mut lanes = Lanes::new(true);
        let mut now = ms(0);
        let mut under_way: BTreeMap<Tag, (Duration, Vec<u64>)> = BTreeMap::new();
        let (mut tag, mut pushed) = (0, false);
        for operation in operations.into_iter().chain([Operation::Wait { ms: 2000 }, Operation::Poll { drained: false }]) {
            match operation {
                Operation::Ask { bulk, start, count } => {
                    tag += 1;
                    let class = if bulk { Class::Bulk } else { Class::Demand };
                    if lanes.route(now, tag, class, &[range(start, count)]) == Delivery::Multicast {
                        prop_assert_eq!(lanes.link(), Link::Live);
                        under_way.insert(tag, (now, (start..start + count).collect()));
                    }
                }
                Operation::Arrive { start, count } => {
                    lanes.arrived(now, range(start, count));
                    under_way.values_mut().for_each(|(_, rest)| rest.retain(|gfn| !range(start, count).contains(Gfn::new(*gfn))));
                }
                Operation::Wait { ms: wait } => now += ms(wait),
                Operation::Poll { drained } => loop {
                    let owed = |tag: Tag| under_way[&tag].1.iter().map(|gfn| range(*gfn, 1)).collect();
                    match lanes.poll(now, drained, owed) {
                        None => break,
                        Some(Step::Came(tag)) => {
                            let (_, rest) = under_way.remove(&tag).expect("under way");
                            prop_assert!(rest.is_empty());
                        }
                        Some(Step::Ask { tag, ranges, .. }) => {
                            let (_, rest) = under_way.remove(&tag).expect("under way");
                            let asked: Vec<u64> = ranges.into_iter().flat_map(FrameRange::frames).map(Gfn::index).collect();
                            prop_assert_eq!(asked, rest);
                        }
                        Some(Step::Pushed(now)) => prop_assert_ne!(std::mem::replace(&mut pushed, now), now),
                        Some(Step::Say(_)) => {}
                    }
                },
                Operation::Offer => {
                    lanes.offered(now);
                    under_way.clear();
                }
                Operation::Down => {
                    lanes.down();
                    under_way.clear();
                }
                Operation::Gone => lanes.gone(now),
                Operation::Live => lanes.live(now),
                Operation::Silent => lanes.silent(now),
                Operation::Members(members) => lanes.set_members(members),
                Operation::Endgame(endgame) => lanes.set_endgame(now, endgame),
            }
            prop_assert!(under_way.len() <= 256);
            let missing = under_way.values().filter(|(_, rest)| !rest.is_empty());
            if let Some(asked) = missing.map(|(asked, _)| *asked).min() {
                let due = lanes.next_timeout().expect("there is a deadline");
                prop_assert!(due <= asked + ms(500), "asked at {:?}, due at {:?}", asked, due);
            }
        }
        prop_assert!(under_way.is_empty(), "{:?} are forgotten", under_way);
    }
}
