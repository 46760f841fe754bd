//! Starting clones: a domain without memory by `xl restore`, and the memtap that gives it memory and lets it run.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use descriptor::import::xen::stream::Stream;
use descriptor::import::xen::{RecordError, hole_stream, with_config};
use descriptor::{Descriptor, Report};
use uuid::Uuid;

use super::config::{Config, Template};
use super::error::XlError;
use super::identity::{Identity, Macs};
use super::options::CloneOptions;
use super::program::Xl;
use crate::clones::{Origin, clone_name};
use crate::error::ToolError;
use crate::supervise::{ChildId, ChildSpec, Output, Role, RunDir, Supervisor, own_command};

/// Domains that are made at one time: xl mostly waits for xenstored, which gains nothing from more.
const AT_ONCE: usize = 4;

/// How often a clone's memtap is replaced. One that dies time and again has a fault of its own.
const RECOVERIES: u32 = 3;

const ADMIN: &str = "memtap.admin";

/// What all clones of a descriptor are made of.
pub(super) struct Plan {
    xl: Xl,
    /// The stream for `xl restore`.
    hole: Vec<u8>,
    source: Source,
    identities: Vec<Identity>,
}

enum Source {
    Parent(Config),
    Template(Template),
}

/// The user's configuration for clones, where there is one.
///
/// # Errors
/// When it cannot be read, or is none.
pub(super) fn template(options: &CloneOptions) -> Result<Option<Template>, ToolError> {
    let Some(path) = &options.config else { return Ok(None) };
    let text = fs::read_to_string(path).map_err(ToolError::file("read", path))?;
    Ok(Some(Template::new(text, path).map_err(XlError::from)?))
}

/// Refuses clones that `xl` would refuse, or that would do harm, as far as that can be told from the parent's configuration.
pub(super) fn check(
    xl: &Xl,
    options: &CloneOptions,
    template: Option<&Template>,
    parent: Option<&Config>,
) -> Result<(), XlError> {
    match (template, parent) {
        (Some(template), parent) => template.check(parent, &names(options)?, options.share_disks)?,
        (None, Some(parent)) => parent.check(options.share_disks)?,
        (None, None) => {}
    }
    let there = xl.domains()?;
    for name in names(options)? {
        if there.iter().any(|domain| domain.name == name) {
            return Err(XlError::NameTaken(name));
        }
    }
    Ok(())
}

/// The clones' names, in their order.
fn names(options: &CloneOptions) -> Result<Vec<String>, XlError> {
    let pattern = &options.common.name;
    if options.common.clones > 1 && !pattern.contains("{id}") {
        return Err(XlError::NamePattern(pattern.clone()));
    }
    let name = |id| {
        let name = clone_name(pattern, id).map_err(XlError::CloneName)?;
        // xl would take it for a domain's number.
        if name.bytes().all(|byte| byte.is_ascii_digit()) { Err(XlError::CloneName(name)) } else { Ok(name) }
    };
    (1..=options.common.clones).map(name).collect()
}

impl Plan {
    /// # Errors
    /// When the descriptor makes no clones, or not by this configuration.
    pub(super) fn new(
        xl: &Xl,
        path: &Path,
        template: Option<Template>,
        options: &CloneOptions,
    ) -> Result<Self, ToolError> {
        let descriptor = Descriptor::read(path)?;
        let unusable = |source: RecordError| XlError::Descriptor { path: path.display().to_string(), source };
        let hole = hole_stream(&descriptor).map_err(unusable)?;
        let stream = Stream::parse(&mut hole.as_slice()).map_err(|error| unusable(error.into()))?;
        let parent = Config::new(stream.config.as_deref());
        check(xl, options, template.as_ref(), parent.as_ref().ok())?;
        let taken = parent.as_ref().map(Config::macs).unwrap_or_default();
        let (source, interfaces) = match template {
            Some(template) => {
                let interfaces = template.interfaces();
                (Source::Template(template), interfaces)
            }
            None => {
                let parent = parent.map_err(XlError::from)?;
                let interfaces = parent.macs().len();
                (Source::Parent(parent), interfaces)
            }
        };
        let mut macs = Macs::new(fastrand::u32(..), taken);
        let identity = |(id, name)| Identity {
            id,
            name,
            uuid: Uuid::new_v4(),
            macs: (0..interfaces).map(|_| macs.draw()).collect(),
        };
        let identities = (1..).zip(names(options)?).map(identity).collect();
        Ok(Self { xl: xl.clone(), hole, source, identities })
    }

