//! Capturing a running QEMU into NAME.snow, NAME.snowidx and the image.

use std::ops::ControlFlow;
use std::path::Path;

use descriptor::import::Origin;
use descriptor::import::qemu::capture::{self, Captured, Progress};
use descriptor::import::qemu::import;
use descriptor::{Endpoint, ImageId};
use serde_json::Map;

use super::options::{CaptureOptions, ParentOptions};
use crate::capture::{Capture, Making, progress_bar};
use crate::error::ToolError;
use crate::interrupt::Interrupt;
use crate::supervise::SuperviseError;

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
    let bar = progress_bar();
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
    let (method, insight, no_pause) = (method.name(), &parent.insight, "did not run");
    let making = Making { name, method, insight, json, no_pause, interrupt, details: Map::new() };
    making.finish(&bar, |folder, scan| Ok(import(&files, origin, folder, scan)?))
}
