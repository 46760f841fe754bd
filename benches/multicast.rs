//! One image to the hosts of a network by multicast, against udpcast and UFTP in turn on the same bridge; and how much is sent to
//! clones in lockstep on one host, against what one clone is sent.
//!
//! Hosts are network namespaces on a bridge that snoops IGMP, MTU 1500. Everybody's copies are compared with the image, after
//! the time was taken. Ours: from the start of the clones' processes, which wait for each other, to the last one's having all pages. Peers: from the
//! start of the sender, with receivers that wait for it, to the end of all, their copies in files in memory.
//!
//! Loss is that of each receiver, of single frames, and for everybody the same (XDP). Bytes sent are those on the wire: the
//! interface's counters, and the headers that segmentation offload makes behind them.
//!
//! `--quick` measures 1 receiver without loss, and 8 without and with, each peer once; without it 4 receivers too, all with and
//! without loss, in several rounds. The image has 256 MiB in both.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use bench_kit::image::RandomImage;
use bench_kit::multicast::{Sent, Station};
use bench_kit::{Args, median, peers, roles, rounded, warm};
use serde_json::{Value, json};
use testnet::{Loss, Network, NetworkConfig};

/// The Internet's MTU, and Ethernet's.
const MTU: u16 = 1500;

/// The size of the image.
const MIB: u64 = 256;

/// Clones in lockstep.
const LOCKSTEP: usize = 32;

/// How long a peer may take: ten times what it takes on an idle machine.
const PATIENCE: Duration = Duration::from_secs(100);

fn main() -> ExitCode {
    roles::play().unwrap_or_else(|| bench_kit::run("multicast", bench))
}

fn bench(args: &Args) -> anyhow::Result<Value> {
    if let Some(reason) = testnet::missing() {
        println!("SKIPPED multicast: {reason}");
        return Ok(json!({ "skipped": reason }));
    }
    let image = RandomImage::make(MIB)?;
    let settings: &[(u8, f64)] =
        args.pick(&[(1, 0.0), (8, 0.0), (8, 0.01)], &[(1, 0.0), (1, 0.01), (4, 0.0), (4, 0.01), (8, 0.0), (8, 0.01)]);
    println!("{MIB} MiB, MTU {MTU}, seconds and bytes sent by the size of the image");
    println!("{:>10}{:>8}{:>16}{:>16}{:>16}", "receivers", "loss", "ours", "udpcast", "UFTP");
    let mut runs = Vec::new();
    for &(receivers, loss) in settings {
        runs.push(Setting { receivers, loss }.run(&image, args)?);
    }
    let one = runs.iter().find(|run| run.setting.receivers == 1 && run.setting.loss == 0.0);
    let eight = runs.iter().find(|run| run.setting.receivers == 8 && run.setting.loss == 0.0);
    let growth = one.zip(eight).map(|(one, eight)| eight.ours.seconds / one.ours.seconds);
    let check = counted_right(&image)?;
    let lockstep = lockstep(args)?;
    println!("time for 8 by time for 1: {:.2}", growth.unwrap_or_default());
    println!("{LOCKSTEP} clones in lockstep are sent {:.3} of what one clone is", lockstep.ratio);
    println!("bytes by the server's own count by those of the interface, without offload: {check:.3}");
    Ok(json!({
        "runs": runs.iter().map(Run::json).collect::<Vec<_>>(),
        "seconds_8_by_1": growth.map(rounded),
        "lockstep_ratio": rounded(lockstep.ratio),
        "lockstep": { "clones": LOCKSTEP, "one": rounded(lockstep.one), "all": rounded(lockstep.all), "interface_ratio": rounded(lockstep.interface_ratio) },
        "count_check": rounded(check),
    }))
}

/// Who receives, and what gets lost.
#[derive(Clone, Copy)]
struct Setting {
    receivers: u8,
    loss: f64,
}

/// A transfer.
#[derive(Clone, Copy)]
struct Transfer {
    seconds: f64,
    /// Bytes sent by the size of the image.
    bytes_ratio: f64,
}

/// What was measured in a setting, medians.
struct Run {
    setting: Setting,
    ours: Transfer,
    udpcast: Option<Transfer>,
    uftp: Option<Transfer>,
}

impl Setting {
    fn run(self, image: &RandomImage, args: &Args) -> anyhow::Result<Run> {
        let mut network = Network::new(NetworkConfig { hosts: self.receivers + 1, mtu: MTU })?;
        if self.loss > 0.0 {
            for host in &mut network.hosts_mut()[1..] {
                host.lose(Loss::Frames(self.loss))?;
            }
        }
        let (mut ours, mut udpcast, mut uftp) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..args.pick(1, 3) {
            // Ours varies more, being shorter.
            for _ in 0..3 {
                ours.push(self.ours(&network, image)?);
            }
            udpcast
                .extend(self.peer(&network, image, |copies| peers::udpcast(&network, &image.path, copies, PATIENCE))?);
            uftp.extend(self.peer(&network, image, |copies| peers::uftp(&network, &image.path, copies, PATIENCE))?);
        }
        let ours = Transfer::median(&ours).context("ours was measured")?;
        let run = Run { setting: self, ours, udpcast: Transfer::median(&udpcast), uftp: Transfer::median(&uftp) };
        let cell = |transfer: Option<Transfer>| {
            transfer.map_or("none".to_owned(), |it| format!("{:.2} s, {:.3}", it.seconds, it.bytes_ratio))
        };
        let [ours, udpcast, uftp] = [Some(run.ours), run.udpcast, run.uftp].map(cell);
        println!("{:>10}{:>6} %{ours:>16}{udpcast:>16}{uftp:>16}", self.receivers, self.loss * 100.0);
        Ok(run)
    }

