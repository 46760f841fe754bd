//! Binding of the endpoints.

use std::fs;
use std::io;
use std::net::{Shutdown, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use descriptor::Endpoint;
use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};

use crate::ServeError;

/// Connections that wait to be accepted: a whole fleet of clones starts at once.
const BACKLOG: i32 = 1024;

/// Bytes that the kernel takes ahead of what the network has sent. A demand answer waits behind no more than these on its
/// connection.
const UNSENT: u32 = 256 << 10;

/// Silence on a connection after which the kernel asks whether the peer is there.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// How often, and after which pauses, to look again whether somebody listens at a socket: the kernel takes the ring of a
/// killed server down in its own time, and until then its sockets seem to listen. Together a second.
const STALE_LOOKS: u32 = 20;
const STALE_PAUSE: Duration = Duration::from_millis(50);

/// A bound endpoint as one ring has it.
#[derive(Clone, Debug)]
pub(crate) struct Listener {
    /// The endpoint, with the port that was given where it was asked to be any.
    pub(crate) endpoint: Endpoint,
    socket: Arc<Socket>,
}

/// The file of a Unix socket, removed when dropped.
#[derive(Debug)]
pub(crate) struct SocketFile(PathBuf);

/// Binds `endpoint` for `rings` rings: as many TCP sockets, among which the kernel distributes connections, or one Unix
/// socket of that mode that they share.
pub(crate) fn bind(
    endpoint: &Endpoint,
    rings: usize,
    mode: u32,
) -> Result<(Vec<Listener>, Option<SocketFile>), ServeError> {
    let failed = |source| ServeError::Listen { endpoint: endpoint.to_string(), source };
    match endpoint {
        Endpoint::Tcp(address) => Ok((bind_tcp(address, rings).map_err(failed)?, None)),
        Endpoint::Unix(path) => {
            let (socket, file) = bind_unix(path, mode).map_err(failed)?;
            let listener = Listener { endpoint: endpoint.clone(), socket: Arc::new(socket) };
            Ok((vec![listener; rings], Some(file)))
        }
    }
}

/// Binds a Unix socket of that mode, whatever the umask. A socket file that nobody listens at any more is replaced.
pub(crate) fn bind_unix(path: &Path, mode: u32) -> io::Result<(Socket, SocketFile)> {
    remove_stale(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // The umask may take away from what the file gets from its socket. Nobody can connect before it listens.
    crate::sys::set_mode(&socket, mode)?;
    socket.bind(&SockAddr::unix(path)?)?;
    let file = SocketFile(path.to_owned());
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    socket.listen(BACKLOG)?;
    Ok((socket, file))
}

fn bind_tcp(address: &str, rings: usize) -> io::Result<Vec<Listener>> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        let first = match tcp_socket(&address.into(), rings > 1) {
            Ok(socket) => socket,
            Err(error) => {
                last = error;
                continue;
            }
        };
        let bound = first.local_addr()?;
        let mut sockets = vec![first];
        for _ in 1..rings {
            sockets.push(tcp_socket(&bound, true)?);
        }
        let address = bound.as_socket().ok_or(io::ErrorKind::InvalidData)?;
        let listener = |socket| Listener { endpoint: Endpoint::Tcp(address.to_string()), socket: Arc::new(socket) };
        return Ok(sockets.into_iter().map(listener).collect());
    }
    Err(last)
}

/// A listening socket. Its options pass to the sockets that it accepts.
fn tcp_socket(address: &SockAddr, shared: bool) -> io::Result<Socket> {
    let socket = Socket::new(address.domain(), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    // Where one ring suffices, a second server on the same port is a mistake to be told of.
    socket.set_reuse_port(shared)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(UNSENT)?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))?;
    socket.bind(address)?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// Removes a socket file that nobody listens at, or soon nobody will.
fn remove_stale(path: &Path) -> io::Result<()> {
    let mut result = try_remove_stale(path);
    for _ in 0..STALE_LOOKS {
        if !result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse) {
            break;
        }
        std::thread::sleep(STALE_PAUSE);
        result = try_remove_stale(path);
    }
    result
}

fn try_remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"))
        }
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
            // Its server has removed it just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another program listens there")),
        },
    }
}

impl Listener {
    /// True for TCP.
    pub(crate) fn is_tcp(&self) -> bool {
        matches!(self.endpoint, Endpoint::Tcp(_))
    }

    /// Ends listening: accepts under way fail, and clients are turned away instead of waiting for one.
    pub(crate) fn stop(&self) {
        // Another ring may have done it to a socket that they share.
        if let Err(error) = self.socket.shutdown(Shutdown::Read) {
            tracing::trace!(%error, endpoint = %self.endpoint, "stop listening");
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::debug!(%error, path = %self.0.display(), "socket file not removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_socket_is_left_alone_and_a_dead_one_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (socket, file) = bind_unix(&path, 0o600).unwrap();
        assert_eq!(bind_unix(&path, 0o600).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(socket);
        std::mem::forget(file);
        let (_socket, file) = bind_unix(&path, 0o600).unwrap();
        drop(file);
        assert!(!path.exists());
        fs::write(&path, "text").unwrap();
        assert_eq!(bind_unix(&path, 0o600).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn a_socket_that_is_about_to_die_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (socket, file) = bind_unix(&path, 0o600).unwrap();
        std::mem::forget(file);
        let waiting = UnixStream::connect(&path).unwrap();
        let dying = std::thread::spawn(move || {
            std::thread::sleep(STALE_PAUSE * 2);
            drop((socket, waiting));
        });
        let (_socket, _file) = bind_unix(&path, 0o600).unwrap();
        dying.join().unwrap();
    }

    #[test]
    fn a_socket_has_its_mode_whatever_the_umask() {
        let folder = tempfile::tempdir().unwrap();
        for mode in [0o600, 0o660, 0o666] {
            let path = folder.path().join(format!("{mode:o}"));
            let (_listeners, _file) = bind(&Endpoint::Unix(path.clone()), 2, mode).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, mode);
        }
    }

    #[test]
    fn rings_share_a_port() {
        let (listeners, _) = bind(&Endpoint::Tcp("127.0.0.1:0".into()), 3, 0o600).unwrap();
        assert_eq!(listeners.len(), 3);
        assert!(listeners.iter().all(|listener| listener.endpoint == listeners[0].endpoint));
        let (_, taken) =
            listeners[0].endpoint.to_string().split_once("tcp://").map(|(_, a)| ((), a.to_owned())).unwrap();
        assert!(bind(&Endpoint::Tcp(taken), 1, 0o600).is_err());
    }
}
