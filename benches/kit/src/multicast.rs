//! Our own multicast between the hosts of a network: a memserver in the first one, clones in the others.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use clap::ValueEnum;
use descriptor::PAGE_SIZE;
use memserver::client::{Command, ask};
use memserver::{MulticastStatus, Traffic};
use serde_json::Value;
use testnet::{Host, Network, Process};

use crate::image::RandomImage;
use crate::member::Mode;
use crate::roles;

/// Headers of a datagram on the wire: Ethernet, IPv4, UDP. Segmentation offload makes all but the first of a burst behind the
/// interface's counters.
const UDP_HEADERS: u64 = 14 + 20 + 8;

/// Headers of a TCP segment, with timestamps, and what it carries at MTU 1500.
const TCP_HEADERS: u64 = 14 + 20 + 32;
const TCP_SEGMENT: u64 = 1500 - 20 - 32;

/// A little longer than the server's report of its channels stays as it is.
const REPORT_AGE: Duration = Duration::from_millis(150);

/// A memserver in the first host of a network, with a multicast channel.
pub struct Station<'a> {
    network: &'a Network,
    image: &'a RandomImage,
    endpoint: String,
    admin: PathBuf,
    _server: Process,
    _folder: tempfile::TempDir,
}

impl<'a> Station<'a> {
    /// Serves `image` from the first host.
    ///
    /// # Errors
    /// When memserver does not start.
    pub fn start(network: &'a Network, image: &'a RandomImage) -> anyhow::Result<Self> {
        let host = network.hosts().first().context("a network has hosts")?;
        let folder = tempfile::tempdir()?;
        let admin = folder.path().join("admin");
        let mut command = roles::command("memserver")?;
        let listen = format!("tcp://{}", SocketAddr::from((host.address(), 0)));
        command.args(["serve", "--compress", "off", "--listen", &listen, "--image"]).arg(&image.index_path);
        command.args(["--mcast", &format!("239.255.77.1:7071%{}", Host::INTERFACE), "--admin"]).arg(&admin);
        command.env("RUST_LOG", "error").stdout(Stdio::piped());
        let mut server = host.spawn(command)?;
        let mut line = String::new();
        BufReader::new(server.child().stdout.take().context("memserver's output")?).read_line(&mut line)?;
        let endpoint = line.trim_end().strip_prefix("ready ").with_context(|| format!("memserver said {line:?}"))?;
        Ok(Self { network, image, endpoint: endpoint.to_owned(), admin, _server: server, _folder: folder })
    }

    /// Starts a clone in each of the other hosts at once and fills them, beginning when all are in the channel, as the peers do;
    /// how long it took from the start until the last was complete, and what their pagers said after every page was compared.
    ///
    /// # Errors
    /// When a clone fails or has a wrong page.
    pub fn fill(&self) -> anyhow::Result<(Duration, Vec<Value>)> {
        let start = Instant::now();
        let mut clones = Vec::new();
        for host in self.network.hosts().iter().skip(1) {
            clones.push(self.clone(host, Mode::Fill)?);
        }
        each(&mut clones, |clone| clone.expect("live"))?;
        each(&mut clones, |clone| {
            clone.go()?;
            clone.expect("complete")
        })?;
        let took = start.elapsed();
        Ok((took, each(&mut clones, |clone| clone.finish(self.pages()))?))
    }

    /// Has `count` clones in the second host, once all are in the channel, touch their memory at the same time and in the same
    /// order; what their pagers said after every page was compared.
    ///
    /// # Errors
    /// When a clone fails or has a wrong page.
    pub fn demand(&self, count: usize) -> anyhow::Result<Vec<Value>> {
        let host = self.network.hosts().get(1).context("a network has two hosts")?;
        let clones: anyhow::Result<Vec<Clone>> = (0..count).map(|_| self.clone(host, Mode::Demand)).collect();
        let mut clones = clones?;
        each(&mut clones, |clone| clone.expect("live"))?;
        each(&mut clones, |clone| clone.finish(self.pages()))
    }

    /// What the server says of its channels.
    ///
    /// # Errors
    /// When it does not.
    pub fn channels(&self) -> anyhow::Result<MulticastStatus> {
        std::thread::sleep(REPORT_AGE);
        let reply = ask(&self.admin, &Command::Status)?;
        reply.status.and_then(|status| status.multicast).context("a server with a channel tells of it")
    }

