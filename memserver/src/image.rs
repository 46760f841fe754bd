//! The images that are served: their files, mapped for the kernel to send from.
//!
//! The program itself never reads a mapped byte, the kernel alone does while it sends. So a file that is cut short while it
//! is served costs the sessions that want the lost pages, and the image is taken out of service; it cannot kill the server
//! by SIGBUS. Where the program needs bytes, to compress them, it reads the file.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use descriptor::fetch::{LocalImage, Message};
use descriptor::image::{Content, ExtentTable, ImageIndex, Layout, Span};
use descriptor::{FrameRange, FrameSet, ImageId, PAGE_SIZE, PageCount};
use parking_lot::RwLock;
use thiserror::Error;

use crate::session::ImageFacts;
use crate::sys::Mapping;
use crate::working_set::ImageSet;

/// Images in one server: their number bounds the status report, not the memory.
pub const MAX_IMAGES: usize = 4096;

/// An image in service.
#[derive(Debug)]
pub struct ServedImage {
    id: ImageId,
    frames: PageCount,
    present: PageCount,
    extents: ExtentTable,
    zero: FrameSet,
    files: Vec<MappedFile>,
    local: OnceLock<Vec<u8>>,
    needed: Arc<ImageSet>,
}

#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    length: u64,
    file: File,
    mapping: Mapping,
}

/// What is done at opening so that the first clones need not wait for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preload {
    /// Nothing: pages are read when they are asked for, and a disk that is slow then holds up the other sessions.
    Off,
    /// The files are read into the page cache in the background.
    Populate,
    /// They are read and kept there.
    Lock,
}

/// Why an image cannot be served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A file cannot be used.
    #[error("cannot {action} {path}", path = path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file has another length than when it was indexed.
    #[error("{path} has {found} bytes, its index says {indexed}: it is not the file that was indexed", path = path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// The length now in bytes.
        found: u64,
        /// The length in the index in bytes.
        indexed: u64,
    },
    /// Somebody has locked a file for writing.
    #[error("{path} is locked by a program that still writes it", path = path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The image is in service already.
    #[error("image {0} is served already")]
    Duplicate(ImageId),
    /// No image of that name is in service.
    #[error("image {0} is not served")]
    Unknown(ImageId),
    /// As many images as the server takes.
    #[error("the server has {MAX_IMAGES} images already")]
    TooMany,
}

impl ServedImage {
    /// Opens the files of `index`, whose relative paths count from `base`.
    ///
    /// The files are share-locked, so that a program which locks before it writes leaves them alone.
    ///
    /// # Errors
    /// When a file cannot be opened or mapped, or is not the one that was indexed.
    pub fn open(index: ImageIndex, base: &Path) -> Result<Self, ImageError> {
        let files = index.files.iter().map(|file| MappedFile::open(&base.join(&file.path), file.length));
        Ok(Self {
            id: index.image,
            frames: index.memory.universe(),
            present: index.memory.frame_count(),
            files: files.collect::<Result<_, _>>()?,
            needed: Arc::new(ImageSet::new(index.image, index.memory.universe())),
            extents: index.extents,
            zero: index.zero,
            local: OnceLock::new(),
        })
    }

    /// The image's name.
    pub fn id(&self) -> ImageId {
        self.id
    }

    /// The number of frames that exist.
    pub fn present(&self) -> PageCount {
        self.present
    }

    /// The number of frames that are sent as zeros without a byte of payload, as far as the index knows them.
    pub fn zeros(&self) -> PageCount {
        self.zero.count()
    }

    /// The files.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// What a session needs to know.
    pub fn facts(&self) -> ImageFacts {
        let fits = self.extents.extents().len() <= LocalImage::MAX_EXTENTS
            && (1..=usize::from(LocalImage::MAX_FILES)).contains(&self.files.len());
        // Datagrams name frames by 32 bits.
        ImageFacts { frames: self.frames, local: fits, multicast: u32::try_from(self.frames.get()).is_ok() }
    }

