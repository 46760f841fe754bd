//! The port over Xen's memory paging: a domain whose memory is paged out, and whose faults come through a shared ring.
//!
//! ```text
//!   guest ──touches a paged-out frame──▶ Xen ──request, event──▶ ring ──Fault──▶ pager
//!         ◀───── its vCPU goes on ────── Xen ◀──response, event── ring ◀─resume── pager
//!                                        Xen ◀──prep with a page──────── install── pager
//! ```
//!
//! A clone is a domain that `xl restore -p` made from a *hole stream*: it has its devices and special pages, and no memory. The port
//! enables the ring, gives the domain its memory 2 MiB at a time and pages it out at once. From then on a page is
//! installed by `XENMEM_paging_op_prep`, with or without a fault, and only where the frame is still paged out; many go by one
//! multicall. A frame that is not paged out is the guest's own business: it was installed, or given up, or the guest put
//! memory of its own there. So nothing is ever overwritten.
//!
//! **Slots.** Every request is answered once, as that alone frees its slot ([`ring`]). Requests that stop no vCPU (a page that was
//! given up, an access by a backend or tool, which tries again by itself) are answered at once, whatever becomes of the page. A
//! request that stops a vCPU is answered when its page is there. A stopped vCPU asks for nothing else, so it takes one slot, seldom
//! two, and guests of some vCPUs never wait for one; a guest with many has up to eight faults under way at a time.
//!
//! **The end.** A domain that is destroyed is kept by the ring's page, which we map, so the port lets go as soon as the domain is
//! dying; [`XenGuest`](crate::guest::XenGuest) watches for that. Where the port dies, faulting vCPUs stay stopped until another
//! takes the domain over.

mod attach;
mod domain;
mod error;
mod figures;
mod prepare;
mod requests;
pub mod ring;
mod sys;
mod xenstore;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use descriptor::{Descriptor, FrameRange, FrameSet, Gfn, PAGE_SIZE, PageCount};
use rustix::io::Errno;

pub use domain::Domain;
pub use error::XenError;
pub use figures::{HandlerTime, XenFigures};
pub use xenstore::domain_by_name;

use self::attach::{Attached, Ring};
use self::figures::Counters;
use self::prepare::{Preparation, evict_again};
use self::requests::{Requests, Taken};
use self::ring::Request;
use self::sys::PREP_PAGES;
use super::{Event, FaultPort, Installed, PortError, PortFigures, PortTraits, Stop, Waiter};

/// How long a page may wait for memory of the host before that is a failure: other domains come and go.
const MEMORY_PATIENCE: Duration = Duration::from_secs(10);

/// How long vCPUs may take to leave the queue for a slot, once every request is answered: each has to be scheduled once.
const DETACH_PATIENCE: Duration = Duration::from_secs(5);

/// How long they may run between two tries.
const DETACH_PAUSE: Duration = Duration::from_millis(2);

/// A port over the paging ring of a domain.
pub struct XenPort {
    domain: Domain,
    ring: Ring,
    requests: Requests,
    results: Vec<Result<(), Errno>>,
    /// Since when the host has no memory for a page.
    starved: Option<Instant>,
    phase: Phase,
    counters: Counters,
    preparation: Preparation,
    _lock: OwnedFd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Serving,
    Closed,
}

impl XenPort {
    /// How many frames of zeros are worth installing for one fault: each takes memory of the host, and this many take together
    /// about as long as the one fault that they save at least.
    pub const ZERO_AROUND: PageCount = PageCount::new(16);

    /// Attaches to a domain that was restored from the hole stream of `descriptor` and is paused, and pages its memory out.
    /// Returns the frames that it has, too.
    ///
    /// # Errors
    /// When the domain cannot be served; the error says why. It has to be destroyed then, unless it is somebody else's.
    pub fn attach(domain: Domain, descriptor: &Descriptor) -> Result<(Self, FrameSet), XenError> {
        attach::attach(domain, descriptor).map(Self::new)
    }

    /// Takes a domain over whose pager died. It is paused then, also if it ran, and faults again on what it waited for.
    /// Returns the frames that it has, too.
    ///
    /// # Errors
    /// When the domain cannot be taken over; the error says why.
    pub fn take_over(domain: Domain, descriptor: &Descriptor) -> Result<(Self, FrameSet), XenError> {
        attach::take_over(domain, descriptor).map(Self::new)
    }

