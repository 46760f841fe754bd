//! The capture of a running QEMU over its monitor.
//!
//! [`Method`] says which ways there are. Unless one is asked for, [`capture`] takes the best that the parent allows, and the
//! next one where QEMU refuses or fails. Whatever happens, the parent goes on afterwards as it did before: its migration
//! capabilities and parameters are put back, a migration under way is cancelled, and its vCPUs run if they ran. Only a parent
//! that stood still before is left in QEMU's state `postmigrate` by a method that does not work in the background: it can be
//! continued, but not captured once more.
//!
//! QEMU writes into files that it is handed open, so that it needs no right to the folder they lie in.

mod copy;
mod error;
mod method;
mod monitor;
mod session;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

pub use error::CaptureError;
pub use method::{Method, MethodError, ParseMethodError};

use self::method::{Backend, Parent};
use self::session::Session;
use super::qmp::Qmp;
use super::stream::{BlockPages, Stream};
use super::{ImportError, RamFile, SavedFiles};
use crate::ImageId;
use crate::import::Origin;

/// How long QEMU may take to answer a command. It answers at once, but one whose main loop writes to a slow disk does not.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// What to capture, and how.
#[derive(Clone, Debug)]
pub struct CaptureOptions {
    /// The parent's QMP socket. No other client may hold it.
    pub qmp: PathBuf,
    /// The way to capture; `None` for the best that works.
    pub method: Option<Method>,
    /// The capture's name, a path without extension: `NAME.qemu` becomes the stream and `NAME.ram` (`NAME.1.ram` …) the
    /// memory that is not in it.
    pub name: PathBuf,
    /// Replace files that exist. Whoever has the old ones open keeps them.
    pub replace: bool,
    /// Disks to freeze at the moment of the capture.
    pub disks: Vec<DiskOverlay>,
}

/// A disk that the parent goes on writing in a new overlay, so that the clones can share what it has written so far.
///
/// The parent stands still while the overlay is made, and keeps it even if the capture fails.
#[derive(Clone, Debug)]
pub struct DiskOverlay {
    /// The block device's name.
    pub device: String,
    /// The qcow2 file to make.
    pub overlay: PathBuf,
}

/// What a capture says while it works.
#[derive(Debug)]
#[non_exhaustive]
pub enum Progress<'p> {
    /// It is tried by this method.
    Method(Method),
    /// This method does not work here; the next one is tried.
    FellBack(Method, &'p CaptureError),
    /// So many bytes of memory are written.
    Memory {
        /// The bytes written, or left out as zeros.
        done: u64,
        /// The bytes of memory.
        total: u64,
    },
    /// So many bytes of memory are copied, while the parent stands still.
    Copying {
        /// The bytes copied, or left out as zeros.
        done: u64,
        /// The bytes of memory.
        total: u64,
    },
}

/// Is told how a capture goes on, and may break it off; then the parent is put back as it was.
pub type Observer<'o> = dyn FnMut(Progress<'_>) -> ControlFlow<()> + 'o;

/// A capture that was made, for [`super::import`].
#[derive(Clone, Debug)]
pub struct Captured {
    /// The files it lies in.
    pub files: SavedFiles,
    /// What they do not say of themselves.
    pub origin: Origin,
    /// The way it was captured.
    pub method: Method,
}

/// Captures a running QEMU as image `image`. Afterwards the parent goes on, and the capture wants to be imported.
///
/// # Errors
/// When QEMU cannot be captured. The files that were begun are removed, and the parent goes on, unless the error says that it
/// does not.
pub fn capture(
    options: &CaptureOptions,
    image: ImageId,
    progress: &mut Observer<'_>,
) -> Result<Captured, CaptureError> {
    let mut qmp = Qmp::connect(&options.qmp, COMMAND_TIMEOUT)?;
    let migration = qmp.migration()?;
    if !migration.is_over() {
        return Err(CaptureError::Busy(migration.status));
    }
    let parent = qmp.parent()?;
    let mut attempt = |method, progress: &mut Observer<'_>| {
        method::check(method, &parent).map_err(|source| CaptureError::Method { method, source })?;
        attempt(&mut qmp, &parent, options, method, image, progress)
    };
    if let Some(method) = options.method {
        return attempt(method, progress);
    }
    for method in [Method::MappedRam, Method::BackgroundSnapshot, Method::IgnoreShared] {
        match attempt(method, progress) {
            Err(error) if error.is_of_the_method(!options.disks.is_empty()) => {
                tell(progress, Progress::FellBack(method, &error))?;
            }
            done => return done,
        }
    }
    attempt(Method::Precopy, progress)
}

/// One try; the files of a failed one are removed.
fn attempt(
    qmp: &mut Qmp,
    parent: &Parent,
    options: &CaptureOptions,
    method: Method,
    image: ImageId,
    progress: &mut Observer<'_>,
) -> Result<Captured, CaptureError> {
    tell(progress, Progress::Method(method))?;
    let mut written = Written { replace: options.replace, paths: Vec::new() };
    let captured = run(qmp, parent, options, method, image, progress, &mut written);
    if captured.is_err() {
        written.remove();
    }
    captured
}

