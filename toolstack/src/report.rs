//! What a run says of itself: on standard output, and in its directory for `snowflock status`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::admin;
use crate::error::ToolError;
use crate::supervise::RunDir;
use crate::table::{Table, grouped, micros};

/// A run and its clones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunReport {
    /// What runs, such as `fork qemu`.
    pub command: String,
    /// The process id of the `snowflock` that runs it.
    pub pid: u32,
    /// When it began, in seconds since 1970.
    pub started_unix_s: u64,
    /// The page server, where it is one of this run.
    pub server: Option<ServerReport>,
    /// The clones.
    pub clones: Vec<CloneReport>,
}

/// A run's page server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerReport {
    /// Its process id.
    pub pid: u32,
    /// Where it listens.
    pub endpoints: String,
    /// Its admin socket.
    pub admin: PathBuf,
}

/// A clone of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CloneReport {
    /// Its number, from 1.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// What it is doing.
    pub state: String,
    /// The process id of its hypervisor, or of the pager that the guest is embedded in.
    pub pid: u32,
    /// The process id of its pager, where that is another one.
    pub pager_pid: Option<u32>,
    /// From the start of the hypervisor to the guest's first instruction, in milliseconds, as soon as it got there.
    pub up_after_ms: Option<f64>,
    /// How much of its memory it has.
    pub memory: Option<Memory>,
    /// How its pages travel: `local` (from the image itself), `unix`, `tcp`, or `multicast` (besides one of these).
    #[serde(default)]
    pub lane: Option<String>,
    /// Its QMP socket for the user, where the template had no monitor.
    pub qmp: Option<PathBuf>,
    /// Its UUID, generation id and MAC address, where the template asked for them.
    pub identity: Option<crate::qemu::Identity>,
    /// Its domain, where it is one of Xen.
    #[serde(default)]
    pub domain: Option<crate::xl::DomainReport>,
    /// The admin socket of its memtap.
    pub admin: PathBuf,
}

/// How much of its memory a clone has, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// All pages of its memory map.
    pub total: u64,
    /// Those that must still be fetched.
    pub missing: u64,
    /// Those that need no fetch: zero, free, or given up by the guest.
    pub avoided: u64,
}

impl RunReport {
    /// A report of this process, without clones yet.
    pub fn new(command: &str, server: Option<ServerReport>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (pid, started_unix_s) = (std::process::id(), now.as_secs());
        Self { command: command.to_owned(), pid, started_unix_s, server, clones: Vec::new() }
    }

    /// Leaves the report in the run's directory.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn write(&self, run: &RunDir) -> Result<(), ToolError> {
        let (fresh, path) = (run.path().join("run.json.new"), run.path().join(NAME));
        let text = serde_json::to_string(self).map_err(std::io::Error::from);
        let written = text.and_then(|text| fs::write(&fresh, text)).and_then(|()| fs::rename(&fresh, &path));
        written.map_err(ToolError::file("write", path))
    }

    /// The report in a run's directory, with what the pagers say now.
    ///
    /// # Errors
    /// When there is none.
    pub fn read(dir: &Path, patience: Duration) -> Result<Self, ToolError> {
        let path = dir.join(NAME);
        let text = fs::read(&path).map_err(ToolError::file("read", &path))?;
        let mut report: Self = serde_json::from_slice(&text).map_err(|error| ToolError::File {
            operation: "understand",
            path,
            source: error.into(),
        })?;
        for clone in &mut report.clones {
            let pager = PagerReport::ask(&clone.admin, patience);
            clone.memory = pager.memory.or(clone.memory);
            clone.lane = pager.lane.or(clone.lane.take());
        }
        Ok(report)
    }

    /// The clones as a table for people.
    pub fn table(&self) -> String {
        let mut table = Table::default();
        table.row(["clone", "state", "lane", "up after", "has", "of pages", "needs no fetch", "pid"]);
        for clone in &self.clones {
            let memory =
                |number: fn(&Memory) -> u64| clone.memory.as_ref().map_or("-".to_owned(), |m| grouped(number(m)));
            table.row([
                clone.name.clone(),
                clone.state.clone(),
                clone.lane.clone().unwrap_or("-".to_owned()),
                clone.up_after_ms.map_or("-".to_owned(), |ms| micros(ms * 1e3)),
                memory(|memory| memory.total.saturating_sub(memory.missing + memory.avoided)),
                memory(|memory| memory.total),
                memory(|memory| memory.avoided),
                clone.pid.to_string(),
            ]);
        }
        table.to_string()
    }
}

/// What a memtap says of its clone, as far as it says something.
#[derive(Clone, Debug, Default)]
pub(crate) struct PagerReport {
    pub(crate) memory: Option<Memory>,
    pub(crate) lane: Option<String>,
}

impl PagerReport {
    /// What the memtap behind this admin socket says.
    pub(crate) fn ask(socket: &Path, patience: Duration) -> Self {
        admin::status(socket, patience).map(|status| Self::of(&status)).unwrap_or_default()
    }

    /// What this status of a memtap says.
    pub(crate) fn of(status: &Value) -> Self {
        Self { memory: Memory::of(status), lane: lane(status) }
    }
}

/// How pages travel, by a status of memtap.
fn lane(status: &Value) -> Option<String> {
    let source = status.get("source")?;
    let endpoint = source.get("endpoint")?.as_str()?;
    let lane = match (source.get("connected")?.as_bool()?, source.get("local")?.as_bool()?) {
        (_, true) => "local",
        (false, false) => return None,
        (true, false) if status["channel"]["link"] == "live" => "multicast",
        (true, false) => endpoint.split(':').next()?,
    };
    Some(lane.to_owned())
}

impl Memory {
    /// What a status of memtap says.
    pub(crate) fn of(status: &Value) -> Option<Self> {
        let progress = status.get("progress")?;
        let number = |name: &str| progress.get(name)?.as_u64();
        Some(Self { total: number("total")?, missing: number("missing")?, avoided: number("avoided")? })
    }
}

const NAME: &str = "run.json";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_lane_is_the_one_that_pages_take() {
        let status = |connected: bool, local: bool, endpoint: &str, link: Option<&str>| {
            let channel = link.map(|link| json!({"link": link}));
            json!({"source": {"connected": connected, "local": local, "endpoint": endpoint}, "channel": channel})
        };
        let lane = |status: Value| super::lane(&status);
        assert_eq!(lane(status(true, false, "tcp://10.0.0.1:7070", None)).as_deref(), Some("tcp"));
        assert_eq!(lane(status(true, false, "tcp://10.0.0.1:7070", Some("live"))).as_deref(), Some("multicast"));
        assert_eq!(lane(status(true, false, "unix:/run/pages", Some("blocked"))).as_deref(), Some("unix"));
        assert_eq!(lane(status(false, true, "unix:/run/pages", None)).as_deref(), Some("local"));
        assert_eq!(lane(status(false, false, "tcp://10.0.0.1:7070", None)), None);
        assert_eq!(lane(json!({})), None);
    }
}
