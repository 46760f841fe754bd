//! Capturing a running QEMU into NAME.snow, NAME.snowidx and the image.

use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use descriptor::image::ImageReader;
use descriptor::import::Origin;
use descriptor::import::qemu::capture::{self, Captured, Progress};
use descriptor::import::qemu::{ImportError, import};
use descriptor::introspect::Surveyor;
use descriptor::{Endpoint, FrameSet, ImageId};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::options::{CaptureOptions, ParentOptions};
use crate::error::ToolError;
use crate::interrupt::Interrupt;
use crate::supervise::SuperviseError;
use crate::table::{bytes, micros};

/// A capture that was written.
pub(super) struct Capture {
    pub(super) descriptor: PathBuf,
    pub(super) index: PathBuf,
}

/// Runs `snowflock capture qemu`.
///
/// # Errors
/// When the parent cannot be captured; it then goes on, unless the error says otherwise.
pub fn capture(options: &CaptureOptions) -> Result<(), ToolError> {
    let interrupt = Interrupt::catch().map_err(|error| ToolError::Kernel("catch signals", error))?;
    let CaptureOptions { parent, output, server, json } = options;
    write(parent, output, server, *json, &interrupt).map(|_| ())
}

/// Captures the parent as `name`, and says what came of it.
pub(super) fn write(
    parent: &ParentOptions,
    name: &Path,
    servers: &[Endpoint],
    json: bool,
    interrupt: &Interrupt,
) -> Result<Capture, ToolError> {
    let bar = ProgressBar::no_length().with_style(
        // A constant template; the default style serves as well.
        ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes}")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let mut observe = |progress: Progress<'_>| {
        match progress {
            Progress::Method(method) => bar.set_message(format!("capturing by {method}")),
            Progress::FellBack(method, error) => {
                bar.suspend(|| eprintln!("not by {method}: {}", descriptor::Report(error)));
            }
            Progress::Memory { done, total } => {
                bar.set_length(total);
                bar.set_position(done);
            }
            Progress::Copying { done, total } => {
                bar.set_message("copying, the parent stands still");
                bar.set_length(total);
                bar.set_position(done);
            }
            _ => {}
        }
        if interrupt.is_pending() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let how = capture::CaptureOptions {
        qmp: parent.qmp.clone(),
        method: parent.method.0,
        name: name.to_owned(),
        replace: parent.force,
        disks: parent.disks.iter().map(|disk| disk.0.clone()).collect(),
    };
    let image = ImageId::random().map_err(|error| ToolError::Kernel("draw random numbers", error))?;
    let captured = capture::capture(&how, image, &mut observe);
    if let Some(signal) = interrupt.take() {
        return Err(SuperviseError::Interrupted(signal).into());
    }
    let Captured { files, origin, method } = captured?;
    let origin = Origin { servers: servers.to_vec(), ..origin };
    bar.set_message("looking for zeros");
    bar.set_position(0);
    let mut surveyor = Surveyor::default();
    let scan = |image: &ImageReader, frames: &FrameSet| {
        bar.set_length(frames.count().bytes());
        surveyor.zero_frames(image, frames, &|done| bar.inc(done.bytes()))
    };
    let folder = name.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let made = import(&files, origin, folder, scan)?;
    bar.set_message("looking for free pages");
    let (descriptor, index, avoidance) = surveyor.avoid(parent.avoid, made, folder).map_err(ImportError::from)?;
    bar.finish_and_clear();

    let paths = Capture { descriptor: with_extension(name, "snow"), index: with_extension(name, "snowidx") };
    descriptor.write(&paths.descriptor)?;
    index.write(&paths.index)?;
    let size = std::fs::metadata(&paths.descriptor).map_or(0, |file| file.len());
    let memory = descriptor.memory.frame_count().bytes();
    let pause_us = descriptor.identity.pause_us;
    if json {
        let report = json!({
            "image": image, "parent": descriptor.identity.parent, "method": method.name(), "pause_us": pause_us,
            "memory_bytes": memory, "descriptor_bytes": size, "zero_bytes": descriptor.zero.count().bytes(),
            "free_bytes": descriptor.free_data().count().bytes(), "avoidance": avoidance.to_string(), "descriptor": paths.descriptor, "index": paths.index,
        });
        println!("{report}");
    } else {
        let pause = pause_us.map_or("did not run".to_owned(), |us| format!("stood still for {}", micros(us as f64)));
        eprintln!(
            "captured {:?} by {method}: {} of memory in a descriptor of {}; the parent {pause}",
            descriptor.identity.parent,
            bytes(memory),
            bytes(size),
        );
        eprintln!("free pages: {avoidance}");
        eprintln!("  {}", paths.descriptor.display());
        eprintln!("  {}", paths.index.display());
    }
    Ok(paths)
}

/// `name` with `.extension` behind it, dots in the name or not.
fn with_extension(name: &Path, extension: &str) -> PathBuf {
    let mut path = OsString::from(name);
    path.push(".");
    path.push(extension);
    path.into()
}
