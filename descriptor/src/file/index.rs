use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use zerocopy::IntoBytes;

use super::container::{Container, ContainerWriter};
use super::parts::{check_count, check_length, check_set, decode_memory, decode_set, encode_memory};
use super::section::Cursor;
use super::{ContentError, FileError, FileKind, FormatError, SectionKind, disk, wire};
use crate::image::{Extent, ExtentTable, ImageFile, ImageIndex};
use crate::leb128::{push_number, push_signed, signed};
use crate::{FrameRange, Gfn, ImageId, PAGE_SIZE, PageCount};

impl ImageIndex {
    /// The most files: one for each region.
    pub const MAX_FILES: usize = crate::memory::MemoryMap::MAX_REGIONS;

    /// The longest path of a file in bytes, as the kernel takes it.
    pub const MAX_PATH: usize = 4095;

    /// The index as a file's bytes.
    ///
    /// # Panics
    /// When [`ImageIndex::check`] refuses it.
    pub fn encode(&self) -> Vec<u8> {
        if let Err(error) = self.check() {
            panic!("image index that cannot be encoded: {error}");
        }
        let mut writer = ContainerWriter::new(FileKind::ImageIndex);
        writer.required(SectionKind::MEMORY, &encode_memory(&self.memory));
        writer.optional(SectionKind::ZERO, &self.zero.encode());
        writer.required(SectionKind::IMAGE, &self.image.to_bytes());
        writer.required(SectionKind::FILES, &encode_files(&self.files));
        if !self.extents.extents().is_empty() {
            writer.required(SectionKind::EXTENTS, &encode_extents(self.extents.extents()));
        }
        writer.finish()
    }

    /// The index in a file's bytes.
    ///
    /// # Errors
    /// When the bytes are damaged or malformed, or hold something else.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let container = Container::expect(bytes, FileKind::ImageIndex)?;
        let memory = decode_memory(&container)?;
        let files = decode_files(&container)?;
        let index = Self {
            image: decode_image(&container)?,
            extents: decode_extents(&container, &files)?,
            zero: decode_set(&container, SectionKind::ZERO, &memory)?,
            files,
            memory,
        };
        index.check()?;
        Ok(index)
    }

    /// The index in the file at `path`.
    ///
    /// # Errors
    /// When the file cannot be read, or as [`ImageIndex::decode`].
    pub fn read(path: &Path) -> Result<Self, FileError> {
        disk::read(path, Self::decode)
    }

    /// Writes the index to `path`, whole or not at all, as [`Descriptor::write`](crate::Descriptor::write) does.
    ///
    /// # Errors
    /// When the file cannot be written, or [`ImageIndex::check`] refuses the index.
    pub fn write(&self, path: &Path) -> Result<(), FileError> {
        self.check().map_err(|source| FileError::Unwritable { path: path.to_owned(), source })?;
        disk::write(path, &self.encode())
    }

    /// Checks that the parts fit together: extents and zero set hold only frames of the memory map, extents lie in files
    /// that there are, paths are within their bounds. Decoded indices always pass.
    ///
    /// # Errors
    /// Names the first part that does not fit.
    pub fn check(&self) -> Result<(), ContentError> {
        check_count("files", self.files.len(), 1, Self::MAX_FILES)?;
        for (index, file) in self.files.iter().enumerate() {
            let path = file.path.as_os_str().as_bytes();
            check_length("path of a file", path.len(), 1, Self::MAX_PATH)?;
            if path.contains(&0) {
                return Err(ContentError::PathZero { index });
            }
        }
        check_set("zero", &self.zero, &self.memory)?;
        for extent in self.extents.extents() {
            if !self.memory.covers(extent.frames) {
                return Err(ContentError::Absent { what: "extent table", frames: extent.frames });
            }
        }
        Ok(self.extents.check(&file_lengths(&self.files))?)
    }
}

fn file_lengths(files: &[ImageFile]) -> Vec<u64> {
    files.iter().map(|file| file.length).collect()
}

