//! The demonstration: a memory image forked into embedded guests, which work on their memory while it arrives; then every
//! page of every clone is compared with the image.

mod full_copy;
mod image;
mod outcome;

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use descriptor::image::ImageReader;
use descriptor::import::raw::{self, RawImage};
use descriptor::{Endpoint, FrameSet, ImageId, PAGE_SIZE, PageCount};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use self::outcome::{CloneOutcome, Outcome};
use crate::error::ToolError;
use crate::interrupt::Interrupt;
use crate::multicast::Multicast;
use crate::report::{CloneReport, PagerReport, RunReport};
use crate::server::{Server, Service};
use crate::supervise::{ChildId, ChildSpec, Event, Output, Role, RunDir, SuperviseError, Supervisor, own_command};

/// Fork a memory image into clones on this machine and check every page of each
///
/// Needs nothing but Linux 5.11 or newer, and no privilege. It makes an image with a realistic mix of zero, text-like, random and
/// repeated pages, serves it by a memserver, and forks it into clones: guests embedded in a memtap each, which work on their
/// memory while it arrives. At the end each page of each clone is compared with the image. Exit code 0 only if all were right.
#[derive(Args)]
#[command(after_help = "\
Examples:
  snowflock demo
  snowflock demo --clones 8 --mem 1024 --lane local
  snowflock demo --clones 8 --multicast
  snowflock demo --json | jq .fault_us")]
pub struct Options {
    /// How many clones
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    clones: u32,
    /// The memory of each in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    mem: u32,
    /// How pages travel
    #[arg(long, value_enum, default_value_t = Lane::Tcp)]
    lane: Lane,
    /// Multicast what several clones want, besides TCP connections; to this group, or to one of its own on the loopback interface
    #[arg(long, value_name = "GROUP:PORT[%IFACE]", num_args = 0..=1, require_equals = true, default_missing_value = Multicast::ANY, conflicts_with = "lane")]
    multicast: Option<Multicast>,
    /// What the image and the guests' work are made from; the same seed, the same demonstration
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// How pages travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Lane {
    /// Over a TCP connection on the loopback interface, as between hosts
    Tcp,
    /// Over a Unix socket
    Unix,
    /// From the image itself, which the server hands over as a file descriptor
    Local,
}

/// How often it is looked how far the clones are.
const LOOK: Duration = Duration::from_millis(100);

/// How long a pager may take to say so.
const LOOK_PATIENCE: Duration = Duration::from_millis(500);

/// Runs the demonstration.
///
/// # Errors
/// When something cannot be had, a part fails, a page was wrong, or by Ctrl-C.
pub fn run(options: &Options) -> Result<(), ToolError> {
    let interrupt = Interrupt::catch().map_err(|error| ToolError::Kernel("catch signals", error))?;
    let mut run = RunDir::create("demo")?;
    let files = make_image(options, &run.scratch()?, &interrupt)?;
    let full_copy = full_copy::measure(&files.image, options.lane).map_err(ToolError::file("copy", &files.image))?;

    let mut supervisor = Supervisor::new(interrupt);
    let endpoint = match options.lane {
        Lane::Tcp => Endpoint::Tcp("127.0.0.1:0".to_owned()),
        Lane::Unix | Lane::Local => Endpoint::Unix(run.socket("memserver.sock")?),
    };
    let multicast = options.multicast.as_ref().map(|multicast| multicast.group(Some("lo")));
    let service = Service { index: files.index.clone(), listen: vec![endpoint], ticket_file: None, multicast };
    let server = Server::start(&mut supervisor, &run, service)?;
    let mut report = RunReport::new("demo", Some(server.report(&supervisor)));

    let started = Instant::now();
    let mut clones = Vec::new();
    for id in 1..=options.clones {
        let clone = Clone::start(&mut supervisor, &run, &files, &server, options, id)?;
        report.clones.push(clone.report(&supervisor));
        clones.push(clone);
    }
    report.write(&run)?;
    wait(&mut supervisor, &server, &clones, options)?;
    let took = started.elapsed();
    let multicast_bytes = options.multicast.as_ref().and_then(|_| server.multicast_bytes());

    let outcomes: Result<Vec<CloneOutcome>, ToolError> =
        clones.iter().map(|clone| CloneOutcome::read(&clone.result)).collect();
    let outcome = Outcome::of(options, &outcomes?, multicast_bytes, full_copy, took);
    let text = if options.json { outcome.json() } else { outcome.table() };
    writeln!(io::stdout(), "{text}").map_err(|error| ToolError::Kernel("write to standard output", error))?;
    if outcome.verified { Ok(()) } else { Err(ToolError::NotVerified) }
}

/// The files of the image.
struct Files {
    image: PathBuf,
    descriptor: PathBuf,
    index: PathBuf,
}

