use std::time::Duration;

use descriptor::fetch::{Class, ErrorCode, Limits, Tag};
use descriptor::{FrameRange, Gfn};
use thiserror::Error;

use crate::port::{Event, Waiter};

/// What happened, told to [`Pager::handle`](super::Pager::handle).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Someone needs a page.
    Fault {
        /// The frame.
        gfn: Gfn,
        /// Who waits.
        waiter: Waiter,
        /// True for a write.
        write: bool,
    },
    /// The guest gave these frames up; they read as zeros from now on.
    Discard {
        /// The frames.
        range: FrameRange,
    },
    /// The source is there, with these limits; nothing asked before will be answered.
    SourceUp {
        /// What the pager must keep to.
        limits: Limits,
    },
    /// The source is gone; nothing asked before will be answered.
    SourceDown,
    /// The source answered a request with an error.
    RequestFailed {
        /// The request.
        tag: Tag,
        /// Why.
        code: ErrorCode,
    },
    /// Whether the source pushes what the clone [lacks](super::Pager::lacks) by itself. As long as it does, the pager asks for
    /// nothing in the background; what someone waits for, and what is fetched ahead of that, it asks for as ever.
    Pushed(bool),
    /// The guest is gone or needs no pager any more. Nothing comes out any more.
    Closed,
}

/// What to do next, from [`Pager::poll`](super::Pager::poll).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Ask the source for pages.
    Request {
        /// The request's number, never used before.
        tag: Tag,
        /// Whether someone waits.
        class: Class,
        /// The frames: at most [`MAX_RANGES`](descriptor::fetch::MAX_RANGES) ranges, none empty.
        ranges: Vec<FrameRange>,
    },
    /// Install pages of zeros, then say how far that came with [`Pager::installed`](super::Pager::installed). When the port
    /// was busy, read its events before the next poll.
    InstallZeros {
        /// The frames, whole granules.
        range: FrameRange,
    },
    /// Install a granule from its staging buffer, then say how far that came with
    /// [`Pager::installed`](super::Pager::installed). Keep the buffer when the port was busy: the order comes again.
    InstallStaged {
        /// The granule.
        range: FrameRange,
    },
    /// Throw the staging buffer of a granule away.
    DropStaged {
        /// The granule.
        range: FrameRange,
    },
    /// Let a waiter go on; its page is there.
    Resume {
        /// The page.
        gfn: Gfn,
        /// Who waited for it.
        waiter: Waiter,
    },
    /// Every eager frame is there: the clone may run. Comes once.
    Ready,
    /// Every frame of the image is there. Comes once.
    Complete,
    /// The pager cannot go on; the clone must be failed by policy. Comes once, and nothing after it.
    Failed {
        /// Why.
        reason: Failure,
    },
}

/// What to do with the pages that arrived, from [`Pager::wanted`](super::Pager::wanted).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Install them now, then say how far that came with [`Pager::installed`](super::Pager::installed).
    Install(FrameRange),
    /// They are part of a granule that is not there as a whole yet: copy them into the staging buffer of their granule (a new
    /// buffer holds zeros), then call [`Pager::staged`](super::Pager::staged). All of them are of one granule.
    Stage(FrameRange),
}

/// Why a pager cannot go on.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// The source stayed away for too long.
    #[error("the page source has been gone for {} ms, longer than the patience allows: restart the page server, or allow more", gone.as_millis())]
    SourceGone {
        /// How long it has been away.
        gone: Duration,
    },
    /// A page that someone waits for does not come.
    #[error("page {gfn} was asked for {attempts} times without success while the source was connected")]
    NoAnswer {
        /// The frame.
        gfn: Gfn,
        /// How often it was asked for.
        attempts: u32,
    },
    /// The source does not have the pages of this image.
    #[error("the page source refuses page {gfn}: {code:?}; it does not serve the image of this descriptor")]
    Refused {
        /// The first frame of the request.
        gfn: Gfn,
        /// The source's answer.
        code: ErrorCode,
    },
    /// A fault outside of the memory map.
    #[error("the guest faulted on frame {gfn}, which its memory map does not have")]
    Outside {
        /// The frame.
        gfn: Gfn,
    },
    /// More waiters than any guest has.
    #[error("more than {0} waiters at one time: the fault port reports nonsense")]
    TooManyWaiters(usize),
}

impl From<Event> for Input {
    fn from(event: Event) -> Self {
        match event {
            Event::Fault { gfn, waiter, write } => Input::Fault { gfn, waiter, write },
            Event::Discard { range } => Input::Discard { range },
            Event::Closed => Input::Closed,
        }
    }
}
