//! What a clone of a used machine fetches for a small piece of work, and how long that takes: by demand alone, without zero pages,
//! without free pages as well, ahead of streams of faults, and with what a sibling needed for the same work fetched first, before the
//! guest goes on (`waiting`) or while it does.
//!
//! The machine is a Linux of Debian (6.1, unmodified) in QEMU under TCG that filled its page cache, gave part of it back, and
//! had processes that came and went. It is captured by `snowflock capture qemu`; each clone is a QEMU of its own behind a `memtap qemu`, whose
//! pages come over TCP on the loopback interface. The work (eight processes that each read a file, sort, talk to a child
//! and write a result) begins when the clone's guest goes on, and its time ends with the guest's word that it is done.
//!
//! Compared are: the share of all frames that was fetched until then; faults that had to wait for a fetch; and the time, by that of a
//! clone which had all of its memory before it went on. `copied_ms` is what such a copy takes before. Medians; on a machine that
//! others use, of such short times the fastest say more, and are told beside them.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use bench_kit::guest::{Capture, Clone, Lab, Work};
use bench_kit::roles::{self, PageServer};
use bench_kit::{Args, median, rounded};
use descriptor::image::{ImageIndex, ImageReader};
use descriptor::introspect::{Class, Surveyor};
use descriptor::{Descriptor, FrameRange, FrameSet};
use serde_json::{Map, Value, json};

/// The memory of the machine.
const MIB: u64 = 1024;

/// How long a clone is left alone that was just copied.
const SETTLE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    roles::play().unwrap_or_else(|| bench_kit::run("avoidance", bench))
}

fn bench(args: &Args) -> anyhow::Result<Value> {
    let lab = match Lab::find(MIB) {
        Ok(lab) => lab,
        Err(reason) => {
            println!("SKIPPED avoidance: {reason}");
            return Ok(json!({ "skipped": reason }));
        }
    };
    let capture = Capture::of_a_used_machine(&lab)?;
    println!("the capture: {}", capture.report);
    let introspection = Introspected::measure(&capture)?;
    println!(
        "introspection: {:.2} ms per GiB of the machine's memory, of which {} MiB are not zero",
        introspection.ms_per_gib, introspection.data_mib
    );
    let server = PageServer::start(&capture.index, "tcp://127.0.0.1:0", &[])?;
    let folder = tempfile::tempdir()?;
    let descriptors = Descriptors::write(&capture.descriptor, introspection.kernel.clone(), folder.path())?;
    let rounds = args.pick(5, 15);

    // A sibling of which the others' working set is.
    let mut first = Clone::start(&lab, &descriptors.free, &server.endpoints[0], &["--working-set", "record"], false)?;
    first.work()?;
    first.end()?;

    let mut resident = Samples::default();
    let mut copied = Vec::new();
    let mut samples = vec![Samples::default(); Mode::ALL.len()];
    for _ in 0..rounds {
        let mut clone = Clone::start(
            &lab,
            &capture.descriptor,
            &server.endpoints[0],
            &["--hydrate", "now", "--working-set", "off"],
            true,
        )?;
        copied.push(clone.complete()?.as_secs_f64() * 1e3);
        // What copying leaves behind for QEMU and the kernel to do is none of the guest's work.
        std::thread::sleep(SETTLE);
        clone.go_on()?;
        resident.add(&clone.work()?);
        drop(clone);
        for (mode, samples) in Mode::ALL.iter().zip(&mut samples) {
            let mut clone =
                Clone::start(&lab, mode.descriptor(&descriptors), &server.endpoints[0], mode.options(), false)?;
            samples.add(&clone.work().with_context(|| format!("{mode:?}"))?);
            clone.end()?;
        }
    }

    let resident_ms = median(&mut resident.took_ms);
    let copied_ms = median(&mut copied);
    println!("{:>12}{:>10}{:>15}{:>10}{:>15}", "", "fetched", "demand faults", "time", "since fork");
    let line = |name: &str, share: f64, faults: f64, ms: f64, fork_ms: f64| {
        println!("{name:>12}{:>8.2} %{faults:>15.0}{:>8.2} x{fork_ms:>12.0} ms", share * 100.0, ms / resident_ms);
    };
    let resident_fastest = resident.fastest_ms();
    line("resident", 1.0, 0.0, resident_ms, copied_ms + resident_ms);
    let mut report = Report::default();
    for (mode, samples) in Mode::ALL.iter().zip(&mut samples) {
        let [share, faults, ms, fork_ms] = samples.medians();
        line(mode.name(), share, faults, ms, fork_ms);
        report.shares.insert(mode.name().into(), json!(rounded(share)));
        report.faults.insert(mode.name().into(), json!(faults));
        report.ratios.insert(mode.name().into(), json!(rounded(ms / resident_ms)));
        report.fastest.insert(mode.name().into(), json!(rounded(samples.fastest_ms() / resident_fastest)));
        report.since_fork.insert(mode.name().into(), json!(rounded(fork_ms)));
    }
    Ok(json!({
        "mib": MIB,
        "rounds": rounds,
        "fetched_share": report.shares,
        "workload_ratio": report.ratios,
        "fastest_ratio": report.fastest,
        "demand_faults": report.faults,
        "fork_to_done_ms": report.since_fork,
        "resident_ms": rounded(resident_ms),
        "samples_ms": {
            "resident": resident.took_ms.iter().copied().map(rounded).collect::<Vec<_>>(),
            "modes": samples.iter().map(|mode| mode.took_ms.iter().copied().map(rounded).collect()).collect::<Vec<Vec<f64>>>(),
        },
        "copied_ms": rounded(copied_ms),
        "introspect_ms_per_gib": rounded(introspection.ms_per_gib),
        "capture": capture.report,
    }))
}

