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

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use descriptor::{Descriptor, FrameRange, FrameSet, Gfn, PAGE_SIZE, PageCount};
use rustix::io::Errno;

pub use attach::{AttachError, Left};
pub use domain::Domain;
pub use error::XenError;
pub use figures::{HandlerTime, XenFigures};
pub use xenstore::domain_by_name;

use self::attach::{Attached, Ring};
use self::figures::Counters;
use self::prepare::Preparation;
use self::requests::{Requests, Taken};
use self::ring::{Request, SLOTS};
use self::sys::PREP_PAGES;
use super::{Event, FaultPort, Installed, PortError, PortFigures, PortTraits, Stop, Waiter};

/// How long a page may wait for memory of the host before that is a failure: other domains come and go.
const MEMORY_PATIENCE: Duration = Duration::from_secs(10);

/// How long it may take until nobody uses the ring of a complete domain any more.
const DETACH_PATIENCE: Duration = Duration::from_secs(10);

/// For how long nothing must have come on the ring before it is taken away: any vCPU that was let go has run by then.
const QUIET: Duration = Duration::from_millis(20);

/// The same where vCPUs may have queued for slots, which they leave only when they run.
const QUIET_MANY: Duration = Duration::from_millis(500);

/// A port over the paging ring of a domain.
pub struct XenPort {
    domain: Domain,
    ring: Ring,
    requests: Requests,
    /// What happened before anyone asked.
    early: Vec<Event>,
    results: Vec<Result<(), Errno>>,
    /// Since when the host has no memory for a page.
    starved: Option<Instant>,
    phase: Phase,
    /// For how long nothing must have come on the ring before it is taken away.
    quiet: Duration,
    counters: Counters,
    preparation: Preparation,
    _lock: File,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Serving,
    Leaving(Leaving),
    Closed,
}

/// A domain that has every page, and still its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Leaving {
    since: Instant,
    /// Since when nothing came on the ring.
    quiet: Instant,
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
    pub fn attach(domain: Domain, descriptor: &Descriptor) -> Result<(Self, FrameSet), AttachError> {
        attach::attach(domain, descriptor).and_then(|attached| Self::new(attached, Left::Unfinished))
    }

    /// Takes a domain over whose pager died. It is paused then, also if it ran, and faults again on what it waited for.
    /// Returns the frames that it has, too.
    ///
    /// # Errors
    /// When the domain cannot be taken over; the error says why.
    pub fn take_over(domain: Domain, descriptor: &Descriptor) -> Result<(Self, FrameSet), AttachError> {
        attach::take_over(domain, descriptor).and_then(|attached| Self::new(attached, Left::Paused))
    }

    fn new(attached: Attached, left: Left) -> Result<(Self, FrameSet), AttachError> {
        let Attached { domain, ring, present, vcpus, preparation, lock } = attached;
        let mut port = Self {
            domain,
            ring,
            early: Vec::new(),
            requests: Requests::default(),
            results: Vec::new(),
            starved: None,
            phase: Phase::Serving,
            quiet: if vcpus >= SLOTS { QUIET_MANY } else { QUIET },
            counters: Counters::new(),
            preparation,
            _lock: lock,
        };
        // Other domains may have looked at frames that were on their way out. Before anything is filled all of these are paged out,
        // and faults as any other.
        let mut early = Vec::new();
        port.drain(&mut early).map_err(|error| AttachError { error, left })?;
        port.early = early;
        Ok((port, present))
    }

    /// What it tells of itself.
    pub fn figures(&self) -> XenFigures {
        self.counters.figures(self.domain.id(), &self.preparation)
    }

    /// Takes one request; true when it was answered.
    fn take(&mut self, request: Request, busy: Duration, events: &mut Vec<Event>) -> Result<bool, XenError> {
        let Taken { event, answer } = self.requests.take(request, busy, &mut self.counters);
        events.push(event);
        if answer {
            self.answer(&request)?;
        }
        Ok(answer)
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
        if index > 0 {
            self.starved = None;
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

    /// Takes the ring away from a domain that has every page, once nobody uses it any more; true when that is done.
    ///
    /// vCPUs that queue within Xen for a slot have to run to leave the queue, and Xen frees the ring also under one that is about
    /// to: so the domain is paused only when nothing has come for a while, and not before.
    fn detach(&mut self, leaving: Leaving) -> Result<bool, XenError> {
        if !self.requests.is_empty() || leaving.quiet.elapsed() < self.quiet {
            return Ok(false);
        }
        self.domain.pause()?;
        let detached = if self.ring.back.has_requests(&self.ring.page) {
            Ok(false)
        } else {
            match self.domain.disable_paging() {
                Ok(()) => Ok(true),
                Err(XenError::Queued { .. }) => Ok(false),
                Err(error) => Err(error),
            }
        };
        self.domain.unpause()?;
        detached
    }

    /// One step of the way out. The guest is complete: whatever goes wrong here does not hurt it.
    fn leave(&mut self, leaving: Leaving, came: bool) {
        let leaving = if came { Leaving { quiet: Instant::now(), ..leaving } } else { leaving };
        self.phase = match self.detach(leaving) {
            Ok(true) => Phase::Closed,
            Ok(false) if leaving.since.elapsed() < DETACH_PATIENCE => Phase::Leaving(leaving),
            Ok(false) => {
                tracing::warn!(
                    domain = self.domain.id(),
                    "its paging ring stays enabled, without a use: it is in use still"
                );
                Phase::Closed
            }
            Err(XenError::Gone { .. }) => Phase::Closed,
            Err(error) => {
                tracing::warn!("the paging ring stays enabled, without a use: {}", descriptor::Report(&error));
                Phase::Closed
            }
        };
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
        events.append(&mut self.early);
        let before = events.len();
        if self.phase != Phase::Closed
            && let Err(error) = self.drain(events)
        {
            self.close_if_gone(error)?;
        }
        if let Phase::Leaving(leaving) = self.phase {
            self.leave(leaving, events.len() > before);
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
        let now = Instant::now();
        self.phase = Phase::Leaving(Leaving { since: now, quiet: now });
        Ok(())
    }

    fn figures(&self) -> Option<PortFigures> {
        Some(PortFigures::Xen(XenPort::figures(self)))
    }
}