    fn new(attached: Attached) -> (Self, FrameSet) {
        let Attached { domain, ring, present, preparation, lock } = attached;
        let port = Self {
            domain,
            ring,
            requests: Requests::default(),
            results: Vec::new(),
            starved: None,
            phase: Phase::Serving,
            counters: Counters::new(),
            preparation,
            _lock: lock,
        };
        (port, present)
    }

    /// What it tells of itself.
    pub fn figures(&self) -> XenFigures {
        self.counters.figures(self.domain.id(), &self.preparation)
    }

    /// Takes one request; true when it was answered.
    fn take(&mut self, request: Request, busy: Duration, events: &mut Vec<Event>) -> Result<bool, XenError> {
        if request.is_evict_failure() {
            self.evict_anew(request.gfn)?;
        }
        let Taken { event, answer } = self.requests.take(request, busy, &mut self.counters);
        events.push(event);
        if answer {
            self.answer(&request)?;
        }
        Ok(answer)
    }

    /// Pages a frame out that was in use on its way out. It may have memory without contents, which nobody must see.
    fn evict_anew(&mut self, gfn: Gfn) -> Result<(), XenError> {
        self.domain.pause()?;
        let evicted = evict_again(&mut self.domain, gfn, Errno::BUSY);
        self.domain.unpause()?;
        evicted
    }

    fn answer(&mut self, request: &Request) -> Result<(), XenError> {
        let Ring { page, back, .. } = &mut self.ring;
        back.answer(page, request).map_err(|source| XenError::Ring { domain: self.domain.id(), source })
    }

    fn notify(&mut self) -> Result<(), XenError> {
        self.ring.channel.notify().map_err(|source| self.domain.failed("notifying Xen", source))
    }

    fn drain(&mut self, events: &mut Vec<Event>) -> Result<(), XenError> {
        let domain = self.domain.id();
        self.ring.channel.acknowledge().map_err(|source| self.domain.failed("reading /dev/xen/evtchn", source))?;
        let mut answered = false;
        let mut began = Instant::now();
        while let Some(request) =
            self.ring.back.next_request(&self.ring.page).map_err(|source| XenError::Ring { domain, source })?
        {
            answered |= self.take(request, began.elapsed(), events)?;
            began = Instant::now();
        }
        if answered { self.notify() } else { Ok(()) }
    }

    /// Fills frames from `start` on, `count` at most as many as go at once, and tells how far it came.
    fn fill(&mut self, start: Gfn, count: usize, pages: Option<&[u8]>) -> Result<Installed, XenError> {
        let began = Instant::now();
        let mut results = std::mem::take(&mut self.results);
        let filled = match pages {
            Some(pages) => self.domain.fill(start, pages, &mut results),
            None => self.domain.fill_zeros(start, count, &mut results),
        };
        let installed = filled.and_then(|()| self.judge(start, &results));
        self.results = results;
        let installed = installed?;
        self.requests.filled(FrameRange::new(start, installed.count), began.elapsed());
        Ok(installed)
    }

    /// What became of frames from `start` on. A frame that is not paged out counts as done: it was, or is the guest's own.
    fn judge(&mut self, start: Gfn, results: &[Result<(), Errno>]) -> Result<Installed, XenError> {
        let bad = results.iter().enumerate().find_map(|(index, result)| match result {
            Ok(()) | Err(Errno::NOENT) => None,
            Err(error) => Some((index as u64, *error)),
        });
        let Some((index, error)) = bad else {
            self.starved = None;
            let found = results.first().is_some_and(Result::is_err) && results.len() == 1;
            let (count, stopped) = if found { (0, Some(Stop::AlreadyPresent)) } else { (results.len() as u64, None) };
            return Ok(Installed { count: PageCount::new(count), stopped });
        };
        let busy = Installed { count: PageCount::new(index), stopped: Some(Stop::Busy) };
        if error != Errno::NOMEM {
            return Err(self.domain.failed("XENMEM_paging_op_prep", error.into()));
        }
        let since = *self.starved.get_or_insert_with(Instant::now);
        if since.elapsed() < MEMORY_PATIENCE {
            return Ok(busy);
        }
        let gfn = Gfn::containing((start.index() + index) * PAGE_SIZE);
        Err(XenError::NoMemory { domain: self.domain.id(), gfn })
    }

