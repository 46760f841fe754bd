//! What forking competes with: the whole memory copied before the clone may begin.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::Lane;

/// Large enough that system calls do not count, small enough for the cache.
const CHUNK: usize = 1 << 20;

/// Copies the image once into fresh memory over the kind of socket of `lane` (no socket at all for the local lane), and says how
/// long that took.
///
/// # Errors
/// When the image cannot be read or the kernel gives no socket.
pub(super) fn measure(image: &Path, lane: Lane) -> io::Result<Duration> {
    let mut file = File::open(image)?;
    let length = usize::try_from(file.metadata()?.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let mut memory = Vec::with_capacity(length);
    let started = Instant::now();
    match lane {
        Lane::Local => {
            file.read_to_end(&mut memory)?;
        }
        Lane::Unix => {
            let (here, there) = UnixStream::pair()?;
            over_socket(file, there, here, &mut memory)?;
        }
        Lane::Tcp => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            let there = TcpStream::connect(listener.local_addr()?)?;
            let (here, _) = listener.accept()?;
            over_socket(file, there, here, &mut memory)?;
        }
    }
    let taken = started.elapsed();
    if memory.len() == length { Ok(taken) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

fn over_socket(
    mut file: File,
    mut there: impl Write + Send,
    mut here: impl Read,
    memory: &mut Vec<u8>,
) -> io::Result<()> {
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || -> io::Result<()> {
            let mut chunk = vec![0; CHUNK];
            loop {
                let read = file.read(&mut chunk)?;
                let Some(bytes) = chunk.get(..read).filter(|bytes| !bytes.is_empty()) else {
                    return Ok(());
                };
                there.write_all(bytes)?;
            }
        });
        let received = here.read_to_end(memory);
        // Should reading have failed, the sender must not wait for a reader any more.
        drop(here);
        received?;
        sender.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lane_copies_all() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![7; CHUNK + 5]).unwrap();
        for lane in [Lane::Tcp, Lane::Unix, Lane::Local] {
            assert!(measure(file.path(), lane).unwrap() > Duration::ZERO);
        }
    }
}
