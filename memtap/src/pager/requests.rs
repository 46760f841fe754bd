//! What is asked of the source: queues, the window, time-outs.
//!
//! Every cold frame that is wanted stands in one of two sets, `demand` or `bulk`, and belongs to exactly one live request or
//! place in a queue of that class. A request that was not answered in time gives its frames up to a new request but stays
//! *overdue* for one more time-out, since the source may still be busy with it and counts it against the limits.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use descriptor::fetch::{Class, ErrorCode, Limits, MAX_RANGES, Tag};
use descriptor::{FrameRange, FrameSet, Gfn, PageCount};

use super::config::Retry;
use super::message::Failure;
use super::rtt::{Jitter, Rtt};
use super::stats::PagerStats;

/// Requests under way at one time, whatever the source allows: enough for a demand batch of every round trip that bulk
/// answers can stand in the way of, few enough that looking at each is cheap.
const MAX_REQUESTS: u32 = 256;

/// Pages under way at one time, whatever the source allows: 64 MiB.
const MAX_PAGES: u32 = 1 << 14;

/// Bulk pages under way at one time: 8 MiB keeps 8 GB/s busy over a round trip of a millisecond; more would only stand in
/// socket buffers, in front of demand.
const MAX_BULK_PAGES: u64 = 2048;

/// How far behind the newest arrival of a bulk request a page is still *about to arrive*: 256 KiB, some 50 µs on a fast
/// network, less than a demand request takes.
const NEAR: u64 = 64;

/// Why a bulk request was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Someone waits, or the clone may not run yet.
    Demand,
    /// Ahead of a stream of faults, or because the descriptor says so.
    Prefetch,
    /// Because siblings needed it.
    Order,
    /// In the background.
    Hydrate,
}

/// Frames to be asked for, and how often they were before.
#[derive(Clone, Copy, Debug)]
struct Ask {
    range: FrameRange,
    attempts: u32,
    /// In a request of its own, because one that held it failed.
    alone: bool,
}

impl Ask {
    fn once_more(self) -> Self {
        Self { attempts: self.attempts + 1, ..self }
    }
}

#[derive(Debug)]
struct InFlight {
    origin: Origin,
    asks: Vec<Ask>,
    pages: u64,
    asked_at: Duration,
    deadline: Duration,
    /// The end of the run that arrived last.
    arriving: Option<Gfn>,
    /// The time until its answer tells how long answers take.
    measured: bool,
    overdue: bool,
}

#[derive(Debug)]
struct Later {
    due: Duration,
    origin: Origin,
    ask: Ask,
}

#[derive(Debug)]
pub(super) struct Requests {
    retry: Retry,
    demand: FrameSet,
    bulk: FrameSet,
    given_up: FrameSet,
    queue: VecDeque<Ask>,
    again: VecDeque<(Origin, Ask)>,
    later: Vec<Later>,
    in_flight: BTreeMap<Tag, InFlight>,
    window: Option<Limits>,
    last_tag: Tag,
    demand_rtt: Rtt,
    bulk_rtt: Rtt,
    jitter: Jitter,
}

impl Requests {
    pub(super) fn new(universe: PageCount, retry: Retry, seed: u64) -> Self {
        Self {
            retry,
            demand: FrameSet::empty(universe),
            bulk: FrameSet::empty(universe),
            given_up: FrameSet::empty(universe),
            queue: VecDeque::new(),
            again: VecDeque::new(),
            later: Vec::new(),
            in_flight: BTreeMap::new(),
            window: None,
            last_tag: 0,
            demand_rtt: Rtt::default(),
            bulk_rtt: Rtt::default(),
            jitter: Jitter::new(seed),
        }
    }

    /// The class as which `gfn` is wanted already.
    pub(super) fn class_of(&self, gfn: Gfn) -> Option<Class> {
        if self.demand.contains(gfn) { Some(Class::Demand) } else { self.bulk.contains(gfn).then_some(Class::Bulk) }
    }

