//! Watching clones until they end, and telling what they do.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant, SystemTime};

use descriptor::import::qemu::qmp::{Qmp, QmpError};
use serde_json::{Value, json};

use super::clones::Clone;
use super::options::CloneOptions;
use super::state::Signs;
use crate::clones::{CloneState, Forked, Origin};
use crate::error::ToolError;
use crate::report::{CloneReport, Memory, PagerReport};
use crate::supervise::{ChildId, Event, Supervisor};
use crate::table::micros;

/// How long one look may wait for QEMU or memtap. A QEMU whose main loop waits for a page is asked again later.
const LOOK: Duration = Duration::from_millis(100);

/// How long the pager of a clone that died may take to end; milliseconds, unless the machine is busy.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A clone and what is known of it.
pub(super) struct Watched {
    pub(super) clone: Clone,
    pub(super) state: CloneState,
    /// From QEMU's start to the guest's first instruction.
    pub(super) up_after: Option<Duration>,
    /// What memtap says of the clone's memory.
    pub(super) memory: Option<Memory>,
    /// And of how it travels.
    lane: Option<String>,
    qmp: Option<Qmp>,
    run: Option<String>,
    migration: Option<String>,
    guest_end: Option<ExitStatus>,
    pager_end: Option<ExitStatus>,
    started: SystemTime,
}

impl Watched {
    pub(super) fn new(clone: Clone) -> Self {
        let started = SystemTime::now() - clone.started.elapsed();
        Self {
            clone,
            state: CloneState::Starting,
            up_after: None,
            memory: None,
            lane: None,
            qmp: None,
            run: None,
            migration: None,
            guest_end: None,
            pager_end: None,
            started,
        }
    }

    /// Replaces the pager that was killed.
    ///
    /// # Errors
    /// When none can be started.
    pub(super) fn recover(
        &mut self,
        supervisor: &mut Supervisor,
        origin: &Origin<'_>,
        options: &CloneOptions,
    ) -> Result<(), ToolError> {
        self.pager_end = None;
        self.clone.recover_pager(supervisor, origin, options)
    }

    /// Takes note of a child's end; true when the child is this clone's.
    fn note(&mut self, child: ChildId, status: ExitStatus) -> bool {
        if child == self.clone.guest {
            self.guest_end = Some(status);
        } else if Some(child) == self.clone.pager {
            self.pager_end = Some(status);
        } else {
            return false;
        }
        true
    }

    fn ask_qemu(&mut self) {
        if self.qmp.is_none() {
            self.qmp = Qmp::connect(&self.clone.control(), LOOK).ok();
        }
        let Some(qmp) = &mut self.qmp else { return };
        let asked = (|| -> Result<(), QmpError> {
            let run = qmp.execute("query-status", json!({}))?;
            let migration = qmp.execute("query-migrate", json!({}))?;
            self.run = text(&run, "status");
            self.migration = text(&migration, "status");
            // Events say when, where asking only says since.
            while let Some(event) = qmp.next_event(Duration::ZERO)? {
                if event.name == "RESUME" && self.up_after.is_none() {
                    self.up_after = event.at.duration_since(self.started).ok();
                }
            }
            Ok(())
        })();
        match asked {
            Ok(()) | Err(QmpError::Timeout { .. }) => {}
            // QEMU is about to end, or took another client; the next look connects again.
            Err(_) => self.qmp = None,
        }
    }
}

impl Forked for Watched {
    // States change within milliseconds.
    const LOOK_STARTING: Duration = Duration::from_millis(5);

    fn name(&self) -> &str {
        &self.clone.identity.name
    }

    fn state(&self) -> CloneState {
        self.state
    }

    fn note_end(&mut self, child: ChildId, status: ExitStatus) {
        self.note(child, status);
    }

    fn wants_recovery(&self) -> bool {
        let is_killed = self.pager_end.is_some_and(|end| end.signal().is_some());
        is_killed
            && self.clone.can_recover()
            && self.guest_end.is_none()
            && self.up_after.is_some()
            && self.state != CloneState::Complete
    }

    fn look(&mut self) -> bool {
        if self.guest_end.is_none() {
            self.ask_qemu();
        }
        if self.pager_end.is_none() {
            let pager = PagerReport::ask(&self.clone.admin(), LOOK);
            self.memory = pager.memory.or(self.memory);
            self.lane = pager.lane.or(self.lane.take());
        }
        let signs = Signs {
            guest_end: self.guest_end,
            pager_end: self.pager_end,
            run: self.run.as_deref(),
            migration: self.migration.as_deref(),
        };
        let state = signs.state();
        if let (CloneState::Complete, Some(memory)) = (state, &mut self.memory) {
            // The pager ends with the last page, so it is not there to say so.
            memory.missing = 0;
        }
        if state.is_up() && self.up_after.is_none() {
            self.up_after = Some(self.clone.started.elapsed());
        }
        std::mem::replace(&mut self.state, state) != state
    }

    fn report(&self, supervisor: &Supervisor) -> CloneReport {
        let identity = &self.clone.identity;
        CloneReport {
            id: identity.id,
            name: identity.name.clone(),
            state: self.state.to_string(),
            pid: supervisor.pid(self.clone.guest),
            pager_pid: self.clone.pager.map(|pager| supervisor.pid(pager)),
            up_after_ms: self.up_after.map(|after| after.as_secs_f64() * 1e3),
            memory: self.memory,
            lane: self.lane.clone(),
            qmp: self.clone.qmp.clone(),
            identity: Some(identity.clone()),
            domain: None,
            admin: self.clone.admin(),
        }
    }

    fn line(&self) -> String {
        let Self { state, clone, .. } = self;
        let name = &clone.identity.name;
        match (state, self.up_after, &clone.qmp) {
            (CloneState::Running | CloneState::Waiting, Some(after), Some(qmp)) => {
                format!("{name}: {state} after {}, QMP {}", micros(after.as_secs_f64() * 1e6), qmp.display())
            }
            (CloneState::Running | CloneState::Waiting, Some(after), None) => {
                format!("{name}: {state} after {}", micros(after.as_secs_f64() * 1e6))
            }
            (CloneState::Stranded | CloneState::Paused | CloneState::Failed | CloneState::Died, ..) => {
                format!("{name}: {state}, see the logs in {}", clone.dir.display())
            }
            _ => format!("{name}: {state}"),
        }
    }

    fn failure(&mut self, supervisor: &mut Supervisor) -> ToolError {
        let deadline = Instant::now() + LAST_WORDS;
        // A pager that gave its guest up kills it first, and then ends with the reason.
        while self.clone.pager.is_some() && self.pager_end.is_none() {
            match supervisor.wait(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Ended(child, status)) => _ = self.note(child, status),
                Ok(Event::TimedOut) => break,
                Err(interrupted) => return interrupted.into(),
            }
        }
        let pager = self.clone.pager.filter(|_| self.pager_end.is_some_and(|end| !end.success()));
        supervisor.failure(pager.unwrap_or(self.clone.guest)).into()
    }
}

fn text(answer: &Value, field: &str) -> Option<String> {
    answer.get(field)?.as_str().map(str::to_owned)
}
