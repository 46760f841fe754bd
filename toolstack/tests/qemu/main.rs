//! The first fork on the real thing: a Linux guest in an unmodified QEMU is forked by the `snowflock` command, and its
//! clones are judged by what they say of their own memory, page by page, while processes around them are killed.
//!
//! Guest and QEMUs are those of `tests/lab`, at whose top the guest's lines and commands are listed; a test whose QEMU is not
//! there is skipped, and says so. Each test boots one parent and captures it once: that takes longer than all that follows.
#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

mod avoidance;
mod command;
mod guest;
mod hosts;

use std::collections::HashSet;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use descriptor::import::qemu::qmp::Qmp;
use descriptor::{Descriptor, FrameRange, FrameSet};
use serde_json::{Value, json};
use toolstack::CloneReport;

use command::{Place, Run, Server, kill};
use guest::{Console, Lab, Parent};

/// Longer than any step takes on a machine that does ten times as much else.
const LONG: Duration = Duration::from_secs(240);

const CLONES: usize = 4;

#[test]
fn a_guest_of_qemu_7_2_is_forked() {
    forked("qemu-7.2");
}

#[test]
fn a_guest_of_qemu_10_is_forked() {
    forked("qemu-10");
}

fn forked(qemu: &str) {
    let lab = match Lab::find(qemu) {
        Ok(lab) => lab,
        Err(reason) => {
            // Not by the macro, whose text the test harness would keep to itself.
            let _ = writeln!(io::stderr(), "SKIPPED forks of a guest in {qemu}: {reason}");
            return;
        }
    };
    let place = Place::new();
    let mut parent = Parent::boot(&lab);
    let capture = place.scratch().join("capture");
    four_clones_survive_the_deaths_of_their_server_and_of_a_pager(&lab, &place, &mut parent, &capture);
    a_preempting_clone_becomes_complete(&lab, &place, &capture);
    what_a_toolstack_says_will_be_overwritten_is_not_fetched(&lab, &place, &capture);
    a_clone_whose_server_stays_away_is_killed(&lab, &place, &capture);
    place.assert_nothing_left();
    parent.assert_alive();
}

fn four_clones_survive_the_deaths_of_their_server_and_of_a_pager(
    lab: &Lab,
    place: &Place,
    parent: &mut Parent,
    capture: &Path,
) {
    let mut fork = place.command(["fork", "qemu", "--name", "web-{id}", "--lane", "socket", "--patience", "200s"]);
    fork.args(["--clones", &CLONES.to_string()]).arg("--qmp").arg(parent.qmp()).arg("-o").arg(capture);
    fork.arg("--").args(lab.machine("{dir}", "{vmgenid}"));
    let mut run = Run::start(place, fork);

    // All four say something long before they have their memory, which comes from the server, through a socket.
    let report = run.wait("clones to run", |report| all_are(report, CLONES, "running"));
    let clones = &report.clones;
    for clone in clones {
        run.wait("the first word of a clone", |_| Console::has(dir(clone), "TICK"));
        let (status, progress) = memory(clone);
        let fetched = number(&status["pager"]["demand_pages"]) + number(&status["pager"]["prefetch_pages"]);
        let total = number(&progress["total"]);
        assert!(fetched > 0 && fetched < total / 10, "{}: {fetched} of {total} pages fetched", clone.name);
        assert!(number(&status["source"]["bytes_received"]) > fetched * 100, "not through a socket: {status}");
    }
    they_are_different_machines(clones);
    let status = place.command(["status"]).output().unwrap();
    assert!(String::from_utf8_lossy(&status.stdout).contains("web-4"), "{status:?}");
    parent.goes_on();
    let mut guests: Vec<Console> = clones.iter().map(|clone| Console::open(dir(clone))).collect();
    let randoms: HashSet<String> = guests.iter_mut().chain([&mut parent.console]).map(|it| it.ask(b'R')).collect();
    assert_eq!(randoms.len(), CLONES + 1, "machines draw the same random numbers: {randoms:?}");

    // The server is killed while two clones read all their memory, and before the others begin to.
    let [first, second, third, fourth] = &mut guests[..] else { unreachable!("four clones") };
    first.tell(b'F');
    second.tell(b'F');
    let server = report.server.as_ref().unwrap().pid;
    kill(server);
    let is_missing = |clone: &CloneReport| number(&memory(clone).1["missing"]) > 0;
    assert!(clones.iter().all(is_missing), "the server was killed too late");
    third.tell(b'F');
    for guest in [&mut *first, &mut *second, &mut *third] {
        guest.assert_full();
    }
    run.wait("another server", |report| report.server.as_ref().is_some_and(|it| it.pid != server));

    // The same with a pager.
    fourth.tell(b'F');
    let pager = clones[3].pager_pid.unwrap();
    kill(pager);
    assert!(!fourth.has_answered("FULL"), "the pager was killed too late");
    fourth.assert_full();
    run.wait("another pager", |report| report.clones[3].pager_pid != Some(pager) && all_are(report, CLONES, "running"));

    // What a clone writes is its own.
    assert_eq!(first.ask(b'W').split(' ').next(), Some("WROTE"));
    for guest in [first, second, third, fourth, &mut parent.console] {
        guest.tell(b'F');
        guest.assert_full();
    }

    run.interrupt();
}

