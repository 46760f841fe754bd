//! udpcast: a file by multicast to receivers that acknowledge each slice of it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use testnet::{Host, Network};

use super::is_installed;

/// Sends `file` from the first host of `network` to the others, each of which writes one of `copies`; how long that took, or
/// `None` when udpcast is not installed.
///
/// # Errors
/// When it fails, or takes longer than `patience`.
pub fn udpcast(
    network: &Network,
    file: &Path,
    copies: &[PathBuf],
    patience: Duration,
) -> anyhow::Result<Option<Duration>> {
    let [from, to @ ..] = network.hosts() else { return Ok(None) };
    if !is_installed("udp-sender") {
        return Ok(None);
    }
    let mut receivers = Vec::new();
    for (host, copy) in to.iter().zip(copies) {
        let mut command = silent("udp-receiver");
        // The largest buffer that the kernel grants without privilege: the default loses much.
        command.args(["--rcvbuf", "4m", "--file"]).arg(copy);
        receivers.push(host.spawn(command)?);
    }
    let start = Instant::now();
    let mut command = silent("udp-sender");
    // It says hello again soon to receivers that missed it, and begins with the last of them.
    command.args(["--full-duplex", "--rexmit-hello-interval", "50", "--min-receivers", &to.len().to_string()]);
    command.arg("--file").arg(file);
    let status = from.spawn(command)?.wait(patience).context("udp-sender takes too long")?;
    ensure!(status.success(), "udp-sender ended with {status}");
    for receiver in &mut receivers {
        let status = receiver.wait(patience).context("udp-receiver takes too long")?;
        ensure!(status.success(), "udp-receiver ended with {status}");
    }
    Ok(Some(start.elapsed()))
}

fn silent(program: &str) -> Command {
    let mut command = Command::new(program);
    command.args(["--nokbd", "--no-progress", "--interface", Host::INTERFACE]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}