    /// The parts of `cold`, a run of cold frames, that nothing asks for.
    pub(super) fn unasked(&self, cold: FrameRange) -> impl Iterator<Item = FrameRange> + '_ {
        self.demand.gaps_in(cold).flat_map(|run| self.bulk.gaps_in(run))
    }

    /// The parts of `cold`, a run of cold frames, that are worth asking for in bulk.
    pub(super) fn unasked_bulk(&self, cold: FrameRange) -> impl Iterator<Item = FrameRange> + '_ {
        self.unasked(cold).flat_map(|run| self.given_up.gaps_in(run))
    }

    /// The number of frames that could not be had.
    pub(super) fn given_up(&self) -> PageCount {
        self.given_up.count()
    }

    /// The time that a demand request takes.
    pub(super) fn demand_round_trip(&self) -> Duration {
        self.demand_rtt.smoothed()
    }

    /// Puts `range`, cold frames, behind all other demand, also where it is wanted as bulk already.
    pub(super) fn demand(&mut self, range: FrameRange) {
        let unasked: Vec<FrameRange> = self.demand.gaps_in(range).collect();
        for range in unasked {
            self.bulk.remove_range(range);
            self.demand.insert_range(range);
            self.queue.push_back(Ask { range, attempts: 0, alone: false });
        }
    }

    /// True when `gfn`, wanted as bulk, will probably be there before a demand request could fetch it: its request is the
    /// oldest unanswered one of its kind, and the page is next or close behind the newest arrival.
    pub(super) fn about_to_arrive(&self, gfn: Gfn) -> bool {
        let live = |flight: &&InFlight| flight.origin != Origin::Demand && !flight.overdue;
        let Some(oldest) = self.in_flight.values().find(live) else {
            return false;
        };
        let Some(ask) = oldest.asks.iter().find(|ask| ask.range.contains(gfn)) else {
            return false;
        };
        let next = match oldest.arriving {
            Some(end) => end,
            None => oldest.asks.first().map_or(ask.range.start(), |first| first.range.start()),
        };
        ask.range.start() <= next && next <= gfn && (gfn - next).get() < NEAR
    }

    /// Notes that `range` needs no fetch any more.
    pub(super) fn settle(&mut self, range: FrameRange) {
        let range = range.intersection(self.demand.bounds());
        self.demand.remove_range(range);
        self.bulk.remove_range(range);
        self.given_up.remove_range(range);
    }

    /// The number of frames of `range` that are wanted as demand.
    pub(super) fn demand_in(&self, range: FrameRange) -> PageCount {
        self.demand.count_in(range)
    }

    /// Why request `tag` was made, if it is under way.
    pub(super) fn origin_of(&self, tag: Tag) -> Option<Origin> {
        self.in_flight.get(&tag).map(|flight| flight.origin)
    }

    /// True when something is on its way, or to be asked for again, because siblings needed it.
    pub(super) fn has_order_under_way(&self) -> bool {
        let live = |flight: &InFlight| flight.origin == Origin::Order && !flight.overdue;
        self.in_flight.values().any(live)
            || self.again.iter().any(|(origin, _)| *origin == Origin::Order)
            || self.later.iter().any(|later| later.origin == Origin::Order)
    }

    /// Notes that the pages up to `end` arrived for request `tag`.
    pub(super) fn arriving(&mut self, tag: Tag, end: Gfn) {
        if let Some(flight) = self.in_flight.get_mut(&tag) {
            flight.arriving = Some(end);
        }
    }

    /// The source is there.
    pub(super) fn up(&mut self, limits: Limits) {
        self.window = Some(limits);
    }

    /// The source is gone: what it still owes is asked for first when it is back.
    pub(super) fn down(&mut self, stats: &mut PagerStats) {
        self.window = None;
        for (_, flight) in std::mem::take(&mut self.in_flight).into_iter().rev() {
            for ask in self.unsettled(&flight).into_iter().rev() {
                stats.retried += ask.range.count().get();
                match flight.origin {
                    Origin::Demand => self.queue.push_front(ask),
                    origin => self.again.push_front((origin, ask)),
                }
            }
        }
        for Later { origin, ask, .. } in std::mem::take(&mut self.later) {
            self.queue_again(origin, ask);
        }
    }

    /// The next demand request, where the window allows one.
    pub(super) fn next_demand(&mut self, now: Duration) -> Option<(Tag, Vec<FrameRange>)> {
        let mut room = self.room()?;
        let mut asks: Vec<Ask> = Vec::new();
        while room > 0 && asks.len() < MAX_RANGES {
            let Some(ask) = self.queue.pop_front_if(|ask| asks.is_empty() || !(ask.alone || asks[0].alone)) else {
                break;
            };
            let Some(run) = self.demand.runs_in(ask.range).next() else {
                continue;
            };
            let (run, _) = run.split_at(PageCount::new(room));
            room -= run.count().get();
            let rest = FrameRange::between(run.end(), ask.range.end());
            if !rest.is_empty() {
                self.queue.push_front(Ask { range: rest, ..ask });
            }
            push_joined(&mut asks, Ask { range: run, ..ask });
        }
        self.launch(now, Origin::Demand, asks)
    }

    /// The number of pages that may be asked for now that nobody waits for. A quarter of the window is kept for those that
    /// someone waits for, and so is one request where there may be two.
    pub(super) fn bulk_room(&self) -> u64 {
        let Some(limits) = self.window else {
            return 0;
        };
        let share = |limit: u32| u64::from(limit) - u64::from(limit).div_ceil(4) + u64::from(limit == 1);
        if self.in_flight.len() as u64 >= share(limits.max_requests.min(MAX_REQUESTS)) {
            return 0;
        }
        let pages = share(limits.max_pages.min(MAX_PAGES)).min(MAX_BULK_PAGES);
        pages.saturating_sub(self.pages_under_way())
    }

    /// The next bulk request of frames that were asked for in vain before, of at most `limit` pages; `hydrates` is false as
    /// long as the background is not fetched by requests.
    pub(super) fn next_again(&mut self, now: Duration, limit: u64, hydrates: bool) -> Option<(Tag, Vec<FrameRange>)> {
        loop {
            let is_due = |(origin, _): &(Origin, Ask)| hydrates || *origin != Origin::Hydrate;
            let (origin, ask) = self.again.remove(self.again.iter().position(is_due)?)?;
            let Some(run) = self.bulk.runs_in(ask.range).next() else {
                continue;
            };
            let (run, _) = run.split_at(PageCount::new(limit));
            let rest = FrameRange::between(run.end(), ask.range.end());
            if !rest.is_empty() {
                self.again.push_front((origin, Ask { range: rest, ..ask }));
            }
            return self.launch(now, origin, vec![Ask { range: run, ..ask }]);
        }
    }

    /// Notes that `range`, cold frames that nothing asks for, will be asked for.
    pub(super) fn claim(&mut self, origin: Origin, range: FrameRange) {
        let wanted = if origin == Origin::Demand { &mut self.demand } else { &mut self.bulk };
        wanted.insert_range(range);
    }

    /// A request for `ranges` that were claimed for it, at most [`Requests::bulk_room`] frames; `None` when there are none.
    pub(super) fn ask(
        &mut self,
        now: Duration,
        origin: Origin,
        ranges: Vec<FrameRange>,
    ) -> Option<(Tag, Vec<FrameRange>)> {
        let asks = ranges.into_iter().map(|range| Ask { range, attempts: 0, alone: false }).collect();
        self.launch(now, origin, asks)
    }

    /// Notes the end of the answer to request `tag`; frames that did not come with it are asked for again.
    pub(super) fn answered(&mut self, now: Duration, tag: Tag, stats: &mut PagerStats) -> Result<(), Failure> {
        let Some(flight) = self.in_flight.remove(&tag) else {
            return Ok(());
        };
        if flight.measured && !flight.overdue && flight.asks.iter().all(|ask| ask.attempts == 0) {
            let rtt = if flight.origin == Origin::Demand { &mut self.demand_rtt } else { &mut self.bulk_rtt };
            rtt.sample(now.saturating_sub(flight.asked_at));
        }
        if flight.overdue {
            return Ok(());
        }
        // On a channel that reorders, the other runs of the answer may be just behind.
        let due = now + self.demand_rtt.timeout(self.retry.min / 4, self.retry.max);
        for ask in self.unsettled(&flight) {
            self.retry_at(due, flight.origin, ask.once_more(), stats)?;
        }
        Ok(())
    }

    /// Notes that the pages of request `tag` came, or come, in another way than as its answer, so that the time they take
    /// tells nothing.
    pub(super) fn unmeasured(&mut self, tag: Tag) {
        if let Some(flight) = self.in_flight.get_mut(&tag) {
            flight.measured = false;
        }
    }

    /// Gives request `tag` as much time from now on as if it had been made now.
    pub(super) fn renew(&mut self, now: Duration, tag: Tag) {
        let Some(mut flight) = self.in_flight.remove(&tag) else {
            return;
        };
        if !flight.overdue {
            flight.deadline = self.deadline(now, flight.origin, &flight.asks);
        }
        self.in_flight.insert(tag, flight);
    }

    /// The frames of request `tag` that are still wanted, and by no later request.
    pub(super) fn owed(&self, tag: Tag) -> Vec<FrameRange> {
        let asks = self.in_flight.get(&tag).map(|flight| self.unsettled(flight)).unwrap_or_default();
        asks.into_iter().map(|ask| ask.range).collect()
    }

    /// Notes that the source answered request `tag` with an error.
    pub(super) fn failed(
        &mut self,
        now: Duration,
        tag: Tag,
        code: ErrorCode,
        stats: &mut PagerStats,
    ) -> Result<(), Failure> {
        let Some(flight) = self.in_flight.remove(&tag) else {
            return Ok(());
        };
        stats.refusals += 1;
        if code == ErrorCode::OutOfRange {
            let gfn = flight.asks.first().map_or(Gfn::new(0), |ask| ask.range.start());
            return Err(Failure::Refused { gfn, code });
        }
        if flight.overdue {
            return Ok(());
        }
        for ask in self.unsettled(&flight) {
            let due = now + self.jitter.of(self.backoff(ask.attempts));
            // One bad page must not keep the others away: they are asked for in halves until it stands alone.
            let half = PageCount::new(ask.range.count().get().div_ceil(2));
            let attempts = if half == ask.range.count() { ask.attempts + 1 } else { ask.attempts };
            for range in ask.range.chunks(half) {
                self.retry_at(due, flight.origin, Ask { range, attempts, alone: true }, stats)?;
            }
        }
        Ok(())
    }

    /// Lets time pass: what was not answered is asked for again, what waited for its time goes back to its queue.
    pub(super) fn expire(&mut self, now: Duration, stats: &mut PagerStats) -> Result<(), Failure> {
        let due: Vec<Tag> = self.in_flight.iter().filter(|(_, f)| f.deadline <= now).map(|(tag, _)| *tag).collect();
        for tag in due {
            let Some(mut flight) = self.in_flight.remove(&tag) else {
                continue;
            };
            if flight.overdue {
                continue;
            }
            stats.timeouts += 1;
            for ask in self.unsettled(&flight) {
                self.retry_at(now, flight.origin, ask.once_more(), stats)?;
            }
            flight.overdue = true;
            flight.deadline = now + (flight.deadline - flight.asked_at);
            self.in_flight.insert(tag, flight);
        }
        if self.later.iter().any(|later| later.due <= now) {
            let (ripe, later) = std::mem::take(&mut self.later).into_iter().partition(|later| later.due <= now);
            self.later = later;
            let ripe: Vec<Later> = ripe;
            for Later { origin, ask, .. } in ripe {
                self.queue_again(origin, ask);
            }
        }
        Ok(())
    }

    /// When [`Requests::expire`] has something to do.
    pub(super) fn next_timeout(&self) -> Option<Duration> {
        let deadlines = self.in_flight.values().map(|flight| flight.deadline);
        deadlines.chain(self.later.iter().map(|later| later.due)).min()
    }

    /// The pages that the window has room for, if it has room for a request at all.
    fn room(&self) -> Option<u64> {
        let limits = self.window?;
        let room = u64::from(limits.max_pages.min(MAX_PAGES)).saturating_sub(self.pages_under_way());
        ((self.in_flight.len() as u64) < u64::from(limits.max_requests.min(MAX_REQUESTS)) && room > 0).then_some(room)
    }

    fn pages_under_way(&self) -> u64 {
        self.in_flight.values().map(|flight| flight.pages).sum()
    }

    fn launch(&mut self, now: Duration, origin: Origin, asks: Vec<Ask>) -> Option<(Tag, Vec<FrameRange>)> {
        if asks.is_empty() {
            return None;
        }
        let deadline = self.deadline(now, origin, &asks);
        self.last_tag += 1;
        let ranges: Vec<FrameRange> = asks.iter().map(|ask| ask.range).collect();
        let pages = ranges.iter().map(|range| range.count().get()).sum();
        let (arriving, measured, overdue) = (None, true, false);
        let flight = InFlight { origin, asks, pages, asked_at: now, deadline, arriving, measured, overdue };
        self.in_flight.insert(self.last_tag, flight);
        Some((self.last_tag, ranges))
    }

    /// Until when to wait for the answer to a request that is made now.
    fn deadline(&mut self, now: Duration, origin: Origin, asks: &[Ask]) -> Duration {
        let attempts = asks.iter().map(|ask| ask.attempts).max().unwrap_or(0);
        let rtt = if origin == Origin::Demand { &self.demand_rtt } else { &self.bulk_rtt };
        let wait = rtt.timeout(self.retry.min, self.retry.max);
        let wait = wait.saturating_mul(1 << attempts.min(16)).min(self.retry.max.max(wait));
        now + self.jitter.of(wait)
    }

    /// The frames of a live request that are still wanted and still its own.
    fn unsettled(&self, flight: &InFlight) -> Vec<Ask> {
        if flight.overdue {
            return Vec::new();
        }
        let wanted = if flight.origin == Origin::Demand { &self.demand } else { &self.bulk };
        flight.asks.iter().flat_map(|ask| wanted.runs_in(ask.range).map(|range| Ask { range, ..*ask })).collect()
    }

    fn retry_at(&mut self, due: Duration, origin: Origin, ask: Ask, stats: &mut PagerStats) -> Result<(), Failure> {
        if ask.attempts < self.retry.attempts {
            stats.retried += ask.range.count().get();
            self.later.push(Later { due, origin, ask });
        } else if origin == Origin::Demand {
            return Err(Failure::NoAnswer { gfn: ask.range.start(), attempts: ask.attempts });
        } else {
            stats.given_up += ask.range.count().get();
            self.bulk.remove_range(ask.range);
            self.given_up.insert_range(ask.range);
        }
        Ok(())
    }

    fn queue_again(&mut self, origin: Origin, ask: Ask) {
        match origin {
            Origin::Demand => self.queue.push_front(ask),
            origin => self.again.push_back((origin, ask)),
        }
    }

    fn backoff(&self, attempts: u32) -> Duration {
        (self.retry.min / 4).saturating_mul(1 << attempts.min(16)).min(self.retry.max)
    }
}

/// Adds `ask` to `asks`, to the last one where it continues that.
fn push_joined(asks: &mut Vec<Ask>, ask: Ask) {
    match asks.last_mut() {
        Some(last) if last.range.end() == ask.range.start() && last.attempts == ask.attempts && !ask.alone => {
            last.range = FrameRange::between(last.range.start(), ask.range.end());
        }
        _ => asks.push(ask),
    }
}