#[derive(Default)]
struct Report {
    shares: Map<String, Value>,
    ratios: Map<String, Value>,
    fastest: Map<String, Value>,
    faults: Map<String, Value>,
    since_fork: Map<String, Value>,
}

/// What a clone avoids.
#[derive(Clone, Copy, Debug)]
enum Mode {
    Demand,
    Zero,
    Free,
    /// Without free pages, and ahead of streams of faults, as clones do unless told otherwise.
    Ahead,
    /// The same, with what a sibling needed fetched first.
    WorkingSet,
    /// The same, and the guest goes on once that is there.
    Waiting,
    /// Without a sibling: the kernel's text and data and all page tables are fetched first.
    Kernel,
    /// Without a sibling: what lies around each fault is fetched, 64 KiB.
    Around,
}

impl Mode {
    const ALL: [Mode; 8] = [
        Mode::Demand,
        Mode::Zero,
        Mode::Free,
        Mode::Ahead,
        Mode::WorkingSet,
        Mode::Waiting,
        Mode::Kernel,
        Mode::Around,
    ];

    fn name(self) -> &'static str {
        match self {
            Mode::Demand => "demand",
            Mode::Zero => "zero",
            Mode::Free => "free",
            Mode::Ahead => "ahead",
            Mode::WorkingSet => "workingset",
            Mode::Waiting => "waiting",
            Mode::Kernel => "kernel",
            Mode::Around => "around",
        }
    }

    fn descriptor(self, descriptors: &Descriptors) -> &Path {
        match self {
            Mode::Demand => &descriptors.plain,
            Mode::Zero => &descriptors.zero,
            Mode::Free | Mode::Ahead | Mode::WorkingSet | Mode::Waiting | Mode::Around => &descriptors.free,
            Mode::Kernel => &descriptors.kernel,
        }
    }

    fn options(self) -> &'static [&'static str] {
        match self {
            Mode::Demand | Mode::Zero | Mode::Free => &["--prefetch", "off", "--working-set", "off"],
            Mode::Ahead | Mode::Kernel => &["--working-set", "off"],
            Mode::Around => &["--working-set", "off", "--prefetch", "around:16"],
            Mode::WorkingSet => &["--working-set", "auto"],
            Mode::Waiting => &["--working-set", "wait"],
        }
    }
}

