//! What a command can fail of.

use std::io;
use std::path::PathBuf;

use descriptor::ImageId;
use descriptor::file::{FileError, FormatError};
use descriptor::image::ImageError;
use descriptor::import::qemu::ImportError;
use descriptor::import::qemu::capture::CaptureError;
use descriptor::import::raw::RawError;
use descriptor::import::xen;
use thiserror::Error;

use crate::qemu::template::TemplateError;
use crate::supervise::{RunDirError, SuperviseError};
use crate::xl::XlError;

/// A command that did not do its work.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ToolError {
    /// No directory for the run.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// A child failed, or a signal came.
    #[error(transparent)]
    Supervise(#[from] SuperviseError),
    /// The template of a clone is none.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The parent cannot be captured.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The capture cannot be made an image.
    #[error("the parent was captured, and goes on")]
    Import(#[from] ImportError),
    /// A domain cannot be captured or cloned.
    #[error(transparent)]
    Xl(#[from] XlError),
    /// The captured stream cannot be made an image.
    #[error("the parent was captured, and goes on")]
    XenImport(#[from] xen::ImportError),
    /// The pages of a capture cannot be looked at.
    #[error("the parent was captured, and goes on")]
    Image(#[from] ImageError),
    /// A file of an earlier capture is in the way.
    #[error("{} is there already; --force replaces it", .0.display())]
    Exists(PathBuf),
    /// A descriptor or an index cannot be written.
    #[error(transparent)]
    Descriptor(#[from] FileError),
    /// The demonstration's image cannot be imported.
    #[error(transparent)]
    Raw(#[from] RawError),
    /// A page of a clone does not equal the image's.
    #[error("a page of a clone was wrong")]
    NotVerified,
    /// A memserver does not do what it was asked for.
    #[error(transparent)]
    Memserver(#[from] memserver::client::AdminError),
    /// What a memserver sent is no working set.
    #[error("memserver's working set cannot be used")]
    WorkingSet(#[source] FormatError),
    /// No clone has told what it needs.
    #[error("there is no {}: a memserver writes it when clones of its image have told what they need", .0.display())]
    NoWorkingSet(PathBuf),
    /// A memserver has no image, or several.
    #[error("which image? Give --image; the server has {}", list(.0))]
    WhichImage(Vec<ImageId>),
    /// Something about a file failed.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// What was tried, such as `write`.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel refused something that every process may have.
    #[error("cannot {0}")]
    Kernel(&'static str, #[source] io::Error),
}

impl ToolError {
    /// For `map_err` of what is tried on a file.
    pub(crate) fn file(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| ToolError::File { operation, path, source }
    }

    /// The exit code for it: 128 and the number where a signal ended the work, 2 where the command line is wrong, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            ToolError::Supervise(SuperviseError::Interrupted(signal)) => u8::try_from(128 + signal).unwrap_or(1),
            ToolError::Template(_) => 2,
            _ => 1,
        }
    }
}

fn list(images: &[ImageId]) -> String {
    match images {
        [] => "none".to_owned(),
        images => images.iter().map(ImageId::to_string).collect::<Vec<_>>().join(", "),
    }
}
