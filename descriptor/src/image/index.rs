use std::path::PathBuf;

use super::ExtentTable;
use crate::memory::MemoryMap;
use crate::{FrameSet, ImageId};

/// A file that holds pages of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFile {
    /// Where it lies; a relative path counts from the folder of the index.
    pub path: PathBuf,
    /// Its length in bytes. A file of another length is not the one that was indexed.
    pub length: u64,
}

/// What a page server needs to serve an image in place; it stays with the image's files on the parent's host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageIndex {
    /// The image's name.
    pub image: ImageId,
    /// The regions of the image.
    pub memory: MemoryMap,
    /// The files, as [`super::Extent::file`] numbers them.
    pub files: Vec<ImageFile>,
    /// Where the pages lie.
    pub extents: ExtentTable,
    /// The frames of the memory map that hold nothing but zeros, whether stored or not.
    pub zero: FrameSet,
}
