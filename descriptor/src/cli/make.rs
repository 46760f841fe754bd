use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use serde_json::json;

use super::qemu::{Qemu, QemuStream};
use super::xl::XlStream;
use super::{CliError, Outcome, answer, answer_json, scan_progress, text};
use crate::file::FileKind;
use crate::image::{ImageError, ImageIndex, ImageReader};
use crate::import::raw::{self, RawImage, RawRegion};
use crate::introspect::{Insight, Surveyor};
use crate::{Descriptor, Endpoint, FrameSet, ImageId};

#[derive(Debug, Subcommand)]
pub(super) enum Make {
    /// From a file that holds nothing but pages
    Raw(Raw),
    /// From a QEMU that runs, and goes on running
    Qemu(Qemu),
    /// From a migration stream that QEMU wrote to a file
    QemuStream(QemuStream),
    /// From a stream that `xl save` or `xl migrate` writes
    XlStream(XlStream),
}

#[derive(Debug, Args)]
pub(super) struct Raw {
    /// The raw memory file; it stays where it is, and clones are served from it
    file: PathBuf,
    /// A region of the guest, in the order of the file (may be repeated): NAME@START:SIZE, or NAME@START:SIZE:2M for huge
    /// pages. Without it the file is one region called `ram` from 0 on
    #[arg(long = "region", value_name = "REGION")]
    regions: Vec<RawRegion>,
    #[command(flatten)]
    target: Target,
}

/// Where a new pair of files goes, and what they say of themselves; the same for every kind of source.
#[derive(Debug, Args)]
pub(super) struct Target {
    /// The parent's name, for people
    #[arg(long, value_name = "PARENT", default_value = "")]
    pub(super) name: String,
    /// A page server to be written into the descriptor (may be repeated): tcp://HOST:PORT or unix:PATH
    #[arg(long = "server", value_name = "ENDPOINT")]
    pub(super) servers: Vec<Endpoint>,
    /// Write NAME.snow and NAME.snowidx
    #[arg(short, long, value_name = "NAME")]
    pub(super) output: PathBuf,
    #[command(flatten)]
    pub(super) insight: Insight,
    /// Replace files that exist
    #[arg(long)]
    pub(super) force: bool,
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

impl Make {
    pub(super) fn run(&self) -> Result<Outcome, CliError> {
        match self {
            Make::Raw(raw) => raw.run(),
            Make::Qemu(qemu) => qemu.run(),
            Make::QemuStream(stream) => stream.run(),
            Make::XlStream(stream) => stream.run(),
        }
    }
}

impl Raw {
    fn run(&self) -> Result<Outcome, CliError> {
        self.target.check()?;
        let raw = RawImage {
            file: self.file.clone(),
            regions: self.regions.clone(),
            image: ImageId::random().map_err(CliError::Random)?,
            parent: self.target.name.clone(),
            servers: self.target.servers.clone(),
        };
        let mut work = Work::default();
        let begin = Instant::now();
        let made = raw::import(&raw, self.target.folder(), |image, frames| work.zero_frames(image, frames))?;
        work.make = begin.elapsed().saturating_sub(work.scan);
        self.target.finish(made, work)
    }
}

/// The work of making a descriptor: what was seen on the way, and how long the parts took.
#[derive(Debug, Default)]
pub(super) struct Work {
    surveyor: Surveyor,
    /// Making the descriptor and the index, but for the next.
    pub(super) make: Duration,
    /// The search for zero pages.
    pub(super) scan: Duration,
}

impl Work {
    /// Searches `frames` for zero pages, with a progress bar and a stop-watch.
    pub(super) fn zero_frames(&mut self, image: &ImageReader, frames: &FrameSet) -> Result<FrameSet, ImageError> {
        let begin = Instant::now();
        let bar = scan_progress(frames.count());
        let zero = self.surveyor.zero_frames(image, frames, &|pages| bar.inc(pages.bytes()));
        bar.finish_and_clear();
        self.scan = begin.elapsed();
        zero
    }
}

impl Target {
    /// Refuses to replace files before any work is done.
    pub(super) fn check(&self) -> Result<(), CliError> {
        let paths = [FileKind::Descriptor, FileKind::ImageIndex].map(|kind| kind.path(&self.output));
        match paths.into_iter().find(|path| path.exists()) {
            Some(path) if !self.force => Err(CliError::Exists(path)),
            _ => Ok(()),
        }
    }

