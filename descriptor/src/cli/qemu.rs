use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clap::Args;
use indicatif::ProgressBar;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::make::{Target, Work};
use super::{CliError, Outcome, progress_bar};
use crate::import::Origin;
use crate::import::qemu::capture::{CaptureOptions, DiskOverlay, Method, ParseMethodError, Progress, capture};
use crate::import::qemu::{RamFile, SavedFiles, import};
use crate::{ImageId, Report};

#[derive(Debug, Args)]
pub(super) struct Qemu {
    /// The QMP socket of the QEMU to capture; nobody else may be connected to it
    #[arg(long, value_name = "SOCKET")]
    qmp: PathBuf,
    /// How to capture: auto (the first of the others that works), mapped-ram, background-snapshot, ignore-shared, precopy
    #[arg(long, default_value = "auto", value_parser = method)]
    method: ChosenMethod,
    /// A disk to freeze (may be repeated): the guest goes on in a new qcow2 file OVERLAY on top of what DEVICE is now
    #[arg(long = "disk", value_name = "DEVICE=OVERLAY", value_parser = disk)]
    disks: Vec<DiskOverlay>,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
pub(super) struct QemuStream {
    /// The file that QEMU migrated to; it stays where it is, and clones are served from it
    file: PathBuf,
    /// The file behind a RAM block that x-ignore-shared left out of the stream (may be repeated), BLOCK= where there are
    /// several
    #[arg(long, value_name = "[BLOCK=]FILE", value_parser = ram_file)]
    ram: Vec<RamFile>,
    /// The version of the QEMU that wrote the stream, for people
    #[arg(long, value_name = "VERSION", default_value = "")]
    qemu_version: String,
    #[command(flatten)]
    target: Target,
}

impl Qemu {
    pub(super) fn run(&self) -> Result<Outcome, CliError> {
        self.target.check()?;
        let options = CaptureOptions {
            qmp: self.qmp.clone(),
            method: self.method.0,
            name: self.target.output.clone(),
            replace: self.target.force,
            disks: self.disks.clone(),
        };
        let image = ImageId::random().map_err(CliError::Random)?;
        // Whoever ends us in the middle must not leave the parent standing still.
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&interrupted)).map_err(CliError::Signals)?;
        }
        let mut bar: Option<ProgressBar> = None;
        let captured = capture(&options, image, &mut |progress| {
            match progress {
                Progress::Method(method) => say(&bar, &format!("capturing by {method}")),
                Progress::FellBack(method, error) => say(&bar, &format!("not by {method}: {}", Report(error))),
                Progress::Memory { done, total } => {
                    let bar = bar.get_or_insert_with(|| progress_bar("capturing", total));
                    bar.set_length(total);
                    bar.set_position(done);
                }
                Progress::Copying { done, total } => {
                    let bar = bar.get_or_insert_with(|| progress_bar("capturing", total));
                    bar.set_message("copying, the parent stands still");
                    bar.set_length(total);
                    bar.set_position(done);
                }
            }
            if interrupted.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        bar.iter().for_each(ProgressBar::finish_and_clear);
        let captured = captured?;
        let parent =
            if self.target.name.is_empty() { captured.origin.parent.clone() } else { self.target.name.clone() };
        let origin = Origin { parent, servers: self.target.servers.clone(), ..captured.origin };
        make(&captured.files, origin, &self.target)
    }
}

impl QemuStream {
    pub(super) fn run(&self) -> Result<Outcome, CliError> {
        self.target.check()?;
        let modified = std::fs::metadata(&self.file).and_then(|metadata| metadata.modified());
        let captured = modified.map_err(|source| CliError::Look { path: self.file.clone(), source })?;
        let origin = Origin {
            image: ImageId::random().map_err(CliError::Random)?,
            parent: self.target.name.clone(),
            version: self.qemu_version.clone(),
            captured,
            pause: None,
            servers: self.target.servers.clone(),
        };
        make(&SavedFiles { stream: self.file.clone(), ram: self.ram.clone() }, origin, &self.target)
    }
}

/// Makes the descriptor and the index of a capture and writes them.
fn make(files: &SavedFiles, origin: Origin, target: &Target) -> Result<Outcome, CliError> {
    let mut work = Work::default();
    let begin = Instant::now();
    let made = import(files, origin, target.folder(), |image, frames| work.zero_frames(image, frames))?;
    work.make = begin.elapsed().saturating_sub(work.scan);
    target.finish(made, work)
}

/// Says something on the standard error, above the progress bar where there is one.
fn say(bar: &Option<ProgressBar>, text: &str) {
    match bar {
        Some(bar) => bar.suspend(|| eprintln!("descriptor: {text}")),
        None => eprintln!("descriptor: {text}"),
    }
}

/// A method, or none in particular.
#[derive(Clone, Copy, Debug)]
struct ChosenMethod(Option<Method>);

fn method(text: &str) -> Result<ChosenMethod, ParseMethodError> {
    match text {
        "auto" => Ok(ChosenMethod(None)),
        name => name.parse().map(|method| ChosenMethod(Some(method))),
    }
}

fn disk(text: &str) -> Result<DiskOverlay, String> {
    match text.split_once('=') {
        Some((device, overlay)) if !device.is_empty() && !overlay.is_empty() => {
            Ok(DiskOverlay { device: device.to_owned(), overlay: overlay.into() })
        }
        _ => Err("a disk is DEVICE=OVERLAY".to_owned()),
    }
}

fn ram_file(text: &str) -> Result<RamFile, String> {
    let (block, path) = match text.split_once('=') {
        Some((block, path)) => (Some(block.to_owned()), path),
        None => (None, text),
    };
    if path.is_empty() {
        Err("the file has no name".to_owned())
    } else {
        Ok(RamFile { block, path: path.into(), offset: 0 })
    }
}
