//! An embedded clone as a process of its own in a host of a network: the role `clone` of a bench.
//!
//! It says `live` when it is in the multicast channel, and waits for a line on standard input: the clones of a bench begin
//! together. One that fills its memory says `complete` with the last page, and waits again. At the end every page is compared
//! with the image, and a last line says what came of it, as JSON.

use std::ffi::OsString;
use std::io::{self, BufRead, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure};
use clap::{Parser, ValueEnum};
use descriptor::image::ImageReader;
use descriptor::{Descriptor, FrameSet};
use memtap::engine::{Command, ControlHandle};
use memtap::guest::embedded::GuestPlan;
use memtap::lanes::Link;
use memtap::pager::Hydrate;
use memtap::source::Lane;
use memtap::stats::Status;
use serde_json::json;

use crate::clone::{self, ClonePlan};

/// How long a clone may take to be in the channel, or its pager to answer.
const LIVE: Duration = Duration::from_secs(20);

/// How long it may live: a bench that hangs says nothing of why.
const LIFE: Duration = Duration::from_secs(60);

/// How often it is looked whether it is.
const LOOK: Duration = Duration::from_millis(5);

#[derive(Parser)]
struct Arguments {
    #[arg(long)]
    descriptor: PathBuf,
    /// The image's index, to compare with.
    #[arg(long)]
    index: PathBuf,
    #[arg(long)]
    server: String,
    #[arg(long, value_enum)]
    mode: Mode,
}

/// How a clone gets its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// All of it as fast as can be, before its guest does anything.
    Fill,
    /// By its guest's touches alone, in the same order in every clone.
    Demand,
}

/// Plays the role with the arguments of a command line, the program's name first.
pub(crate) fn main_from(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    match run(&Arguments::parse_from(arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("clone: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    std::thread::spawn(|| {
        std::thread::sleep(LIFE);
        eprintln!("clone: not done after {LIFE:?}");
        std::process::exit(1)
    });
    let plan = ClonePlan { lane: Lane::Socket, multicast: true, hydrate: Hydrate::Off, spin: Duration::ZERO };
    let (guest, engine, handle) = clone::commanded(&arguments.descriptor, &arguments.server, plan)?;
    let descriptor = Descriptor::read(&arguments.descriptor)?;
    let work = GuestPlan {
        workload: "random,touches=20%,writes=0%,discards=0%".parse()?,
        threads: 1,
        image: Some(ImageReader::open(&arguments.index)?),
        free: FrameSet::empty(descriptor.memory.universe()),
        announce: None,
        epoch: Instant::now(),
    };
    std::thread::scope(|scope| {
        let engine = scope.spawn(|| engine.run());
        let ended = || engine.join().map_err(|_| anyhow!("the engine panicked"));
        if let Err(error) = wait_until_live(&handle) {
            guest.end();
            bail!("{error:#}; its engine: {}", ended()?.outcome);
        }
        say("live")?;
        wait_for_order()?;
        let (report, status) = match arguments.mode {
            Mode::Fill => {
                // One that others' pages have made complete already takes no command.
                let _ = handle.send(Command::Hydrate(Hydrate::Now));
                let ended = ended()?;
                ensure!(ended.status.progress.missing.get() == 0, "the clone is not complete: {}", ended.outcome);
                say("complete")?;
                wait_for_order()?;
                (guest.work(&work)?, ended.status.clone())
            }
            Mode::Demand => {
                let report = guest.work(&work)?;
                // With all of its memory it has ended by itself.
                guest.end();
                (report, ended()?.status.clone())
            }
        };
        let (verified, mismatches) = (report.verified, report.mismatches);
        Ok(say(&json!({ "verified": verified, "mismatches": mismatches, "status": status }).to_string())?)
    })
}

fn wait_for_order() -> io::Result<()> {
    io::stdin().lock().read_line(&mut String::new()).map(drop)
}

fn wait_until_live(handle: &ControlHandle) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIVE;
    while !ask(handle)?.channel.is_some_and(|channel| channel.link == Link::Live) {
        ensure!(Instant::now() < deadline, "no multicast arrives");
        std::thread::sleep(LOOK);
    }
    Ok(())
}

fn ask(handle: &ControlHandle) -> anyhow::Result<Status> {
    let (sender, answer) = sync_channel(1);
    ensure!(handle.send(Command::Status(sender)), "the engine takes no command");
    Ok(answer.recv_timeout(LIVE)?)
}

fn say(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}
