use super::{Source, StreamError};

/// How much is read at once after a jump: the header of a page and a little more.
const WINDOW_AFTER_JUMP: usize = 64;
/// How much is read at once at most, where the stream is read without jumps, as through a long run of zero pages.
const WINDOW_MAX: usize = 64 << 10;

/// A place in a stream, with a read buffer that stays small while pages are jumped over.
pub(super) struct Cursor<'s, S: ?Sized> {
    source: &'s S,
    length: u64,
    position: u64,
    buffer: Vec<u8>,
    buffer_start: u64,
}

impl<'s, S: Source + ?Sized> Cursor<'s, S> {
    pub(super) fn new(source: &'s S) -> Result<Self, StreamError> {
        let read = |source| StreamError::Read { field: "the file's length", offset: 0, source };
        let length = source.length().map_err(read)?;
        Ok(Self { source, length, position: 0, buffer: Vec::new(), buffer_start: 0 })
    }

    pub(super) fn source(&self) -> &'s S {
        self.source
    }

    pub(super) fn length(&self) -> u64 {
        self.length
    }

    pub(super) fn position(&self) -> u64 {
        self.position
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, StreamError> {
        self.array(field).map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, StreamError> {
        self.array(field).map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, StreamError> {
        self.array(field).map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self, field: &'static str) -> Result<u64, StreamError> {
        self.array(field).map(u64::from_be_bytes)
    }

    /// A text of `length` bytes.
    pub(super) fn text(&mut self, length: usize, field: &'static str) -> Result<String, StreamError> {
        let offset = self.position;
        let bytes = self.take(length, field)?.to_vec();
        String::from_utf8(bytes).map_err(|_| StreamError::Text { field, offset })
    }

    /// A text after its one-byte length.
    pub(super) fn cstr(&mut self, field: &'static str) -> Result<String, StreamError> {
        let length = self.u8(field)?;
        self.text(usize::from(length), field)
    }

    pub(super) fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], StreamError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, field)?);
        Ok(array)
    }

    /// Jumps over `bytes`.
    pub(super) fn skip(&mut self, bytes: u64, field: &'static str) -> Result<(), StreamError> {
        let target = self.position.saturating_add(bytes);
        self.seek(target, field)
    }

    /// Goes on at `offset`.
    pub(super) fn seek(&mut self, offset: u64, field: &'static str) -> Result<(), StreamError> {
        if offset > self.length {
            return Err(self.truncated(field));
        }
        self.position = offset;
        Ok(())
    }

    /// Fills `buffer` from `offset` on without going there.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64, field: &'static str) -> Result<(), StreamError> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.length) {
            return Err(StreamError::Truncated { field, offset, length: self.length });
        }
        self.source.read_exact_at(buffer, offset).map_err(|source| StreamError::Read { field, offset, source })
    }

    /// The next `count` bytes, at most a few hundred.
    fn take(&mut self, count: usize, field: &'static str) -> Result<&[u8], StreamError> {
        if self.length - self.position < count as u64 {
            return Err(self.truncated(field));
        }
        let buffer_end = self.buffer_start + self.buffer.len() as u64;
        let buffered = self.position >= self.buffer_start && self.position + count as u64 <= buffer_end;
        if !buffered {
            let sequential = (self.buffer_start..=buffer_end).contains(&self.position);
            let window = if sequential { (self.buffer.len() * 2).min(WINDOW_MAX) } else { WINDOW_AFTER_JUMP };
            let rest = self.length - self.position;
            let window = window.max(WINDOW_AFTER_JUMP).max(count).min(usize::try_from(rest).unwrap_or(usize::MAX));
            self.buffer.resize(window, 0);
            self.buffer_start = self.position;
            let (source, offset) = (self.source, self.position);
            if let Err(source) = source.read_exact_at(&mut self.buffer, offset) {
                self.buffer.clear();
                return Err(StreamError::Read { field, offset, source });
            }
        }
        let start = (self.position - self.buffer_start) as usize;
        self.position += count as u64;
        Ok(&self.buffer[start..start + count])
    }

    fn truncated(&self, field: &'static str) -> StreamError {
        StreamError::Truncated { field, offset: self.position, length: self.length }
    }
}
