use std::path::PathBuf;

use clap::{Args, ValueEnum};
use descriptor::Endpoint;
use descriptor::introspect::Avoid;

const CAPTURE_HELP: &str = "\
Example, in dom0:
  snowflock capture xl web -o /var/tmp/web
  snowflock memserver serve --image /var/tmp/web.snowidx --listen tcp://0.0.0.0:7700

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

/// Whom to capture, and how.
#[derive(Args)]
pub(super) struct ParentOptions {
    /// The domain's name or number: an HVM or PVH guest
    #[arg(value_name = "DOM")]
    pub(super) domain: String,
    /// How to capture
    #[arg(long, value_enum, default_value_t)]
    pub(super) method: Method,
    /// Which pages clones need not fetch besides zero ones: auto (those that the guest's kernel holds free, where it is a Linux
    /// whose tables agree), off (none)
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) avoid: Avoid,
    /// Replace files of an earlier capture
    #[arg(long)]
    pub(super) force: bool,
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
