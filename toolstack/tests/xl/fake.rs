//! A folder with a script that stands in for xl, and what it is asked to do.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// What `xl save` of Xen 4.17 wrote of a PVH guest, but for most of its pages.
const STREAM: &[u8] = include_bytes!("../../../descriptor/tests/data/xen-4.17-pvh.xl");

const SCRIPT: &str = include_str!("fake-xl.sh");

/// The letters of a domain that runs.
pub(crate) const RUNNING: &str = "-b----";

/// Generous: the machine may be busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);

/// A Xen host with one domain, `web`.
pub(crate) struct Fake {
    host: TempDir,
    captures: TempDir,
}

impl Fake {
    pub(crate) fn new() -> Self {
        // Short paths, for sockets; `TMPDIR` may be anything.
        let folder = || tempfile::tempdir_in("/tmp").unwrap();
        let fake = Self { host: folder(), captures: folder() };
        fs::write(fake.xl(), SCRIPT).unwrap();
        fs::set_permissions(fake.xl(), Permissions::from_mode(0o755)).unwrap();
        fs::write(fake.host.path().join("stream"), STREAM).unwrap();
        fake.set_state(RUNNING);
        fake.set_config("");
        fake
    }

    pub(crate) fn stream(&self) -> &'static [u8] {
        STREAM
    }

    /// Has xl behave otherwise; see the script.
    pub(crate) fn behave(&self, how: &str) {
        fs::write(self.host.path().join(how), "").unwrap();
    }

    /// Gives the domain these devices, as xl keeps them.
    pub(crate) fn set_config(&self, devices: &str) {
        let config = format!(r#"{{"c_info": {{"name": "web"}}, "b_info": {{"max_vcpus": 1}} {devices}}}"#);
        fs::write(self.host.path().join("config.json"), format!(r#"[{{"domid": 3, "config": {config}}}]"#)).unwrap();
    }

    /// What a clone was restored from: a configuration, or a stream.
    pub(crate) fn restored_from(&self, clone: &str) -> Vec<u8> {
        fs::read(self.host.path().join(format!("restored-{clone}"))).unwrap()
    }

    /// The numbers of the domains that were destroyed.
    pub(crate) fn destroyed(&self) -> Vec<String> {
        let text = fs::read_to_string(self.host.path().join("destroyed")).unwrap_or_default();
        let mut numbers: Vec<String> = text.lines().map(str::to_owned).collect();
        numbers.sort();
        numbers
    }

    /// Whether there are clones.
    pub(crate) fn has_clones(&self) -> bool {
        !paths(&self.host.path().join("clones")).is_empty()
    }

    /// A file in the folder of the captures.
    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.captures.path().join(name), text).unwrap();
    }

    pub(crate) fn set_state(&self, letters: &str) {
        fs::write(self.host.path().join("state"), letters).unwrap();
    }

    pub(crate) fn state(&self) -> String {
        fs::read_to_string(self.host.path().join("state")).unwrap().trim_end().to_owned()
    }

    /// The `snowflock` command, in the folder of the captures.
    pub(crate) fn snowflock(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snowflock"));
        let path = format!("{}:{}", self.host.path().display(), std::env::var("PATH").unwrap());
        command.args(arguments).env("PATH", path).env("XDG_RUNTIME_DIR", self.host.path());
        command.env("TMPDIR", self.host.path());
        command.current_dir(self.captures.path()).stdin(Stdio::null());
        command
    }

    /// `snowflock capture xl web -o web` and more.
    pub(crate) fn capture(&self, arguments: &[&str]) -> Command {
        let mut command = self.snowflock(&["capture", "xl", "web", "-o", "web"]);
        command.args(arguments);
        command
    }

    pub(crate) fn start(&self, arguments: &[&str]) -> Running {
        Running(self.capture(arguments).stderr(Stdio::null()).spawn().unwrap())
    }

    pub(crate) fn capture_file(&self, extension: &str) -> PathBuf {
        self.captures.path().join("web").with_extension(extension)
    }

    /// What lies in the folder of the captures.
    pub(crate) fn files(&self) -> Vec<String> {
        let names =
            paths(self.captures.path()).into_iter().filter_map(|path| path.file_name()?.to_str().map(str::to_owned));
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    /// The bytes of a stream that is being taken.
    pub(crate) fn taken(&self) -> u64 {
        paths(self.captures.path()).iter().filter_map(|path| Some(fs::metadata(path).ok()?.len())).max().unwrap_or(0)
    }

    /// Whether an xl of this host is still at work.
    pub(crate) fn is_busy(&self) -> bool {
        let xl = self.xl();
        let of_this_host = |process: &Path| {
            let words = fs::read(process.join("cmdline")).unwrap_or_default();
            words.split(|byte| *byte == 0).any(|word| word == xl.as_os_str().as_encoded_bytes())
        };
        paths(Path::new("/proc")).iter().any(|process| of_this_host(process))
    }

    pub(crate) fn wait_for(&self, what: &str, mut come: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !come() {
            assert!(Instant::now() < deadline, "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn xl(&self) -> PathBuf {
        self.host.path().join("xl")
    }
}

/// A capture under way.
pub(crate) struct Running(Child);

impl Running {
    pub(crate) fn interrupt(&mut self) {
        kill_process(Pid::from_child(&self.0), Signal::INT).unwrap();
    }

    pub(crate) fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    pub(crate) fn end(&mut self) -> ExitStatus {
        self.0.wait().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn paths(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}
