//! Goal: every rule of the sender, by the datagrams that go in and come out. Method: a channel with simple members, which
//! lose what a seed says, and a clock that jumps to the next timeout or report.

mod group;
mod peer;

use std::num::NonZeroU64;
use std::time::Duration;

use descriptor::fetch::Class;
use descriptor::image::{Content, Layout};
use descriptor::{FrameRange, Gfn, PageCount};
use proptest::prelude::*;

use self::group::Group;
use self::peer::Manner;
use super::*;
use crate::wire::{Lack, Nack, PulseKind};
use crate::{ChannelParameters, Member, ShardSet};

/// Stored throughout.
pub(super) struct Solid;

impl Layout for Solid {
    fn head(&self, range: FrameRange, limit: PageCount) -> (FrameRange, Content) {
        (range.split_at(limit).0, Content::Stored)
    }
}

/// Zero in every fourth run of ten frames.
struct Striped;

impl Layout for Striped {
    fn head(&self, range: FrameRange, limit: PageCount) -> (FrameRange, Content) {
        let into = range.start().index() % 40;
        let (length, content) = if into < 10 { (10 - into, Content::Zero) } else { (40 - into, Content::Stored) };
        let length = if content == Content::Stored { length.min(limit.get()) } else { length };
        (range.split_at(PageCount::new(length)).0, content)
    }
}

const SESSION: u64 = 7;

