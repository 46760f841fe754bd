//! What a capture becomes: a descriptor and an image index beside the image, and word of it to the user.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use descriptor::image::{ImageError, ImageIndex, ImageReader};
use descriptor::introspect::{Insight, Surveyor};
use descriptor::{Descriptor, FrameSet, PAGE_SIZE, PageCount};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use crate::error::ToolError;
use crate::interrupt::Interrupt;
use crate::supervise::SuperviseError;
use crate::table::{bytes, micros};

/// A capture that was written.
pub(crate) struct Capture {
    pub(crate) descriptor: PathBuf,
    pub(crate) index: PathBuf,
}

/// How a capture is made an image.
pub(crate) struct Making<'a> {
    /// Where it goes, a path without extension.
    pub(crate) name: &'a Path,
    /// How it was captured, for people.
    pub(crate) method: &'static str,
    /// What of the guest's memory is to be told.
    pub(crate) insight: &'a Insight,
    /// Whether the result is printed as JSON.
    pub(crate) json: bool,
    /// What is said of the parent where no pause is known, such as `did not run`.
    pub(crate) no_pause: &'static str,
    /// What breaks it off.
    pub(crate) interrupt: &'a Interrupt,
    /// What the JSON says besides.
    pub(crate) details: Map<String, Value>,
}

/// An importer's scan for zero frames.
pub(crate) type Scan<'s> = dyn FnMut(&ImageReader, &FrameSet) -> Result<FrameSet, ImageError> + 's;

/// A bar for the bytes of a capture.
pub(crate) fn progress_bar() -> ProgressBar {
    ProgressBar::no_length().with_style(
        // A constant template; the default style serves as well.
        ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes}")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    )
}

impl Making<'_> {
    /// Has `import` make the descriptor and the index in the folder it is given, looks for free pages, writes both files, and
    /// says what came of it.
    ///
    /// # Errors
    /// When the capture makes no image, a file cannot be written, or a signal comes; then nothing is written.
    pub(crate) fn finish(
        self,
        bar: &ProgressBar,
        import: impl FnOnce(&Path, &mut Scan<'_>) -> Result<(Descriptor, ImageIndex), ToolError>,
    ) -> Result<Capture, ToolError> {
        bar.set_message("looking for zeros");
        bar.set_position(0);
        let mut surveyor = Surveyor::default();
        let mut scan = |image: &ImageReader, frames: &FrameSet| {
            bar.set_length(frames.count().bytes());
            let mut zero = FrameSet::empty(frames.universe());
            for part in parts(frames) {
                // What is made of an incomplete scan is thrown away.
                if self.interrupt.is_pending() {
                    break;
                }
                zero.union_with(&surveyor.zero_frames(image, &part, &|done| bar.inc(done.bytes()))?);
            }
            Ok(zero)
        };
        let folder = self.name.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let made = import(folder, &mut scan)?;
        self.go_on()?;
        bar.set_message("looking for free pages");
        let (descriptor, index, avoidance) = surveyor.avoid(self.insight, made, folder)?;
        self.go_on()?;
        bar.finish_and_clear();

        let paths = Capture { descriptor: beside(self.name, "snow"), index: beside(self.name, "snowidx") };
        // A descriptor without its index would promise pages that nobody can serve.
        index.write(&paths.index)?;
        descriptor.write(&paths.descriptor)?;
        let size = std::fs::metadata(&paths.descriptor).map_or(0, |file| file.len());
        let memory = descriptor.memory.frame_count().bytes();
        let identity = &descriptor.identity;
        if self.json {
            let mut report = json!({
                "image": identity.image, "parent": identity.parent, "method": self.method, "pause_us": identity.pause_us,
                "memory_bytes": memory, "descriptor_bytes": size, "zero_bytes": descriptor.zero.count().bytes(),
                "free_bytes": descriptor.free_data().count().bytes(), "avoidance": avoidance.to_string(),
                "descriptor": paths.descriptor, "index": paths.index,
            });
            report.as_object_mut().into_iter().for_each(|report| report.extend(self.details.clone()));
            println!("{report}");
            return Ok(paths);
        }
        let pause =
            identity.pause_us.map_or(self.no_pause.to_owned(), |us| format!("stood still for {}", micros(us as f64)));
        eprintln!(
            "captured {:?} by {}: {} of memory in a descriptor of {}; the parent {pause}",
            identity.parent,
            self.method,
            bytes(memory),
            bytes(size),
        );
        eprintln!("free pages: {avoidance}");
        eprintln!("  {}", paths.descriptor.display());
        eprintln!("  {}", paths.index.display());
        Ok(paths)
    }
}

impl Making<'_> {
    /// # Errors
    /// When a signal came.
    fn go_on(&self) -> Result<(), SuperviseError> {
        self.interrupt.take().map_or(Ok(()), |signal| Err(SuperviseError::Interrupted(signal)))
    }
}

/// Frames in parts that are scanned within a second or so.
fn parts(frames: &FrameSet) -> Vec<FrameSet> {
    const PART: PageCount = PageCount::new((1 << 30) / PAGE_SIZE);
    let mut parts = Vec::new();
    let mut part = FrameSet::empty(frames.universe());
    for range in frames.runs().flat_map(|run| run.chunks(PART)) {
        part.insert_range(range);
        if part.count() >= PART {
            parts.push(std::mem::replace(&mut part, FrameSet::empty(frames.universe())));
        }
    }
    parts.push(part);
    parts
}

/// `name` with `.extension` behind it, dots in the name or not.
pub(crate) fn beside(name: &Path, extension: &str) -> PathBuf {
    let mut path = OsString::from(name);
    path.push(".");
    path.push(extension);
    path.into()
}

#[cfg(test)]
mod tests {
    use descriptor::{FrameRange, Gfn};

    use super::*;

    #[test]
    fn parts_make_the_whole() {
        let range = |start, count| FrameRange::new(Gfn::new(start), PageCount::new(count));
        let frames =
            FrameSet::from_ranges(PageCount::new(2_000_000), [range(5, 3), range(100, 700_000), range(1_900_000, 9)]);
        let parts = parts(&frames);
        assert!(parts.len() == 3 && parts.iter().all(|part| part.count() <= PageCount::new(2 * 262_144)));
        let mut whole = FrameSet::empty(frames.universe());
        parts.iter().for_each(|part| whole.union_with(part));
        assert_eq!(whole, frames);
    }
}
