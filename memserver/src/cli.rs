//! The `memserver` command.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use descriptor::fetch::{Capabilities, MAX_TICKET};
use descriptor::{Endpoint, ImageId, Report};
use mcast_socket::Group;
use serde::Serialize;
use thiserror::Error;
use tracing_subscriber::EnvFilter;

use crate::config::{Compress, MulticastConfig, ServeConfig};
use crate::control::client::{AdminError, Command, Reply, ask};
use crate::image::Preload;
use crate::ring::RingFeatures;
use crate::server::{ServeError, Server};

/// Serves the memory images of forked VMs to the pagers of their clones.
#[derive(Debug, Parser)]
#[command(name = "memserver", version, about)]
struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Serve images until SIGTERM. Prints `ready ENDPOINT…` once clients can connect.
    Serve(ServeArguments),
    /// Show what a server is doing.
    Status(AdminArguments),
    /// List the images in service.
    Images(AdminArguments),
    /// Put one more image into service.
    Add {
        #[command(flatten)]
        admin: AdminArguments,
        /// The image's index file (NAME.snowidx).
        index: PathBuf,
    },
    /// Take an image out of service; its sessions end.
    Drop {
        #[command(flatten)]
        admin: AdminArguments,
        /// The image's name, 32 hexadecimal digits.
        image: ImageId,
    },
    /// Stop a server once its sessions have what they asked for.
    Drain {
        #[command(flatten)]
        admin: AdminArguments,
        /// Seconds after which sessions are broken off.
        #[arg(long, value_parser = seconds)]
        grace: Option<Duration>,
    },
}

