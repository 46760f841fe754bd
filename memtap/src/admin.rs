//! The admin socket of a pager: a Unix socket of mode 0600, one JSON object per line in, one per line out.
//!
//! ```text
//! {"cmd":"status"}                    → {"ok":true,"status":{…}}
//! {"cmd":"hydrate","policy":"now"}    → {"ok":true}            policy: "now", "off", or pages per second as a number
//! {"cmd":"overwrite","ranges":[[gfn,count],…]}
//!                                     → {"ok":true,"frames":N,"present":M}
//! {"cmd":"quit"}                      → {"ok":true}            the guest is failed by policy unless it is complete
//! anything else                       → {"ok":false,"error":"…"}
//! ```
//!
//! # Whole overwrites
//! A VMM or toolstack that is about to overwrite frames of the guest, every byte of them, says so with `overwrite` and waits for
//! the answer: then nothing of them will be fetched any more, and a page that was asked for before is not installed when it
//! comes. What a device reads from a disk or a network into whole pages, what a balloon hands back, what a loader fills: none
//! of it needs the parent's contents first.
//!
//! - `frames` tells how many were missing and need no fetch any more, `present` how many the clone has already; the others were
//!   zero, free, given up, or named before. Frames that are not in the guest's memory refuse the whole command.
//! - It is a promise. Until it is kept, the frames read as zeros or as in the image. A frame of which only a part will be
//!   written must not be named.
//! - Nothing depends on it: where the command fails, as with a pager that has ended because its clone is complete, the write is
//!   as right as ever, and at worst some pages travel in vain.
//! - The write itself is an ordinary one: the first touch of a missing frame faults, and the pager answers with zeros at once, for
//!   the frames named around it as well. A VMM that holds the userfaultfd may install its pages by itself; the pager
//!   finds them in place.
//! - Over huge pages, frames that are not named still come before any of their huge page can be touched. Whole huge pages cost no
//!   fetch at all.
//! - What the guest gives up by itself, a balloon or free page reporting, reaches the pager as the port's own events (`REMOVE` of
//!   a userfaultfd) and needs no command.
//!
//! `memtap/examples/overwrite.rs` is a client.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::num::NonZeroU64;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use descriptor::{FrameRange, Gfn, PageCount};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;

use crate::engine::{Command, ControlHandle, StopReason, Unanswered};
use crate::pager::Hydrate;

/// The longest command: some thousands of ranges to be overwritten, as many as a device has requests under way.
const MAX_LINE: u64 = 1 << 16;

/// Clients at one time: an operator, a monitor, a script, and as many that forgot to close.
const MAX_CLIENTS: usize = 8;

/// How long a client may be silent, or not take its answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(30);

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
    Overwrite { ranges: Vec<(u64, u64)> },
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
    let told = |error: Unanswered| error.to_string();
    let done = |sent| if sent { Ok(json!({"ok": true})) } else { Err(told(Unanswered::Ended)) };
    match serde_json::from_str(line).map_err(|error| error.to_string())? {
        Request::Status => Ok(json!({"ok": true, "status": control.ask(Command::Status).map_err(told)?})),
        Request::Overwrite { ranges } => {
            let ranges = ranges.into_iter().map(range).collect::<Result<Vec<_>, _>>()?;
            let noted = control.overwrite(ranges).map_err(|error| error.to_string())?;
            Ok(json!({"ok": true, "frames": noted.frames.get(), "present": noted.present.get()}))
        }
        Request::Hydrate { policy } => done(control.send(Command::Hydrate(hydrate(&policy)?))),
        Request::Quit => done(control.send(Command::Stop(StopReason::Admin))),
    }
}

fn range((start, count): (u64, u64)) -> Result<FrameRange, String> {
    let range = Gfn::checked(start).and_then(|start| FrameRange::checked(start, PageCount::new(count)));
    range.ok_or_else(|| format!("{count} frames from {start} on are more than any guest has"))
}

fn hydrate(policy: &Policy) -> Result<Hydrate, String> {
    match policy {
        Policy::Word(word) if word == "now" => Ok(Hydrate::Now),
        Policy::Word(word) if word == "off" => Ok(Hydrate::Off),
        Policy::Rate(rate) => Ok(NonZeroU64::new(*rate).map_or(Hydrate::Off, Hydrate::Rate)),
        Policy::Word(word) => Err(format!("hydrate policy {word:?} is neither \"now\", \"off\" nor a number")),
    }
}
