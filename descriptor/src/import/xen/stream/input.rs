use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};

use thiserror::Error;

/// Bytes that are read once, from the first to the last.
pub trait Input {
    /// Fills `buffer` with the next bytes.
    ///
    /// # Errors
    /// When they cannot be read; [`io::ErrorKind::UnexpectedEof`] when the input ends before.
    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<()>;

    /// Passes over the next bytes, `count` of them.
    ///
    /// # Errors
    /// As [`Input::fill`].
    fn skip(&mut self, count: u64) -> io::Result<()>;
}

/// Bytes in memory.
impl Input for &[u8] {
    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.read_exact(buffer)
    }

    fn skip(&mut self, count: u64) -> io::Result<()> {
        let rest = usize::try_from(count).ok().and_then(|count| self.get(count..));
        *self = rest.ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(())
    }
}

/// A regular file; what is passed over is not read.
#[derive(Debug)]
pub struct FileInput {
    file: BufReader<File>,
    rest: u64,
}

impl FileInput {
    /// Reads `file` from its beginning.
    ///
    /// # Errors
    /// When the file's length cannot be found out.
    pub fn new(mut file: File) -> io::Result<Self> {
        let rest = file.metadata()?.len();
        file.seek(SeekFrom::Start(0))?;
        Ok(Self { file: BufReader::new(file), rest })
    }

    fn take(&mut self, count: u64) -> io::Result<()> {
        self.rest = self.rest.checked_sub(count).ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(())
    }
}

impl Input for FileInput {
    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.take(buffer.len() as u64)?;
        self.file.read_exact(buffer)
    }

    fn skip(&mut self, count: u64) -> io::Result<()> {
        self.take(count)?;
        // A file is at most i64::MAX bytes long, and count no more than what is left of it.
        self.file.seek_relative(count.cast_signed())
    }
}

/// A pipe or the like, all of which is kept as it comes.
#[derive(Debug)]
pub struct Spool<'r, R: ?Sized, W> {
    reader: &'r mut R,
    kept: W,
}

/// What came could not be kept.
#[derive(Debug, Error)]
#[error("cannot write to what keeps the stream")]
pub struct SpoolError(#[source] io::Error);

impl<'r, R: Read + ?Sized, W: Write> Spool<'r, R, W> {
    /// Reads from `reader`, and writes to `kept` whatever is read or passed over.
    pub fn new(reader: &'r mut R, kept: W) -> Self {
        Self { reader, kept }
    }

    fn keep(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.kept.write_all(bytes).map_err(|error| io::Error::new(error.kind(), SpoolError(error)))
    }
}

impl<R: Read + ?Sized, W: Write> Input for Spool<'_, R, W> {
    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.reader.read_exact(buffer)?;
        self.keep(buffer)
    }

    fn skip(&mut self, count: u64) -> io::Result<()> {
        let mut rest = count;
        // As much as a pipe holds by default.
        let mut buffer = vec![0; 64 << 10];
        while rest > 0 {
            let wanted = buffer.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
            let read = match self.reader.read(&mut buffer[..wanted]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.keep(&buffer[..read])?;
            rest -= read as u64;
        }
        Ok(())
    }
}
