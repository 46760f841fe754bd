//! UFTP: a file by multicast in passes, at a fixed rate, with NAKs after each section.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use testnet::{Host, Network};

use super::is_installed;

/// The largest buffer that the kernel grants without privilege: the default loses much.
const BUFFER: &str = "4194304";

/// What fits the MTU of 1500 with UFTP's headers.
const BLOCK: &str = "1400";

/// UFTP's port, as in the kernel's table of sockets.
const PORT: &str = ":0414 ";

/// Sends `file` from the first host of `network` to the others, each of which writes one of `copies`; how long that took, or
/// `None` when UFTP is not installed.
///
/// It sends as fast as it can, with which it was done soonest among that and rates from 200 to 400 Mbit/s.
///
/// # Errors
/// When it fails, or takes longer than `patience`.
pub fn uftp(
    network: &Network,
    file: &Path,
    copies: &[PathBuf],
    patience: Duration,
) -> anyhow::Result<Option<Duration>> {
    let [from, to @ ..] = network.hosts() else { return Ok(None) };
    if !is_installed("uftp") {
        return Ok(None);
    }
    let (mut receivers, mut ids) = (Vec::new(), Vec::new());
    for (number, (host, copy)) in to.iter().zip(copies).enumerate() {
        let id = format!("0x{:08x}", number + 1);
        let mut command = silent("uftpd");
        command.args(["-d", "-q", "-c", "20971520", "-U", &id, "-D"]);
        command.arg(copy.parent().context("a copy is in a folder")?);
        receivers.push(host.spawn(command)?);
        ids.push(id);
    }
    for host in to {
        listens(host, patience)?;
    }
    let start = Instant::now();
    let mut command = silent("uftp");
    // Registered clients are known beforehand: it need not wait for more.
    command.args(["-R", "-1", "-b", BLOCK, "-H", &ids.join(","), "-D"]);
    command.arg(copies[0].file_name().context("a copy has a name")?).arg(file);
    let status = from.spawn(command)?.wait(patience).context("uftp takes too long")?;
    ensure!(status.success(), "uftp ended with {status}");
    Ok(Some(start.elapsed()))
}

/// Waits until the receiver has made its key and listens.
fn listens(host: &Host, patience: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    while !host.run(|| fs::read_to_string("/proc/thread-self/net/udp"))?.contains(PORT) {
        ensure!(Instant::now() < deadline, "uftpd does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn silent(program: &str) -> Command {
    let mut command = Command::new(program);
    command.args(["-x", "0", "-B", BUFFER, "-I", Host::INTERFACE]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}