fn decode_image(container: &Container<'_>) -> Result<ImageId, FormatError> {
    let contents = container.required(SectionKind::IMAGE)?;
    let mut cursor = Cursor::new(SectionKind::IMAGE, &contents);
    let image = ImageId::from_bytes(cursor.fixed("the image id")?);
    cursor.finish()?;
    Ok(image)
}

fn encode_files(files: &[ImageFile]) -> Vec<u8> {
    let mut out = Vec::new();
    for file in files {
        let path = file.path.as_os_str().as_bytes();
        let fixed =
            wire::File { length: file.length.into(), path_length: (path.len() as u16).into(), reserved: [0; 6] };
        out.extend_from_slice(fixed.as_bytes());
        out.extend_from_slice(path);
    }
    out
}

fn decode_files(container: &Container<'_>) -> Result<Vec<ImageFile>, FormatError> {
    let contents = container.required(SectionKind::FILES)?;
    let mut cursor = Cursor::new(SectionKind::FILES, &contents);
    let mut files = Vec::new();
    while !cursor.is_at_end() {
        let at = cursor.offset();
        let fixed: wire::File = cursor.fixed("a file")?;
        cursor.reserved(at + 10, &fixed.reserved)?;
        let path = cursor.bytes(fixed.path_length.get().into(), "a file's path")?;
        files.push(ImageFile { path: OsStr::from_bytes(path).into(), length: fixed.length.get() });
    }
    Ok(files)
}

fn encode_extents(extents: &[Extent]) -> Vec<u8> {
    let mut out = Vec::new();
    let (mut end, mut end_offset) = (Gfn::new(0), 0u64);
    for extent in extents {
        push_number(&mut out, (extent.frames.start() - end).get());
        push_number(&mut out, extent.frames.count().get());
        push_number(&mut out, extent.file.into());
        push_signed(&mut out, extent.offset.wrapping_sub(end_offset) as i64);
        push_number(&mut out, u64::from(extent.stride) - PAGE_SIZE);
        (end, end_offset) = (extent.frames.end(), offset_after(extent));
    }
    out
}

fn decode_extents(container: &Container<'_>, files: &[ImageFile]) -> Result<ExtentTable, FormatError> {
    let contents = container.contents(SectionKind::EXTENTS)?;
    let mut cursor = Cursor::new(SectionKind::EXTENTS, &contents);
    let mut extents = Vec::new();
    let (mut end, mut end_offset) = (Gfn::new(0), 0u64);
    while !cursor.is_at_end() {
        let extent = decode_extent(&mut cursor, end, end_offset)?;
        (end, end_offset) = (extent.frames.end(), offset_after(&extent));
        extents.push(extent);
    }
    Ok(ExtentTable::new(extents, &file_lengths(files))?)
}

fn decode_extent(cursor: &mut Cursor<'_>, end: Gfn, end_offset: u64) -> Result<Extent, FormatError> {
    let at = cursor.offset();
    let gap = cursor.number("an extent's distance")?;
    let start = end.checked_add(PageCount::new(gap)).ok_or_else(|| cursor.refused("an extent's distance", at, gap))?;
    let at = cursor.offset();
    let count = cursor.number("an extent's number of frames")?;
    let frames = FrameRange::checked(start, PageCount::new(count))
        .ok_or_else(|| cursor.refused("an extent's number of frames", at, count))?;
    let at = cursor.offset();
    let file = cursor.number("an extent's file")?;
    let file = u16::try_from(file).map_err(|_| cursor.refused("an extent's file", at, file))?;
    let offset = end_offset.wrapping_add(signed(cursor.number("an extent's offset")?) as u64);
    let at = cursor.offset();
    let gap = cursor.number("an extent's stride")?;
    let stride = gap.checked_add(PAGE_SIZE).and_then(|stride| u32::try_from(stride).ok());
    let stride = stride.ok_or_else(|| cursor.refused("an extent's stride", at, gap))?;
    Ok(Extent { frames, file, offset, stride })
}

/// Where the page after the extent's last would lie, modulo 2^64: the next extent is likely to begin near it.
fn offset_after(extent: &Extent) -> u64 {
    extent.offset.wrapping_add(extent.frames.count().get().wrapping_mul(extent.stride.into()))
}