    /// What clones need.
    pub(crate) fn needed(&self) -> &Arc<ImageSet> {
        &self.needed
    }

    /// The same with what is kept of its clones' working sets beside `index`.
    pub(crate) fn with_working_set(self, index: &Path) -> Self {
        Self { needed: Arc::new(ImageSet::load(self.id, self.frames, index)), ..self }
    }

    /// The IMAGE message, and the files that go with it.
    pub fn local_message(&self) -> (&[u8], impl Iterator<Item = &File>) {
        let message = self.local.get_or_init(|| {
            let extents = self.extents.extents().to_vec();
            let mut bytes = Vec::new();
            Message::Image(LocalImage { files: self.files.len() as u16, extents }).encode(&mut bytes);
            bytes
        });
        (message, self.files.iter().map(|file| &file.file))
    }

    /// Calls `each` with the address and length of every contiguous piece of `frames`, which must be stored; ascending.
    pub(crate) fn pieces(&self, frames: FrameRange, mut each: impl FnMut(*const u8, usize)) {
        self.for_each_piece(frames, |file, offset, length| {
            // The table was checked against the files' lengths when the index was read, so this stays in the mapping.
            each(file.mapping.address().wrapping_add(offset as usize).cast_const(), length);
        });
    }

    /// Reads `frames`, which must be stored, into `pages`, which must be of their size.
    ///
    /// # Errors
    /// When a file cannot be read, or is shorter than it was.
    pub fn read(&self, frames: FrameRange, pages: &mut [u8]) -> io::Result<()> {
        let mut rest = pages;
        let mut result = Ok(());
        self.for_each_piece(frames, |file, offset, length| {
            let (piece, tail) = std::mem::take(&mut rest).split_at_mut(length);
            rest = tail;
            if result.is_ok() {
                result = file.file.read_exact_at(piece, offset);
            }
        });
        result
    }

    /// The files with the mappings that [`ServedImage::pieces`] leads into.
    pub(crate) fn mappings(&self) -> impl Iterator<Item = (&File, &Mapping)> {
        self.files.iter().map(|file| (&file.file, &file.mapping))
    }

    /// Finds out whether the files are still as long as they were.
    ///
    /// # Errors
    /// When one is not.
    pub fn check(&self) -> Result<(), ImageError> {
        self.files.iter().try_for_each(|file| check_length(&file.file, &file.path, file.length))
    }

    /// Brings the files into memory, as `preload` says; this takes as long as reading them.
    ///
    /// # Errors
    /// When they cannot be read, or not be locked for want of RLIMIT_MEMLOCK.
    pub fn preload(&self, preload: Preload) -> Result<(), ImageError> {
        /// Between two steps the program can end.
        const STEP: usize = 64 << 20;
        for file in &self.files {
            let failed = |action| move |source| ImageError::File { action, path: file.path.clone(), source };
            match preload {
                Preload::Off => {}
                Preload::Populate => (0..file.mapping.len())
                    .step_by(STEP)
                    .try_for_each(|offset| file.mapping.populate(offset, STEP))
                    .map_err(failed("read"))?,
                Preload::Lock => file.mapping.lock().map_err(failed("lock (see ulimit -l)"))?,
            }
        }
        Ok(())
    }

    fn for_each_piece(&self, frames: FrameRange, mut each: impl FnMut(&MappedFile, u64, usize)) {
        for span in self.extents.spans(frames) {
            let Span::Stored(extent) = span else { continue };
            let Some(file) = self.files.get(usize::from(extent.file)) else { continue };
            if extent.is_contiguous() {
                each(file, extent.offset, extent.frames.count().bytes() as usize);
            } else {
                extent.frames.frames().for_each(|gfn| each(file, extent.offset_of(gfn), PAGE_SIZE as usize));
            }
        }
    }

    fn is_stored(&self, range: FrameRange) -> bool {
        !self.zero.contains(range.start()) && self.extents.find(range.start()).is_some()
    }

