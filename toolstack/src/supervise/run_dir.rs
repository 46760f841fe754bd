//! The directory of a run: its sockets, logs and manifest, for its owner's eyes alone.
//!
//! It lies in `$XDG_RUNTIME_DIR/snowflock`, or in `/tmp/snowflock-UID` where that is no directory of this user. While the run lives, a
//! lock is held on its file `lock`; so a run that was killed is known by its free lock, and is swept away by the next one.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use descriptor::Endpoint;
use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;
use thiserror::Error;

const LOCK: &str = "lock";

/// A link to the run's directory for large files, and the beginning of that directory's name.
const SCRATCH: &str = "scratch";
const SCRATCH_PREFIX: &str = "snowflock-";

/// The directory of a run, removed with all it holds when dropped.
pub struct RunDir {
    dir: TempDir,
    scratch: Option<TempDir>,
    /// Held as long as this process lives.
    _lock: File,
}

/// A run directory that cannot be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RunDirError {
    /// Something about a path failed.
    #[error("cannot {operation} {}", path.display())]
    Os {
        /// What was tried, such as `create`.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The folder of all runs belongs to somebody else, or others may write to it.
    #[error("{} is not a directory of yours alone (mode 0700); set XDG_RUNTIME_DIR to one that is", .0.display())]
    Untrusted(PathBuf),
    /// A socket's path would be too long.
    #[error("{} is {} bytes long, too long for a Unix socket ({max}); set XDG_RUNTIME_DIR to a shorter path",
        .0.display(), .0.as_os_str().len(), max = Endpoint::MAX_PATH)]
    PathTooLong(PathBuf),
}

impl RunDir {
    /// A fresh directory whose name begins with `command`; directories of runs that were killed are removed on the way.
    ///
    /// # Errors
    /// When it cannot be made, or the place for it is not trustworthy.
    pub fn create(command: &str) -> Result<Self, RunDirError> {
        let base = base();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&base).map_err(os("create", &base))?;
        let metadata = fs::symlink_metadata(&base).map_err(os("look at", &base))?;
        let ours = metadata.is_dir() && metadata.uid() == rustix::process::geteuid().as_raw();
        if !ours || metadata.mode() & 0o077 != 0 {
            return Err(RunDirError::Untrusted(base));
        }
        sweep(&base);

        let prefix = format!("{command}-");
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir_in(&base).map_err(os("create", &base))?;
        // Locked before it gets its name: a sweep between the two would take it for a dead run's.
        let fresh = dir.path().join("lock.new");
        let lock = File::create(&fresh).map_err(os("create", &fresh))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| os("lock", &fresh)(error.into()))?;
        fs::rename(&fresh, dir.path().join(LOCK)).map_err(os("rename", &fresh))?;
        Ok(Self { dir, scratch: None, _lock: lock })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The path of a socket in it.
    ///
    /// # Errors
    /// When it is too long for a socket.
    pub fn socket(&self, name: &str) -> Result<PathBuf, RunDirError> {
        let path = self.path().join(name);
        if path.as_os_str().len() > Endpoint::MAX_PATH { Err(RunDirError::PathTooLong(path)) } else { Ok(path) }
    }

    /// A directory for large files, in `TMPDIR` or /tmp: where runs lie is often memory. It goes when the run's does.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn scratch(&mut self) -> Result<PathBuf, RunDirError> {
        if let Some(scratch) = &self.scratch {
            return Ok(scratch.path().to_owned());
        }
        let place = std::env::temp_dir();
        let scratch = tempfile::Builder::new().prefix(SCRATCH_PREFIX).tempdir_in(&place);
        let scratch = scratch.map_err(os("create a directory in", &place))?;
        let link = self.path().join(SCRATCH);
        std::os::unix::fs::symlink(scratch.path(), &link).map_err(os("create", &link))?;
        Ok(self.scratch.insert(scratch).path().to_owned())
    }
}

/// The directories of the runs of this user that are alive.
///
/// # Errors
/// When the folder of all runs is there and cannot be read.
pub fn runs() -> Result<Vec<PathBuf>, RunDirError> {
    let base = base();
    let entries = match fs::read_dir(&base) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(os("read", &base)(error)),
    };
    let mut alive: Vec<PathBuf> =
        entries.flatten().map(|entry| entry.path()).filter(|path| is_alive(path) == Some(true)).collect();
    alive.sort();
    Ok(alive)
}

fn base() -> PathBuf {
    let user = rustix::process::geteuid().as_raw();
    // After a change of user the variable often still names the directory of the user before.
    let is_ours = |dir: &PathBuf| fs::metadata(dir).is_ok_and(|dir| dir.is_dir() && dir.uid() == user);
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(is_ours) {
        Some(dir) => dir.join("snowflock"),
        None => PathBuf::from(format!("/tmp/snowflock-{user}")),
    }
}

/// Whether somebody holds the lock of this directory; none when it has no lock (yet).
fn is_alive(dir: &Path) -> Option<bool> {
    let lock = File::open(dir.join(LOCK)).ok()?;
    Some(flock(&lock, FlockOperation::NonBlockingLockShared).is_err())
}

fn sweep(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if is_alive(&path) == Some(false) {
            // Best effort: two sweeps may meet, and what stays behind is found by the next.
            if let Ok(scratch) = fs::read_link(path.join(SCRATCH))
                && scratch
                    .file_name()
                    .is_some_and(|name| name.as_encoded_bytes().starts_with(SCRATCH_PREFIX.as_bytes()))
            {
                let _ = fs::remove_dir_all(&scratch);
            }
            let _ = fs::remove_dir_all(&path);
        }
    }
}

fn os<'a>(operation: &'static str, path: &'a Path) -> impl Fn(io::Error) -> RunDirError + 'a {
    move |source| RunDirError::Os { operation, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_alive_while_its_lock_is_held() {
        let base = tempfile::tempdir().unwrap();
        assert_eq!(is_alive(base.path()), None, "without a lock it is being made");
        let lock = File::create(base.path().join(LOCK)).unwrap();
        assert_eq!(is_alive(base.path()), Some(false));
        flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        assert_eq!(is_alive(base.path()), Some(true));
        drop(lock);
        assert_eq!(is_alive(base.path()), Some(false));
    }

    #[test]
    fn a_sweep_takes_dead_runs_only() {
        let base = tempfile::tempdir().unwrap();
        let run = |name: &str| {
            let dir = base.path().join(name);
            fs::create_dir(&dir).unwrap();
            File::create(dir.join(LOCK)).unwrap()
        };
        let alive = run("alive");
        flock(&alive, FlockOperation::NonBlockingLockExclusive).unwrap();
        let scratch = base.path().join("snowflock-scratch");
        fs::create_dir(&scratch).unwrap();
        drop(run("dead"));
        std::os::unix::fs::symlink(&scratch, base.path().join("dead").join(SCRATCH)).unwrap();
        fs::create_dir(base.path().join("being-made")).unwrap();
        sweep(base.path());
        let mut left: Vec<_> = fs::read_dir(base.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["alive", "being-made"]);
    }
}
