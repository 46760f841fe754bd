//! The port over userfaultfd: a guest whose memory is a mapping of some process of this machine.
//!
//! The kernel stops a thread that touches a missing page of a registered range and tells the port. UFFDIO_COPY puts a page
//! there and wakes the thread; it never replaces a page that is there already (EEXIST).
//!
//! **Discards.** MADV_DONTNEED reports a REMOVE event *before* the kernel takes the pages away, and until it is read every
//! installation answers EAGAIN. The kernel hands out faults before events, so a fault may be read before the discard that
//! caused it. [`UffdPort::read_events`] therefore drains the descriptor and reports discards first. Between the event and
//! the removal a page may still be seen as present; when it goes and is touched again, a fault is reported for a page that
//! the pager believes to be there. [`UffdPort::resume`] answers it with zeros, which is what such a page holds.

mod open;
mod regions;
mod sys;

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use descriptor::memory::PageSize;
use descriptor::{FrameRange, Gfn, PAGE_SIZE, PageCount};
use rustix::io::Errno;
use zerocopy::FromBytes;

pub use open::{OpenError, Userfaultfd};
pub use regions::{HostRegion, HostRegions, HostRegionsError};

use super::{Event, FaultPort, Installed, PortError, PortFigures, PortTraits, Stop, Waiter};

/// Messages read at once; a read of fewer means that the descriptor is drained.
const BATCH: usize = 128;

/// Messages taken in one call of [`UffdPort::read_events`], so that a storm of discards cannot keep the caller for ever.
const MAX_EVENTS: usize = 16 * BATCH;

const MESSAGE: usize = size_of::<sys::RawMessage>();
const HUGE: usize = 2 << 20;

/// A port over a userfaultfd.
pub struct UffdPort {
    fd: OwnedFd,
    regions: HostRegions,
    buffer: Box<[u8; BATCH * MESSAGE]>,
    faults: Vec<Event>,
    /// Frames with a reported fault that no installation has covered since.
    unanswered: HashSet<Gfn>,
    zeros: Vec<u8>,
    phase: Phase,
}

/// How far a port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Serving,
    /// Its ranges are unregistered, so that nobody waits for a page; but threads may still wait for their discards to be read.
    Draining,
    Closed,
}

impl UffdPort {
    /// A port over a non-blocking userfaultfd, this process's own or one that was handed over, whose `regions` are registered
    /// for missing pages.
    pub fn new(fd: OwnedFd, regions: HostRegions) -> Self {
        let buffer = Box::new([0; BATCH * MESSAGE]);
        Self { fd, regions, buffer, faults: vec![], unanswered: HashSet::new(), zeros: vec![], phase: Phase::Serving }
    }

    /// The regions that it serves.
    pub fn regions(&self) -> &HostRegions {
        &self.regions
    }

    /// Sorts one message: faults are kept for later, discards go to `events` at once.
    fn take(&mut self, message: &sys::RawMessage, events: &mut Vec<Event>) -> Result<(), PortError> {
        let [first, second, third] = message.arguments;
        match message.event {
            sys::EVENT_PAGEFAULT => {
                let (flags, address) = (first, second);
                let gfn = self.regions.frame_at(address).ok_or_else(|| {
                    broken(format!("a fault at address {address:#x}, which is in none of the guest's regions"))
                })?;
                self.unanswered.insert(gfn);
                let write = flags & sys::PAGEFAULT_FLAG_WRITE != 0;
                self.faults.push(Event::Fault { gfn, waiter: Waiter(0), write });
            }
            // An unmapped range faults no more; to the pager that is the same as given up.
            sys::EVENT_REMOVE | sys::EVENT_UNMAP => {
                events.extend(self.regions.frames_in(first, second).map(|range| Event::Discard { range }));
            }
            sys::EVENT_REMAP => {
                return Err(broken(format!(
                    "guest memory was moved from {first:#x} to {second:#x} ({third} bytes) under its pager"
                )));
            }
            sys::EVENT_FORK => {
                drop(sys::adopt(first & u64::from(u32::MAX)));
                return Err(broken("the process forked with its guest memory, which no pager can serve twice".into()));
            }
            unknown => return Err(broken(format!("an event of unknown kind {unknown:#x}"))),
        }
        Ok(())
    }

