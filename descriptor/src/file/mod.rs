//! The files: descriptors (`NAME.snow`), image indices (`NAME.snowidx`) and working sets (`NAME.snowws`), one format for all.
//!
//! ```text
//! byte  length
//!    0       8  preamble: "SNOW", kind of file u16 (1 descriptor, 2 image index, 3 working set), major u8, minor u8
//!    8      16  header: length of the whole file u64, number of sections u32, zero u32
//!   24   40 ×n  section table, in ascending order of section numbers:
//!                 number u32, flags u32 (1 required, 2 lz4), stored length u64, plain length u64, checksum [16]
//!    …          the sections' stored bytes, back to back in the order of the table
//!  end      16  checksum of everything before it
//! ```
//!
//! Everything is little-endian. A checksum is the first 128 bits of BLAKE3. One of them also vouches for the contents to
//! whoever learnt it over a trusted path, which a CRC cannot; on a file of some 100 KB it costs well under a millisecond.
//! A section's checksum covers its stored bytes, so that nothing is decompressed that is not what was written.
//!
//! | section | no. | in | contents: entries without padding up to the end of the section |
//! |---|---|---|---|
//! | `identity` | 1 | descriptor | image id `[16]`, capture time in ns since 1970 u64, pause in µs u64, hypervisor u16, flags u16 (1: pause known), lengths of the texts 3 × u16, zero `[6]`; the texts: parent, hypervisor's version, machine type |
//! | `memory` | 2 | both | regions: first frame u64, frames u64, kind u8 (0 RAM, 1 ROM), page size u8 (0 4 KiB, 1 2 MiB), length of the name u8, zero u8; the name |
//! | `records` | 3 | descriptor | hypervisor records: length of the data u64, length of the name u16, zero `[6]`; the name; the data |
//! | `eager` | 4 | descriptor | a frame set: LEB128 lengths of gap, run, gap, run … |
//! | `zero` | 5 | both | a frame set |
//! | `free` | 6 | descriptor | a frame set |
//! | `prefetch` | 7 | descriptor | runs, LEB128: first frame relative to the end of the run before (signed), frames |
//! | `servers` | 8 | descriptor | endpoints: length u16; the text |
//! | `image` | 16 | index, working set | image id `[16]` |
//! | `files` | 17 | index | files: length u64, length of the path u16, zero `[6]`; the path |
//! | `extents` | 18 | index | extents, LEB128: frames since the end of the extent before, frames, file, offset relative to the end of the extent before (signed, modulo 2^64), stride − 4096 |
//! | `needed` | 19 | working set | LEB128: frames of the image, clones heard; then entries in the order of need: first frame relative to the end of the entry before (signed, LEB128), frames u8, clones that needed them u8, clones that were asked u8 |
//!
//! Signed numbers are zigzag-coded. `identity`, `memory`, `image`, `files` and `needed` are always there in their files; any other section may be left out
//! and is then empty. A section is compressed (lz4, block format) where that saves a sixteenth of it or more.
//!
//! # Versions
//! The preamble keeps its form for ever. Within a major version a section keeps its form too: what is new goes into a new section,
//! and raises the minor version. Readers skip a section they do not know, unless it is flagged as required; then they
//! refuse the file and name the section. Anything else raises the major version, and readers refuse other majors.
//!
//! # Bounds
//! Nothing in a file is a count that has to be believed: lists go on to the end of their section. Contents can be larger than
//! what is stored only by lz4, where the plain length is bounded by [`MAX_EXPANSION`] and [`MAX_COMPRESSED`].

mod container;
mod descriptor;
mod disk;
mod error;
mod index;
mod parts;
mod section;
#[cfg(test)]
mod tests;
mod wire;
mod working_set;

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};

pub use container::{Container, MAX_COMPRESSED, MAX_EXPANSION, SectionEntry};
pub(crate) use disk::read_bytes;
pub use error::{ContentError, FileError, FormatError};

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A [`Descriptor`](crate::Descriptor): what a clone needs to begin.
    Descriptor,
    /// An [`ImageIndex`](crate::image::ImageIndex): what a page server needs.
    ImageIndex,
    /// A [`Merged`](crate::working_set::Merged) working set: what clones of the image needed.
    WorkingSet,
}

