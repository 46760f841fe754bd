use std::path::Path;

use super::container::{Container, ContainerWriter};
use super::section::Cursor;
use super::{FileError, FileKind, FormatError, SectionKind, disk};
use crate::leb128::{push_number, push_signed, signed};
use crate::working_set::{Entry, Merged, MergedError};
use crate::{FrameRange, Gfn, ImageId, PageCount};

impl Merged {
    /// The set as a file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = ContainerWriter::new(FileKind::WorkingSet);
        writer.required(SectionKind::IMAGE, &self.image().to_bytes());
        writer.required(SectionKind::NEEDED, &encode_needed(self));
        writer.finish()
    }

    /// The set in a file's bytes.
    ///
    /// # Errors
    /// When the bytes are damaged or malformed, or hold something else.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let container = Container::expect(bytes, FileKind::WorkingSet)?;
        let contents = container.required(SectionKind::IMAGE)?;
        let mut cursor = Cursor::new(SectionKind::IMAGE, &contents);
        let image = ImageId::from_bytes(cursor.fixed("the image id")?);
        cursor.finish()?;
        decode_needed(&container, image)
    }

    /// The set in the file at `path`.
    ///
    /// # Errors
    /// When the file cannot be read, or as [`Merged::decode`].
    pub fn read(path: &Path) -> Result<Self, FileError> {
        disk::read(path, Self::decode)
    }

    /// Writes the set to `path`, whole or not at all, as [`Descriptor::write`](crate::Descriptor::write) does.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), FileError> {
        disk::write(path, &self.encode())
    }
}

fn encode_needed(set: &Merged) -> Vec<u8> {
    let mut out = Vec::new();
    push_number(&mut out, set.frames().get());
    push_number(&mut out, set.heard());
    push_number(&mut out, set.witnesses());
    let mut end = 0;
    for Entry { range, needed, asked } in set.entries() {
        push_signed(&mut out, range.start().index() as i64 - end);
        out.extend([range.count().get() as u8, *needed, *asked]);
        end = range.end().index() as i64;
    }
    out
}

fn decode_needed(container: &Container<'_>, image: ImageId) -> Result<Merged, FormatError> {
    let contents = container.required(SectionKind::NEEDED)?;
    let mut cursor = Cursor::new(SectionKind::NEEDED, &contents);
    let frames = PageCount::new(cursor.number("the number of frames")?);
    let heard = cursor.number("the number of clones")?;
    let witnesses = cursor.number("the number of clones that told everything")?;
    let (mut entries, mut end) = (Vec::new(), Gfn::new(0));
    while !cursor.is_at_end() {
        // A section of many more can be packed into a small file.
        if entries.len() == Merged::MAX_ENTRIES {
            return Err(MergedError::TooMany.into());
        }
        let at = cursor.offset();
        let distance = signed(cursor.number("an entry's distance")?);
        let [count, needed, asked] = cursor.fixed("an entry")?;
        let start = end.index().checked_add_signed(distance).and_then(Gfn::checked);
        let range = start.and_then(|start| FrameRange::checked(start, PageCount::new(u64::from(count))));
        let range = range.ok_or_else(|| cursor.refused("an entry's distance", at, distance as u64))?;
        entries.push(Entry { range, needed, asked });
        end = range.end();
    }
    Ok(Merged::from_parts(image, frames, heard, witnesses, entries)?)
}
