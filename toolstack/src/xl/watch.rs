//! Watching clones until they end, and telling what they do.

use std::cell::RefCell;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::{Duration, Instant};

use descriptor::Report;

use super::clones::{Clone, is_killed};
use super::domain::{Domain, DomainState};
use super::error::XlError;
use super::identity::DomainReport;
use super::options::CloneOptions;
use super::program::Xl;
use crate::admin;
use crate::clones::{CloneState, Forked, Origin};
use crate::error::ToolError;
use crate::report::{CloneReport, Memory, PagerReport};
use crate::supervise::{ChildId, Event, Supervisor};
use crate::table::micros;

/// How long one look may wait for memtap.
const LOOK: Duration = Duration::from_millis(100);

/// How often it is looked which domains there are, besides when a pager has ended: each look starts an xl.
const LIST: Duration = Duration::from_secs(2);

/// How long the pager of a domain that is gone may take to end; it looks for that ten times a second.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What the clones share: what xl says of all domains, and how long they may keep this command waiting.
pub(super) struct Domains {
    xl: Xl,
    /// None until xl has told.
    listed: Option<Vec<Domain>>,
    at: Option<Instant>,
    /// No pager is asked before.
    ask_after: Instant,
}

impl Domains {
    pub(super) fn new(xl: &Xl) -> Rc<RefCell<Self>> {
        let (listed, at, ask_after) = (None, None, Instant::now());
        Rc::new(RefCell::new(Self { xl: xl.clone(), listed, at, ask_after }))
    }

    /// What a domain is to xl, not older than `age` as long as xl answers; none when it has told nothing yet.
    fn find(&mut self, id: u32, age: Duration) -> Option<Presence> {
        if self.at.is_none_or(|at| at.elapsed() >= age) {
            match self.xl.domains() {
                Ok(listed) => self.listed = Some(listed),
                Err(error) => eprintln!("cannot see how the clones are: {}", Report(&error)),
            }
            self.at = Some(Instant::now());
        }
        let found = self.listed.as_ref()?.iter().find(|domain| domain.id == id);
        Some(found.map_or(Presence::Gone, |domain| Presence::There(domain.state)))
    }

    /// What a pager says. One that does not answer, as while it pages its domain out, costs the others little: none is asked for
    /// ten times as long as this has waited for it.
    fn ask(&mut self, socket: &Path) -> Option<serde_json::Value> {
        let now = Instant::now();
        if now < self.ask_after {
            return None;
        }
        let status = admin::status(socket, LOOK).ok();
        if status.is_none() {
            self.ask_after = Instant::now() + 10 * now.elapsed();
        }
        status
    }
}

/// What a domain is to xl.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Presence {
    There(DomainState),
    Gone,
}

/// What is known of a clone at one moment.
#[derive(Clone, Copy, Debug)]
struct Signs {
    domain: Presence,
    /// How the pager ended, if it did.
    pager_end: Option<ExitStatus>,
    /// The domain was let go.
    is_up: bool,
}

impl Signs {
    fn state(self) -> CloneState {
        let is_well = self.pager_end.is_none_or(|end| end.success());
        let Presence::There(domain) = self.domain else {
            return if is_well { CloneState::Ended } else { CloneState::Died };
        };
        match domain {
            DomainState::Dying | DomainState::ShutDown if is_well => CloneState::Ended,
            DomainState::Dying | DomainState::ShutDown | DomainState::Crashed => CloneState::Died,
            DomainState::Running | DomainState::Paused | DomainState::Suspended if !self.is_up => {
                match self.pager_end {
                    Some(_) => CloneState::Failed,
                    None => CloneState::Loading,
                }
            }
            _ if !is_well => CloneState::Stranded,
            DomainState::Paused | DomainState::Suspended => CloneState::Paused,
            DomainState::Running if self.pager_end.is_some() => CloneState::Complete,
            DomainState::Running => CloneState::Running,
        }
    }
}

