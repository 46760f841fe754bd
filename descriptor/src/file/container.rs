use std::borrow::Cow;

use lz4_flex::block;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::wire::{Entry, Header, Preamble};
use super::{FileKind, FormatError, SectionKind, Version};

/// The most plain bytes that one compressed byte can stand for: lz4 extends a match by at most 255 a byte.
pub const MAX_EXPANSION: u64 = 255;

/// The longest contents that are stored compressed. 64 MiB is the zero set of some terabytes of guest; a small hostile
/// file cannot ask for more, and larger contents are stored as they are.
pub const MAX_COMPRESSED: u64 = 64 << 20;

const MAGIC: [u8; 4] = *b"SNOW";
const CHECKSUM: usize = 16;
const PROLOGUE: usize = size_of::<Preamble>() + size_of::<Header>();

const REQUIRED: u32 = 1;
const LZ4: u32 = 2;

/// Contents below this stay as they are: lz4 saves nothing worth the look.
const MIN_COMPRESSED: usize = 128;

/// The outer form of a file: its kind, version and sections, before their contents are looked at.
#[derive(Debug)]
pub struct Container<'a> {
    kind: FileKind,
    version: Version,
    bytes: &'a [u8],
    sections: Vec<SectionEntry>,
}

/// A section as the table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionEntry {
    /// Which section.
    pub kind: SectionKind,
    /// True when readers that do not know the section must refuse the file.
    pub required: bool,
    /// True when the contents are compressed.
    pub compressed: bool,
    /// Where the stored bytes begin in the file.
    pub offset: u64,
    /// The length of the stored bytes.
    pub stored: u64,
    /// The length of the contents.
    pub plain: u64,
    checksum: [u8; CHECKSUM],
}

impl<'a> Container<'a> {
    /// The container that `bytes` hold, a whole file; nothing of its contents is checked yet.
    ///
    /// # Errors
    /// When the preamble, the header or the section table is malformed, or does not fit the length of `bytes`.
    pub fn open(bytes: &'a [u8]) -> Result<Self, FormatError> {
        let (kind, version) = read_preamble(bytes)?;
        let header: Header = structure(bytes, size_of::<Preamble>(), "the header")?;
        let actual = bytes.len() as u64;
        if header.length.get() != actual {
            return Err(FormatError::Length { stated: header.length.get(), actual });
        }
        if header.reserved.get() != 0 {
            let value = header.reserved.get().into();
            return Err(FormatError::Header { field: "the reserved field", offset: 20, value });
        }
        let count = u64::from(header.sections.get());
        let needed = count * size_of::<Entry>() as u64 + CHECKSUM as u64;
        let left = actual - PROLOGUE as u64;
        if needed > left {
            let offset = PROLOGUE as u64;
            return Err(FormatError::Truncated { field: "the section table", offset, needed, left });
        }
        let sections = read_table(bytes, count)?;
        Ok(Self { kind, version, bytes, sections })
    }

    /// What the file is.
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// The version it was written in.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Its sections in the order of the file, unknown ones among them.
    pub fn sections(&self) -> &[SectionEntry] {
        &self.sections
    }

    /// Compares every checksum.
    ///
    /// # Errors
    /// Names the first damaged section, or else the file as a whole.
    pub fn check(&self) -> Result<(), FormatError> {
        for entry in &self.sections {
            if checksum(self.stored(entry)) != entry.checksum {
                return Err(FormatError::SectionChecksum { section: entry.kind, offset: entry.offset });
            }
        }
        let (covered, stated) = self.bytes.split_at(self.bytes.len() - CHECKSUM);
        if checksum(covered) != stated {
            return Err(FormatError::FileChecksum { offset: covered.len() as u64 });
        }
        Ok(())
    }

