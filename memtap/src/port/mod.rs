//! Fault ports: where faults come from and pages go.
//!
//! A port knows one hypervisor or kernel interface and nothing else: it never fetches a page, and where pages come from
//! never shows here. Which pages go where and when is decided by the pager's core; a port only reports and obeys.

pub mod firecracker;
pub mod qemu;
pub mod uffd;
pub mod xen;

use std::os::fd::BorrowedFd;
use std::time::Duration;

use descriptor::{FrameRange, Gfn, PageCount};
use serde::Serialize;
use thiserror::Error;

use xen::{XenError, XenFigures};

/// Someone who waits for a page: a small number with a meaning for its port alone, such as a vCPU of a Xen ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Waiter(pub u32);

/// What a guest or its hypervisor reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Someone needs a page. Ports may report a page again, also one that is already there.
    Fault {
        /// The frame.
        gfn: Gfn,
        /// Who waits.
        waiter: Waiter,
        /// True for a write, false for a read or where the port cannot tell.
        write: bool,
    },
    /// The guest gave these frames up: their contents do not matter, and they read as zeros from now on.
    Discard {
        /// The frames.
        range: FrameRange,
    },
    /// The guest is gone or needs no pager any more; no further event follows.
    Closed,
}

/// How far an installation came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Installed {
    /// Pages installed from the first on.
    pub count: PageCount,
    /// Why it stopped before the last page, if it did.
    pub stopped: Option<Stop>,
}

/// Why an installation stopped at a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The page is there already: skip it. Its waiters have been or can be resumed.
    AlreadyPresent,
    /// Events are unread or the port's queue is full: read events, then go on from this page.
    Busy,
}

/// A port that cannot go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PortError {
    /// A kernel interface failed.
    #[error("{operation} on {object} failed")]
    Os {
        /// What was tried, such as `UFFDIO_COPY`.
        operation: &'static str,
        /// On what.
        object: String,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// The peer closed the connection before it said that it has every page. Where it still runs, its guest hangs at what is
    /// missing.
    #[error(
        "{peer} closed the connection with {missing} pages missing, and did not say that it is complete; where its migration is \
         postcopy-paused, go on with --recover"
    )]
    Closed {
        /// Who.
        peer: &'static str,
        /// The pages that were not sent.
        missing: PageCount,
    },
    /// The peer got everything and did not say that it is complete.
    #[error(
        "{peer} was sent every page, and did not say within {waited:?} that it is complete; look at its migration's state and log"
    )]
    Unconfirmed {
        /// Who.
        peer: &'static str,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The peer (a VMM, a hypervisor) sent something that its protocol does not allow.
    #[error("{peer} broke its protocol: {what}")]
    Protocol {
        /// Who.
        peer: String,
        /// What was wrong, with the offending values.
        what: String,
    },
    /// Xen or its domain does not do what the port needs.
    #[error(transparent)]
    Xen(#[from] XenError),
}

/// Where faults come from and pages go. Everything is non-blocking.
pub trait FaultPort {
    /// What to wait on, readable when [`FaultPort::read_events`] has something to report.
    fn fd(&self) -> BorrowedFd<'_>;

    /// What the pager must know of the port.
    fn traits(&self) -> PortTraits;

    /// Appends pending events to `events`, at least one if there are any, in the order of their causes.
    ///
    /// # Errors
    /// When the port cannot go on; the clone must then be failed by policy.
    fn read_events(&mut self, events: &mut Vec<Event>) -> Result<(), PortError>;

    /// Installs `pages`, whole pages that follow each other from `start` on.
    ///
    /// # Errors
    /// When the port cannot go on.
    fn install(&mut self, start: Gfn, pages: &[u8]) -> Result<Installed, PortError>;

    /// Installs pages of zeros.
    ///
    /// # Errors
    /// When the port cannot go on.
    fn install_zeros(&mut self, range: FrameRange) -> Result<Installed, PortError>;

    /// Lets a waiter go on whose page is there; nothing where installing already woke it.
    ///
    /// # Errors
    /// When the port cannot go on.
    fn resume(&mut self, gfn: Gfn, waiter: Waiter) -> Result<(), PortError>;

    /// Tells the port that every frame of the image is there, so that it can let the guest go on alone. Its events are to be
    /// read on, whether or not its descriptor is readable, until [`Event::Closed`] says that it is through.
    ///
    /// # Errors
    /// When the port cannot go on.
    fn complete(&mut self) -> Result<(), PortError>;

    /// What the port tells of itself beside what the pager counts, if anything.
    fn figures(&self) -> Option<PortFigures>;
}

/// What a port tells of itself, for the status.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PortFigures {
    /// A Xen port.
    Xen(XenFigures),
}

/// What the pager must know of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortTraits {
    /// The smallest number of frames, aligned, that can be installed at once: 1, or 512 over 2 MiB huge pages.
    pub granule: PageCount,
    /// True when frames of zeros must be installed too before the clone is complete (QEMU); false when a frame that was never
    /// installed reads as zeros once the port is complete.
    pub needs_zeros: bool,
}
