//! The admin socket of a pager: a Unix socket of mode 0600, one JSON object per line in, one per line out.
//!
//! ```text
//! {"cmd":"status"}                    → {"ok":true,"status":{…}}
//! {"cmd":"hydrate","policy":"now"}    → {"ok":true}            policy: "now", "off", or pages per second as a number
//! {"cmd":"quit"}                      → {"ok":true}            the guest is failed by policy unless it is complete
//! anything else                       → {"ok":false,"error":"…"}
//! ```

use std::io::{self, BufRead, BufReader, Read, Write};
use std::num::NonZeroU64;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;

use crate::engine::{Command, ControlHandle, StopReason};
use crate::pager::Hydrate;

/// The longest command: what is defined takes some tens of bytes.
const MAX_LINE: u64 = 4096;

/// Clients at one time: an operator, a monitor, a script, and as many that forgot to close.
const MAX_CLIENTS: usize = 8;

/// How long a client may be silent, or not take its answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the engine may take to answer: it does between two installations.
const ENGINE_TIMEOUT: Duration = Duration::from_secs(5);

/// A socket that cannot be made, or a pager that does not answer on it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AdminError {
    /// The socket cannot be made.
    #[error("cannot listen on {path}", path = path.display())]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Another process listens there.
    #[error("{path} is in use by another process", path = .0.display())]
    InUse(PathBuf),
    /// Nobody answers.
    #[error("no pager answers on {path}", path = path.display())]
    Ask {
        /// The socket's path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The answer is no JSON.
    #[error("the pager's answer is not understood")]
    Answer(#[source] serde_json::Error),
    /// The pager refused.
    #[error("the pager refused: {0}")]
    Refused(String),
}

#[derive(Deserialize)]
#[serde(tag = "cmd", rename_all = "lowercase", deny_unknown_fields)]
enum Request {
    Status,
    Hydrate { policy: Policy },
    Quit,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Policy {
    Word(String),
    Rate(u64),
}

/// An admin socket; its file is removed when the value is dropped.
pub struct AdminSocket {
    path: PathBuf,
}

impl AdminSocket {
    /// Listens at `path` and answers in threads of its own, which end with the process. A socket that a dead process left
    /// behind is replaced.
    ///
    /// # Errors
    /// When the path is in use or cannot be bound.
    pub fn listen(path: &Path, control: ControlHandle) -> Result<Self, AdminError> {
        if UnixStream::connect(path).is_ok() {
            return Err(AdminError::InUse(path.into()));
        }
        let failed = |source: io::Error| AdminError::Listen { path: path.into(), source };
        let is_socket = |meta: std::fs::Metadata| std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type());
        if std::fs::symlink_metadata(path).is_ok_and(is_socket) {
            std::fs::remove_file(path).map_err(failed)?;
        }
        let listener = bind(path).map_err(failed)?;
        let serve = move || serve(&listener, &control);
        std::thread::Builder::new().name("admin".into()).spawn(serve).map_err(failed)?;
        Ok(Self { path: path.into() })
    }
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "the admin socket was gone already");
        }
    }
}

/// Asks the pager at `path` one command; returns its answer without the `ok`.
///
/// # Errors
/// When nobody answers, or the pager refuses.
pub fn ask(path: &Path, command: &Value) -> Result<Value, AdminError> {
    let talk = || {
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(CLIENT_TIMEOUT))?;
        stream.write_all(format!("{command}\n").as_bytes())?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(line)
    };
    let line = talk().map_err(|source| AdminError::Ask { path: path.into(), source })?;
    let answer: Value = serde_json::from_str(&line).map_err(AdminError::Answer)?;
    if answer["ok"] == true {
        return Ok(answer);
    }
    Err(AdminError::Refused(answer["error"].as_str().unwrap_or("no reason given").into()))
}

/// A listening socket whose file has its mode from the beginning on.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&fd, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&fd, MAX_CLIENTS as i32)?;
    Ok(UnixListener::from(fd))
}

fn serve(listener: &UnixListener, control: &ControlHandle) {
    let clients = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            // Out of descriptors, most likely; others need the time to give some back.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        if clients.fetch_add(1, Ordering::Relaxed) >= MAX_CLIENTS {
            clients.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (control, counter) = (control.clone(), Arc::clone(&clients));
        let client = move || {
            if let Err(error) = talk(&stream, &control) {
                tracing::debug!(%error, "an admin client went away");
            }
            counter.fetch_sub(1, Ordering::Relaxed);
        };
        if std::thread::Builder::new().name("admin-client".into()).spawn(client).is_err() {
            clients.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn talk(stream: &UnixStream, control: &ControlHandle) -> io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_TIMEOUT))?;
    stream.set_write_timeout(Some(CLIENT_TIMEOUT))?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        (&mut reader).take(MAX_LINE).read_line(&mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        let answer = if line.ends_with('\n') { answer(&line, control) } else { Err("the command is too long".into()) };
        let answer = answer.unwrap_or_else(|error| json!({"ok": false, "error": error}));
        let mut writer = stream;
        writer.write_all(format!("{answer}\n").as_bytes())?;
        if !line.ends_with('\n') {
            return Ok(());
        }
    }
}

fn answer(line: &str, control: &ControlHandle) -> Result<Value, String> {
    let done =
        |sent| if sent { Ok(json!({"ok": true})) } else { Err("the pager has ended, or is overwhelmed".to_owned()) };
    match serde_json::from_str(line).map_err(|error| error.to_string())? {
        Request::Status => {
            let (sender, receiver) = sync_channel(1);
            done(control.send(Command::Status(sender)))?;
            let status = receiver.recv_timeout(ENGINE_TIMEOUT).map_err(|_| "the pager does not answer".to_owned())?;
            Ok(json!({"ok": true, "status": status}))
        }
        Request::Hydrate { policy } => done(control.send(Command::Hydrate(hydrate(&policy)?))),
        Request::Quit => done(control.send(Command::Stop(StopReason::Admin))),
    }
}

fn hydrate(policy: &Policy) -> Result<Hydrate, String> {
    match policy {
        Policy::Word(word) if word == "now" => Ok(Hydrate::Now),
        Policy::Word(word) if word == "off" => Ok(Hydrate::Off),
        Policy::Rate(rate) => Ok(NonZeroU64::new(*rate).map_or(Hydrate::Off, Hydrate::Rate)),
        Policy::Word(word) => Err(format!("hydrate policy {word:?} is neither \"now\", \"off\" nor a number")),
    }
}
