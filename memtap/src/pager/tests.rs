//! The pager against a port and a source that do as they are told, one concern at a time.

mod overwrite;
mod push;
mod working_set;

use descriptor::fetch::{ErrorCode, Limits};
use descriptor::memory::{MemoryMap, PageSize, Region, RegionKind};

use super::*;
use crate::port::{PortTraits, Waiter};

const LIMITS: Limits = Limits { max_requests: 64, max_pages: 8192, idle_timeout_ms: 30_000 };

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn range(start: u64, count: u64) -> FrameRange {
    FrameRange::new(Gfn::new(start), PageCount::new(count))
}

fn config(frames: u64) -> PagerConfig {
    let region =
        Region { name: "ram".to_owned(), frames: range(0, frames), kind: RegionKind::Ram, page_size: PageSize::Base };
    let none = FrameSet::empty(PageCount::new(frames));
    PagerConfig {
        memory: MemoryMap::new(vec![region]).unwrap(),
        zero: none.clone(),
        free: none.clone(),
        present: none.clone(),
        eager: none,
        order: Vec::new(),
        port: PortTraits { granule: PageCount::ONE, needs_zeros: false },
        prefetch: Prefetch::Off,
        hydrate: Hydrate::Off,
        retry: Retry::STREAM,
        patience: Duration::from_secs(10),
        record: false,
        head_start: Duration::ZERO,
        zero_around: PageCount::new(16),
    }
}

fn ready(config: PagerConfig) -> Pager {
    let mut pager = Pager::new(ms(0), config, 1).unwrap();
    pager.handle(ms(0), Input::SourceUp { limits: LIMITS });
    assert_eq!(pager.poll(ms(0)), Some(Output::Ready));
    pager
}

fn fault(gfn: u64, waiter: u32) -> Input {
    Input::Fault { gfn: Gfn::new(gfn), waiter: Waiter(waiter), write: false }
}

fn resume(gfn: u64, waiter: u32) -> Option<Output> {
    Some(Output::Resume { gfn: Gfn::new(gfn), waiter: Waiter(waiter) })
}

fn all(count: u64) -> Installed {
    Installed { count: PageCount::new(count), stopped: None }
}

fn demand(tag: Tag, ranges: &[FrameRange]) -> Option<Output> {
    Some(Output::Request { tag, class: Class::Demand, ranges: ranges.to_vec() })
}

/// Installs all of an answer that is wanted; which runs that were.
fn arrive(pager: &mut Pager, now: Duration, tag: Tag, frames: FrameRange) -> Vec<FrameRange> {
    let mut runs = Vec::new();
    let mut rest = frames;
    while let Some(wanted) = pager.wanted(now, tag, rest) {
        let run = wanted.range();
        let next = match wanted {
            Wanted::Install(_) => pager.installed(now, run, all(run.count().get())),
            Wanted::Stage(_) => {
                pager.staged(now, run);
                run.end()
            }
        };
        runs.push(run);
        rest = FrameRange::between(next, frames.end());
    }
    runs
}

#[test]
fn faults_of_one_batch_become_one_request() {
    let mut pager = ready(config(100));
    for (gfn, waiter) in [(7, 0), (9, 1), (7, 2), (10, 3)] {
        pager.handle(ms(1), fault(gfn, waiter));
    }
    assert_eq!(pager.poll(ms(1)), demand(1, &[range(7, 1), range(9, 2)]));
    assert_eq!(pager.poll(ms(1)), None);
    assert_eq!(arrive(&mut pager, ms(2), 1, range(7, 1)), [range(7, 1)]);
    assert_eq!(pager.poll(ms(2)), resume(7, 0));
    assert_eq!(pager.poll(ms(2)), resume(7, 2));
    assert_eq!(arrive(&mut pager, ms(3), 1, range(9, 2)), [range(9, 2)]);
    pager.answered(ms(3), 1);
    assert_eq!(pager.poll(ms(3)), resume(9, 1));
    assert_eq!(pager.poll(ms(3)), resume(10, 3));
    assert_eq!(arrive(&mut pager, ms(4), 1, range(9, 2)), []);
    let stats = pager.stats();
    assert_eq!((stats.faults, stats.coalesced, stats.demand_pages, stats.duplicates), (4, 1, 3, 2));
    assert_eq!(pager.latency().demand.len(), 3);
    pager.handle(ms(5), fault(9, 1));
    assert_eq!(pager.poll(ms(5)), resume(9, 1), "a late fault is resumed");
}

fn discard(start: u64, count: u64) -> Input {
    Input::Discard { range: range(start, count) }
}