    fn ours(self, network: &Network, image: &RandomImage) -> anyhow::Result<Transfer> {
        warm(image.bytes.len() as u64 * u64::from(self.receivers));
        let station = Station::start(network, image)?;
        let before = Sent::now(&station)?;
        let (took, clones) = station.fill()?;
        let sent = before.since(&station, &clones)?;
        Ok(Transfer::new(took, sent, image))
    }

    fn peer(
        self,
        network: &Network,
        image: &RandomImage,
        run: impl FnOnce(&[PathBuf]) -> anyhow::Result<Option<Duration>>,
    ) -> anyhow::Result<Option<Transfer>> {
        warm(image.bytes.len() as u64 * u64::from(self.receivers));
        let folder = tempfile::tempdir_in("/dev/shm")?;
        let copies: Vec<PathBuf> =
            (1..=self.receivers).map(|id| folder.path().join(id.to_string()).join("copy")).collect();
        for folder in copies.iter().filter_map(|copy| copy.parent()) {
            std::fs::create_dir(folder)?;
        }
        let before = network.hosts()[0].counters()?.sent_bytes;
        let transfer = || -> anyhow::Result<Option<Transfer>> {
            let Some(took) = run(&copies)? else { return Ok(None) };
            let sent = network.hosts()[0].counters()?.sent_bytes - before;
            for copy in &copies {
                ensure!(std::fs::read(copy)? == image.bytes, "a copy is wrong");
            }
            Ok(Some(Transfer::new(took, sent, image)))
        };
        // UFTP gives receivers up that are slow to answer, as all are on a busy machine.
        Ok(transfer().unwrap_or_else(|error| {
            println!("{:>10}{:>6} %  a peer failed: {error:#}", self.receivers, self.loss * 100.0);
            None
        }))
    }
}

impl Transfer {
    fn new(took: Duration, sent: u64, image: &RandomImage) -> Self {
        Self { seconds: took.as_secs_f64(), bytes_ratio: sent as f64 / image.bytes.len() as f64 }
    }

    fn median(transfers: &[Self]) -> Option<Self> {
        if transfers.is_empty() {
            return None;
        }
        let of = |number: fn(&Self) -> f64| median(&mut transfers.iter().map(number).collect::<Vec<_>>());
        Some(Self { seconds: of(|it| it.seconds), bytes_ratio: of(|it| it.bytes_ratio) })
    }

    fn json(self) -> Value {
        json!({ "seconds": rounded(self.seconds), "bytes_ratio": rounded(self.bytes_ratio) })
    }
}

impl Run {
    fn json(&self) -> Value {
        let speedup = |peer: Option<Transfer>| peer.map(|peer| rounded(peer.seconds / self.ours.seconds));
        json!({
            "receivers": self.setting.receivers,
            "mib": MIB,
            "loss": self.setting.loss,
            "seconds": rounded(self.ours.seconds),
            "bytes_ratio": rounded(self.ours.bytes_ratio),
            "speedup_udpcast": speedup(self.udpcast),
            "speedup_uftp": speedup(self.uftp),
            "udpcast": self.udpcast.map(Transfer::json),
            "uftp": self.uftp.map(Transfer::json),
        })
    }
}

/// What clones in lockstep are sent, by the size of the image: datagrams of the group, and pages over connections, with all
/// headers.
struct Lockstep {
    one: f64,
    all: f64,
    ratio: f64,
    /// The same by the interface, on which the kernel's acknowledgements of the clones' requests go out too.
    interface_ratio: f64,
}

/// Guests that touch all of their memory at the same time and in the same order, none of which is fetched before it is touched.
fn lockstep(args: &Args) -> anyhow::Result<Lockstep> {
    let image = RandomImage::make(args.pick(16, 64))?;
    let network = Network::new(NetworkConfig { hosts: 2, mtu: MTU })?;
    warm(image.bytes.len() as u64 * LOCKSTEP as u64);
    let sent = |clones| -> anyhow::Result<[f64; 2]> {
        let station = Station::start(&network, &image)?;
        let before = Sent::now(&station)?;
        let statuses = station.demand(clones)?;
        let by = [station.sent(&statuses)?, before.since(&station, &statuses)?];
        Ok(by.map(|bytes| bytes as f64 / image.bytes.len() as f64))
    };
    let (mut ones, mut alls) = ([vec![], vec![]], [vec![], vec![]]);
    for _ in 0..3 {
        for (clones, samples) in [(1, &mut ones), (LOCKSTEP, &mut alls)] {
            for (sample, samples) in sent(clones)?.into_iter().zip(samples) {
                samples.push(sample);
            }
        }
    }
    let [[one, one_by_interface], [all, all_by_interface]] =
        [ones, alls].map(|mut both| both.each_mut().map(|samples| median(samples)));
    Ok(Lockstep { one, all, ratio: all / one, interface_ratio: all_by_interface / one_by_interface })
}

/// What the server counts as sent, by what the interface does when the kernel hands it every datagram by itself.
fn counted_right(image: &RandomImage) -> anyhow::Result<f64> {
    let network = Network::new(NetworkConfig { hosts: 2, mtu: MTU })?;
    network.hosts()[0].set_offload("tx-udp-segmentation", false)?;
    network.hosts()[0].set_offload("tcp-segmentation-offload", false)?;
    let station = Station::start(&network, image)?;
    let before = network.hosts()[0].counters()?.sent_bytes;
    let (_, clones) = station.fill()?;
    let by_interface = network.hosts()[0].counters()?.sent_bytes - before;
    let ratio = station.sent(&clones)? as f64 / by_interface as f64;
    ensure!((0.97..=1.03).contains(&ratio), "the server's count is {ratio:.3} of the interface's");
    Ok(ratio)
}
