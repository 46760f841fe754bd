use std::io;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use descriptor::fetch::MAX_TICKET;
use descriptor::{Descriptor, Endpoint, FrameSet, PageCount};

use super::{CliError, stop_on_signals};
use crate::admin::AdminSocket;
use crate::engine::{Control, ControlHandle, Ended, Engine, EngineConfig, OnFailure, WorkingSetPolicy, control};
use crate::guest::Guest;
use crate::pager::{Hydrate, Pager, PagerConfig, Prefetch};
use crate::port::{FaultPort, PortTraits};
use crate::source::{Lane, Source, SourceConfig};

/// Patience without an end: the source is tried on for longer than any machine lives.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// What every command that serves a clone takes.
#[derive(Clone, Debug, Args)]
pub struct CloneOptions {
    /// The descriptor of the clone.
    #[arg(long, value_name = "X.snow")]
    pub descriptor: PathBuf,
    /// A page server, tcp://HOST:PORT or unix:PATH; several are tried in turn. Without one, those of the descriptor are.
    #[arg(long = "server", value_name = "ENDPOINT")]
    pub servers: Vec<Endpoint>,
    /// Which way pages may come.
    #[arg(long, value_enum, default_value_t)]
    pub lane: Lane,
    /// Whether to share a multicast channel with other clones where the server offers one over a socket. Nothing needs to be
    /// configured: where no multicast arrives, the clone says so and does without.
    #[arg(long, value_enum, default_value_t)]
    pub mcast: Multicast,
    /// The interface to join multicast groups on; without it, the one that the server is reached by.
    #[arg(long, value_name = "NAME")]
    pub mcast_interface: Option<String>,
    /// A file with the ticket for the server.
    #[arg(long, value_name = "FILE")]
    pub ticket_file: Option<PathBuf>,
    /// How long the page servers may be gone, such as 500ms, 10s, 2m.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration)]
    pub patience: Duration,
    /// What becomes of a guest whose memory does not come.
    #[arg(long, value_enum, default_value_t)]
    pub on_failure: OnFailure,
    /// Fetch what no fault asks for: not at all, as fast as possible, or so many pages a second.
    #[arg(long, value_name = "off|now|PAGES/s", default_value = "off", value_parser = hydrate)]
    pub hydrate: Hydrate,
    /// Fetch ahead of faults: by what their order shows, not at all, so many pages after each, or the aligned block of so many
    /// pages around each.
    #[arg(long, value_name = "auto|off|PAGES|around:PAGES", default_value = "auto", value_parser = prefetch)]
    pub prefetch: Prefetch,
    /// What to do with working sets, where the server keeps them: tell it what this guest needs, and fetch first what its siblings
    /// needed.
    #[arg(long, value_enum, default_value_t)]
    pub working_set: WorkingSetPolicy,
    /// How long the guest may be kept from running for --working-set wait.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = duration)]
    pub head_start: Duration,
    /// Where to listen for admin commands.
    #[arg(long, value_name = "PATH")]
    pub admin: Option<PathBuf>,
    /// Where to write statistics at the end, as JSON.
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,
    /// How long to look for events before sleeping, where events have lately come that soon: saves a wake-up, costs processor
    /// time; 0s to sleep at once.
    #[arg(long, value_name = "DURATION", default_value = "50us", value_parser = duration)]
    pub spin: Duration,
}

/// Whether pages may come by multicast.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Multicast {
    /// Where the server offers it and it arrives.
    #[default]
    Auto,
    /// No.
    Off,
}

/// What an engine needs besides its port and its guest.
pub(super) struct Prepared {
    options: CloneOptions,
    pub(super) descriptor: Descriptor,
    ticket: Vec<u8>,
    control: Control,
    pub(super) handle: ControlHandle,
    /// How many frames of zeros to install for one fault at most.
    pub(super) zero_around: PageCount,
    epoch: Instant,
    _admin: Option<AdminSocket>,
}