    /// The folder that the files go into.
    pub(super) fn folder(&self) -> &Path {
        self.output.parent().unwrap_or(Path::new(""))
    }

    /// Looks for free pages as far as that is wanted, writes both files and says what they hold.
    pub(super) fn finish(&self, made: (Descriptor, ImageIndex), work: Work) -> Result<Outcome, CliError> {
        let begin = Instant::now();
        let (descriptor, index, avoidance) = work.surveyor.avoid(&self.insight, made, self.folder())?;
        let introspect = begin.elapsed();
        let begin = Instant::now();
        let [descriptor_path, index_path] =
            [FileKind::Descriptor, FileKind::ImageIndex].map(|kind| kind.path(&self.output));
        // A descriptor without its index would promise pages that nobody can serve.
        index.write(&index_path)?;
        descriptor.write(&descriptor_path)?;
        let write = begin.elapsed();
        let [descriptor_bytes, index_bytes] = [&descriptor_path, &index_path].map(|path| file_length(path));

        let memory = descriptor.memory.frame_count();
        let zero = descriptor.zero.count();
        let free = descriptor.free_data().count();
        let data = memory - zero - free;
        let (make, scan) = (work.make, work.scan);
        if self.json {
            answer_json(&json!({
                "descriptor": descriptor_path,
                "descriptor_bytes": descriptor_bytes,
                "index": index_path,
                "index_bytes": index_bytes,
                "image": descriptor.identity.image,
                "pause_us": descriptor.identity.pause_us,
                "memory_bytes": memory.bytes(),
                "data_bytes": data.bytes(),
                "zero_bytes": zero.bytes(),
                "free_bytes": free.bytes(),
                "avoidance": avoidance.to_string(),
                "make_us": micros(make),
                "scan_us": micros(scan),
                "introspect_us": micros(introspect),
                "write_us": micros(write),
            }))?;
            return Ok(Outcome::Good);
        }
        let mut out = String::new();
        text::table(
            &mut out,
            &["FILE", ">SIZE", "HOLDS"],
            &[
                vec![
                    descriptor_path.display().to_string(),
                    text::size(descriptor_bytes),
                    format!("what a clone of image {} needs to begin", descriptor.identity.image),
                ],
                vec![
                    index_path.display().to_string(),
                    text::size(index_bytes),
                    "what the page server needs; keep it beside the image".to_owned(),
                ],
            ],
        );
        if let Some(pause) = descriptor.identity.pause_us {
            out += &format!("\nthe parent stood still for {:.1} ms", Duration::from_micros(pause).as_secs_f64() * 1e3);
        }
        let seconds = scan.as_secs_f64();
        let speed = if seconds > 0.0 { memory.bytes() as f64 / seconds / f64::from(1 << 30) } else { 0.0 };
        out += &format!(
            "\n{} of memory: {} to fetch ({}), {} zero, {} free\n",
            text::size(memory.bytes()),
            text::size(data.bytes()),
            text::share(data, memory),
            text::size(zero.bytes()),
            text::size(free.bytes()),
        );
        out += &format!("free pages: {avoidance}\n");
        out += &format!(
            "zero scan {seconds:.3} s ({speed:.1} GiB/s), free pages {:.1} ms, making {:.1} ms, writing and syncing {:.1} ms\n",
            introspect.as_secs_f64() * 1e3,
            make.as_secs_f64() * 1e3,
            write.as_secs_f64() * 1e3,
        );
        answer(&out)?;
        Ok(Outcome::Good)
    }
}

fn file_length(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
