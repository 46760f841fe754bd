use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use clap::Args;
use descriptor::image::ImageReader;
use descriptor::{FrameSet, PageCount};
use serde_json::json;

use super::CliError;
use super::options::{CloneOptions, print_json};
use crate::engine::{Command, ControlHandle, Ended, Outcome, exit_code};
use crate::guest::embedded::{Announce, Backing, EmbeddedError, EmbeddedGuest, GuestPlan, GuestReport, Workload};
use crate::stats::Status;

/// Run a guest of threads in this process, page its memory, and check it.
///
/// Prints one line of JSON when the guest's work is done.
#[derive(Debug, Args)]
pub(super) struct EmbeddedArgs {
    #[command(flatten)]
    guest: GuestOptions,
    /// Stay after the work is done, until the clone is complete or someone stops it.
    #[arg(long)]
    hold: bool,
    #[command(flatten)]
    clone: CloneOptions,
}

/// What a guest of threads takes.
#[derive(Debug, Args)]
pub(super) struct GuestOptions {
    /// Compare every page with the image at the end.
    #[arg(long, value_name = "X.snowidx")]
    pub(super) verify: Option<PathBuf>,
    /// What the guest does: sequential, strided:PAGES, random or hot:PERCENT%, then options such as
    /// touches=20%,writes=30%,discards=1%,overwrites=0%,seed=1.
    #[arg(long, value_name = "SPEC", default_value = "random", value_parser = |text: &str| text.parse::<Workload>())]
    pub(super) workload: Workload,
    /// How many threads the guest has.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(super) guest_threads: u32,
    /// What the guest's memory is made of.
    #[arg(long, value_enum, default_value_t)]
    pub(super) backing: Backing,
}

impl GuestOptions {
    /// What the guest is to do.
    pub(super) fn plan(
        &self,
        free: FrameSet,
        announce: Option<Announce>,
        epoch: Instant,
    ) -> Result<GuestPlan, CliError> {
        let image = self.verify.as_deref().map(ImageReader::open).transpose()?;
        Ok(GuestPlan { workload: self.workload, threads: self.guest_threads, image, free, announce, epoch })
    }
}

/// What happens while a guest works.
enum Happened {
    GuestDone(Result<GuestReport, EmbeddedError>),
    EngineEnded(Box<Ended>),
}

pub(super) fn run(arguments: &EmbeddedArgs, epoch: Instant) -> Result<u8, CliError> {
    let prepared = arguments.clone.prepare(epoch)?;
    let control = prepared.handle.clone();
    let announce: Announce = Box::new(move |range| control.overwrite(vec![range]).is_ok());
    let plan = arguments.guest.plan(prepared.descriptor.free.clone(), Some(announce), epoch)?;
    let (guest, port, handle) = EmbeddedGuest::new(&prepared.descriptor.memory, arguments.guest.backing)?;
    let control = prepared.handle.clone();
    let none = prepared.none();
    let (engine, _admin) = prepared.engine(Box::new(port), Box::new(handle), none)?;
    let (sender, happened) = channel();
    let (for_engine, for_guest) = (sender.clone(), sender);
    let start = |error| CliError::Start("cannot start a thread", error);
    // Whoever listens has gone only when the process ends.
    let run_engine = move || drop(for_engine.send(Happened::EngineEnded(Box::new(engine.run()))));
    std::thread::Builder::new().name("pager".into()).spawn(run_engine).map_err(start)?;
    // Shared with a thread that may wait for a page for ever, and never freed: the mapping must outlive it.
    let guest: &'static EmbeddedGuest = Box::leak(Box::new(guest));
    let run_guest = move || drop(for_guest.send(Happened::GuestDone(guest.work(&plan))));
    std::thread::Builder::new().name("guest".into()).spawn(run_guest).map_err(start)?;

    let mut ended = None;
    let mut report = None;
    while report.is_none() {
        match happened.recv() {
            Ok(Happened::GuestDone(done)) => report = Some(done?),
            Ok(Happened::EngineEnded(end)) => {
                let complete = matches!(end.outcome, Outcome::Complete);
                ended = Some(end);
                // Threads that wait for a page will never be done.
                if !complete {
                    break;
                }
            }
            Err(_) => break,
        }
    }
    let elapsed = epoch.elapsed();
    let mut status = if ended.is_none() { ask(&control) } else { None };
    if status.is_none()
        && ended.is_none()
        && let Ok(Happened::EngineEnded(end)) = happened.recv()
    {
        ended = Some(end);
    }
    if let Some(ended) = &ended {
        status = Some(ended.status.clone());
    }
    let done = report.is_some();
    let report = report.unwrap_or_default();
    print_json(&result(&report, status.as_ref(), done, elapsed))?;
    if !arguments.hold {
        guest.end();
    }
    while ended.is_none() {
        match happened.recv() {
            Ok(Happened::EngineEnded(end)) => ended = Some(end),
            Ok(Happened::GuestDone(_)) => {}
            Err(_) => break,
        }
    }
    let Some(ended) = ended else { return Ok(exit_code::PORT) };
    arguments.clone.write_stats(&ended)?;
    let code = ended.outcome.exit_code();
    // The port goes with the process: closing it earlier would let the kernel answer waiting threads with zeros.
    std::mem::forget(ended);
    Ok(if report.mismatches > 0 { exit_code::MISMATCH } else { code })
}

fn ask(control: &ControlHandle) -> Option<Status> {
    control.ask(Command::Status).ok()
}

fn result(report: &GuestReport, status: Option<&Status>, done: bool, elapsed: Duration) -> serde_json::Value {
    let pager = status.map(|status| status.pager).unwrap_or_default();
    let blank = status.map_or(PageCount::ZERO, |status| status.progress.avoided);
    json!({
        "done": done,
        "first_touch_ms": report.first_touch_ms,
        "elapsed_ms": elapsed.as_secs_f64() * 1000.0,
        "verified": report.verified,
        "mismatches": report.mismatches,
        "unchecked": report.unchecked,
        "fault_us": report.fault_us,
        "pages_fetched": pager.demand_pages + pager.prefetch_pages + pager.order_pages + pager.hydrate_pages + pager.unasked_pages,
        "pages_avoided": pager.zeros_installed + blank.get(),
        "bytes_received": status.map_or(0, |status| status.source.bytes_received),
        "local": status.is_some_and(|status| status.source.local),
        "guest": report,
        "status": status,
    })
}
