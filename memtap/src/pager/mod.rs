//! The pager's core: which pages to ask for, which to install, whom to let go on. Pure: no I/O, no clock, no page bytes.
//!
//! ```text
//!   fault port ──Fault, Discard──▶ ┌───────┐ ──Request──────────────▶ page source
//!              ◀─InstallZeros, ────│ Pager │ ◀─SourceUp, SourceDown,──
//!                InstallStaged,    │       │   RequestFailed
//!                Resume            └───────┘
//!                                      │ wanted, installed, answered
//!   fault port ◀────── page bytes ─── shell ◀───── page bytes ─────── page source
//! ```
//!
//! The shell feeds [`Input`]s, then obeys [`Output`]s until there are none. Faults that it feeds before it polls become one
//! request. Outputs come most urgent first, and background work may yield very many in a row, so a shell looks for new events
//! every few outputs. When pages arrive it walks through them, never holding more than the buffer that they came in:
//!
//! ```no_run
//! # use descriptor::{FrameRange, fetch::Tag};
//! # use memtap::pager::{Pager, Wanted};
//! # use memtap::port::{FaultPort, PortError, Stop};
//! # fn slice(_: &[u8], _: FrameRange, _: FrameRange) -> &[u8] { &[] }
//! # fn stage(_: FrameRange, _: &[u8]) {}
//! # fn now() -> std::time::Duration { std::time::Duration::ZERO }
//! fn arrived(pager: &mut Pager, port: &mut dyn FaultPort, tag: Tag, frames: FrameRange, last: bool, bytes: &[u8])
//!     -> Result<(), PortError>
//! {
//!     let mut rest = frames;
//!     while let Some(wanted) = pager.wanted(now(), tag, rest) {
//!         let next = match wanted {
//!             Wanted::Install(range) => {
//!                 let outcome = port.install(range.start(), slice(bytes, frames, range))?;
//!                 let next = pager.installed(now(), range, outcome);
//!                 if outcome.stopped == Some(Stop::Busy) {
//!                     let mut events = Vec::new();
//!                     port.read_events(&mut events)?;
//!                     events.into_iter().for_each(|event| pager.handle(now(), event.into()));
//!                 }
//!                 next
//!             }
//!             Wanted::Stage(range) => {
//!                 stage(range, slice(bytes, frames, range));
//!                 pager.staged(now(), range);
//!                 range.end()
//!             }
//!         };
//!         rest = FrameRange::between(next, frames.end());
//!     }
//!     if last {
//!         pager.answered(now(), tag);
//!     }
//!     Ok(())
//! }
//! ```
//!
//! Invariants, each tested: bytes from the source are installed at most once for a frame, never over a page that is there,
//! never over one that the guest gave up or that someone is about to overwrite; every waiter is resumed once its page is there, or the pager fails; queues and
//! windows are bounded.

mod arrivals;
mod background;
mod config;
mod faults;
mod hydrate;
mod latency;
mod message;
mod overwrite;
mod prefetch;
mod presence;
mod push;
mod requests;
mod rtt;
mod staging;
mod stats;
mod waiting;
mod working_set;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

use descriptor::fetch::{Class, Tag};
use descriptor::working_set::WorkingSet;
use descriptor::{FrameRange, FrameSet, Gfn, PageCount};
use serde::Serialize;

pub use config::{ConfigError, Hydrate, PagerConfig, Prefetch, Retry};
pub use latency::Latency;
pub use message::{Failure, Input, Output, Wanted};
pub use overwrite::{NotMemory, Overwritten};
pub use stats::PagerStats;

use self::hydrate::{Course, Pace};
use self::prefetch::Streams;
use self::presence::{Presence, State};
use self::requests::{Origin, Requests};
use self::staging::Staging;
use self::waiting::Waiting;
use self::working_set::HeadStart;
use crate::port::{Installed, Stop};

