//! The pager as a list of operations against a simple model: what fuzzing and property tests share.
//!
//! The operations come from arbitrary bytes and in any order: answers that nobody asked for, to requests long gone, in pieces;
//! discards and faults at any moment; a port that is busy or stops half-way. The model knows of every page only what it is,
//! and that suffices to say what the pager must not do. At the end the source answers everything, and nobody may be left waiting.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::time::Duration;

use arbitrary::{Arbitrary, Result, Unstructured};
use descriptor::fetch::{ErrorCode, Limits, MAX_RANGES, Tag};
use descriptor::memory::{MemoryMap, PageSize, Region, RegionKind};
use descriptor::{FrameRange, FrameSet, Gfn, PageCount};
use memtap::pager::{Hydrate, Input, Output, Pager, PagerConfig, Prefetch, Retry, Wanted};
use memtap::port::{Installed, PortTraits, Stop, Waiter};

/// Operations of one run; longer lists find nothing new and slow the search down.
const MAX_OPERATIONS: usize = 512;

/// Steps in which a pager must be done after the last operation.
const MAX_STEPS: usize = 100_000;

/// An operation; positions and lengths are taken modulo what there is.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Operation {
    Fault {
        position: u16,
        waiter: u8,
        write: bool,
    },
    Discard {
        position: u16,
        length: u8,
    },
    /// Someone says that these will be overwritten.
    Overwrite {
        position: u16,
        length: u8,
        more: u8,
    },
    SourceUp {
        requests: u8,
        pages: u16,
    },
    SourceDown,
    /// Part of an answer to a request, the newest being 0.
    Arrive {
        request: u8,
        range: u8,
        skip: u8,
        length: u8,
        stop: u8,
    },
    /// Pages that nobody asked for.
    Unasked {
        tag: u8,
        position: u16,
        length: u16,
        stop: u8,
    },
    Answered {
        request: u8,
    },
    /// Its pages came in another way, or so its shell believes.
    Came {
        request: u8,
    },
    /// It was to be answered in another way, and is now asked of the source.
    Redirected {
        request: u8,
    },
    Pushed {
        pushed: bool,
    },
    Lacks {
        chunk: u8,
    },
    /// What siblings needed is told: three ranges from here on, each as far behind the one before as it is long.
    Follow {
        position: u16,
        length: u8,
    },
    /// What the guest needed is taken.
    TakeTouched {
        limit: u8,
    },
    Fail {
        request: u8,
        code: u8,
    },
    Wait {
        ms: u8,
    },
    WaitForTimeout,
    Poll {
        count: u8,
        stop: u8,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Outside,
    Cold,
    Blank,
    Present,
}

struct Model {
    pages: Vec<Page>,
    /// Given up at some time.
    doubtful: Vec<bool>,
    granule: u64,
    waiting: BTreeSet<(u64, u32)>,
    staged: BTreeMap<u64, BTreeSet<u64>>,
    /// Requests that were not answered to the end.
    requests: BTreeMap<Tag, Vec<FrameRange>>,
    limits: Option<Limits>,
    last_tag: Tag,
    /// What the pager said that the guest needed.
    touched: BTreeSet<u64>,
    ready: bool,
    complete: bool,
    failed: bool,
    /// A source that does not have a page was simulated.
    refused: bool,
}

/// Runs the operations that `bytes` stand for.
///
/// # Panics
/// When the pager does what it must not.
pub fn run(bytes: &[u8]) {
    // Bytes that end too early make a shorter run.
    let _ended = run_unstructured(&mut Unstructured::new(bytes));
}

fn run_unstructured(u: &mut Unstructured<'_>) -> Result<()> {
    let (config, mut model) = begin(u)?;
    let hydrates = config.hydrate != Hydrate::Off;
    let attempts = config.retry.attempts;
    let mut pager = Pager::new(Duration::ZERO, config, u.arbitrary()?).expect("the configuration is consistent");
    let mut now = Duration::ZERO;
    for _ in 0..MAX_OPERATIONS {
        if u.is_empty() {
            break;
        }
        let Ok(operation) = u.arbitrary() else {
            break;
        };
        model.apply(&mut pager, &mut now, operation);
    }
    model.finish(&mut pager, &mut now, hydrates, attempts);
    Ok(())
}

