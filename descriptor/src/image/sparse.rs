use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// The first piece within `range`, in bytes, of a file that is not a hole; `None` when all of it is one. A hole reads as zeros;
/// where the file system knows no holes, everything is data.
///
/// # Errors
/// When the file cannot be asked.
pub(crate) fn data_within(file: &File, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
    if range.is_empty() {
        return Ok(None);
    }
    match rustix::fs::seek(file, SeekFrom::Data(range.start)) {
        Ok(start) if start < range.end => {
            let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
            Ok(Some(start..end.min(range.end)))
        }
        // ENXIO: no data up to the end of the file.
        Ok(_) | Err(Errno::NXIO) => Ok(None),
        // A file system that knows no holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(range)),
        Err(error) => Err(error.into()),
    }
}
