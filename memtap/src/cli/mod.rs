//! The `memtap` command.
//!
//! Its exit codes are in [`crate::engine::exit_code`]; logs go to stderr (`RUST_LOG` filters them), results to stdout.

mod embedded;
mod guest;
mod options;
mod qemu;
mod status;
mod uffd;
mod xen;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};
use thiserror::Error;
use tracing_subscriber::EnvFilter;

pub use options::CloneOptions;

use crate::engine::{Command, ControlHandle, StopReason, exit_code};

/// The pager of one SnowFlock clone: takes its page faults, fetches the pages, installs them.
///
/// Exit codes: 0 the clone is complete or its guest ended; 1 set-up failed; 2 usage; 3 the page server was gone for longer
/// than --patience; 4 the server refuses the image; 5 the fault port failed; 6 a page could not be had; 7 a page was wrong;
/// 8 stopped before the clone was complete.
#[derive(Debug, Parser)]
#[command(name = "memtap", version)]
struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    Uffd(uffd::UffdArgs),
    Qemu(qemu::QemuArgs),
    Xen(xen::XenArgs),
    Embedded(embedded::EmbeddedArgs),
    Guest(guest::GuestArgs),
    Status(status::StatusArgs),
}

/// Why a command could not begin.
#[derive(Debug, Error)]
enum CliError {
    #[error(transparent)]
    Descriptor(#[from] descriptor::file::FileError),
    #[error("cannot read the ticket file {0}", .path.display())]
    Ticket { path: std::path::PathBuf, source: std::io::Error },
    #[error("the ticket file {path} has {length} bytes, more than the {max} of a ticket", path = .path.display(), max = descriptor::fetch::MAX_TICKET)]
    LongTicket { path: std::path::PathBuf, length: usize },
    #[error(transparent)]
    Config(#[from] crate::pager::ConfigError),
    #[error(transparent)]
    Source(#[from] crate::source::SourceError),
    #[error(transparent)]
    Accept(#[from] crate::port::firecracker::AcceptError),
    #[error(transparent)]
    Qemu(#[from] qemu::ReachError),
    #[error(transparent)]
    Xen(#[from] crate::port::xen::XenError),
    #[error(transparent)]
    Embedded(#[from] crate::guest::embedded::EmbeddedError),
    #[error("cannot compare with the image")]
    Image(#[from] descriptor::image::ImageError),
    #[error(transparent)]
    Admin(#[from] crate::admin::AdminError),
    #[error("cannot write the statistics to {path}", path = path.display())]
    Stats { path: std::path::PathBuf, source: std::io::Error },
    #[error("{0}")]
    Start(&'static str, #[source] std::io::Error),
}

/// Runs the command with these arguments, the first of which is its name.
pub fn main_from(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let epoch = Instant::now();
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors.
            let code = if error.use_stderr() { exit_code::USAGE } else { exit_code::DONE };
            let _closed = error.print();
            return ExitCode::from(code);
        }
    };
    start_log();
    let result = match cli.role {
        Role::Uffd(arguments) => uffd::run(&arguments, epoch),
        Role::Qemu(arguments) => qemu::run(&arguments, epoch),
        Role::Xen(arguments) => xen::run(&arguments, epoch),
        Role::Embedded(arguments) => embedded::run(&arguments, epoch),
        Role::Guest(arguments) => guest::run(&arguments, epoch),
        Role::Status(arguments) => status::run(&arguments),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tracing::error!("{}", descriptor::Report(&error));
            ExitCode::from(exit_code::SETUP)
        }
    }
}

/// Logs go to stderr. Another role of the same process may have begun a log already.
fn start_log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let _already = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
}

/// Turns SIGTERM and SIGINT into a stop of the engine.
fn stop_on_signals(control: ControlHandle) -> Result<(), CliError> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let start = |error| CliError::Start("cannot watch for signals", error);
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT]).map_err(start)?;
    let watch = move || {
        for signal in signals.forever() {
            if !control.send(Command::Stop(StopReason::Signal(signal))) {
                tracing::debug!(signal, "the engine has ended already");
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(watch).map_err(start)?;
    Ok(())
}