/// A clone and what is known of it.
pub(super) struct Watched {
    clone: Clone,
    domains: Rc<RefCell<Domains>>,
    /// It is destroyed when its memory cannot be had any more.
    is_killed: bool,
    state: CloneState,
    /// From the start of xl to the guest's first instruction.
    up_after: Option<Duration>,
    memory: Option<Memory>,
    lane: Option<String>,
    prepare_ms: Option<f64>,
    pager_end: Option<ExitStatus>,
    /// It has let the domain go just now, or has ended, and the domain with it perhaps.
    is_news: bool,
}

impl Watched {
    pub(super) fn new(clone: Clone, domains: &Rc<RefCell<Domains>>, options: &CloneOptions) -> Self {
        Self {
            clone,
            domains: Rc::clone(domains),
            is_killed: is_killed(options),
            state: CloneState::Loading,
            up_after: None,
            memory: None,
            lane: None,
            prepare_ms: None,
            pager_end: None,
            is_news: false,
        }
    }

    /// The clone's number.
    pub(super) fn id(&self) -> u32 {
        self.clone.restored.identity.id
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

    /// Whether its pager has ended badly, and no other takes over.
    fn is_given_up(&self) -> bool {
        self.pager_end.is_some_and(|end| !end.success()) && self.up_after.is_some() && !self.wants_recovery()
    }

    fn ask_pager(&mut self) {
        let Some(status) = self.domains.borrow_mut().ask(&self.clone.admin()) else { return };
        let pager = PagerReport::of(&status);
        self.memory = pager.memory.or(self.memory);
        self.lane = pager.lane.or(self.lane.take());
        let milliseconds = |value: &serde_json::Value| value.as_f64().map(|us| us / 1e3);
        self.prepare_ms = self.prepare_ms.or(milliseconds(&status["xen"]["prepare_us"]));
        if let (None, Some(ready)) = (self.up_after, status["ready_us"].as_u64()) {
            let before = self.clone.pager_started.duration_since(self.clone.restored.started);
            self.up_after = Some(before + Duration::from_micros(ready));
            self.is_news = true;
        }
    }
}

impl Forked for Watched {
    // A domain takes a few times as long until it runs.
    const LOOK_STARTING: Duration = Duration::from_millis(50);

    fn name(&self) -> &str {
        &self.clone.restored.identity.name
    }

    fn state(&self) -> CloneState {
        self.state
    }

    fn look(&mut self) -> bool {
        if self.state.is_final() {
            return false;
        }
        if self.pager_end.is_none() {
            self.ask_pager();
        }
        let age = if std::mem::take(&mut self.is_news) { Duration::ZERO } else { LIST };
        let Some(mut domain) = self.domains.borrow_mut().find(self.clone.restored.id, age) else { return false };
        if self.is_killed && self.is_given_up() && domain != Presence::Gone {
            self.clone.restored.domain.destroy();
            domain = Presence::Gone;
        }
        let state = Signs { domain, pager_end: self.pager_end, is_up: self.up_after.is_some() }.state();
        match state {
            CloneState::Complete => self.memory.iter_mut().for_each(|memory| memory.missing = 0),
            CloneState::Ended | CloneState::Died | CloneState::Failed => match domain {
                Presence::Gone => self.clone.restored.domain.forget(),
                // Nobody else cleans up behind it.
                Presence::There(_) => self.clone.restored.domain.destroy(),
            },
            _ => {}
        }
        std::mem::replace(&mut self.state, state) != state
    }

    fn note_end(&mut self, child: ChildId, status: ExitStatus) {
        if child == self.clone.pager {
            (self.pager_end, self.is_news) = (Some(status), true);
        }
    }

    fn wants_recovery(&self) -> bool {
        let is_killed = self.pager_end.is_some_and(|end| end.signal().is_some());
        is_killed && self.clone.can_recover() && self.up_after.is_some() && !self.state.is_final()
    }

