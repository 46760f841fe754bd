use std::time::{Duration, Instant};

use descriptor::fetch::Tag;
use descriptor::{FrameRange, PAGE_SIZE};

use super::control::{Command, Control};
use super::outcome::{EngineError, StopReason};
use super::staging::StagingBuffers;
use super::wait::{Ready, Waiter, Watched};
use crate::guest::Guest;
use crate::pager::{Hydrate, Input, Pager, Wanted};
use crate::port::{Event, FaultPort, Stop};
use crate::stats::Status;

/// Times that a busy port without events is tried again at once: the thread whose discard it reported has to run.
const BUSY_YIELDS: u32 = 200;

/// How long to sleep between tries after that: whoever holds the port up is stopped or starved.
const BUSY_PAUSE: Duration = Duration::from_millis(1);

/// All of an engine but its source: the pager, the port it obeys, the guest, the control channel.
///
/// Pages are installed from the source's buffers, so that the source is borrowed meanwhile and must stand apart.
pub(super) struct Desk {
    pub(super) pager: Pager,
    pub(super) port: Box<dyn FaultPort + Send>,
    pub(super) guest: Box<dyn Guest + Send>,
    pub(super) control: Control,
    pub(super) staging: StagingBuffers,
    pub(super) events: Vec<Event>,
    /// What the status answers tell of the source.
    pub(super) status: Status,
    pub(super) hydrate: Hydrate,
    /// Someone asked to stop.
    pub(super) stop: Option<StopReason>,
    /// The guest has ended, by its own descriptor or the port's word.
    pub(super) guest_gone: bool,
    /// Tries in a row that found the port busy and without events.
    busy_tries: u32,
    epoch: Instant,
}

impl Desk {
    pub(super) fn new(
        pager: Pager,
        port: Box<dyn FaultPort + Send>,
        guest: Box<dyn Guest + Send>,
        control: Control,
        status: Status,
        epoch: Instant,
    ) -> Self {
        let staging = StagingBuffers::new(port.traits().granule);
        let (events, hydrate) = (Vec::new(), Hydrate::Off);
        Self {
            pager,
            port,
            guest,
            control,
            staging,
            events,
            status,
            hydrate,
            stop: None,
            guest_gone: false,
            busy_tries: 0,
            epoch,
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// True when the engine has to come to its end.
    pub(super) fn is_over(&self) -> bool {
        self.stop.is_some() || self.guest_gone
    }

    /// Feeds what the port reports to the pager, and tells how many events there were.
    pub(super) fn read_events(&mut self, now: Duration) -> Result<usize, EngineError> {
        self.port.read_events(&mut self.events)?;
        let count = self.events.len();
        for event in self.events.drain(..) {
            self.guest_gone |= event == Event::Closed;
            self.pager.handle(now, Input::from(event));
        }
        Ok(count)
    }

    /// Handles what was found ready, the source aside.
    pub(super) fn ready(&mut self, ready: Ready, now: Duration) -> Result<(), EngineError> {
        if ready.port {
            self.read_events(now)?;
        }
        if ready.guest {
            self.guest_gone = true;
        }
        while ready.control
            && let Some(command) = self.control.next()
        {
            match command {
                // An answer that nobody waits for any more is dropped.
                Command::Status(answer) => drop(answer.try_send(self.status(now))),
                Command::Hydrate(hydrate) => {
                    self.hydrate = hydrate;
                    self.pager.set_hydrate(now, hydrate);
                }
                Command::Overwrite(ranges, answer) => drop(answer.try_send(self.pager.overwrite(&ranges))),
                Command::Stop(reason) => self.stop = Some(reason),
            }
        }
        Ok(())
    }

    /// How things are.
    pub(super) fn status(&self, now: Duration) -> Status {
        let status = self.status.clone().with_pager(&self.pager, self.hydrate, now);
        Status { port: self.port.figures(), ..status }
    }

    /// Installs pages that arrived, as far as they are wanted; without bytes they are zeros.
    pub(super) fn arrived(
        &mut self,
        tag: Tag,
        frames: FrameRange,
        bytes: Option<&[u8]>,
        last: bool,
    ) -> Result<(), EngineError> {
        let slice = |range: FrameRange| {
            let from = ((range.start() - frames.start()).get() * PAGE_SIZE) as usize;
            bytes.map(|bytes| &bytes[from..from + range.count().bytes() as usize])
        };
        let mut rest = frames;
        while !self.is_over()
            && let Some(wanted) = self.pager.wanted(self.now(), tag, rest)
        {
            let next = match wanted {
                Wanted::Install(range) => self.install(range, slice(range))?,
                Wanted::Stage(range) => {
                    self.staging.put(range, slice(range));
                    self.pager.staged(self.now(), range);
                    range.end()
                }
            };
            rest = FrameRange::between(next.min(frames.end()), frames.end());
        }
        if last {
            self.pager.answered(self.now(), tag);
        }
        Ok(())
    }

    /// Installs pages, or zeros, once; returns the first frame with which nothing was done.
    pub(super) fn install(&mut self, range: FrameRange, pages: Option<&[u8]>) -> Result<descriptor::Gfn, EngineError> {
        let outcome = match pages {
            Some(pages) => self.port.install(range.start(), pages)?,
            None => self.port.install_zeros(range)?,
        };
        let next = self.pager.installed(self.now(), range, outcome);
        match outcome.stopped {
            Some(Stop::Busy) => self.drain_busy_port()?,
            _ => self.busy_tries = 0,
        }
        Ok(next)
    }

    /// Installs a granule from its staging buffer, which is kept for another try when the port is busy.
    pub(super) fn install_staged(&mut self, granule: FrameRange) -> Result<(), EngineError> {
        let Some(pages) = self.staging.get(granule) else {
            debug_assert!(false, "the pager staged {granule}, and the buffer is not there");
            return Ok(());
        };
        let outcome = self.port.install(granule.start(), pages)?;
        self.pager.installed(self.now(), granule, outcome);
        if outcome.stopped == Some(Stop::Busy) {
            self.drain_busy_port()
        } else {
            self.staging.drop(granule);
            Ok(())
        }
    }

    /// Reads the events that keep the port busy. There may be none: after its discard was read, the guest's thread has to
    /// run before the port is free, and it may be stopped. Others are listened to meanwhile.
    fn drain_busy_port(&mut self) -> Result<(), EngineError> {
        if self.read_events(self.now())? > 0 {
            self.busy_tries = 0;
            return Ok(());
        }
        self.busy_tries += 1;
        if self.busy_tries <= BUSY_YIELDS {
            std::thread::yield_now();
            return Ok(());
        }
        let watched = self.watched(None);
        let ready = Waiter::new(Duration::ZERO)
            .wait(&watched, Some(BUSY_PAUSE))
            .map_err(|error| EngineError::Wait(error.into()))?;
        self.ready(ready, self.now())
    }

    pub(super) fn watched<'a>(&'a self, source: Option<(std::os::fd::BorrowedFd<'a>, bool)>) -> Watched<'a> {
        Watched { port: Some(self.port.fd()), source, ..self.watched_without_port() }
    }

    /// Faults that nobody reads would keep the port ready all the time.
    pub(super) fn watched_without_port(&self) -> Watched<'_> {
        Watched { port: None, control: self.control.fd(), source: None, channel: None, guest: self.guest.watch() }
    }
}
