//! Has `xl` write the stream of a domain, watched from the outside.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime};

use descriptor::Report;
use descriptor::import::xen::stream::{Spool, Stream};

use super::error::{XlError, tail};
use super::pause::Moments;
use super::program::Xl;
use super::receiver::{KEPT, RECEIVER_ROLE, RESUME};
use crate::supervise::LogTail;

/// How often it is looked how far a capture is, and whether it is to be broken off.
const LOOK: Duration = Duration::from_millis(50);

/// How long xl may take to give up: it waits up to 60 s for a guest that it has asked to suspend.
const GIVE_UP_PATIENCE: Duration = Duration::from_secs(90);

/// How long a receiver may take to say its last word after xl has ended; it has said it before.
const LAST_WORD: Duration = Duration::from_secs(2);

/// The longest line of its that is taken as one.
const LINE_MAX: u64 = 4096;

/// The most lines of xl's log that are kept, for a hint of what went wrong.
const LOG_LINES: usize = 4096;

/// A stream that was taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    /// When the guest stood still.
    pub(super) at: SystemTime,
    /// For how long, as far as xl told.
    pub(super) pause: Option<Duration>,
    /// How long it took the guest to get there.
    pub(super) suspending: Option<Duration>,
}

/// Is told how many bytes there are; true when it is to be broken off.
pub(super) type Watch<'w> = dyn FnMut(u64) -> bool + 'w;

/// Takes a live stream of `domain` into `file` at `path`, by a receiver that connects to `socket`.
///
/// # Errors
/// When the stream does not come to its end. xl resumes the domain also then.
pub(super) fn migrate(
    xl: &Xl,
    domain: &str,
    (file, path): (&File, &Path),
    socket: &Path,
    watch: &mut Watch<'_>,
) -> Result<Taken, XlError> {
    let receiver = receiver_command(&[socket.as_os_str(), path.as_os_str()])?;
    let mut control = Control::listen(socket).map_err(|error| XlError::Os("listen for the receiver", error))?;
    let mut command = xl.lasting(&["-vvv", "migrate", "-s", "", domain, &receiver]);
    let mut process = Process::start(command.stdout(Stdio::null()))?;
    let status = process.wait(domain, &mut || {
        let is_over = watch(length(file));
        control.look(is_over);
        is_over
    })?;
    match control.last_word() {
        Some(word) if word == KEPT => Ok(process.taken()),
        Some(word) if !word.is_empty() => Err(XlError::NotTaken(word)),
        _ => Err(XlError::failed("migrate", status, &process.log)),
    }
}

/// Has xl resume a domain that was left suspended, and gives the end of what it says. It ends badly in any case; whether the domain
/// runs is for others to look at.
pub(super) fn resume(xl: &Xl, domain: &str) -> Result<LogTail, XlError> {
    let receiver = receiver_command(&[RESUME.as_ref()])?;
    let mut command = xl.lasting(&["-vvv", "migrate", "-s", "", domain, &receiver]);
    let mut process = Process::start(command.stdout(Stdio::null()))?;
    process.wait(domain, &mut || true)?;
    Ok(tail(&process.log))
}

/// Takes a stream of `domain` into `file`, while the domain stands still.
///
/// # Errors
/// When the stream does not come to its end. xl resumes the domain also then.
pub(super) fn save(xl: &Xl, domain: &str, file: &File, watch: &mut Watch<'_>) -> Result<Taken, XlError> {
    let kept = file.try_clone().map_err(|error| XlError::Os("write the stream", error))?;
    let mut command = xl.lasting(&["-vvv", "save", "-c", domain, "/proc/self/fd/1"]);
    let mut process = Process::start(command.stdout(Stdio::piped()))?;
    let stop = Arc::new(AtomicBool::new(false));
    let output = process.child.stdout.take().map(|output| Stoppable { output, stop: Arc::clone(&stop) });
    let reader = std::thread::spawn(move || match output {
        // The output is closed when this ends, well or badly: then xl cannot write, and resumes the domain.
        Some(mut output) => Stream::parse(&mut Spool::new(&mut output, kept)).map(drop),
        None => Ok(()),
    });
    let status = process.wait(domain, &mut || {
        stop.fetch_or(watch(length(file)), Ordering::Relaxed);
        stop.load(Ordering::Relaxed)
    })?;
    match reader.join() {
        Ok(Ok(())) if status.success() => Ok(process.taken()),
        Ok(Err(error)) if status.success() => Err(XlError::NotTaken(Report(&error).to_string())),
        _ => Err(XlError::failed("save", status, &process.log)),
    }
}

