//! The handshake of Firecracker's page-fault handlers, by which a VMM hands its memory over.
//!
//! ```text
//!   VMM                                              memtap
//!    │ connects to the Unix socket                      │ listens
//!    ├─────────────────────────────────────────────────▶│ takes its pidfd
//!    │ one message: JSON array of regions,              │
//!    │ one userfaultfd attached (SCM_RIGHTS)            │
//!    ├─────────────────────────────────────────────────▶│ checks all of it
//!    │                                                  │
//!    │ faults and discards through the userfaultfd      │
//!    │◀────────────────────────────────────────────────▶│ until every page is there, or the VMM's pidfd says that it ended
//! ```
//!
//! No answer is ever sent, and no further message comes. The first fault may come before the VMM's API answers. A userfaultfd
//! says nothing when its memory's owner ends, hence the pidfd. A VMM keeps its own copy of the userfaultfd, so that without
//! its handler it hangs at the next missing page: a handler that fails must not leave it at that.

mod message;
mod sys;

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use descriptor::memory::MemoryMap;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};
use thiserror::Error;

pub use message::{HandshakeError, MAX_MESSAGE, VmmRegion, describe, host_regions, parse};

use super::FaultPort;
use super::uffd::UffdPort;
use crate::guest::ProcessGuest;

/// How long the message may take once the VMM is connected: it is sent in one piece, right after connecting.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// A VMM that does not come, or comes with the wrong things.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AcceptError {
    /// The socket cannot be made.
    #[error("cannot listen on {path}: {source}", path = path.display())]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Nobody connected.
    #[error("no VMM connected to {path} within {waited:?}", path = path.display())]
    NobodyCame {
        /// The socket's path.
        path: PathBuf,
        /// How long the socket was there.
        waited: Duration,
    },
    /// Someone asked to stop before anybody connected.
    #[error("stopped before a VMM connected to {path}", path = path.display())]
    Stopped {
        /// The socket's path.
        path: PathBuf,
    },
    /// A VMM connected and sent nothing, or only a part.
    #[error("the VMM (process {pid}) connected, but its message did not come within {waited:?} ({received} bytes did)")]
    Slow {
        /// The VMM's process id.
        pid: i32,
        /// How long it was waited for.
        waited: Duration,
        /// How much of it came.
        received: usize,
    },
    /// A VMM connected and closed the socket.
    #[error("the VMM (process {pid}) closed the socket after {received} bytes, before its message was complete")]
    HungUp {
        /// The VMM's process id.
        pid: i32,
        /// How much came.
        received: usize,
    },
    /// Not exactly one descriptor, or one that is no userfaultfd.
    #[error("the VMM (process {pid}) sent {found} with its message, where one userfaultfd belongs")]
    Descriptors {
        /// The VMM's process id.
        pid: i32,
        /// What came.
        found: String,
    },
    /// Regions that cannot be used.
    #[error("the VMM (process {pid}) cannot be served")]
    Handshake {
        /// The VMM's process id.
        pid: i32,
        /// What is wrong.
        #[source]
        source: HandshakeError,
    },
    /// A kernel interface failed.
    #[error("{operation} failed")]
    Os {
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// The socket on which one VMM is waited for; its file is removed when the value is dropped.
pub struct HandshakeSocket {
    fd: OwnedFd,
    path: PathBuf,
}

impl HandshakeSocket {
    /// Listens at `path`, for processes of this user alone.
    ///
    /// # Errors
    /// When the socket cannot be made, as when its path exists.
    pub fn bind(path: &Path) -> Result<Self, AcceptError> {
        let listen = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // The file gets the mode that the socket has: there is no moment at which others could connect.
            rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
            rustix::net::bind(&fd, &SocketAddrUnix::new(path)?)?;
            rustix::net::listen(&fd, 1)?;
            Ok(fd)
        };
        let fd = listen().map_err(|error: Errno| AcceptError::Listen { path: path.into(), source: error.into() })?;
        Ok(Self { fd, path: path.into() })
    }

    /// Waits up to `timeout` for a VMM to connect, or until `stop` is readable. The VMM's connection stays open for as long as
    /// the guest is kept.
    ///
    /// # Errors
    /// When nobody comes.
    pub fn accept(self, timeout: Duration, stop: BorrowedFd<'_>) -> Result<(ProcessGuest, VmmSocket), AcceptError> {
        match wait_any([self.fd.as_fd(), stop], Instant::now() + timeout)? {
            [true, _] => {}
            [false, true] => return Err(AcceptError::Stopped { path: self.path.clone() }),
            [false, false] => return Err(AcceptError::NobodyCame { path: self.path.clone(), waited: timeout }),
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::accept_with(&self.fd, flags).map_err(os("accepting the VMM's connection"))?;
        let guest = peer(&socket)?;
        let pid = guest.pid();
        Ok((guest, VmmSocket { socket, pid }))
    }
}

/// The connection of a VMM. It may take a closed socket for a dead handler, so keep it for as long as the guest is served.
pub struct VmmSocket {
    socket: OwnedFd,
    pid: i32,
}

impl VmmSocket {
    /// Takes the VMM's message and checks it against the image's memory map.
    ///
    /// # Errors
    /// When the message does not come in time, or cannot be served. The VMM will hang at its next missing page: fail it.
    pub fn receive(&self, memory: &MemoryMap) -> Result<UffdPort, AcceptError> {
        let pid = self.pid;
        let (message, fds) = receive(&self.socket, pid)?;
        let uffd = check_descriptors(fds, pid)?;
        let regions = host_regions(&message, memory).map_err(|source| AcceptError::Handshake { pid, source })?;
        tracing::info!(pid, regions = regions.regions().len(), "a VMM handed its memory over");
        Ok(UffdPort::new(uffd, regions))
    }
}

impl Drop for HandshakeSocket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "the handshake socket was gone already");
        }
    }
}

