//! Which requests wait for their answer: the policy of the port, without Xen.

use std::time::Duration;

use descriptor::{FrameRange, Gfn};

use super::figures::Counters;
use super::ring::Request;
use crate::port::{Event, Waiter};

/// Who waits for a page without being stopped: another domain, which tries again by itself. No guest has as many vCPUs.
const FOREIGN: Waiter = Waiter(u32::MAX);

/// The requests that were read and not answered: those whose vCPU is stopped until its page is there.
#[derive(Debug, Default)]
pub(super) struct Requests {
    held: Vec<Held>,
}

#[derive(Debug)]
struct Held {
    request: Request,
    /// How long it has kept us busy.
    busy: Duration,
    /// Its frame was filled since.
    filled: bool,
}

/// What follows from a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Taken {
    /// To be told to the pager.
    pub(super) event: Event,
    /// It is to be answered at once.
    pub(super) answer: bool,
}

impl Requests {
    /// Takes a request that was read in the time `busy`.
    pub(super) fn take(&mut self, request: Request, busy: Duration, counters: &mut Counters) -> Taken {
        let gfn = request.gfn;
        counters.requests += 1;
        counters.evict_failures += u64::from(request.is_evict_failure());
        let fault = |waiter| Event::Fault { gfn, waiter, write: false };
        if request.is_paused() && !request.is_drop() {
            counters.duplicates += u64::from(self.held.iter().any(|held| held.request.gfn == gfn));
            self.held.push(Held { request, busy, filled: false });
            return Taken { event: fault(Waiter(request.vcpu)), answer: false };
        }
        let event = if request.is_drop() {
            counters.dropped += 1;
            Event::Discard { range: FrameRange::single(gfn) }
        } else {
            counters.foreign += 1;
            fault(FOREIGN)
        };
        Taken { event, answer: true }
    }

    /// Notes that the frames of `range` were filled, which took `took`.
    pub(super) fn filled(&mut self, range: FrameRange, took: Duration) {
        for held in self.held.iter_mut().filter(|held| range.contains(held.request.gfn)) {
            held.busy += took;
            held.filled = true;
        }
    }

    /// What is to be answered so that `waiter` goes on, and how long that has kept us busy. A vCPU may have asked more than
    /// once: Xen stops it when it next leaves Xen, and on its way out it may look at the frame again, each time stopped once more.
    pub(super) fn resume(
        &mut self,
        gfn: Gfn,
        waiter: Waiter,
        counters: &mut Counters,
    ) -> Option<(Vec<Request>, Duration)> {
        let asked = |held: &mut Held| held.request.gfn == gfn && held.request.vcpu == waiter.0;
        let answered: Vec<Held> = self.held.extract_if(.., asked).collect();
        let first = answered.first()?;
        counters.duplicates += u64::from(!first.filled);
        let busy = first.busy;
        Some((answered.into_iter().map(|held| held.request).collect(), busy))
    }

    /// True when everything is answered.
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::xen::ring::{FLAG_FOREIGN, FLAG_VCPU_PAUSED};

    const BUSY: Duration = Duration::from_micros(10);

    fn request(vcpu: u32, flags: u32, gfn: u64, paging: u32) -> Request {
        Request::new(vcpu, flags, Gfn::new(gfn), paging)
    }

    #[test]
    fn a_stopped_vcpu_is_answered_when_its_page_is_there() {
        let (mut requests, mut counters) = (Requests::default(), Counters::new());
        let asked = request(2, FLAG_VCPU_PAUSED, 7, 0);
        let fault = Event::Fault { gfn: Gfn::new(7), waiter: Waiter(2), write: false };
        assert_eq!(requests.take(asked, BUSY, &mut counters), Taken { event: fault, answer: false });
        requests.filled(FrameRange::single(Gfn::new(8)), BUSY);
        requests.filled(FrameRange::single(Gfn::new(7)), BUSY);
        for (gfn, vcpu) in [(8, 2), (7, 1)] {
            assert_eq!(requests.resume(Gfn::new(gfn), Waiter(vcpu), &mut counters), None);
        }
        assert_eq!(requests.resume(Gfn::new(7), Waiter(2), &mut counters), Some((vec![asked], 2 * BUSY)));
        assert_eq!(requests.resume(Gfn::new(7), Waiter(2), &mut counters), None);
        assert_eq!((counters.requests, counters.duplicates), (1, 0));
    }

    #[test]
    fn a_vcpu_that_asked_twice_is_answered_twice() {
        let (mut requests, mut counters) = (Requests::default(), Counters::new());
        let asked = request(0, FLAG_VCPU_PAUSED, 7, 0);
        let other = request(1, FLAG_VCPU_PAUSED, 7, 0);
        for request in [asked, other, asked] {
            requests.take(request, BUSY, &mut counters);
        }
        requests.filled(FrameRange::single(Gfn::new(7)), BUSY);
        let (answered, _) = requests.resume(Gfn::new(7), Waiter(0), &mut counters).unwrap();
        assert_eq!(answered, [asked, asked]);
        assert!(!requests.is_empty());
        assert_eq!(requests.resume(Gfn::new(7), Waiter(1), &mut counters).unwrap().0, [other]);
        assert!(requests.is_empty());
        assert_eq!(counters.duplicates, 2);
    }

    #[test]
    fn who_is_not_stopped_is_answered_at_once() {
        let (mut requests, mut counters) = (Requests::default(), Counters::new());
        let fault = Event::Fault { gfn: Gfn::new(7), waiter: FOREIGN, write: false };
        let foreign = requests.take(request(3, FLAG_FOREIGN, 7, 0), BUSY, &mut counters);
        assert_eq!(foreign, Taken { event: fault, answer: true });
        let discard = Event::Discard { range: FrameRange::single(Gfn::new(7)) };
        // Xen never stops a vCPU that gives a page up; if it did, the vCPU would go on.
        for flags in [0, FLAG_VCPU_PAUSED] {
            let dropped = requests.take(request(0, flags, 7, 1), BUSY, &mut counters);
            assert_eq!(dropped, Taken { event: discard, answer: true });
        }
        assert_eq!(requests.resume(Gfn::new(7), FOREIGN, &mut counters), None);
        assert!(requests.is_empty());
        assert_eq!((counters.foreign, counters.dropped), (1, 2));
    }
}
