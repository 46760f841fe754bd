//! A fork to the hosts of a network by multicast: guests embedded in memtap and guests in QEMU, all of the same image, with
//! losses at each host, no multicast at one, and one that hangs for a while. Every image must be exact.

use std::io::{self, BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use testnet::{Host, Loss, Network, NetworkConfig, Process};

use crate::command::{Place, Run};
use crate::guest::{Console, Lab, Parent};
use crate::{LONG, all_are, dir, number};

/// One serves, five have embedded guests, two have QEMUs.
const HOSTS: u8 = 8;

const GROUP: &str = "239.255.78.1";

/// Of the hosts with embedded guests, the one that no multicast reaches, and the one that hangs.
const BLOCKED: usize = 4;
const STOPPED: usize = 5;

/// Longer than a server waits for a member that says nothing.
const STOP: Duration = Duration::from_secs(3);

#[test]
fn hosts_are_forked_to_by_multicast() {
    let lab = match testnet::missing().map_or_else(|| Lab::find("qemu-10"), Err) {
        Ok(lab) => lab,
        Err(reason) => {
            // Not by the macro, whose text the test harness would keep to itself.
            let _ = writeln!(io::stderr(), "SKIPPED a fork to hosts by multicast: {reason}");
            return;
        }
    };
    let place = Place::new();
    let parent = Parent::boot(&lab);
    let capture = place.scratch().join("capture");
    let mut command = place.command(["capture", "qemu", "--qmp"]);
    let captured = command.arg(parent.qmp()).arg("-o").arg(&capture).output().unwrap();
    assert!(captured.status.success(), "{captured:?}");
    drop(parent);

    let mut network = Network::new(NetworkConfig { hosts: HOSTS, mtu: 1500 }).unwrap();
    network.hosts()[BLOCKED].block(GROUP.parse().unwrap()).unwrap();
    for loss in [Loss::None, Loss::Frames(0.01), Loss::Frames(0.05)] {
        for host in &mut network.hosts_mut()[1..] {
            host.lose(loss).unwrap();
        }
        forked(&lab, &place, &network, &capture, loss);
    }
    place.assert_nothing_left();
}

fn forked(lab: &Lab, place: &Place, network: &Network, capture: &Path, loss: Loss) {
    let [from, to @ ..] = network.hosts() else { unreachable!("a network has hosts") };
    let (embedded, machines) = to.split_at(HOSTS as usize - 3);
    let server = Server::start(place, from, capture);
    let mut clones: Vec<Embedded> =
        embedded.iter().enumerate().map(|(id, host)| Embedded::start(place, host, capture, &server, id)).collect();
    let places = machines.iter().map(|_| Place::new()).collect::<Vec<_>>();
    let runs: Vec<Run<'_>> =
        machines.iter().zip(&places).map(|(host, place)| run(lab, place, host, capture, &server)).collect();

    let stopped = &clones[STOPPED - 1].process;
    stopped.stop().unwrap();
    std::thread::sleep(STOP);
    stopped.resume().unwrap();

    for mut run in runs {
        let is_up = |report: &_| all_are(report, 1, "running") || all_are(report, 1, "complete");
        let report = run.wait("a clone to run", is_up);
        let mut guest = Console::open(dir(&report.clones[0]));
        guest.tell(b'F');
        guest.assert_full();
        run.wait("a clone to be complete", |report| all_are(report, 1, "complete"));
        guest.tell(b'F');
        guest.assert_full();
        run.interrupt();
    }
    for (id, clone) in clones.iter_mut().enumerate() {
        let channel = clone.end();
        let received = number(&channel["received"]);
        let is_blocked = id + 1 == BLOCKED;
        assert_eq!(received == 0, is_blocked, "clone {id} at {loss:?} received {received} datagrams: {channel}");
        if matches!(loss, Loss::Frames(_)) && !is_blocked {
            assert!(number(&channel["lost"]) > 0, "clone {id} at {loss:?} lost nothing: {channel}");
        }
    }
    let sent = server.sent();
    println!("{loss:?}: {sent} bytes by multicast");
    assert!(sent > 0, "nothing was multicast");
}

/// A clone in a QEMU.
fn run<'a>(lab: &Lab, place: &'a Place, host: &Host, capture: &Path, server: &Server) -> Run<'a> {
    let mut command = place.command(["run", "qemu", "--hydrate", "now", "--patience", "200s", "--descriptor"]);
    command.arg(capture.with_extension("snow")).arg(format!("--server={}", server.endpoint));
    command.arg("--").args(lab.machine("{dir}", "{vmgenid}"));
    let start = move || {
        host.enter().unwrap();
        Run::start(place, command)
    };
    std::thread::scope(|scope| scope.spawn(start).join().unwrap())
}

/// A memserver with a channel.
struct Server {
    endpoint: String,
    admin: PathBuf,
    _process: Process,
}

impl Server {
    fn start(place: &Place, host: &Host, capture: &Path) -> Self {
        let listen = format!("tcp://{}", SocketAddr::from((host.address(), 0)));
        let admin = place.scratch().join("memserver.admin");
        let mut command = place.command(["memserver", "serve", "--listen", &listen, "--image"]);
        command.arg(capture.with_extension("snowidx")).arg(format!("--mcast={GROUP}:7078%{}", Host::INTERFACE));
        command.arg("--admin").arg(&admin).stdout(Stdio::piped()).stderr(place.log_file("memserver"));
        let mut process = host.spawn(command).unwrap();
        let mut line = String::new();
        BufReader::new(process.child().stdout.take().unwrap()).read_line(&mut line).unwrap();
        let endpoint = line.trim_end().strip_prefix("ready ").unwrap_or_else(|| panic!("memserver said {line:?}"));
        Self { endpoint: endpoint.to_owned(), admin, _process: process }
    }

    /// The bytes of pages that it multicast.
    fn sent(&self) -> u64 {
        let status = toolstack::admin::status(&self.admin, LONG).unwrap();
        let total = &status["multicast"]["total"];
        ["data", "repair", "parity"].iter().map(|kind| number(&total[kind]["bytes"])).sum()
    }
}

/// A memtap with a guest inside.
struct Embedded {
    process: Process,
}

impl Embedded {
    fn start(place: &Place, host: &Host, capture: &Path, server: &Server, id: usize) -> Self {
        let mut command = place.command(["memtap", "embedded", "--hydrate", "now", "--patience", "200s"]);
        command.arg(format!("--workload=random,touches=5%,writes=30%,discards=1%,seed={id}"));
        command.arg("--descriptor").arg(capture.with_extension("snow"));
        command.arg("--verify").arg(capture.with_extension("snowidx")).arg(format!("--server={}", server.endpoint));
        command.stdout(Stdio::piped()).stderr(place.log_file(&format!("embedded-{id}")));
        Self { process: host.spawn(command).unwrap() }
    }

    /// Waits until it has compared all of its memory, and gives what it says of the channel.
    fn end(&mut self) -> Value {
        let mut line = String::new();
        BufReader::new(self.process.child().stdout.take().unwrap()).read_line(&mut line).unwrap();
        let status = self.process.wait(LONG).unwrap();
        let outcome: Value =
            serde_json::from_str(&line).unwrap_or_else(|_| panic!("memtap ended with {status}: {line:?}"));
        assert!(status.success() && outcome["done"] == true && outcome["mismatches"] == 0, "{status}: {outcome}");
        assert!(number(&outcome["verified"]) > 0, "{outcome}");
        outcome["status"]["channel"].clone()
    }
}