    /// Runs `step` over the parts of `range` that lie in one region each until one does not complete. `step` gets the part,
    /// its region and its address, and returns the bytes installed, at least a page.
    fn install_parts(
        &mut self,
        range: FrameRange,
        operation: &'static str,
        mut step: impl FnMut(&Self, FrameRange, HostRegion, u64) -> Result<usize, Errno>,
    ) -> Result<Installed, PortError> {
        if self.phase == Phase::Draining {
            return Ok(Installed { count: range.count(), stopped: None });
        }
        let mut rest = range;
        let mut stopped = None;
        while !rest.is_empty() && stopped.is_none() {
            let (part, region, address) = self.regions.locate(rest).ok_or_else(|| {
                broken(format!("frames {rest} are in none of the guest's regions, though its descriptor has them"))
            })?;
            match step(self, part, region, address) {
                Ok(bytes) => rest = rest.split_at(PageCount::new(bytes as u64 / PAGE_SIZE)).1,
                Err(Errno::EXIST) => {
                    self.wake(address, region.page_size.frames().bytes())?;
                    self.answered(FrameRange::new(part.start(), region.page_size.frames()));
                    stopped = Some(Stop::AlreadyPresent);
                }
                Err(Errno::AGAIN) => stopped = Some(Stop::Busy),
                Err(error) if is_gone(error) => {
                    self.phase = Phase::Closed;
                    stopped = Some(Stop::Busy);
                }
                Err(error) => return Err(failed(operation, part, address, error)),
            }
        }
        let done = FrameRange::between(range.start(), rest.start());
        self.answered(done);
        Ok(Installed { count: done.count(), stopped })
    }

    /// True when no thread waits for its discard to be read, or is about to: then the kernel looks for the page of an
    /// installation, and finds it unregistered.
    fn is_quiet(&self) -> bool {
        let pages = self.regions.granule().bytes();
        self.regions
            .regions()
            .first()
            .is_none_or(|region| sys::zero(self.fd.as_fd(), region.address, pages) != Err(Errno::AGAIN))
    }

    /// Forgets the reported faults of `range`: its pages are there, and their waiters awake.
    fn answered(&mut self, range: FrameRange) {
        if self.unanswered.len() as u64 > range.count().get() {
            for gfn in range.frames() {
                self.unanswered.remove(&gfn);
            }
        } else {
            self.unanswered.retain(|gfn| !range.contains(*gfn));
        }
    }

    /// Wakes whoever waits for a page of the `length` bytes at `address`: it may have been queued after the page came.
    fn wake(&self, address: u64, length: u64) -> Result<(), PortError> {
        match sys::wake(self.fd.as_fd(), address, length) {
            Ok(()) => Ok(()),
            Err(error) if is_gone(error) => Ok(()),
            Err(error) => Err(failed("UFFDIO_WAKE", FrameRange::single(Gfn::containing(0)), address, error)),
        }
    }

    /// Zeros for one installation: what is asked for, at most 2 MiB.
    fn take_zeros(&mut self, range: FrameRange) -> Vec<u8> {
        let wanted = usize::try_from(range.count().bytes()).unwrap_or(HUGE).min(HUGE);
        let mut zeros = std::mem::take(&mut self.zeros);
        if zeros.len() < wanted {
            zeros.resize(wanted, 0);
        }
        zeros
    }
}

impl FaultPort for UffdPort {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn traits(&self) -> PortTraits {
        PortTraits { granule: self.regions.granule(), needs_zeros: false }
    }

