//! A guest in this very process: threads that work on memory which is not there yet.
//!
//! It stands in for a virtual machine where none can run, and it knows what every page must hold: the page of the image,
//! changed by what its own threads wrote and gave up. Each thread changes pages of its own share only, reads everywhere, and
//! at the end compares every page of its share with the image.

mod memory;
mod model;
mod sys;
mod workload;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use descriptor::image::ImageReader;
use descriptor::memory::MemoryMap;
use descriptor::{FrameRange, FrameSet, Gfn, PAGE_SIZE, PageCount};
use hdrhistogram::Histogram;
use parking_lot::{Condvar, Mutex};
use rustix::event::EventfdFlags;
use serde::Serialize;
use thiserror::Error;

pub use workload::{ParseWorkloadError, Pattern, Workload};

use super::{Guest, GuestError};
use crate::port::PortError;
use crate::port::uffd::{HostRegionsError, OpenError, UffdPort, Userfaultfd};
use crate::stats::Percentiles;

use memory::GuestMemory;
use model::{Model, filling, word_of};
use workload::{Steps, Touch};

/// Frames that belong to one thread together: a huge page, so that a discard never takes another thread's pages.
const SHARE: u64 = 512;

/// Pages that a discard or an overwrite takes: what a balloon gives up in one piece is larger, a page table smaller.
const DISCARD: u64 = 16;

/// What the guest's memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Backing {
    /// Anonymous memory.
    #[default]
    Anon,
    /// A shared memory file.
    Memfd,
    /// 2 MiB huge pages, which must have been reserved (vm.nr_hugepages).
    Huge,
}

