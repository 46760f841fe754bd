//! The page server of a run: a memserver that is started again when it dies.

use std::path::{Path, PathBuf};
use std::time::Duration;

use descriptor::Endpoint;
use mcast_socket::Group;

use crate::admin;
use crate::error::ToolError;
use crate::report::ServerReport;
use crate::supervise::{ChildId, ChildSpec, Output, Role, RunDir, SuperviseError, Supervisor, own_command};

/// How long a server may take until it listens; it may read the whole image first.
const READY_PATIENCE: Duration = Duration::from_secs(60);

/// How often a server is started again. Clones survive a crash, but a server that crashes time and again is a fault of its
/// own, which starting it forever would hide.
const RESTARTS: u32 = 3;

/// A pause before that: long for a kernel, short for a guest that waits.
const RESTART_PAUSE: Duration = Duration::from_millis(100);

/// How long it may take to say how it is; it answers within milliseconds.
const STATUS_PATIENCE: Duration = Duration::from_secs(5);

/// What a page server is to do.
pub(crate) struct Service {
    /// The image's index file.
    pub(crate) index: PathBuf,
    /// Where to listen; at TCP port 0 the kernel chooses the port.
    pub(crate) listen: Vec<Endpoint>,
    /// The secret that its clients must know.
    pub(crate) ticket_file: Option<PathBuf>,
    /// The group to which it multicasts what several clones want.
    pub(crate) multicast: Option<Group>,
}

/// A page server that runs.
pub(crate) struct Server {
    service: Service,
    log: PathBuf,
    admin: PathBuf,
    child: ChildId,
    restarts_left: u32,
}

impl Server {
    /// Starts it, and waits until it listens.
    pub(crate) fn start(supervisor: &mut Supervisor, run: &RunDir, service: Service) -> Result<Self, ToolError> {
        let (log, admin) = (run.path().join("memserver.log"), run.socket("memserver.admin")?);
        let (child, endpoints) = spawn(supervisor, &service, &log, &admin)?;
        // A restarted server must be found where the first one was, so the ports are fixed now.
        let service = Service { listen: endpoints, ..service };
        Ok(Self { service, log, admin, child, restarts_left: RESTARTS })
    }

    /// Where it listens, in the order in which that was asked for.
    pub(crate) fn endpoints(&self) -> &[Endpoint] {
        &self.service.listen
    }

    /// Whether this child is the server.
    pub(crate) fn is(&self, child: ChildId) -> bool {
        self.child == child
    }

    /// Starts it again after it died.
    ///
    /// # Errors
    /// The failure of the one that died, when that happened too often; or when a signal comes.
    pub(crate) fn restart(&mut self, supervisor: &mut Supervisor) -> Result<(), ToolError> {
        let mut failure: ToolError = supervisor.failure(self.child).into();
        while let Some(left) = self.restarts_left.checked_sub(1) {
            self.restarts_left = left;
            eprintln!("memserver died, starting it again; its log is {}", self.log.display());
            // The kernel takes the rings of a killed process down in its own time, and until then its sockets seem to listen.
            supervisor.pause(RESTART_PAUSE)?;
            self.remove_sockets();
            match spawn(supervisor, &self.service, &self.log, &self.admin) {
                Ok((child, _)) => {
                    self.child = child;
                    return Ok(());
                }
                Err(error @ ToolError::Supervise(SuperviseError::Interrupted(_))) => return Err(error),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    /// Removes the sockets of a server of ours that is dead, so that nobody listens there.
    fn remove_sockets(&self) {
        let unix = self.service.listen.iter().filter_map(|endpoint| match endpoint {
            Endpoint::Unix(path) => Some(path),
            Endpoint::Tcp(_) => None,
        });
        for path in unix.chain([&self.admin]) {
            // Where it is gone already that is as well.
            let _ = std::fs::remove_file(path);
        }
    }

    /// The bytes that it has multicast, where it was asked to and says so.
    pub(crate) fn multicast_bytes(&self) -> Option<u64> {
        let status = admin::status(&self.admin, STATUS_PATIENCE).ok()?;
        let total = status.get("multicast")?.get("total")?;
        let bytes = |kind: &str| total.get(kind)?.get("bytes")?.as_u64();
        ["data", "repair", "parity", "control"].into_iter().map(bytes).sum()
    }

    /// What it says of itself.
    pub(crate) fn report(&self, supervisor: &Supervisor) -> ServerReport {
        let endpoints: Vec<String> = self.endpoints().iter().map(Endpoint::to_string).collect();
        ServerReport { pid: supervisor.pid(self.child), endpoints: endpoints.join(" "), admin: self.admin.clone() }
    }
}

fn spawn(
    supervisor: &mut Supervisor,
    service: &Service,
    log: &Path,
    admin: &Path,
) -> Result<(ChildId, Vec<Endpoint>), ToolError> {
    let mut command = own_command("memserver");
    command.arg("serve").arg("--image").arg(&service.index).arg("--admin").arg(admin);
    command.args(service.listen.iter().map(|endpoint| format!("--listen={endpoint}")));
    if let Some(file) = &service.ticket_file {
        command.arg("--ticket-file").arg(file);
    }
    command.args(service.multicast.iter().map(|group| format!("--mcast={group}")));
    let (name, log) = ("memserver".to_owned(), log.to_owned());
    let spec = ChildSpec { name, role: Role::Server, command, log, output: Output::Ready, fds: Vec::new() };
    let child = supervisor.start(spec)?;
    let said = supervisor.wait_ready(child, READY_PATIENCE)?;
    let endpoints: Result<Vec<Endpoint>, _> = said.split_whitespace().map(str::parse).collect();
    match endpoints {
        Ok(endpoints) if endpoints.len() == service.listen.len() => Ok((child, endpoints)),
        _ => Err(supervisor.not_a_ready_line(child, said).into()),
    }
}
