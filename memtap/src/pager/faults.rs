//! What the port reports: faults and discards.

use std::time::Duration;

use descriptor::fetch::Class;
use descriptor::{FrameRange, Gfn};

use super::latency::Kind;
use super::presence::State;
use super::{Failure, Pager};
use crate::port::Waiter;

/// Runs of pages to be fetched ahead that may wait for room; the oldest give way, as the guest may have passed them.
const MAX_AHEAD: usize = 256;

/// Bounds of the time for which a page that is about to arrive as bulk is trusted to come.
const TRUST: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(50));

impl Pager {
    pub(super) fn fault(&mut self, now: Duration, gfn: Gfn, waiter: Waiter, write: bool) -> Result<(), Failure> {
        self.stats.faults += 1;
        self.stats.write_faults += u64::from(write);
        let state = self.presence.state(gfn);
        match state {
            State::Outside => return Err(Failure::Outside { gfn }),
            State::Present => {
                self.stats.late += 1;
                self.waiting.resume(gfn, waiter);
                return Ok(());
            }
            State::Cold | State::Blank | State::Doubtful => {}
        }
        let granule = self.presence.granule_of(gfn);
        if self.waiting.is_waited_for(granule.start()) {
            self.stats.coalesced += 1;
            return self.waiting.add(now, granule.start(), gfn, waiter, Kind::Demand);
        }
        let kind = match state {
            State::Cold => self.ask_for(now, gfn, granule),
            _ => {
                self.stats.avoided += u64::from(state == State::Blank);
                self.stats.late += u64::from(state == State::Doubtful);
                self.zero_faults.push_back(granule.start());
                Kind::Local
            }
        };
        self.waiting.add(now, granule.start(), gfn, waiter, kind)
    }

    /// Sees to it that a granule with cold frames comes soon.
    fn ask_for(&mut self, now: Duration, gfn: Gfn, granule: FrameRange) -> Kind {
        self.stats.demand_faults += 1;
        self.note_needed(granule);
        self.follow_stream(granule);
        let missing: Vec<FrameRange> = self.missing_in(granule).collect();
        let Some(first) = missing.first() else {
            // All of it is staged and about to be installed.
            self.stats.covered += 1;
            return Kind::Covered;
        };
        let unasked = missing.iter().any(|run| self.requests.unasked(*run).next().is_some());
        let class = self.requests.class_of(first.start());
        if !unasked && class == Some(Class::Demand) {
            self.stats.covered += 1;
            return Kind::Covered;
        }
        let next = if first.covers(FrameRange::single(gfn)) { gfn } else { first.start() };
        if !unasked && self.requests.about_to_arrive(next) {
            let trust = (self.requests.demand_round_trip() * 2).clamp(TRUST.0, TRUST.1);
            self.trusted.push_back((now + trust, granule.start()));
            self.stats.covered += 1;
            return Kind::Covered;
        }
        self.demand(&missing);
        Kind::Demand
    }

    /// Fetches ahead of the stream of faults that `granule` belongs to, if any.
    fn follow_stream(&mut self, granule: FrameRange) {
        let size = self.presence.granule().get();
        let ahead = self.streams.fault((granule.start().index() / size) as i64);
        self.note_used();
        let Some(ahead) = ahead else { return };
        let runs = self.runs_of(&ahead);
        self.ahead.extend(runs);
        self.ahead.drain(..self.ahead.len().saturating_sub(MAX_AHEAD));
    }

    pub(super) fn demand(&mut self, missing: &[FrameRange]) {
        for run in missing {
            let bulk = run.count().get() - self.requests.unasked(*run).map(|run| run.count().get()).sum::<u64>();
            self.stats.promoted += bulk - self.requests.demand_in(*run).get();
            self.requests.demand(*run);
        }
    }

    pub(super) fn discard(&mut self, range: FrameRange) {
        for run in self.presence.discard(range) {
            self.stats.discarded += run.count().get();
            self.requests.settle(run);
            self.staging.discard(run);
            self.eager.remove_range(run);
            let waited: Vec<Gfn> = self.waiting.in_range(run).collect();
            for granule in waited {
                self.waiting.reclassify(granule, Kind::Local);
                self.zero_faults.push_back(granule);
            }
            self.zero_sweep = self.zero_sweep.map(|cursor| cursor.min(run.start()));
        }
    }
}
