//! Pages that come without having been asked for, as over multicast: pushed ones, and answers to the requests of others.

use std::time::Duration;

use descriptor::fetch::Tag;
use descriptor::{FrameRange, Gfn, PageCount};

use super::Pager;
use super::background::MAX_STAGED;
use super::config::Hydrate;

/// Staging buffers that pushed pages may take: half of all. Granules that the push leaves incomplete are asked for in the
/// end, which needs some of the other half.
const MAX_PUSHED: usize = MAX_STAGED / 2;

impl Pager {
    /// The parts of the image, `chunk` frames each, of which the clone has not all that it wants in the background: their
    /// numbers in ascending order. None unless everything is to be fetched as fast as possible, as a push keeps to no other
    /// rate.
    ///
    /// # Panics
    /// When chunks have no frames.
    pub fn lacks(&self, chunk: PageCount) -> impl Iterator<Item = u64> + '_ {
        assert!(!chunk.is_zero(), "chunks of no frames");
        let cold = self.presence.cold();
        let mut from = self.wants_push().then_some(Gfn::new(0));
        std::iter::from_fn(move || {
            loop {
                let first = cold.first_member_from(from?)?;
                let number = first.index() / chunk.get();
                let frames = FrameRange::new(Gfn::new(number * chunk.get()), chunk);
                from = Some(frames.end());
                if self.missing_in(frames).next().is_some() {
                    return Some(number);
                }
            }
        })
    }

    /// The pages that the clone wants in the background and has not, see [`Pager::lacks`].
    pub fn lacking(&self) -> PageCount {
        if self.wants_push() { self.presence.cold().count() } else { PageCount::ZERO }
    }

    /// The frames of request `tag` that the clone has not got, whichever way they were to come; none when the request was
    /// answered, or given up for a later one.
    pub fn owed(&self, tag: Tag) -> Vec<FrameRange> {
        self.requests.owed(tag)
    }

    /// Notes that all pages of request `tag` came in another way than as its answer, so that there will be none. How long
    /// that took says nothing of how long answers take.
    pub fn came(&mut self, now: Duration, tag: Tag) {
        self.requests.unmeasured(tag);
        self.answered(now, tag);
    }

    /// Notes that request `tag`, which was to be answered in another way, was now put to the source.
    pub fn redirected(&mut self, now: Duration, tag: Tag) {
        self.requests.unmeasured(tag);
        self.requests.renew(now, tag);
    }

    /// True when pages of `granule`, in parts and not asked for, are worth a staging buffer.
    pub(super) fn takes_pushed(&self, piece: FrameRange) -> bool {
        let granule = self.presence.granule_of(piece.start());
        self.pushed && (self.staging.any_in(granule) || self.staging.len() < MAX_PUSHED)
    }

    fn wants_push(&self) -> bool {
        self.pace.policy() == Hydrate::Now && !self.has_ended()
    }
}