    /// The container of an undamaged file of this kind, without required sections that this version does not know.
    pub(super) fn expect(bytes: &'a [u8], expected: FileKind) -> Result<Self, FormatError> {
        let container = Self::open(bytes)?;
        if container.kind != expected {
            return Err(FormatError::WrongKind { found: container.kind, expected });
        }
        container.check()?;
        for (index, entry) in container.sections.iter().enumerate() {
            if entry.required && !expected.sections().contains(&entry.kind) {
                return Err(FormatError::UnknownRequired { section: entry.kind, offset: entry_offset(index) });
            }
        }
        Ok(container)
    }

    /// The contents of a section; empty when it is left out.
    pub(super) fn contents(&self, kind: SectionKind) -> Result<Cow<'a, [u8]>, FormatError> {
        let Some(entry) = self.sections.iter().find(|entry| entry.kind == kind) else {
            return Ok(Cow::Borrowed(&[]));
        };
        let stored = self.stored(entry);
        if !entry.compressed {
            return Ok(Cow::Borrowed(stored));
        }
        let mut plain = vec![0; entry.plain as usize];
        match block::decompress_into(stored, &mut plain) {
            Ok(length) if length as u64 == entry.plain => Ok(Cow::Owned(plain)),
            Ok(length) => {
                let reason = format!("{length} bytes came out of it, the table says {}", entry.plain);
                Err(FormatError::Lz4 { section: kind, reason })
            }
            Err(error) => Err(FormatError::Lz4 { section: kind, reason: error.to_string() }),
        }
    }

    /// The contents of a section that must be there.
    pub(super) fn required(&self, kind: SectionKind) -> Result<Cow<'a, [u8]>, FormatError> {
        match self.sections.iter().any(|entry| entry.kind == kind) {
            true => self.contents(kind),
            false => Err(FormatError::Missing(kind)),
        }
    }

    /// The bytes of an entry, whose bounds `open` has checked.
    fn stored(&self, entry: &SectionEntry) -> &'a [u8] {
        &self.bytes[entry.offset as usize..(entry.offset + entry.stored) as usize]
    }
}

fn read_preamble(bytes: &[u8]) -> Result<(FileKind, Version), FormatError> {
    // What is too short for a preamble but begins otherwise is no file of ours, rather than a truncated one.
    let head = bytes.get(..MAGIC.len()).unwrap_or(bytes);
    if !MAGIC.starts_with(head) {
        let mut magic = [0; 4];
        magic[..head.len()].copy_from_slice(head);
        return Err(FormatError::Magic(magic));
    }
    let preamble: Preamble = structure(bytes, 0, "the preamble")?;
    let version = Version { major: preamble.major, minor: preamble.minor };
    if version.major != Version::OURS.major {
        return Err(FormatError::Version { file: version, ours: Version::OURS });
    }
    let number = preamble.kind.get();
    let kind = FileKind::ALL.into_iter().find(|kind| kind.number() == number);
    Ok((kind.ok_or(FormatError::UnknownKind(number))?, version))
}

/// The entries of the table, which together account for every byte of the file.
fn read_table(bytes: &[u8], count: u64) -> Result<Vec<SectionEntry>, FormatError> {
    let end = bytes.len() as u64 - CHECKSUM as u64;
    let mut sections: Vec<SectionEntry> = Vec::with_capacity(count as usize);
    let mut offset = entry_offset(count as usize);
    for index in 0..count as usize {
        let at = entry_offset(index);
        let entry: Entry = structure(bytes, at as usize, "an entry of the section table")?;
        let section = SectionKind(entry.kind.get());
        if let Some(previous) = sections.last().map(|entry| entry.kind).filter(|previous| *previous >= section) {
            return Err(if sections.iter().any(|entry| entry.kind == section) {
                FormatError::Duplicate { section, offset: at }
            } else {
                FormatError::Order { section, previous, offset: at }
            });
        }
        let flags = entry.flags.get();
        if flags & !(REQUIRED | LZ4) != 0 {
            return Err(FormatError::Header { field: "a section's flags", offset: at + 4, value: flags.into() });
        }
        let (stored, plain, compressed) = (entry.stored.get(), entry.plain.get(), flags & LZ4 != 0);
        if stored > end - offset {
            return Err(FormatError::Truncated {
                field: section.name().unwrap_or("a section"),
                offset,
                needed: stored,
                left: end - offset,
            });
        }
        if compressed && (plain > MAX_COMPRESSED || plain > stored * MAX_EXPANSION) {
            return Err(FormatError::Expansion { section, stored, plain });
        }
        if !compressed && plain != stored {
            return Err(FormatError::Header { field: "a plain length", offset: at + 16, value: plain });
        }
        let required = flags & REQUIRED != 0;
        let checksum = entry.checksum;
        sections.push(SectionEntry { kind: section, required, compressed, offset, stored, plain, checksum });
        offset += stored;
    }
    if offset != end {
        return Err(FormatError::Header { field: "the first byte after the sections", offset, value: end - offset });
    }
    Ok(sections)
}