    /// The bytes on the wire by the server's own count of datagrams, and what `clones` got by TCP.
    ///
    /// # Errors
    /// When the server does not tell.
    pub fn sent(&self, clones: &[Value]) -> anyhow::Result<u64> {
        let total = self.channels()?.total;
        Ok(total.bytes() + datagrams(&total) * UDP_HEADERS + by_tcp(clones) + tcp_headers(clones))
    }

    fn clone(&self, host: &Host, mode: Mode) -> anyhow::Result<Clone> {
        let mut command = roles::command("clone")?;
        command.arg("--descriptor").arg(&self.image.descriptor_path).arg("--index").arg(&self.image.index_path);
        let mode = mode.to_possible_value().context("a mode has a name")?;
        command.args(["--server", &self.endpoint, "--mode", mode.get_name()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = host.spawn(command)?;
        let (stdin, stdout) = (process.child().stdin.take(), process.child().stdout.take());
        let (orders, lines) = (stdin.context("a clone's input")?, BufReader::new(stdout.context("its output")?));
        Ok(Clone { orders, lines, _process: process })
    }

    fn pages(&self) -> u64 {
        self.image.bytes.len() as u64 / PAGE_SIZE
    }
}

/// What a network's first host has sent.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    bytes: u64,
    datagrams: u64,
}

impl Sent {
    /// Until now.
    ///
    /// # Errors
    /// When the kernel or the server does not tell.
    pub fn now(station: &Station<'_>) -> anyhow::Result<Self> {
        let datagrams = datagrams(&station.channels()?.total);
        let host = station.network.hosts().first().context("a network has hosts")?;
        Ok(Self { bytes: host.counters()?.sent_bytes, datagrams })
    }

    /// The bytes on the wire since then, rather too many than too few: the interface's, which count segmented bursts and TCP
    /// segments with one header each, with the headers of all datagrams and of what TCP carried besides.
    ///
    /// # Errors
    /// When the kernel or the server does not tell.
    pub fn since(self, station: &Station<'_>, clones: &[Value]) -> anyhow::Result<u64> {
        let now = Self::now(station)?;
        let headers = (now.datagrams - self.datagrams) * UDP_HEADERS + tcp_headers(clones);
        Ok(now.bytes - self.bytes + headers)
    }
}

fn datagrams(total: &Traffic) -> u64 {
    [total.data, total.repair, total.parity, total.control].iter().map(|sent| sent.datagrams).sum()
}

/// What clones got over their connections.
fn by_tcp(clones: &[Value]) -> u64 {
    clones.iter().filter_map(|status| status["source"]["bytes_received"].as_u64()).sum()
}

fn tcp_headers(clones: &[Value]) -> u64 {
    by_tcp(clones).div_ceil(TCP_SEGMENT) * TCP_HEADERS
}

/// A clone that runs.
struct Clone {
    orders: ChildStdin,
    lines: BufReader<ChildStdout>,
    _process: Process,
}

impl Clone {
    /// Waits for its next line.
    fn next(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        Ok(line)
    }

    fn expect(&mut self, word: &str) -> anyhow::Result<()> {
        let line = self.next()?;
        ensure!(line.trim_end() == word, "a clone said {line:?} instead of {word}");
        Ok(())
    }

    fn go(&mut self) -> anyhow::Result<()> {
        Ok(writeln!(self.orders)?)
    }

    /// Lets it go on to its end, where all of its pages must be right.
    fn finish(&mut self, pages: u64) -> anyhow::Result<Value> {
        self.go()?;
        let line = self.next()?;
        let outcome: Value =
            serde_json::from_str(&line).with_context(|| format!("a clone said {line:?} at its end"))?;
        if outcome["verified"] != pages || outcome["mismatches"] != 0 {
            bail!("of {pages} pages {} are right and {} wrong", outcome["verified"], outcome["mismatches"]);
        }
        Ok(outcome["status"].clone())
    }
}

/// Does something with all clones at the same time.
fn each<T: Send>(
    clones: &mut [Clone],
    what: impl Fn(&mut Clone) -> anyhow::Result<T> + Sync,
) -> anyhow::Result<Vec<T>> {
    std::thread::scope(|scope| {
        let running: Vec<_> = clones.iter_mut().map(|clone| scope.spawn(|| what(clone))).collect();
        running.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?).collect()
    })
}
