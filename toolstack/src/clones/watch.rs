//! Watching clones until they end, and telling what they do.

use std::io::{self, Write};
use std::process::ExitStatus;
use std::time::Duration;

use super::CloneState;
use crate::error::ToolError;
use crate::report::{CloneReport, RunReport};
use crate::server::Server;
use crate::supervise::{ChildId, Event, RunDir, Supervisor};

/// How often clones are looked at once their state does not change from moment to moment.
const LOOK_RUNNING: Duration = Duration::from_millis(250);

/// A clone that was started.
pub(crate) trait Forked {
    /// How often it is looked at while it starts.
    const LOOK_STARTING: Duration;

    /// Its name.
    fn name(&self) -> &str;

    /// What it was doing when it was last looked at.
    fn state(&self) -> CloneState;

    /// Looks at it anew; true when its state is another one.
    fn look(&mut self) -> bool;

    /// Takes note of a child's end, which may be one of its own.
    fn note_end(&mut self, child: ChildId, status: ExitStatus);

    /// Whether its pager was killed while the guest needs it. One that ended by itself has failed the guest as it was told to.
    fn wants_recovery(&self) -> bool;

    /// What is known.
    fn report(&self, supervisor: &Supervisor) -> CloneReport;

    /// What is known in a line, for people.
    fn line(&self) -> String;

    /// The error of a clone that came to harm: its pager's where that failed too, for it knows more.
    fn failure(&mut self, supervisor: &mut Supervisor) -> ToolError;
}

/// Watches `clones` until all have ended, starting `server` again when it dies, and having `recover` replace pagers that were killed.
///
/// # Errors
/// When a clone came to harm, the server dies time and again, or by Ctrl-C.
pub(crate) fn watch<C: Forked>(
    supervisor: &mut Supervisor,
    run: &RunDir,
    mut clones: Vec<C>,
    mut server: Option<Server>,
    mut report: RunReport,
    json: bool,
    mut recover: impl FnMut(&mut C, &mut Supervisor) -> Result<(), ToolError>,
) -> Result<(), ToolError> {
    let mut told = Told::default();
    let mut has_changed = false;
    loop {
        has_changed |= clones.iter_mut().fold(false, |changed, clone| changed | clone.look());
        if std::mem::take(&mut has_changed) {
            report.server = server.as_ref().map(|server| server.report(supervisor));
            report.clones = clones.iter().map(|clone| clone.report(supervisor)).collect();
            report.write(run)?;
            told.tell(&report, &clones, json)?;
        }
        if clones.iter().all(|clone| clone.state().is_final()) {
            break;
        }
        let is_settled = clones.iter().all(|clone| clone.state().is_settled());
        let mut event = supervisor.wait(if is_settled { LOOK_RUNNING } else { C::LOOK_STARTING })?;
        while let Event::Ended(child, status) = event {
            match server.as_mut().filter(|server| server.is(child)) {
                Some(server) => {
                    server.restart(supervisor)?;
                    has_changed = true;
                }
                None => clones.iter_mut().for_each(|clone| clone.note_end(child, status)),
            }
            event = supervisor.wait(Duration::ZERO)?;
        }
        for clone in clones.iter_mut().filter(|clone| clone.wants_recovery()) {
            eprintln!("{}: its memtap was killed, starting another", clone.name());
            recover(clone, supervisor)?;
            has_changed = true;
        }
    }
    match clones.iter_mut().find(|clone| clone.state().is_bad()) {
        Some(clone) => Err(clone.failure(supervisor)),
        None => Ok(()),
    }
}

/// What was told already.
#[derive(Default)]
struct Told {
    states: Vec<CloneState>,
    is_table_shown: bool,
}

impl Told {
    /// Tells what changed: as JSON, or as a line for each clone and a table once all clones are up.
    fn tell(&mut self, report: &RunReport, clones: &[impl Forked], json: bool) -> Result<(), ToolError> {
        if json {
            return print(&serde_json::to_string(report).unwrap_or_default());
        }
        self.states.resize(clones.len(), CloneState::Starting);
        for (clone, told) in clones.iter().zip(&mut self.states) {
            match (std::mem::replace(told, clone.state()), clone.state()) {
                (before, now) if before == now => {}
                (CloneState::Stranded, CloneState::Running) => eprintln!("{}: running again", clone.name()),
                _ => eprintln!("{}", clone.line()),
            }
        }
        if !self.is_table_shown && clones.iter().all(|clone| clone.state().is_settled()) {
            self.is_table_shown = true;
            print(&format!("\n{}", report.table()))?;
            eprintln!("Ctrl-C ends all clones; `snowflock status` shows them from elsewhere.");
        }
        Ok(())
    }
}

fn print(text: &str) -> Result<(), ToolError> {
    writeln!(io::stdout(), "{text}").map_err(|error| ToolError::Kernel("write to standard output", error))
}
