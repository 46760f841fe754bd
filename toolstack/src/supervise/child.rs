use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{self, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};

use super::error::{End, LogTail, SuperviseError};
use super::{sys, wait_readable};

/// What a child does for a clone; children are ended in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs a guest, which may hang when its pager goes first.
    Guest,
    /// Pages for a guest.
    Pager,
    /// Serves pages to pagers.
    Server,
}

impl Role {
    /// What a child gets when this process dies.
    fn farewell(self) -> Signal {
        match self {
            // A guest that is no process, as a domain of Xen, has nobody but its pager to end it.
            Role::Pager => Signal::TERM,
            Role::Guest | Role::Server => Signal::KILL,
        }
    }
}

/// A child to be started.
pub struct ChildSpec {
    /// Its name for people, such as `memserver` or `clone 3`.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// Its program and arguments; standard input and output are set by the supervisor.
    pub command: Command,
    /// Where its standard error goes, appended.
    pub log: PathBuf,
    /// Where its standard output goes.
    pub output: Output,
    /// Descriptors that it inherits under the same numbers; this process's own are closed once it runs.
    pub fds: Vec<OwnedFd>,
}

/// Where a child's standard output goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Into its log.
    Log,
    /// To this process, which awaits one line that begins with `ready`; it prints nothing else.
    Ready,
    /// Into a file of its own.
    File(PathBuf),
}

/// How much of a log is looked at for its last lines.
const TAIL_BYTES: u64 = 4096;
const TAIL_LINES: usize = 12;

/// How long a child may take to end once it closed its output: enough on a busy machine.
const END_PATIENCE: Duration = Duration::from_secs(5);

pub(super) struct Child {
    pub(super) name: String,
    pub(super) role: Role,
    pub(super) ready_line: Option<ChildStdout>,
    process: process::Child,
    pidfd: OwnedFd,
    log: PathBuf,
    state: State,
}

#[derive(Clone, Copy)]
enum State {
    Running,
    Ended(ExitStatus),
}

impl Child {
    pub(super) fn start(spec: ChildSpec) -> Result<Self, SuperviseError> {
        let ChildSpec { name, role, mut command, log, output, fds } = spec;
        let log_error = |source| SuperviseError::Log { path: log.clone(), source };
        let errors = File::options().create(true).append(true).open(&log).map_err(log_error)?;
        let output = match output {
            Output::Log => errors.try_clone().map_err(log_error)?.into(),
            Output::Ready => Stdio::piped(),
            Output::File(path) => File::create(&path).map_err(|source| SuperviseError::Log { path, source })?.into(),
        };
        command.stdin(Stdio::null()).stdout(output).stderr(errors).process_group(0);
        sys::prepare(&mut command, getpid(), role.farewell(), fds);

        let program = command.get_program().to_string_lossy().into_owned();
        let start_error = |source| SuperviseError::Start { name: name.clone(), program: program.clone(), source };
        let mut process = command.spawn().map_err(start_error)?;
        let ready_line = process.stdout.take();
        match watch(&process, ready_line.as_ref()) {
            Ok(pidfd) => Ok(Self { name, role, ready_line, process, pidfd, log, state: State::Running }),
            Err(error) => {
                // Without a pidfd it cannot be watched, so it must not run. It is our child and not yet reaped.
                let _ = process.kill();
                let _ = process.wait();
                Err(start_error(error))
            }
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    pub(super) fn is_running(&self) -> bool {
        matches!(self.state, State::Running)
    }

    /// How it ended, if that has not been told yet.
    pub(super) fn ended_now(&mut self) -> Option<ExitStatus> {
        if !self.is_running() {
            return None;
        }
        let status = self.process.try_wait().ok().flatten()?;
        self.state = State::Ended(status);
        Some(status)
    }

    pub(super) fn signal(&self, signal: Signal) {
        // A process that has ended meanwhile is what was wanted.
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    pub(super) fn kill(&mut self) {
        if self.is_running() {
            self.signal(Signal::KILL);
            if let Ok(status) = self.process.wait() {
                self.state = State::Ended(status);
            }
        }
    }

    /// The error for a child that ended, or is about to.
    pub(super) fn failed(&mut self) -> SuperviseError {
        if self.is_running() {
            wait_readable(&[self.pidfd.as_fd()], Instant::now() + END_PATIENCE);
            self.ended_now();
        }
        let end = match self.state {
            State::Ended(status) => End(Some(status)),
            State::Running => End(None),
        };
        SuperviseError::Failed { name: self.name.clone(), end, log: self.log_tail() }
    }

    pub(super) fn not_ready(&self, patience: Duration) -> SuperviseError {
        SuperviseError::NotReady { name: self.name.clone(), patience, log: self.log_tail() }
    }

    pub(super) fn not_a_ready_line(&self, line: String) -> SuperviseError {
        SuperviseError::NotAReadyLine { name: self.name.clone(), line, log: self.log_tail() }
    }

    fn log_tail(&self) -> LogTail {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(&self.log)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
            let mut bytes = Vec::new();
            file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let first = lines.len().saturating_sub(TAIL_LINES);
        LogTail(lines[first..].iter().map(|line| line.trim_end().to_owned()).collect())
    }
}

fn watch(process: &process::Child, output: Option<&ChildStdout>) -> io::Result<OwnedFd> {
    if let Some(output) = output {
        rustix::io::ioctl_fionbio(output, true)?;
    }
    let pid = i32::try_from(process.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}
