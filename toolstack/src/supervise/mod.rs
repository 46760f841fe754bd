//! Supervision of child processes: started, watched, and ended together.
//!
//! Every child runs in a process group of its own, so that Ctrl-C on a terminal reaches this process alone, which then ends
//! its children in order: guests before pagers before servers, each asked by SIGTERM, given a grace, then killed; for a paused
//! QEMU ignores SIGTERM. Should this process itself be killed, the kernel kills the children, and asks pagers to fail their guests.

mod child;
mod error;
mod run_dir;
mod sys;

use std::io::Read;
use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

use self::child::Child;
pub use self::child::{ChildSpec, Output, Role};
pub use self::error::{End, LogTail, SuperviseError};
pub use self::run_dir::{RunDir, RunDirError, runs};
use crate::interrupt::Interrupt;

/// How long a child may take to end after SIGTERM. memserver drains within a second; a running QEMU quits at once.
const GRACE: Duration = Duration::from_secs(3);

/// The longest `ready` line; it names a few endpoints.
const READY_LINE_MAX: usize = 4096;

/// The children of one run. They are ended when it is dropped.
///
/// It stays on its thread, for the kernel ties the life of a child to the thread that started it.
pub struct Supervisor {
    children: Vec<Child>,
    interrupt: Interrupt,
    _on_one_thread: PhantomData<*const ()>,
}

/// One of a supervisor's children.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChildId(usize);

/// What a supervisor waited for.
#[derive(Debug)]
pub enum Event {
    /// A child ended; told once for each.
    Ended(ChildId, ExitStatus),
    /// The time is over.
    TimedOut,
}

impl Supervisor {
    /// A supervisor without children, which gives up where `interrupt` asks for it.
    pub fn new(interrupt: Interrupt) -> Self {
        Self { children: Vec::new(), interrupt, _on_one_thread: PhantomData }
    }

    /// Starts a child. What it prints goes to its log.
    ///
    /// # Errors
    /// When its log cannot be made or its program not be run.
    pub fn start(&mut self, spec: ChildSpec) -> Result<ChildId, SuperviseError> {
        self.children.push(Child::start(spec)?);
        Ok(ChildId(self.children.len() - 1))
    }

    /// The process id of a child, as text for command lines and manifests has it.
    pub fn pid(&self, id: ChildId) -> u32 {
        self.children[id.0].pid()
    }

    /// The name of a child, for people.
    pub fn name(&self, id: ChildId) -> &str {
        &self.children[id.0].name
    }

