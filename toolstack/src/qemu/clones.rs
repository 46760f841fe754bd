//! Starting clones: a QEMU that waits for an incoming migration, and the memtap that is its source.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::options::CloneOptions;
use super::template::{Identity, Template, TemplateError};
use crate::clones::Origin;
use crate::error::ToolError;
use crate::supervise::{ChildId, ChildSpec, Event, Output, Role, RunDir, Supervisor, own_command};

/// How long QEMU may take from its start to its listening for the migration; half a second on an idle machine.
const LISTEN_PATIENCE: Duration = Duration::from_secs(60);

/// How often it is looked whether the socket is there.
const LISTEN_POLL: Duration = Duration::from_millis(2);

/// How often a clone's memtap is replaced. One that dies time and again has a fault of its own.
const RECOVERIES: u32 = 3;

/// A clone that was started.
pub(super) struct Clone {
    pub(super) identity: Identity,
    /// For its sockets, logs and whatever the template puts there.
    pub(super) dir: PathBuf,
    pub(super) guest: ChildId,
    /// None until [`Clone::start_pager`].
    pub(super) pager: Option<ChildId>,
    recoveries_left: u32,
    /// When QEMU was started.
    pub(super) started: Instant,
    /// The QMP socket for the user, where the template has no monitor of its own.
    pub(super) qmp: Option<PathBuf>,
    channel: Channel,
}

/// How QEMU and memtap reach each other.
enum Channel {
    /// Over this end of a pair of sockets, until memtap has it.
    Pair(Option<OwnedFd>),
    /// Over the socket of this path, at which QEMU listens; a second connection is for preempting pages.
    Listener(PathBuf),
}

const CONTROL: &str = "control.sock";
const PAGER_QMP: &str = "pager.sock";
const USER_QMP: &str = "qmp.sock";
const ADMIN: &str = "memtap.admin";
const MIGRATION: &str = "migration.sock";

impl Clone {
    /// Starts the QEMU of clone `id`, which then waits for its pager.
    pub(super) fn start_guest(
        supervisor: &mut Supervisor,
        run: &RunDir,
        template: &Template,
        options: &CloneOptions,
        id: u32,
    ) -> Result<Self, ToolError> {
        let identity = Identity::fresh(id, &options.common.name)?;
        let dir = run.path().join(format!("clone-{id}"));
        fs::DirBuilder::new().mode(0o700).create(&dir).map_err(ToolError::file("create", &dir))?;
        // The longest of its sockets' names; the others fit when it does.
        let migration = run.socket(&format!("clone-{id}/{MIGRATION}"))?;
        let (incoming, theirs, channel) = if options.preempt {
            (format!("unix:{}", migration.display()), None, Channel::Listener(migration))
        } else {
            let (theirs, ours) =
                UnixStream::pair().map_err(|error| ToolError::Kernel("make a pair of sockets", error))?;
            (format!("fd:{}", theirs.as_raw_fd()), Some(theirs.into()), Channel::Pair(Some(ours.into())))
        };
        let qmp = (!template.has(&["qmp", "qmp-pretty", "mon", "monitor"])).then(|| dir.join(USER_QMP));

        let words = template.words(&identity, &dir);
        let (program, arguments) = words.split_first().ok_or(TemplateError::Empty)?;
        let mut command = Command::new(program);
        command.args(arguments).args(["-incoming", &incoming, "-global", "migration.x-postcopy-ram=on"]);
        if options.preempt {
            command.args(["-global", "migration.x-postcopy-preempt=on"]);
        }
        if !template.has(&["name"]) {
            command.args(["-name", &identity.name]);
        }
        for socket in [dir.join(CONTROL), dir.join(PAGER_QMP)].iter().chain(&qmp) {
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        }
        let started = Instant::now();
        let guest = supervisor.start(ChildSpec {
            name: format!("QEMU of {}", identity.name),
            role: Role::Guest,
            command,
            log: dir.join("qemu.log"),
            output: Output::Log,
            fds: theirs.into_iter().collect(),
        })?;
        Ok(Self { identity, dir, guest, pager: None, recoveries_left: RECOVERIES, started, qmp, channel })
    }

    /// Starts the clone's memtap, from which the guest then gets its state and its memory.
    pub(super) fn start_pager(
        &mut self,
        supervisor: &mut Supervisor,
        origin: &Origin<'_>,
        options: &CloneOptions,
    ) -> Result<(), ToolError> {
        let mut command = own_command("memtap");
        command.arg("qemu");
        let mut fds = Vec::new();
        match &mut self.channel {
            Channel::Listener(socket) => {
                wait_for_socket(supervisor, self.guest, socket)?;
                command.arg("--connect").arg(&*socket).arg("--preempt");
            }
            Channel::Pair(ours) => {
                fds.extend(ours.take());
                command.args(fds.iter().map(|fd| format!("--fd={}", fd.as_raw_fd())));
            }
        }
        self.pager = Some(self.spawn_pager(supervisor, origin, options, command, fds)?);
        Ok(())
    }

    /// Whether its memtap was not replaced too often already.
    pub(super) fn can_recover(&self) -> bool {
        self.recoveries_left > 0
    }

    /// Replaces a memtap that was killed. The new one has QEMU tell it which pages are there; the guest goes on.
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
        let socket = format!("recover-{}.sock", self.recoveries_left);
        let mut command = own_command("memtap");
        command.arg("qemu");
        command.arg("--recover").arg("--connect").arg(self.dir.join(socket));
        if options.preempt {
            command.arg("--preempt");
        }
        self.pager = Some(self.spawn_pager(supervisor, origin, options, command, Vec::new())?);
        Ok(())
    }

    fn spawn_pager(
        &self,
        supervisor: &mut Supervisor,
        origin: &Origin<'_>,
        options: &CloneOptions,
        mut command: Command,
        fds: Vec<OwnedFd>,
    ) -> Result<ChildId, ToolError> {
        command.arg("--qmp").arg(self.dir.join(PAGER_QMP)).arg(format!("--pid={}", supervisor.pid(self.guest)));
        command.arg("--admin").arg(self.admin());
        options.common.pass_on(&mut command, origin);
        command.args(options.common.on_failure.iter().flat_map(|policy| ["--on-failure", policy]));
        let (name, log) = (format!("memtap of {}", self.identity.name), self.dir.join("memtap.log"));
        Ok(supervisor.start(ChildSpec { name, role: Role::Pager, command, log, output: Output::Log, fds })?)
    }

    /// The QMP socket by which this command watches the clone.
    pub(super) fn control(&self) -> PathBuf {
        self.dir.join(CONTROL)
    }

    /// The admin socket of the clone's memtap.
    pub(super) fn admin(&self) -> PathBuf {
        self.dir.join(ADMIN)
    }
}

fn wait_for_socket(supervisor: &mut Supervisor, guest: ChildId, socket: &Path) -> Result<(), ToolError> {
    let deadline = Instant::now() + LISTEN_PATIENCE;
    while !socket.exists() {
        if let Event::Ended(child, _) = supervisor.wait(LISTEN_POLL)? {
            return Err(supervisor.failure(child).into());
        }
        if Instant::now() >= deadline {
            return Err(supervisor.not_ready(guest, LISTEN_PATIENCE).into());
        }
    }
    Ok(())
}
