//! Working sets with the real page server and real pagers over userfaultfd, as processes: what one clone needed its sibling has
//! before it asks, also after the server was started again; what cannot be used is said and done without.
#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// Long enough for any step on a machine that does much else.
const LONG: Duration = Duration::from_secs(60);

/// A guest of one thread, which touches the same pages in each clone: a tenth of 32 MiB.
const WORKLOAD: &str = "random,touches=10%,discards=0%,writes=10%,seed=7";

const MIB: usize = 32;

/// An image in a folder.
struct Place {
    dir: TempDir,
}

/// A page server that runs.
struct Server {
    child: Child,
    endpoint: String,
}

impl Place {
    fn new() -> Self {
        let place = Self { dir: tempfile::tempdir_in("/tmp").unwrap() };
        let mut rng = fastrand::Rng::with_seed(1);
        let mut bytes = vec![0; MIB << 20];
        rng.fill(&mut bytes);
        fs::write(place.path("x.raw"), bytes).unwrap();
        let mut make = snowflock();
        make.stdout(Stdio::null())
            .args(["descriptor", "make", "raw"])
            .arg(place.path("x.raw"))
            .arg("-o")
            .arg(place.path("x"));
        assert!(make.stderr(Stdio::null()).status().unwrap().success());
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn serve(&self, more: &[&str]) -> Server {
        let mut command = snowflock();
        command.args(["memserver", "serve", "--listen", "tcp://127.0.0.1:0", "--image"]).arg(self.path("x.snowidx"));
        command.arg("--listen").arg(format!("unix:{}", self.path("s").display())).arg("--admin").arg(self.path("a"));
        let log = fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let mut child = command.args(more).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let endpoint = line.split_whitespace().find(|word| word.starts_with("tcp:")).unwrap().to_owned();
        Server { child, endpoint }
    }

    /// Runs a clone to its end; what its pager counted.
    fn clone(&self, server: &str, policy: &str) -> Value {
        let mut command = snowflock();
        command.args(["memtap", "embedded", "--guest-threads", "1", "--workload", WORKLOAD, "--server", server]);
        command.args(["--working-set", policy, "--descriptor"]).arg(self.path("x.snow"));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let result: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&result["done"], &result["mismatches"]), (&true.into(), &0.into()));
        result["status"]["pager"].clone()
    }

    /// What the server knows of the image, as soon as it has heard of so many clones.
    fn known(&self, clones: u64) -> Value {
        let began = Instant::now();
        loop {
            let output = snowflock().args(["memserver", "images", "--json", "--admin"]).arg(self.path("a")).output();
            let images: Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
            if images[0]["working_set"]["clones"].as_u64().unwrap() >= clones {
                return images[0]["working_set"].clone();
            }
            assert!(began.elapsed() < LONG, "{images}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }
}

impl Server {
    fn signal(&mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn snowflock() -> Command {
    Command::new(env!("CARGO_BIN_EXE_snowflock"))
}

fn faults(pager: &Value) -> u64 {
    pager["demand_faults"].as_u64().unwrap()
}

#[test]
fn a_sibling_has_few_demand_faults() {
    let place = Place::new();
    let mut server = place.serve(&[]);
    let first = place.clone(&server.endpoint, "auto");
    assert!(faults(&first) > 500 && first["order_pages"] == 0, "{first}");
    place.known(1);
    let local = format!("unix:{}", place.path("s").display());
    for (round, endpoint) in [&server.endpoint, &local].into_iter().enumerate() {
        let second = place.clone(endpoint, "wait");
        assert!(faults(&second) * 10 <= faults(&first), "{first}\n{second}");
        assert!(second["order_pages"].as_u64().unwrap() * 10 >= faults(&first) * 8, "{second}");
        place.known(round as u64 + 2);
    }
    // It follows nothing, and says so.
    assert!(faults(&place.clone(&server.endpoint, "record")) * 10 >= faults(&first) * 9);
    place.known(4);
    assert!(faults(&place.clone(&server.endpoint, "off")) * 10 >= faults(&first) * 9);

    server.signal(Signal::TERM);
    assert_eq!(fs::metadata(place.path("x.snowws")).unwrap().permissions().mode() & 0o777, 0o600);
    let server = place.serve(&[]);
    assert_eq!(place.known(4)["clones"], 4, "the clone without working sets is not among them");
    let third = place.clone(&server.endpoint, "wait");
    assert!(faults(&third) * 10 <= faults(&first), "after a restart of the server: {third}");
}

#[test]
fn what_is_learnt_survives_a_killed_server() {
    let place = Place::new();
    let mut server = place.serve(&[]);
    let first = place.clone(&server.endpoint, "auto");
    let began = Instant::now();
    while !place.path("x.snowws").exists() {
        assert!(began.elapsed() < LONG, "nothing is saved");
        std::thread::sleep(Duration::from_millis(20));
    }
    server.signal(Signal::KILL);
    let server = place.serve(&[]);
    assert!(faults(&place.clone(&server.endpoint, "wait")) * 10 <= faults(&first));
}

#[test]
fn a_damaged_set_is_said_and_done_without() {
    let place = Place::new();
    let mut server = place.serve(&[]);
    let first = place.clone(&server.endpoint, "auto");
    place.known(1);
    server.signal(Signal::TERM);
    let mut bytes = fs::read(place.path("x.snowws")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(place.path("x.snowws"), &bytes).unwrap();
    let mut server = place.serve(&[]);
    assert!(place.log().contains("x.snowws") && place.log().contains("damaged"), "{}", place.log());
    let second = place.clone(&server.endpoint, "wait");
    assert!(faults(&second) * 10 >= faults(&first) * 9, "{second}");
    place.known(1);
    server.signal(Signal::TERM);
    let _replaced = place.serve(&[]);
    assert_eq!(place.known(1)["clones"], 1);
}

#[test]
fn without_working_sets_nothing_is_kept() {
    let place = Place::new();
    let mut server = place.serve(&["--working-sets", "off"]);
    let (first, second) = (place.clone(&server.endpoint, "auto"), place.clone(&server.endpoint, "wait"));
    assert!(faults(&second) * 10 >= faults(&first) * 9 && second["order_pages"] == 0, "{second}");
    server.signal(Signal::TERM);
    assert!(!place.path("x.snowws").exists());
}

/// What `snowflock workingset` says, and whether it did it.
fn working_set(arguments: &[&str]) -> (bool, String) {
    let output = snowflock().arg("workingset").args(arguments).output().unwrap();
    let text = if output.status.success() { output.stdout } else { output.stderr };
    (output.status.success(), String::from_utf8(text).unwrap())
}

#[test]
fn a_set_is_shown_and_carried_to_another_server() {
    let place = Place::new();
    let text = |name: &str| place.path(name).to_str().unwrap().to_owned();
    let (admin, kept) = (text("a"), text("kept.snowws"));
    let mut server = place.serve(&[]);
    let first = place.clone(&server.endpoint, "auto");
    place.known(1);
    let (shown, what) = working_set(&["show", "--admin", &admin]);
    assert!(shown && what.contains("1 told what they needed, 1 of them to the end"), "{what}");
    assert!(working_set(&["export", "--admin", &admin, "-o", &kept]).0);
    let (again, why) = working_set(&["export", "--admin", &admin, "-o", &kept]);
    assert!(!again && why.contains("--force"), "{why}");
    let (_, json) = working_set(&["show", "--json", &kept]);
    let shown: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(shown["summary"]["clones"], 1);
    assert_eq!(shown["entries"].as_array().unwrap().len() as u64, shown["summary"]["entries"].as_u64().unwrap());

    server.signal(Signal::TERM);
    fs::remove_file(place.path("x.snowws")).unwrap();
    let server = place.serve(&[]);
    assert_eq!(place.known(0)["clones"], 0);
    assert!(working_set(&["import", "--admin", &admin, &kept]).0);
    assert!(faults(&place.clone(&server.endpoint, "wait")) * 10 <= faults(&first));

    let other = Place::new();
    let _other_server = other.serve(&[]);
    let (imported, why) = working_set(&["import", "--admin", other.path("a").to_str().unwrap(), &kept]);
    assert!(!imported && why.contains("not served"), "{why}");
    let (imported, why) = working_set(&["import", "--admin", &admin, &text("x.snowidx")]);
    assert!(!imported && why.contains("an image index"), "{why}");
}
