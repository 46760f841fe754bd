use std::io;

use super::{Input, StreamError};

/// A place in a stream.
pub(super) struct Cursor<'i, I: ?Sized> {
    input: &'i mut I,
    position: u64,
}

impl<'i, I: Input + ?Sized> Cursor<'i, I> {
    pub(super) fn new(input: &'i mut I) -> Self {
        Self { input, position: 0 }
    }

    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Fills `buffer`.
    pub(super) fn fill(&mut self, buffer: &mut [u8], field: &'static str) -> Result<(), StreamError> {
        let result = self.input.fill(buffer);
        self.advance(buffer.len() as u64, field, result)
    }

    /// The next `N` bytes.
    pub(super) fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], StreamError> {
        let mut array = [0; N];
        self.fill(&mut array, field)?;
        Ok(array)
    }

    /// Appends the next `count` bytes to `out`; memory is only taken for bytes that are there.
    pub(super) fn append(&mut self, out: &mut Vec<u8>, count: u64, field: &'static str) -> Result<(), StreamError> {
        // A stream's records are shorter than this but for those of large device models.
        const STEP: u64 = 1 << 20;
        let mut rest = count;
        while rest > 0 {
            let step = rest.min(STEP);
            let start = out.len();
            out.resize(start + step as usize, 0);
            self.fill(&mut out[start..], field)?;
            rest -= step;
        }
        Ok(())
    }

    /// Jumps over `count` bytes.
    pub(super) fn skip(&mut self, count: u64, field: &'static str) -> Result<(), StreamError> {
        let result = self.input.skip(count);
        self.advance(count, field, result)
    }

    fn advance(&mut self, count: u64, field: &'static str, result: io::Result<()>) -> Result<(), StreamError> {
        let offset = self.position;
        match result {
            Ok(()) => self.position += count,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(StreamError::Truncated { field, offset });
            }
            Err(source) => return Err(StreamError::Read { field, offset, source }),
        }
        Ok(())
    }
}
