//! The event loop of one clone: joins a fault port, a page source and the pager's core in a single thread.
//!
//! In each turn the port's events come first, then some pages of the source, then what the core wants done, so that a fault
//! waits for one or a few installations at most. Nothing blocks but the wait for events at the end of a turn without work.
//!
//! An engine that cannot go on *fails closed*: the guest is paused, killed or held as [`OnFailure`] says, the reason goes
//! to the log, the status and the exit code.

mod control;
mod desk;
mod multicast;
mod outcome;
mod progress;
mod reports;
mod staging;
mod wait;

use std::time::{Duration, Instant};

use descriptor::ImageId;
use descriptor::fetch::Limits;

pub use control::{Command, Control, ControlHandle, OverwriteError, Unanswered, control};
pub use outcome::{EngineError, OnFailure, Outcome, StopReason, exit_code};
pub use reports::WorkingSetPolicy;

use crate::guest::Guest;
use crate::pager::{Failure, Hydrate, Input, Output, Pager};
use crate::port::FaultPort;
use crate::source::{Source, SourceError, SourceEvent};
use crate::stats::Status;

use desk::Desk;
use multicast::Multicast;
use progress::Reporter;
use reports::Reports;
use wait::{Ready, Waiter, Watched};

/// Outputs of the core between two looks at the port.
const OUTPUTS_PER_TURN: usize = 16;

/// How often a port that was told of the completion is asked whether it is through.
const COMPLETION_CHECK: Duration = Duration::from_millis(1);

/// Pages taken from the source, and from the multicast channel, between two looks at the port, one message more or less: some
/// 100 µs of copying.
const PAGES_PER_TURN: u64 = 64;

/// How long a guest that breaks its connections has to end before that counts as a failure of the port.
const END_GRACE: Duration = Duration::from_millis(200);

/// How an engine is to work.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The image, for people.
    pub image: ImageId,
    /// How the core was told to hydrate.
    pub hydrate: Hydrate,
    /// How long to look for events before sleeping; zero to sleep at once.
    pub spin: Duration,
    /// What becomes of the guest when its memory does not come.
    pub on_failure: OnFailure,
    /// How long the source may be gone. The core has it too, except with [`OnFailure::Hold`], which only tells.
    pub patience: Duration,
    /// Show progress of the hydration.
    pub progress: bool,
    /// What to do with working sets. The core and the source have it too.
    pub working_set: WorkingSetPolicy,
    /// The interface to join multicast groups on; the one that the server is reached by where there is none.
    pub channel_interface: Option<String>,
}

/// What remains of an engine.
pub struct Ended {
    /// Why it ended.
    pub outcome: Outcome,
    /// The last status.
    pub status: Status,
    /// The port. Closing the last copy of a userfaultfd makes the kernel answer what waits with zeros, so whoever cannot stop
    /// the guest must not drop it.
    pub port: Box<dyn FaultPort + Send>,
}

/// One clone's pager with all its shells.
pub struct Engine {
    desk: Desk,
    source: Source,
    multicast: Multicast,
    reports: Reports,
    config: EngineConfig,
    waiter: Waiter,
    reporter: Reporter,
    /// Since when the source is gone.
    down_since: Option<Duration>,
    completed: bool,
}

impl Engine {
    /// An engine about to begin. `epoch` is the moment that times count from, the one given to the pager's core as zero.
    pub fn new(
        config: EngineConfig,
        pager: Pager,
        port: Box<dyn FaultPort + Send>,
        source: Source,
        guest: Box<dyn Guest + Send>,
        control: Control,
        epoch: Instant,
    ) -> Self {
        let status = Status::new(config.image, &pager);
        let mut desk = Desk::new(pager, port, guest, control, status, epoch);
        desk.hydrate = config.hydrate;
        let waiter = Waiter::new(config.spin);
        let reporter = Reporter::new(config.progress, desk.pager.progress());
        let multicast = Multicast::new(config.channel_interface.clone(), config.hydrate);
        let reports = Reports::new(config.working_set);
        let (down_since, completed) = (Some(Duration::ZERO), false);
        Self { desk, source, multicast, reports, config, waiter, reporter, down_since, completed }
    }

