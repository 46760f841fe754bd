//! Who waits for which page.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use descriptor::{FrameRange, Gfn};

use super::latency::{Kind, Latency};
use super::message::Failure;
use crate::port::Waiter;

/// Waiters at one time. A waiter is a stopped thread or vCPU, of which the largest guests have some hundreds.
const MAX_WAITERS: usize = 1 << 16;

/// The waiters of every granule that is not there, by the granule's first frame.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    granules: BTreeMap<Gfn, Wait>,
    waiters: usize,
    resumable: VecDeque<(Gfn, Waiter)>,
}

#[derive(Debug)]
struct Wait {
    since: Duration,
    kind: Kind,
    waiters: Vec<(Gfn, Waiter)>,
}

impl Waiting {
    /// True when someone waits for the granule that begins at `granule`.
    pub(super) fn is_waited_for(&self, granule: Gfn) -> bool {
        self.granules.contains_key(&granule)
    }

    /// True when nobody waits and nobody is to be resumed.
    pub(super) fn is_empty(&self) -> bool {
        self.granules.is_empty() && self.resumable.is_empty()
    }

    /// Notes that `waiter` waits for `gfn` in the granule that begins at `granule`.
    pub(super) fn add(
        &mut self,
        now: Duration,
        granule: Gfn,
        gfn: Gfn,
        waiter: Waiter,
        kind: Kind,
    ) -> Result<(), Failure> {
        let wait = self.granules.entry(granule).or_insert_with(|| Wait { since: now, kind, waiters: Vec::new() });
        if wait.waiters.contains(&(gfn, waiter)) {
            return Ok(());
        }
        wait.waiters.push((gfn, waiter));
        self.waiters += 1;
        if self.waiters > MAX_WAITERS { Err(Failure::TooManyWaiters(MAX_WAITERS)) } else { Ok(()) }
    }

    /// Notes that the page is got in another way than when the waiter came.
    pub(super) fn reclassify(&mut self, granule: Gfn, kind: Kind) {
        if let Some(wait) = self.granules.get_mut(&granule) {
            wait.kind = kind;
        }
    }

    /// Lets `waiter` go on at once.
    pub(super) fn resume(&mut self, gfn: Gfn, waiter: Waiter) {
        if !self.resumable.contains(&(gfn, waiter)) {
            self.resumable.push_back((gfn, waiter));
        }
    }

    /// Lets everyone go on who waits for a granule in `range`.
    pub(super) fn installed(&mut self, now: Duration, range: FrameRange, latency: &mut Latency) {
        while let Some((&granule, _)) = self.granules.range(range.start()..range.end()).next() {
            let Some(wait) = self.granules.remove(&granule) else {
                return;
            };
            latency.record(wait.kind, now.saturating_sub(wait.since));
            self.waiters -= wait.waiters.len();
            self.resumable.extend(wait.waiters);
        }
    }

    /// The granules in `range` that someone waits for.
    pub(super) fn in_range(&self, range: FrameRange) -> impl Iterator<Item = Gfn> + '_ {
        self.granules.range(range.start()..range.end()).map(|(granule, _)| *granule)
    }

    pub(super) fn next_resumable(&mut self) -> Option<(Gfn, Waiter)> {
        self.resumable.pop_front()
    }
}
