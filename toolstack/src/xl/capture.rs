//! Capturing a running domain into NAME.snow, NAME.snowidx and NAME.xen.

use std::path::Path;

use descriptor::import::{Origin, xen};
use descriptor::{Endpoint, ImageId, Report};
use indicatif::ProgressBar;
use serde_json::{Map, json};

use super::domain::{Domain, DomainState};
use super::error::XlError;
use super::options::{CaptureOptions, Method, ParentOptions};
use super::program::Xl;
use super::take::{self, Taken};
use crate::capture::{Capture, Making, beside, progress_bar};
use crate::error::ToolError;
use crate::interrupt::Interrupt;
use crate::supervise::{LogTail, RunDir, SuperviseError};

/// Runs `snowflock capture xl`.
///
/// # Errors
/// When the domain cannot be captured; it then goes on, unless the error says otherwise.
pub fn capture(options: &CaptureOptions) -> Result<(), ToolError> {
    let interrupt = Interrupt::catch().map_err(|error| ToolError::Kernel("catch signals", error))?;
    let run = RunDir::create("capture-xl")?;
    let CaptureOptions { parent, output, server, json } = options;
    write(parent, output, server, *json, &run, &interrupt).map(|_| ())
}

/// Captures the domain as `name`, and says what came of it.
pub(super) fn write(
    parent: &ParentOptions,
    name: &Path,
    servers: &[Endpoint],
    json: bool,
    run: &RunDir,
    interrupt: &Interrupt,
) -> Result<Capture, ToolError> {
    let path = beside(name, "xen");
    let others = [beside(name, "snow"), beside(name, "snowidx")];
    if let Some(path) = others.iter().chain([&path]).find(|path| !parent.force && path.exists()) {
        return Err(ToolError::Exists(path.clone()));
    }
    let xl = Xl::new(&parent.tool.xl);
    let domain = xl.domain(&parent.domain)?;
    check(&domain)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::Builder::new().prefix(".snow-").tempfile_in(folder);
    let file = file.map_err(ToolError::file("create a file in", folder))?;

    let bar = progress_bar();
    bar.set_length(domain.mib << 20);
    let mut watch = |bytes: u64| {
        bar.set_length(bytes.max(domain.mib << 20));
        bar.set_position(bytes);
        interrupt.is_pending()
    };
    let job = Job { xl: &xl, domain: &domain, socket: &run.socket("receiver")?, bar: &bar, interrupt };
    let captured = job.take(parent.method, (file.as_file(), file.path()), &mut watch);
    if let Some(signal) = interrupt.take() {
        bar.finish_and_clear();
        let state = captured.err().filter(XlError::is_of_the_parent);
        return Err(state.map_or(SuperviseError::Interrupted(signal).into(), ToolError::from));
    }
    let (method, taken) = captured?;
    for old in &others {
        // They would tell of another stream if the rest fails. Where they are not there that is as well.
        let _ = std::fs::remove_file(old);
    }
    file.persist(&path).map_err(|error| ToolError::file("write", &path)(error.error))?;

    let origin = Origin {
        image: ImageId::random().map_err(|error| ToolError::Kernel("draw random numbers", error))?,
        parent: domain.name.clone(),
        version: String::new(),
        captured: taken.at,
        pause: taken.pause,
        servers: servers.to_vec(),
    };
    let suspending_us = taken.suspending.map(|time| time.as_micros());
    let details =
        Map::from_iter([("suspending_us".to_owned(), json!(suspending_us)), ("stream".to_owned(), json!(path))]);
    let no_pause = "stood still for a time that xl did not tell";
    let making = Making { name, method, insight: &parent.insight, json, no_pause, interrupt, details };
    let finished = making.finish(&bar, |folder, scan| {
        let made = xen::import(&path, xen::read(&path)?, origin, folder, scan)?;
        if made.clocks < u64::from(made.vcpus) {
            bar.suspend(|| {
                eprintln!(
                    "found the clocks of {} of {} processors; a guest that knows of Xen may not resume in a clone",
                    made.clocks, made.vcpus
                );
            });
        }
        Ok((made.descriptor, made.index))
    });
    if let Err(ToolError::Supervise(SuperviseError::Interrupted(_))) = finished {
        // Nobody asked for a stream alone.
        let _ = std::fs::remove_file(&path);
    }
    finished
}

/// Refuses a domain that would not answer.
fn check(domain: &Domain) -> Result<(), XlError> {
    let advice = match domain.state {
        DomainState::Running => return Ok(()),
        DomainState::Paused => "`xl unpause` lets it go on",
        DomainState::Suspended => "another capture or save is at work on it, or has left it so",
        DomainState::ShutDown | DomainState::Crashed | DomainState::Dying => "only a running guest can be",
    };
    Err(XlError::State { domain: domain.name.clone(), state: domain.state.word(), advice })
}

/// A capture under way.
struct Job<'a> {
    xl: &'a Xl,
    domain: &'a Domain,
    /// Where a receiver connects to.
    socket: &'a Path,
    bar: &'a ProgressBar,
    interrupt: &'a Interrupt,
}

impl Job<'_> {
    /// Takes the stream by `method`, and looks after the domain.
    fn take(
        &self,
        method: Method,
        file: (&std::fs::File, &Path),
        watch: &mut take::Watch<'_>,
    ) -> Result<(&'static str, Taken), XlError> {
        let id = self.domain.id.to_string();
        if method != Method::Save {
            self.bar.set_message("capturing by xl migrate");
            let taken = self.settle(take::migrate(self.xl, &id, file, self.socket, watch));
            match taken {
                Err(error) if method == Method::Auto && error.is_of_migration() && !self.interrupt.is_pending() => {
                    self.bar.suspend(|| eprintln!("not by migrate: {}", Report(&error)));
                }
                done => return done.map(|taken| ("migrate", taken)),
            }
            file.0.set_len(0).map_err(|error| XlError::Os("begin the stream anew", error))?;
        }
        self.bar.set_message("capturing by xl save, the domain stands still");
        let taken = self.settle(take::save(self.xl, &id, file.0, watch));
        taken.map(|taken| ("save", taken))
    }

    /// Makes sure that the domain goes on, whatever became of the capture.
    fn settle(&self, taken: Result<Taken, XlError>) -> Result<Taken, XlError> {
        if self.interrupt.is_pending() {
            self.bar.suspend(|| eprintln!("broken off; looking after {}", self.domain.name));
        }
        if let Err(XlError::Stuck { .. }) = taken {
            // Our own xl still works on it.
            return taken;
        }
        let id = self.domain.id.to_string();
        let mut log = LogTail::default();
        let mut state = self.xl.domain(&id).map(|domain| domain.state);
        if let Ok(DomainState::Suspended) = state {
            self.bar.suspend(|| eprintln!("{} was left suspended, having xl resume it", self.domain.name));
            log = take::resume(self.xl, &id)?;
            state = self.xl.domain(&id).map(|domain| domain.state);
        }
        let advice = match state {
            Ok(DomainState::Running) => return taken,
            Ok(DomainState::Suspended) => {
                return Err(XlError::Suspended {
                    domain: self.domain.name.clone(),
                    log,
                    cause: taken.err().map(Box::new),
                });
            }
            Ok(DomainState::Paused) => "`xl unpause` lets it go on",
            Ok(_) | Err(XlError::NoDomain(_)) => "the guest, or somebody else, has ended it",
            Err(error) => return taken.and(Err(error)),
        };
        let word = state.map_or("not there", DomainState::word);
        Err(XlError::After { domain: self.domain.name.clone(), state: word, advice, cause: taken.err().map(Box::new) })
    }
}