/// The version of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// Readers refuse another one.
    pub major: u8,
    /// Tells of additional sections.
    pub minor: u8,
}

/// The number of a section.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SectionKind(u32);

impl FileKind {
    const ALL: [FileKind; 3] = [FileKind::Descriptor, FileKind::ImageIndex, FileKind::WorkingSet];

    /// The customary end of the file's name, without the dot.
    pub const fn extension(self) -> &'static str {
        match self {
            FileKind::Descriptor => "snow",
            FileKind::ImageIndex => "snowidx",
            FileKind::WorkingSet => "snowws",
        }
    }

    /// The path of the file of this kind among those called `name`: `NAME.snow`, `NAME.snowidx` or `NAME.snowws`. Any of these is
    /// taken as `name` too.
    pub fn path(self, name: &Path) -> PathBuf {
        let extensions = Self::ALL.map(FileKind::extension);
        let mut path = match name.extension().and_then(OsStr::to_str) {
            Some(extension) if extensions.contains(&extension) => name.with_extension(""),
            _ => name.to_owned(),
        };
        path.as_mut_os_string().push(".");
        path.as_mut_os_string().push(self.extension());
        path
    }

    const fn number(self) -> u16 {
        match self {
            FileKind::Descriptor => 1,
            FileKind::ImageIndex => 2,
            FileKind::WorkingSet => 3,
        }
    }

    /// The sections that this version knows in such a file.
    const fn sections(self) -> &'static [SectionKind] {
        use SectionKind as S;
        match self {
            FileKind::Descriptor => {
                &[S::IDENTITY, S::MEMORY, S::RECORDS, S::EAGER, S::ZERO, S::FREE, S::PREFETCH, S::SERVERS]
            }
            FileKind::ImageIndex => &[S::MEMORY, S::ZERO, S::IMAGE, S::FILES, S::EXTENTS],
            FileKind::WorkingSet => &[S::IMAGE, S::NEEDED],
        }
    }
}

impl Version {
    /// What this program writes.
    pub const OURS: Version = Version { major: 1, minor: 0 };
}

impl SectionKind {
    /// What was captured, when, and how.
    pub const IDENTITY: Self = Self(1);
    /// The memory map.
    pub const MEMORY: Self = Self(2);
    /// The hypervisor's records.
    pub const RECORDS: Self = Self(3);
    /// The set of eager frames.
    pub const EAGER: Self = Self(4);
    /// The set of zero frames.
    pub const ZERO: Self = Self(5);
    /// The set of free frames.
    pub const FREE: Self = Self(6);
    /// The prefetch order.
    pub const PREFETCH: Self = Self(7);
    /// The page servers.
    pub const SERVERS: Self = Self(8);
    /// The image's name in an index or a working set.
    pub const IMAGE: Self = Self(16);
    /// The image's files.
    pub const FILES: Self = Self(17);
    /// The extent table.
    pub const EXTENTS: Self = Self(18);
    /// What clones needed.
    pub const NEEDED: Self = Self(19);

    /// The number in the section table.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The section's name; `None` when this version does not know it.
    pub const fn name(self) -> Option<&'static str> {
        Some(match self {
            Self::IDENTITY => "identity",
            Self::MEMORY => "memory",
            Self::RECORDS => "records",
            Self::EAGER => "eager",
            Self::ZERO => "zero",
            Self::FREE => "free",
            Self::PREFETCH => "prefetch",
            Self::SERVERS => "servers",
            Self::IMAGE => "image",
            Self::FILES => "files",
            Self::EXTENTS => "extents",
            Self::NEEDED => "needed",
            _ => return None,
        })
    }
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FileKind::Descriptor => "a descriptor (.snow)",
            FileKind::ImageIndex => "an image index (.snowidx)",
            FileKind::WorkingSet => "a working set (.snowws)",
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl fmt::Display for SectionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "number {}", self.0),
        }
    }
}

impl fmt::Debug for SectionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SectionKind({self})")
    }
}
