use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::{CliError, Outcome, answer, answer_json, scan_progress, text};
use crate::file::{Container, FileKind, FormatError, read_bytes};
use crate::image::{ImageError, ImageIndex, ImageReader, zero_frames};
use crate::working_set::Merged;
use crate::{Descriptor, FrameSet, ImageId, PageCount, Report};

#[derive(Debug, Args)]
pub(super) struct Verify {
    /// A descriptor (.snow) or an image index (.snowidx); its counterpart beside it is checked against it
    file: PathBuf,
    /// Read the whole image too, and check that its zero frames are zero
    #[arg(long)]
    image: bool,
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

/// One check and what it found.
struct Check {
    name: &'static str,
    path: PathBuf,
    verdict: Verdict,
}

enum Verdict {
    Good(String),
    Faulty(String),
    Skipped(String),
}

impl Verify {
    pub(super) fn run(&self) -> Result<Outcome, CliError> {
        let bytes = read_bytes(&self.file)?;
        let mut checks = Vec::new();
        let Ok(given) = Container::open(&bytes).map(|container| container.kind()) else {
            check_container(&mut checks, &self.file, &bytes);
            return self.conclude(&checks);
        };
        let mut descriptor = None;
        let mut index = None;
        let mut needed = None;
        for kind in [FileKind::Descriptor, FileKind::ImageIndex, FileKind::WorkingSet] {
            let path = if kind == given { self.file.clone() } else { kind.path(&self.file) };
            if kind != given && !path.exists() {
                // Clones make it.
                if kind == FileKind::WorkingSet {
                    continue;
                }
                let verdict = Verdict::Skipped("there is none".to_owned());
                checks.push(Check { name: "counterpart", path, verdict });
                continue;
            }
            let bytes = read_bytes(&path)?;
            check_container(&mut checks, &path, &bytes);
            match kind {
                FileKind::Descriptor => descriptor = check_contents(&mut checks, &path, Descriptor::decode(&bytes)),
                FileKind::ImageIndex => {
                    index = check_contents(&mut checks, &path, ImageIndex::decode(&bytes)).map(|index| (path, index));
                }
                FileKind::WorkingSet => {
                    needed = check_contents(&mut checks, &path, Merged::decode(&bytes)).map(|set| (path, set));
                }
            }
        }
        if let (Some(descriptor), Some((path, index))) = (&descriptor, &index) {
            checks.push(Check { name: "pair", path: path.clone(), verdict: check_pair(descriptor, index) });
        }
        let image = descriptor.as_ref().map(|descriptor| (descriptor.identity.image, descriptor.memory.universe()));
        let image = image.or(index.as_ref().map(|(_, index)| (index.image, index.memory.universe())));
        if let (Some((image, frames)), Some((path, set))) = (image, &needed) {
            checks.push(Check { name: "pair", path: path.clone(), verdict: check_needed(set, image, frames) });
        }
        if let Some((path, index)) = index {
            check_image(&mut checks, &path, index, self.image);
        } else if self.image {
            let verdict = Verdict::Faulty("without its index the image cannot be found".to_owned());
            checks.push(Check { name: "image", path: FileKind::ImageIndex.path(&self.file), verdict });
        }
        self.conclude(&checks)
    }

