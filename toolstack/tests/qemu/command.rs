//! The processes of a test: the command and its parts, in folders of their own, and none that outlives the test.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use toolstack::RunReport;

use crate::poll;

/// The folders of a test.
pub(crate) struct Place {
    runs: TempDir,
    scratch: TempDir,
    logs: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        // Short paths, for sockets; `TMPDIR` may be anything.
        let folder = || tempfile::tempdir_in("/tmp").unwrap();
        Self { runs: folder(), scratch: folder(), logs: folder() }
    }

    /// The `snowflock` command with these arguments, its runs in this place.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snowflock"));
        command.args(arguments).env("XDG_RUNTIME_DIR", self.runs.path()).env("TMPDIR", self.logs.path());
        command.stdin(Stdio::null());
        command
    }

    /// A folder for large files.
    pub(crate) fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// Starts `command` with a log named `name`.
    pub(crate) fn spawn(&self, name: &str, mut command: Command) -> Killed {
        let log = File::create(self.log(name)).unwrap();
        Killed::start(command.stdout(log.try_clone().unwrap()).stderr(log))
    }

    pub(crate) fn assert_nothing_left(&self) {
        let left = files(&self.runs.path().join("snowflock"));
        assert!(left.is_empty(), "left behind: {left:?}");
    }

    /// A log for a process that is started elsewhere.
    pub(crate) fn log_file(&self, name: &str) -> File {
        File::create(self.log(name)).unwrap()
    }

    fn log(&self, name: &str) -> PathBuf {
        self.logs.path().join(format!("{name}.log"))
    }

    /// The directory of the run that lives here, when it has told of itself.
    fn run_dir(&self) -> Option<PathBuf> {
        files(&self.runs.path().join("snowflock")).into_iter().find(|run| run.join("run.json").exists())
    }
}

impl Drop for Place {
    /// A test that failed shows what everybody logged.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let runs = files(&self.runs.path().join("snowflock"));
        let folders = runs.into_iter().flat_map(|run| [vec![run.clone()], files(&run)].concat());
        let logs = folders.chain([self.logs.path().to_owned()]).flat_map(|folder| files(&folder));
        for log in logs.filter(|file| file.extension().is_some_and(|extension| extension == "log")) {
            let text = String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            println!("---- {}\n{}", log.display(), lines[lines.len().saturating_sub(30)..].join("\n"));
        }
    }
}

/// A child that does not outlive its test.
pub(crate) struct Killed(Child);

impl Killed {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A `snowflock fork` or `snowflock run` under way. Its children die with it.
pub(crate) struct Run<'a> {
    place: &'a Place,
    process: Killed,
}

impl<'a> Run<'a> {
    pub(crate) fn start(place: &'a Place, command: Command) -> Self {
        Self { place, process: place.spawn("snowflock", command) }
    }

    /// Waits until the run's report pleases, and gives it.
    pub(crate) fn wait(&mut self, what: &str, mut pleases: impl FnMut(&RunReport) -> bool) -> RunReport {
        let mut last = None;
        let found = poll(|| {
            assert!(self.process.is_running(), "the run ended; awaited: {what}; it said: {}", self.said());
            let text = fs::read(self.place.run_dir()?.join("run.json")).ok()?;
            let report: RunReport = serde_json::from_slice(&text).ok()?;
            let found = pleases(&report).then(|| report.clone());
            last = Some(report);
            found
        });
        found.unwrap_or_else(|| panic!("awaited in vain: {what}; the last report: {last:#?}"))
    }

    /// Waits for its end; what it said meanwhile.
    pub(crate) fn end(mut self) -> (ExitStatus, String) {
        let status = poll(|| self.process.0.try_wait().unwrap());
        (status.unwrap_or_else(|| panic!("the run does not end; it said: {}", self.said())), self.said())
    }

    /// Ends it as Ctrl-C does, which leaves no process of it behind.
    pub(crate) fn interrupt(mut self) {
        let report = self.wait("a report", |_| true);
        let mut pids: Vec<u32> = report.clones.iter().map(|clone| clone.pid).collect();
        pids.extend(report.clones.iter().filter_map(|clone| clone.pager_pid));
        pids.extend(report.server.map(|server| server.pid));
        signal(self.process.0.id(), Signal::INT);
        let (status, said) = self.end();
        assert_eq!(status.code(), Some(130), "{said}");
        pids.retain(|pid| Path::new(&format!("/proc/{pid}")).exists());
        assert!(pids.is_empty(), "processes are left behind: {pids:?}");
    }

    fn said(&self) -> String {
        fs::read_to_string(self.place.log("snowflock")).unwrap()
    }
}

/// A `memserver` for runs that have none.
pub(crate) struct Server {
    pub(crate) endpoint: String,
    _process: Killed,
}

impl Server {
    /// Serves the capture of this name, once it is ready.
    pub(crate) fn start(place: &Place, capture: &Path) -> Self {
        let mut command = place.command(["memserver", "serve", "--listen", "tcp://127.0.0.1:0", "--image"]);
        let log = File::create(place.log("memserver")).unwrap();
        command.arg(capture.with_extension("snowidx")).stdout(Stdio::piped()).stderr(log);
        let mut process = Killed::start(&mut command);
        let mut line = String::new();
        BufReader::new(process.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let endpoint = line.trim_end().strip_prefix("ready ").unwrap_or_else(|| panic!("memserver said {line:?}"));
        Self { endpoint: endpoint.to_owned(), _process: process }
    }
}

/// Kills a process that a run started.
pub(crate) fn kill(pid: u32) {
    signal(pid, Signal::KILL);
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), signal).unwrap();
}

fn files(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}
