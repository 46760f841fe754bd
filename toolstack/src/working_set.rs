//! `snowflock workingset`: what clones of an image needed, to be looked at, kept and carried elsewhere.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use descriptor::file::FileKind;
use descriptor::working_set::{Entry, Merged};
use descriptor::{ImageId, PAGE_SIZE};
use memserver::client::{self, AdminError, Command, Reply};
use serde_json::json;

use crate::error::ToolError;

/// What clones of an image needed: the next ones fetch it before they ask
///
/// A memserver learns it from the clones and keeps it in NAME.snowws beside the image's index.
#[derive(Subcommand)]
pub(crate) enum Action {
    /// Show what is known
    Show(ShowOptions),
    /// Write what a server knows to a file, for another server of the same image
    Export(ExportOptions),
    /// Have a server know what is in a file, instead of what it knew
    Import(ImportOptions),
}

/// Of which file or server.
#[derive(Args)]
pub(crate) struct ShowOptions {
    /// The file NAME.snowws, or the index or descriptor that it lies beside
    #[arg(value_name = "FILE", required_unless_present = "admin", conflicts_with = "admin")]
    file: Option<PathBuf>,
    /// The admin socket of a memserver
    #[arg(long, value_name = "SOCKET")]
    admin: Option<PathBuf>,
    /// The image, where the server has several
    #[arg(long, requires = "admin")]
    image: Option<ImageId>,
    /// Print JSON, with every entry
    #[arg(long)]
    json: bool,
}

/// From which server, whereto.
#[derive(Args)]
pub(crate) struct ExportOptions {
    /// The admin socket of the memserver
    #[arg(long, value_name = "SOCKET")]
    admin: PathBuf,
    /// The image, where the server has several
    #[arg(long)]
    image: Option<ImageId>,
    /// Where to write it
    #[arg(short, long, value_name = "FILE.snowws")]
    output: PathBuf,
    /// Replace the file
    #[arg(long)]
    force: bool,
}

/// Which file, into which server.
#[derive(Args)]
pub(crate) struct ImportOptions {
    /// The admin socket of the memserver
    #[arg(long, value_name = "SOCKET")]
    admin: PathBuf,
    /// The file
    #[arg(value_name = "FILE.snowws")]
    file: PathBuf,
}

/// Runs `snowflock workingset`.
///
/// # Errors
/// When the server cannot be reached or refuses, or a file cannot be read, written, or used.
pub(crate) fn run(action: &Action) -> Result<(), ToolError> {
    match action {
        Action::Show(options) => show(options),
        Action::Export(options) => export(options),
        Action::Import(options) => import(options),
    }
}

fn show(options: &ShowOptions) -> Result<(), ToolError> {
    let set = match (&options.file, &options.admin) {
        (Some(file), _) => {
            let path = FileKind::WorkingSet.path(file);
            if !path.exists() {
                return Err(ToolError::NoWorkingSet(path));
            }
            Merged::read(&path)?
        }
        (None, Some(admin)) => ask(admin, options.image)?,
        (None, None) => unreachable!("one of them is required"),
    };
    say(&if options.json { as_json(&set).to_string() } else { as_text(&set) })
}

fn export(options: &ExportOptions) -> Result<(), ToolError> {
    let (path, set) = (&options.output, ask(&options.admin, options.image)?);
    if !options.force && path.exists() {
        return Err(ToolError::Exists(path.clone()));
    }
    set.write(path)?;
    say(&as_text(&set))
}

fn import(options: &ImportOptions) -> Result<(), ToolError> {
    let set = Merged::read(&options.file)?;
    let command = Command::Import { image: set.image(), data: client::to_hex(&set.encode()) };
    client::ask(&options.admin, &command)?;
    say(&as_text(&set))
}

/// What a server knows of an image, of its only one where none is named.
fn ask(admin: &Path, image: Option<ImageId>) -> Result<Merged, ToolError> {
    let image = match image {
        Some(image) => image,
        None => match client::ask(admin, &Command::Images)?.images.unwrap_or_default().as_slice() {
            [only] => only.image,
            images => return Err(ToolError::WhichImage(images.iter().map(|image| image.image).collect())),
        },
    };
    let Reply { data, .. } = client::ask(admin, &Command::Export { image })?;
    let nonsense = || AdminError::Refused("memserver's answer lacks the working set".to_owned());
    let bytes = data.as_deref().and_then(client::from_hex).ok_or_else(nonsense)?;
    Merged::decode(&bytes).map_err(ToolError::WorkingSet)
}

fn as_text(set: &Merged) -> String {
    let summary = set.summary();
    let mib = |frames: u64| format!("{:.1} MiB", (frames * PAGE_SIZE) as f64 / f64::from(1 << 20));
    let share = 100.0 * summary.common as f64 / set.frames().get().max(1) as f64;
    let always = set.entries().iter().filter(|entry| entry.needed == entry.asked).count();
    format!(
        "image    {}, {}\nclones   {} told what they needed, {} of them to the end\nneeded   {} in {} places, {always} of them by every clone that was asked\ncommon   {} ({share:.1} %), which the next clone fetches first",
        set.image(),
        mib(set.frames().get()),
        summary.heard,
        summary.clones,
        mib(summary.frames),
        summary.entries,
        mib(summary.common),
    )
}

fn as_json(set: &Merged) -> serde_json::Value {
    let entry = |entry: &Entry| {
        let Entry { range, needed, asked } = *entry;
        json!({ "frame": range.start().index(), "frames": range.count().get(), "needed": needed, "asked": asked, "common": entry.is_common() })
    };
    let entries: Vec<_> = set.entries().iter().map(entry).collect();
    json!({ "image": set.image(), "frames": set.frames().get(), "summary": set.summary(), "entries": entries })
}

fn say(text: &str) -> Result<(), ToolError> {
    writeln!(io::stdout(), "{text}").map_err(|error| ToolError::Kernel("write to standard output", error))
}