    /// Installs frame by frame batch, stopping where events are to be read first.
    fn install_batches(&mut self, range: FrameRange, pages: Option<&[u8]>) -> Result<Installed, PortError> {
        let mut done = PageCount::ZERO;
        for batch in range.chunks(PageCount::new(PREP_PAGES as u64)) {
            let bytes = pages.map(|pages| {
                let from = (batch.start() - range.start()).bytes() as usize;
                &pages[from..from + batch.count().bytes() as usize]
            });
            let installed = match self.fill(batch.start(), batch.count().get() as usize, bytes) {
                Ok(installed) => installed,
                Err(error) => {
                    self.close_if_gone(error)?;
                    return Ok(Installed { count: done, stopped: Some(Stop::Busy) });
                }
            };
            done += installed.count;
            if installed.stopped.is_some() {
                return Ok(Installed { count: done, ..installed });
            }
            if done < range.count() && self.ring.back.has_requests(&self.ring.page) {
                return Ok(Installed { count: done, stopped: Some(Stop::Busy) });
            }
        }
        Ok(Installed { count: done, stopped: None })
    }

    /// Closes where the reason of an error is that the domain is gone.
    fn close_if_gone(&mut self, error: XenError) -> Result<(), PortError> {
        if matches!(error, XenError::Gone { .. }) || self.domain.is_gone() {
            self.phase = Phase::Closed;
            return Ok(());
        }
        Err(error.into())
    }

    fn let_go(&mut self, gfn: Gfn, waiter: Waiter) -> Result<(), XenError> {
        let began = Instant::now();
        let Some((requests, busy)) = self.requests.resume(gfn, waiter, &mut self.counters) else { return Ok(()) };
        for request in &requests {
            self.answer(request)?;
        }
        self.notify()?;
        self.counters.handled(busy + began.elapsed());
        Ok(())
    }

    /// Takes the ring away from a domain that has every page. It must not fault meanwhile, so it stands still; but vCPUs that queue
    /// for a slot of the ring have to run to leave it.
    fn detach(&mut self) -> Result<(), XenError> {
        let deadline = Instant::now() + DETACH_PATIENCE;
        loop {
            self.domain.pause()?;
            let detached = self.detach_paused();
            self.domain.unpause()?;
            match detached {
                Err(XenError::Queued { .. }) if Instant::now() < deadline => std::thread::sleep(DETACH_PAUSE),
                detached => return detached,
            }
        }
    }

    fn detach_paused(&mut self) -> Result<(), XenError> {
        // What was asked for before the last page came is there now.
        self.drain(&mut Vec::new())?;
        for request in self.requests.take_all() {
            self.answer(&request)?;
        }
        self.notify()?;
        self.domain.disable_paging()
    }
}

impl FaultPort for XenPort {
    fn fd(&self) -> BorrowedFd<'_> {
        self.ring.channel.fd()
    }

    fn traits(&self) -> PortTraits {
        PortTraits { granule: PageCount::ONE, needs_zeros: true }
    }

    fn read_events(&mut self, events: &mut Vec<Event>) -> Result<(), PortError> {
        if self.phase == Phase::Serving
            && let Err(error) = self.drain(events)
        {
            self.close_if_gone(error)?;
        }
        if self.phase == Phase::Closed {
            events.push(Event::Closed);
        }
        Ok(())
    }

    fn install(&mut self, start: Gfn, pages: &[u8]) -> Result<Installed, PortError> {
        let range = FrameRange::new(start, PageCount::new(pages.len() as u64 / PAGE_SIZE));
        self.install_batches(range, Some(pages))
    }

    /// One batch of them: each costs as much as a page with contents, and whoever asks comes back for the rest.
    fn install_zeros(&mut self, range: FrameRange) -> Result<Installed, PortError> {
        let (batch, _) = range.split_at(PageCount::new(PREP_PAGES as u64));
        self.install_batches(batch, None)
    }

    fn resume(&mut self, gfn: Gfn, waiter: Waiter) -> Result<(), PortError> {
        if self.phase == Phase::Closed {
            return Ok(());
        }
        match self.let_go(gfn, waiter) {
            Ok(()) => Ok(()),
            Err(error) => self.close_if_gone(error),
        }
    }

    fn complete(&mut self) -> Result<(), PortError> {
        if let Err(error) = self.detach() {
            self.close_if_gone(error)?;
        }
        self.phase = Phase::Closed;
        Ok(())
    }

    fn figures(&self) -> Option<PortFigures> {
        Some(PortFigures::Xen(XenPort::figures(self)))
    }
}