    /// The longest head of `range` that is zero, at least one frame.
    fn zero_head(&self, range: FrameRange) -> FrameRange {
        let mut end = range.start();
        while end < range.end() {
            let rest = FrameRange::between(end, range.end());
            if self.zero.contains(end) {
                end = self.zero.first_gap_from(end).unwrap_or(range.end()).min(range.end());
            } else if let Some(Span::Hole(hole)) = self.extents.spans(rest).next() {
                end = hole.end();
            } else {
                break;
            }
        }
        FrameRange::between(range.start(), end)
    }

    /// The longest head of `range` that is stored, at most `limit` frames and at least one.
    fn stored_head(&self, range: FrameRange, limit: PageCount) -> FrameRange {
        let (range, _) = range.split_at(limit);
        let mut end = range.start();
        for span in self.extents.spans(range) {
            let Span::Stored(extent) = span else { break };
            let zero = extent.frames.frames().find(|gfn| self.zero.contains(*gfn));
            end = zero.unwrap_or(extent.frames.end());
            if zero.is_some() {
                break;
            }
        }
        FrameRange::between(range.start(), end)
    }
}

impl Layout for ServedImage {
    fn head(&self, range: FrameRange, limit: PageCount) -> (FrameRange, Content) {
        if self.is_stored(range) {
            (self.stored_head(range, limit), Content::Stored)
        } else {
            (self.zero_head(range), Content::Zero)
        }
    }
}

impl MappedFile {
    fn open(path: &Path, length: u64) -> Result<Self, ImageError> {
        let failed = |action| move |source| ImageError::File { action, path: path.to_owned(), source };
        let file = File::open(path).map_err(failed("open"))?;
        match file.try_lock_shared() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(ImageError::Locked { path: path.to_owned() }),
            // Some file systems have no locks; the lock is a courtesy.
            Err(TryLockError::Error(error)) => tracing::debug!(%error, path = %path.display(), "no lock"),
        }
        check_length(&file, path, length)?;
        let size = usize::try_from(length).map_err(|_| failed("map")(io::ErrorKind::FileTooLarge.into()))?;
        let mapping = Mapping::of_file(&file, size).map_err(failed("map"))?;
        Ok(Self { path: path.to_owned(), length, file, mapping })
    }
}

fn check_length(file: &File, path: &Path, indexed: u64) -> Result<(), ImageError> {
    let failed = |source| ImageError::File { action: "look at", path: path.to_owned(), source };
    let found = file.metadata().map_err(failed)?.len();
    if found != indexed {
        return Err(ImageError::Length { path: path.to_owned(), found, indexed });
    }
    Ok(())
}

/// The images in service, shared by the rings and the control plane.
#[derive(Debug, Default)]
pub struct Catalog {
    images: RwLock<BTreeMap<ImageId, Arc<ServedImage>>>,
}

impl Catalog {
    /// The image of that name.
    pub fn find(&self, id: ImageId) -> Option<Arc<ServedImage>> {
        self.images.read().get(&id).cloned()
    }

    /// All of them.
    pub fn list(&self) -> Vec<Arc<ServedImage>> {
        self.images.read().values().cloned().collect()
    }

    /// Puts an image into service.
    ///
    /// # Errors
    /// When one of that name is in service, or too many are.
    pub fn add(&self, image: Arc<ServedImage>) -> Result<(), ImageError> {
        let mut images = self.images.write();
        if images.contains_key(&image.id) {
            return Err(ImageError::Duplicate(image.id));
        }
        if images.len() >= MAX_IMAGES {
            return Err(ImageError::TooMany);
        }
        images.insert(image.id, image);
        Ok(())
    }

    /// Takes an image out of service; sessions that have it must still be told.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn remove(&self, id: ImageId) -> Result<Arc<ServedImage>, ImageError> {
        self.images.write().remove(&id).ok_or(ImageError::Unknown(id))
    }
}
