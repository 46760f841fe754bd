use std::io;
use std::mem::MaybeUninit;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use descriptor::Endpoint;
use descriptor::fetch::LocalImage;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, Shutdown, SocketAddrUnix,
    SocketFlags, SocketType, sockopt,
};

/// A receive buffer that holds the pages of several requests, so that a server is not stopped by a pager that installs.
const RECEIVE_BUFFER: usize = 4 << 20;

/// What a receive call brought.
pub(super) enum Received {
    /// So many bytes.
    Bytes(usize),
    /// Nothing at the moment.
    Nothing,
    /// The peer closed its side.
    End,
}

/// A non-blocking stream socket to a page server.
pub(super) struct Socket {
    fd: OwnedFd,
    /// Descriptors may come with the bytes: a Unix socket on which the local lane was asked for.
    takes_files: bool,
}

impl Socket {
    /// Begins to connect; the socket is writable when that has succeeded or failed.
    ///
    /// The name of a TCP endpoint is resolved here, which may block where it is no address.
    pub(super) fn connect(endpoint: &Endpoint, takes_files: bool) -> io::Result<Self> {
        match endpoint {
            Endpoint::Unix(path) => {
                let fd = open(AddressFamily::UNIX)?;
                in_progress(rustix::net::connect(&fd, &SocketAddrUnix::new(path)?))?;
                Ok(Self { fd, takes_files })
            }
            Endpoint::Tcp(address) => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                for address in address.to_socket_addrs()? {
                    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
                    let fd = open(family)?;
                    sockopt::set_tcp_nodelay(&fd, true)?;
                    // A hint; the kernel's limit may be lower.
                    let _smaller = sockopt::set_socket_recv_buffer_size(&fd, RECEIVE_BUFFER);
                    match in_progress(rustix::net::connect(&fd, &address)) {
                        Ok(()) => return Ok(Self { fd, takes_files: false }),
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    /// What became of connecting, once the socket is writable.
    pub(super) fn connected(&self) -> io::Result<()> {
        sockopt::socket_error(&self.fd)?.map_err(io::Error::from)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The addresses of the peer's end and of this one; `None` for a Unix socket.
    pub(super) fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        let peer = SocketAddr::try_from(rustix::net::getpeername(&self.fd).ok()??).ok()?;
        let local = SocketAddr::try_from(rustix::net::getsockname(&self.fd).ok()?).ok()?;
        Some((peer, local))
    }

    /// Receives into `buffer`; descriptors that come along go to `files`.
    pub(super) fn receive(&self, buffer: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<Received> {
        let received = if self.takes_files {
            self.receive_with_files(buffer, files)
        } else {
            rustix::net::recv(&self.fd, buffer, RecvFlags::DONTWAIT).map(|(_, length)| length)
        };
        match received {
            Ok(0) => Ok(Received::End),
            Ok(length) => Ok(Received::Bytes(length)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(Received::Nothing),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends as much of `bytes` as the socket takes.
    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        match rustix::net::send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(length) => Ok(length),
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends `bytes`, the last, and waits for the peer's end of the connection, all in at most `patience`. What still comes is
    /// thrown away: closing a socket with unread bytes would take from the peer what it has not read either.
    pub(super) fn finish(&self, bytes: &[u8], patience: Duration) -> io::Result<()> {
        let deadline = Instant::now() + patience;
        let mut rest = bytes;
        let mut scratch = vec![0; 64 << 10];
        loop {
            if !rest.is_empty() {
                rest = &rest[self.send(rest)?..];
                if rest.is_empty() {
                    rustix::net::shutdown(&self.fd, Shutdown::Write)?;
                }
            }
            if matches!(self.receive(&mut scratch, &mut vec![])?, Received::End) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let room = if rest.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            match rustix::event::poll(&mut [PollFd::new(&self.fd, PollFlags::IN | room)], Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn receive_with_files(&self, buffer: &mut [u8], files: &mut Vec<OwnedFd>) -> Result<usize, Errno> {
        const FILES: usize = LocalImage::MAX_FILES as usize;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let message = rustix::net::recvmsg(&self.fd, &mut [io::IoSliceMut::new(buffer)], &mut ancillary, flags)?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                // What exceeds the bound is closed; the count is checked when the message is read.
                files.extend(rights.take(FILES.saturating_sub(files.len())));
            }
        }
        Ok(message.bytes)
    }
}

fn open(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?)
}

fn in_progress(result: Result<(), Errno>) -> io::Result<()> {
    match result {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(()),
        // A Unix socket whose backlog is full; connecting goes on by itself for none of them, so it counts as a failure.
        Err(error) => Err(error.into()),
    }
}