    /// Serves the guest until it is complete or gone, someone stops the engine, or it fails.
    pub fn run(mut self) -> Ended {
        let outcome = loop {
            // A defect of ours must not freeze the guest either. After it nothing is asked of the core but its status.
            let turn = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.turn()));
            match turn.unwrap_or(Err(EngineError::Panicked)) {
                Ok(None) => {}
                Ok(Some(outcome)) => break outcome,
                Err(error) => {
                    if let Some(outcome) = self.failed(error) {
                        break outcome;
                    }
                }
            }
        };
        self.end(outcome)
    }

    /// One round: events, some pages, what follows from them, and a wait when there was nothing.
    fn turn(&mut self) -> Result<Option<Outcome>, EngineError> {
        let now = self.desk.now();
        // What a server says to a complete clone, such as that its image is gone, must not fail the guest.
        if !self.completed {
            self.receive(now)?;
            self.multicast.receive(&mut self.desk)?;
            self.multicast.advance(&mut self.desk, &mut self.source);
        }
        self.reports.follow(self.multicast.is_probing(), &mut self.desk.pager);
        let more = self.obey(now)?;
        if self.completed {
            self.desk.read_events(now)?;
        } else {
            self.reports.report(now, &mut self.desk.pager, &mut self.source);
        }
        if !self.completed
            && let Some(event) = self.source.flush(now)
        {
            self.note(event, now)?;
        }
        self.reporter.report(now, self.desk.hydrate, &self.desk.pager);
        self.check_patience(now);
        if let Some(reason) = self.desk.stop {
            return Ok(Some(if self.completed { Outcome::Complete } else { Outcome::Stopped(reason) }));
        }
        if self.desk.guest_gone {
            return Ok(Some(if self.completed { Outcome::Complete } else { Outcome::GuestGone }));
        }
        self.wait(more)?;
        Ok(None)
    }

    /// Takes what the source has, up to a bound.
    fn receive(&mut self, now: Duration) -> Result<(), EngineError> {
        let mut pages = 0;
        while pages < PAGES_PER_TURN
            && let Some(event) = self.source.next(now)?
        {
            match event {
                SourceEvent::Pages { tag, frames, bytes, last } => {
                    pages += frames.count().get();
                    self.desk.arrived(tag, frames, bytes, last)?;
                }
                SourceEvent::Failed { tag, code, text } => {
                    tracing::warn!(tag, ?code, text, "the server cannot deliver what was asked for");
                    self.desk.pager.handle(now, Input::RequestFailed { tag, code });
                }
                SourceEvent::Up { limits, local, multicast, ordered } => {
                    // Before the core asks for anything: what will be pushed needs no request.
                    self.multicast.session(now, multicast);
                    self.multicast.advance(&mut self.desk, &mut self.source);
                    self.connected(limits, local, now);
                    self.reports.session(ordered, &mut self.desk.pager);
                    return Ok(());
                }
                SourceEvent::Order(order) => self.reports.ordered(order),
                SourceEvent::Channel(peer) => self.multicast.open(now, &peer),
                SourceEvent::ChannelGone { reason, text } => self.multicast.gone(now, reason, &text),
                SourceEvent::Down { reason } => return self.note(SourceEvent::Down { reason }, now),
            }
        }
        Ok(())
    }

    fn connected(&mut self, limits: Limits, local: bool, now: Duration) {
        let endpoint = self.source.endpoint().to_string();
        tracing::info!(endpoint, local, "connected to the page server");
        self.down_since = None;
        let status = &mut self.desk.status;
        (status.state, status.reason) = ("running".into(), None);
        (status.source.endpoint, status.source.connected, status.source.local) = (endpoint, true, local);
        self.desk.pager.handle(now, Input::SourceUp { limits });
    }

    /// Takes note of the end of a session.
    fn note(&mut self, event: SourceEvent<'static>, now: Duration) -> Result<(), EngineError> {
        if let SourceEvent::Down { reason } = event {
            if self.down_since.is_none() {
                tracing::warn!(%reason, "lost the page server; connecting again");
            } else {
                tracing::debug!(%reason, "no page server yet");
            }
            self.down_since.get_or_insert(now);
            let status = &mut self.desk.status;
            (status.source.connected, status.reason) = (false, Some(reason.to_string()));
            if status.state == "running" {
                status.state = "connecting".into();
            }
            self.multicast.down();
            self.desk.pager.handle(now, Input::SourceDown);
        }
        Ok(())
    }

    /// Does what the core wants, up to a bound; true when there may be more.
    fn obey(&mut self, now: Duration) -> Result<bool, EngineError> {
        for _ in 0..OUTPUTS_PER_TURN {
            let Some(output) = self.desk.pager.poll(now) else { return Ok(false) };
            match output {
                Output::Request { tag, class, ranges } => {
                    let delivery = self.multicast.route(now, tag, class, &ranges);
                    self.source.request(tag, class, delivery, &ranges);
                }
                Output::InstallZeros { range } => {
                    self.desk.install(range, None)?;
                }
                Output::InstallStaged { range } => self.desk.install_staged(range)?,
                Output::DropStaged { range } => self.desk.staging.drop(range),
                Output::Resume { gfn, waiter } => self.desk.port.resume(gfn, waiter)?,
                Output::Ready => {
                    self.desk.guest.ready()?;
                    self.desk.status.ready_us = Some(self.desk.now().as_micros() as u64);
                }
                Output::Complete => {
                    tracing::info!("every page of the image is there");
                    self.completed = true;
                    self.reports.finish(&mut self.desk.pager, &mut self.source);
                    // What it cannot send any more is little lost.
                    drop(self.source.flush(now));
                    self.multicast.close();
                    self.desk.status.state = "complete".into();
                    self.desk.port.complete()?;
                }
                Output::Failed { reason } => return Err(EngineError::Pager(reason)),
            }
        }
        Ok(true)
    }

    fn wait(&mut self, more: bool) -> Result<(), EngineError> {
        let now = self.desk.now();
        let more = more || !self.completed && (self.source.has_work() || self.multicast.has_work());
        let timeout = if more {
            Some(Duration::ZERO)
        } else {
            let (source, multicast) = (self.source.deadline(), self.multicast.deadline());
            let (reporter, reports) = (self.reporter.deadline(), self.reports.deadline());
            let deadlines = [self.desk.pager.next_timeout(), source, multicast, reporter, reports];
            let deadline = deadlines.into_iter().flatten().min();
            let deadline = if self.completed { Some(now + COMPLETION_CHECK) } else { deadline };
            deadline.map(|deadline| deadline.saturating_sub(now))
        };
        let watched = self.desk.watched(if self.completed { None } else { self.source.watch() });
        let watched = Watched { channel: self.multicast.fd(), ..watched };
        let ready = self.waiter.wait(&watched, timeout).map_err(|error| EngineError::Wait(error.into()))?;
        let now = self.desk.now();
        if ready.control {
            self.desk.status.channel = self.multicast.status();
        }
        self.desk.ready(ready, now)?;
        if ready.channel {
            self.multicast.set_readable();
        }
        let Ready { source_in, source_out, .. } = ready;
        if (source_in || source_out)
            && let Some(event) = self.source.set_ready(source_in, source_out, now)
        {
            self.note(event, now)?;
        }
        self.desk.status.source.bytes_received = self.source.bytes_received();
        Ok(())
    }

    /// With a guest that is to be held, a source that is gone for too long is told and nothing else.
    fn check_patience(&mut self, now: Duration) {
        let Some(since) = self.down_since else { return };
        let gone = now.saturating_sub(since);
        if self.config.on_failure == OnFailure::Hold
            && gone > self.config.patience
            && self.desk.status.state != "holding"
        {
            let reason = Failure::SourceGone { gone };
            tracing::error!(%reason, "the guest is held: it waits for its pages, and the server is tried on");
            self.desk.status.state = "holding".into();
        }
    }

    /// What follows from an error: the end, unless the guest is to be held.
    fn failed(&mut self, error: EngineError) -> Option<Outcome> {
        // A guest that ends takes its memory away before its pidfd tells.
        if matches!(error, EngineError::Port(_)) && self.guest_ends_within(END_GRACE) {
            tracing::debug!(%error, "the guest ended");
            return Some(if self.completed { Outcome::Complete } else { Outcome::GuestGone });
        }
        if self.config.on_failure != OnFailure::Hold {
            return Some(Outcome::Failed(error));
        }
        let outcome = Outcome::Failed(error);
        tracing::error!(%outcome, "the guest is held: it waits for its pages until someone decides on it");
        self.desk.status.state = "holding".into();
        self.desk.status.reason = Some(outcome.to_string());
        Some(self.hold(outcome))
    }

    /// Answers on the admin socket until the guest is gone or someone stops the engine.
    fn hold(&mut self, outcome: Outcome) -> Outcome {
        let mut waiter = Waiter::new(Duration::ZERO);
        loop {
            let ready = match waiter.wait(&self.desk.watched_without_port(), None) {
                Ok(ready) => ready,
                Err(error) => return Outcome::Failed(EngineError::Wait(error.into())),
            };
            let now = self.desk.now();
            if self.desk.ready(ready, now).is_err() || self.desk.is_over() {
                return outcome;
            }
        }
    }

    fn guest_ends_within(&self, grace: Duration) -> bool {
        let Some(guest) = self.desk.guest.watch() else { return false };
        wait::readable_within(guest, grace)
    }

    /// Fails the guest by policy where its pages will not come any more, and says how it ended.
    fn end(mut self, outcome: Outcome) -> Ended {
        self.reporter.finish();
        let fails = matches!(outcome, Outcome::Failed(_) | Outcome::Stopped(_));
        let text = outcome.to_string();
        if fails && !self.desk.guest_gone {
            let done = match self.config.on_failure {
                OnFailure::Pause => self.desk.guest.pause().map(|()| "paused"),
                OnFailure::Kill => self.desk.guest.kill().map(|()| "killed"),
                OnFailure::Hold => Ok("left waiting for pages that nobody will bring"),
            };
            match done {
                Ok(done) => tracing::error!(reason = text, "the guest was {done}"),
                Err(error) => {
                    tracing::error!(reason = text, error = %descriptor::Report(&error), "the guest could not be failed")
                }
            }
        } else {
            tracing::info!("{text}");
        }
        let now = self.desk.now();
        self.desk.status.channel = self.multicast.status();
        let mut status = self.desk.status(now);
        status.state = match &outcome {
            Outcome::Complete => "complete",
            Outcome::GuestGone => "gone",
            Outcome::Stopped(_) => "stopped",
            Outcome::Failed(_) => "failed",
        }
        .into();
        if fails {
            status.reason = Some(text);
        }
        if !matches!(outcome, Outcome::Failed(_)) {
            self.reports.finish(&mut self.desk.pager, &mut self.source);
        }
        self.source.leave();
        Ended { outcome, status, port: self.desk.port }
    }
}

impl From<SourceError> for Outcome {
    fn from(error: SourceError) -> Self {
        Outcome::Failed(error.into())
    }
}
