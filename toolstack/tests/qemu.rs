//! A real Linux guest in an unmodified QEMU, forked by the command as a user would: clones run, the parent goes on, a killed
//! page server and a killed pager are replaced without a page lost, Ctrl-C leaves nothing behind.
//!
//! The guest and the QEMUs are those of `tests/lab`, at whose top the guest's lines and commands are listed.
#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// Long enough for a guest to boot on a machine that does much else.
const LONG: Duration = Duration::from_secs(240);

const CLONES: usize = 2;

/// The laboratory, where it was fetched.
fn lab(qemu: &str) -> Option<PathBuf> {
    let target = || {
        let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
        target.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"))
    };
    let lab = std::env::var_os("LAB_DIR").map_or_else(|| target().join("lab"), PathBuf::from);
    let needed = [format!("{qemu}/run"), "vmlinuz".to_owned(), "initramfs".to_owned(), "cmdline".to_owned()];
    needed.iter().all(|part| lab.join(part).exists()).then_some(lab)
}

/// The command line of the machine, whose console and log lie in `dir`.
fn machine(lab: &Path, qemu: &str, dir: &str) -> Vec<String> {
    let at = |part: &str| lab.join(part).display().to_string();
    let console = format!("socket,id=console,path={dir}/console,server=on,wait=off,logfile={dir}/console.log");
    let append = fs::read_to_string(lab.join("cmdline")).unwrap().trim().to_owned() + " guest_mib=64";
    let (program, kernel, initramfs) = (at(&format!("{qemu}/run")), at("vmlinuz"), at("initramfs"));
    let words = [
        &program,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-machine",
        "pc-i440fx-7.2",
        "-accel",
        "tcg",
        "-m",
        "192",
        "-chardev",
        &console,
        "-serial",
        "chardev:console",
        "-kernel",
        &kernel,
        "-initrd",
        &initramfs,
        "-append",
        &append,
    ];
    words.map(str::to_owned).to_vec()
}

/// A child that does not outlive its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < LONG, "{what}: not within {LONG:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The whole lines of a guest's console.
fn lines(log: &Path) -> Vec<String> {
    let text = fs::read_to_string(log).unwrap_or_default();
    let end = text.rfind('\n').map_or(0, |end| end + 1);
    text[..end].lines().map(str::to_owned).collect()
}

fn kill(pid: u64, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

fn is_there(pid: u64) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn forked(qemu: &str) {
    let Some(lab) = lab(qemu) else {
        let _ = writeln!(io::stderr(), "SKIPPED fork by {qemu}: tests/lab was not run, so there is no guest");
        return;
    };
    let place = || TempDir::new_in("/tmp").unwrap();
    let (parent_dir, runs, scratch) = (place(), place(), place());
    let qmp = parent_dir.path().join("qmp");
    let words = machine(&lab, qemu, &parent_dir.path().display().to_string());
    let mut parent = Command::new(&words[0]);
    parent.args(&words[1..]).arg("-qmp").arg(format!("unix:{},server=on,wait=off", qmp.display()));
    let mut parent = Killed(parent.stdin(Stdio::null()).spawn().unwrap());
    let console = parent_dir.path().join("console.log");
    wait_for("the parent's guest", || lines(&console).iter().any(|line| line.starts_with("READY")).then_some(()));

    let snowflock = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snowflock"));
        command.args(arguments).env("XDG_RUNTIME_DIR", runs.path()).env("TMPDIR", scratch.path());
        command
    };
    let mut fork =
        snowflock(&["fork", "qemu", "--clones", &CLONES.to_string(), "--name", "web-{id}", "--json", "--qmp"]);
    fork.arg(&qmp).arg("--").args(machine(&lab, qemu, "{dir}"));
    let mut fork = Killed(fork.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let mut states = BufReader::new(fork.0.stdout.take().unwrap()).lines();
    let run: Value = loop {
        let Some(line) = states.next() else {
            let error = io::read_to_string(fork.0.stderr.take().unwrap()).unwrap();
            panic!("the fork ended before its clones ran: {error}");
        };
        let run: Value = serde_json::from_str(&line.unwrap()).unwrap();
        if run["clones"].as_array().unwrap().iter().all(|clone| clone["state"] == "running") {
            break run;
        }
    };

    // Each clone goes on where the parent was, and so does the parent.
    let clones = run["clones"].as_array().unwrap();
    assert_eq!(clones.len(), CLONES);
    for (clone, name) in clones.iter().zip(["web-1", "web-2"]) {
        assert_eq!(clone["name"], name);
        let log = Path::new(clone["admin"].as_str().unwrap()).with_file_name("console.log");
        let ticks = wait_for("ticks of a clone", || Some(lines(&log)).filter(|lines| lines.len() >= 3));
        let is_right = |line: &String| line.starts_with("TICK") && line.contains("errors=0");
        assert!(ticks.iter().all(is_right), "{ticks:?}");
    }
    let before = lines(&console).len();
    wait_for("ticks of the parent", || (lines(&console).len() > before).then_some(()));
    let status = snowflock(&["status"]).output().unwrap();
    assert!(String::from_utf8_lossy(&status.stdout).contains("web-2"), "{status:?}");

    // Both are killed in mid-clone, started again, and no page is lost.
    let pid_of = |value: &Value, name: &str| value[name].as_u64().unwrap();
    kill(pid_of(&run["server"], "pid"), Signal::KILL);
    kill(pid_of(&run["clones"][0], "pager_pid"), Signal::KILL);
    let old = run;
    let run: Value = loop {
        let run: Value = serde_json::from_str(&states.next().unwrap().unwrap()).unwrap();
        let is_other = |path: &str| run.pointer(path) != old.pointer(path);
        let is_running = run["clones"][0]["state"] == "running";
        if is_running && is_other("/server/pid") && is_other("/clones/0/pager_pid") {
            break run;
        }
    };
    let clones = run["clones"].as_array().unwrap();
    for clone in clones {
        let dir = Path::new(clone["admin"].as_str().unwrap()).parent().unwrap().to_owned();
        let mut console = UnixStream::connect(dir.join("console")).unwrap();
        console.write_all(b"F").unwrap();
        let full = wait_for("the whole check of a clone", || {
            lines(&dir.join("console.log")).into_iter().find(|line| line.starts_with("FULL"))
        });
        assert!(full.contains("errors=0"), "{full}");
    }

    // Ctrl-C.
    let mut pids: Vec<u64> = clones.iter().map(|clone| clone["pid"].as_u64().unwrap()).collect();
    pids.push(run["server"]["pid"].as_u64().unwrap());
    assert!(pids.iter().all(|pid| is_there(*pid)));
    kill(u64::from(fork.0.id()), Signal::INT);
    let status = wait_for("the end of the fork", || fork.0.try_wait().unwrap());
    assert_eq!(status.code(), Some(130));
    assert!(!pids.iter().any(|pid| is_there(*pid)), "a process is left behind");
    for folder in [runs.path().join("snowflock"), scratch.path().to_owned()] {
        let left: Vec<PathBuf> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
    assert!(parent.0.try_wait().unwrap().is_none(), "the parent ended");
}

#[test]
fn a_guest_of_qemu_7_2_is_forked() {
    forked("qemu-7.2");
}

#[test]
fn a_guest_of_qemu_10_is_forked() {
    forked("qemu-10");
}
