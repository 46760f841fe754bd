use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};
use thiserror::Error;

use super::message::{Event, Message, Version};

/// The longest line that is taken in; the answers that we ask for have some kilobytes.
const MAX_LINE: usize = 1 << 20;
/// How many events are kept that nobody asked for; then the oldest are forgotten. A capture has a dozen.
const MAX_EVENTS: usize = 1024;

/// A connection to QEMU's monitor.
///
/// Dropping it closes the connection; QEMU goes on and takes the next client.
#[derive(Debug)]
pub struct Qmp {
    path: PathBuf,
    socket: UnixStream,
    version: Version,
    timeout: Duration,
    next_id: u64,
    received: Vec<u8>,
    events: VecDeque<Event>,
}

/// A failed conversation with QEMU.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum QmpError {
    /// The socket could not be connected to, read or written.
    #[error("the QMP socket {path}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// No greeting in time.
    #[error("{path} gave no QMP greeting within {after:?}: another client may hold it, or it is no QMP socket")]
    NoGreeting {
        /// The socket.
        path: PathBuf,
        /// How long we waited.
        after: Duration,
    },
    /// No answer in time.
    #[error("QEMU gave no answer to {command} within {after:?}")]
    Timeout {
        /// The command.
        command: String,
        /// How long we waited.
        after: Duration,
    },
    /// QEMU closed the connection, most likely because it exited.
    #[error("QEMU closed the QMP connection {path}")]
    Closed {
        /// The socket.
        path: PathBuf,
    },
    /// A line that is not QMP.
    #[error("{path} sent a line of {bytes} bytes that is not QMP")]
    Malformed {
        /// The socket.
        path: PathBuf,
        /// The length of the line, or of as much of it as was taken in.
        bytes: usize,
    },
    /// QEMU refused the command.
    #[error("{command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's own words.
        description: String,
    },
    /// An answer that has not what the command is documented to answer.
    #[error("QEMU's answer to {command} has no {field}")]
    Answer {
        /// The command.
        command: &'static str,
        /// What is missing.
        field: &'static str,
    },
}

impl Qmp {
    /// Connects to the monitor at `path`. No command may take longer than `timeout` to be answered.
    ///
    /// # Errors
    /// When there is no QEMU that listens to us.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, QmpError> {
        let io = |source| QmpError::Io { path: path.to_owned(), source };
        let socket = UnixStream::connect(path).map_err(io)?;
        socket.set_write_timeout(Some(timeout)).map_err(io)?;
        let version = Version { major: 0, minor: 0, micro: 0 };
        let (received, events) = (Vec::new(), VecDeque::new());
        let mut qmp = Self { path: path.to_owned(), socket, version, timeout, next_id: 0, received, events };
        let deadline = Instant::now() + timeout;
        loop {
            match qmp.message(deadline)? {
                Some(Message::Greeting(version)) => {
                    qmp.version = version;
                    break;
                }
                Some(_) => {}
                None => return Err(QmpError::NoGreeting { path: qmp.path, after: timeout }),
            }
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// QEMU's version.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// Executes `command` with `arguments`, an object.
    ///
    /// # Errors
    /// When QEMU refuses it or does not answer in time.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let (id, line) = self.line(command, &arguments);
        let written = self.socket.write_all(&line);
        self.check(written)?;
        self.answer(command, id)
    }