/// The VMM's side: hands `port`, the memory of this process, to the handler that listens at `path`. The connection returned
/// is to be kept, and `port` to be left alone; it must not be dropped either, as a VMM keeps its userfaultfd too.
///
/// # Errors
/// When nobody listens, or the message cannot be sent.
pub fn hand_over(path: &Path, port: &UffdPort, memory: &MemoryMap) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let message = serde_json::to_vec(&describe(port.regions(), memory))?;
    let fds = [port.fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    let bytes = [io::IoSlice::new(&message)];
    let sent = rustix::net::sendmsg(&socket, &bytes, &mut ancillary, SendFlags::NOSIGNAL)?;
    if sent == message.len() { Ok(socket) } else { Err(io::ErrorKind::WriteZero.into()) }
}

fn peer(socket: &OwnedFd) -> Result<ProcessGuest, AcceptError> {
    let credentials = sockopt::socket_peercred(socket).map_err(os("reading the VMM's credentials"))?;
    let pidfd = sys::peer_pidfd(socket.as_fd()).or_else(|_before_linux_6_5| {
        rustix::process::pidfd_open(credentials.pid, rustix::process::PidfdFlags::empty()).map_err(io::Error::from)
    });
    let pidfd = pidfd.map_err(|source| AcceptError::Os { operation: "opening the VMM's pidfd", source })?;
    Ok(ProcessGuest::new(credentials.pid.as_raw_nonzero().get(), pidfd))
}

fn receive(socket: &OwnedFd, pid: i32) -> Result<(Vec<VmmRegion>, Vec<OwnedFd>), AcceptError> {
    // One descriptor more than allowed, so that two are seen as such.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let deadline = Instant::now() + MESSAGE_TIMEOUT;
    let mut bytes = vec![0; MAX_MESSAGE];
    let (mut received, mut fds) = (0, Vec::new());
    loop {
        if !wait_readable(socket, deadline)? {
            return Err(AcceptError::Slow { pid, waited: MESSAGE_TIMEOUT, received });
        }
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let spare = &mut [io::IoSliceMut::new(bytes.get_mut(received..).unwrap_or_default())];
        let message = match rustix::net::recvmsg(socket, spare, &mut ancillary, flags) {
            Ok(message) => message,
            Err(Errno::AGAIN | Errno::INTR) => continue,
            Err(error) => return Err(os("receiving the VMM's message")(error)),
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if message.bytes == 0 {
            return Err(AcceptError::HungUp { pid, received });
        }
        received += message.bytes;
        let bytes = bytes.get(..received).unwrap_or_default();
        if let Some(regions) = parse(bytes).map_err(|source| AcceptError::Handshake { pid, source })? {
            return Ok((regions, fds));
        }
    }
}

/// The one userfaultfd, made non-blocking.
fn check_descriptors(fds: Vec<OwnedFd>, pid: i32) -> Result<OwnedFd, AcceptError> {
    let count = fds.len();
    let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| {
        let found = if count == 0 { "no descriptor".into() } else { format!("{count} descriptors or more") };
        AcceptError::Descriptors { pid, found }
    })?;
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    let what =
        std::fs::read_link(link).map_err(|source| AcceptError::Os { operation: "looking at a descriptor", source })?;
    if what != Path::new("anon_inode:[userfaultfd]") {
        return Err(AcceptError::Descriptors { pid, found: what.display().to_string() });
    }
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(os("reading a descriptor's flags"))?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(os("making the userfaultfd non-blocking"))?;
    Ok(fd)
}

fn wait_readable(fd: &OwnedFd, deadline: Instant) -> Result<bool, AcceptError> {
    wait_any([fd.as_fd()], deadline).map(|[ready]| ready)
}

/// Which of these are readable, once any is; none at the deadline.
fn wait_any<const N: usize>(fds: [BorrowedFd<'_>; N], deadline: Instant) -> Result<[bool; N], AcceptError> {
    let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    loop {
        let rest = deadline.saturating_duration_since(Instant::now());
        let rest =
            Timespec { tv_sec: rest.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: rest.subsec_nanos().into() };
        match rustix::event::poll(&mut fds, Some(&rest)) {
            Ok(_) => return Ok(fds.map(|fd| !fd.revents().is_empty())),
            Err(Errno::INTR) => {}
            Err(error) => return Err(os("waiting for the VMM")(error)),
        }
    }
}

fn os(operation: &'static str) -> impl FnOnce(Errno) -> AcceptError {
    move |error| AcceptError::Os { operation, source: error.into() }
}
