use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::Args;
use serde_json::{Value, json};

use super::classes::Classes;
use super::{CliError, Outcome, answer, answer_json, text};
use crate::file::{Container, FileKind, FormatError, read_bytes};
use crate::image::{Extent, ImageIndex};
use crate::memory::{MemoryMap, Region};
use crate::working_set::Merged;
use crate::{Descriptor, FrameRange, FrameSet, Gfn, PageCount};

/// The width of bars and maps in cells; a line of them fits a terminal of 80 columns.
const WIDTH: u64 = 64;

#[derive(Debug, Args)]
pub(super) struct Inspect {
    /// A descriptor (.snow) or an image index (.snowidx)
    file: PathBuf,
    /// Show what the guest uses its memory for too; reads the image, whose index lies beside a descriptor
    #[arg(long)]
    classes: bool,
    /// Draw that as a picture (SVG) into FILE
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub(super) fn run(&self) -> Result<Outcome, CliError> {
        let bytes = read_bytes(&self.file)?;
        let failed = |source| CliError::Format { path: self.file.clone(), source };
        let mut shown = show(&bytes).map_err(failed)?;
        if self.classes || self.svg.is_some() {
            let kind = Container::open(&bytes).map_err(failed)?.kind();
            let classes = Classes::of(&self.file, kind)?;
            shown.text += &classes.text();
            shown.json["classes"] = classes.json();
            if let Some(path) = &self.svg {
                let written = std::fs::write(path, classes.svg());
                written.map_err(|source| CliError::Write { path: path.clone(), source })?;
            }
        }
        if self.json {
            answer_json(&shown.json)?;
        } else {
            answer(&format!("{}: {}", self.file.display(), shown.text))?;
        }
        Ok(Outcome::Good)
    }
}

/// A file for people and for programs.
struct Shown {
    text: String,
    json: Value,
}

fn show(bytes: &[u8]) -> Result<Shown, FormatError> {
    let container = Container::open(bytes)?;
    let (shown, frames) = match container.kind() {
        FileKind::Descriptor => {
            let descriptor = Descriptor::decode(bytes)?;
            (show_descriptor(&descriptor), descriptor.memory.frame_count())
        }
        FileKind::ImageIndex => {
            let index = ImageIndex::decode(bytes)?;
            (show_index(&index), index.memory.frame_count())
        }
        FileKind::WorkingSet => {
            let set = Merged::decode(bytes)?;
            (show_working_set(&set), set.frames().max(PageCount::ONE))
        }
    };
    let length = bytes.len() as u64;
    let per_gib = (u128::from(length) << 30) / u128::from(frames.bytes());
    let per_gib = u64::try_from(per_gib).unwrap_or(u64::MAX);
    let mut out = format!(
        "{}, format {}, {} ({} per GiB of guest)\n",
        container.kind(),
        container.version(),
        text::size(length),
        text::size(per_gib),
    );
    out += &shown.text;
    let sections: Vec<Vec<String>> = container
        .sections()
        .iter()
        .map(|entry| {
            let how = if entry.compressed { "lz4" } else { "" };
            let sizes = [entry.stored, entry.plain].map(text::size);
            let [stored, plain] = sizes;
            vec![entry.kind.to_string(), stored, plain, how.to_owned()]
        })
        .collect();
    out.push('\n');
    text::table(&mut out, &["SECTION", ">STORED", ">PLAIN", ""], &sections);
    let mut json = shown.json;
    json["kind"] = match container.kind() {
        FileKind::Descriptor => "descriptor",
        FileKind::ImageIndex => "image-index",
        FileKind::WorkingSet => "working-set",
    }
    .into();
    json["version"] = container.version().to_string().into();
    json["file_bytes"] = length.into();
    json["file_bytes_per_gib"] = per_gib.into();
    json["sections"] = container
        .sections()
        .iter()
        .map(|entry| {
            json!({
                "section": entry.kind.to_string(),
                "number": entry.kind.number(),
                "required": entry.required,
                "compressed": entry.compressed,
                "offset": entry.offset,
                "stored_bytes": entry.stored,
                "plain_bytes": entry.plain,
            })
        })
        .collect();
    Ok(Shown { text: out, json })
}

