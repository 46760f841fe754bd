//! A network namespace without a name: it lives as long as its thread, and the processes that were started in it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use rustix::process::getpid;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process::Process;
use crate::{NetworkError, sys};

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace and the thread that holds it.
#[derive(Debug)]
pub(crate) struct Namespace {
    file: OwnedFd,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Namespace {
    /// A new one, with a thread of this name.
    pub(crate) fn new(name: &str) -> Result<Self, NetworkError> {
        let (jobs, queue) = channel::<Job>();
        let (sender, made) = channel();
        let work = move || {
            let file = sys::unshare_network().and_then(|()| File::open("/proc/thread-self/ns/net"));
            // Whoever waits for it is there until it came.
            let _ = sender.send(file);
            while let Ok(job) = queue.recv() {
                job();
            }
        };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work);
        let thread = thread.map_err(|error| NetworkError::Kernel("start a thread", error))?;
        let made = made.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()));
        let file = made.map_err(|error| NetworkError::Kernel("make a network namespace", error))?;
        Ok(Self { file: file.into(), jobs: Some(jobs), thread: Some(thread) })
    }

    /// Where other programs find it.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", getpid().as_raw_nonzero(), self.file.as_raw_fd())
    }

    /// Moves the calling thread, and what it starts from now on, into the namespace.
    pub(crate) fn enter(&self) -> Result<(), NetworkError> {
        let moved = move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network));
        moved.map_err(|error| NetworkError::Kernel("enter a network namespace", error.into()))
    }

    /// Does something short on the namespace's own thread.
    ///
    /// # Panics
    /// When the job does.
    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, done) = channel();
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(Box::new(move || drop(sender.send(job()))));
        }
        done.recv().expect("a job in the namespace panicked")
    }

    /// Starts a process that dies with the namespace.
    pub(crate) fn spawn(&self, mut command: Command) -> Result<Process, NetworkError> {
        let name = command.get_program().to_string_lossy().into_owned();
        let parent = getpid();
        let spawned = self.run(move || {
            // The namespace's thread is the one that starts it: it lives long enough.
            sys::die_with_thread(&mut command, parent);
            command.spawn()
        });
        spawned.map(Process::new).map_err(|error| NetworkError::Program(name, error))
    }

    /// Runs a program that reads its orders from standard input, and waits for its success.
    pub(crate) fn order(&self, program: &[&str], orders: &str) -> Result<(), NetworkError> {
        let name = program.join(" ");
        let failed = |error| NetworkError::Program(name.clone(), error);
        let mut command = Command::new(program[0]);
        command.args(&program[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.run(move || command.spawn()).map_err(failed)?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(orders.as_bytes()).map_err(failed)?;
        }
        let output = child.wait_with_output().map_err(failed)?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        Err(NetworkError::Failed { program: name, said: format!("{said}; it was told:\n{orders}") })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
