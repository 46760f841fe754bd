use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::record::records;
use super::stream::{BlockPages, Stream, StreamError};
use super::{ExternalBlock, Layout, LayoutError};
use crate::image::{ImageError, ImageFile, ImageIndex, ImageReader};
use crate::import::{Origin, relative_to};
use crate::vm::{Hypervisor, Identity};
use crate::{Descriptor, FrameSet};

/// The files of a capture.
#[derive(Clone, Debug)]
pub struct SavedFiles {
    /// The migration stream.
    pub stream: PathBuf,
    /// The files behind the RAM blocks that `x-ignore-shared` left out of it.
    pub ram: Vec<RamFile>,
}

/// A file behind a RAM block.
#[derive(Clone, Debug)]
pub struct RamFile {
    /// The block; `None` for the only one that the stream leaves out.
    pub block: Option<String>,
    /// The file.
    pub path: PathBuf,
    /// The offset in bytes of the block in the file.
    pub offset: u64,
}

/// A capture that cannot be imported.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ImportError {
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The stream is malformed, or cannot be forked from.
    #[error("{path} cannot be imported")]
    Stream {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: StreamError,
    },
    /// The stream makes no image.
    #[error("{path} makes no image")]
    Layout {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: LayoutError,
    },
    /// Two files for one block.
    #[error("{path} is a second file for RAM block {block:?}")]
    TwoFiles {
        /// The block.
        block: String,
        /// The second file.
        path: PathBuf,
    },
    /// The pages could not be looked at.
    #[error("cannot look for zero pages")]
    Scan(#[from] ImageError),
    /// A RAM file that belongs to no block, or to one of several.
    #[error("the stream leaves {blocks} RAM blocks out: {path} must be the file behind one of them, as BLOCK=FILE")]
    WhichBlock {
        /// The file.
        path: PathBuf,
        /// How many blocks the stream leaves out.
        blocks: usize,
    },
}

/// Makes a descriptor and an image index of a capture, whose files stay where they are. In the index their paths are relative
/// to `base`, the folder that it will lie in, where they lie below it.
///
/// `scan` finds the zero frames among those given, which QEMU has not told from others; usually it is
/// [`crate::image::zero_frames`].
///
/// # Errors
/// When a file cannot be read or makes no image.
pub fn import(
    files: &SavedFiles,
    origin: Origin,
    base: &Path,
    scan: impl FnOnce(&ImageReader, &FrameSet) -> Result<FrameSet, ImageError>,
) -> Result<(Descriptor, ImageIndex), ImportError> {
    let path = &files.stream;
    let file = open(path)?;
    let stream = Stream::parse(&file).map_err(|source| ImportError::Stream { path: path.clone(), source })?;
    let mut image_files = vec![ImageFile { path: relative_to(path, base), length: stream.length }];
    let mut sources = Vec::with_capacity(files.ram.len());
    for ram in &files.ram {
        let file = open(&ram.path)?;
        let metadata = file.metadata().map_err(|source| ImportError::Read { path: ram.path.clone(), source })?;
        image_files.push(ImageFile { path: relative_to(&ram.path, base), length: metadata.len() });
        sources.push(file);
    }
    let external = external_blocks(&stream, &files.ram, &sources)?;
    let lengths: Vec<u64> = image_files.iter().map(|file| file.length).collect();
    let layout = Layout::new(&stream, &external, &lengths);
    let layout = layout.map_err(|source| ImportError::Layout { path: path.clone(), source })?;
    let index = ImageIndex {
        image: origin.image,
        memory: layout.memory,
        files: image_files,
        extents: layout.extents,
        zero: layout.holes,
    };
    let index = if layout.unscanned.is_empty() {
        index
    } else {
        let reader = ImageReader::new(index, base)?;
        let zero = scan(&reader, &layout.unscanned)?;
        let mut index = reader.into_index();
        index.zero.union_with(&zero);
        index
    };
    let empty = || FrameSet::empty(index.memory.universe());
    let descriptor = Descriptor {
        identity: Identity { machine: stream.machine.clone(), ..origin.identity(Hypervisor::Qemu) },
        memory: index.memory.clone(),
        eager: empty(),
        zero: index.zero.clone(),
        free: empty(),
        prefetch: Vec::new(),
        servers: origin.servers,
        records: records(stream),
    };
    Ok((descriptor, index))
}