fn show_descriptor(descriptor: &Descriptor) -> Shown {
    let identity = &descriptor.identity;
    let memory = &descriptor.memory;
    let mut quiet = descriptor.zero.clone();
    quiet.union_with(&descriptor.free);
    let prefetch: PageCount = descriptor.prefetch.iter().map(|run| run.count()).sum();
    let sets = [
        ("data", memory.frame_count() - quiet.count()),
        ("zero", descriptor.zero.count()),
        ("free", descriptor.free.count()),
        ("eager", descriptor.eager.count()),
        ("prefetch", prefetch),
    ];

    let captured = SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(identity.captured_unix_ns));
    let captured = captured.map_or(String::new(), |time| humantime::format_rfc3339_seconds(time).to_string());
    let pause = match identity.pause_us {
        Some(pause) => format!(", the parent stood still for {:.1} ms", pause as f64 / 1e3),
        None => String::new(),
    };
    let words = [&identity.hypervisor_version, &identity.machine].map(|word| text::harmless(word));
    let hypervisor = [identity.hypervisor.to_string()].into_iter().chain(words).filter(|word| !word.is_empty());
    let mut facts = vec![
        ("image", identity.image.to_string()),
        ("parent", text::harmless(&identity.parent)),
        ("hypervisor", hypervisor.collect::<Vec<_>>().join(" ")),
        ("captured", captured + &pause),
    ];
    facts.extend(descriptor.servers.iter().map(|server| ("server", server.to_string())));
    let mut out = show_facts(&facts);
    out += &show_regions(
        memory,
        &quiet,
        &[("DATA", None), ("ZERO", Some(&descriptor.zero)), ("FREE", Some(&descriptor.free))],
    );
    out += &show_sets(memory, &sets);
    if !descriptor.records.is_empty() {
        let rows: Vec<Vec<String>> = descriptor
            .records
            .iter()
            .map(|record| vec![text::harmless(&record.name), text::size(record.data.len() as u64)])
            .collect();
        out.push('\n');
        text::table(&mut out, &["RECORD", ">SIZE"], &rows);
    }

    let records: Vec<Value> =
        descriptor.records.iter().map(|record| json!({ "name": record.name, "bytes": record.data.len() })).collect();
    let json = json!({
        "image": identity.image,
        "parent": identity.parent,
        "hypervisor": identity.hypervisor.to_string(),
        "hypervisor_version": identity.hypervisor_version,
        "machine": identity.machine,
        "captured_unix_ns": identity.captured_unix_ns,
        "pause_us": identity.pause_us,
        "servers": descriptor.servers,
        "pages": memory.frame_count(),
        "data_pages": sets[0].1,
        "zero_pages": sets[1].1,
        "free_pages": sets[2].1,
        "eager_pages": sets[3].1,
        "prefetch_pages": sets[4].1,
        "regions": regions_json(memory, &[("data_pages", None), ("zero_pages", Some(&descriptor.zero)), ("free_pages", Some(&descriptor.free))], &quiet),
        "records": records,
    });
    Shown { text: out, json }
}

fn show_working_set(set: &Merged) -> Shown {
    let summary = set.summary();
    let size = |frames: u64| text::size(PageCount::new(frames).bytes());
    let text = show_facts(&[
        ("image", set.image().to_string()),
        ("clones", format!("{} told what they needed, {} of them to the end", summary.heard, summary.clones)),
        ("needed", format!("{} in {} entries", size(summary.frames), summary.entries)),
        ("common", format!("{}, which the next clone fetches ahead", size(summary.common))),
    ]);
    let json = json!({ "image": set.image(), "pages": set.frames(), "working_set": summary });
    Shown { text, json }
}

fn show_index(index: &ImageIndex) -> Shown {
    let memory = &index.memory;
    let extents = index.extents.extents();
    let stored: PageCount = extents.iter().map(|extent| extent.frames.count()).sum();
    let strided = extents.iter().filter(|extent| !extent.is_contiguous()).count();
    let largest = extents.iter().map(|extent| extent.frames.count()).max().unwrap_or_default();
    let mut quiet = memory.present();
    extents.iter().for_each(|extent| _ = quiet.remove_range(extent.frames));
    quiet.union_with(&index.zero);

    let mut out = show_facts(&[("image", index.image.to_string())]);
    out += &show_regions(memory, &quiet, &[("DATA", None), ("ZERO", Some(&index.zero))]);
    let data = memory.frame_count() - quiet.count();
    out += &show_sets(memory, &[("data", data), ("zero", index.zero.count()), ("stored", stored)]);
    let per_file = |file: usize| -> PageCount {
        let of_file = |extent: &&Extent| usize::from(extent.file) == file;
        extents.iter().filter(of_file).map(|extent| extent.frames.count()).sum()
    };
    let rows: Vec<Vec<String>> = index
        .files
        .iter()
        .enumerate()
        .map(|(number, file)| {
            let path = text::harmless(&file.path.display().to_string());
            vec![path, text::size(file.length), per_file(number).to_string()]
        })
        .collect();
    out.push('\n');
    text::table(&mut out, &["FILE", ">SIZE", ">PAGES"], &rows);
    out += &format!("\n{} extents, {strided} of them strided; the largest has {largest} pages\n", extents.len(),);

    let files: Vec<Value> = index
        .files
        .iter()
        .enumerate()
        .map(|(number, file)| json!({ "path": file.path.to_string_lossy(), "bytes": file.length, "pages": per_file(number) }))
        .collect();
    let json = json!({
        "image": index.image,
        "pages": memory.frame_count(),
        "data_pages": data,
        "zero_pages": index.zero.count(),
        "stored_pages": stored,
        "regions": regions_json(memory, &[("data_pages", None), ("zero_pages", Some(&index.zero))], &quiet),
        "files": files,
        "extents": extents.len(),
        "strided_extents": strided,
    });
    Shown { text: out, json }
}

