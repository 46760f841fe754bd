//! A file descriptor that this process was started with.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// Takes over the descriptor of this number, which whoever started the process left open for it. Call it at the beginning,
/// at most once for a number.
///
/// # Errors
/// When there is no such descriptor, or it is one of the standard streams.
pub(crate) fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: fcntl has no effect on memory, and with a number that is no open descriptor it only fails; the borrow ends
    // before the descriptor is owned.
    let flags = fcntl_getfd(unsafe { std::os::fd::BorrowedFd::borrow_raw(number) })?;
    // SAFETY: the descriptor is open, as fcntl has just found. Nothing else in this process owns it: the caller takes it before
    // anything was opened, so that it comes from outside, and takes it once.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl_setfd(&fd, flags | FdFlags::CLOEXEC)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn an_inherited_socket_is_taken_over() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut taken = UnixStream::from(inherited(near.into_raw_fd()).unwrap());
        taken.write_all(b"x").unwrap();
        far.read_exact(&mut [0]).unwrap();
        for wrong in [-1, 0, 2, 1 << 30] {
            assert!(inherited(wrong).is_err(), "{wrong}");
        }
    }
}
