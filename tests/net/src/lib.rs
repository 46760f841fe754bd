//! A network of hosts on one machine, for tests and benches of the real programs: each host is a network namespace with one
//! interface (`eth0`), all on a bridge that snoops IGMP and MLD as a switch does and asks for memberships itself.
//!
//! ```text
//!   host 1          host 2          host N        a namespace each: eth0 with 10.77.0.N and fd77::N
//!     │ veth          │               │
//!   ──┴───────────────┴───────────────┴──         the bridge, in a namespace of its own
//! ```
//!
//! - [`Network`] makes and holds it; [`missing`] says why none can be had here.
//! - [`Host`]: runs a [`Process`] in it, counts bytes, loses datagrams ([`Loss`]), blocks a group.
//!
//! Nothing outlives the program, however it ends, and nothing of the machine's own network is touched: no namespace has a
//! name, so the kernel removes each with the last thread or process inside, and processes are killed with the program that
//! started them.
//!
//! What this crate deliberately does not do: it neither delays nor reorders (the simulator does), nor knows what is sent.

mod host;
mod loss;
mod namespace;
mod network;
mod process;
mod sys;

use std::io;
use std::process::Command;

use thiserror::Error;

pub use host::{Counters, Host};
pub use loss::Loss;
pub use network::{Network, NetworkConfig};
pub use process::Process;

/// Why there is no network, or it does not do what was asked for.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// The kernel refuses.
    #[error("cannot {0}")]
    Kernel(&'static str, #[source] io::Error),
    /// A program could not be run.
    #[error("cannot run {0}")]
    Program(String, #[source] io::Error),
    /// A program failed.
    #[error("{program} failed: {said}")]
    Failed {
        /// The program and what it was told.
        program: String,
        /// What it said.
        said: String,
    },
    /// The kernel's table of interfaces lacks one.
    #[error("no interface {0} is counted")]
    NoInterface(&'static str),
}

/// Why no network can be had here, for a test to skip itself aloud.
pub fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("network namespaces need root".to_owned());
    }
    let is_there = |program: &str, version: &str| Command::new(program).arg(version).output().is_ok();
    let programs = [("ip", "-V"), ("nft", "-v"), ("ethtool", "--version")];
    if let Some((program, _)) = programs.into_iter().find(|(program, version)| !is_there(program, version)) {
        return Some(format!("no {program} here: install iproute2, nftables and ethtool"));
    }
    namespace::Namespace::new("probe").err().map(|error| format!("no network namespaces here: {error}"))
}
