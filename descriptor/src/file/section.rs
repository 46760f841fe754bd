//! Reading and writing the contents of one section.

use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::{FormatError, SectionKind};
use crate::leb128::{NumberError, take_number};

/// The contents of one section, taken from front to back.
pub(super) struct Cursor<'a> {
    section: SectionKind,
    rest: &'a [u8],
    offset: u64,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(section: SectionKind, contents: &'a [u8]) -> Self {
        Self { section, rest: contents, offset: 0 }
    }

    /// Where the next field begins.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn is_at_end(&self) -> bool {
        self.rest.is_empty()
    }

    pub(super) fn bytes(&mut self, length: u64, field: &'static str) -> Result<&'a [u8], FormatError> {
        let taken = usize::try_from(length).ok().and_then(|length| self.rest.split_at_checked(length));
        let (head, tail) = taken.ok_or_else(|| self.truncated(field))?;
        self.rest = tail;
        self.offset += length;
        Ok(head)
    }

    pub(super) fn fixed<T: FromBytes + KnownLayout + Immutable>(
        &mut self,
        field: &'static str,
    ) -> Result<T, FormatError> {
        let bytes = self.bytes(size_of::<T>() as u64, field)?;
        T::read_from_bytes(bytes).map_err(|_| self.truncated(field))
    }

    pub(super) fn text(&mut self, length: u64, field: &'static str) -> Result<String, FormatError> {
        let offset = self.offset;
        let bytes = self.bytes(length, field)?;
        let text =
            std::str::from_utf8(bytes).map_err(|_| FormatError::Text { section: self.section, field, offset })?;
        Ok(text.to_owned())
    }

    /// A LEB128 number.
    pub(super) fn number(&mut self, field: &'static str) -> Result<u64, FormatError> {
        match take_number(self.rest) {
            Ok((number, size)) => {
                self.bytes(size as u64, field)?;
                Ok(number)
            }
            Err(NumberError::Truncated) => Err(self.truncated(field)),
            Err(NumberError::Overlong) => {
                Err(FormatError::Number { section: self.section, field, offset: self.offset })
            }
        }
    }

    /// Refuses reserved `bytes`, read at `offset`, that are not zero.
    pub(super) fn reserved(&self, offset: u64, bytes: &[u8]) -> Result<(), FormatError> {
        match bytes.iter().find(|byte| **byte != 0) {
            Some(byte) => Err(self.refused("a reserved byte", offset, (*byte).into())),
            None => Ok(()),
        }
    }

    /// The error for a `field` that was read at `offset`.
    pub(super) fn refused(&self, field: &'static str, offset: u64, value: u64) -> FormatError {
        FormatError::Field { section: self.section, field, offset, value }
    }

    /// Refuses bytes that are left over.
    pub(super) fn finish(self) -> Result<(), FormatError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(FormatError::Trailing { section: self.section, offset: self.offset, count: self.rest.len() as u64 })
    }

    fn truncated(&self, field: &'static str) -> FormatError {
        FormatError::SectionTruncated { section: self.section, field, offset: self.offset }
    }
}