    fn report(&self, supervisor: &Supervisor) -> CloneReport {
        let restored = &self.clone.restored;
        let identity = &restored.identity;
        CloneReport {
            id: identity.id,
            name: identity.name.clone(),
            state: self.state.to_string(),
            pid: supervisor.pid(self.clone.pager),
            pager_pid: None,
            up_after_ms: self.up_after.map(|after| after.as_secs_f64() * 1e3),
            memory: self.memory,
            lane: self.lane.clone(),
            qmp: None,
            identity: None,
            domain: Some(DomainReport {
                domid: restored.id,
                uuid: identity.uuid,
                macs: identity.macs.iter().map(ToString::to_string).collect(),
                restore_ms: restored.took.as_secs_f64() * 1e3,
                prepare_ms: self.prepare_ms,
            }),
            admin: self.clone.admin(),
        }
    }

    fn line(&self) -> String {
        let restored = &self.clone.restored;
        let (name, state) = (self.name(), self.state);
        match (state, self.up_after) {
            (CloneState::Running, Some(after)) => {
                let restore = micros(restored.took.as_secs_f64() * 1e6);
                let prepare = self.prepare_ms.map(|ms| format!(", memory paged out in {}", micros(ms * 1e3)));
                format!(
                    "{name}: {state} after {} as domain {} (restored in {restore}{})",
                    micros(after.as_secs_f64() * 1e6),
                    restored.id,
                    prepare.unwrap_or_default(),
                )
            }
            (CloneState::Stranded | CloneState::Paused | CloneState::Failed | CloneState::Died, _) => {
                format!("{name}: {state}, see the logs in {}", restored.dir.display())
            }
            _ => format!("{name}: {state}"),
        }
    }

    fn failure(&mut self, supervisor: &mut Supervisor) -> ToolError {
        let deadline = Instant::now() + LAST_WORDS;
        while self.pager_end.is_none() {
            match supervisor.wait(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Ended(child, status)) => self.note_end(child, status),
                Ok(Event::TimedOut) => break,
                Err(interrupted) => return interrupted.into(),
            }
        }
        if self.pager_end.is_some_and(|end| !end.success()) {
            return supervisor.failure(self.clone.pager).into();
        }
        let (name, dir) = (self.name().to_owned(), self.clone.restored.dir.display().to_string());
        XlError::Ended { name, end: "crashed", dir }.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_goes_from_loading_to_complete() {
        let (well, failed) = (Some(ExitStatus::from_raw(0)), Some(ExitStatus::from_raw(0x500)));
        use CloneState::*;
        use DomainState as D;
        use Presence::{Gone, There};
        let state = |domain, pager_end, is_up| Signs { domain, pager_end, is_up }.state();
        let life = [
            (There(D::Paused), None, false),
            (There(D::Running), None, true),
            (There(D::Running), well, true),
            (Gone, well, true),
        ];
        assert_eq!(life.map(|(domain, end, is_up)| state(domain, end, is_up)), [Loading, Running, Complete, Ended]);
        assert_eq!(state(There(D::Paused), failed, false), Failed);
        assert_eq!(state(There(D::Paused), failed, true), Stranded);
        assert_eq!(state(There(D::Paused), None, true), Paused);
        assert_eq!([state(Gone, failed, true), state(There(D::Crashed), None, true)], [Died, Died]);
        assert_eq!([state(Gone, None, false), state(There(D::ShutDown), None, true)], [Ended, Ended]);
    }

    #[test]
    fn what_xl_does_not_tell_is_not_taken_for_an_end() {
        let domains = Domains::new(&Xl::new("/nowhere/xl"));
        assert_eq!(domains.borrow_mut().find(3, Duration::ZERO), None);
        domains.borrow_mut().listed = Some(Vec::new());
        assert_eq!(domains.borrow_mut().find(3, Duration::ZERO), Some(Presence::Gone));
    }
}
