use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use super::{FileError, FormatError};

/// Reads the file at `path` and decodes it.
pub(super) fn read<T>(path: &Path, decode: impl FnOnce(&[u8]) -> Result<T, FormatError>) -> Result<T, FileError> {
    let bytes = read_bytes(path)?;
    decode(&bytes).map_err(|source| FileError::Format { path: path.to_owned(), source })
}

/// The bytes of the file at `path`; only regular files, because others have no length and may never end.
pub(crate) fn read_bytes(path: &Path) -> Result<Vec<u8>, FileError> {
    let failed = |action| move |source| FileError::Io { action, path: path.to_owned(), source };
    if !std::fs::metadata(path).map_err(failed("open"))?.is_file() {
        return Err(FileError::NotRegular(path.to_owned()));
    }
    let file = File::open(path).map_err(failed("open"))?;
    let length = file.metadata().map_err(failed("read"))?.len();
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes).map_err(failed("read"))?;
    Ok(bytes)
}

/// Replaces the file at `path` by `bytes`, whole or not at all, and for good once this returns.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| FileError::Io { action, path, source }
    };
    let mut file = tempfile::Builder::new()
        .prefix(".snow-")
        .tempfile_in(folder)
        .map_err(failed("create a temporary file in", folder))?;
    file.write_all(bytes).map_err(failed("write", file.path()))?;
    file.as_file().sync_all().map_err(failed("sync", file.path()))?;
    file.persist(path).map_err(|error| failed("rename the finished file to", path)(error.error))?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("sync", folder))
}
