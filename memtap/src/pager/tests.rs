//! The pager against a port and a source that do as they are told, one concern at a time.

use descriptor::fetch::Limits;
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
