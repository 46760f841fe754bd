//! The requests that the channel was asked for.

use std::collections::BTreeMap;
use std::time::Duration;

use descriptor::fetch::{Class, Tag};
use descriptor::{FrameRange, Gfn};

/// Requests under way in the channel at one time: as many as a pager has at most.
const MAX_TRACKED: usize = 256;

#[derive(Debug, Default)]
pub(super) struct Tracked {
    requests: BTreeMap<Tag, Request>,
}

#[derive(Debug)]
struct Request {
    class: Class,
    asked_at: Duration,
    deadline: Duration,
    /// From the first to the last frame, to pass by quickly.
    hull: FrameRange,
    rest: Vec<FrameRange>,
}

/// A request that is tracked no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) tag: Tag,
    pub(super) class: Class,
    pub(super) asked_at: Duration,
}

impl Tracked {
    pub(super) fn is_full(&self) -> bool {
        self.requests.len() >= MAX_TRACKED
    }

    pub(super) fn add(&mut self, now: Duration, tag: Tag, class: Class, ranges: &[FrameRange], deadline: Duration) {
        let start = ranges.iter().map(|range| range.start()).min().unwrap_or(Gfn::new(0));
        let end = ranges.iter().map(|range| range.end()).max().unwrap_or(start);
        let hull = FrameRange::between(start, end);
        self.requests.insert(tag, Request { class, asked_at: now, deadline, hull, rest: ranges.to_vec() });
    }

    /// Takes `frames` off every request; returns those of which nothing remains.
    pub(super) fn arrived(&mut self, frames: FrameRange) -> Vec<Done> {
        let touched = self.requests.values_mut().filter(|request| !request.hull.intersection(frames).is_empty());
        touched.for_each(|request| request.take(frames));
        let done = |(tag, request): (Tag, Request)| Done { tag, class: request.class, asked_at: request.asked_at };
        self.requests.extract_if(.., |_, request| request.rest.is_empty()).map(done).collect()
    }

    /// Lets every deadline be over.
    pub(super) fn hurry(&mut self, now: Duration) {
        for request in self.requests.values_mut() {
            (request.asked_at, request.deadline) = (now, now);
        }
    }

    /// Takes a request out whose deadline is over. Where not all was `drained`, its pages may have come and wait to be looked
    /// at; it is then given as much time again.
    pub(super) fn next_late(&mut self, now: Duration, drained: bool) -> Option<Done> {
        let is_late = |request: &Request| {
            let grace = if drained { Duration::ZERO } else { request.deadline.saturating_sub(request.asked_at) };
            request.deadline + grace <= now
        };
        let tag = self.requests.iter().find(|(_, request)| is_late(request)).map(|(tag, _)| *tag)?;
        let request = self.requests.remove(&tag)?;
        Some(Done { tag, class: request.class, asked_at: request.asked_at })
    }

    pub(super) fn next_deadline(&self) -> Option<Duration> {
        self.requests.values().map(|request| request.deadline).min()
    }
}

impl Request {
    fn take(&mut self, frames: FrameRange) {
        if !self.rest.iter().any(|range| !range.intersection(frames).is_empty()) {
            return;
        }
        let without = |range: FrameRange| {
            let before = FrameRange::between(range.start(), range.end().min(frames.start()).max(range.start()));
            let after = FrameRange::between(range.start().max(frames.end()).min(range.end()), range.end());
            [before, after].into_iter().filter(|part| !part.is_empty())
        };
        self.rest = std::mem::take(&mut self.rest).into_iter().flat_map(without).collect();
    }
}
