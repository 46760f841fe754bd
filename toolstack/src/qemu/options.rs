use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use descriptor::Endpoint;
use descriptor::import::qemu::capture::{DiskOverlay, Method, ParseMethodError};
use descriptor::introspect::Insight;

use crate::clones::{self, ServeOptions};

const RUN_EXAMPLE: &str = "\
Example, on a host that has web.snow:
  snowflock run qemu --descriptor web.snow --server tcp://parent:7070 --clones 4 -- \\
    qemu-system-x86_64 -machine pc-i440fx-7.2 -m 4G -nodefaults -display none -serial file:{dir}/console.log";

const FORK_EXAMPLE: &str = "\
Example:
  snowflock fork qemu --qmp /run/parent.qmp --clones 4 -- \\
    qemu-system-x86_64 -machine pc-i440fx-7.2 -m 4G -nodefaults -display none -serial file:{dir}/console.log

For clones on this host and on others, which all get their pages at the cost of one:
  snowflock fork qemu --qmp /run/parent.qmp -o /var/tmp/web --listen tcp://10.0.0.1:7070 --multicast=239.1.2.3:7071%eth0 -- ...";

const TEMPLATE_HELP: &str = "\
The template is the parent's own QEMU command line: same machine (with its version, such as pc-i440fx-7.2), same devices, same -m.
In it clones differ by placeholders:
  {id}       the clone's number, from 1            {uuid}     a fresh UUID, for -uuid
  {name}     its name, see --name                  {vmgenid}  a fresh generation id, for -device vmgenid,guid={vmgenid}
  {dir}      a directory of its own, for sockets   {mac}      a fresh MAC address
Added by this command: -incoming, migration.x-postcopy-ram, -name and -qmp (as {dir}/qmp.sock) where the template has none.

What a clone must know about itself:
  - Random numbers: without vmgenid (or an agent inside) all clones draw the same ones. Give the parent and the template that device.
  - MAC: QEMU restores the parent's from the device state. {mac} on the command line is for names and taps; change the address inside
    the guest, or keep each clone on a network of its own.
  - Disks: freeze the parent's with --disk, and give each clone an overlay of its own over the frozen file.
  - The wall clock is that of the capture until the guest sets it.";

/// Capture a running QEMU over QMP; the parent goes on
///
/// Writes NAME.snow (the descriptor, some 10 to 100 KB, for the hosts of clones) and NAME.snowidx (the image's index) with the files
/// of the image, which stay here and must not change as long as they are served.
#[derive(Args)]
#[command(after_help = "\
Example:
  snowflock capture qemu --qmp /run/parent.qmp -o /var/tmp/web
  snowflock memserver serve --image /var/tmp/web.snowidx --listen tcp://0.0.0.0:7070")]
pub struct CaptureOptions {
    #[command(flatten)]
    pub(super) parent: ParentOptions,
    /// Where the capture goes: NAME.snow, NAME.snowidx and the image beside them
    #[arg(short, long, value_name = "NAME")]
    pub(super) output: PathBuf,
    /// Where the image will be served, for the descriptor: tcp://HOST:PORT or unix:PATH; may be repeated
    #[arg(long, value_name = "ENDPOINT")]
    pub(super) server: Vec<Endpoint>,
    /// Print the result as JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Start clones of a captured QEMU whose image is served by a memserver
///
/// Stays in the foreground; Ctrl-C ends all clones.
#[derive(Args)]
#[command(after_help = format!("{RUN_EXAMPLE}\n\n{TEMPLATE_HELP}"))]
pub struct RunOptions {
    /// The descriptor
    #[arg(long, value_name = "NAME.snow")]
    pub(super) descriptor: PathBuf,
    /// The memserver: tcp://HOST:PORT or unix:PATH; by itself the one that the descriptor names
    #[arg(long, value_name = "ENDPOINT")]
    pub(super) server: Option<Endpoint>,
    #[command(flatten)]
    pub(super) clones: CloneOptions,
}

/// Fork a running QEMU on this host: capture it, serve its memory, start clones; the parent goes on
///
/// Stays in the foreground; Ctrl-C ends all clones.
#[derive(Args)]
#[command(after_help = format!("{FORK_EXAMPLE}\n\n{TEMPLATE_HELP}"))]
pub struct ForkOptions {
    #[command(flatten)]
    pub(super) parent: ParentOptions,
    #[command(flatten)]
    pub(super) serve: ServeOptions,
    #[command(flatten)]
    pub(super) clones: CloneOptions,
}

/// Whom to capture, and how.
#[derive(Args)]
pub(super) struct ParentOptions {
    /// The parent's QMP socket; nobody else may be connected to it
    #[arg(long, value_name = "SOCKET")]
    pub(super) qmp: PathBuf,
    /// How to capture: mapped-ram, background-snapshot, ignore-shared, precopy, or auto for the best that this QEMU can do
    #[arg(long, value_name = "METHOD", default_value = "auto")]
    pub(super) method: Choice,
    /// Freeze this disk of the parent at the capture: it goes on writing to the new qcow2 file OVERLAY; may be repeated
    #[arg(long = "disk", value_name = "DEVICE=OVERLAY", value_parser = parse_disk)]
    pub(super) disks: Vec<Disk>,
    #[command(flatten)]
    pub(super) insight: Insight,
    /// Replace files of an earlier capture
    #[arg(long)]
    pub(super) force: bool,
}

/// A method of capture, or none for the best.
#[derive(Clone, Copy)]
pub(super) struct Choice(pub(super) Option<Method>);

impl FromStr for Choice {
    type Err = ParseMethodError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "auto" { Ok(Self(None)) } else { text.parse().map(|method| Self(Some(method))) }
    }
}

/// A disk to freeze.
#[derive(Clone)]
pub(super) struct Disk(pub(super) DiskOverlay);

/// What `run` and `fork` have in common.
#[derive(Args)]
pub(super) struct CloneOptions {
    #[command(flatten)]
    pub(super) common: clones::CommonOptions,
    /// Let demanded pages overtake others on a channel of their own (QEMU's postcopy-preempt)
    #[arg(long)]
    pub(super) preempt: bool,
    /// QEMU's command line, its program first
    #[arg(last = true, required = true, value_name = "TEMPLATE")]
    pub(super) template: Vec<String>,
}

fn parse_disk(text: &str) -> Result<Disk, String> {
    match text.split_once('=') {
        Some((device, overlay)) if !device.is_empty() && !overlay.is_empty() => {
            Ok(Disk(DiskOverlay { device: device.to_owned(), overlay: overlay.into() }))
        }
        _ => Err("expected DEVICE=OVERLAY".to_owned()),
    }
}
