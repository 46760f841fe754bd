//! The background: what to fetch that no fault has asked for, and how fast.

use std::time::Duration;

use descriptor::{FrameRange, Gfn, PageCount};

use super::config::Hydrate;

/// Goes once over what siblings needed, as far as that is told, then over the descriptor's prefetch order, and then, if they
/// are to be hydrated, over all frames.
#[derive(Debug)]
pub(super) struct Course {
    order: Vec<FrameRange>,
    /// So many ranges of the order are what siblings needed.
    told: usize,
    index: usize,
    /// How far the current range is done.
    done: PageCount,
    all: FrameRange,
    hydrates: bool,
}

impl Course {
    pub(super) fn new(order: Vec<FrameRange>, all: FrameRange, hydrates: bool) -> Self {
        Self { order, told: 0, index: 0, done: PageCount::ZERO, all, hydrates }
    }

    /// Goes over what siblings needed first, and then on.
    pub(super) fn follow(&mut self, told: Vec<FrameRange>) {
        if told.is_empty() {
            return;
        }
        // What was begun of the descriptor's order is begun again; what is there of it is passed over soon.
        let rest = self.order.drain(..).skip(self.index.max(self.told));
        (self.told, self.index, self.done) = (told.len(), 0, PageCount::ZERO);
        self.order = told.into_iter().chain(rest).collect();
    }

    /// True as long as what siblings needed is not done.
    pub(super) fn is_told(&self) -> bool {
        self.index < self.told
    }

    /// Goes over all frames after the order, or does not, from now on.
    pub(super) fn set_hydrates(&mut self, hydrates: bool) {
        self.hydrates = hydrates;
    }

    /// True as long as the prefetch order is not done.
    pub(super) fn is_in_order(&self) -> bool {
        self.index < self.order.len()
    }

    /// What remains of the current range; `None` when the course is done.
    pub(super) fn rest(&mut self) -> Option<FrameRange> {
        loop {
            let range = match self.order.get(self.index) {
                Some(range) => range.intersection(self.all),
                None if self.hydrates && self.index == self.order.len() => self.all,
                None => return None,
            };
            let (_, rest) = range.split_at(self.done);
            if !rest.is_empty() {
                return Some(rest);
            }
            self.index += 1;
            self.done = PageCount::ZERO;
        }
    }

    /// Goes on to `end`, within what [`Course::rest`] gave.
    pub(super) fn advance(&mut self, end: Gfn) {
        if let Some(rest) = self.rest() {
            self.done += end - rest.start();
            // Moves on where the range is done.
            self.rest();
        }
    }
}

/// A token bucket of pages.
#[derive(Debug)]
pub(super) struct Pace {
    policy: Hydrate,
    /// Pages times 10⁹.
    tokens: u128,
    counted: Duration,
}

/// Pages that are asked for at once at least when paced, where the rate allows as many in a second: 256 KiB.
const MIN_BATCH: u64 = 64;

impl Pace {
    pub(super) fn new(policy: Hydrate, now: Duration) -> Self {
        Self { policy, tokens: 0, counted: now }
    }

    pub(super) fn policy(&self) -> Hydrate {
        self.policy
    }

    /// The pages that may be asked for now.
    pub(super) fn allowed(&mut self, now: Duration) -> u64 {
        let rate = match self.policy {
            // The prefetch order is fetched all the same.
            Hydrate::Off | Hydrate::Now => return u64::MAX,
            Hydrate::Rate(rate) => rate.get(),
        };
        let earned = now.saturating_sub(self.counted).as_nanos() * u128::from(rate);
        self.counted = self.counted.max(now);
        // What was not used in a tenth of a second is lost.
        let burst = u128::from((rate / 10).max(batch(rate))) * NANOS;
        self.tokens = (self.tokens + earned).min(burst);
        let whole = (self.tokens / NANOS) as u64;
        if whole >= batch(rate) { whole } else { 0 }
    }

    /// Takes `pages` that were asked for.
    pub(super) fn spend(&mut self, pages: PageCount) {
        self.tokens = self.tokens.saturating_sub(u128::from(pages.get()) * NANOS);
    }

    /// When pages may be asked for that may not be now.
    pub(super) fn next_timeout(&self) -> Option<Duration> {
        let Hydrate::Rate(rate) = self.policy else {
            return None;
        };
        let missing = (u128::from(batch(rate.get())) * NANOS).saturating_sub(self.tokens);
        let wait = missing.div_ceil(u128::from(rate.get()));
        Some(self.counted + Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX)))
    }
}

const NANOS: u128 = 1_000_000_000;

fn batch(rate: u64) -> u64 {
    MIN_BATCH.min(rate)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;

    #[test]
    fn the_order_comes_first() {
        let range = |start, count| FrameRange::new(Gfn::new(start), PageCount::new(count));
        let mut course = Course::new(vec![range(50, 10), range(200, 5), range(90, 20)], range(0, 100), true);
        let mut seen = Vec::new();
        while let Some(rest) = course.rest() {
            let (head, _) = rest.split_at(PageCount::new(60));
            seen.push(head);
            course.advance(head.end());
        }
        assert_eq!(seen, [range(50, 10), range(90, 10), range(0, 60), range(60, 40)]);
    }

    #[test]
    fn hydration_can_begin_late() {
        let range = |start, count| FrameRange::new(Gfn::new(start), PageCount::new(count));
        let mut course = Course::new(vec![range(50, 10)], range(0, 100), false);
        course.advance(Gfn::new(60));
        assert_eq!(course.rest(), None);
        course.set_hydrates(true);
        assert_eq!(course.rest(), Some(range(0, 100)));
        course.set_hydrates(false);
        assert_eq!(course.rest(), None);
    }

    #[test]
    fn a_rate_is_kept() {
        let rate = NonZeroU64::new(1000).unwrap();
        let mut pace = Pace::new(Hydrate::Rate(rate), Duration::ZERO);
        let (mut now, mut asked) = (Duration::ZERO, 0);
        while now < Duration::from_secs(10) {
            let pages = pace.allowed(now);
            asked += pages;
            pace.spend(PageCount::new(pages));
            now = now.max(pace.next_timeout().unwrap());
        }
        assert!((9_900..=10_000).contains(&asked), "{asked} pages in 10 s");
        assert_eq!(pace.allowed(Duration::from_secs(100)), 100);
    }
}
