//! The one question that has to be asked of xenstored: which domain has a name.
//!
//! The protocol is Xen's `xs_wire.h`: a header of four words (kind, request, transaction, length) and a payload, both ways.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::error::XenError;

const SOCKET: &str = "/run/xenstored/socket";
/// Where the kernel forwards to xenstored, wherever that runs.
const DEVICE: &str = "/dev/xen/xenbus";

const DIRECTORY: u32 = 1;
const READ: u32 = 2;
const ERROR: u32 = 16;

/// The longest payload, as the protocol has it.
const MAX_PAYLOAD: u32 = 4096;

/// How long xenstored may take for an answer: it takes none some milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// The domain called `name`.
///
/// # Errors
/// When there is none, or xenstored does not answer.
pub fn domain_by_name(name: &str) -> Result<u16, XenError> {
    let failed = |source| XenError::Xenstore { socket: SOCKET, source };
    let mut store = connect().map_err(failed)?;
    find(&mut store, name).map_err(failed)?.ok_or_else(|| XenError::NoDomain(format!("called {name:?}")))
}

trait Stream: Read + Write {}

impl<T: Read + Write> Stream for T {}

fn connect() -> io::Result<Box<dyn Stream>> {
    match UnixStream::connect(SOCKET) {
        Ok(socket) => {
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.set_write_timeout(Some(PATIENCE))?;
            Ok(Box::new(socket))
        }
        Err(error) => match std::fs::File::options().read(true).write(true).open(DEVICE) {
            Ok(device) => Ok(Box::new(device)),
            Err(_) => Err(error),
        },
    }
}

fn find(store: &mut dyn Stream, name: &str) -> io::Result<Option<u16>> {
    let Some(domains) = ask(store, DIRECTORY, "/local/domain")? else { return Ok(None) };
    for id in domains.split(|byte| *byte == 0).filter_map(|id| std::str::from_utf8(id).ok()?.parse::<u16>().ok()) {
        // A domain may go between the two questions.
        if ask(store, READ, &format!("/local/domain/{id}/name"))?.is_some_and(|found| found == name.as_bytes()) {
            return Ok(Some(id));
        }
    }
    Ok(None)
}

/// The answer to one question, or `None` when there is no such node.
fn ask(store: &mut dyn Stream, kind: u32, path: &str) -> io::Result<Option<Vec<u8>>> {
    let words = [kind, 0, 0, path.len() as u32 + 1];
    let mut message: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    message.extend(path.as_bytes());
    message.push(0);
    store.write_all(&message)?;
    let mut header = [0; 16];
    store.read_exact(&mut header)?;
    let (words, _) = header.as_chunks::<4>();
    let (answered, length) = (u32::from_le_bytes(words[0]), u32::from_le_bytes(words[3]));
    if length > MAX_PAYLOAD {
        return Err(io::Error::other(format!("xenstored sends {length} bytes, more than its protocol allows")));
    }
    let mut payload = vec![0; length as usize];
    store.read_exact(&mut payload)?;
    match (answered == kind, answered == ERROR, payload.strip_suffix(b"\0").unwrap_or(&payload)) {
        (true, _, _) => Ok(Some(payload)),
        (_, true, b"ENOENT") => Ok(None),
        (_, true, error) => Err(io::Error::other(format!("xenstored says {}", String::from_utf8_lossy(error)))),
        _ => Err(io::Error::other(format!("xenstored answers a question of kind {kind} by {answered}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays xenstored from a list of answers.
    fn store(answers: &[(u32, &[u8])]) -> UnixStream {
        let (near, mut far) = UnixStream::pair().unwrap();
        for (kind, payload) in answers {
            let words = [*kind, 0, 0, payload.len() as u32];
            far.write_all(&words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
            far.write_all(payload).unwrap();
        }
        // The questions fit into the socket's buffer, and are read by nobody.
        std::mem::forget(far);
        near
    }

    #[test]
    fn a_domain_is_found_by_its_name() {
        let mut known =
            store(&[(DIRECTORY, b"0\x0012\x007\x00"), (READ, b"Domain-0"), (ERROR, b"ENOENT\0"), (READ, b"web")]);
        assert_eq!(find(&mut known, "web").unwrap(), Some(7));
        let mut unknown = store(&[(DIRECTORY, b"0\0"), (READ, b"Domain-0")]);
        assert_eq!(find(&mut unknown, "web").unwrap(), None);
    }

    #[test]
    fn nonsense_is_told() {
        for (answer, text) in [
            ((ERROR, b"EACCES\0".as_slice()), "EACCES"),
            ((99, b"".as_slice()), "by 99"),
            ((DIRECTORY, [0; 5000].as_slice()), "5000 bytes"),
        ] {
            let error = find(&mut store(&[answer]), "web").unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}