    /// Waits for the line `ready …` that a child prints, and gives what follows the word. The child must have been started
    /// with [`Output::Ready`].
    ///
    /// # Errors
    /// When the child ends, says something else or nothing within `patience`, or when a signal comes.
    pub fn wait_ready(&mut self, id: ChildId, patience: Duration) -> Result<String, SuperviseError> {
        let deadline = Instant::now() + patience;
        let mut line = Vec::new();
        loop {
            let child = &mut self.children[id.0];
            let Some(output) = child.ready_line.as_mut() else {
                return Err(child.failed());
            };
            wait_readable(&[output.as_fd(), self.interrupt.as_fd()], deadline);
            if let Some(signal) = self.interrupt.take() {
                return Err(SuperviseError::Interrupted(signal));
            }
            let mut byte = [0; 1];
            match output.read(&mut byte) {
                Ok(1) if byte != *b"\n" && line.len() < READY_LINE_MAX => line.push(byte[0]),
                Ok(1) => break,
                Ok(_) => return Err(child.failed()),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    if Instant::now() >= deadline {
                        return Err(child.not_ready(patience));
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return Err(child.failed()),
            }
        }
        let line = String::from_utf8_lossy(&line).into_owned();
        match line.strip_prefix("ready") {
            Some(rest) => Ok(rest.trim().to_owned()),
            None => Err(self.children[id.0].not_a_ready_line(line)),
        }
    }

    /// Waits until a child ends or `timeout` is over.
    ///
    /// # Errors
    /// When a signal asks this process to end.
    pub fn wait(&mut self, timeout: Duration) -> Result<Event, SuperviseError> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(signal) = self.interrupt.take() {
                return Err(SuperviseError::Interrupted(signal));
            }
            for (index, child) in self.children.iter_mut().enumerate() {
                if let Some(status) = child.ended_now() {
                    return Ok(Event::Ended(ChildId(index), status));
                }
            }
            if Instant::now() >= deadline {
                return Ok(Event::TimedOut);
            }
            let mut fds = vec![self.interrupt.as_fd()];
            fds.extend(self.children.iter().filter(|child| child.is_running()).map(|child| child.pidfd()));
            wait_readable(&fds, deadline);
        }
    }

    /// Waits for `time`, whatever happens to the children meanwhile.
    ///
    /// # Errors
    /// When a signal asks this process to end.
    pub fn pause(&mut self, time: Duration) -> Result<(), SuperviseError> {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            wait_readable(&[self.interrupt.as_fd()], deadline);
            if let Some(signal) = self.interrupt.take() {
                return Err(SuperviseError::Interrupted(signal));
            }
        }
        Ok(())
    }

    /// The error that says how a child ended, with the end of its log.
    pub fn failure(&mut self, id: ChildId) -> SuperviseError {
        self.children[id.0].failed()
    }

    /// The error that says that a child did not get ready in time.
    pub fn not_ready(&self, id: ChildId, patience: Duration) -> SuperviseError {
        self.children[id.0].not_ready(patience)
    }

    /// The error that says that a child said something else than that it is ready.
    pub fn not_a_ready_line(&self, id: ChildId, line: String) -> SuperviseError {
        self.children[id.0].not_a_ready_line(line)
    }

    /// Ends the children of a role: SIGTERM, a grace, SIGKILL. A further signal to this process cuts the grace short.
    pub fn stop(&mut self, role: Role) {
        let mut children: Vec<&mut Child> =
            self.children.iter_mut().filter(|child| child.role == role && child.is_running()).collect();
        for child in &children {
            child.signal(Signal::TERM);
        }
        let deadline = Instant::now() + GRACE;
        loop {
            children.retain_mut(|child| child.ended_now().is_none() && child.is_running());
            if children.is_empty() || Instant::now() >= deadline {
                break;
            }
            let mut fds = vec![self.interrupt.as_fd()];
            fds.extend(children.iter().map(|child| child.pidfd()));
            wait_readable(&fds, deadline);
            if self.interrupt.take().is_some() {
                break;
            }
        }
        for child in children {
            child.kill();
        }
    }

    /// Ends all children, guests first, then pagers, then servers.
    pub fn stop_all(&mut self) {
        for role in [Role::Guest, Role::Pager, Role::Server] {
            self.stop(role);
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.stop_all();
    }
}

/// This program in one of its roles.
pub fn own_command(role: &str) -> Command {
    // The link follows the program also when its file was replaced meanwhile, as an update does.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("snowflock").arg(role);
    command
}

