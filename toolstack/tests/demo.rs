//! The demonstration from end to end, with its page server and pagers as processes of their own: that it verifies what it
//! says, and that nothing is left behind however it ends.
//!
//! Each test runs the real command in folders of its own, so that what is left behind is seen and tests do not meet.
#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// Long enough for any step on a machine that does much else.
const LONG: Duration = Duration::from_secs(120);

/// Large enough that clones are still at work when a test has found them.
const LARGE: &str = "512";

const NOBODY: u32 = 65534;

/// The folders of a test.
struct Place {
    runs: TempDir,
    scratch: TempDir,
}

impl Place {
    fn new() -> Self {
        // Short paths, for sockets; `TMPDIR` may be anything.
        let folder = || tempfile::tempdir_in("/tmp").unwrap();
        Self { runs: folder(), scratch: folder() }
    }

    fn snowflock<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snowflock"));
        command.args(arguments).env("XDG_RUNTIME_DIR", self.runs.path()).env("TMPDIR", self.scratch.path());
        command
    }

    /// A demonstration under way, once its clones are at work.
    fn large_demo(&self) -> (Child, Value) {
        let mut command = self.snowflock(["demo", "--clones", "2", "--mem", LARGE]);
        let mut demo = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let began = Instant::now();
        loop {
            if let Some(run) = self.run_report() {
                return (demo, run);
            }
            assert!(demo.try_wait().unwrap().is_none(), "the demonstration ended before its clones were at work");
            assert!(began.elapsed() < LONG, "no clones within {LONG:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What the only run here says of itself.
    fn run_report(&self) -> Option<Value> {
        let run = fs::read_dir(self.runs.path().join("snowflock")).ok()?.next()?.ok()?.path();
        serde_json::from_slice(&fs::read(run.join("run.json")).ok()?).ok()
    }

    fn assert_nothing_left(&self) {
        for folder in [self.runs.path().join("snowflock"), self.scratch.path().to_owned()] {
            let left: Vec<PathBuf> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
            assert!(left.is_empty(), "left behind: {left:?}");
        }
    }
}

/// The processes of a run.
fn processes(run: &Value) -> Vec<u32> {
    let pid = |value: &Value| u32::try_from(value["pid"].as_u64().unwrap()).unwrap();
    let clones = run["clones"].as_array().unwrap().iter().map(pid);
    clones.chain([pid(&run["server"])]).collect()
}

fn assert_gone(pids: &[u32]) {
    let began = Instant::now();
    // A process whose parent was killed is reaped by init, in its own time: a zombie is as good as gone.
    let runs = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.starts_with(" Z"))
    };
    while let Some(pid) = pids.iter().find(|pid| runs(pid)) {
        assert!(began.elapsed() < LONG, "process {pid} is left behind");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn send(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Whether the kernel has what the demonstration needs; says aloud if not.
fn can_run(test: &str) -> bool {
    let uring = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let reason = match memtap::port::uffd::Userfaultfd::open() {
        Err(error) => error.to_string(),
        Ok(_) if uring.trim() == "2" => "io_uring is disabled (kernel.io_uring_disabled)".to_owned(),
        Ok(_) => return true,
    };
    // Not by the macro, whose text the test harness would keep to itself.
    let _ = writeln!(io::stderr(), "SKIPPED {test}: {reason}");
    false
}

fn assert_verified(output: &Output, clones: u64, mib: u64) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(result["clones"], clones);
    assert_eq!(result["image_mib"], mib);
    assert_eq!(result["verified"], true);
    assert_eq!(result["pages_verified"], clones * mib * 256);
    for number in ["/first_touch_ms/p50", "/first_touch_ms/max", "/fault_us/p50", "/fault_us/p99", "/bytes_sent"] {
        assert!(result.pointer(number).is_some_and(Value::is_number), "{number} in {result}");
    }
    // The image is to 60 % data; what a clone gave up before it came need not travel.
    let (fetched, avoided) = (result["pages_fetched"].as_u64().unwrap(), result["pages_avoided"].as_u64().unwrap());
    assert!(fetched > clones * mib * 256 / 3 && avoided > clones * mib * 256 / 5, "{result}");
    result
}

#[test]
fn every_lane_brings_every_page() {
    if !can_run("every_lane_brings_every_page") {
        return;
    }
    for lane in ["tcp", "unix", "local"] {
        let place = Place::new();
        let mut demo = place.snowflock(["demo", "--clones", "2", "--mem", "32", "--json", "--lane", lane]);
        let result = assert_verified(&demo.output().unwrap(), 2, 32);
        let bytes = result["bytes_sent"].as_u64().unwrap();
        assert_eq!(bytes == 0, lane == "local", "pages come through sockets except by the local lane: {result}");
        place.assert_nothing_left();
    }
}

#[test]
fn one_answer_serves_every_clone_by_multicast() {
    if !can_run("one_answer_serves_every_clone_by_multicast") {
        return;
    }
    let place = Place::new();
    let mut demo = place.snowflock(["demo", "--clones", "4", "--mem", "32", "--json", "--multicast"]);
    let result = assert_verified(&demo.output().unwrap(), 4, 32);
    let bytes = |name: &str| result[name].as_u64().unwrap();
    assert!(bytes("bytes_multicast") > 0, "nothing was multicast: {result}");
    // To 60 % data: four copies of it are 77 MiB.
    assert!(bytes("bytes_sent") < 60 << 20, "as much as by unicast: {result}");
    place.assert_nothing_left();

    let usage = place.snowflock(["demo", "--multicast=10.0.0.1:7071"]).output().unwrap();
    assert_eq!(usage.status.code(), Some(2), "no group: {}", text(&usage.stderr));
}

#[test]
fn it_needs_no_privilege() {
    if !can_run("it_needs_no_privilege") {
        return;
    }
    let place = Place::new();
    let mut demo = place.snowflock(["demo", "--clones", "2", "--mem", "16", "--json"]);
    if rustix::process::geteuid().is_root() {
        for folder in [&place.runs, &place.scratch] {
            chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        demo.uid(NOBODY).gid(NOBODY);
    }
    match demo.output() {
        Ok(output) => drop(assert_verified(&output, 2, 16)),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let reason = "another user may not execute the program where it lies";
            let _ = writeln!(io::stderr(), "SKIPPED it_needs_no_privilege: {reason}");
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn people_get_a_table() {
    if !can_run("people_get_a_table") {
        return;
    }
    let output = Place::new().snowflock(["demo", "--clones", "1", "--mem", "8"]).output().unwrap();
    let table = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for word in ["first touch after", "fault, median", "pages fetched", "Every page of every clone is right."] {
        assert!(table.contains(word), "{word:?} in {table}");
    }
}

#[test]
fn ctrl_c_leaves_nothing() {
    if !can_run("ctrl_c_leaves_nothing") {
        return;
    }
    let place = Place::new();
    let (demo, run) = place.large_demo();
    send(demo.id(), Signal::INT);
    let output = demo.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("interrupted by SIGINT"));
    assert_gone(&processes(&run));
    place.assert_nothing_left();
}

#[test]
fn a_killed_pager_is_a_failure_that_is_named() {
    if !can_run("a_killed_pager_is_a_failure_that_is_named") {
        return;
    }
    let place = Place::new();
    let (demo, run) = place.large_demo();
    let pids = processes(&run);
    send(pids[0], Signal::KILL);
    let output = demo.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("memtap of clone 1 was killed by SIGKILL"), "{}", text(&output.stderr));
    assert_gone(&pids);
    place.assert_nothing_left();
}

/// Nothing of this program runs any more when it is killed; but its children die with it, and the next run sweeps its folder.
#[test]
fn a_killed_toolstack_takes_its_children_along() {
    if !can_run("a_killed_toolstack_takes_its_children_along") {
        return;
    }
    let place = Place::new();
    let (mut demo, run) = place.large_demo();
    let status = place.snowflock(["status", "--json"]).output().unwrap();
    let runs: Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(runs[0]["run"]["command"], "demo");
    assert_eq!(runs[0]["run"]["clones"][1]["name"], "clone-2");
    assert!(text(&place.snowflock(["status"]).output().unwrap().stdout).contains("clone-2"));

    demo.kill().unwrap();
    demo.wait().unwrap();
    assert_gone(&processes(&run));
    assert_eq!(text(&place.snowflock(["status"]).output().unwrap().stdout), "nothing runs\n");
    let next = place.snowflock(["demo", "--clones", "1", "--mem", "16", "--json"]).output().unwrap();
    assert_verified(&next, 1, 16);
    // The next run has swept what the killed one left.
    place.assert_nothing_left();
}

#[test]
fn wrong_arguments_are_refused() {
    let place = Place::new();
    let wrong: [&[&str]; 8] = [
        &[],
        &["demo", "--clones", "0"],
        &["demo", "--lane", "pigeon"],
        &["nonsense"],
        &["fork", "qemu", "--qmp", "/x"],
        &["fork", "qemu", "--qmp", "/x", "--", "qemu", "-incoming", "defer"],
        &["run", "qemu", "--descriptor", "/x", "--name", "a,b", "--", "qemu"],
        &["capture", "qemu", "--qmp", "/x", "-o", "/x", "--method", "magic"],
    ];
    for arguments in wrong {
        let output = place.snowflock(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", text(&output.stderr));
        assert!(!output.stderr.is_empty(), "{arguments:?}");
    }
}

#[test]
fn a_place_that_others_may_write_to_is_refused() {
    let place = Place::new();
    let runs = place.runs.path().join("snowflock");
    fs::create_dir(&runs).unwrap();
    fs::set_permissions(&runs, fs::Permissions::from_mode(0o777)).unwrap();
    let output = place.snowflock(["demo", "--mem", "1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("is not a directory of yours alone"), "{}", text(&output.stderr));
}

#[test]
fn the_roles_are_the_commands_of_their_names() {
    for role in ["memserver", "memtap", "descriptor"] {
        let output = Place::new().snowflock([role, "--help"]).output().unwrap();
        assert!(output.status.success());
        assert!(text(&output.stdout).contains(&format!("Usage: {role}")), "{}", text(&output.stdout));
    }
    let help = Place::new().snowflock(["fork", "qemu", "--help"]).output().unwrap();
    assert!(text(&help.stdout).contains("{vmgenid}"));
}
