use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::guest::Config;
use super::record::records;
use super::stream::{FileInput, Spool, Stream, StreamError};
use super::{Layout, LayoutError, time_info};
use crate::image::{ImageError, ImageFile, ImageIndex, ImageReader};
use crate::import::{Origin, relative_to};
use crate::memory::RegionKind;
use crate::vm::{Hypervisor, Identity};
use crate::{Descriptor, FrameSet};

/// A stream that became an image.
#[derive(Clone, Debug)]
pub struct Imported {
    /// What a clone needs to begin.
    pub descriptor: Descriptor,
    /// What the page server needs.
    pub index: ImageIndex,
    /// The guest's virtual processors.
    pub vcpus: u32,
    /// The clocks that were found, of which each processor of a guest that knows of Xen has one; their pages are eager.
    pub clocks: u64,
}

/// A stream that cannot be imported.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The file could not be read.
    #[error("cannot read {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file that is to keep the stream could not be made.
    #[error("cannot create {path}", path = path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The stream is malformed, or cannot be forked from.
    #[error("{path} cannot be imported", path = path.display())]
    Stream {
        /// The file that holds it, or was to hold it.
        path: PathBuf,
        /// Why not.
        source: StreamError,
    },
    /// The stream makes no image.
    #[error("{path} makes no image", path = path.display())]
    Layout {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: LayoutError,
    },
    /// The pages could not be looked at.
    #[error("cannot look at the pages")]
    Scan(#[from] ImageError),
}

/// Reads the stream in the regular file at `path`, but for its pages.
///
/// # Errors
/// When the file cannot be read, or holds something else.
pub fn read(path: &Path) -> Result<Stream, ImportError> {
    let input = File::open(path).and_then(FileInput::new);
    let mut input = input.map_err(|source| ImportError::Read { path: path.to_owned(), source })?;
    Stream::parse(&mut input).map_err(|source| ImportError::Stream { path: path.to_owned(), source })
}

/// Keeps the stream that comes from `reader` in the file at `path`, which is replaced when all of it is there, and only its owner
/// may read. `reader` is read to the end of the stream and not beyond, so that an `xl migrate` can be answered then.
///
/// # Errors
/// When the stream cannot be read or kept, or is something else; then there is no new file.
pub fn spool(reader: &mut impl Read, path: &Path) -> Result<Stream, ImportError> {
    let failed = |source| ImportError::Create { path: path.to_owned(), source };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::Builder::new().prefix(".snow-").tempfile_in(folder).map_err(failed)?;
    let mut input = Spool::new(reader, file.as_file());
    let stream = Stream::parse(&mut input).map_err(|source| ImportError::Stream { path: path.to_owned(), source })?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(stream)
}

/// Makes a descriptor and an image index of the `stream` in the file at `path`, which stays where it is. In the index its path is
/// relative to `base`, the folder that it will lie in, where it lies below it.
///
/// `scan` finds the zero frames among those given; usually it is [`crate::image::zero_frames`].
///
/// # Errors
/// When the file cannot be read or makes no image.
pub fn import(
    path: &Path,
    stream: Stream,
    origin: Origin,
    base: &Path,
    scan: impl FnOnce(&ImageReader, &FrameSet) -> Result<FrameSet, ImageError>,
) -> Result<Imported, ImportError> {
    let failed = |source| ImportError::Read { path: path.to_owned(), source };
    let length = std::fs::metadata(path).map_err(failed)?.len();
    let layout = Layout::new(&stream).map_err(|source| ImportError::Layout { path: path.to_owned(), source })?;
    let index = ImageIndex {
        image: origin.image,
        memory: layout.memory.clone(),
        files: vec![ImageFile { path: relative_to(path, base), length }],
        extents: layout.extents.clone(),
        zero: layout.holes.clone(),
    };
    let reader = ImageReader::new(index, base)?;
    let mut stored = layout.memory.present();
    stored.subtract(&layout.holes);
    let zero = scan(&reader, &stored)?;
    let (eager, clocks) = match stream.tsc_khz {
        Some(tsc_khz) => {
            let mut data = stored;
            data.subtract(&zero);
            let roms = layout.memory.regions().iter().filter(|region| region.kind == RegionKind::Rom);
            roms.for_each(|region| _ = data.remove_range(region.frames));
            time_info::find(&reader, &data, tsc_khz)?
        }
        None => (FrameSet::empty(layout.memory.universe()), 0),
    };
    let (identity, vcpus) = (identity(&stream, &origin), stream.vcpus);
    let records = records(stream, &layout, &reader)?;
    let mut index = reader.into_index();
    index.zero.union_with(&zero);
    let descriptor = Descriptor {
        identity,
        memory: index.memory.clone(),
        eager,
        zero: index.zero.clone(),
        free: FrameSet::empty(index.memory.universe()),
        prefetch: Vec::new(),
        servers: origin.servers,
        records,
    };
    Ok(Imported { descriptor, index, vcpus, clocks })
}