    fn read_events(&mut self, events: &mut Vec<Event>) -> Result<(), PortError> {
        if self.phase == Phase::Closed {
            events.push(Event::Closed);
            return Ok(());
        }
        let mut taken = 0;
        while taken < MAX_EVENTS {
            let length = match rustix::io::read(&self.fd, &mut self.buffer[..]) {
                Ok(0) | Err(Errno::AGAIN) => break,
                Ok(length) => length,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(failed_whole("reading events", error)),
            };
            let (messages, _) = self.buffer.as_chunks::<MESSAGE>();
            let messages: Vec<sys::RawMessage> = messages[..length / MESSAGE]
                .iter()
                .filter_map(|message| sys::RawMessage::read_from_bytes(message).ok())
                .collect();
            for message in &messages {
                self.take(message, events)?;
            }
            taken += messages.len();
            if messages.len() < BATCH {
                break;
            }
        }
        if self.phase == Phase::Draining {
            self.faults.clear();
            events.clear();
            if self.is_quiet() {
                self.phase = Phase::Closed;
                events.push(Event::Closed);
            }
        }
        events.append(&mut self.faults);
        Ok(())
    }

    fn install(&mut self, start: Gfn, pages: &[u8]) -> Result<Installed, PortError> {
        let range = FrameRange::new(start, PageCount::new(pages.len() as u64 / PAGE_SIZE));
        self.install_parts(range, "UFFDIO_COPY", |port, part, _, address| {
            let from = (part.start() - start).bytes() as usize;
            let bytes = &pages[from..from + part.count().bytes() as usize];
            sys::copy(port.fd.as_fd(), address, bytes)
        })
    }

    fn install_zeros(&mut self, range: FrameRange) -> Result<Installed, PortError> {
        let copy = self.regions.granule() > PageCount::ONE;
        let zeros = if copy { self.take_zeros(range) } else { vec![] };
        let installed = self.install_parts(range, "UFFDIO_ZEROPAGE", |port, part, region, address| {
            let length = part.count().bytes();
            match region.page_size {
                PageSize::Base => sys::zero(port.fd.as_fd(), address, length),
                PageSize::Huge => {
                    let length = usize::try_from(length).unwrap_or(usize::MAX).min(zeros.len());
                    sys::copy(port.fd.as_fd(), address, &zeros[..length])
                }
            }
        });
        self.zeros = zeros;
        installed
    }

    fn resume(&mut self, gfn: Gfn, _waiter: Waiter) -> Result<(), PortError> {
        if !self.unanswered.contains(&gfn) {
            return Ok(());
        }
        let Some((_, region, _)) = self.regions.locate(FrameRange::single(gfn)) else { return Ok(()) };
        let frames = region.page_size.frames();
        let page = FrameRange::new(Gfn::new(gfn.index() - gfn.index() % frames.get()), frames);
        // The page is there and only its waiter must be woken, or it was discarded in the meantime and is zeros. Busy means
        // that a discard is unread, after which the fault is reported again... unless nobody wakes its waiter: do that.
        let installed = self.install_zeros(page)?;
        if installed.stopped == Some(Stop::Busy)
            && let Some((_, region, address)) = self.regions.locate(page)
        {
            self.wake(address, region.page_size.frames().bytes())?;
        }
        self.answered(page);
        Ok(())
    }

    fn complete(&mut self) -> Result<(), PortError> {
        for region in self.regions.regions() {
            match sys::unregister(self.fd.as_fd(), region.address, region.length()) {
                Ok(()) => {}
                Err(error) if is_gone(error) => {}
                Err(error) => return Err(failed("UFFDIO_UNREGISTER", region.frames, region.address, error)),
            }
            // Unregistering wakes the waiters it finds, but it does so before it locks the mapping: a fault in between, which
            // holds no more than the mapping's own lock, would sleep for ever.
            self.wake(region.address, region.length())?;
        }
        // What is missing now is zeros, and the kernel's business.
        self.unanswered.clear();
        self.phase = Phase::Draining;
        Ok(())
    }

    fn figures(&self) -> Option<PortFigures> {
        None
    }
}

/// The process that owns the memory has ended.
fn is_gone(error: Errno) -> bool {
    error == Errno::SRCH
}

fn failed(operation: &'static str, frames: FrameRange, address: u64, error: Errno) -> PortError {
    PortError::Os { operation, object: format!("frames {frames} at address {address:#x}"), source: error.into() }
}

fn failed_whole(operation: &'static str, error: Errno) -> PortError {
    PortError::Os { operation, object: "the userfaultfd".into(), source: error.into() }
}

fn broken(what: String) -> PortError {
    PortError::Protocol { peer: "the owner of the userfaultfd".into(), what }
}
