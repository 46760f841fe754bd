//! What becomes of pages: which of those that arrive are wanted, and what follows from an installation.

use std::time::Duration;

use descriptor::{FrameRange, Gfn, PageCount};

use super::presence::State;
use super::requests::Origin;
use super::{Pager, Wanted};

impl Pager {
    pub(super) fn first_wanted(&self, rest: FrameRange) -> Option<Wanted> {
        let single = self.presence.granule() == PageCount::ONE;
        for cold in self.presence.cold().runs_in(rest) {
            if single {
                return Some(Wanted::Install(cold));
            }
            let whole = self.presence.inward(cold);
            if !whole.is_empty() && whole.start() == cold.start() && !self.staging.any_in(whole) {
                return Some(Wanted::Install(whole));
            }
            for piece in self.by_granule(cold) {
                // Only what is asked for, or pushed, is worth a buffer.
                let pushed = self.takes_pushed(piece);
                let asked = |run: &FrameRange| pushed || self.requests.unasked(*run).next().is_none();
                if let Some(run) = self.staging.missing(piece).find(asked) {
                    return Some(Wanted::Stage(run));
                }
            }
        }
        None
    }

    fn by_granule(&self, range: FrameRange) -> impl Iterator<Item = FrameRange> {
        let size = self.presence.granule();
        self.presence.outward(range).chunks(size).map(move |granule| granule.intersection(range))
    }

    /// Notes that whole granules are there, installed by the shell or `found` in place.
    pub(super) fn arrived(&mut self, now: Duration, range: FrameRange, found: bool) {
        if range.is_empty() {
            return;
        }
        let blank = self.presence.blank().count_in(range).get();
        if found {
            self.stats.found_pages += self.presence.cold().count_in(range).get() + blank;
        } else {
            self.stats.zeros_installed += blank;
            if !self.staging.any_in(range) {
                self.count_fetched(range);
            }
        }
        self.presence.installed(range);
        self.requests.settle(range);
        self.staging.installed(range);
        self.eager.remove_range(range);
        self.waiting.installed(now, range, &mut self.latency);
    }

    pub(super) fn count_fetched(&mut self, range: FrameRange) {
        let demand = self.requests.demand_in(range).get();
        self.stats.demand_pages += demand;
        let others = self.presence.cold().count_in(range).get() - demand;
        match self.arriving {
            Some(Origin::Prefetch) => self.stats.prefetch_pages += others,
            Some(Origin::Order) => self.stats.order_pages += others,
            Some(Origin::Hydrate) => self.stats.hydrate_pages += others,
            Some(Origin::Demand) | None => self.stats.unasked_pages += others,
        }
    }

    /// Puts back in its queue what the port did not install of zeros or staged granules. Pages that arrived are in the shell's
    /// hand, which comes back for them.
    pub(super) fn put_back(&mut self, rest: FrameRange) {
        if rest.is_empty() || self.has_ended() {
            return;
        }
        let waited: Vec<Gfn> = self.waiting.in_range(rest).collect();
        for granule in waited.into_iter().rev() {
            if self.presence.state(granule) != State::Cold {
                self.zero_faults.push_front(granule);
            }
        }
        let granule = self.presence.granule_of(rest.start());
        if self.staging.any_in(granule) && self.missing_in(granule).next().is_none() {
            self.staging.complete(granule.start());
        }
        self.zero_sweep = self.zero_sweep.map(|cursor| cursor.min(rest.start()));
        self.eager_cursor = self.eager_cursor.min(rest.start());
    }
}
