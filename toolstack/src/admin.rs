//! Questions to the admin sockets of memserver and memtap: one JSON object per line there, one back.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;

/// The longest answer; a status with a histogram and some hundred sessions is far below.
const ANSWER_MAX: u64 = 1 << 20;

/// An admin socket that gives no answer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AdminError {
    /// The socket cannot be talked to, or not in time.
    #[error("no answer from the admin socket {}", path.display())]
    Os {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The answer is no JSON object with a status.
    #[error("the admin socket {} answered without a status", .0.display())]
    Answer(PathBuf),
}

/// Asks for the status, and gives what is in it; waits up to `patience` for each step.
///
/// # Errors
/// When nobody listens, answers in time, or answers with an object.
pub fn status(path: &Path, patience: Duration) -> Result<Value, AdminError> {
    let exchange = || -> io::Result<String> {
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        stream.write_all(format!("{}\n", json!({"cmd": "status"})).as_bytes())?;
        let mut answer = String::new();
        BufReader::new(stream.take(ANSWER_MAX)).read_line(&mut answer)?;
        Ok(answer)
    };
    let answer = exchange().map_err(|source| AdminError::Os { path: path.to_owned(), source })?;
    let mut answer: Value = serde_json::from_str(&answer).unwrap_or_default();
    let status = answer.get_mut("status").map(Value::take).filter(Value::is_object);
    status.ok_or_else(|| AdminError::Answer(path.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn answered_with(answer: &'static str) -> Result<Value, AdminError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut question = String::new();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut question).unwrap();
            assert_eq!(question, "{\"cmd\":\"status\"}\n");
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let result = status(&path, Duration::from_secs(10));
        server.join().unwrap();
        result
    }

    #[test]
    fn an_answer_has_a_status() {
        let answer = "{\"ok\":true,\"status\":{\"state\":\"running\"}}\n";
        assert_eq!(answered_with(answer).unwrap(), json!({"state": "running"}));
        assert!(matches!(answered_with("{\"ok\":false,\"error\":\"busy\"}\n"), Err(AdminError::Answer(_))));
        assert!(matches!(answered_with("[1]\n"), Err(AdminError::Answer(_))));
        assert!(matches!(answered_with("hello"), Err(AdminError::Answer(_))));
        assert!(matches!(answered_with(""), Err(AdminError::Answer(_))));
    }

    #[test]
    fn nobody_there_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let error = status(&dir.path().join("admin"), Duration::from_secs(1)).unwrap_err();
        assert!(matches!(error, AdminError::Os { .. }), "{error}");
    }
}
