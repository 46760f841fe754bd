//! What a guest uses its memory for, as a table and a map for people, and as a picture.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::{CliError, scan_progress, text};
use crate::file::FileKind;
use crate::image::ImageReader;
use crate::introspect::{Class, Introspection, Refusal, Surveyor};
use crate::vm::Hypervisor;
use crate::{Descriptor, PageCount};

/// Cells in a line of the map, and lines at most.
const WIDTH: usize = 64;
const LINES: usize = 32;

/// Cells in a row of the picture, their size in pixels, and cells at most.
const PICTURE_WIDTH: usize = 128;
const CELL: usize = 6;
const PICTURE_CELLS: usize = PICTURE_WIDTH * 128;

/// What a guest uses its memory for.
pub(super) struct Classes {
    found: Introspection,
    total: PageCount,
}

impl Classes {
    /// Reads the image of a descriptor, whose index must lie beside it, or of an index.
    pub(super) fn of(file: &Path, kind: FileKind) -> Result<Self, CliError> {
        let (index, hypervisors) = match kind {
            FileKind::Descriptor => (file.with_extension("snowidx"), vec![Descriptor::read(file)?.identity.hypervisor]),
            // An index does not say what its guest ran on; only one of them makes sense of the memory.
            FileKind::ImageIndex => (file.to_owned(), vec![Hypervisor::Qemu, Hypervisor::Raw]),
            FileKind::WorkingSet => (file.with_extension("snowidx"), vec![Hypervisor::Qemu, Hypervisor::Raw]),
        };
        let image = ImageReader::open(&index)?;
        let mut surveyor = Surveyor::default();
        let mut stored = image.index().memory.present();
        stored.subtract(&image.index().zero);
        let bar = scan_progress(stored.count());
        let surveyed = surveyor.zero_frames(&image, &stored, &|pages| bar.inc(pages.bytes()));
        bar.finish_and_clear();
        surveyed?;
        let mut refusal = Refusal::NoNote;
        for hypervisor in hypervisors {
            match surveyor.introspect(&image, hypervisor) {
                Ok(found) => {
                    let total = found.counts().into_iter().sum();
                    return Ok(Self { found, total });
                }
                Err(why) => refusal = why,
            }
        }
        Err(CliError::NoClasses(refusal))
    }

    /// A table of the classes, and a map of the memory.
    pub(super) fn text(&self) -> String {
        let mut out = format!("\nLinux {}\n\n", text::harmless(&self.found.release));
        let rows: Vec<Vec<String>> = self
            .counts()
            .map(|(class, pages)| {
                let (name, sign) = (class.name().to_owned(), sign(class).to_string());
                let bar = text::bar(pages, self.total, 24);
                vec![sign, name, pages.to_string(), text::size(pages.bytes()), text::share(pages, self.total), bar]
            })
            .collect();
        text::table(&mut out, &["", "CLASS", ">PAGES", ">SIZE", ">SHARE", ""], &rows);
        let (cells, frames) = self.cells(WIDTH * LINES);
        _ = write!(out, "\n{} a cell, by the class of most of its frames\n", text::size(frames.bytes()));
        for line in cells.chunks(WIDTH) {
            out.extend(line.iter().map(|class| sign(*class)));
            out.push('\n');
        }
        out
    }

    pub(super) fn json(&self) -> Value {
        let classes: serde_json::Map<String, Value> =
            self.counts().map(|(class, pages)| (class.name().to_owned(), pages.get().into())).collect();
        json!({ "release": self.found.release, "pages": classes })
    }

    /// The map as a picture in SVG.
    pub(super) fn svg(&self) -> String {
        let (cells, frames) = self.cells(PICTURE_CELLS);
        let legend = 20 * (Class::ALL.len() + 1);
        let width = PICTURE_WIDTH * CELL + 220;
        let height = (cells.len().div_ceil(PICTURE_WIDTH) * CELL).max(legend) + 40;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
             <text x=\"8\" y=\"20\">Linux {}, {} of memory, {} a cell</text>\n",
            escaped(&self.found.release),
            text::size(self.total.bytes()),
            text::size(frames.bytes()),
        );
        for (line, row) in cells.chunks(PICTURE_WIDTH).enumerate() {
            let mut column = 0;
            for run in row.chunk_by(|a, b| a == b) {
                let (x, y, w) = (8 + column * CELL, 32 + line * CELL, run.len() * CELL);
                _ = writeln!(
                    out,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{w}\" height=\"{CELL}\" fill=\"{}\"/>",
                    colour(run[0])
                );
                column += run.len();
            }
        }
        for (at, (class, pages)) in self.counts().enumerate() {
            let (x, y) = (24 + PICTURE_WIDTH * CELL, 32 + 20 * at);
            _ = writeln!(
                out,
                "<rect x=\"{x}\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"{}\"/><text x=\"{}\" y=\"{}\">{} {}</text>",
                colour(class),
                x + 20,
                y + 10,
                class.name(),
                text::share(pages, self.total),
            );
        }
        out + "</svg>\n"
    }

    /// The classes that occur, and how many pages they have.
    fn counts(&self) -> impl Iterator<Item = (Class, PageCount)> {
        Class::ALL.into_iter().zip(self.found.counts()).filter(|(_, pages)| !pages.is_zero())
    }

    /// The memory in at most `limit` cells of so many frames each, with the class of most of them.
    fn cells(&self, limit: usize) -> (Vec<Class>, PageCount) {
        let all: Vec<Class> = self.found.classes().flat_map(|(_, classes)| classes.iter().copied()).collect();
        let frames = all.len().div_ceil(limit).max(1);
        let most = |cell: &[Class]| {
            let count = |class: &Class| cell.iter().filter(|other| *other == class).count();
            Class::ALL.into_iter().max_by_key(count).unwrap_or(Class::Unknown)
        };
        (all.chunks(frames).map(most).collect(), PageCount::new(frames as u64))
    }
}

/// What stands for a class in the map.
fn sign(class: Class) -> char {
    match class {
        Class::Unknown => ' ',
        Class::Free => '·',
        Class::PerCpuFree => ':',
        Class::Offline => '-',
        Class::KernelImage => 'K',
        Class::PageTable => 'T',
        Class::Slab => 's',
        Class::PageArray => 'P',
        Class::Kernel => 'k',
        Class::Anonymous => 'a',
        Class::File => 'f',
        Class::Shmem => 'm',
        Class::Huge => 'H',
    }
}

fn colour(class: Class) -> &'static str {
    match class {
        Class::Unknown => "#f4f4f4",
        Class::Free => "#d9ead3",
        Class::PerCpuFree => "#b6d7a8",
        Class::Offline => "#cccccc",
        Class::KernelImage => "#990000",
        Class::PageTable => "#cc0000",
        Class::Slab => "#e69138",
        Class::PageArray => "#b45f06",
        Class::Kernel => "#f1c232",
        Class::Anonymous => "#3d85c6",
        Class::File => "#674ea7",
        Class::Shmem => "#a64d79",
        Class::Huge => "#0b5394",
    }
}

/// A text of the guest in XML.
fn escaped(text: &str) -> String {
    text::harmless(text).replace('&', "&amp;").replace('<', "&lt;")
}