fn identity(stream: &Stream, origin: &Origin) -> Identity {
    let config = Config::of(stream);
    let known = origin.identity(Hypervisor::Xen);
    Identity {
        parent: shortened(if known.parent.is_empty() { config.name } else { known.parent }),
        hypervisor_version: format!("{}.{}", stream.xen.0, stream.xen.1),
        machine: shortened(config.kind),
        ..known
    }
}

/// As much of `text` as a descriptor takes.
fn shortened(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(Descriptor::MAX_TEXT));
    text
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::import::xen::stream::testing::{CONFIG, StreamBuilder, sample};
    use crate::import::xen::time_info::tests::{clock, scale};
    use crate::import::xen::{RecordError, hole_stream, with_config};
    use crate::{FrameRange, Gfn, ImageId, PageCount};

    fn origin() -> Origin {
        Origin {
            image: ImageId::from_bytes([7; 16]),
            parent: String::new(),
            version: String::new(),
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

    fn imported(folder: &Path, bytes: &[u8]) -> Imported {
        let path = folder.join("parent.xen");
        std::fs::write(&path, bytes).unwrap();
        let imported = import(&path, read(&path).unwrap(), origin(), folder, scan).unwrap();
        assert_eq!((imported.descriptor.check(), imported.index.check()), (Ok(()), Ok(())));
        imported
    }

    #[test]
    fn a_stream_becomes_a_descriptor() {
        let folder = tempfile::tempdir().unwrap();
        let Imported { descriptor, index, vcpus, clocks } = imported(folder.path(), &sample());
        assert_eq!(index.files, [ImageFile { path: "parent.xen".into(), length: sample().len() as u64 }]);
        assert_eq!((index.image, &index.memory), (descriptor.identity.image, &descriptor.memory));
        assert_eq!(descriptor.zero.runs().collect::<Vec<_>>(), [range(6, 1), range(0xfeffc, 1)]);
        let identity = &descriptor.identity;
        let words = [&identity.parent, &identity.hypervisor_version, &identity.machine].map(String::as_str);
        assert_eq!(words, ["lin", "4.17", "pvh"]);
        assert_eq!((identity.captured_unix_ns, identity.pause_us), (5_000_000_000, Some(6100)));
        assert_eq!((vcpus, clocks), (2, 0));
        let names: Vec<&str> = descriptor.records.iter().map(|record| record.name.as_str()).collect();
        let expected = "xl/header libxl/header libxl/LIBXC_CONTEXT libxc/header libxc/X86_CPUID_POLICY libxc/X86_MSR_POLICY \
                        libxc/STATIC_DATA_END libxc/PAGE_DATA libxc/X86_TSC_INFO libxc/HVM_CONTEXT libxc/HVM_PARAMS libxc/END \
                        libxl/END";
        assert_eq!(names, expected.split_whitespace().collect::<Vec<_>>());
    }

    #[test]
    fn a_clones_stream_brings_the_special_pages_and_no_memory() {
        let folder = tempfile::tempdir().unwrap();
        let imported = imported(folder.path(), &sample());
        let hole = hole_stream(&imported.descriptor).unwrap();
        let special = [(0xfc000, Some(0xe0)), (0xfc001, Some(0xe1)), (0xfeffc, Some(0))];
        let params = [(1, 0xfeffc), (17, 0xfefff)];
        let expected = StreamBuilder::new(CONFIG).page_data(&special).state(2, &params).end().bytes;
        assert_eq!(hole, expected);

        let renamed = with_config(&hole, r#"{"c_info": {"name": "clone"}}"#).unwrap();
        let other = Stream::parse(&mut renamed.as_slice()).unwrap();
        assert_eq!(other.config.as_deref(), Some(r#"{"c_info": {"name": "clone"}}"#));
        assert_eq!(with_config(&renamed, CONFIG).unwrap(), hole);
        assert!(with_config(&hole[..100], CONFIG).is_err());

        let refused = |change: &dyn Fn(&mut Descriptor)| {
            let mut descriptor = imported.descriptor.clone();
            change(&mut descriptor);
            hole_stream(&descriptor).unwrap_err()
        };
        let other = refused(&|descriptor| descriptor.identity.hypervisor = Hypervisor::Qemu);
        assert!(matches!(other, RecordError::NotXen(Hypervisor::Qemu)));
        let fewer = refused(&|descriptor| _ = descriptor.records.remove(7));
        assert!(matches!(fewer, RecordError::Stream(StreamError::NoPages { .. })), "{fewer:?}");
        let longer = refused(&|descriptor| descriptor.records.extend(descriptor.records.clone()));
        assert!(matches!(longer, RecordError::Trailing(length) if length == hole.len() as u64));
        let strange = refused(&|descriptor| {
            let pages = StreamBuilder::default().page_data(&[(0xfc001, Some(1))]);
            descriptor.records[7].data = pages.bytes;
        });
        assert!(matches!(strange, RecordError::Pages));
    }

    #[test]
    fn pages_with_clocks_are_eager() {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = sample();
        let (factor, shift) = scale(2_100_016);
        // Frame 7 was stored once, frame 1 twice; only its second copy counts.
        for (fill, at) in [(0xa7, 32), (0xa1, 64), (0xb1, 4000)] {
            let page = bytes.windows(4096).position(|page| page == [fill; 4096]).unwrap();
            bytes[page + at..][..32].copy_from_slice(&clock(4, factor, shift));
        }
        let imported = imported(folder.path(), &bytes);
        assert_eq!(imported.clocks, 2);
        assert_eq!(imported.descriptor.eager.runs().collect::<Vec<_>>(), [range(1, 1), range(7, 1)]);
    }

    /// Gives a little at a time, and fails when it is read after its end.
    struct Drip<'b>(&'b [u8]);

    impl Read for Drip<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            assert!(!self.0.is_empty(), "the sender of a stream may wait for an answer when it is over");
            let count = buffer.len().min(1000);
            self.0.read(&mut buffer[..count])
        }
    }

    #[test]
    fn a_pipe_is_kept_up_to_the_end_of_the_stream() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("parent.xen");
        let stream = spool(&mut Drip(&sample()), &path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), sample());
        assert_eq!(stream, read(&path).unwrap());
        let other = folder.path().join("other.xen");
        let cut = spool(&mut &sample()[..20_000], &other).unwrap_err();
        assert!(matches!(cut, ImportError::Stream { source: StreamError::Truncated { .. }, .. }), "{cut:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left of it");
        assert!(matches!(spool(&mut Drip(&sample()), &folder.path().join("none/x")), Err(ImportError::Create { .. })));
    }
}