fn a_preempting_clone_becomes_complete(lab: &Lab, place: &Place, capture: &Path) {
    let server = Server::start(place, capture);
    let mut command = place.command(["run", "qemu", "--preempt", "--hydrate", "now", "--descriptor"]);
    command.arg(capture.with_extension("snow")).arg(format!("--server={}", server.endpoint));
    command.arg("--").args(lab.machine("{dir}", "{vmgenid}"));
    let mut run = Run::start(place, command);
    let report = run.wait("the clone to run", |report| all_are(report, 1, "running") || all_are(report, 1, "complete"));
    let mut guest = Console::open(dir(&report.clones[0]));
    guest.tell(b'F');
    guest.assert_full();
    run.wait("the clone to be complete", |report| all_are(report, 1, "complete"));
    drop(server);
    guest.tell(b'F');
    guest.assert_full();
    run.interrupt();
}

/// The guest's kernel overwrites what it holds free before it looks at it: a true promise, of a descriptor that does not know.
fn what_a_toolstack_says_will_be_overwritten_is_not_fetched(lab: &Lab, place: &Place, capture: &Path) {
    const MOST: usize = 1000;
    let server = Server::start(place, capture);
    let descriptor = Descriptor::read(&capture.with_extension("snow")).unwrap();
    let mut free: Vec<FrameRange> = descriptor.free_data().runs().collect();
    free.sort_by_key(|run| std::cmp::Reverse(run.count()));
    free.truncate(MOST);
    let frames: u64 = free.iter().map(|run| run.count().get()).sum();
    assert!(frames > 1000, "{frames} free frames");
    let unaware = Descriptor { free: FrameSet::empty(descriptor.memory.universe()), ..descriptor };
    let path = place.scratch().join("unaware.snow");
    unaware.write(&path).unwrap();
    let mut command = place.command(["run", "qemu", "--descriptor"]);
    command.arg(path).arg(format!("--server={}", server.endpoint)).arg("--").args(lab.machine("{dir}", "{vmgenid}"));
    let mut run = Run::start(place, command);
    let report = run.wait("the clone to run", |report| all_are(report, 1, "running"));
    let admin = &report.clones[0].admin;
    let ranges: Vec<[u64; 2]> = free.iter().map(|run| [run.start().index(), run.count().get()]).collect();
    let noted = memtap::admin::ask(admin, &json!({"cmd": "overwrite", "ranges": ranges})).unwrap();
    assert!(number(&noted["frames"]) > frames / 2, "{noted} of {frames}");
    assert!(number(&noted["frames"]) + number(&noted["present"]) <= frames, "{noted} of {frames}");
    let mut guest = Console::open(dir(&report.clones[0]));
    assert!(guest.ask(b'W').starts_with("WROTE"));
    memtap::admin::ask(admin, &json!({"cmd": "hydrate", "policy": "now"})).unwrap();
    guest.tell(b'F');
    guest.assert_full();
    run.wait("the clone to be complete", |report| all_are(report, 1, "complete"));
    guest.tell(b'F');
    guest.assert_full();
    run.interrupt();
}

fn a_clone_whose_server_stays_away_is_killed(lab: &Lab, place: &Place, capture: &Path) {
    let server = Server::start(place, capture);
    let mut command = place.command(["run", "qemu", "--lane", "socket", "--patience", "1s", "--on-failure", "kill"]);
    command.arg("--descriptor").arg(capture.with_extension("snow")).arg(format!("--server={}", server.endpoint));
    command.arg("--").args(lab.machine("{dir}", "{vmgenid}"));
    let mut run = Run::start(place, command);
    run.wait("the clone to run", |report| all_are(report, 1, "running"));
    drop(server);
    let (status, said) = run.end();
    assert_eq!(status.code(), Some(1), "{said}");
    // The code by which memtap says that its servers are gone, and its words.
    assert!(said.contains("memtap of clone-1 ended with exit code 3"), "{said}");
    assert!(said.contains("gone"), "{said}");
}

/// Each clone has the name and the generation id that it was promised, and no two have the same.
fn they_are_different_machines(clones: &[CloneReport]) {
    let mut ids = HashSet::new();
    for (clone, number) in clones.iter().zip(1..) {
        let identity = clone.identity.as_ref().unwrap();
        assert_eq!(identity.name, format!("web-{number}"));
        let mut qmp = Qmp::connect(clone.qmp.as_ref().unwrap(), LONG).unwrap();
        let mut ask =
            |command, field: &str| qmp.execute(command, json!({})).unwrap()[field].as_str().unwrap().to_owned();
        assert_eq!(ask("query-name", "name"), identity.name);
        assert_eq!(ask("query-vm-generation-id", "guid"), identity.vmgenid.to_string());
        ids.insert(identity.vmgenid);
    }
    assert_eq!(ids.len(), clones.len());
}

/// The directory in which the clone has its console and its sockets.
fn dir(clone: &CloneReport) -> &Path {
    clone.admin.parent().unwrap()
}

/// What the clone's memtap says: all of it, and how far it is.
fn memory(clone: &CloneReport) -> (Value, Value) {
    let status = toolstack::admin::status(&clone.admin, LONG).unwrap();
    let progress = status["progress"].clone();
    (status, progress)
}

fn all_are(report: &toolstack::RunReport, clones: usize, state: &str) -> bool {
    report.clones.len() == clones && report.clones.iter().all(|clone| clone.state == state)
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

/// Looks until `look` finds something; `None` after a [`LONG`] time.
fn poll<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let began = Instant::now();
    while began.elapsed() < LONG {
        if let Some(found) = look() {
            return Some(found);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    None
}
