//! `run` and `fork`: clones from their start to their end.

use std::time::Duration;

use super::capture;
use super::clones::{Clone, Plan, check, template};
use super::config::{Config, Template};
use super::error::XlError;
use super::options::{CloneOptions, ForkOptions, RunOptions};
use super::program::Xl;
use super::watch::{Domains, Watched};
use crate::clones::{Origin, Served, watch};
use crate::error::ToolError;
use crate::interrupt::Interrupt;
use crate::report::RunReport;
use crate::server::Server;
use crate::supervise::{RunDir, Supervisor};

/// Runs `snowflock run xl`.
///
/// # Errors
/// When a clone cannot be started or came to harm, or by Ctrl-C.
pub fn run(options: &RunOptions) -> Result<(), ToolError> {
    let template = template(&options.clones)?;
    let interrupt = Interrupt::catch().map_err(|error| ToolError::Kernel("catch signals", error))?;
    let run = RunDir::create("run-xl")?;
    let mut supervisor = Supervisor::new(interrupt);
    let origin = Origin { descriptor: &options.descriptor, server: options.server.as_ref(), lane: None };
    let report = RunReport::new("run xl", None);
    let work = Work { xl: Xl::new(&options.tool.xl), run: &run, origin, options: &options.clones };
    work.clones(&mut supervisor, template, None, report)
}

/// Runs `snowflock fork xl`.
///
/// # Errors
/// When the parent cannot be captured, a clone cannot be started or came to harm, or by Ctrl-C.
pub fn fork(options: &ForkOptions) -> Result<(), ToolError> {
    let template = template(&options.clones)?;
    let interrupt = Interrupt::catch().map_err(|error| ToolError::Kernel("catch signals", error))?;
    let mut run = RunDir::create("fork-xl")?;
    let xl = Xl::new(&options.parent.tool.xl);
    // Before anything is touched.
    let parent = xl.domain(&options.parent.domain)?;
    let config = Config::of_list(&xl.run(&["list", "-l", &parent.id.to_string()])?);
    if template.is_none() {
        config.as_ref().map_err(|_| XlError::from(super::ConfigError::None))?;
    }
    check(&xl, &options.clones, template.as_ref(), config.as_ref().ok())?;
    let name = options.serve.capture_name(&mut run)?;
    let captured = capture::write(&options.parent, &name, &options.serve.listen, false, &run, &interrupt)?;

    let mut supervisor = Supervisor::new(interrupt);
    let served = options.serve.serve(&mut supervisor, &run, captured.index, &options.clones.common)?;
    let Served { server, endpoint, lane } = served;
    let origin = Origin { descriptor: &captured.descriptor, server: Some(&endpoint), lane };
    let report = RunReport::new("fork xl", Some(server.report(&supervisor)));
    let work = Work { xl, run: &run, origin, options: &options.clones };
    work.clones(&mut supervisor, template, Some(server), report)
}

struct Work<'a> {
    xl: Xl,
    run: &'a RunDir,
    origin: Origin<'a>,
    options: &'a CloneOptions,
}

impl Work<'_> {
    /// Starts the clones, then watches them until all have ended.
    fn clones(
        &self,
        supervisor: &mut Supervisor,
        template: Option<Template>,
        server: Option<Server>,
        report: RunReport,
    ) -> Result<(), ToolError> {
        let Self { xl, run, origin, options } = self;
        let plan = Plan::new(xl, origin.descriptor, template, options)?;
        let domains = Domains::new(xl);
        let mut clones = Vec::new();
        plan.restore(run, |restored| {
            // Only to notice Ctrl-C.
            supervisor.pause(Duration::from_millis(1))?;
            clones.push(Watched::new(Clone::start(restored, supervisor, origin, options)?, &domains, options));
            Ok(())
        })?;
        clones.sort_by_key(Watched::id);
        watch(supervisor, run, clones, server, report, options.common.json, |clone, supervisor| {
            clone.recover(supervisor, origin, options)
        })
    }
}