/// The pager of one clone.
#[derive(Debug)]
pub struct Pager {
    presence: Presence,
    requests: Requests,
    waiting: Waiting,
    staging: Staging,
    streams: Streams,
    course: Course,
    pace: Pace,
    /// What the guest needs, where that is to be noted.
    touched: Option<WorkingSet>,
    head_start: Option<HeadStart>,
    /// Granules that someone waits for and that zeros suffice for.
    zero_faults: VecDeque<Gfn>,
    zero_around: PageCount,
    /// Where zeros are to be installed without a fault, as the port needs.
    zero_sweep: Option<Gfn>,
    /// Eager frames that are not there yet, and up to where they were asked for.
    eager: FrameSet,
    eager_cursor: Gfn,
    /// Runs to be fetched ahead of streams of faults.
    ahead: VecDeque<FrameRange>,
    /// Pages that someone waits for and that are about to arrive as bulk, and until when that is believed.
    trusted: VecDeque<(Duration, Gfn)>,
    /// The source pushes the background by itself.
    pushed: bool,
    needs_zeros: bool,
    patience: Duration,
    down_since: Option<Duration>,
    arriving: Option<Origin>,
    phase: Phase,
    stats: PagerStats,
    latency: Latency,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Eager,
    Running,
    Complete,
    Failing(Failure),
    Failed(Failure),
    Closed,
}

/// How much of the image the clone has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// Frames in the memory map.
    pub total: PageCount,
    /// Frames that must be fetched still.
    pub missing: PageCount,
    /// Frames that are not there and need no fetch: zero, free, given up by the guest, or about to be overwritten.
    pub avoided: PageCount,
    /// Frames among the missing that the source could not deliver and that nobody has waited for yet.
    pub given_up: PageCount,
}

impl Pager {
    /// The pager of a clone that is about to begin, its source not there yet. `seed` spreads the retries of many clones.
    ///
    /// # Errors
    /// When the sets do not fit the memory map, or the memory map the port.
    pub fn new(now: Duration, config: PagerConfig, seed: u64) -> Result<Self, ConfigError> {
        config.check()?;
        let PagerConfig { memory, zero, free, present, mut eager, order, port, .. } = config;
        let universe = memory.universe();
        let presence = Presence::new(&memory, port.granule, &zero, &free, &present);
        let runs: Vec<FrameRange> = eager.runs().map(|run| presence.outward(run)).collect();
        for run in runs {
            eager.insert_range(run);
        }
        eager.intersect_with(presence.memory());
        eager.subtract(&present);
        let within = |range: FrameRange| presence.outward(range.intersection(presence.memory().bounds()));
        let order = if config.prefetch == Prefetch::Off { Vec::new() } else { order.into_iter().map(within).collect() };
        let sweep = config.port.needs_zeros && config.hydrate != Hydrate::Off;
        Ok(Self {
            requests: Requests::new(universe, config.retry, seed),
            waiting: Waiting::default(),
            staging: Staging::new(universe, port.granule),
            streams: Streams::new(config.prefetch, port.granule.get()),
            course: Course::new(order, presence.memory().bounds(), config.hydrate != Hydrate::Off),
            pace: Pace::new(config.hydrate, now),
            touched: config.record.then(|| WorkingSet::new(universe)),
            head_start: (!config.head_start.is_zero()).then(|| HeadStart::new(config.head_start)),
            zero_faults: VecDeque::new(),
            zero_around: config.zero_around,
            zero_sweep: sweep.then_some(Gfn::new(0)),
            eager,
            eager_cursor: Gfn::new(0),
            ahead: VecDeque::new(),
            trusted: VecDeque::new(),
            pushed: false,
            needs_zeros: port.needs_zeros,
            patience: config.patience,
            down_since: Some(now),
            arriving: None,
            phase: Phase::Eager,
            stats: PagerStats::default(),
            latency: Latency::new(),
            presence,
        })
    }

    /// Takes note of what happened.
    pub fn handle(&mut self, now: Duration, input: Input) {
        if self.has_ended() {
            return;
        }
        let result = match input {
            Input::Fault { gfn, waiter, write } => self.fault(now, gfn, waiter, write),
            Input::Discard { range } => {
                self.discard(range);
                Ok(())
            }
            Input::SourceUp { limits } => {
                // What an earlier connection still owes will not come through this one.
                self.requests.down(&mut self.stats);
                self.requests.up(limits);
                self.down_since = None;
                if let Some(head_start) = &mut self.head_start {
                    head_start.source_up(now);
                }
                Ok(())
            }
            Input::SourceDown => {
                self.requests.down(&mut self.stats);
                self.stats.source_losses += u64::from(self.down_since.is_none());
                self.down_since.get_or_insert(now);
                Ok(())
            }
            Input::RequestFailed { tag, code } => self.requests.failed(now, tag, code, &mut self.stats),
            Input::Pushed(pushed) => {
                self.pushed = pushed;
                Ok(())
            }
            Input::Closed => {
                self.phase = Phase::Closed;
                Ok(())
            }
        };
        self.fail_on(result);
    }