fn open(path: &Path) -> Result<File, ImportError> {
    File::open(path).map_err(|source| ImportError::Read { path: path.to_owned(), source })
}

/// The block that a file backs which was given without a name.
fn only_external_block(stream: &Stream, path: &Path) -> Result<String, ImportError> {
    let mut external = stream.blocks.iter().filter(|block| block.pages == BlockPages::External);
    match (external.next(), external.count()) {
        (Some(only), 0) => Ok(only.name.clone()),
        (first, more) => {
            Err(ImportError::WhichBlock { path: path.to_owned(), blocks: more + usize::from(first.is_some()) })
        }
    }
}

fn external_blocks<'f>(
    stream: &Stream,
    ram: &[RamFile],
    sources: &'f [File],
) -> Result<Vec<ExternalBlock<'f>>, ImportError> {
    let mut external: Vec<ExternalBlock<'_>> = Vec::with_capacity(ram.len());
    // File 0 is the stream.
    for ((ram, source), file) in ram.iter().zip(sources).zip(1..) {
        let block = ram.block.clone().map_or_else(|| only_external_block(stream, &ram.path), Ok)?;
        if external.iter().any(|given| given.block == block) {
            return Err(ImportError::TwoFiles { block, path: ram.path.clone() });
        }
        external.push(ExternalBlock { block, source, file, offset: ram.offset });
    }
    Ok(external)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::ImageId;
    use crate::import::qemu::CloneState;
    use crate::import::qemu::stream::testing::{DEVICES, StreamBuilder, sample};
    use crate::{FrameRange, Gfn, PageCount};

    fn origin() -> Origin {
        Origin {
            image: ImageId::from_bytes([7; 16]),
            parent: "parent".into(),
            version: "7.2.22".into(),
            captured: SystemTime::UNIX_EPOCH + Duration::from_secs(5),
            pause: Some(Duration::from_micros(6100)),
            servers: vec![],
        }
    }

    fn range(start: u64, count: u64) -> FrameRange {
        FrameRange::new(Gfn::new(start), PageCount::new(count))
    }

    fn scan(image: &ImageReader, frames: &FrameSet) -> Result<FrameSet, ImageError> {
        crate::image::zero_frames(image, frames, &|_| ())
    }

    #[test]
    fn a_stream_becomes_a_descriptor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("parent.qemu");
        std::fs::write(&path, sample()).unwrap();
        let files = SavedFiles { stream: path, ram: vec![] };
        let (descriptor, index) = import(&files, origin(), folder.path(), scan).unwrap();
        assert_eq!(index.files, [ImageFile { path: "parent.qemu".into(), length: sample().len() as u64 }]);
        assert_eq!((index.image, &index.memory), (descriptor.identity.image, &descriptor.memory));
        assert_eq!(descriptor.zero.runs().collect::<Vec<_>>(), [range(2, 3), range(6, 2)]);
        assert_eq!(descriptor.identity.captured_unix_ns, 5_000_000_000);
        assert_eq!(descriptor.identity.pause_us, Some(6100));
        let state = CloneState::of(&descriptor).unwrap();
        assert_eq!((state.machine, state.ram_section_id), ("pc-i440fx-7.2", 2));
        assert_eq!(state.device_state, DEVICES);
        assert!(state.configuration.starts_with(b"\x05\x1econfiguration/target-page-bits"));
    }

    #[test]
    fn ram_files_are_scanned_for_zeros() {
        let folder = tempfile::tempdir().unwrap();
        let stream = StreamBuilder::new(&["x-ignore-shared"]).ram_start(3).block("pc.ram", 3).be64(0);
        let path = folder.path().join("state");
        std::fs::write(&path, stream.end_of_section().devices().bytes).unwrap();
        let ram = RamFile { block: None, path: folder.path().join("ram"), offset: 0 };
        std::fs::write(&ram.path, [[1; 4096], [0; 4096], [2; 4096]].as_flattened()).unwrap();
        let files = SavedFiles { stream: path, ram: vec![ram.clone()] };
        let (descriptor, index) = import(&files, origin(), folder.path(), scan).unwrap();
        assert_eq!(descriptor.zero.runs().collect::<Vec<_>>(), [range(1, 1)]);
        assert_eq!(index.extents.extents().len(), 1);
        let files = SavedFiles { ram: vec![ram.clone(), ram], ..files };
        assert!(matches!(import(&files, origin(), folder.path(), scan), Err(ImportError::TwoFiles { .. })));
    }
}