fn begin(u: &mut Unstructured<'_>) -> Result<(PagerConfig, Model)> {
    let granule = if u.ratio(1, 8)? { 512 } else { 1 };
    let frames = if granule == 1 { u.int_in_range(1..=300)? } else { granule * u.int_in_range(1..=3)? };
    let range = |start: u64, count: u64| FrameRange::new(Gfn::new(start), PageCount::new(count));
    let hole = granule * u.int_in_range(0..=2)?;
    let name = "ram".to_owned();
    let region = Region { name, frames: range(hole, frames), kind: RegionKind::Ram, page_size: PageSize::Base };
    let memory = MemoryMap::new(vec![region]).expect("one region");
    let universe = memory.universe().get();
    let ranges = |u: &mut Unstructured<'_>, most: usize| -> Result<Vec<FrameRange>> {
        let count = u.int_in_range(0..=most)?;
        let one = |_| {
            let start = u.int_in_range(0..=universe - 1)?;
            Ok(range(start, u.int_in_range(1..=64)?.min(universe - start)))
        };
        (0..count).map(one).collect()
    };
    let set = |ranges: Vec<FrameRange>| FrameSet::from_ranges(PageCount::new(universe), ranges);
    let (zero, free, present, eager) = (set(ranges(u, 4)?), set(ranges(u, 4)?), set(Vec::new()), set(ranges(u, 3)?));
    let config = PagerConfig {
        order: ranges(u, 4)?,
        port: PortTraits { granule: PageCount::new(granule), needs_zeros: u.arbitrary()? },
        prefetch: match u.int_in_range(0..=3)? {
            3 => Prefetch::Around(PageCount::new(u.int_in_range(0..=40)?)),
            0 => Prefetch::Off,
            1 => Prefetch::Fixed(PageCount::new(u.int_in_range(0..=40)?)),
            _ => Prefetch::Adaptive { max: PageCount::new(u.int_in_range(0..=600)?) },
        },
        hydrate: match u.int_in_range(0..=2)? {
            0 => Hydrate::Off,
            1 => Hydrate::Now,
            _ => Hydrate::Rate(NonZeroU64::MIN.saturating_add(u.int_in_range(0..=100_000)?)),
        },
        retry: Retry { min: Duration::from_millis(4), max: Duration::from_millis(40), attempts: 6 },
        patience: Duration::from_secs(3600),
        record: u.arbitrary()?,
        head_start: Duration::from_millis(u.int_in_range(0..=20)?),
        zero_around: PageCount::new(u.int_in_range(0..=100)?),
        memory,
        zero,
        free,
        present,
        eager,
    };
    let page = |gfn| match Gfn::new(gfn) {
        gfn if config.memory.region_of(gfn).is_none() => Page::Outside,
        gfn if config.zero.contains(gfn) || config.free.contains(gfn) => Page::Blank,
        _ => Page::Cold,
    };
    let pages: Vec<Page> = (0..universe).map(page).collect();
    let model = Model {
        doubtful: vec![false; pages.len()],
        pages,
        granule,
        waiting: BTreeSet::new(),
        staged: BTreeMap::new(),
        requests: BTreeMap::new(),
        limits: None,
        last_tag: 0,
        touched: BTreeSet::new(),
        ready: false,
        complete: false,
        failed: false,
        refused: false,
    };
    Ok((config, model))
}