    /// Like [`Qmp::execute`], and passes a file descriptor along, for `getfd` and `add-fd`.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn execute_with_fd(&mut self, command: &str, arguments: Value, fd: BorrowedFd<'_>) -> Result<Value, QmpError> {
        let (id, line) = self.line(command, &arguments);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let sent = rustix::net::sendmsg(&self.socket, &[IoSlice::new(&line)], &mut ancillary, SendFlags::NOSIGNAL);
        let rest = self.check(sent.map_err(io::Error::from))?;
        let written = self.socket.write_all(line.get(rest..).unwrap_or_default());
        self.check(written)?;
        self.answer(command, id)
    }

    /// The oldest event that was not yet taken, waiting for one up to `patience`; `None` when there is none.
    ///
    /// # Errors
    /// When the connection is lost.
    pub fn next_event(&mut self, patience: Duration) -> Result<Option<Event>, QmpError> {
        let deadline = Instant::now() + patience;
        while self.events.is_empty() {
            if self.message(deadline)?.is_none() {
                return Ok(None);
            }
        }
        Ok(self.events.pop_front())
    }

    fn line(&mut self, command: &str, arguments: &Value) -> (u64, Vec<u8>) {
        let id = self.next_id;
        self.next_id += 1;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string().into_bytes();
        line.push(b'\n');
        (id, line)
    }

    fn answer(&mut self, command: &str, expected: u64) -> Result<Value, QmpError> {
        let command = || command.to_owned();
        let deadline = Instant::now() + self.timeout;
        loop {
            match self.message(deadline)? {
                Some(Message::Return { id, value }) if id == Some(expected) => return Ok(value),
                // An error without an id is about a line that QEMU could not read.
                Some(Message::Error { id, description }) if id.is_none_or(|id| id == expected) => {
                    return Err(QmpError::Refused { command: command(), description });
                }
                Some(_) => {}
                None => return Err(QmpError::Timeout { command: command(), after: self.timeout }),
            }
        }
    }

    /// The next message, of which events were put aside; `None` when none comes before `deadline`.
    fn message(&mut self, deadline: Instant) -> Result<Option<Message>, QmpError> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                let message = Message::parse(&line);
                let malformed = || QmpError::Malformed { path: self.path.clone(), bytes: line.len() };
                let message = message.ok_or_else(malformed)?;
                if let Message::Event(event) = &message {
                    self.keep(event.clone());
                }
                return Ok(Some(message));
            }
            if self.received.len() > MAX_LINE {
                return Err(QmpError::Malformed { path: self.path.clone(), bytes: self.received.len() });
            }
            if !self.receive(deadline)? {
                return Ok(None);
            }
        }
    }

    fn keep(&mut self, event: Event) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// Takes in what QEMU has sent; false when that is nothing before `deadline`.
    fn receive(&mut self, deadline: Instant) -> Result<bool, QmpError> {
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Ok(false);
        }
        let limited = self.socket.set_read_timeout(Some(rest));
        self.check(limited)?;
        let mut bytes = [0; 16 << 10];
        match self.socket.read(&mut bytes) {
            Ok(0) => Err(QmpError::Closed { path: self.path.clone() }),
            Ok(count) => {
                self.received.extend_from_slice(&bytes[..count]);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                Err(QmpError::Closed { path: self.path.clone() })
            }
            Err(source) => Err(QmpError::Io { path: self.path.clone(), source }),
        }
    }

    fn check<T>(&self, result: io::Result<T>) -> Result<T, QmpError> {
        result.map_err(|source| match source.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => QmpError::Closed { path: self.path.clone() },
            _ => QmpError::Io { path: self.path.clone(), source },
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixListener;

    use super::*;

    const GREETING: &str =
        r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}, "capabilities": []}}"#;

    /// A client, and a thread that answers the commands after the handshake with these lines in turn.
    fn client(answers: &'static [&'static str], timeout: Duration) -> (Result<Qmp, QmpError>, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(socket.try_clone().unwrap()).lines();
            for answer in [GREETING, r#"{"return": {}, "id": 0}"#].iter().chain(answers) {
                writeln!(socket, "{answer}").unwrap();
                lines.next();
            }
        });
        (Qmp::connect(&path, timeout), folder)
    }

    #[test]
    fn answers_events_and_errors() {
        let answers = &[
            "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 5}, \"event\": \"STOP\"}\r\n{\"return\": 7, \"id\": 1}",
            r#"{"id": 2, "error": {"class": "GenericError", "desc": "Device 'x' not found"}}"#,
            "{\"return\": 0, \"id\": 1}\n{\"return\": 8, \"id\": 3}",
        ];
        let (qmp, _folder) = client(answers, Duration::from_secs(20));
        let mut qmp = qmp.unwrap();
        assert_eq!(qmp.version().to_string(), "10.0.2");
        assert_eq!(qmp.execute("a", json!({})).unwrap(), 7);
        assert_eq!(qmp.next_event(Duration::ZERO).unwrap().unwrap().name, "STOP");
        assert_eq!(qmp.next_event(Duration::ZERO).unwrap(), None);
        let refused = qmp.execute("b", json!({})).unwrap_err();
        assert_eq!(refused.to_string(), "b: Device 'x' not found");
        let file = tempfile::tempfile().unwrap();
        assert_eq!(qmp.execute_with_fd("c", json!({}), file.as_fd()).unwrap(), 8, "a stale answer is passed over");
        assert!(matches!(qmp.execute("d", json!({})), Err(QmpError::Closed { .. })));
    }

    #[test]
    fn what_is_not_qmp_is_an_error() {
        let (qmp, _folder) = client(&["hello"], Duration::from_secs(20));
        assert!(matches!(qmp.unwrap().execute("a", json!({})), Err(QmpError::Malformed { bytes: 6, .. })));
    }

    #[test]
    fn silence_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let _listener = UnixListener::bind(&path).unwrap();
        let silence = Qmp::connect(&path, Duration::from_millis(50)).unwrap_err();
        assert!(matches!(silence, QmpError::NoGreeting { .. }), "{silence}");
        let absent = Qmp::connect(&folder.path().join("none"), Duration::from_millis(50)).unwrap_err();
        assert!(matches!(absent, QmpError::Io { .. }));
    }
}