#[derive(Debug, clap::Args)]
struct AdminArguments {
    /// The server's admin socket.
    #[arg(long)]
    admin: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct ServeArguments {
    /// Index file (NAME.snowidx) of an image to serve; may be given several times, and more can be added later.
    #[arg(long = "image", value_name = "INDEX")]
    images: Vec<PathBuf>,
    /// Where to listen: tcp://HOST:PORT (port 0 for any) or unix:PATH; may be given several times.
    #[arg(long, required = true)]
    listen: Vec<Endpoint>,
    /// Permission bits of the Unix sockets that serve, such as 0660 for a group; whoever may connect may read guest memory,
    /// unless there is a ticket.
    #[arg(long, value_name = "OCTAL", value_parser = permission_bits, default_value = "0600")]
    socket_mode: u32,
    /// Threads, each with an io_uring of its own.
    #[arg(long, default_value = "1")]
    threads: NonZeroUsize,
    /// Sessions at one time.
    #[arg(long, default_value = "1024")]
    max_sessions: NonZeroUsize,
    /// A Unix socket for `memserver status` and its kind, for its owner only.
    #[arg(long, value_name = "PATH")]
    admin: Option<PathBuf>,
    /// Serve metrics for Prometheus at http://ADDR:PORT/metrics; loopback addresses only.
    #[arg(long, value_name = "ADDR:PORT")]
    metrics: Option<SocketAddr>,
    /// A file whose contents clients must know to be served.
    #[arg(long, value_name = "FILE")]
    ticket_file: Option<PathBuf>,
    /// Compress pages for clients that offer lz4.
    #[arg(long, value_enum, default_value = "auto")]
    compress: Compress,
    /// Hand the image's files to clients on the same host that ask for them over a Unix socket.
    #[arg(long, value_enum, default_value = "auto")]
    local_lane: Switch,
    /// Multicast pages to the clones that ask for it, so that one answer serves all of them: a group (239.0.0.0/8 is for your
    /// own use), a UDP port, and the interface where the routing table's choice is not wanted, such as 239.1.2.3:7071%eth0.
    /// Datagrams are not encrypted: whoever is in the group's network can read guest memory, whatever the ticket.
    #[arg(long, value_name = "GROUP:PORT[%IFACE]")]
    mcast: Option<Group>,
    /// Bytes per second that the clones of one image are sent by multicast at most, such as 200M or 1Gi.
    #[arg(long, value_name = "BYTES", value_parser = rate, requires = "mcast")]
    mcast_rate: Option<NonZeroU64>,
    /// Routers that multicast datagrams may cross, and one; 0 keeps them on this host.
    #[arg(long, value_name = "HOPS", default_value = "1", requires = "mcast")]
    mcast_ttl: u8,
    /// Bytes in a multicast datagram, where the path's MTU is smaller than the interface's.
    #[arg(long, value_name = "BYTES", requires = "mcast", hide = true)]
    mcast_datagram: Option<u16>,
    /// Tell clones what their siblings needed, and ask them what they need; it is kept in NAME.snowws beside the image. What
    /// they say is believed: whoever may connect (and has the ticket, where there is one) can make later clones fetch up to 1 GiB
    /// that they do not need, or nothing ahead at all. Page contents are not concerned.
    #[arg(long, value_enum, default_value = "on")]
    working_sets: OnOff,
    /// Bring image files into memory at the start.
    #[arg(long, value_enum, default_value = "populate")]
    preload: PreloadArgument,
    /// Seconds of silence after which a session ends, 0.1 or more.
    #[arg(long, value_parser = seconds, default_value = "60")]
    idle_timeout: Duration,
    /// Seconds that sessions have to end after SIGTERM.
    #[arg(long, value_parser = seconds, default_value = "5")]
    grace: Duration,
    /// Use of io_uring only what old kernels have.
    #[arg(long, value_enum, default_value = "auto", hide = true)]
    ring_features: RingArgument,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    Auto,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnOff {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PreloadArgument {
    /// Read pages when they are asked for.
    Off,
    /// Read the files in the background.
    Populate,
    /// Read them and lock them.
    Lock,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RingArgument {
    Auto,
    Basic,
}

#[derive(Debug, Error)]
enum CliError {
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error("cannot read the ticket in {path}", path = path.display())]
    TicketFile { path: PathBuf, source: io::Error },
    #[error("the ticket in {path} has {length} bytes: 16 to {MAX_TICKET} are allowed", path = path.display())]
    TicketLength { path: PathBuf, length: usize },
    #[error("cannot write the answer")]
    Output(#[from] io::Error),
    #[error("cannot write the answer")]
    Json(#[from] serde_json::Error),
}

/// Runs the command with these arguments, the program's name first.
pub fn main_from(arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Where not even this can be written, there is nobody to tell.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    match run(arguments.action) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "memserver: {}", Report(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(action: Action) -> Result<(), CliError> {
    match action {
        Action::Serve(arguments) => serve(arguments),
        Action::Status(admin) => {
            let reply = ask(&admin.admin, &Command::Status)?;
            show(&admin, reply.status.as_ref(), |status| status.to_string())
        }
        Action::Images(admin) => {
            let reply = ask(&admin.admin, &Command::Images)?;
            let lines = |images: &Vec<_>| images.iter().map(|image| format!("{image}\n")).collect();
            show(&admin, reply.images.as_ref(), lines)
        }
        Action::Add { admin, index } => {
            // The server may run in another folder.
            let path = std::path::absolute(&index)?;
            let reply = ask(&admin.admin, &Command::Add { path })?;
            show(&admin, reply.image.as_ref(), |image| format!("{image}\n"))
        }
        Action::Drop { admin, image } => acknowledge(&admin, &Command::Drop { image }),
        Action::Drain { admin, grace } => {
            let grace_ms = grace.map(|grace| u64::try_from(grace.as_millis()).unwrap_or(u64::MAX));
            acknowledge(&admin, &Command::Drain { grace_ms })
        }
    }
}

fn serve(arguments: ServeArguments) -> Result<(), CliError> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // A program that embeds this one may have a subscriber already.
    let _ = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_env_filter(filter)
        .try_init();
    match crate::sys::raise_file_limit() {
        Ok(limit) => tracing::debug!(limit, "open files"),
        Err(error) => tracing::warn!(%error, "the limit of open files stays as it is"),
    }
    let server = Server::start_with(&config_of(arguments)?, true)?;
    let mut line = String::from("ready");
    for endpoint in server.endpoints() {
        line.push_str(&format!(" {endpoint}"));
    }
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()?;
    drop(out);
    Ok(server.wait()?)
}

fn config_of(arguments: ServeArguments) -> Result<ServeConfig, CliError> {
    let mut config = ServeConfig::new(arguments.images, arguments.listen);
    config.socket_mode = arguments.socket_mode;
    config.threads = arguments.threads;
    config.max_sessions = arguments.max_sessions;
    config.admin = arguments.admin;
    config.metrics = arguments.metrics;
    config.compress = arguments.compress;
    config.drain_grace = arguments.grace;
    config.preload = match arguments.preload {
        PreloadArgument::Off => Preload::Off,
        PreloadArgument::Populate => Preload::Populate,
        PreloadArgument::Lock => Preload::Lock,
    };
    config.ring_features = match arguments.ring_features {
        RingArgument::Auto => RingFeatures::Auto,
        RingArgument::Basic => RingFeatures::Basic,
    };
    config.mcast = arguments.mcast.map(|group| MulticastConfig {
        max_rate: arguments.mcast_rate,
        ttl: arguments.mcast_ttl,
        max_datagram: arguments.mcast_datagram,
        ..MulticastConfig::new(group)
    });
    let lz4 = if config.compress == Compress::Off { Capabilities::default() } else { Capabilities::LZ4 };
    let local = if arguments.local_lane == Switch::Off { Capabilities::default() } else { Capabilities::LOCAL };
    config.working_sets = arguments.working_sets == OnOff::On;
    config.session.capabilities = lz4.union(local).union(Capabilities::MULTICAST).union(Capabilities::WORKING_SET);
    config.session.limits.idle_timeout_ms = u32::try_from(arguments.idle_timeout.as_millis()).unwrap_or(u32::MAX);
    config.session.ticket = arguments.ticket_file.map(|path| read_ticket(&path)).transpose()?;
    Ok(config)
}

/// The ticket in a file, without the white space at its end.
fn read_ticket(path: &Path) -> Result<Vec<u8>, CliError> {
    let failed = |source| CliError::TicketFile { path: path.to_owned(), source };
    let bytes = std::fs::read(path).map_err(failed)?;
    let ticket = bytes.trim_ascii_end();
    // A shorter one could be guessed.
    if !(16..=MAX_TICKET).contains(&ticket.len()) {
        return Err(CliError::TicketLength { path: path.to_owned(), length: ticket.len() });
    }
    Ok(ticket.to_vec())
}

fn show<T: Serialize>(admin: &AdminArguments, value: Option<&T>, text: impl Fn(&T) -> String) -> Result<(), CliError> {
    let Some(value) = value else {
        return Err(AdminError::Refused("memserver's answer lacks what was asked for".to_owned()).into());
    };
    let text = if admin.json { serde_json::to_string_pretty(value)? + "\n" } else { text(value) };
    Ok(io::stdout().lock().write_all(text.as_bytes())?)
}

fn acknowledge(admin: &AdminArguments, command: &Command) -> Result<(), CliError> {
    let reply: Reply = ask(&admin.admin, command)?;
    if admin.json {
        writeln!(io::stdout().lock(), "{}", serde_json::to_string(&reply)?)?;
    }
    Ok(())
}

fn permission_bits(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| mode & !0o777 == 0);
    mode.ok_or_else(|| format!("{text:?} is no octal number from 0 to 0777"))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let value: f64 = text.parse().map_err(|_| format!("{text:?} is no number of seconds"))?;
    // 1 ms to a month.
    if (0.0..=2.7e6).contains(&value) {
        Ok(Duration::from_secs_f64(value))
    } else {
        Err(format!("{text} is no sensible number of seconds"))
    }
}

/// Bytes per second: a number, which may have a fraction, and one of the suffixes k, M, G (powers of 1000) and Ki, Mi, Gi (of 1024).
fn rate(text: &str) -> Result<NonZeroU64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" => 1.0,
        "k" | "K" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "Ki" => f64::from(1 << 10),
        "Mi" => f64::from(1 << 20),
        "Gi" => f64::from(1 << 30),
        other => return Err(format!("{other:?} is none of the suffixes k, M, G, Ki, Mi and Gi")),
    };
    let number: f64 = digits.parse().map_err(|_| format!("{text:?} is no number of bytes per second"))?;
    // From what a modem did to what no network does.
    let bytes = number * factor;
    let sensible = (1e3..=1e12).contains(&bytes).then_some(bytes as u64).and_then(NonZeroU64::new);
    sensible.ok_or_else(|| format!("{text} is no sensible number of bytes per second (1k to 1000G)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_suffixes() {
        for (text, expected) in [("200M", 200_000_000), ("1.5Gi", 3 << 29), ("125000k", 125_000_000), ("4096", 4096)] {
            assert_eq!(rate(text).map(NonZeroU64::get), Ok(expected));
        }
        for text in ["", "M", "0", "-1M", "1", "200MB", "nan", "99999G", "20 M"] {
            assert!(rate(text).is_err(), "{text}");
        }
    }
}