impl Model {
    fn apply(&mut self, pager: &mut Pager, now: &mut Duration, operation: Operation) {
        match operation {
            Operation::Fault { position, waiter, write } => {
                let gfn = self.position(position);
                if self.pages[gfn as usize] == Page::Outside {
                    return;
                }
                let waiter = u32::from(waiter % 8);
                // A waiter waits for one page at a time.
                if self.waiting.iter().all(|(_, waiting)| *waiting != waiter) {
                    self.waiting.insert((gfn, waiter));
                    pager.handle(*now, Input::Fault { gfn: Gfn::new(gfn), waiter: Waiter(waiter), write });
                }
            }
            Operation::Discard { position, length } => self.discard(pager, *now, position, length),
            Operation::Overwrite { position, length, more } => self.overwrite(pager, position, length, more),
            Operation::SourceUp { requests, pages } => {
                let limits = Limits {
                    max_requests: u32::from(requests) + 1,
                    max_pages: u32::from(pages) + 1,
                    idle_timeout_ms: 1000,
                };
                self.requests.clear();
                self.limits = Some(limits);
                pager.handle(*now, Input::SourceUp { limits });
            }
            Operation::SourceDown => {
                self.requests.clear();
                self.limits = None;
                pager.handle(*now, Input::SourceDown);
            }
            Operation::Arrive { request, range, skip, length, stop } => {
                let Some((tag, ranges)) = self.request(request) else {
                    return;
                };
                let range = ranges[usize::from(range) % ranges.len()];
                let (_, rest) = range.split_at(PageCount::new(u64::from(skip)));
                let (run, _) = rest.split_at(PageCount::new(u64::from(length) + 1));
                self.arrive(pager, *now, tag, run, stop);
            }
            Operation::Unasked { tag, position, length, stop } => {
                let start = Gfn::new(self.position(position));
                self.arrive(pager, *now, tag.into(), FrameRange::new(start, PageCount::new(length.into())), stop);
            }
            Operation::Answered { request } => {
                if let Some((tag, _)) = self.request(request) {
                    self.requests.remove(&tag);
                    pager.answered(*now, tag);
                }
            }
            Operation::Came { request } => {
                if let Some((tag, _)) = self.request(request) {
                    self.requests.remove(&tag);
                    pager.came(*now, tag);
                    assert!(pager.owed(tag).is_empty(), "request {tag} has ended");
                }
            }
            Operation::Redirected { request } => {
                if let Some((tag, ranges)) = self.request(request) {
                    let owed = pager.owed(tag);
                    for gfn in owed.iter().flat_map(|range| range.frames()) {
                        assert!(ranges.iter().any(|range| range.contains(gfn)), "page {gfn} is not owed by {tag}");
                        let failed = pager.failure().is_some();
                        assert!(failed || self.pages[gfn.index() as usize] == Page::Cold, "page {gfn} is owed");
                    }
                    pager.redirected(*now, tag);
                }
            }
            Operation::Pushed { pushed } => pager.handle(*now, Input::Pushed(pushed)),
            Operation::Follow { position, length } => {
                let length = u64::from(length) + 1;
                let range = |n: u64| {
                    FrameRange::new(Gfn::new(u64::from(position) % 2048 + 2 * n * length), PageCount::new(length))
                };
                pager.follow((0..3).map(range).collect());
            }
            Operation::TakeTouched { limit } => self.take_touched(pager, limit.into()),
            Operation::Lacks { chunk } => self.check_lacks(pager, u64::from(chunk) + 1),
            Operation::Fail { request, code } => {
                if let Some((tag, _)) = self.request(request) {
                    let codes = [ErrorCode::Unreadable, ErrorCode::ImageGone, ErrorCode::OutOfRange];
                    let code = if code == 255 { codes[2] } else { codes[usize::from(code) % 2] };
                    self.requests.remove(&tag);
                    self.refused |= code == ErrorCode::OutOfRange;
                    pager.handle(*now, Input::RequestFailed { tag, code });
                }
            }
            Operation::Wait { ms } => *now += Duration::from_millis(ms.into()),
            Operation::WaitForTimeout => *now = pager.next_timeout().unwrap_or(*now).max(*now),
            Operation::Poll { count, stop } => {
                for _ in 0..count {
                    if !self.poll(pager, *now, stop) {
                        break;
                    }
                }
            }
        }
    }

