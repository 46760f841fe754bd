//! What the clones of an image needed: learnt from what they tell, told to those that come later, kept beside the image.
//!
//! ```text
//!   ring ── joined, touched, left ──▶ inbox ──▶ keeper ── merged ──▶ NAME.snowws
//!     ▲                                           │
//!     └────────── order ──────────────────────────┘
//! ```
//!
//! The rings hand on what sessions say and read a finished order; all work on the sets, and all waiting for the disk, is the
//! keeper's, a thread of its own.

mod inbox;
mod keeper;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use descriptor::file::{FileError, FileKind, FormatError};
use descriptor::working_set::{Merged, Order, Summary, WorkingSet};
use descriptor::{FrameRange, ImageId, PageCount, Report};
use parking_lot::Mutex;
use thiserror::Error;

pub(crate) use keeper::{Keeper, KeeperHandle};

/// The working sets of one image's clones.
#[derive(Debug)]
pub(crate) struct ImageSet {
    frames: PageCount,
    merged: Mutex<Merged>,
    order: Mutex<Arc<Order>>,
    /// What clones of a multicast channel wait for, at once: they run in near lockstep, so that what one waits for the others will
    /// within the second that passes until it is told.
    live: Mutex<WorkingSet>,
    /// Where it is kept; `None` to keep it in memory only.
    file: Option<PathBuf>,
    /// What is known is not in the file yet.
    unsaved: AtomicBool,
    /// Held while the file is written.
    writing: Mutex<()>,
    /// The image is no longer served, and the file no longer this set's.
    retired: AtomicBool,
    complained: AtomicBool,
}

/// A working set that cannot take the place of the one there is.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The bytes are no working set.
    #[error("this is no working set")]
    Format(#[from] FormatError),
    /// It is of another image.
    #[error("this is the working set of image {found}, which has {found_frames} frames, not of {image} with {frames}")]
    OtherImage {
        /// Its image.
        found: ImageId,
        /// Frames of its image.
        found_frames: PageCount,
        /// The image that it was to be for.
        image: ImageId,
        /// Frames of that.
        frames: PageCount,
    },
}

impl ImageSet {
    /// Nothing of an image, and no file.
    pub(crate) fn new(image: ImageId, frames: PageCount) -> Self {
        Self {
            frames,
            merged: Mutex::new(Merged::new(image, frames)),
            order: Mutex::new(Arc::new(Order::empty(frames))),
            live: Mutex::new(WorkingSet::new(frames)),
            file: None,
            unsaved: AtomicBool::new(false),
            writing: Mutex::new(()),
            retired: AtomicBool::new(false),
            complained: AtomicBool::new(false),
        }
    }

    /// What is known of an image, whose index is at `index`. Where the file beside it cannot be used, that is said, and the image
    /// is served without.
    pub(crate) fn load(image: ImageId, frames: PageCount, index: &Path) -> Self {
        let path = FileKind::WorkingSet.path(index);
        let (known, file) = match Merged::read(&path) {
            Ok(set) if (set.image(), set.frames()) == (image, frames) => (Some(set), Some(path)),
            Ok(set) => {
                tracing::warn!(path = %path.display(), of = %set.image(), "a working set of another image is not used, and will be replaced");
                (None, Some(path))
            }
            Err(FileError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => (None, Some(path)),
            Err(error @ FileError::Format { source: FormatError::Version { .. }, .. }) => {
                tracing::warn!(error = %Report(&error), "the working set is not used and left alone; what clones need is kept in memory only");
                (None, None)
            }
            Err(error @ FileError::Format { .. }) => {
                tracing::warn!(error = %Report(&error), "the working set is not used; what clones need is learnt anew, and will replace it");
                (None, Some(path))
            }
            Err(error) => {
                tracing::warn!(error = %Report(&error), "the working set cannot be read; what clones need is kept in memory only");
                (None, None)
            }
        };
        let set = Self { file, ..Self::new(image, frames) };
        if let Some(known) = known {
            let summary = known.summary();
            tracing::info!(%image, clones = summary.heard, frames = summary.common, "working set");
            *set.order.lock() = Arc::new(known.order());
            *set.merged.lock() = known;
        }
        set
    }

    /// The frames of the image, one more than its highest.
    pub(crate) fn frames(&self) -> PageCount {
        self.frames
    }

    /// What a clone that comes now is told.
    pub(crate) fn order(&self) -> Arc<Order> {
        Arc::clone(&self.order.lock())
    }

    /// In what order a channel's pages are best sent, to clones old and new.
    pub(crate) fn channel_order(&self) -> Vec<FrameRange> {
        let mut order = self.order().runs();
        order.extend(self.live.lock().order());
        order
    }

    /// Takes note of what a clone of the channel waits for.
    pub(crate) fn note(&self, ranges: impl Iterator<Item = FrameRange>) {
        let mut live = self.live.lock();
        ranges.for_each(|range| live.note(range));
    }

    /// What is known, in numbers.
    pub(crate) fn summary(&self) -> Summary {
        self.merged.lock().summary()
    }

    /// Where it is kept, if it is.
    pub(crate) fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// What is known, as a file's bytes.
    pub(crate) fn export(&self) -> Vec<u8> {
        self.merged.lock().encode()
    }

    /// Puts a file's working set in the place of what is known.
    ///
    /// # Errors
    /// When the bytes are none of this image.
    pub(crate) fn import(&self, bytes: &[u8]) -> Result<(), ImportError> {
        let set = Merged::decode(bytes)?;
        let mut merged = self.merged.lock();
        let (found, found_frames) = (set.image(), set.frames());
        let (image, frames) = (merged.image(), merged.frames());
        if (found, found_frames) != (image, frames) {
            return Err(ImportError::OtherImage { found, found_frames, image, frames });
        }
        *merged = set;
        *self.order.lock() = Arc::new(merged.order());
        self.unsaved.store(true, Relaxed);
        Ok(())
    }

    /// Lets what is known become what is told.
    fn publish(&self) {
        let order = Arc::new(self.merged.lock().order());
        *self.order.lock() = order;
        self.unsaved.store(true, Relaxed);
    }

    /// Writes what is known to the file, if anything of it is new; false when that failed, so that it is worth another try.
    fn save(&self) -> bool {
        let Some(path) = &self.file else { return true };
        let _writing = self.writing.lock();
        if self.retired.load(Relaxed) || !self.unsaved.swap(false, Relaxed) {
            return true;
        }
        let set = self.merged.lock().clone();
        let written = set.write(path);
        self.unsaved.fetch_or(written.is_err(), Relaxed);
        let complained = self.complained.swap(written.is_err(), Relaxed);
        if let Err(error) = &written
            && !complained
        {
            tracing::warn!(error = %Report(error), "the working set cannot be kept beside the image; it stays in memory until it can");
        }
        written.is_ok()
    }

    /// Writes what is known a last time, as the image goes out of service: the file may be removed or replaced then, or be that of
    /// the same image when it comes into service again.
    pub(crate) fn retire(&self) {
        self.save();
        // A write that has begun meanwhile is waited for.
        let _writing = self.writing.lock();
        self.retired.store(true, Relaxed);
    }

    /// Leaves the file alone from now on, as the image's files are no longer what they were. A write under way is not waited for.
    pub(crate) fn abandon(&self) {
        self.retired.store(true, Relaxed);
    }
}

#[cfg(test)]
mod tests;