fn show_facts(facts: &[(&str, String)]) -> String {
    let facts = facts.iter().filter(|(_, value)| !value.is_empty());
    facts.fold("\n".to_owned(), |out, (name, value)| out + &format!("{name:<12}{value}\n"))
}

/// The pages of a region that are in `set`, or for `None` those that are not in `quiet`.
fn pages_in(region: &Region, set: Option<&FrameSet>, quiet: &FrameSet) -> PageCount {
    let frames = region.frames;
    set.map_or_else(|| frames.count() - quiet.count_in(frames), |set| set.count_in(frames))
}

fn regions_json(memory: &MemoryMap, sets: &[(&str, Option<&FrameSet>)], quiet: &FrameSet) -> Value {
    let region_json = |region: &Region| {
        let mut json = json!({
            "name": region.name,
            "kind": region.kind,
            "page_size": region.page_size,
            "first_frame": region.frames.start(),
            "pages": region.frames.count(),
        });
        for (name, set) in sets {
            json[*name] = pages_in(region, *set, quiet).get().into();
        }
        json
    };
    memory.regions().iter().map(region_json).collect()
}

/// A table of the regions with the share of each set, and a map of each; a set without frames is what is left over by `quiet`.
fn show_regions(memory: &MemoryMap, quiet: &FrameSet, sets: &[(&str, Option<&FrameSet>)]) -> String {
    let mut titles = vec!["REGION".to_owned(), "KIND".into(), "PAGES".into(), "FRAMES".into(), ">SIZE".into()];
    titles.extend(sets.iter().map(|(name, _)| format!(">{name}")));
    let titles: Vec<&str> = titles.iter().map(String::as_str).collect();
    let row = |region: &Region| {
        let frames = region.frames;
        let mut row = vec![
            text::harmless(&region.name),
            region.kind.to_string(),
            region.page_size.to_string(),
            format!("{}..{}", frames.start(), frames.end()),
            text::size(frames.count().bytes()),
        ];
        row.extend(sets.iter().map(|(_, set)| text::share(pages_in(region, *set, quiet), frames.count())));
        row
    };
    let mut out = "\n".to_owned();
    text::table(&mut out, &titles, &memory.regions().iter().map(row).collect::<Vec<_>>());
    // What is small, in itself or beside the rest, says little in a map.
    let enough = WIDTH.max(memory.frame_count().get() / WIDTH);
    let large = memory.regions().iter().filter(|region| region.frames.count().get() >= enough);
    for region in large {
        let cell = FrameRange::new(Gfn::new(0), PageCount::new(region.frames.count().get().div_ceil(WIDTH)));
        out += &format!(
            "\n{}, {} a cell (█ data, · zero or free)\n{}\n",
            text::harmless(&region.name),
            text::size(cell.count().bytes()),
            text::map(region.frames, quiet, WIDTH)
        );
    }
    out
}

fn show_sets(memory: &MemoryMap, sets: &[(&str, PageCount)]) -> String {
    let total = memory.frame_count();
    let rows: Vec<Vec<String>> = [("all", total)]
        .iter()
        .chain(sets)
        .map(|(name, pages)| {
            let bar = text::bar(*pages, total, 24);
            vec![(*name).to_owned(), pages.to_string(), text::size(pages.bytes()), text::share(*pages, total), bar]
        })
        .collect();
    let mut out = "\n".to_owned();
    text::table(&mut out, &["SET", ">PAGES", ">SIZE", ">SHARE", ""], &rows);
    out
}