    /// Obeys one output; false when there is none.
    fn poll(&mut self, pager: &mut Pager, now: Duration, stop: u8) -> bool {
        let Some(output) = pager.poll(now) else {
            return false;
        };
        assert!(!self.failed, "{output:?} after the failure");
        match output {
            Output::Request { tag, ranges, .. } => self.requested(tag, ranges),
            Output::InstallZeros { range } => {
                self.check_whole(range);
                for gfn in range.frames() {
                    let index = gfn.index() as usize;
                    let again = self.pages[index] == Page::Present && self.doubtful[index];
                    assert!(
                        again || self.pages[index] == Page::Blank,
                        "zeros over page {gfn}: {:?}",
                        self.pages[index]
                    );
                }
                let outcome = self.install(range, stop);
                pager.installed(now, range, outcome);
            }
            Output::InstallStaged { range } => {
                let granule = range.start().index();
                assert_eq!((range.count().get(), granule % self.granule), (self.granule, 0));
                let staged = self.staged.get(&granule).expect("a staged granule has a buffer").clone();
                for gfn in range.frames() {
                    let cold = self.pages[gfn.index() as usize] == Page::Cold;
                    assert!(!cold || staged.contains(&gfn.index()), "page {gfn} is not in the staging buffer");
                    assert_ne!(self.pages[gfn.index() as usize], Page::Present, "page {gfn} is staged but there");
                }
                let outcome = self.install(range, stop);
                pager.installed(now, range, outcome);
                if outcome.stopped != Some(Stop::Busy) {
                    self.staged.remove(&granule);
                }
            }
            Output::DropStaged { range } => {
                self.staged.remove(&range.start().index()).expect("a dropped granule has a buffer");
            }
            Output::Resume { gfn, waiter } => {
                assert!(self.waiting.remove(&(gfn.index(), waiter.0)), "{waiter:?} does not wait for {gfn}");
            }
            Output::Ready => assert!(!std::mem::replace(&mut self.ready, true), "ready twice"),
            Output::Complete => {
                assert!(self.ready && !std::mem::replace(&mut self.complete, true), "complete twice, or not ready");
                assert!(!self.pages.contains(&Page::Cold), "complete without every page");
            }
            Output::Failed { reason } => {
                assert_eq!(pager.failure(), Some(reason));
                self.failed = true;
            }
        }
        true
    }

    fn requested(&mut self, tag: Tag, ranges: Vec<FrameRange>) {
        assert!(tag > self.last_tag, "tag {tag} is used again");
        assert!((1..=MAX_RANGES).contains(&ranges.len()), "{} ranges", ranges.len());
        self.last_tag = tag;
        let mut asked = BTreeSet::new();
        for gfn in ranges.iter().flat_map(|range| range.frames()) {
            assert_eq!(self.pages.get(gfn.index() as usize), Some(&Page::Cold), "page {gfn} is asked for");
            assert!(asked.insert(gfn), "page {gfn} is asked for twice in one request");
        }
        assert!(!ranges.iter().any(|range| range.is_empty()), "an empty range is asked for");
        let limits = self.limits.expect("nothing is asked of a source that is gone");
        assert!(asked.len() as u64 <= u64::from(limits.max_pages), "more pages than allowed");
        self.requests.insert(tag, ranges);
    }

