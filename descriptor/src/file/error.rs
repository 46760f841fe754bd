use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::{FileKind, SectionKind, Version};
use crate::image::ExtentError;
use crate::memory::MemoryMapError;
use crate::working_set::MergedError;
use crate::{FrameRange, FrameSetError, ParseEndpointError};

/// A file that cannot be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FileError {
    /// The operating system refused.
    #[error("cannot {action} {path}", path = path.display())]
    Io {
        /// What was to be done.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A folder, a pipe or a device.
    #[error("{path} is not a regular file", path = .0.display())]
    NotRegular(PathBuf),
    /// The bytes are no such file.
    #[error("cannot use {path}", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: FormatError,
    },
    /// What was to be written breaks the rules of the format.
    #[error("{path} is not written", path = path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// The rule.
        source: ContentError,
    },
}

/// Bytes that are no descriptor or image index.
///
/// Offsets count bytes from the beginning of the file, or of the section's contents (after decompression) where a section is
/// named.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FormatError {
    /// Another kind of file altogether.
    #[error("not a SnowFlock file (it begins with {0:02x?}, not with \"SNOW\")")]
    Magic([u8; 4]),
    /// A format of another major version.
    #[error("format version {file}, but this program reads {ours}: use a matching release")]
    Version {
        /// The file's version.
        file: Version,
        /// This program's version.
        ours: Version,
    },
    /// A SnowFlock file, but not the kind that was expected.
    #[error("this is {found}, not {expected}")]
    WrongKind {
        /// What the file is.
        found: FileKind,
        /// What it should have been.
        expected: FileKind,
    },
    /// A kind of file that this version does not know.
    #[error("a SnowFlock file of unknown kind {0}")]
    UnknownKind(u16),
    /// Bytes are missing.
    #[error("truncated: {field} at byte {offset} needs {needed} bytes, {left} are left")]
    Truncated {
        /// What should stand there.
        field: &'static str,
        /// Where it begins.
        offset: u64,
        /// Its length in bytes.
        needed: u64,
        /// The bytes that there are.
        left: u64,
    },
    /// The file is shorter or longer than its header says.
    #[error("the file has {actual} bytes, but its header says {stated}: it was cut short or something was appended")]
    Length {
        /// What the header says.
        stated: u64,
        /// The file's length.
        actual: u64,
    },
    /// A field outside the sections with a value that the format does not allow.
    #[error("{field} at byte {offset} is {value}, which the format does not allow")]
    Header {
        /// The field.
        field: &'static str,
        /// Where it stands.
        offset: u64,
        /// Its value.
        value: u64,
    },
    /// A section that stands twice in the section table.
    #[error("section {section} stands a second time in the table, at byte {offset}")]
    Duplicate {
        /// The section.
        section: SectionKind,
        /// Where the second entry stands.
        offset: u64,
    },
    /// A section that should stand before the one that precedes it.
    #[error("section {section} at byte {offset} of the table stands after section {previous}")]
    Order {
        /// The section.
        section: SectionKind,
        /// Its predecessor.
        previous: SectionKind,
        /// Where its entry stands.
        offset: u64,
    },
    /// A section without which the file cannot be understood.
    #[error(
        "section {section} (entry at byte {offset}) is required, but this program does not know it: use a newer release"
    )]
    UnknownRequired {
        /// The section.
        section: SectionKind,
        /// Where its entry stands.
        offset: u64,
    },
    /// A section that every file of the kind has.
    #[error("section {0} is missing")]
    Missing(SectionKind),
    /// Bytes that were changed.
    #[error("section {section} at byte {offset} is damaged: its checksum does not match")]
    SectionChecksum {
        /// The section.
        section: SectionKind,
        /// Where it begins.
        offset: u64,
    },
    /// Bytes outside the sections that were changed.
    #[error("the file's header or section table is damaged: the checksum of the whole at byte {offset} does not match")]
    FileChecksum {
        /// Where the checksum stands.
        offset: u64,
    },
    /// Compressed contents with an impossible length.
    #[error("section {section} claims that {stored} compressed bytes hold {plain}, more than lz4 or this format can")]
    Expansion {
        /// The section.
        section: SectionKind,
        /// Its length in the file.
        stored: u64,
        /// Its length after decompression.
        plain: u64,
    },
    /// Contents that cannot be decompressed.
    #[error("section {section} does not decompress: {reason}")]
    Lz4 {
        /// The section.
        section: SectionKind,
        /// What is wrong.
        reason: String,
    },
    /// Contents that end too early.
    #[error("section {section} ends within {field} at byte {offset}")]
    SectionTruncated {
        /// The section.
        section: SectionKind,
        /// What should stand there.
        field: &'static str,
        /// Where it begins.
        offset: u64,
    },
    /// A field with a value that the format does not allow.
    #[error("section {section}: {field} at byte {offset} is {value}, which the format does not allow")]
    Field {
        /// The section.
        section: SectionKind,
        /// The field.
        field: &'static str,
        /// Where it stands.
        offset: u64,
        /// Its value.
        value: u64,
    },
    /// A number of more than 64 bits, or one that is not in its shortest form.
    #[error("section {section}: {field} at byte {offset} is no proper LEB128 number")]
    Number {
        /// The section.
        section: SectionKind,
        /// The field.
        field: &'static str,
        /// Where it begins.
        offset: u64,
    },
    /// A text that is not UTF-8.
    #[error("section {section}: {field} at byte {offset} is not UTF-8")]
    Text {
        /// The section.
        section: SectionKind,
        /// The field.
        field: &'static str,
        /// Where it stands.
        offset: u64,
    },
    /// Contents that go on too long.
    #[error("section {section} has {count} bytes too many at byte {offset}")]
    Trailing {
        /// The section.
        section: SectionKind,
        /// Where they begin.
        offset: u64,
        /// How many they are.
        count: u64,
    },
    /// A frame set that cannot be decoded.
    #[error("section {section} holds no frame set of this memory map")]
    FrameSet {
        /// The section.
        section: SectionKind,
        /// What is wrong.
        source: FrameSetError,
    },
    /// An endpoint that is none.
    #[error("section {section} has no endpoint at byte {offset}")]
    Endpoint {
        /// The section.
        section: SectionKind,
        /// Where its text begins.
        offset: u64,
        /// What is wrong.
        source: ParseEndpointError,
    },
    /// Regions that make no memory map.
    #[error("section memory holds no memory map")]
    Memory(#[from] MemoryMapError),
    /// Extents that make no table.
    #[error("section extents holds no extent table")]
    Extents(#[from] ExtentError),
    /// Entries that make no working set.
    #[error("section needed holds no working set")]
    WorkingSet(#[from] MergedError),
    /// Well-formed sections that do not fit together.
    #[error(transparent)]
    Content(#[from] ContentError),
}

/// A descriptor or image index whose parts do not fit together.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ContentError {
    /// A frame set with another universe than the memory map's.
    #[error("the {set} set is over {universe} frames, the memory map over {map}")]
    Universe {
        /// The set.
        set: &'static str,
        /// Its universe.
        universe: u64,
        /// The memory map's.
        map: u64,
    },
    /// Frames that the memory map does not have.
    #[error("the {what} has frames {frames}, not all of which are in the memory map")]
    Absent {
        /// The set, order or table.
        what: &'static str,
        /// The frames.
        frames: FrameRange,
    },
    /// A run of no frames.
    #[error("entry {index} of the prefetch order is empty")]
    EmptyRun {
        /// Its index.
        index: usize,
    },
    /// A text, path or name that is too long, or empty where it must not be.
    #[error("the {what} has {length} bytes (the limits are {min} and {max})")]
    TextLength {
        /// The text.
        what: &'static str,
        /// Its length in bytes.
        length: usize,
        /// The shortest allowed.
        min: usize,
        /// The longest allowed.
        max: usize,
    },
    /// Too many of something, or none where there must be one.
    #[error("there are {count} {what} (the limits are {min} and {max})")]
    Count {
        /// What there are too many of.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// The fewest allowed.
        min: usize,
        /// The most allowed.
        max: usize,
    },
    /// A server that has no text.
    #[error("server {0:?} is neither tcp://HOST:PORT nor unix:PATH with at most 107 bytes of UTF-8")]
    Server(String),
    /// Extents that do not lie in the files.
    #[error(transparent)]
    Extents(#[from] ExtentError),
    /// A path with a zero byte.
    #[error("the path of file {index} has a zero byte")]
    PathZero {
        /// The file's index.
        index: usize,
    },
}