fn zeros(start: u64, count: u64) -> Option<Output> {
    Some(Output::InstallZeros { range: range(start, count) })
}

fn set(frames: u64, ranges: &[FrameRange]) -> FrameSet {
    FrameSet::from_ranges(PageCount::new(frames), ranges.iter().copied())
}

#[test]
fn zeros_need_no_fetch_and_come_in_runs() {
    let mut config = config(100);
    config.zero = set(100, &[range(20, 30)]);
    config.free = set(100, &[range(50, 4)]);
    let mut pager = ready(config);
    pager.handle(ms(1), fault(25, 0));
    pager.handle(ms(1), fault(51, 1));
    assert_eq!(pager.poll(ms(1)), zeros(20, 12), "the aligned block of 16 frames, as far as it is blank");
    let busy = Installed { count: PageCount::new(3), stopped: Some(Stop::Busy) };
    assert_eq!(pager.installed(ms(1), range(20, 12), busy), Gfn::new(23));
    assert_eq!(pager.poll(ms(1)), zeros(23, 9), "the rest, as the fault is not answered");
    let found = Installed { count: PageCount::new(2), stopped: Some(Stop::AlreadyPresent) };
    assert_eq!(pager.installed(ms(1), range(23, 9), found), Gfn::new(26));
    assert_eq!(pager.poll(ms(1)), resume(25, 0));
    assert_eq!(pager.poll(ms(1)), zeros(48, 6));
    pager.installed(ms(1), range(48, 6), all(6));
    assert_eq!(pager.poll(ms(1)), resume(51, 1));
    assert_eq!(pager.poll(ms(1)), None);
    let stats = pager.stats();
    assert_eq!((stats.avoided, stats.zeros_installed, stats.found_pages, stats.demand_requests), (2, 11, 1, 0));
    assert_eq!(pager.latency().local.len(), 2);
}

#[test]
fn a_late_answer_never_overwrites_a_discard() {
    let mut pager = ready(config(100));
    pager.handle(ms(1), fault(10, 0));
    pager.handle(ms(1), fault(11, 1));
    assert_eq!(pager.poll(ms(1)), demand(1, &[range(10, 2)]));
    pager.handle(ms(2), discard(11, 5));
    assert_eq!(pager.poll(ms(2)), zeros(11, 1), "no more than what is waited for: the guest gave the others up");
    pager.installed(ms(2), range(11, 1), all(1));
    assert_eq!(pager.poll(ms(2)), resume(11, 1));
    assert_eq!(arrive(&mut pager, ms(3), 1, range(10, 6)), [range(10, 1)]);
    assert_eq!(pager.stats().stale, 4);
    assert_eq!(pager.stats().duplicates, 1);
    // The page may have been taken after the zeros were installed.
    assert_eq!(pager.poll(ms(3)), resume(10, 0));
    pager.handle(ms(4), fault(11, 1));
    assert_eq!(pager.poll(ms(4)), zeros(11, 1));
    pager.installed(ms(4), range(11, 1), Installed { count: PageCount::ZERO, stopped: Some(Stop::AlreadyPresent) });
    assert_eq!(pager.poll(ms(4)), resume(11, 1));
}

#[test]
fn events_between_two_pages_of_an_answer_count() {
    let mut pager = ready(config(100));
    for gfn in 10..14 {
        pager.handle(ms(1), fault(gfn, 0));
    }
    assert_eq!(pager.poll(ms(1)), demand(1, &[range(10, 4)]));
    assert_eq!(pager.wanted(ms(2), 1, range(10, 4)), Some(Wanted::Install(range(10, 4))));
    let busy = Installed { count: PageCount::ONE, stopped: Some(Stop::Busy) };
    assert_eq!(pager.installed(ms(2), range(10, 4), busy), Gfn::new(11));
    pager.handle(ms(2), discard(11, 2));
    assert_eq!(pager.wanted(ms(2), 1, range(11, 3)), Some(Wanted::Install(range(13, 1))));
}