fn run(
    qmp: &mut Qmp,
    parent: &Parent,
    options: &CaptureOptions,
    method: Method,
    image: ImageId,
    progress: &mut Observer<'_>,
    written: &mut Written,
) -> Result<Captured, CaptureError> {
    let (version, name) = (qmp.version().to_string(), qmp.name()?);
    let (path, file) = written.create(with_extension(&options.name, "qemu"))?;
    let mut session = Session::new(qmp, parent.running);
    let began = SystemTime::now();
    let mut migrated = session.migrate(method, &file, &options.disks, progress);
    let mut copies = Vec::new();
    if migrated.is_ok() && method == Method::IgnoreShared {
        migrated = copy_backends(parent, &options.name, written, progress).map(|made| copies = made);
    }
    match (migrated, session.restore()) {
        (Ok(()), Ok(())) => {}
        (Ok(()), Err(restore)) => return Err(CaptureError::NotRestored(restore)),
        (Err(capture), Ok(())) => return Err(capture),
        (Err(capture), Err(restore)) => {
            return Err(CaptureError::FailedAndNotRestored { capture: Box::new(capture), restore });
        }
    }
    let (stopped, pause) = session.pause();
    let servers = Vec::new();
    let origin = Origin { image, parent: name, version, captured: stopped.unwrap_or(began), pause, servers };
    let files = SavedFiles { ram: ram_files(&path, &copies)?, stream: path };
    Ok(Captured { files, origin, method })
}

/// A copy of what a memory backend holds.
struct Copy {
    backend: Backend,
    path: PathBuf,
}

fn copy_backends(
    parent: &Parent,
    name: &Path,
    written: &mut Written,
    progress: &mut Observer<'_>,
) -> Result<Vec<Copy>, CaptureError> {
    let mut copies: Vec<Copy> = Vec::new();
    for backend in parent.backends.iter().filter(|backend| backend.shared) {
        let Some((source, offset)) = &backend.file else { continue };
        let extension = if copies.is_empty() { "ram".to_owned() } else { format!("{}.ram", copies.len()) };
        let (path, target) = written.create(with_extension(name, &extension))?;
        let failed = |error| CaptureError::CopyMemory { path: source.clone(), source: error };
        let file = File::open(source).map_err(failed)?;
        let total = backend.size;
        let mut goes_on = |done| progress(Progress::Copying { done, total }).is_continue();
        if !copy::copy_memory(&file, *offset, total, &target, &mut goes_on).map_err(failed)? {
            return Err(CaptureError::BrokenOff);
        }
        copies.push(Copy { backend: backend.clone(), path });
    }
    Ok(copies)
}

/// Which of the copies backs which of the blocks that the stream has left out.
fn ram_files(path: &Path, copies: &[Copy]) -> Result<Vec<RamFile>, ImportError> {
    if copies.is_empty() {
        return Ok(Vec::new());
    }
    let read = |source| ImportError::Read { path: path.to_owned(), source };
    let stream = Stream::parse(&File::open(path).map_err(read)?);
    let stream = stream.map_err(|source| ImportError::Stream { path: path.to_owned(), source })?;
    let backends: Vec<Backend> = copies.iter().map(|copy| copy.backend.clone()).collect();
    let external = stream.blocks.iter().filter(|block| block.pages == BlockPages::External);
    let file = |block: &super::stream::RamBlock| {
        let backend = method::backend_of(&block.name, block.size.bytes(), &backends)?;
        let copy = copies.iter().find(|copy| copy.backend == *backend)?;
        Some(RamFile { block: Some(block.name.clone()), path: copy.path.clone(), offset: 0 })
    };
    Ok(external.filter_map(file).collect())
}

fn tell(progress: &mut Observer<'_>, what: Progress<'_>) -> Result<(), CaptureError> {
    if progress(what).is_break() { Err(CaptureError::BrokenOff) } else { Ok(()) }
}

/// The files that a capture has begun.
struct Written {
    replace: bool,
    paths: Vec<PathBuf>,
}

impl Written {
    /// Makes a new file for guest memory, which is nobody else's business.
    fn create(&mut self, path: PathBuf) -> Result<(PathBuf, File), CaptureError> {
        let failed = |source| CaptureError::Write { path: path.clone(), source };
        match if self.replace { std::fs::remove_file(&path) } else { Ok(()) } {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        // QEMU looks for a descriptor of a file set that is open for writing alone.
        let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = opened.map_err(failed)?;
        self.paths.push(path.clone());
        Ok((path, file))
    }

    fn remove(&self) {
        for path in &self.paths {
            // The capture has failed for another reason, which is the one to tell.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// `name` with `.extension` behind it, dots in the name or not.
fn with_extension(name: &Path, extension: &str) -> PathBuf {
    let mut path = OsString::from(name);
    path.push(".");
    path.push(extension);
    path.into()
}