    /// What to do next; `None` when there is nothing to do until an input comes or [`Pager::next_timeout`] has passed.
    pub fn poll(&mut self, now: Duration) -> Option<Output> {
        if !self.has_ended() {
            self.advance(now);
        }
        match self.phase {
            Phase::Failing(reason) => {
                self.phase = Phase::Failed(reason);
                Some(Output::Failed { reason })
            }
            Phase::Failed(_) | Phase::Closed => None,
            Phase::Eager | Phase::Running | Phase::Complete => {
                self.next_urgent(now).or_else(|| self.next_eager(now)).or_else(|| self.next_background(now))
            }
        }
    }

    /// When [`Pager::poll`] must be called next, should no input come before.
    pub fn next_timeout(&mut self) -> Option<Duration> {
        if self.has_ended() {
            return None;
        }
        let trusted = self.trusted.front().map(|(until, _)| *until);
        let patience = self.down_since.filter(|_| self.phase != Phase::Complete).map(|since| since + self.patience);
        let paced = self.has_course() && self.requests.bulk_room() > 0;
        let pace = if paced { self.pace.next_timeout() } else { None };
        let head_start = self.head_start.and_then(|head_start| head_start.until());
        [self.requests.next_timeout(), trusted, patience, pace, head_start].into_iter().flatten().min()
    }

    /// The first part of `rest`, pages that arrived for request `tag`, that is to be installed or staged now; `None` when there
    /// is no use for any of them. Frames before that part are of no use; they are counted and forgotten.
    ///
    /// A page is taken whatever request it came for, as an image never changes.
    pub fn wanted(&mut self, _now: Duration, tag: Tag, rest: FrameRange) -> Option<Wanted> {
        let within = rest.intersection(self.presence.memory().bounds());
        if self.has_ended() || within.is_empty() {
            return None;
        }
        self.arriving = self.requests.origin_of(tag);
        self.requests.arriving(tag, rest.end());
        let wanted = self.first_wanted(within);
        let skipped_to = wanted.map_or(within.end(), |wanted| wanted.range().start());
        let skipped = FrameRange::between(within.start(), skipped_to);
        let stale = self.presence.blank().count_in(skipped).get();
        self.stats.stale += stale;
        self.stats.duplicates += skipped.count().get() - stale;
        wanted
    }

    /// Notes how far the installation of `range` came: of pages that were [wanted](Pager::wanted), of zeros, or of a staged
    /// granule. Returns the frame from which on nothing was done yet.
    pub fn installed(&mut self, now: Duration, range: FrameRange, outcome: Installed) -> Gfn {
        let range = range.intersection(self.presence.memory().bounds());
        let (done, rest) = self.presence.inward_count(range, outcome.count);
        self.arrived(now, done, false);
        let rest = match outcome.stopped {
            Some(Stop::AlreadyPresent) if !rest.is_empty() => {
                let (found, rest) = rest.split_at(self.presence.granule());
                self.arrived(now, found, true);
                rest
            }
            _ => rest,
        };
        self.put_back(rest);
        rest.start()
    }

    /// Notes that `range`, which was [wanted](Pager::wanted) for staging, is in the staging buffer of its granule.
    pub fn staged(&mut self, _now: Duration, range: FrameRange) {
        let granule = self.presence.granule_of(range.start());
        if self.has_ended() || !granule.covers(range) {
            return;
        }
        self.count_fetched(range);
        self.requests.settle(range);
        self.staging.add(granule.start(), range);
        if self.presence.state(range.start()) != State::Cold {
            self.staging.discard(granule);
        } else if self.missing_in(granule).next().is_none() {
            self.staging.complete(granule.start());
        }
    }