#[test]
fn lost_answers_are_asked_for_again_with_growing_patience() {
    let mut config = config(100);
    config.retry = Retry { min: ms(10), max: ms(30), attempts: 3 };
    let mut pager = ready(config);
    pager.handle(ms(0), fault(5, 0));
    assert_eq!(pager.poll(ms(0)), demand(1, &[range(5, 1)]));
    let mut waits = Vec::new();
    let mut now = ms(0);
    let failure = loop {
        let due = pager.next_timeout().unwrap();
        waits.push(due - now);
        now = due;
        match pager.poll(now) {
            Some(Output::Request { ranges, .. }) => assert_eq!(ranges, [range(5, 1)]),
            Some(Output::Failed { reason }) => break reason,
            None => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(failure, Failure::NoAnswer { gfn: Gfn::new(5), attempts: 3 });
    assert!(now >= ms(60) && now < ms(80), "{now:?} after waits of {waits:?}");
    assert_eq!(pager.poll(now), None);
    assert_eq!(pager.next_timeout(), None);
    assert_eq!(pager.wanted(now, 1, range(5, 1)), None);
}

#[test]
fn a_lost_source_is_asked_again_when_it_is_back() {
    let mut pager = ready(config(100));
    pager.handle(ms(1), fault(5, 0));
    assert_eq!(pager.poll(ms(1)), demand(1, &[range(5, 1)]));
    pager.handle(ms(2), Input::SourceDown);
    pager.handle(ms(3), fault(9, 1));
    assert_eq!(pager.poll(ms(3)), None);
    assert_eq!(pager.next_timeout(), Some(ms(10_002)));
    pager.handle(ms(4), Input::SourceUp { limits: LIMITS });
    assert_eq!(pager.poll(ms(4)), demand(2, &[range(5, 1), range(9, 1)]));
    pager.handle(ms(5), Input::SourceDown);
    assert_eq!(pager.poll(ms(10_004)), None);
    let reason = Failure::SourceGone { gone: ms(10_000) };
    assert_eq!(pager.poll(ms(10_005)), Some(Output::Failed { reason }));
    assert_eq!(pager.failure(), Some(reason));
}

#[test]
fn requests_keep_to_the_window() {
    let mut pager = Pager::new(ms(0), config(100), 1).unwrap();
    assert_eq!(pager.poll(ms(0)), Some(Output::Ready));
    pager.handle(ms(0), Input::SourceUp { limits: Limits { max_requests: 2, max_pages: 3, ..LIMITS } });
    for gfn in 0..10 {
        pager.handle(ms(1), fault(2 * gfn, 0));
    }
    assert_eq!(pager.poll(ms(1)), demand(1, &[range(0, 1), range(2, 1), range(4, 1)]));
    assert_eq!(pager.poll(ms(1)), None);
    arrive(&mut pager, ms(2), 1, range(0, 6));
    for gfn in [0, 2, 4] {
        assert_eq!(pager.poll(ms(2)), resume(gfn, 0));
    }
    assert_eq!(pager.poll(ms(2)), None, "the server owes the end of its answer");
    pager.answered(ms(2), 1);
    assert_eq!(pager.poll(ms(2)), demand(2, &[range(6, 1), range(8, 1), range(10, 1)]));
}

#[test]
fn an_unreadable_page_fails_only_who_waits_for_it() {
    let mut config = config(64);
    config.hydrate = Hydrate::Now;
    let mut pager = ready(config);
    let mut now = ms(0);
    while pager.progress().given_up.is_zero() {
        match pager.poll(now) {
            Some(Output::Request { tag, ranges, .. }) if ranges.iter().any(|range| range.contains(Gfn::new(33))) => {
                pager.handle(now, Input::RequestFailed { tag, code: ErrorCode::Unreadable });
            }
            Some(Output::Request { tag, ranges, .. }) => {
                ranges.iter().for_each(|range| drop(arrive(&mut pager, now, tag, *range)));
                pager.answered(now, tag);
            }
            None => now = pager.next_timeout().unwrap(),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(pager.progress().missing, PageCount::ONE, "every other page is there");
    assert_eq!((pager.poll(now), pager.next_timeout()), (None, None));
    pager.handle(now, fault(33, 0));
    let reason = loop {
        match pager.poll(now) {
            Some(Output::Request { tag, .. }) => {
                pager.handle(now, Input::RequestFailed { tag, code: ErrorCode::Unreadable });
            }
            Some(Output::Failed { reason }) => break reason,
            None => now = pager.next_timeout().unwrap(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(reason, Failure::NoAnswer { gfn: Gfn::new(33), attempts: 8 });
}

#[test]
fn a_source_without_the_image_is_no_source() {
    let mut pager = ready(config(64));
    pager.handle(ms(1), fault(5, 0));
    assert_eq!(pager.poll(ms(1)), demand(1, &[range(5, 1)]));
    pager.handle(ms(2), Input::RequestFailed { tag: 1, code: ErrorCode::OutOfRange });
    let reason = Failure::Refused { gfn: Gfn::new(5), code: ErrorCode::OutOfRange };
    assert_eq!(pager.poll(ms(2)), Some(Output::Failed { reason }));
}

#[test]
fn faults_outside_of_memory_fail() {
    let mut pager = ready(config(64));
    pager.handle(ms(1), fault(64, 0));
    assert_eq!(pager.poll(ms(1)), Some(Output::Failed { reason: Failure::Outside { gfn: Gfn::new(64) } }));
}

#[test]
fn eager_frames_come_before_the_clone_runs() {
    let mut config = config(100);
    config.eager = set(100, &[range(10, 5), range(40, 2)]);
    config.zero = set(100, &[range(12, 2)]);
    config.hydrate = Hydrate::Now;
    config.prefetch = Prefetch::Adaptive { max: PageCount::new(8) };
    config.order = vec![range(70, 10)];
    let mut pager = Pager::new(ms(0), config, 1).unwrap();
    assert_eq!(pager.poll(ms(0)), None);
    pager.handle(ms(0), Input::SourceUp { limits: LIMITS });
    assert_eq!(pager.poll(ms(0)), demand(1, &[range(10, 2)]));
    assert_eq!(pager.poll(ms(0)), zeros(12, 2));
    pager.installed(ms(0), range(12, 2), all(2));
    assert_eq!(pager.poll(ms(0)), demand(2, &[range(14, 1), range(40, 2)]));
    assert_eq!(pager.poll(ms(0)), None);
    arrive(&mut pager, ms(1), 1, range(10, 2));
    arrive(&mut pager, ms(1), 2, range(14, 1));
    assert_eq!(pager.poll(ms(1)), None);
    arrive(&mut pager, ms(1), 2, range(40, 2));
    assert_eq!(pager.poll(ms(1)), Some(Output::Ready));
    let Some(Output::Request { tag, class: Class::Bulk, ranges }) = pager.poll(ms(1)) else { panic!() };
    assert_eq!(ranges, [range(70, 10)]);
    ranges.iter().for_each(|range| drop(arrive(&mut pager, ms(2), tag, *range)));
    let Some(Output::Request { tag, class: Class::Bulk, ranges }) = pager.poll(ms(2)) else { panic!() };
    assert_eq!(ranges, [range(0, 10), range(15, 25), range(42, 28), range(80, 20)]);
    ranges.iter().for_each(|range| drop(arrive(&mut pager, ms(2), tag, *range)));
    assert_eq!(pager.poll(ms(2)), Some(Output::Complete));
    let stats = pager.stats();
    assert_eq!((stats.demand_pages, stats.prefetch_pages, stats.hydrate_pages), (5, 10, 83));
}

#[test]
fn zeros_are_installed_in_bounded_runs_where_the_port_needs_them() {
    let mut config = config(10_000);
    config.zero = set(10_000, &[range(0, 9_000)]);
    config.hydrate = Hydrate::Now;
    config.port.needs_zeros = true;
    let mut pager = ready(config);
    let mut runs = Vec::new();
    loop {
        match pager.poll(ms(1)) {
            Some(Output::InstallZeros { range }) => {
                pager.installed(ms(1), range, all(range.count().get()));
                runs.push(range.count().get());
            }
            Some(Output::Request { tag, ranges, .. }) => {
                ranges.iter().for_each(|range| drop(arrive(&mut pager, ms(1), tag, *range)));
                pager.answered(ms(1), tag);
            }
            other => break assert_eq!(other, Some(Output::Complete)),
        }
    }
    assert_eq!(runs, [2048, 2048, 2048, 2048, 808]);
}

#[test]
fn huge_pages_are_staged_and_installed_whole() {
    let mut config = config(2048);
    config.port.granule = PageCount::new(512);
    config.zero = set(2048, &[range(0, 100), range(1024, 512)]);
    let mut pager = ready(config);
    pager.handle(ms(1), fault(7, 0));
    pager.handle(ms(1), fault(1030, 1));
    assert_eq!(pager.poll(ms(1)), zeros(1024, 512));
    pager.installed(ms(1), range(1024, 512), all(512));
    assert_eq!(pager.poll(ms(1)), resume(1030, 1));
    assert_eq!(pager.poll(ms(1)), demand(1, &[range(100, 412)]), "its zeros are not asked for");
    assert_eq!(arrive(&mut pager, ms(2), 1, range(100, 200)), [range(100, 200)]);
    assert_eq!(arrive(&mut pager, ms(2), 1, range(100, 200)), [], "it is staged already");
    assert_eq!(pager.poll(ms(2)), None);
    assert_eq!(arrive(&mut pager, ms(2), 1, range(300, 212)), [range(300, 212)]);
    assert_eq!(pager.poll(ms(2)), Some(Output::InstallStaged { range: range(0, 512) }));
    let busy = Installed { count: PageCount::ZERO, stopped: Some(Stop::Busy) };
    pager.installed(ms(2), range(0, 512), busy);
    assert_eq!(pager.poll(ms(2)), Some(Output::InstallStaged { range: range(0, 512) }));
    pager.installed(ms(2), range(0, 512), all(512));
    assert_eq!(pager.poll(ms(2)), resume(7, 0));

    pager.handle(ms(3), fault(600, 2));
    assert_eq!(pager.poll(ms(3)), demand(2, &[range(512, 512)]));
    assert_eq!(arrive(&mut pager, ms(4), 2, range(512, 256)), [range(512, 256)]);
    pager.handle(ms(4), discard(512, 256));
    assert_eq!(pager.stats().discarded, 0, "half a huge page cannot be given up");
    pager.handle(ms(4), discard(512, 512));
    assert_eq!(pager.poll(ms(4)), zeros(512, 512));
    pager.installed(ms(4), range(512, 512), all(512));
    assert_eq!(pager.poll(ms(4)), resume(600, 2));
    assert_eq!(pager.poll(ms(4)), Some(Output::DropStaged { range: range(512, 512) }));
    assert_eq!(arrive(&mut pager, ms(5), 2, range(768, 256)), []);
    assert_eq!(arrive(&mut pager, ms(5), 0, range(1536, 512)), [range(1536, 512)], "whole and unasked for");
}

#[test]
fn a_fault_on_a_bulk_page_waits_for_it_only_when_it_is_next() {
    let mut config = config(1000);
    config.hydrate = Hydrate::Now;
    let mut pager = ready(config);
    assert!(matches!(pager.poll(ms(0)), Some(Output::Request { tag: 1, class: Class::Bulk, .. })));
    assert!(matches!(pager.poll(ms(0)), Some(Output::Request { tag: 2, class: Class::Bulk, .. })));
    assert_eq!(pager.poll(ms(0)), None);
    arrive(&mut pager, ms(1), 1, range(0, 256));
    pager.handle(ms(1), fault(260, 0));
    assert_eq!(pager.poll(ms(1)), None, "close behind the newest arrival");
    pager.handle(ms(1), fault(450, 1));
    assert_eq!(pager.poll(ms(1)), demand(3, &[range(450, 1)]));
    pager.handle(ms(1), fault(600, 2));
    assert_eq!(pager.poll(ms(1)), demand(4, &[range(600, 1)]), "another request, another round trip");
    let until = pager.next_timeout().unwrap();
    assert_eq!(pager.poll(until), demand(5, &[range(260, 1)]), "it did not come after all");
    let stats = pager.stats();
    assert_eq!((stats.covered, stats.promoted), (1, 3));
}

#[test]
fn demand_goes_before_bulk() {
    let mut config = config(1000);
    config.hydrate = Hydrate::Now;
    config.prefetch = Prefetch::Fixed(PageCount::new(4));
    config.zero = set(1000, &[range(50, 1)]);
    let mut pager = ready(config);
    pager.handle(ms(1), fault(900, 0));
    pager.handle(ms(1), fault(50, 1));
    assert_eq!(pager.poll(ms(1)), zeros(50, 1));
    pager.installed(ms(1), range(50, 1), all(1));
    assert_eq!(pager.poll(ms(1)), resume(50, 1));
    assert_eq!(pager.poll(ms(1)), demand(1, &[range(900, 1)]));
    let bulk = |tag, ranges: &[FrameRange]| Some(Output::Request { tag, class: Class::Bulk, ranges: ranges.to_vec() });
    assert_eq!(pager.poll(ms(1)), bulk(2, &[range(901, 4)]));
    assert_eq!(pager.poll(ms(1)), bulk(3, &[range(0, 50), range(51, 462)]));
}

#[test]
fn configurations_that_do_not_fit_are_refused() {
    let refused = |change: fn(&mut PagerConfig)| {
        let mut config = config(1000);
        change(&mut config);
        Pager::new(ms(0), config, 1).unwrap_err()
    };
    let error = refused(|config| config.zero = FrameSet::empty(PageCount::new(7)));
    assert!(matches!(error, ConfigError::Universe { set: "zero", .. }));
    let error = refused(|config| config.port.granule = PageCount::new(3));
    assert_eq!(error, ConfigError::Granule(PageCount::new(3)));
    let error = refused(|config| config.port.granule = PageCount::new(512));
    assert!(matches!(error, ConfigError::Unaligned { .. }));
}