    /// Makes the domains of all clones, paused and without memory, and hands each to `start` as soon as it is there.
    ///
    /// # Errors
    /// When one cannot be made, or started; those that were not started are destroyed.
    pub(super) fn restore(
        &self,
        run: &RunDir,
        mut start: impl FnMut(Restored) -> Result<(), ToolError>,
    ) -> Result<(), ToolError> {
        let next = AtomicUsize::new(0);
        let (sender, restored) = channel();
        let work = |sender: Sender<Result<Restored, ToolError>>| {
            while let Some(identity) = self.identities.get(next.fetch_add(1, Ordering::Relaxed)) {
                let dir = run.path().join(format!("clone-{}", identity.id));
                if sender.send(self.restore_one(identity, dir)).is_err() {
                    break;
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE.min(self.identities.len()) {
                let sender = sender.clone();
                scope.spawn(|| work(sender));
            }
            drop(sender);
            // Whoever is not received any more is dropped, and so destroyed.
            restored.into_iter().try_for_each(|restored| start(restored?))
        })
    }

    fn restore_one(&self, identity: &Identity, dir: PathBuf) -> Result<Restored, ToolError> {
        fs::DirBuilder::new().mode(0o700).create(&dir).map_err(ToolError::file("create", &dir))?;
        let (stream, cfg) = (dir.join("hole.xen"), dir.join("clone.cfg"));
        let text = |path: &Path| path.display().to_string();
        let mut arguments = vec!["restore".to_owned(), "-e".to_owned(), "-p".to_owned()];
        match &self.source {
            Source::Template(template) => {
                write(&cfg, template.for_clone(identity, &dir).as_bytes())?;
                write(&stream, &self.hole)?;
                arguments.push(text(&cfg));
            }
            Source::Parent(config) => {
                let unusable = |source| XlError::Descriptor { path: text(&stream), source };
                write(&stream, &with_config(&self.hole, &config.for_clone(identity)).map_err(unusable)?)?;
            }
        }
        arguments.push(text(&stream));
        let started = Instant::now();
        self.xl.run(&arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
        let took = started.elapsed();
        // From here on somebody has to destroy it.
        let mut domain = OwnDomain { xl: self.xl.clone(), id: None, name: identity.name.clone(), is_there: true };
        let found = self.xl.domains()?.into_iter().find(|domain| domain.name == identity.name);
        let id = found.ok_or_else(|| XlError::NoDomain(identity.name.clone()))?.id;
        domain.id = Some(id);
        // It holds the guest's registers, and is of no use any more.
        let _ = fs::remove_file(&stream);
        Ok(Restored { identity: identity.clone(), id, domain, dir, started, took })
    }
}

/// A domain that was made here, and is destroyed when this is dropped.
pub(super) struct OwnDomain {
    xl: Xl,
    /// Its number, once that is known.
    id: Option<u32>,
    name: String,
    is_there: bool,
}

impl OwnDomain {
    /// Destroys it.
    pub(super) fn destroy(&mut self) {
        if !std::mem::take(&mut self.is_there) {
            return;
        }
        let domain = self.id.map_or(self.name.clone(), |id| id.to_string());
        match self.xl.run(&["destroy", &domain]) {
            Ok(_) => {}
            // Somebody else was faster, or the guest has ended meanwhile.
            Err(_) if matches!(self.xl.domain(&domain), Err(XlError::NoDomain(_))) => {}
            Err(error) => eprintln!("{} (domain {domain}) is left behind: {}", self.name, Report(&error)),
        }
    }

    /// Takes note that it is gone.
    pub(super) fn forget(&mut self) {
        self.is_there = false;
    }
}

impl Drop for OwnDomain {
    fn drop(&mut self) {
        self.destroy();
    }
}

/// A domain that waits for its memory.
pub(super) struct Restored {
    pub(super) identity: Identity,
    /// The domain's number.
    pub(super) id: u32,
    pub(super) domain: OwnDomain,
    /// For its sockets and logs.
    pub(super) dir: PathBuf,
    /// When xl began.
    pub(super) started: Instant,
    /// How long xl took.
    pub(super) took: Duration,
}

/// A clone that was started.
pub(super) struct Clone {
    pub(super) restored: Restored,
    pub(super) pager: ChildId,
    /// When the clone's first memtap was started.
    pub(super) pager_started: Instant,
    recoveries_left: u32,
}

impl Clone {
    /// Starts the memtap of a domain, which lets it run.
    pub(super) fn start(
        restored: Restored,
        supervisor: &mut Supervisor,
        origin: &Origin<'_>,
        options: &CloneOptions,
    ) -> Result<Self, ToolError> {
        let pager_started = Instant::now();
        let pager = spawn_pager(&restored, supervisor, origin, options, &[])?;
        Ok(Self { restored, pager, pager_started, recoveries_left: RECOVERIES })
    }

    /// Whether its memtap was not replaced too often already.
    pub(super) fn can_recover(&self) -> bool {
        self.recoveries_left > 0
    }

    /// Replaces a memtap that was killed. The new one has Xen tell it which pages are there; the guest goes on.
    ///
    /// # Errors
    /// When none can be started.
    pub(super) fn recover_pager(
        &mut self,
        supervisor: &mut Supervisor,
        origin: &Origin<'_>,
        options: &CloneOptions,
    ) -> Result<(), ToolError> {
        self.recoveries_left = self.recoveries_left.saturating_sub(1);
        self.pager = spawn_pager(&self.restored, supervisor, origin, options, &["--take-over"])?;
        Ok(())
    }

    /// The admin socket of its memtap.
    pub(super) fn admin(&self) -> PathBuf {
        self.restored.dir.join(ADMIN)
    }
}

fn spawn_pager(
    restored: &Restored,
    supervisor: &mut Supervisor,
    origin: &Origin<'_>,
    options: &CloneOptions,
    more: &[&str],
) -> Result<ChildId, ToolError> {
    let Restored { identity, id, dir, .. } = restored;
    let mut command: Command = own_command("memtap");
    command.arg("xen").arg(format!("--domid={id}")).arg("--admin").arg(dir.join(ADMIN)).args(more);
    options.common.pass_on(&mut command, origin);
    let policy = options.common.on_failure.as_deref();
    // memtap can end a domain, but not clean up behind it as xl does. So it stops it, and we have xl destroy it.
    command.arg("--on-failure").arg(if is_killed(options) { "pause" } else { policy.unwrap_or("pause") });
    let (name, log) = (format!("memtap of {}", identity.name), dir.join("memtap.log"));
    Ok(supervisor.start(ChildSpec { name, role: Role::Pager, command, log, output: Output::Log, fds: Vec::new() })?)
}

/// Whether clones are destroyed when their memory cannot be had any more.
pub(super) fn is_killed(options: &CloneOptions) -> bool {
    options.common.on_failure.as_deref().is_none_or(|policy| policy == "kill")
}

/// A file for its owner alone.
fn write(path: &Path, bytes: &[u8]) -> Result<(), ToolError> {
    let file = fs::File::options().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(bytes)).map_err(ToolError::file("write", path))
}