/// The shell's command for a receiver with these arguments.
fn receiver_command(arguments: &[&std::ffi::OsStr]) -> Result<String, XlError> {
    // As /proc has it, for the program may have been replaced by an update meanwhile.
    let mut words = vec![format!("/proc/{}/exe", std::process::id()), RECEIVER_ROLE.to_owned()];
    for argument in arguments {
        let text = argument
            .to_str()
            .ok_or_else(|| XlError::Os("hand a path that is no text to xl", io::ErrorKind::InvalidInput.into()))?;
        words.push(text.to_owned());
    }
    let quoted = words.iter().map(|word| format!("'{}'", word.replace('\'', "'\\''")));
    Ok(format!("exec {}", quoted.collect::<Vec<_>>().join(" ")))
}

fn length(file: &File) -> u64 {
    file.metadata().map_or(0, |metadata| metadata.len())
}

/// A running xl. It is never killed: it alone can resume the domain.
struct Process {
    child: Child,
    lines: Receiver<(Instant, String)>,
    log: Vec<String>,
    moments: Moments,
    ended: Instant,
}

impl Process {
    fn start(command: &mut Command) -> Result<Self, XlError> {
        // Out of reach of a terminal's Ctrl-C.
        let child = command.stderr(Stdio::piped()).process_group(0).spawn();
        let mut child = child.map_err(|source| XlError::Program { program: "/bin/sh".to_owned(), source })?;
        let (sender, lines) = channel();
        if let Some(errors) = child.stderr.take() {
            std::thread::spawn(move || {
                let mut errors = BufReader::new(errors);
                let mut line = Vec::new();
                while matches!(errors.by_ref().take(LINE_MAX).read_until(b'\n', &mut line), Ok(1..)) {
                    let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                    // A listener that has gone needs no log, but xl needs somebody to read it.
                    let _ = sender.send((Instant::now(), text));
                    line.clear();
                }
            });
        }
        Ok(Self { child, lines, log: Vec::new(), moments: Moments::default(), ended: Instant::now() })
    }

    /// Waits until it ends. When `is_over` says so it is expected to end soon, because nobody takes its stream any more.
    fn wait(&mut self, domain: &str, is_over: &mut dyn FnMut() -> bool) -> Result<ExitStatus, XlError> {
        let mut over_since: Option<Instant> = None;
        loop {
            match self.lines.recv_timeout(LOOK) {
                Ok((at, line)) => self.note(at, line),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            let is_over = is_over();
            match over_since {
                Some(since) if since.elapsed() > GIVE_UP_PATIENCE => {
                    let (pid, seconds) = (self.child.id(), GIVE_UP_PATIENCE.as_secs());
                    return Err(XlError::Stuck { pid, seconds, domain: domain.to_owned() });
                }
                None if is_over => over_since = Some(Instant::now()),
                _ => {}
            }
        }
        let status = self.child.wait().map_err(|error| XlError::Os("wait for xl", error))?;
        self.ended = Instant::now();
        Ok(status)
    }

    fn note(&mut self, at: Instant, line: String) {
        self.moments.note(&line, at);
        if self.log.len() == LOG_LINES {
            self.log.drain(..LOG_LINES / 2);
        }
        self.log.push(line);
    }

    fn taken(&self) -> Taken {
        let since = self.moments.suspended().map_or(Duration::ZERO, |suspended| suspended.elapsed());
        Taken {
            at: SystemTime::now() - since,
            pause: self.moments.pause(self.ended),
            suspending: self.moments.suspending(),
        }
    }
}

/// The capture's end of the socket that its receiver connects to.
struct Control {
    listener: Option<UnixListener>,
    receiver: Option<UnixStream>,
}

impl Control {
    fn listen(socket: &Path) -> io::Result<Self> {
        // One of an attempt before.
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener: Some(listener), receiver: None })
    }

    /// Takes the receiver in when it comes; or sends it away, so that it ends.
    fn look(&mut self, is_over: bool) {
        if is_over {
            (self.listener, self.receiver) = (None, None);
        } else if self.receiver.is_none()
            && let Some(Ok((receiver, _))) = self.listener.as_ref().map(UnixListener::accept)
        {
            self.receiver = Some(receiver);
        }
    }

    /// What the receiver said, if there was one; it has ended by now.
    fn last_word(&mut self) -> Option<String> {
        self.look(false);
        let receiver = self.receiver.take()?;
        receiver.set_nonblocking(false).and_then(|()| receiver.set_read_timeout(Some(LAST_WORD))).ok()?;
        let mut word = Vec::new();
        // What came before it broke off is as good.
        let _ = receiver.take(LINE_MAX).read_to_end(&mut word);
        Some(String::from_utf8_lossy(&word).into_owned())
    }
}

/// The output of xl, until it is not wanted any more.
struct Stoppable {
    output: ChildStdout,
    stop: Arc<AtomicBool>,
}

impl Read for Stoppable {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        self.output.read(buffer)
    }
}
