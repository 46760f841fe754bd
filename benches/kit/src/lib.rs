//! What the benches share: their command line, medians, and the report.
//!
//! Each bench is a program of its own (`cargo bench --bench NAME -- [--quick] [--json PATH]`): it measures us and our peers
//! in turn within one run, since timings on shared machines drift, and quotes medians and ratios.

pub mod clone;
pub mod guest;
pub mod image;
pub mod member;
pub mod multicast;
pub mod peers;
pub mod roles;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde_json::Value;

/// The command line of every bench.
#[derive(Clone, Debug, Parser)]
pub struct Args {
    /// Measure less, within half a minute.
    #[arg(long)]
    pub quick: bool,
    /// Write the results to this file as JSON.
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
    /// What `cargo bench` passes on; without meaning here.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    /// `quick` or `full`, by the command line.
    pub fn pick<T>(&self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// Runs a bench: its report goes to the file asked for, a failure to people.
pub fn run(name: &str, bench: impl FnOnce(&Args) -> anyhow::Result<Value>) -> ExitCode {
    let args = Args::parse();
    let start = Instant::now();
    let result = bench(&args).and_then(|report| write_report(&args, &report));
    match result {
        Ok(()) => {
            println!("{name}: done in {:.1} s", start.elapsed().as_secs_f64());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn write_report(args: &Args, report: &Value) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(report)?;
    if let Some(path) = &args.json {
        std::fs::write(path, text + "\n")?;
        println!("wrote {}", path.display());
    }
    Ok(())
}

/// The value below which `share` of the samples lie.
///
/// # Panics
/// Without samples.
pub fn quantile(samples: &mut [Duration], share: f64) -> Duration {
    samples.sort_unstable();
    samples[((samples.len() - 1) as f64 * share).round() as usize]
}

/// The median of some rates or ratios.
///
/// # Panics
/// Without samples.
pub fn median(samples: &mut [f64]) -> f64 {
    samples.sort_unstable_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// A duration in microseconds.
pub fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

/// Three significant digits, for reports.
pub fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return 0.0;
    }
    let scale = 10f64.powf(2.0 - value.abs().log10().floor());
    (value * scale).round() / scale
}

/// Touches so many bytes of memory and gives them back: a virtual machine's host backs memory at its first touch, which takes it
/// longer than anything that is measured.
pub fn warm(bytes: u64) {
    let mut memory = vec![0u8; bytes as usize];
    for page in memory.chunks_mut(4096) {
        page[0] = 1;
    }
    std::hint::black_box(&memory);
}

/// Keeps the calling thread, and threads that it starts, on one processor: where two threads that wake each other happen to sit
/// decides over more than what is measured.
pub fn pin(processor: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(processor);
    Ok(sched_setaffinity(None, &set)?)
}

/// Keeps idle processors awake while it lives: otherwise a wake-up from deep idle outweighs everything else that a
/// latency bench measures (`/dev/cpu_dma_latency`, Linux's PM QoS interface). Root only.
pub struct AwakeProcessors(#[expect(dead_code, reason = "the request holds while the file is open")] File);

impl AwakeProcessors {
    /// Asks for no wake-up latency.
    pub fn hold() -> io::Result<Self> {
        let mut file = OpenOptions::new().write(true).open("/dev/cpu_dma_latency")?;
        file.write_all(&0i32.to_ne_bytes())?;
        Ok(Self(file))
    }
}