pub(super) fn range(start: u64, count: u64) -> FrameRange {
    FrameRange::new(Gfn::new(start), PageCount::new(count))
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[test]
fn a_clean_group_gets_everything_once() {
    for members in [1, 2, 8] {
        let mut group = Group::new(20_000);
        group.join_all(members, 0.0);
        let end = group.complete(0..members as usize, ms(2000));
        assert!(end < ms(200), "{members} members took {end:?}");
        assert!(group.ratio() < 1.03, "{members} members: {}", group.ratio());
        group.run_until(ms(2000));
        let stats = group.sender.stats();
        assert_eq!((stats.passes, stats.nonsense, stats.strangers, stats.stale), (1, 0, 0, 0), "{stats:?}");
        assert!(!group.sender.bulk.is_bursting() && !group.sender.bulk.endgame());
    }
}

#[test]
fn losses_cost_what_the_worst_member_needs() {
    for (loss, most) in [(0.01, 1.06), (0.05, 1.13), (0.3, 2.2)] {
        let mut group = Group::new(20_000);
        group.join_all(8, loss);
        let end = group.complete(0..8, ms(10_000));
        println!("{loss}: {} in {end:?}, {} NACKs, {:?}", group.ratio(), group.nacks, group.sender.stats());
        assert!(group.ratio() < most, "{loss}: {}", group.ratio());
        assert_eq!(group.expelled, [], "{loss}");
    }
}

#[test]
fn losses_of_a_tenth_do_not_slow_the_sender_down() {
    let mut group = Group::new(50_000);
    group.join_all(4, 0.1);
    group.complete(0..4, ms(1000));
    assert!(group.sender.rate() >= SenderConfig::INITIAL_RATE);
}

#[test]
fn zero_frames_cost_next_to_nothing() {
    let mut group = Group::new(40_000);
    group.layout = Box::new(Striped);
    group.join_all(3, 0.0);
    group.complete(0..3, ms(2000));
    assert!((0.75..0.78).contains(&group.ratio()), "{}", group.ratio());
}

#[test]
fn lockstep_demand_is_answered_once() {
    let mut group = Group::new(10_000);
    group.join_all(32, 0.0);
    group.want_nothing();
    let members: Vec<_> = group.peers.iter().map(|peer| peer.member).collect();
    group.run_until(ms(50));
    for fault in 0..50 {
        for member in &members {
            group.sender.demand(group.now, *member, [range(fault * 100, 1)]);
            group.run_until(group.now + Duration::from_micros(100));
        }
    }
    group.run_until(group.now + ms(10));
    let stats = group.sender.stats();
    assert_eq!((stats.demanded, stats.suppressed), (1600, 1550));
    assert_eq!(group.begun.len(), 50);
    assert_eq!(stats.data, [150, 0]);
}

#[test]
fn the_cap_holds_and_demand_overtakes_bulk() {
    let mut group = Group::with(10_000, |config| config.max_rate = NonZeroU64::new(20_000_000));
    let member = group.join(0.0).member;
    group.run_until(ms(200));
    let before = group.sender.stats().bytes;
    for fault in 0..100 {
        let now = group.now;
        group.sender.demand(now, member, [range(9_000 + fault * 3, 1)]);
        group.run_until(now + ms(7));
        let sent = group.begun.iter().rev().find(|(at, class, _)| *class == Class::Demand && *at >= now);
        let sent = sent.expect("it is sent at once").0;
        assert!(sent < now + ms(4), "asked at {now:?}, sent at {sent:?}");
    }
    let sent = group.sender.stats().bytes - before;
    assert!((13_500_000..14_200_000).contains(&sent), "{sent} bytes in 0.7 s");
    group.complete(0..1, ms(5000));
    let bulk = group.begun.iter().filter(|(_, class, _)| *class == Class::Bulk);
    let bulk: u64 = bulk.map(|(.., frames)| frames.count().get()).sum();
    assert_eq!(bulk, 9_900, "what went as demand is left out of the pass");
}

#[test]
fn a_lost_demand_shard_comes_again_within_milliseconds() {
    let mut group = Group::new(10_000);
    group.join_all(4, 0.2);
    group.want_nothing();
    group.run_until(ms(50));
    group.peers.iter_mut().for_each(|peer| {
        peer.wanted.insert_range(range(0, 3000));
    });
    for fault in 0..100 {
        let member = group.peers[fault % 4].member;
        group.sender.demand(group.now, member, [range(fault as u64 * 30, 4)]);
        group.run_until(group.now + ms(20));
    }
    let missing: u64 = group.peers.iter().map(|peer| peer.wanted.count().get() - 2600).sum();
    assert!(missing < 10, "{missing} of 1600 pages are missing");
    let sent = group.sender.stats().repaired[0];
    assert!((600..1200).contains(&sent), "{sent} of 1200 shards again");
}

#[test]
fn whoever_joins_late_gets_the_rest_by_another_pass() {
    let mut group = Group::with(20_000, |config| config.max_rate = NonZeroU64::new(100_000_000));
    group.join_all(3, 0.01);
    group.run_until(ms(400));
    group.join_all(3, 0.01);
    group.complete(0..6, ms(3000));
    let stats = group.sender.stats();
    assert_eq!((stats.passes, group.pulses.iter().any(|(_, pulse)| pulse.endgame)), (2, false));
    assert!(
        (1.3..1.7).contains(&group.ratio()),
        "{} {:?} {:?}",
        group.ratio(),
        group.sender.stats(),
        group.begun.iter().filter(|b| b.2.start().index() < 100).collect::<Vec<_>>()
    );
}

#[test]
fn newcomers_in_every_pass_are_pushed_what_they_lack() {
    let mut group = Group::with(10_000, |config| config.max_rate = NonZeroU64::new(100_000_000));
    for at in [0, 300, 700, 1100, 1500] {
        group.run_until(ms(at));
        group.join_all(4, 0.0);
    }
    group.complete(0..20, ms(4000));
    assert!(!group.pulses.iter().any(|(_, pulse)| pulse.endgame), "they lacked nearly everything");
}

#[test]
fn the_end_game_of_others_is_none_of_a_newcomers() {
    let mut group = Group::new(10_000);
    group.join_all(2, 0.0);
    group.complete(0..2, ms(1000));
    group.peers[0].wanted.insert_range(range(100, 5));
    group.run_until(ms(1000));
    assert!(group.sender.bulk.endgame() && group.pulses.last().is_some_and(|(_, pulse)| pulse.endgame));
    let before = group.pulses.len();
    group.join(0.0);
    group.complete(0..3, ms(2000));
    assert!(!group.pulses[before..].iter().any(|(_, pulse)| pulse.endgame));
}

#[test]
fn questions_wait_for_the_answers_of_large_groups_too() {
    let mut group = Group::with(10_000, |config| config.initial_rate = 200_000_000);
    group.join_all(100, 0.01);
    group.complete(0..100, ms(3000));
    let now = group.now;
    group.run_until(now + ms(300));
    let ends = group.pulses.iter().filter(|(_, pulse)| pulse.kind == PulseKind::End);
    assert_eq!((group.sender.stats().passes, ends.count()), (1, 3));
}

#[test]
fn a_stopped_member_holds_the_others_up_for_a_moment_and_is_expelled() {
    let mut group = Group::new(100_000);
    group.join_all(4, 0.0);
    group.run_until(ms(60));
    group.peers[3].manner = Manner::Stopped;
    let end = group.complete(0..3, ms(3000));
    assert!(end < ms(900), "{end:?}");
    group.run_until(ms(3000));
    assert_eq!(group.expelled.len(), 1);
    let (at, reason) = group.expelled_for(3).unwrap();
    assert_eq!(reason, ExpelReason::Silent);
    assert!((ms(2000)..ms(2700)).contains(&at), "{at:?}");
    assert_eq!(group.sender.members().count(), 3);
}

#[test]
fn without_reports_there_is_no_bulk_but_heartbeats_and_then_it_goes_on() {
    let mut group = Group::new(100_000);
    group.join_all(2, 0.0);
    group.run_until(ms(60));
    group.peers.iter_mut().for_each(|peer| peer.feedback_loss = 1.0);
    let before = group.sender.stats().data[1];
    group.run_until(ms(1060));
    let sent = group.sender.stats().data[1] - before;
    assert!(sent < 3000, "{sent} datagrams, more than a window");
    let pulses = group.pulses.iter().filter(|(at, _)| *at > ms(500)).count();
    assert!((28..60).contains(&pulses), "{pulses} pulses");
    assert!(group.bursts.last().unwrap().0 < ms(400));
    group.peers.iter_mut().for_each(|peer| peer.feedback_loss = 0.0);
    group.complete(0..2, ms(2000));
    assert_eq!(group.expelled, []);
}

#[test]
fn the_slowest_sets_the_pace_without_losses() {
    let mut group = Group::new(20_000);
    group.join_all(4, 0.0);
    group.peers[2].speed = 1e8;
    group.peers[2].buffer = 512 << 10;
    let end = group.complete(0..4, ms(3000));
    assert!((ms(800)..ms(1200)).contains(&end), "{end:?}");
    assert_eq!((group.peers[2].overflow, group.expelled.len()), (0, 0));
    assert!(group.ratio() < 1.03, "{}", group.ratio());
}

#[test]
fn a_small_buffer_does_not_overflow() {
    let mut group = Group::new(2000);
    group.join_all(2, 0.0);
    group.peers[1].buffer = 64 << 10;
    group.peers[1].speed = 5e7;
    group.complete(0..2, ms(3000));
    assert_eq!((group.peers[1].overflow, group.expelled.len()), (0, 0));
}

#[test]
fn whoever_is_below_the_floor_is_expelled_after_a_second() {
    let mut group = Group::new(100_000);
    group.join_all(4, 0.0);
    group.run_until(ms(60));
    group.peers[1].speed = 1e6;
    let end = group.complete(0..1, ms(5000));
    let (at, reason) = group.expelled_for(1).expect("it is too slow");
    assert_eq!(reason, ExpelReason::TooSlow);
    assert!(at < ms(1600), "{at:?}");
    assert!(end < ms(2500), "{end:?}");
    assert_eq!(group.expelled.len(), 1);
}

#[test]
fn nobody_is_expelled_for_a_cap_below_the_floor() {
    let mut group = Group::with(1000, |config| config.max_rate = NonZeroU64::new(1_000_000));
    group.join_all(2, 0.0);
    group.complete(0..2, ms(6000));
    assert_eq!(group.expelled, []);
}

#[test]
fn an_idle_channel_costs_little_and_loses_nobody() {
    let mut group = Group::new(1000);
    group.join_all(4, 0.2);
    group.peers.iter_mut().for_each(|peer| peer.feedback_loss = 0.2);
    group.complete(0..4, ms(2000));
    group.run_until(ms(4000));
    let (reports, pulses) = (group.sender.stats().reports, group.pulses.len());
    group.run_until(ms(14_000));
    assert!(group.sender.stats().reports - reports < 4 * 60);
    assert!(group.pulses.len() - pulses <= 41);
    group.peers.iter_mut().for_each(|peer| {
        peer.wanted.insert_range(range(0, 1000));
    });
    let late = group.join(0.0).member;
    let before = group.sender.stats().data[1];
    group.complete(0..5, ms(15_000));
    assert_eq!(group.expelled, []);
    assert!(group.sender.stats().data[1] - before < 6000, "{late:?} and the others were served together");
}

#[test]
fn liars_do_not_stop_the_others() {
    for (manner, reason) in [
        (Manner::Deaf, Some(ExpelReason::Silent)),
        (Manner::Frozen, Some(ExpelReason::TooSlow)),
        (Manner::Prophet, Some(ExpelReason::Nonsense)),
        (Manner::Greedy, None),
        (Manner::Far, None),
    ] {
        let mut group = Group::new(50_000);
        group.join_all(5, 0.01);
        group.peers[4].manner = manner;
        let end = group.complete(0..4, ms(5000));
        assert!(end < ms(1800), "{manner:?}: {end:?}");
        assert!(group.ratio() < 2.3, "{manner:?}: {}", group.ratio());
        group.run_until(ms(6000));
        if let Some(reason) = reason {
            assert_eq!(group.expelled_for(4).map(|(_, reason)| reason), Some(reason), "{manner:?}");
        }
        assert!(group.expelled.iter().all(|(_, member, _)| *member == group.peers[4].member), "{manner:?}");
        assert!(group.sender.round_trip() < ms(5), "{manner:?}");
    }
}

#[test]
fn ten_thousand_nacks_are_answered_once() {
    let mut group = Group::with(1000, |config| config.gather = Duration::ZERO);
    group.join(0.0);
    group.complete(0..1, ms(1000));
    group.run_until(ms(1000));
    (0..9_000).for_each(|at| group.sender.join(group.now, Member(1_000_000 + at)).unwrap());
    let before = group.sender.stats().clone();
    let block = BlockId { class: Class::Bulk, number: Serial::new(0).minus(2) };
    for at in 0..9_000 {
        let mut datagram = Vec::new();
        let missing = [(at % 190) as u8, (at * 7 % 190) as u8].into_iter().collect::<ShardSet>();
        Nack::encode(SESSION, Member(1_000_000 + at), &[Lack { block, need: missing.len(), missing }], &mut datagram);
        group.sender.feedback(group.now, &datagram);
    }
    group.run_until(group.now + ms(20));
    let stats = group.sender.stats();
    assert_eq!(stats.nacked - before.nacked, 9_000);
    assert!(stats.confirmed - before.confirmed <= 3);
    assert_eq!((stats.parity[1] - before.parity[1], stats.repaired[1]), (2, before.repaired[1]));
    assert!(stats.control - before.control < 20);
}

#[test]
fn a_restarted_sender_is_another_session() {
    let mut old = Group::new(1000);
    let peer = old.join(0.0);
    let member = peer.member;
    let channel =
        ChannelParameters { session: SESSION + 1, ..ChannelParameters::new(1, 1448, PageCount::new(1000)).unwrap() };
    let mut sender = Sender::new(Duration::ZERO, SenderConfig::new(channel), 2);
    sender.join(Duration::ZERO, member).unwrap();
    let report = old.peers[0].report(ms(1), old.sender.config.channel, true);
    sender.feedback(ms(1), &report);
    assert_eq!((sender.stats().other_session, sender.stats().reports), (1, 0));
    assert_ne!(sender.start(), Sender::new(Duration::ZERO, SenderConfig::new(channel), 3).start());
}

#[test]
fn a_full_channel_says_so() {
    let mut group = Group::with(1000, |config| config.max_members = 2);
    group.join_all(2, 0.0);
    assert_eq!(group.sender.join(ms(1), Member(1)), Err(Full(2)));
    assert_eq!(group.sender.join(ms(1), group.peers[0].member), Ok(()), "it begins again");
    group.sender.leave(ms(1), group.peers[0].member);
    assert_eq!(group.sender.join(ms(1), Member(1)), Ok(()));
}

#[test]
fn strangers_get_nothing() {
    let mut group = Group::new(1000);
    group.join(0.0);
    group.sender.demand(ms(1), Member(1), [range(0, 5)]);
    let stats = group.sender.stats();
    assert_eq!((stats.demanded, stats.demand_refused), (5, 5));
    let mut stranger = Group::new(1000);
    stranger.join(0.0).member = Member(2);
    let report = stranger.peers[0].report(ms(1), group.sender.config.channel, true);
    group.sender.feedback(ms(1), &report);
    assert_eq!(group.sender.stats().strangers, 1);
}

#[test]
fn groups_beyond_windows_follow_the_rate_alone() {
    let mut group = Group::with(10_000, |config| config.initial_rate = 200_000_000);
    group.join_all(100, 0.01);
    let end = group.complete(0..100, ms(3000));
    assert!(end < ms(800), "{end:?}");
    assert!(group.ratio() < 1.10, "{}", group.ratio());
    assert_eq!(group.expelled, []);
}

#[test]
fn when_nobody_is_left_nothing_is_pushed() {
    let mut group = Group::with(50_000, |config| config.max_rate = NonZeroU64::new(50_000_000));
    group.join_all(2, 0.0);
    group.run_until(ms(100));
    for at in 0..2 {
        let member = group.peers[at].member;
        group.peers[at].manner = Manner::Stopped;
        group.sender.leave(group.now, member);
    }
    let before = group.sender.stats().data[1];
    group.run_until(ms(1000));
    assert!(group.sender.stats().data[1] - before <= 190);
    assert!(!group.sender.bulk.is_bursting());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the paths lose and whenever members come and go, everybody who stays gets everything, datagrams are
    /// numbered without a gap, and the sender rests in the end.
    #[test]
    fn everybody_who_stays_completes(
        members in prop::collection::vec((0..2000_u64, 0..25_u32, 0..25_u32, any::<bool>()), 1..6),
        frames in 1..6000_u64,
        rate in 5_000_000..500_000_000_u64,
    ) {
        let mut group = Group::with(frames, |config| config.max_rate = NonZeroU64::new(rate));
        let mut members = members;
        members.sort_unstable();
        for (at, loss, feedback_loss, stays) in &members {
            group.run_until(ms(at / 4));
            let peer = group.join(f64::from(*loss) / 100.0);
            peer.feedback_loss = f64::from(*feedback_loss) / 100.0;
            if !stays {
                let member = peer.member;
                let now = group.now;
                group.run_until(now + ms(30));
                group.sender.leave(group.now, member);
                let peer = group.peers.iter_mut().find(|peer| peer.member == member).unwrap();
                peer.manner = Manner::Stopped;
                peer.fetch();
            }
        }
        let all = 0..group.peers.len();
        group.complete(all, ms(40_000));
        let now = group.now;
        group.run_until(now + ms(2000));
        prop_assert_eq!(&group.expelled, &[]);
        prop_assert!(!group.sender.bulk.is_bursting());
        let quiet = group.bursts.last().map_or(Duration::ZERO, |burst| burst.0);
        prop_assert!(quiet < now + ms(1500), "quiet since {quiet:?}, complete at {now:?}");
    }

    /// No bytes from a peer make the sender fail, and whoever is honest is still served.
    #[test]
    fn nonsense_is_dropped(
        datagrams in prop::collection::vec(
            (any::<bool>(), 7..9_u8, prop::collection::vec(any::<u8>(), 0..200), any::<[u8; 2]>()), 0..200),
    ) {
        let mut group = Group::with(3000, |config| config.max_rate = NonZeroU64::new(20_000_000));
        group.join_all(2, 0.01);
        let liar = group.peers[1].member;
        for (plausible, kind, mut bytes, flip) in datagrams {
            if plausible && bytes.len() >= 24 {
                bytes[..4].copy_from_slice(&[1, kind, flip[0] & 3, flip[1] % 5]);
                bytes[8..16].copy_from_slice(&SESSION.to_le_bytes());
                bytes[16..24].copy_from_slice(&liar.0.to_le_bytes());
            }
            group.sender.feedback(group.now, &bytes);
            let now = group.now;
            group.run_until(now + ms(1));
        }
        group.complete(0..1, ms(10_000));
    }
}