    /// Notes that the last run of the answer to request `tag` was seen, or that all of its pages came in another way, see
    /// [`Pager::came`].
    pub fn answered(&mut self, now: Duration, tag: Tag) {
        let result = self.requests.answered(now, tag, &mut self.stats);
        self.fail_on(result);
    }

    /// Fetches what no fault has asked for in this way from now on.
    pub fn set_hydrate(&mut self, now: Duration, hydrate: Hydrate) {
        self.pace = Pace::new(hydrate, now);
        self.course.set_hydrates(hydrate != Hydrate::Off);
        if self.needs_zeros && hydrate != Hydrate::Off {
            self.zero_sweep.get_or_insert(Gfn::new(0));
        }
    }

    /// What was done so far.
    pub fn stats(&self) -> &PagerStats {
        &self.stats
    }

    /// How long faults took.
    pub fn latency(&self) -> &Latency {
        &self.latency
    }

    /// How much of the image the clone has.
    pub fn progress(&self) -> Progress {
        Progress {
            total: self.presence.memory().count(),
            missing: self.presence.cold().count(),
            avoided: self.presence.blank().count(),
            given_up: self.requests.given_up(),
        }
    }

    /// True when the clone has all of `range`, as far as that lies in the memory map.
    pub fn is_present(&self, range: FrameRange) -> bool {
        let lacks = |set: &FrameSet| set.runs_in(range).next().is_some();
        !lacks(self.presence.cold()) && !lacks(self.presence.blank())
    }

    /// Why the pager cannot go on, if it cannot.
    pub fn failure(&self) -> Option<Failure> {
        match self.phase {
            Phase::Failing(reason) | Phase::Failed(reason) => Some(reason),
            _ => None,
        }
    }

    /// Lets time pass.
    fn advance(&mut self, now: Duration) {
        self.end_head_start(now);
        let result = self.requests.expire(now, &mut self.stats);
        self.fail_on(result);
        while let Some((_, granule)) = self.trusted.pop_front_if(|(until, _)| *until <= now) {
            if !self.waiting.is_waited_for(granule) {
                continue;
            }
            let missing: Vec<FrameRange> = self.missing_in(self.presence.granule_of(granule)).collect();
            self.demand(&missing);
        }
        if let Some(since) = self.down_since
            && self.phase != Phase::Complete
            && now.saturating_sub(since) >= self.patience
        {
            self.fail_on(Err(Failure::SourceGone { gone: now.saturating_sub(since) }));
        }
    }

    /// What a waiter is waiting for.
    fn next_urgent(&mut self, now: Duration) -> Option<Output> {
        if let Some((gfn, waiter)) = self.waiting.next_resumable() {
            return Some(Output::Resume { gfn, waiter });
        }
        while let Some(granule) = self.zero_faults.pop_front() {
            if self.waiting.is_waited_for(granule) {
                let range = match self.presence.state(granule) {
                    State::Blank => self.presence.blank_around(granule, self.zero_around),
                    _ => self.presence.granule_of(granule),
                };
                return Some(Output::InstallZeros { range });
            }
        }
        if let Some(range) = self.staging.next_dropped() {
            return Some(Output::DropStaged { range });
        }
        if let Some(range) = self.staging.next_complete() {
            return Some(Output::InstallStaged { range });
        }
        let (tag, ranges) = self.requests.next_demand(now)?;
        self.stats.demand_requests += 1;
        Some(Output::Request { tag, class: Class::Demand, ranges })
    }

    /// The frames of a granule that must still be fetched.
    fn missing_in(&self, granule: FrameRange) -> impl Iterator<Item = FrameRange> + '_ {
        self.presence.cold().runs_in(granule).flat_map(|run| self.staging.missing(run))
    }

    fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Failing(_) | Phase::Failed(_) | Phase::Closed)
    }

    fn fail_on(&mut self, result: Result<(), Failure>) {
        if let Err(reason) = result
            && !self.has_ended()
        {
            self.phase = Phase::Failing(reason);
        }
    }
}

impl Wanted {
    /// The frames.
    pub fn range(self) -> FrameRange {
        match self {
            Wanted::Install(range) | Wanted::Stage(range) => range,
        }
    }
}