/// An embedded guest that cannot begin or go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EmbeddedError {
    /// No memory.
    #[error("cannot map {backing:?} memory for frames {frames} of the guest")]
    Map {
        /// The frames of the region.
        frames: FrameRange,
        /// What it was to be made of.
        backing: Backing,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The memory map does not fit the kind of memory.
    #[error("the image's regions cannot be mapped so")]
    Regions(#[from] HostRegionsError),
    /// No userfaultfd.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The userfaultfd does not take the memory.
    #[error(transparent)]
    Port(#[from] PortError),
    /// A discard failed.
    #[error("the guest cannot give up frames {range}")]
    Discard {
        /// The frames.
        range: FrameRange,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The image cannot be read for comparison.
    #[error("cannot compare with the image")]
    Image(#[from] descriptor::image::ImageError),
    /// No descriptor or thread left.
    #[error("the guest cannot be started")]
    Start(#[source] io::Error),
}

/// What an embedded guest found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct GuestReport {
    /// Milliseconds from the beginning of the process to the first touch that had its page.
    pub first_touch_ms: f64,
    /// Touches by all threads.
    pub touches: u64,
    /// Of these, writes.
    pub writes: u64,
    /// Pages given up.
    pub discarded: u64,
    /// Touches that had to wait for a page fault, as the guest saw them.
    pub fault_us: Percentiles,
    /// Pages wholly overwritten.
    pub overwritten: u64,
    /// Of these, pages that the pager took note of before.
    pub announced: u64,
    /// Pages compared with the image, the guest's own changes included, and found right.
    pub verified: u64,
    /// Pages found wrong.
    pub mismatches: u64,
    /// Pages not compared, because their contents do not matter.
    pub unchecked: u64,
    /// The first frames found wrong.
    pub wrong: Vec<u64>,
}

/// Tells a pager that frames will be wholly overwritten; false when it took no note of that, as one that has ended.
pub type Announce = Box<dyn Fn(FrameRange) -> bool + Send + Sync>;

/// What an embedded guest is to do.
pub struct GuestPlan {
    /// The work.
    pub workload: Workload,
    /// By how many threads.
    pub threads: u32,
    /// To compare every page with at the end.
    pub image: Option<ImageReader>,
    /// Frames whose contents do not matter.
    pub free: FrameSet,
    /// How to tell the pager what is about to be overwritten; without it the guest overwrites nothing.
    pub announce: Option<Announce>,
    /// The beginning of the process.
    pub epoch: Instant,
}

/// The guest's memory and threads.
pub struct EmbeddedGuest {
    memory: GuestMemory,
    gate: Arc<Gate>,
}

/// The guest's life, for the engine.
pub struct EmbeddedHandle {
    gate: Arc<Gate>,
}

impl EmbeddedHandle {
    /// Lets the threads begin.
    pub fn open(&self) {
        *self.gate.ready.lock() = true;
        self.gate.opened.notify_all();
    }
}

/// What the guest's threads and its pager's engine share.
struct Gate {
    ready: Mutex<bool>,
    opened: Condvar,
    stopped: AtomicBool,
    ended: OwnedFd,
}

impl EmbeddedGuest {
    /// Maps memory for `map` and makes the port that serves it.
    ///
    /// # Errors
    /// When there is no memory, or no userfaultfd to be had.
    pub fn new(map: &MemoryMap, backing: Backing) -> Result<(Self, UffdPort, EmbeddedHandle), EmbeddedError> {
        let memory = GuestMemory::new(map, backing)?;
        let port = Userfaultfd::open()?.into_port(memory.host_regions()?)?;
        let ended = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let ended = ended.map_err(|error| EmbeddedError::Start(error.into()))?;
        let (ready, opened) = (Mutex::new(false), Condvar::new());
        let gate = Arc::new(Gate { ready, opened, stopped: AtomicBool::new(false), ended });
        Ok((Self { memory, gate: Arc::clone(&gate) }, port, EmbeddedHandle { gate }))
    }

    /// Does the work, once the engine lets the guest run, then compares. Returns when all threads are done.
    ///
    /// # Errors
    /// When a thread cannot be started, memory not be given up, or the image not be read.
    pub fn work(&self, plan: &GuestPlan) -> Result<GuestReport, EmbeddedError> {
        self.gate.wait();
        let first_touch = OnceLock::new();
        let threads = plan.threads.max(1);
        let results: Vec<Result<ThreadReport, EmbeddedError>> = std::thread::scope(|scope| {
            let start = |index| {
                let worker = Worker { memory: &self.memory, gate: &self.gate, plan, index, first_touch: &first_touch };
                std::thread::Builder::new().name(format!("guest-{index}")).spawn_scoped(scope, move || worker.run())
            };
            let handles: Vec<_> = (0..u64::from(threads)).map(start).collect();
            let join = |handle: io::Result<std::thread::ScopedJoinHandle<'_, _>>| match handle {
                Ok(handle) => handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                Err(error) => Err(EmbeddedError::Start(error)),
            };
            handles.into_iter().map(join).collect()
        });
        let mut faults = faults_histogram();
        let mut report = GuestReport::default();
        for thread in results {
            let thread = thread?;
            report.touches += thread.touches;
            report.writes += thread.writes;
            report.discarded += thread.discarded;
            report.overwritten += thread.overwritten;
            report.announced += thread.announced;
            report.verified += thread.verified;
            report.mismatches += thread.mismatches;
            report.unchecked += thread.unchecked;
            report.wrong.extend(thread.wrong);
            // Both have the same bounds.
            let _never = faults.add(&thread.faults);
        }
        report.wrong.truncate(MAX_WRONG);
        report.fault_us = Percentiles::of(&faults);
        report.first_touch_ms = first_touch.get().map_or(0.0, |ms| *ms);
        Ok(report)
    }

    /// Tells the engine that the guest has ended.
    pub fn end(&self) {
        // Fails only when the counter is full, and then it tells already.
        let _full = rustix::io::write(&self.gate.ended, &1u64.to_ne_bytes());
    }
}

impl Guest for EmbeddedHandle {
    fn watch(&self) -> Option<BorrowedFd<'_>> {
        Some(self.gate.ended.as_fd())
    }

    fn ready(&mut self) -> Result<(), GuestError> {
        self.open();
        Ok(())
    }

    /// Threads stop at their next step; those that wait for a page wait on.
    fn pause(&mut self) -> Result<(), GuestError> {
        self.gate.stopped.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The same: what remains of the guest ends with its process.
    fn kill(&mut self) -> Result<(), GuestError> {
        self.pause()
    }
}

impl Gate {
    fn wait(&self) {
        let mut ready = self.ready.lock();
        while !*ready {
            self.opened.wait(&mut ready);
        }
    }
}

/// Wrong frames that a report names.
const MAX_WRONG: usize = 16;

struct ThreadReport {
    touches: u64,
    writes: u64,
    discarded: u64,
    overwritten: u64,
    announced: u64,
    verified: u64,
    mismatches: u64,
    unchecked: u64,
    wrong: Vec<u64>,
    faults: Histogram<u64>,
}

struct Worker<'a> {
    memory: &'a GuestMemory,
    gate: &'a Gate,
    plan: &'a GuestPlan,
    index: u64,
    first_touch: &'a OnceLock<f64>,
}

impl Worker<'_> {
    fn run(&self) -> Result<ThreadReport, EmbeddedError> {
        let mut report = ThreadReport {
            touches: 0,
            writes: 0,
            discarded: 0,
            overwritten: 0,
            announced: 0,
            verified: 0,
            mismatches: 0,
            unchecked: 0,
            wrong: vec![],
            faults: faults_histogram(),
        };
        let mut model = Model::default();
        let pages = self.memory.frame_count();
        let mut steps = Steps::new(self.plan.workload, pages, self.index, self.threads());
        for _ in 0..steps.count(self.threads()) {
            let (place, touch) = steps.next();
            let Some(gfn) = self.memory.frame(place) else { continue };
            if self.gate.stopped.load(Ordering::Relaxed) {
                return Ok(report);
            }
            report.touches += 1;
            match touch {
                Touch::Discard if self.owns(gfn) => {
                    let length = self.memory.granule().get().max(DISCARD);
                    let range = self.around(gfn, length);
                    let range =
                        self.memory.discard(range).map_err(|source| EmbeddedError::Discard { range, source })?;
                    report.discarded += range.count().get();
                    model.discard(range);
                }
                Touch::Overwrite if self.owns(gfn) => {
                    let Some(announce) = &self.plan.announce else { continue };
                    let range = self.memory.within_region(self.around(gfn, DISCARD));
                    // Whether or not anyone took note of it, the pages are written.
                    report.announced += if announce(range) { range.count().get() } else { 0 };
                    report.overwritten += range.count().get();
                    for gfn in range.frames() {
                        let seed = model.overwrite(gfn);
                        let words = self.memory.page(gfn).into_iter().flatten();
                        words.zip(filling(seed)).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
                    }
                }
                Touch::Write if self.owns(gfn) => {
                    report.writes += 1;
                    let stamp = model.write(gfn);
                    self.timed(gfn, &mut report.faults, |word| word.store(stamp, Ordering::Relaxed));
                }
                _ => self.timed(gfn, &mut report.faults, |word| {
                    std::hint::black_box(word.load(Ordering::Relaxed));
                }),
            }
        }
        if let Some(image) = &self.plan.image {
            self.verify(image, &model, &mut report)?;
        }
        Ok(report)
    }

    /// The aligned `length` pages around `gfn`, all of one thread's share; only the one where a region begins among them.
    fn around(&self, gfn: Gfn, length: u64) -> FrameRange {
        let start = Gfn::new(gfn.index() - gfn.index() % length);
        let range = FrameRange::new(start, PageCount::new(length));
        if self.memory.page(start).is_some() { range } else { FrameRange::single(gfn) }
    }

    /// Touches a word of the page of `gfn`, and notes how long that took when it took a fault.
    fn timed(&self, gfn: Gfn, faults: &mut Histogram<u64>, touch: impl FnOnce(&std::sync::atomic::AtomicU64)) {
        let Some(word) = self.memory.page(gfn).and_then(|page| page.get(word_of(gfn))) else { return };
        let faults_before = sys::faults_of_thread();
        let began = Instant::now();
        touch(word);
        let took = began.elapsed();
        self.first_touch.get_or_init(|| self.plan.epoch.elapsed().as_secs_f64() * 1000.0);
        if sys::faults_of_thread() != faults_before {
            faults.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1));
        }
    }

    /// Compares every page of this thread's share with the image.
    fn verify(&self, image: &ImageReader, model: &Model, report: &mut ThreadReport) -> Result<(), EmbeddedError> {
        let (mut seen, mut expected) = ([0; PAGE_SIZE as usize], [0; PAGE_SIZE as usize]);
        for gfn in (0..self.memory.frame_count()).filter_map(|index| self.memory.frame(index)) {
            if !self.owns(gfn) {
                continue;
            }
            if self.gate.stopped.load(Ordering::Relaxed) {
                return Ok(());
            }
            if model.needs_image(gfn) && self.plan.free.contains(gfn) {
                report.unchecked += 1;
                continue;
            }
            if model.needs_image(gfn) {
                image.read_page(gfn, &mut expected)?;
            }
            model.apply(gfn, &mut expected);
            self.memory.copy(gfn, &mut seen);
            if seen == expected {
                report.verified += 1;
            } else {
                report.mismatches += 1;
                if report.wrong.len() < MAX_WRONG {
                    report.wrong.push(gfn.index());
                }
            }
        }
        Ok(())
    }

    /// True when the page of `gfn` is for this thread to change.
    fn owns(&self, gfn: Gfn) -> bool {
        gfn.index() / SHARE % self.threads() == self.index
    }

    fn threads(&self) -> u64 {
        u64::from(self.plan.threads.max(1))
    }
}

/// Times in nanoseconds up to 1000 s, two significant digits.
fn faults_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 1_000_000_000_000, 2).expect("constant bounds are valid")
}

#[cfg(test)]
mod tests;