impl CloneOptions {
    /// Reads the descriptor and the ticket, and begins to listen for signals and admin commands.
    pub(super) fn prepare(&self, epoch: Instant) -> Result<Prepared, CliError> {
        let descriptor = Descriptor::read(&self.descriptor)?;
        let ticket = self.ticket_file.as_deref().map(read_ticket).transpose()?.unwrap_or_default();
        let (control, handle) = control().map_err(|error| CliError::Start("no descriptor left", error))?;
        let admin = self.admin.as_deref().map(|path| AdminSocket::listen(path, handle.clone())).transpose()?;
        stop_on_signals(handle.clone())?;
        let (options, zero_around) = (self.clone(), PagerConfig::ZERO_AROUND);
        Ok(Prepared { options, descriptor, ticket, control, handle, zero_around, epoch, _admin: admin })
    }
}

impl Prepared {
    /// No frames, as a clone has them at its beginning.
    pub(super) fn none(&self) -> FrameSet {
        FrameSet::empty(self.descriptor.memory.universe())
    }

    /// The engine over this port and guest, which has the `present` frames already.
    ///
    /// # Errors
    /// When the image does not fit the port, or no server is known. The guest, which waits for its memory by now, was then
    /// failed by policy.
    pub(super) fn engine(
        self,
        port: Box<dyn FaultPort + Send>,
        mut guest: Box<dyn Guest + Send>,
        present: FrameSet,
    ) -> Result<(Engine, Option<AdminSocket>), CliError> {
        let (pager, source) = self.cores(port.traits(), present).inspect_err(|_| self.options.fail(&mut *guest))?;
        let Self { options, descriptor, control, epoch, _admin, .. } = self;
        let config = EngineConfig {
            image: descriptor.identity.image,
            hydrate: options.hydrate,
            spin: options.spin,
            on_failure: options.on_failure,
            patience: options.patience,
            progress: true,
            channel_interface: options.mcast_interface.clone(),
            working_set: options.working_set,
        };
        Ok((Engine::new(config, pager, port, source, guest, control, epoch), _admin))
    }

    fn cores(&self, traits: PortTraits, present: FrameSet) -> Result<(Pager, Source), CliError> {
        let Self { options, descriptor, ticket, epoch, .. } = self;
        let seed = seed();
        let config = PagerConfig { zero_around: self.zero_around, ..options.pager_config(descriptor, present, traits) };
        let pager = Pager::new(epoch.elapsed(), config, seed)?;
        let endpoints = if options.servers.is_empty() { descriptor.servers.clone() } else { options.servers.clone() };
        let source = Source::new(SourceConfig {
            endpoints,
            image: descriptor.identity.image,
            universe: descriptor.memory.universe(),
            ticket: ticket.clone(),
            lane: options.lane,
            multicast: options.mcast == Multicast::Auto,
            working_set: options.working_set != WorkingSetPolicy::Off,
            granule: traits.granule,
            seed,
        })?;
        Ok((pager, source))
    }
}

impl CloneOptions {
    fn pager_config(&self, descriptor: &Descriptor, present: FrameSet, port: PortTraits) -> PagerConfig {
        PagerConfig {
            present,
            hydrate: self.hydrate,
            prefetch: self.prefetch,
            record: self.working_set != WorkingSetPolicy::Off,
            head_start: if self.working_set == WorkingSetPolicy::Wait { self.head_start } else { Duration::ZERO },
            patience: if self.on_failure == OnFailure::Hold { FOR_EVER } else { self.patience },
            ..PagerConfig::for_clone(descriptor, port)
        }
    }

    /// Fails a guest that cannot be served: it would hang at its first missing page.
    pub(super) fn fail(&self, guest: &mut dyn Guest) {
        let failed = match self.on_failure {
            OnFailure::Pause => guest.pause(),
            OnFailure::Kill => guest.kill(),
            OnFailure::Hold => Ok(()),
        };
        if let Err(error) = failed {
            tracing::error!("{}", descriptor::Report(&error));
        }
    }

