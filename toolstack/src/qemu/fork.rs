//! `run` and `fork`: clones from their start to their end.

use super::capture;
use super::clones::Clone;
use super::options::{CloneOptions, ForkOptions, RunOptions};
use super::template::{Identity, Template, TemplateError};
use super::watch::Watched;
use crate::clones::{Origin, Served, watch};
use crate::error::ToolError;
use crate::interrupt::Interrupt;
use crate::report::RunReport;
use crate::server::Server;
use crate::supervise::{RunDir, Supervisor};

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
    let name = options.serve.capture_name(&mut run)?;
    let captured = capture::write(&options.parent, &name, &options.serve.listen, false, &interrupt)?;

    let mut supervisor = Supervisor::new(interrupt);
    let served = options.serve.serve(&mut supervisor, &run, captured.index, &options.clones.common)?;
    let Served { server, endpoint, lane } = served;
    let origin = Origin { descriptor: &captured.descriptor, server: Some(&endpoint), lane };
    let report = RunReport::new("fork qemu", Some(server.report(&supervisor)));
    clones(&mut supervisor, &run, &origin, &template, &options.clones, Some(server), report)
}

/// The template, once everything is checked that can be before anything is touched.
fn checked(options: &CloneOptions) -> Result<Template, ToolError> {
    Identity::fresh(1, &options.common.name)?;
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
    server: Option<Server>,
    report: RunReport,
) -> Result<(), ToolError> {
    let started: Result<Vec<Clone>, ToolError> =
        (1..=options.common.clones).map(|id| Clone::start_guest(supervisor, run, template, options, id)).collect();
    let mut clones = started?;
    for clone in &mut clones {
        clone.start_pager(supervisor, origin, options)?;
    }
    let clones: Vec<Watched> = clones.into_iter().map(Watched::new).collect();
    watch(supervisor, run, clones, server, report, options.common.json, |clone, supervisor| {
        clone.recover(supervisor, origin, options)
    })
}
