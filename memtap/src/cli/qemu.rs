use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use descriptor::import::qemu::qmp::{Qmp, QmpError};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;
use thiserror::Error;

use super::CliError;
use super::options::CloneOptions;
use crate::engine::OnFailure;
use crate::guest::{Guest, GuestError, ProcessGuest};
use crate::port::qemu::{QemuError, QemuPort, inherited};

/// How long QEMU may take to answer on its monitor, to notice that its source is gone, or to tell which pages it has: each
/// takes it some milliseconds, and a busy host a thousand times as long.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often it is looked whether QEMU is there, or has noticed.
const LOOK: Duration = Duration::from_millis(10);

/// Be the source of the migration that an unmodified QEMU waits for, which makes it a clone.
///
/// QEMU is started as its parent was, with `-incoming fd:N` (one end of a socket pair, the other goes to --fd) or
/// `-incoming unix:PATH` (then --connect PATH), and `-global migration.x-postcopy-ram=on`.
///
/// When its page server stays away, QEMU is killed or stopped (SIGSTOP) as --on-failure says. It is never asked to stop itself: a
/// vCPU that waits for a page keeps its monitor waiting too. A memtap that is gone is replaced by one with --recover; a
/// QEMU that was stopped needs SIGCONT before.
#[derive(Debug, Args)]
pub(super) struct QemuArgs {
    #[command(flatten)]
    socket: SocketOptions,
    /// Serve what QEMU asks for over a second connection to the same socket, past all other pages; QEMU needs
    /// `-global migration.x-postcopy-preempt=on`.
    #[arg(long, requires = "connect")]
    preempt: bool,
    /// Take over a clone whose memtap died. With --qmp, QEMU is told to listen on the socket of --connect; without, someone
    /// has told it by `migrate-recover`.
    #[arg(long)]
    recover: bool,
    /// A monitor of QEMU for memtap alone.
    #[arg(long, value_name = "PATH")]
    qmp: Option<PathBuf>,
    /// QEMU's process, where neither --connect nor --qmp leads to it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    #[command(flatten)]
    clone: CloneOptions,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct SocketOptions {
    /// The socket that memtap was started with, of which QEMU has the other end.
    #[arg(long, value_name = "N")]
    fd: Option<i32>,
    /// The socket on which QEMU listens for its migration.
    #[arg(long, value_name = "PATH")]
    connect: Option<PathBuf>,
}

/// Why QEMU could not be reached.
#[derive(Debug, Error)]
pub(super) enum ReachError {
    #[error("cannot use file descriptor {0} as the migration socket")]
    Fd(i32, #[source] io::Error),
    #[error("cannot connect to {path}, where QEMU is to listen", path = .0.display())]
    Connect(PathBuf, #[source] io::Error),
    #[error("QEMU's migration is {status}, not paused, after {PATIENCE:?}: there is nothing to recover")]
    NotPaused { status: String },
    #[error("cannot have QEMU listen for its new source")]
    Monitor(#[from] QmpError),
    #[error("no process {0} to watch")]
    Process(i32, #[source] io::Error),
    #[error("which process is QEMU? It cannot be failed without: give --pid or --qmp, or --on-failure hold")]
    NoProcess,
    #[error(transparent)]
    Port(#[from] QemuError),
}

pub(super) fn run(arguments: &QemuArgs, epoch: Instant) -> Result<u8, CliError> {
    // First of all: the number belongs to nobody else yet.
    let given = arguments.socket.fd.map(|number| inherited(number).map_err(|error| ReachError::Fd(number, error)));
    let given = given.transpose()?;
    let prepared = arguments.clone.prepare(epoch)?;
    let (main, preempt) = arguments.channels(given)?;
    let mut guest = arguments.guest(&main)?;
    let port = if arguments.recover {
        // Another attempt may recover what this one could not.
        QemuPort::recover(&prepared.descriptor, main, preempt, PATIENCE)
    } else {
        QemuPort::start(&prepared.descriptor, main, preempt).inspect_err(|_| arguments.clone.fail(&mut *guest))
    };
    let port = port.map_err(ReachError::Port)?;
    let present = port.sent().clone();
    let (engine, _admin) = prepared.engine(Box::new(port), guest, present)?;
    let ended = engine.run();
    arguments.clone.write_stats(&ended)?;
    Ok(ended.outcome.exit_code())
}

impl QemuArgs {
    /// The migration socket, and that for preempting pages.
    fn channels(&self, given: Option<OwnedFd>) -> Result<(OwnedFd, Option<OwnedFd>), ReachError> {
        if let (true, Some(qmp), Some(path)) = (self.recover, &self.qmp, &self.socket.connect) {
            listen_again(qmp, path)?;
        }
        match (given, &self.socket.connect) {
            (None, Some(path)) => {
                let main = connect(path)?;
                // QEMU 7.2 does nothing before it has both.
                let preempt = self.preempt.then(|| connect(path)).transpose()?;
                Ok((main, preempt))
            }
            (Some(main), _) => Ok((main, None)),
            (None, None) => Err(ReachError::Fd(-1, io::ErrorKind::InvalidInput.into())),
        }
    }

    /// QEMU's process, as far as it can be found.
    fn guest(&self, main: &OwnedFd) -> Result<Box<dyn Guest + Send>, ReachError> {
        let pid = match (self.pid.and_then(Pid::from_raw), &self.socket.connect, &self.qmp) {
            (Some(pid), _, _) => Some(pid),
            (None, Some(_listening), _) => peer(main),
            (None, None, Some(qmp)) => peer(&connect(qmp)?),
            (None, None, None) => None,
        };
        match pid {
            Some(pid) => {
                let number = pid.as_raw_nonzero().get();
                let pidfd = pidfd_open(pid, PidfdFlags::empty());
                let pidfd = pidfd.map_err(|error| ReachError::Process(number, error.into()))?;
                Ok(Box::new(ProcessGuest::new(number, pidfd)))
            }
            None if self.clone.on_failure == OnFailure::Hold => Ok(Box::new(UnknownGuest)),
            None => Err(ReachError::NoProcess),
        }
    }
}

/// Has QEMU listen on `path` for the new source of its paused migration.
fn listen_again(qmp: &Path, path: &Path) -> Result<(), ReachError> {
    let mut monitor = Qmp::connect(qmp, PATIENCE)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = monitor.execute("query-migrate", json!({}))?;
        let status = answer["status"].as_str().unwrap_or("not there").to_owned();
        if status == "postcopy-paused" {
            break;
        }
        if Instant::now() >= deadline || matches!(status.as_str(), "completed" | "failed") {
            return Err(ReachError::NotPaused { status });
        }
        std::thread::sleep(LOOK);
    }
    let path = std::path::absolute(path).map_err(|error| ReachError::Connect(path.into(), error))?;
    monitor.execute("migrate-recover", json!({ "uri": format!("unix:{}", path.display()) }))?;
    Ok(())
}

/// Connects, also when QEMU is about to be started.
fn connect(path: &Path) -> Result<OwnedFd, ReachError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => return Ok(socket.into()),
            Err(error) if Instant::now() >= deadline => return Err(ReachError::Connect(path.into(), error)),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                std::thread::sleep(LOOK);
            }
            Err(error) => return Err(ReachError::Connect(path.into(), error)),
        }
    }
}

/// The process that listens at the other end of a connection.
fn peer(socket: impl AsFd) -> Option<Pid> {
    socket_peercred(socket).ok().map(|credentials| credentials.pid)
}

/// A guest that is to be held in any case.
struct UnknownGuest;

impl UnknownGuest {
    fn unknown(operation: &'static str) -> GuestError {
        let source = io::Error::from(io::ErrorKind::Unsupported);
        GuestError { operation, guest: "a QEMU whose process is not known".to_owned(), source }
    }
}

impl Guest for UnknownGuest {
    fn watch(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }

    fn ready(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        Err(Self::unknown("stopping"))
    }

    fn kill(&mut self) -> Result<(), GuestError> {
        Err(Self::unknown("killing"))
    }
}
