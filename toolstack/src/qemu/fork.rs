//! `run` and `fork`: clones from their start to their end.

use std::io::{self, Write};
use std::time::Duration;

use descriptor::Endpoint;

use super::capture;
use super::clones::{Clone, Origin};
use super::options::{CloneOptions, ForkOptions, RunOptions};
use super::state::CloneState;
use super::template::{Identity, Template, TemplateError};
use super::watch::Watched;
use crate::error::ToolError;
use crate::interrupt::Interrupt;
use crate::report::RunReport;
use crate::server::{Server, Service};
use crate::supervise::{Event, RunDir, Supervisor};

/// How often clones are looked at while they start: their state changes within milliseconds.
const LOOK_STARTING: Duration = Duration::from_millis(5);

/// And afterwards.
const LOOK_RUNNING: Duration = Duration::from_millis(250);

/// Runs `snowflock run qemu`.
///
/// # Errors
/// When a clone cannot be started or came to harm, or by Ctrl-C.
pub fn run(options: &RunOptions) -> Result<(), ToolError> {
    let template = checked(&options.clones)?;
    let interrupt = Interrupt::catch().map_err(|error| ToolError::Kernel("catch signals", error))?;
    let run = run_dir("run-qemu")?;
    let mut supervisor = Supervisor::new(interrupt);
    let origin = Origin { descriptor: &options.descriptor, server: options.server.as_ref(), lane: None };
    let report = RunReport::new("run qemu", None);
    clones(&mut supervisor, &run, &origin, &template, &options.clones, None, report)
}

/// Runs `snowflock fork qemu`.
///
/// # Errors
/// When the parent cannot be captured, a clone cannot be started or came to harm, or by Ctrl-C.
pub fn fork(options: &ForkOptions) -> Result<(), ToolError> {
    let template = checked(&options.clones)?;
    let interrupt = Interrupt::catch().map_err(|error| ToolError::Kernel("catch signals", error))?;
    let mut run = run_dir("fork-qemu")?;
    let name = match &options.output {
        Some(name) => name.clone(),
        None => run.scratch()?.join("capture"),
    };
    let captured = capture::write(&options.parent, &name, &options.listen, false, &interrupt)?;

    let mut supervisor = Supervisor::new(interrupt);
    let local = Endpoint::Unix(run.socket("memserver.sock")?);
    let mut listen = vec![local.clone()];
    listen.extend(options.listen.iter().cloned());
    let ticket_file = options.clones.ticket_file.clone();
    let is_for_others = options.listen.iter().any(|endpoint| matches!(endpoint, Endpoint::Tcp(_)));
    let interface = if is_for_others { None } else { Some("lo") };
    let multicast = options.multicast.as_ref().map(|multicast| multicast.group(interface));
    // Who has the image at hand needs no channel.
    let lane = multicast.is_some().then_some("socket");
    let service = Service { index: captured.index, listen, ticket_file, multicast };
    let server = Server::start(&mut supervisor, &run, service)?;
    let origin = Origin { descriptor: &captured.descriptor, server: Some(&local), lane };
    let report = RunReport::new("fork qemu", Some(server.report(&supervisor)));
    clones(&mut supervisor, &run, &origin, &template, &options.clones, Some(server), report)
}

/// The template, once everything is checked that can be before anything is touched.
fn checked(options: &CloneOptions) -> Result<Template, ToolError> {
    Identity::fresh(1, &options.name)?;
    Ok(Template::new(options.template.clone())?)
}

fn run_dir(command: &str) -> Result<RunDir, ToolError> {
    let run = RunDir::create(command)?;
    match run.path().as_os_str().as_encoded_bytes().contains(&b',') {
        true => Err(TemplateError::Comma(run.path().to_owned()).into()),
        false => Ok(run),
    }
}

/// Starts the clones, then watches them until all have ended.
fn clones(
    supervisor: &mut Supervisor,
    run: &RunDir,
    origin: &Origin<'_>,
    template: &Template,
    options: &CloneOptions,
    mut server: Option<Server>,
    mut report: RunReport,
) -> Result<(), ToolError> {
    let started: Result<Vec<Clone>, ToolError> =
        (1..=options.clones).map(|id| Clone::start_guest(supervisor, run, template, options, id)).collect();
    let mut clones = started?;
    for clone in &mut clones {
        clone.start_pager(supervisor, origin, options)?;
    }
    let mut clones: Vec<Watched> = clones.into_iter().map(Watched::new).collect();
    let mut told = Told::default();
    let mut has_changed = false;
    loop {
        has_changed |= clones.iter_mut().fold(false, |changed, clone| changed | clone.look());
        if std::mem::take(&mut has_changed) {
            report.server = server.as_ref().map(|server| server.report(supervisor));
            report.clones = clones.iter().map(|clone| clone.report(supervisor)).collect();
            report.write(run)?;
            told.tell(&report, &clones, options.json)?;
        }
        if clones.iter().all(|clone| clone.state.is_final()) {
            break;
        }
        let is_settled = clones.iter().all(|clone| clone.state.is_settled());
        let mut event = supervisor.wait(if is_settled { LOOK_RUNNING } else { LOOK_STARTING })?;
        while let Event::Ended(child, status) = event {
            match server.as_mut().filter(|server| server.is(child)) {
                Some(server) => {
                    server.restart(supervisor)?;
                    has_changed = true;
                }
                None => clones.iter_mut().for_each(|clone| _ = clone.note_end(child, status)),
            }
            event = supervisor.wait(Duration::ZERO)?;
        }
        for clone in clones.iter_mut().filter(|clone| clone.wants_recovery()) {
            clone.recover(supervisor, origin, options)?;
            has_changed = true;
        }
    }
    match clones.iter_mut().find(|clone| clone.state.is_bad()) {
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
    fn tell(&mut self, report: &RunReport, clones: &[Watched], json: bool) -> Result<(), ToolError> {
        if json {
            return print(&serde_json::to_string(report).unwrap_or_default());
        }
        self.states.resize(clones.len(), CloneState::Starting);
        for (watched, told) in clones.iter().zip(&mut self.states) {
            match (std::mem::replace(told, watched.state), watched.state) {
                (before, now) if before == now => {}
                (CloneState::Stranded, CloneState::Running) => {
                    eprintln!("{}: running again", watched.clone.identity.name)
                }
                _ => eprintln!("{}", watched.line()),
            }
        }
        if !self.is_table_shown && clones.iter().all(|clone| clone.state.is_settled()) {
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
