use std::path::PathBuf;
use std::process::Command;

use clap::Args;
use descriptor::Endpoint;

use super::Origin;
use crate::error::ToolError;
use crate::multicast::Multicast;
use crate::server::{Server, Service};
use crate::supervise::{RunDir, Supervisor};

/// What every `run` and `fork` takes.
#[derive(Args)]
pub(crate) struct CommonOptions {
    /// How many clones
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) clones: u32,
    /// The clones' names; {id} is the number
    #[arg(long, value_name = "NAME", default_value = "clone-{id}")]
    pub(crate) name: String,
    /// How pages travel on one host: auto, socket, or local (from the image itself)
    #[arg(long, value_name = "LANE")]
    lane: Option<String>,
    /// Whether to take part in the server's multicast: auto (where it arrives), or off
    #[arg(long, value_name = "WHETHER")]
    mcast: Option<String>,
    /// The interface to join the server's multicast group on; by itself the one that the server is reached by
    #[arg(long, value_name = "NAME")]
    mcast_interface: Option<String>,
    /// Fetch all memory in the background: off, now, or so many pages per second
    #[arg(long, value_name = "WHEN")]
    hydrate: Option<String>,
    /// Working sets: auto (fetch first what siblings needed, and tell what this clone needs), wait (the same, and the clone begins
    /// when that is there), record (only tell), or off
    #[arg(long, value_name = "WHICH")]
    working_set: Option<String>,
    /// What becomes of a clone whose memory cannot be had any more: pause, kill, or hold
    #[arg(long, value_name = "POLICY")]
    pub(crate) on_failure: Option<String>,
    /// How long a server may be gone before that, such as 10s
    #[arg(long, value_name = "TIME")]
    patience: Option<String>,
    /// The file with the secret that server and pagers share
    #[arg(long, value_name = "FILE")]
    ticket_file: Option<PathBuf>,
    /// Print the state of the clones as one JSON object per line, whenever it changes
    #[arg(long)]
    pub(crate) json: bool,
}

impl CommonOptions {
    /// Hands to a memtap what is its business, but for what becomes of its guest when it cannot go on.
    pub(crate) fn pass_on(&self, memtap: &mut Command, origin: &Origin<'_>) {
        memtap.arg("--descriptor").arg(origin.descriptor);
        memtap.args(origin.server.map(|server| format!("--server={server}")));
        let lane = self.lane.as_deref().or(origin.lane);
        let options = [
            ("--lane", lane),
            ("--mcast", self.mcast.as_deref()),
            ("--mcast-interface", self.mcast_interface.as_deref()),
            ("--hydrate", self.hydrate.as_deref()),
            ("--working-set", self.working_set.as_deref()),
            ("--patience", self.patience.as_deref()),
        ];
        for (option, value) in options {
            memtap.args(value.iter().flat_map(|value| [option, value]));
        }
        if let Some(file) = &self.ticket_file {
            memtap.arg("--ticket-file").arg(file);
        }
    }
}

/// How a `fork` keeps and serves its image.
#[derive(Args)]
pub(crate) struct ServeOptions {
    /// Keep the capture as NAME.snow, NAME.snowidx and the image; without this it lies in TMPDIR and is removed at the end
    #[arg(short, long, value_name = "NAME")]
    output: Option<PathBuf>,
    /// Serve here too, for clones on other hosts: tcp://HOST:PORT or unix:PATH; may be repeated
    #[arg(long, value_name = "ENDPOINT")]
    pub(crate) listen: Vec<Endpoint>,
    /// Multicast what several clones want: to this group, or to one of its own, on the loopback interface unless --listen is for
    /// other hosts; clones of this run then use sockets, unless --lane says otherwise
    #[arg(long, value_name = "GROUP:PORT[%IFACE]", num_args = 0..=1, require_equals = true, default_missing_value = Multicast::ANY)]
    multicast: Option<Multicast>,
}

/// A page server of a run, and how the run's own clones reach it.
pub(crate) struct Served {
    pub(crate) server: Server,
    pub(crate) endpoint: Endpoint,
    /// How pages travel where the user did not say.
    pub(crate) lane: Option<&'static str>,
}

impl ServeOptions {
    /// Where the capture goes.
    pub(crate) fn capture_name(&self, run: &mut RunDir) -> Result<PathBuf, ToolError> {
        match &self.output {
            Some(name) => Ok(name.clone()),
            None => Ok(run.scratch()?.join("capture")),
        }
    }

    /// Serves the image of this index.
    pub(crate) fn serve(
        &self,
        supervisor: &mut Supervisor,
        run: &RunDir,
        index: PathBuf,
        clones: &CommonOptions,
    ) -> Result<Served, ToolError> {
        let endpoint = Endpoint::Unix(run.socket("memserver.sock")?);
        let mut listen = vec![endpoint.clone()];
        listen.extend(self.listen.iter().cloned());
        let is_for_others = self.listen.iter().any(|endpoint| matches!(endpoint, Endpoint::Tcp(_)));
        let interface = if is_for_others { None } else { Some("lo") };
        let multicast = self.multicast.as_ref().map(|multicast| multicast.group(interface));
        // Who has the image at hand needs no channel.
        let lane = multicast.is_some().then_some("socket");
        let service = Service { index, listen, ticket_file: clones.ticket_file.clone(), multicast };
        Ok(Served { server: Server::start(supervisor, run, service)?, endpoint, lane })
    }
}
