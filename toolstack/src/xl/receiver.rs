//! The receiver that `xl migrate` starts in place of one on another host: a role of this program.
//!
//! ```text
//! snowflock capture xl                 xl migrate                            snowflock xl-receiver SOCKET FILE
//!   listens at SOCKET, makes FILE
//!   starts xl             ───────────▶   starts its receiver    ───────────▶   connects to SOCKET
//!                                        waits for the banner   ◀───────────   "xl migration receiver ready, …"
//!                                        a live stream          ───────────▶   writes it to FILE
//!                                        suspends the guest, the rest ─────▶   up to the stream's end
//!                                        "Migration failed,     ◀───────────   anything but "ready to unpause"
//!   "kept"                ◀──────────────  resuming at sender" ─┼───────────   and ends
//!   xl has ended          ◀───────────
//! ```
//!
//! The receiver ends when SOCKET is closed, be it that the capture gives up or that it was killed; then xl cannot write any more,
//! and resumes the guest. So nobody who dies leaves the guest suspended but xl itself.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use descriptor::Report;
use descriptor::import::xen::stream::{Spool, Stream, StreamError};
use thiserror::Error;

/// The hidden role's name.
pub const RECEIVER_ROLE: &str = "xl-receiver";

/// The role's only argument when it is to take no more than the beginning.
pub(super) const RESUME: &str = "--resume";

/// How much of a stream is the beginning: some hundred pages, which xl sends before it asks the guest to suspend. A receiver that goes
/// before the first of them makes xl 4.17 crash, and resume nobody.
const BEGINNING: u64 = 1 << 20;

/// What it says when it has the whole stream.
pub(super) const KEPT: &str = "kept";

/// What a receiver says first (`migrate_receiver_banner` in Xen's `tools/xl/xl.h`).
const BANNER: &[u8] = b"xl migration receiver ready, send binary domain data.\n";

/// What it says in the end, which must not begin as `migrate_receiver_ready` does, for then xl would go on and destroy the domain. xl
/// reads as many bytes as that has, and waits no longer.
const ANSWER: &[u8] = b"snowflock has what it wants: let the domain go on where it is\n";

/// Why a stream was not taken.
#[derive(Debug, Error)]
enum ReceiveError {
    #[error("the arguments are not those of a receiver")]
    Arguments,
    #[error("nobody waits for what is received")]
    Parent(#[source] io::Error),
    #[error("cannot write to the file for the stream")]
    File(#[source] io::Error),
    #[error("cannot answer to xl")]
    Answer(#[source] io::Error),
    #[error("the stream is not understood")]
    Stream(#[from] StreamError),
    #[error("cannot read the beginning of the stream")]
    Beginning(#[source] io::Error),
}

/// Runs the role with the arguments behind its name.
pub fn receive(arguments: &[OsString]) -> ExitCode {
    let received = match arguments {
        [resume] if resume == RESUME => let_resume(),
        [socket, file] => take(socket, file),
        _ => Err(ReceiveError::Arguments),
    };
    match received {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("snowflock {RECEIVER_ROLE}: {}", Report(&error));
            ExitCode::FAILURE
        }
    }
}

fn take(socket: &OsString, file: &OsString) -> Result<(), ReceiveError> {
    let mut parent = UnixStream::connect(socket).map_err(ReceiveError::Parent)?;
    let taken = end_with(&parent).and_then(|()| {
        // Made by the capture, so that nobody but its owner can read it.
        let file = File::options().write(true).open(file).map_err(ReceiveError::File)?;
        converse(&mut io::stdin().lock(), &mut io::stdout().lock(), file)
    });
    let word = match &taken {
        Ok(()) => KEPT.to_owned(),
        Err(error) => Report(error).to_string(),
    };
    // A capture that is gone meanwhile wants to hear nothing.
    let _ = parent.write_all(word.as_bytes());
    taken
}

/// Ends this process as soon as nobody holds the other end of `parent`.
fn end_with(parent: &UnixStream) -> Result<(), ReceiveError> {
    let mut parent = parent.try_clone().map_err(ReceiveError::Parent)?;
    let watch = move || {
        let mut byte = [0];
        while matches!(parent.read(&mut byte), Ok(1..)) {}
        std::process::exit(1);
    };
    std::thread::Builder::new().name("parent".into()).spawn(watch).map_err(ReceiveError::Parent)?;
    Ok(())
}

/// The whole conversation with xl: the banner, the stream, which goes to `file`, the answer.
fn converse(from: &mut impl Read, to: &mut impl Write, file: File) -> Result<(), ReceiveError> {
    to.write_all(BANNER).and_then(|()| to.flush()).map_err(ReceiveError::Answer)?;
    Stream::parse(&mut Spool::new(from, file))?;
    // From the last record on the guest stands still for nothing but this.
    to.write_all(ANSWER).and_then(|()| to.flush()).map_err(ReceiveError::Answer)
}

/// Has xl resume a domain that an earlier one left suspended: its migration fails, and that is what it then does.
fn let_resume() -> Result<(), ReceiveError> {
    let mut to = io::stdout().lock();
    to.write_all(BANNER).and_then(|()| to.flush()).map_err(ReceiveError::Answer)?;
    let taken = io::copy(&mut io::stdin().lock().take(BEGINNING), &mut io::sink());
    taken.map(drop).map_err(ReceiveError::Beginning)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_never_that_of_a_receiver_that_takes_the_domain() {
        let ready = b"domain received, ready to unpause\0";
        assert!(ANSWER.len() >= ready.len(), "xl would wait for more");
        assert!(!ANSWER.starts_with(&ready[..1]));
        assert_eq!(BANNER.len(), 54);
    }

    #[test]
    fn what_is_no_stream_is_not_answered() {
        let mut said = Vec::new();
        let file = tempfile::tempfile().unwrap();
        let error = converse(&mut &b"Xen saved domain, cut"[..], &mut said, file).unwrap_err();
        assert!(matches!(error, ReceiveError::Stream(StreamError::Truncated { .. })), "{error:?}");
        assert_eq!(said, BANNER);
    }
}
