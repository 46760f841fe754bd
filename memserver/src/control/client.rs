//! The other end of the admin socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

pub use super::admin::{Command, Reply};

/// How long the server may take; adding an image reads its index.
const PATIENCE: Duration = Duration::from_secs(60);

/// The longest answer that is read: a status with thousands of sessions.
const MAX_REPLY: u64 = 64 << 20;

/// Why a command was not carried out.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AdminError {
    /// The server cannot be reached.
    #[error("no memserver answers at {path}", path = path.display())]
    Unreachable {
        /// The admin socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// What came back is no answer.
    #[error("memserver's answer makes no sense")]
    Nonsense(#[from] serde_json::Error),
    /// The server did not do it.
    #[error("{0}")]
    Refused(String),
}

/// Sends a command to the server at the admin socket `path`.
///
/// # Errors
/// When the server cannot be reached, or does not do it.
pub fn ask(path: &Path, command: &Command) -> Result<Reply, AdminError> {
    let unreachable = |source| AdminError::Unreachable { path: path.to_owned(), source };
    let mut line = serde_json::to_vec(command)?;
    line.push(b'\n');
    let answer = exchange(path, &line).map_err(unreachable)?;
    let reply: Reply = serde_json::from_str(&answer)?;
    if reply.ok { Ok(reply) } else { Err(AdminError::Refused(reply.error.unwrap_or_default())) }
}

/// Bytes as hexadecimal digits.
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of hexadecimal digits; `None` when they are none, or half a byte is left.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16);
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| Some((digit(pair.first()?)? * 16 + digit(pair.get(1)?)?) as u8)).collect()
}

fn exchange(path: &Path, line: &[u8]) -> io::Result<String> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(line)?;
    let mut answer = String::new();
    BufReader::new(stream).take(MAX_REPLY).read_line(&mut answer)?;
    Ok(answer)
}