/// Puts a file together, section by section.
pub(super) struct ContainerWriter {
    kind: FileKind,
    table: Vec<Entry>,
    bodies: Vec<u8>,
}

impl ContainerWriter {
    pub(super) fn new(kind: FileKind) -> Self {
        Self { kind, table: Vec::new(), bodies: Vec::new() }
    }

    /// Adds a section that every reader has to understand, even when it is empty.
    pub(super) fn required(&mut self, kind: SectionKind, contents: &[u8]) {
        self.push(kind, REQUIRED, contents);
    }

    /// Adds a section that readers may skip, unless it is empty.
    pub(super) fn optional(&mut self, kind: SectionKind, contents: &[u8]) {
        if !contents.is_empty() {
            self.push(kind, 0, contents);
        }
    }

    pub(super) fn finish(self) -> Vec<u8> {
        let length = PROLOGUE + self.table.len() * size_of::<Entry>() + self.bodies.len() + CHECKSUM;
        let Version { major, minor } = Version::OURS;
        let preamble = Preamble { magic: MAGIC, kind: self.kind.number().into(), major, minor };
        let header =
            Header { length: (length as u64).into(), sections: (self.table.len() as u32).into(), reserved: 0.into() };
        let mut out = Vec::with_capacity(length);
        out.extend_from_slice(preamble.as_bytes());
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(self.table.as_bytes());
        out.extend_from_slice(&self.bodies);
        out.extend_from_slice(&checksum(&out));
        out
    }

    fn push(&mut self, kind: SectionKind, flags: u32, contents: &[u8]) {
        let compressed = compress(contents);
        let stored = compressed.as_deref().unwrap_or(contents);
        self.table.push(Entry {
            kind: kind.0.into(),
            flags: (flags | if compressed.is_some() { LZ4 } else { 0 }).into(),
            stored: (stored.len() as u64).into(),
            plain: (contents.len() as u64).into(),
            checksum: checksum(stored),
        });
        self.bodies.extend_from_slice(stored);
    }
}

/// `contents` compressed, where that saves a sixteenth or more.
fn compress(contents: &[u8]) -> Option<Vec<u8>> {
    if contents.len() < MIN_COMPRESSED || contents.len() as u64 > MAX_COMPRESSED {
        return None;
    }
    let compressed = block::compress(contents);
    (compressed.len() <= contents.len() - contents.len() / 16).then_some(compressed)
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM] {
    let mut checksum = [0; CHECKSUM];
    checksum.copy_from_slice(&blake3::hash(bytes).as_bytes()[..CHECKSUM]);
    checksum
}

fn entry_offset(index: usize) -> u64 {
    (PROLOGUE + index * size_of::<Entry>()) as u64
}

fn structure<T>(bytes: &[u8], offset: usize, field: &'static str) -> Result<T, FormatError>
where
    T: FromBytes + KnownLayout + Immutable,
{
    let rest = bytes.get(offset..).unwrap_or_default();
    let (needed, left) = (size_of::<T>() as u64, rest.len() as u64);
    let truncated = || FormatError::Truncated { field, offset: offset as u64, needed, left };
    T::read_from_prefix(rest).map(|(value, _)| value).map_err(|_| truncated())
}
