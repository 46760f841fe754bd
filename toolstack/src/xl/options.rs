use std::path::PathBuf;

use clap::{Args, ValueEnum};
use descriptor::Endpoint;
use descriptor::introspect::Insight;

use crate::clones::{CommonOptions, ServeOptions};

const CAPTURE_HELP: &str = "\
Example, in dom0:
  snowflock capture xl web -o /var/tmp/web
  snowflock memserver serve --image /var/tmp/web.snowidx --listen tcp://0.0.0.0:7070

Methods:
  migrate  `xl migrate` to a receiver of ours, which takes the domain's live stream and then lets it go on where it is. The
           domain stands still for the last round of the copy alone, some 100 ms. That xl calls this a failed migration is as it should be.
  save     `xl save -c`: the domain stands still while all of its memory is written.
  auto     migrate, and save where that fails.

The pause that is told goes from the moment when xl sees that the guest has suspended until xl has resumed it and ended. How long the
guest took to suspend (freezing its processes, stopping its devices) is told apart, as suspending_us in the JSON.
Breaking off (Ctrl-C) has xl resume the domain, and so has the death of this command.";

/// Capture a running domain of Xen by the stock `xl`; the domain goes on
///
/// Writes NAME.snow (the descriptor, some 10 to 100 KB, for the hosts of clones), NAME.snowidx (the image's index) and NAME.xen (the
/// image, as large as the domain's memory), which stay here and must not change as long as they are served.
#[derive(Args)]
#[command(after_help = CAPTURE_HELP)]
pub struct CaptureOptions {
    #[command(flatten)]
    pub(super) parent: ParentOptions,
    /// Where the capture goes: NAME.snow, NAME.snowidx and NAME.xen
    #[arg(short, long, value_name = "NAME")]
    pub(super) output: PathBuf,
    /// Where the image will be served, for the descriptor: tcp://HOST:PORT or unix:PATH; may be repeated
    #[arg(long, value_name = "ENDPOINT")]
    pub(super) server: Vec<Endpoint>,
    /// Print the result as JSON
    #[arg(long)]
    pub(super) json: bool,
}

const CLONE_HELP: &str = "\
A clone is the parent's domain with a name, a UUID and MAC addresses of its own. Each gets its configuration from the parent's, as xl
keeps it, or from the file of --config: the parent's own with another disk, say. In that file {id}, {name}, {uuid} and {dir} stand for the
clone's number, name, UUID, and a directory of its own; name, uuid and the addresses in vif are set by this command.

What a clone must know about itself:
  - Disks: clones must not write to the parent's, nor all to one. Give each a copy-on-write snapshot of its own by --config, taken of a
    disk on which the parent has nothing that matters, or of one that it sees to be consistent.
  - Network: the guest's frontend takes the new MAC address when it resumes; its IP address is still the parent's.
  - Random numbers: clones draw the same ones until something inside reseeds them.

What this host needs: Xen built with CONFIG_MEM_PAGING (Debian's is not), a PV dom0, xl with autoballoon=\"off\" in xl.conf (or xl makes room for
all the memory that a clone may ever touch), and for the guest hardware-assisted paging and no device passed through.";

const FORK_HELP: &str = "\
Example, in dom0:
  snowflock fork xl web --clones 4 --name 'web-{id}'

For clones on this host and on others, which all get their pages at the cost of one:
  snowflock fork xl web -o /var/tmp/web --clones 2 --listen tcp://10.0.0.1:7070 --multicast=239.1.2.3:7071%eth0";

const RUN_HELP: &str = "\
Example, in dom0 of a host that has web.snow:
  snowflock run xl --descriptor web.snow --server tcp://10.0.0.1:7070 --clones 4 --name 'web-{id}'";

/// Start clones of a captured domain whose image is served by a memserver
///
/// Stays in the foreground; Ctrl-C destroys all clones.
#[derive(Args)]
#[command(after_help = format!("{RUN_HELP}\n\n{CLONE_HELP}"))]
pub struct RunOptions {
    /// The descriptor
    #[arg(long, value_name = "NAME.snow")]
    pub(super) descriptor: PathBuf,
    /// The memserver: tcp://HOST:PORT or unix:PATH; by itself the one that the descriptor names
    #[arg(long, value_name = "ENDPOINT")]
    pub(super) server: Option<Endpoint>,
    #[command(flatten)]
    pub(super) tool: ToolOptions,
    #[command(flatten)]
    pub(super) clones: CloneOptions,
}

/// Fork a running domain of Xen on this host: capture it, serve its memory, start clones; the domain goes on
///
/// Stays in the foreground; Ctrl-C destroys all clones.
#[derive(Args)]
#[command(after_help = format!("{FORK_HELP}\n\n{CLONE_HELP}"))]
pub struct ForkOptions {
    #[command(flatten)]
    pub(super) parent: ParentOptions,
    #[command(flatten)]
    pub(super) serve: ServeOptions,
    #[command(flatten)]
    pub(super) clones: CloneOptions,
}

/// What `run` and `fork` have in common.
#[derive(Args)]
pub(super) struct CloneOptions {
    /// The clones' configuration, in place of the parent's own; see below
    #[arg(long, value_name = "TEMPLATE")]
    pub(super) config: Option<PathBuf>,
    /// Let the clones write to disks that others write to as well
    #[arg(long)]
    pub(super) share_disks: bool,
    #[command(flatten)]
    pub(super) common: CommonOptions,
}

/// Whom to capture, and how.
#[derive(Args)]
pub(super) struct ParentOptions {
    /// The domain's name or number: an HVM or PVH guest
    #[arg(value_name = "DOM")]
    pub(super) domain: String,
    /// How to capture
    #[arg(long, value_enum, default_value_t)]
    pub(super) method: Method,
    #[command(flatten)]
    pub(super) insight: Insight,
    /// Replace files of an earlier capture
    #[arg(long)]
    pub(super) force: bool,
    #[command(flatten)]
    pub(super) tool: ToolOptions,
}

/// By what.
#[derive(Args)]
pub(super) struct ToolOptions {
    /// The toolstack's command
    #[arg(long, value_name = "PROGRAM", default_value = "xl")]
    pub(super) xl: String,
}

/// A way to capture a domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Method {
    /// The first of the others that works
    #[default]
    Auto,
    /// Live, with a short pause
    Migrate,
    /// The domain stands still meanwhile
    Save,
}