fn make_image(options: &Options, scratch: &Path, interrupt: &Interrupt) -> Result<Files, ToolError> {
    let at = |name: &str| scratch.join(name);
    let files = Files { image: at("demo.ram"), descriptor: at("demo.snow"), index: at("demo.snowidx") };
    let pages = PageCount::new(u64::from(options.mem) * ((1 << 20) / PAGE_SIZE));
    let bar = bar(pages.get(), "making an image of {total_bytes} {wide_bar} {bytes}");
    let mut file = File::create(&files.image).map_err(ToolError::file("create", &files.image))?;
    let written = image::write(&mut file, pages, options.seed, |done| {
        bar.set_position(done.bytes());
        !interrupt.is_pending()
    });
    written.map_err(ToolError::file("write", &files.image))?;
    bar.finish_and_clear();
    if let Some(signal) = interrupt.take() {
        return Err(SuperviseError::Interrupted(signal).into());
    }

    let image = ImageId::random().map_err(|error| ToolError::Kernel("draw random numbers", error))?;
    let raw =
        RawImage { file: files.image.clone(), regions: vec![], image, parent: "demo".to_owned(), servers: vec![] };
    let scan = |image: &ImageReader, frames: &FrameSet| descriptor::image::zero_frames(image, frames, &|_| ());
    let (descriptor, index) = raw::import(&raw, scratch, scan)?;
    descriptor.write(&files.descriptor)?;
    index.write(&files.index)?;
    Ok(files)
}

/// A clone: a memtap with a guest embedded.
struct Clone {
    id: u32,
    child: ChildId,
    /// What it prints at the end.
    result: PathBuf,
    admin: PathBuf,
}

impl Clone {
    fn start(
        supervisor: &mut Supervisor,
        run: &RunDir,
        files: &Files,
        server: &Server,
        options: &Options,
        id: u32,
    ) -> Result<Self, ToolError> {
        let (result, admin) = (run.path().join(format!("clone-{id}.json")), run.socket(&format!("clone-{id}.admin"))?);
        let mut command = own_command("memtap");
        command.arg("embedded").arg("--descriptor").arg(&files.descriptor).arg("--verify").arg(&files.index);
        command.args(server.endpoints().iter().map(|endpoint| format!("--server={endpoint}")));
        command.args(["--lane", if options.lane == Lane::Local { "local" } else { "socket" }]);
        // The comparison at the end needs every page, which is nothing to learn from.
        command.args(["--working-set", "off"]);
        // Nine of ten touches go to a tenth of the memory: guests have working sets.
        let seed = options.seed.wrapping_add(u64::from(id));
        command.arg(format!("--workload=hot:10%,touches=20%,writes=30%,discards=1%,seed={seed}"));
        command.arg("--admin").arg(&admin);
        let child = supervisor.start(ChildSpec {
            name: format!("memtap of clone {id}"),
            role: Role::Pager,
            command,
            log: run.path().join(format!("clone-{id}.log")),
            output: Output::File(result.clone()),
            fds: Vec::new(),
        })?;
        Ok(Self { id, child, result, admin })
    }

    fn report(&self, supervisor: &Supervisor) -> CloneReport {
        CloneReport {
            id: self.id,
            name: format!("clone-{}", self.id),
            state: "embedded".to_owned(),
            pid: supervisor.pid(self.child),
            pager_pid: None,
            up_after_ms: None,
            memory: None,
            lane: None,
            qmp: None,
            identity: None,
            domain: None,
            admin: self.admin.clone(),
        }
    }
}

/// Waits until all clones have ended, and well.
fn wait(supervisor: &mut Supervisor, server: &Server, clones: &[Clone], options: &Options) -> Result<(), ToolError> {
    let total = (u64::from(options.clones) * u64::from(options.mem)) << 20;
    let message = format!("{} clones work while their memory arrives", options.clones);
    let bar = bar(total, &(message + " {wide_bar} {bytes}/{total_bytes}"));
    let mut running: Vec<&Clone> = clones.iter().collect();
    while !running.is_empty() {
        match supervisor.wait(LOOK)? {
            Event::Ended(child, status) => {
                running.retain(|clone| clone.child != child);
                if server.is(child) || !status.success() {
                    bar.finish_and_clear();
                    return Err(supervisor.failure(child).into());
                }
            }
            Event::TimedOut if bar.is_hidden() => {}
            Event::TimedOut => {
                let ended = (clones.len() - running.len()) as u64 * (u64::from(options.mem) << 20);
                let there = running.iter().filter_map(|clone| PagerReport::ask(&clone.admin, LOOK_PATIENCE).memory);
                let there: u64 = there.map(|memory| memory.total.saturating_sub(memory.missing) * PAGE_SIZE).sum();
                bar.set_position(ended + there);
            }
        }
    }
    bar.finish_and_clear();
    Ok(())
}

/// A bar on standard error, hidden where that is no terminal.
fn bar(length: u64, template: &str) -> ProgressBar {
    let target = if io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    // The templates are constants; should one be wrong, the plain bar serves as well.
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(length), target).with_style(style)
}