/// The descriptor of the capture as it is, and such as know less.
struct Descriptors {
    plain: PathBuf,
    zero: PathBuf,
    free: PathBuf,
    kernel: PathBuf,
}

impl Descriptors {
    fn write(captured: &Path, kernel: Vec<FrameRange>, folder: &Path) -> anyhow::Result<Self> {
        let free = Descriptor::read(captured)?;
        let none = FrameSet::empty(free.memory.universe());
        let zero = Descriptor { free: none.clone(), ..free.clone() };
        let plain = Descriptor { zero: none, ..zero.clone() };
        let kernel = Descriptor { prefetch: kernel, ..free.clone() };
        let paths = ["plain", "zero", "free", "kernel"].map(|name| folder.join(name).with_extension("snow"));
        for (path, descriptor) in paths.iter().zip([&plain, &zero, &free, &kernel]) {
            descriptor.write(path)?;
        }
        let [plain, zero, free, kernel] = paths;
        Ok(Self { plain, zero, free, kernel })
    }
}

/// What was measured of clones of one mode.
#[derive(Clone, Default)]
struct Samples {
    shares: Vec<f64>,
    faults: Vec<f64>,
    took_ms: Vec<f64>,
    since_fork_ms: Vec<f64>,
}

impl Samples {
    fn add(&mut self, work: &Work) {
        let number = |value: &Value| value.as_f64().unwrap_or_default();
        let pager = &work.status["pager"];
        let fetched = ["demand_pages", "prefetch_pages", "hydrate_pages", "order_pages", "unasked_pages"];
        let fetched: f64 = fetched.iter().map(|name| number(&pager[*name])).sum();
        self.shares.push(fetched / number(&work.status["progress"]["total"]).max(1.0));
        self.faults.push(number(&pager["demand_faults"]));
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        self.took_ms.push(ms(work.took));
        self.since_fork_ms.push(ms(work.since_fork));
    }

    fn fastest_ms(&self) -> f64 {
        self.took_ms.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn medians(&mut self) -> [f64; 4] {
        [&mut self.shares, &mut self.faults, &mut self.took_ms, &mut self.since_fork_ms].map(|it| median(it))
    }
}

/// How much processor time it takes to tell the free pages, besides the search for zero pages.
struct Introspected {
    ms_per_gib: f64,
    data_mib: u64,
    /// The kernel's text and data, and the page tables.
    kernel: Vec<FrameRange>,
}

impl Introspected {
    fn measure(capture: &Capture) -> anyhow::Result<Self> {
        let index = ImageIndex::read(&capture.index)?;
        let folder = capture.index.parent().context("the folder of the image")?;
        let descriptor = Descriptor::read(&capture.descriptor)?;
        let image = ImageReader::new(index, folder)?;
        let mut data = image.index().memory.present();
        data.subtract(&image.index().zero);
        let mut surveyor = Surveyor::default();
        surveyor.zero_frames(&image, &data, &|_| ())?;
        let mut times = Vec::new();
        for _ in 0..9 {
            let before = processor_time()?;
            surveyor.introspect(&image, descriptor.identity.hypervisor).context("the guest's free pages")?;
            times.push((processor_time()? - before).as_secs_f64() * 1e3);
        }
        let found = surveyor.introspect(&image, descriptor.identity.hypervisor).context("the guest's classes")?;
        let kernel = found.order_of(&[Class::KernelImage, Class::PageTable]);
        // There is something to look at for every frame, zero or not.
        Ok(Self { kernel, ms_per_gib: median(&mut times) * 1024.0 / MIB as f64, data_mib: data.count().bytes() >> 20 })
    }
}

/// What this thread has had of a processor: others take their share on a busy machine, for longer than what is measured.
fn processor_time() -> anyhow::Result<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let ns = text.split(' ').next().and_then(|ns| ns.parse().ok()).context("/proc/thread-self/schedstat")?;
    Ok(Duration::from_nanos(ns))
}