    /// Writes the statistics, where asked for.
    pub(super) fn write_stats(&self, ended: &Ended) -> Result<(), CliError> {
        let Some(path) = &self.stats else { return Ok(()) };
        let failed = |source| CliError::Stats { path: path.clone(), source };
        let stats = serde_json::json!({
            "outcome": ended.outcome.to_string(),
            "exit_code": ended.outcome.exit_code(),
            "status": ended.status,
        });
        let text = serde_json::to_string_pretty(&stats).map_err(|error| failed(error.into()))?;
        std::fs::write(path, text + "\n").map_err(failed)
    }
}

/// A ticket without the end of its line.
fn read_ticket(path: &Path) -> Result<Vec<u8>, CliError> {
    let mut ticket = std::fs::read(path).map_err(|source| CliError::Ticket { path: path.into(), source })?;
    while ticket.last().is_some_and(u8::is_ascii_whitespace) {
        ticket.pop();
    }
    match ticket.len() {
        length if length > MAX_TICKET => Err(CliError::LongTicket { path: path.into(), length }),
        _ => Ok(ticket),
    }
}

/// Spreads the retries of clones that begin together.
fn seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let error = || format!("{text:?} is no duration such as 500ms, 10s or 2m");
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(error)?;
    let (number, unit) = text.split_at(end);
    let number: f64 = number.parse().map_err(|_| error())?;
    let seconds = match unit {
        "us" => number / 1e6,
        "ms" => number / 1e3,
        "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => return Err(error()),
    };
    Duration::try_from_secs_f64(seconds).ok().filter(|duration| *duration <= FOR_EVER).ok_or_else(error)
}

fn hydrate(text: &str) -> Result<Hydrate, String> {
    match text {
        "off" => Ok(Hydrate::Off),
        "now" => Ok(Hydrate::Now),
        _ => {
            let rate = text.strip_suffix("/s").unwrap_or(text).parse::<NonZeroU64>();
            rate.map(Hydrate::Rate).map_err(|_| format!("{text:?} is neither off, now, nor pages per second"))
        }
    }
}

fn prefetch(text: &str) -> Result<Prefetch, String> {
    match text {
        "auto" => Ok(Prefetch::Adaptive { max: PagerConfig::PREFETCH_MAX }),
        "off" => Ok(Prefetch::Off),
        _ => {
            let (around, number) = text.strip_prefix("around:").map_or((false, text), |number| (true, number));
            match number.parse::<u64>().map(PageCount::new) {
                Ok(pages) if pages.get() > 1 << 20 => Err(format!("{text:?} is more than 1048576 pages")),
                Ok(pages) if around => Ok(Prefetch::Around(pages)),
                Ok(pages) => Ok(Prefetch::Fixed(pages)),
                Err(_) => Err(format!("{text:?} is neither auto, off, a number of pages, nor around:PAGES")),
            }
        }
    }
}

/// One line of JSON on stdout.
pub(super) fn print_json(value: &serde_json::Value) -> Result<(), CliError> {
    use io::Write;
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{value}")
        .and_then(|()| stdout.flush())
        .map_err(|error| CliError::Start("cannot write to stdout", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_options() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for wrong in ["", "10", "s", "1e3s", "-1s", "1d", "99999999999h"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
        assert_eq!(hydrate("1000/s"), Ok(Hydrate::Rate(NonZeroU64::new(1000).unwrap())));
        assert!(hydrate("0").is_err());
        assert_eq!(prefetch("8"), Ok(Prefetch::Fixed(PageCount::new(8))));
        assert_eq!(prefetch("around:16"), Ok(Prefetch::Around(PageCount::new(16))));
        assert!(prefetch("some").is_err() && prefetch("around:").is_err());
    }
}