    fn arrive(&mut self, pager: &mut Pager, now: Duration, tag: Tag, run: FrameRange, stop: u8) {
        let mut rest = run;
        while let Some(wanted) = pager.wanted(now, tag, rest) {
            let range = wanted.range();
            assert!(rest.covers(range) && !range.is_empty(), "{range} is wanted of {rest}");
            for gfn in range.frames() {
                assert_eq!(self.pages[gfn.index() as usize], Page::Cold, "page {gfn} is wanted");
            }
            let next = match wanted {
                Wanted::Install(range) => {
                    self.check_whole(range);
                    let outcome = self.install(range, stop);
                    let next = pager.installed(now, range, outcome);
                    if outcome.stopped == Some(Stop::Busy) {
                        // What a shell does between the two: here it finds that the next page was given up.
                        self.discard(pager, now, range.start().index() as u16, stop % 4);
                    }
                    next
                }
                Wanted::Stage(range) => {
                    let granule = range.start().index() / self.granule * self.granule;
                    assert!(range.end().index() <= granule + self.granule, "{range} lies in two granules");
                    let buffer = self.staged.entry(granule).or_default();
                    for gfn in range.frames() {
                        assert!(buffer.insert(gfn.index()), "page {gfn} is staged twice");
                    }
                    pager.staged(now, range);
                    range.end()
                }
            };
            assert!(next > rest.start() || stop % 4 == 1, "no progress");
            if next == rest.start() {
                break;
            }
            rest = FrameRange::between(next.min(run.end()), run.end());
        }
    }

    /// What a port says to an installation: `stop` tells whether and where it stops.
    fn install(&mut self, range: FrameRange, stop: u8) -> Installed {
        let granules = range.count().get() / self.granule;
        let at = u64::from(stop / 4) % granules.max(1) * self.granule;
        let (count, stopped) = match stop % 4 {
            1 => (at, Some(Stop::Busy)),
            2 => (at, Some(Stop::AlreadyPresent)),
            _ => (range.count().get(), None),
        };
        let there = if stopped == Some(Stop::AlreadyPresent) { count + self.granule } else { count };
        for gfn in range.split_at(PageCount::new(there)).0.frames() {
            self.pages[gfn.index() as usize] = Page::Present;
        }
        Installed { count: PageCount::new(count), stopped }
    }

    fn discard(&mut self, pager: &mut Pager, now: Duration, position: u16, length: u8) {
        let start = self.position(position);
        let count = u64::from(length) * if self.granule > 1 { 16 } else { 1 };
        let range = FrameRange::new(Gfn::new(start), PageCount::new(count));
        pager.handle(now, Input::Discard { range });
        if self.failed || pager.failure().is_some() {
            return;
        }
        let whole = start.next_multiple_of(self.granule)..(start + count) / self.granule * self.granule;
        for index in whole {
            if let Some(page) = self.pages.get_mut(index as usize).filter(|page| **page != Page::Outside) {
                *page = Page::Blank;
                self.doubtful[index as usize] = true;
            }
        }
    }

    /// Two ranges, which may overlap.
    fn take_touched(&mut self, pager: &mut Pager, limit: usize) {
        let runs = pager.take_touched(limit);
        assert!(runs.len() <= limit);
        for gfn in runs.into_iter().flat_map(|run| run.frames()).map(|gfn| gfn.index()) {
            let page = self.pages.get(gfn as usize).copied().unwrap_or(Page::Outside);
            assert!(page != Page::Outside || self.granule > 1, "page {gfn}, which there is not, is said to be needed");
            assert!(self.touched.insert(gfn), "page {gfn} is said twice to be needed");
        }
    }

