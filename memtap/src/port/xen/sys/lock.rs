use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Locks one byte of a file for as long as it is open; false when another process has it.
pub(in super::super) fn lock_byte(file: &File, byte: i64) -> io::Result<bool> {
    // SAFETY: a structure of integers, for which zeros are values.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_whence) = (libc::F_WRLCK as libc::c_short, libc::SEEK_SET as libc::c_short);
    (lock.l_start, lock.l_len) = (byte, 1);
    // SAFETY: the command takes a pointer to this structure.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
        0 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_is_locked_once() {
        let folder = tempfile::tempdir().unwrap();
        let open = || {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(folder.path().join("lock"))
                .unwrap()
        };
        let (first, second) = (open(), open());
        assert!(lock_byte(&first, 7).unwrap());
        assert!(!lock_byte(&second, 7).unwrap());
        assert!(lock_byte(&second, 8).unwrap());
        drop(first);
        assert!(lock_byte(&second, 7).unwrap());
    }
}
