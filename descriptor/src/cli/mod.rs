//! The `descriptor` command, as a library so that `snowflock descriptor` is the same program.
//!
//! Exit codes: 0 when all is well, 1 when something failed or a check found a fault, 2 when the command line is wrong.

mod classes;
mod export;
mod inspect;
mod make;
mod qemu;
mod text;
mod verify;
mod xl;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use thiserror::Error;

use crate::file::{FileError, FormatError};
use crate::image::ImageError;
use crate::import::qemu::ImportError;
use crate::import::qemu::capture::CaptureError;
use crate::import::raw::RawError;
use crate::import::xen;
use crate::introspect::Refusal;
use crate::{PageCount, Report};

/// Makes, shows and checks the descriptors of virtual machines that are forked.
#[derive(Debug, Parser)]
#[command(name = "descriptor", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a descriptor (NAME.snow) and the index of its image (NAME.snowidx)
    #[command(subcommand)]
    Make(make::Make),
    /// Show what a descriptor or an image index holds
    Inspect(inspect::Inspect),
    /// Write what a hypervisor's own tools make a clone of
    #[command(subcommand)]
    Export(export::Export),
    /// Check a descriptor or an image index, and with --image the image too
    Verify(verify::Verify),
}

/// What keeps a command from doing its work.
#[derive(Debug, Error)]
enum CliError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("cannot use {path}", path = path.display())]
    Format { path: PathBuf, source: FormatError },
    #[error(transparent)]
    Raw(#[from] RawError),
    #[error(transparent)]
    Qemu(#[from] ImportError),
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error(transparent)]
    Xen(#[from] xen::ImportError),
    #[error("{path} makes no stream for xl restore", path = path.display())]
    NoStream { path: PathBuf, source: xen::RecordError },
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("cannot look at {path}", path = path.display())]
    Look { path: PathBuf, source: io::Error },
    #[error("cannot watch for signals")]
    Signals(#[source] io::Error),
    #[error("{path} exists; --force replaces it", path = .0.display())]
    Exists(PathBuf),
    #[error("it cannot be told what the guest uses its memory for")]
    NoClasses(#[source] Refusal),
    #[error("cannot write {path}", path = path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot draw a name for the image from the system's random numbers")]
    Random(#[source] io::Error),
    #[error("cannot write the output")]
    Output(#[source] io::Error),
}

/// What a command that could do its work has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Good,
    Faulty,
}

/// Runs the command with these arguments, the first of which is its name.
pub fn main_from(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // When nobody reads it, the exit code still says it.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let result = match &cli.command {
        Command::Make(make) => make.run(),
        Command::Inspect(inspect) => inspect.run(),
        Command::Export(export) => export.run(),
        Command::Verify(verify) => verify.run(),
    };
    match result {
        Ok(Outcome::Good) => ExitCode::SUCCESS,
        Ok(Outcome::Faulty) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("descriptor: {}", Report(&error));
            ExitCode::FAILURE
        }
    }
}

/// Writes a command's answer to the standard output.
fn answer(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // The reader has seen enough, as `head` has.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(CliError::Output),
    }
}

fn answer_json(value: &serde_json::Value) -> Result<(), CliError> {
    answer(&format!("{value:#}\n"))
}

/// A progress bar over `bytes` of work, which shows itself on a terminal only.
fn progress_bar(work: &'static str, bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes).with_message(work);
    let template = "{msg}  {bar:40}  {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// A progress bar for a scan of `pages`.
fn scan_progress(pages: PageCount) -> ProgressBar {
    progress_bar("looking for zero pages", pages.bytes())
}
