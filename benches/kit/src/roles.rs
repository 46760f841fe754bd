//! Our own programs as processes of their own: the bench starts itself again in their roles.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{Context, bail};

/// Runs the role that the command line names, if it names one.
pub fn play() -> Option<ExitCode> {
    // The role stands where a program's own name would.
    let role = std::env::args_os().skip(1);
    match std::env::args().nth(1)?.as_str() {
        "memserver" => Some(memserver::cli::main_from(role)),
        "snowflock" => Some(toolstack::cli::main_from(role.collect())),
        "clone" => Some(crate::member::main_from(role)),
        "memtap" => Some(memtap::cli::main_from(role)),
        _ => None,
    }
}

/// A command that starts this program again in a role.
pub fn command(role: &str) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("finding this program")?);
    command.arg(role).stdin(Stdio::null());
    Ok(command)
}

/// A page server that runs for the bench, ended when dropped.
pub struct PageServer {
    child: Child,
    /// The endpoints where it listens, as text.
    pub endpoints: Vec<String>,
}

impl PageServer {
    /// Serves the image of `index` at `listen`, with further arguments.
    pub fn start(index: &Path, listen: &str, arguments: &[&str]) -> anyhow::Result<Self> {
        let mut command = command("memserver")?;
        command.args(["serve", "--listen", listen, "--image"]).arg(index).args(arguments);
        let mut child = command.env("RUST_LOG", "warn").stdout(Stdio::piped()).spawn().context("starting memserver")?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let Some(endpoints) = line.trim_end().strip_prefix("ready ") else {
            let _ = child.kill();
            let status = child.wait()?;
            bail!("memserver said {line:?} instead of `ready` and ended with {status}");
        };
        let endpoints = endpoints.split(' ').map(str::to_owned).collect();
        Ok(Self { child, endpoints })
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
