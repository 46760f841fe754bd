//! Working sets: what this clone needs is noted, what its siblings needed is fetched before it asks.

use std::time::Duration;

use descriptor::working_set::Entry;
use descriptor::{FrameRange, Gfn, PageCount};

use super::prefetch::Ahead;
use super::{Hydrate, Pager};

/// Keeps the guest from running for a while, so that what its siblings needed is there when it begins.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeadStart {
    /// The longest that it is kept.
    limit: Duration,
    /// Until when; not known before the source is there.
    until: Option<Duration>,
    /// What siblings needed, or that nothing is known of it, was told.
    told: bool,
}

impl HeadStart {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, until: None, told: false }
    }

    /// The source is there.
    pub(super) fn source_up(&mut self, now: Duration) {
        self.until.get_or_insert(now + self.limit);
    }

    /// When it is over at the latest, as far as that is known.
    pub(super) fn until(&self) -> Option<Duration> {
        self.until
    }
}

impl Pager {
    /// Fetches `order` ahead of all else that nobody waits for: what siblings needed, in the order of need. An empty one says that
    /// nothing is known.
    pub fn follow(&mut self, order: Vec<FrameRange>) {
        if self.has_ended() {
            return;
        }
        let bounds = self.presence.memory().bounds();
        let within = |range: FrameRange| self.presence.outward(range.intersection(bounds));
        let order: Vec<FrameRange> = order.into_iter().map(within).filter(|range| !range.is_empty()).collect();
        self.course.follow(order);
        if let Some(head_start) = &mut self.head_start {
            head_start.told = true;
        }
    }

    /// What the guest needed and was not taken yet, in the order of first need, at most `limit` runs.
    pub fn take_touched(&mut self, limit: usize) -> Vec<FrameRange> {
        self.touched.as_mut().map_or_else(Vec::new, |touched| touched.take(limit))
    }

    /// True when there is something to [take](Pager::take_touched).
    pub fn has_touched(&self) -> bool {
        self.touched.as_ref().is_some_and(|touched| touched.order().len() > 0)
    }

    /// True when every page came because someone waited for it, by prefetch, or because it was told to [follow](Pager::follow)
    /// an order, and there was room to note it: what the guest needed besides, it has waited for. Never over huge pages, where a
    /// frame that was left out of the order comes with its neighbours.
    pub fn saw_every_need(&self) -> bool {
        let elsewhere = self.stats.hydrate_pages + self.stats.unasked_pages + self.stats.found_pages;
        let is_noted = self.touched.as_ref().is_some_and(|touched| !touched.is_full());
        let is_fine = self.presence.granule().get() <= Entry::BLOCK;
        elsewhere == 0 && is_noted && is_fine && self.pace.policy() == Hydrate::Off
    }

    /// Notes that the guest needs the cold frames of `granule`.
    pub(super) fn note_needed(&mut self, granule: FrameRange) {
        if let Some(touched) = &mut self.touched {
            self.presence.cold().runs_in(granule).for_each(|run| touched.note(run));
        }
    }

    /// Notes what a stream of faults used of what was fetched ahead of it.
    pub(super) fn note_used(&mut self) {
        let Some(used) = self.streams.take_used() else { return };
        // Streams run over the gaps between regions, too.
        let within = |run| self.presence.memory().runs_in(run);
        let runs: Vec<FrameRange> = self.runs_of(&used).flat_map(within).collect();
        if let Some(touched) = &mut self.touched {
            runs.into_iter().for_each(|run| touched.note(run));
        }
    }

    /// The frames of positions in streams of faults, as far as they are within the memory.
    pub(super) fn runs_of(&self, ahead: &Ahead) -> impl Iterator<Item = FrameRange> + use<> {
        let (size, bounds) = (self.presence.granule().get(), self.presence.memory().bounds());
        let Ahead { start, stride, count } = *ahead;
        let frames = move |position: i64, granules: u64| {
            let start = Gfn::checked(u64::try_from(position).ok()?.checked_mul(size)?)?;
            let range = FrameRange::checked(start, PageCount::new(granules * size))?.intersection(bounds);
            (!range.is_empty()).then_some(range)
        };
        let position = move |n: u64| start.checked_add(stride.checked_mul(n as i64)?);
        // Neighbours are one run.
        let together = match stride {
            1 => Some(frames(start, count)),
            -1 => Some(position(count - 1).and_then(|last| frames(last, count))),
            _ => None,
        };
        let apart = if together.is_some() { 0 } else { count };
        together.flatten().into_iter().chain((0..apart).filter_map(move |n| frames(position(n)?, 1)))
    }

    /// Lets the guest run as soon as what its siblings needed is there, or it was kept for long enough.
    pub(super) fn end_head_start(&mut self, now: Duration) {
        let Some(HeadStart { until, told, .. }) = self.head_start else { return };
        let is_over = until.is_some_and(|until| until <= now);
        if is_over || (told && !self.course.is_told() && !self.requests.has_order_under_way()) {
            self.head_start = None;
        }
    }
}