    fn conclude(&self, checks: &[Check]) -> Result<Outcome, CliError> {
        let faults = checks.iter().filter(|check| matches!(check.verdict, Verdict::Faulty(_))).count();
        if self.json {
            let checks: Vec<Value> = checks
                .iter()
                .map(|check| {
                    let (verdict, detail) = check.verdict.words();
                    json!({ "check": check.name, "file": check.path, "verdict": verdict, "detail": detail })
                })
                .collect();
            answer_json(&json!({ "file": self.file, "ok": faults == 0, "checks": checks }))?;
        } else {
            let rows: Vec<Vec<String>> = checks
                .iter()
                .map(|check| {
                    let (verdict, detail) = check.verdict.words();
                    let file = check.path.file_name().unwrap_or_default().to_string_lossy();
                    vec![verdict.to_owned(), check.name.to_owned(), text::harmless(&file), text::harmless(detail)]
                })
                .collect();
            let mut out = String::new();
            text::table(&mut out, &["", "CHECK", "FILE", ""], &rows);
            out += &match faults {
                0 => "\nno fault found\n".to_owned(),
                1 => "\n1 fault found\n".to_owned(),
                _ => format!("\n{faults} faults found\n"),
            };
            answer(&out)?;
        }
        Ok(if faults == 0 { Outcome::Good } else { Outcome::Faulty })
    }
}

impl Verdict {
    fn words(&self) -> (&'static str, &str) {
        match self {
            Verdict::Good(detail) => ("ok", detail),
            Verdict::Faulty(detail) => ("FAULT", detail),
            Verdict::Skipped(detail) => ("skipped", detail),
        }
    }
}

fn check_container(checks: &mut Vec<Check>, path: &Path, bytes: &[u8]) {
    let checked = Container::open(bytes).and_then(|container| {
        container.check()?;
        Ok(format!("{} in {} sections", text::size(bytes.len() as u64), container.sections().len()))
    });
    let verdict = match checked {
        Ok(detail) => Verdict::Good(detail),
        Err(error) => Verdict::Faulty(Report(&error).to_string()),
    };
    checks.push(Check { name: "checksums", path: path.to_owned(), verdict });
}

fn check_contents<T>(checks: &mut Vec<Check>, path: &Path, decoded: Result<T, FormatError>) -> Option<T> {
    let (verdict, value) = match decoded {
        Ok(value) => (Verdict::Good("well-formed".to_owned()), Some(value)),
        Err(error) => (Verdict::Faulty(Report(&error).to_string()), None),
    };
    checks.push(Check { name: "contents", path: path.to_owned(), verdict });
    value
}

fn check_pair(descriptor: &Descriptor, index: &ImageIndex) -> Verdict {
    if descriptor.identity.image != index.image {
        let (theirs, ours) = (index.image, descriptor.identity.image);
        return Verdict::Faulty(format!("the index is of image {theirs}, the descriptor of {ours}"));
    }
    if descriptor.memory != index.memory {
        return Verdict::Faulty("the descriptor has another memory map than the index".to_owned());
    }
    if descriptor.zero != index.zero {
        let mut difference = descriptor.zero.clone();
        difference.subtract(&index.zero);
        let detail = match difference.first_member_from(crate::Gfn::new(0)) {
            Some(gfn) => format!("frame {gfn} is zero in the descriptor, but not in the index"),
            None => "the index has zero frames that the descriptor lacks".to_owned(),
        };
        return Verdict::Faulty(detail);
    }
    Verdict::Good("descriptor and index have the same image, memory map and zero frames".to_owned())
}

/// A server does without a working set of another image.
fn check_needed(set: &Merged, image: ImageId, frames: PageCount) -> Verdict {
    if (set.image(), set.frames()) == (image, frames) {
        return Verdict::Good("the working set is of this image".to_owned());
    }
    let (theirs, theirs_frames) = (set.image(), set.frames());
    Verdict::Faulty(format!(
        "the working set is of image {theirs} with {theirs_frames} frames, not of {image} with {frames}: remove it"
    ))
}

fn check_image(checks: &mut Vec<Check>, path: &Path, index: ImageIndex, read: bool) {
    let mut note = |name, verdict| checks.push(Check { name, path: path.to_owned(), verdict });
    let base = path.parent().unwrap_or(Path::new(""));
    let files = index.files.len();
    let reader = match ImageReader::new(index, base) {
        Ok(reader) => reader,
        Err(error) => return note("files", Verdict::Faulty(Report(&error).to_string())),
    };
    note("files", Verdict::Good(format!("{files} of the indexed length")));
    if !read {
        return note("image", Verdict::Skipped("--image reads it".to_owned()));
    }
    note("image", check_zero_frames(&reader).unwrap_or_else(|error| Verdict::Faulty(Report(&error).to_string())));
}

/// Reads the whole image. What the index calls zero must be so; that it misses some is no fault.
fn check_zero_frames(reader: &ImageReader) -> Result<Verdict, ImageError> {
    let index = reader.index();
    let mut stored = FrameSet::empty(index.memory.universe());
    index.extents.extents().iter().for_each(|extent| _ = stored.insert_range(extent.frames));
    let bar = scan_progress(stored.count());
    let found = zero_frames(reader, &stored, &|pages| bar.inc(pages.bytes()));
    bar.finish_and_clear();
    let found = found?;
    let mut wrong = index.zero.clone();
    wrong.intersect_with(&stored);
    wrong.subtract(&found);
    if let Some(gfn) = wrong.first_member_from(crate::Gfn::new(0)) {
        let detail = format!("{} frames are called zero but are not, the first of them {gfn}", wrong.count());
        return Ok(Verdict::Faulty(detail));
    }
    let mut missed = found;
    missed.subtract(&index.zero);
    let missed = match missed.count() {
        count if count.is_zero() => String::new(),
        count => format!(", {count} more are not listed"),
    };
    Ok(Verdict::Good(format!("{} zero frames are zero{missed}", index.zero.count())))
}