    fn overwrite(&mut self, pager: &mut Pager, position: u16, length: u8, more: u8) {
        let start = self.position(position);
        let count = u64::from(length) * if self.granule > 1 { 8 } else { 1 };
        let range = |start: u64, count: u64| FrameRange::new(Gfn::new(start), PageCount::new(count));
        let ranges = [range(start + u64::from(more % 16), u64::from(more / 16)), range(start, count)];
        let named: BTreeSet<u64> = ranges.iter().flat_map(|range| range.frames()).map(|gfn| gfn.index()).collect();
        let inside = |gfn: &u64| self.pages.get(*gfn as usize).is_some_and(|page| *page != Page::Outside);
        if !named.iter().all(inside) {
            let outside = pager.overwrite(&ranges).expect_err("some of these are not the guest's").0;
            let named = outside.frames().all(|gfn| named.contains(&gfn.index()) && !inside(&gfn.index()));
            return assert!(named && !outside.is_empty(), "{outside} is called outside");
        }
        let noted = pager.overwrite(&ranges).expect("all of these are the guest's");
        let count = |what: Page| named.iter().filter(|gfn| self.pages[**gfn as usize] == what).count() as u64;
        let ended = pager.failure().is_some();
        assert_eq!(noted.present.get(), count(Page::Present));
        assert_eq!(noted.frames.get(), if ended { 0 } else { count(Page::Cold) });
        for gfn in named.into_iter().filter(|_| !ended) {
            let page = &mut self.pages[gfn as usize];
            *page = if *page == Page::Cold { Page::Blank } else { *page };
        }
    }

    /// Answers everything until there is nothing left to do.
    fn finish(&mut self, pager: &mut Pager, now: &mut Duration, hydrates: bool, attempts: u32) {
        let limits = Limits { max_requests: 8, max_pages: 64, idle_timeout_ms: 1000 };
        self.limits = Some(limits);
        self.requests.clear();
        pager.handle(*now, Input::SourceUp { limits });
        pager.handle(*now, Input::Pushed(false));
        for _ in 0..MAX_STEPS {
            if self.poll(pager, *now, 0) {
                continue;
            }
            if let Some((tag, ranges)) = self.requests.pop_last() {
                ranges.into_iter().for_each(|range| self.arrive(pager, *now, tag, range, 0));
                pager.answered(*now, tag);
                continue;
            }
            let given_up = pager.progress().given_up;
            let ready = self.ready || !given_up.is_zero();
            let done = self.waiting.is_empty() && ready && (!hydrates || self.complete || !given_up.is_zero());
            if self.failed {
                assert!(self.refused || attempts < 255, "the pager failed without a reason");
                return;
            }
            if done {
                return;
            }
            let due = pager.next_timeout();
            *now = due.unwrap_or_else(|| panic!("stuck: ready {}, waiters {:?}", self.ready, self.waiting)).max(*now);
        }
        panic!("no end: {:?}, {:?}", pager.progress(), pager.stats());
    }

    /// What the clone lacks is what is cold and in no buffer, or nothing.
    fn check_lacks(&self, pager: &Pager, chunk: u64) {
        let lacks: Vec<u64> = pager.lacks(PageCount::new(chunk)).collect();
        if pager.lacking().is_zero() {
            return assert!(lacks.is_empty(), "{lacks:?} are lacking");
        }
        let staged = |gfn: u64| self.staged.get(&(gfn / self.granule * self.granule)).is_some_and(|s| s.contains(&gfn));
        let cold = (0..self.pages.len() as u64).filter(|gfn| self.pages[*gfn as usize] == Page::Cold && !staged(*gfn));
        let chunks: BTreeSet<u64> = cold.map(|gfn| gfn / chunk).collect();
        assert!(lacks.iter().eq(&chunks), "{lacks:?} are lacking, not {chunks:?}");
    }

    fn check_whole(&self, range: FrameRange) {
        let aligned = |n: u64| n.is_multiple_of(self.granule);
        assert!(aligned(range.start().index()) && aligned(range.count().get()), "{range} is no whole granules");
        assert!(!range.is_empty(), "an empty installation");
    }

    fn request(&self, back: u8) -> Option<(Tag, Vec<FrameRange>)> {
        let count = self.requests.len();
        let index = count.checked_sub(1 + usize::from(back) % count.max(1))?;
        self.requests.iter().nth(index).map(|(tag, ranges)| (*tag, ranges.clone()))
    }

    fn position(&self, position: u16) -> u64 {
        u64::from(position) % self.pages.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_pager_does_what_the_model_allows(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            super::run(&bytes);
        }
    }
}