/// Waits until one of `fds` is readable, or until `deadline`; may return early.
fn wait_readable(fds: &[std::os::fd::BorrowedFd<'_>], deadline: Instant) {
    let mut fds: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    let left = deadline.saturating_duration_since(Instant::now());
    // Timespec takes any duration that a deadline can have; should it not, a short wait is right too.
    let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
    // EINTR is an early return; any other error of poll shows in what the caller does next.
    let _ = poll(&mut fds, Some(&left));
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use tempfile::TempDir;

    use super::*;

    /// Generous: the machine may be busy with other tests.
    const PATIENCE: Duration = Duration::from_secs(60);

    struct Run {
        supervisor: Supervisor,
        dir: TempDir,
    }

    impl Run {
        fn new() -> Self {
            Self { supervisor: Supervisor::new(Interrupt::none().unwrap()), dir: tempfile::tempdir().unwrap() }
        }

        fn shell(&mut self, script: &str, output: Output) -> ChildId {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", script]);
            let log = self.dir.path().join("log");
            let (name, role) = ("the child".to_owned(), Role::Guest);
            let spec = ChildSpec { name, role, command, log, output, fds: Vec::new() };
            self.supervisor.start(spec).unwrap()
        }
    }

    fn is_there(pid: u32) -> bool {
        std::path::Path::new(&format!("/proc/{pid}")).exists()
    }

    #[test]
    fn a_ready_line_is_awaited_and_a_stop_ends_the_child() {
        let mut run = Run::new();
        let child = run.shell("echo ready tcp://127.0.0.1:7 unix:/x; exec sleep 1000", Output::Ready);
        assert_eq!(run.supervisor.wait_ready(child, PATIENCE).unwrap(), "tcp://127.0.0.1:7 unix:/x");
        let pid = run.supervisor.pid(child);
        assert!(is_there(pid));
        run.supervisor.stop_all();
        assert!(!is_there(pid));
    }

    #[test]
    fn a_child_that_ignores_sigterm_is_killed_when_dropped() {
        let mut run = Run::new();
        let child = run.shell("trap '' TERM; echo ready; exec sleep 1000", Output::Ready);
        run.supervisor.wait_ready(child, PATIENCE).unwrap();
        let pid = run.supervisor.pid(child);
        drop(run.supervisor);
        assert!(!is_there(pid));
    }

    #[test]
    fn a_failed_child_shows_the_end_of_its_log() {
        let mut run = Run::new();
        let child = run.shell("echo it did not work >&2; exit 3", Output::Ready);
        let error = run.supervisor.wait_ready(child, PATIENCE).unwrap_err().to_string();
        assert_eq!(error, "the child ended with exit code 3; the end of its log:\n    | it did not work");
    }

    #[test]
    fn a_child_that_is_not_ready_or_says_something_else_is_an_error() {
        let mut run = Run::new();
        let silent = run.shell("exec sleep 1000", Output::Ready);
        let error = run.supervisor.wait_ready(silent, Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, SuperviseError::NotReady { .. }), "{error}");
        let chatty = run.shell("echo hello; exec sleep 1000", Output::Ready);
        let error = run.supervisor.wait_ready(chatty, PATIENCE).unwrap_err();
        assert!(matches!(error, SuperviseError::NotAReadyLine { ref line, .. } if line == "hello"), "{error}");
    }

    #[test]
    fn ends_are_told_once_each() {
        let mut run = Run::new();
        let (well, killed) = (run.shell("exit 0", Output::Log), run.shell("kill -9 $$", Output::Log));
        let mut ends = Vec::new();
        while let Event::Ended(child, status) = run.supervisor.wait(PATIENCE).unwrap() {
            ends.push((child, status.into_raw()));
            if ends.len() == 2 {
                break;
            }
        }
        ends.sort_by_key(|(child, _)| child.0);
        assert_eq!(ends, [(well, 0), (killed, 9)]);
        assert!(matches!(run.supervisor.wait(Duration::ZERO).unwrap(), Event::TimedOut));
    }

    #[test]
    fn descriptors_are_handed_over() {
        let mut run = Run::new();
        let (_ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&theirs));
        let socket = std::fs::read_link(&path).unwrap();
        let mut command = Command::new("readlink");
        command.arg(path);
        let (name, log) = ("the child".to_owned(), run.dir.path().join("log"));
        let fds = vec![theirs.into()];
        let spec = ChildSpec { name, role: Role::Pager, command, log, output: Output::Log, fds };
        run.supervisor.start(spec).unwrap();
        assert!(matches!(run.supervisor.wait(PATIENCE).unwrap(), Event::Ended(_, status) if status.success()));
        let said = std::fs::read_to_string(run.dir.path().join("log")).unwrap();
        assert_eq!(said.trim_end(), socket.to_str().unwrap());
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let mut run = Run::new();
        let (name, log) = ("clone 1".to_owned(), run.dir.path().join("log"));
        let command = Command::new("/nowhere/qemu");
        let spec = ChildSpec { name, role: Role::Guest, command, log, output: Output::Log, fds: Vec::new() };
        let error = run.supervisor.start(spec).unwrap_err();
        assert_eq!(error.to_string(), "cannot start clone 1: \"/nowhere/qemu\" does not run");
    }
}
