use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use thiserror::Error;

use crate::interrupt::signal_name;

/// A child that could not be started or did not do its work, or a signal that ended the wait.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SuperviseError {
    /// The child's log or output cannot be made.
    #[error("cannot write {}", path.display())]
    Log {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The child's program cannot be run.
    #[error("cannot start {name}: {program:?} does not run")]
    Start {
        /// The child.
        name: String,
        /// Its program.
        program: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The child ended when it should not, or ended badly.
    #[error("{name} {end}{log}")]
    Failed {
        /// The child.
        name: String,
        /// How it ended.
        end: End,
        /// The end of its log.
        log: LogTail,
    },
    /// The child did not say that it is ready.
    #[error("{name} was not ready within {seconds} s{log}", seconds = patience.as_secs())]
    NotReady {
        /// The child.
        name: String,
        /// How long it had.
        patience: Duration,
        /// The end of its log.
        log: LogTail,
    },
    /// The child said something else first.
    #[error("{name} said {line:?} where its ready line was expected{log}")]
    NotAReadyLine {
        /// The child.
        name: String,
        /// What it said.
        line: String,
        /// The end of its log.
        log: LogTail,
    },
    /// A signal asked this process to end.
    #[error("interrupted by {}", signal_name(*.0))]
    Interrupted(i32),
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End(pub Option<ExitStatus>);

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use std::os::unix::process::ExitStatusExt;
        let Some(status) = self.0 else {
            return f.write_str("closed its output and did not end");
        };
        match (status.code(), status.signal()) {
            (Some(code), _) => write!(f, "ended with exit code {code}"),
            (None, Some(signal)) => write!(f, "was killed by {}", signal_name(signal)),
            (None, None) => write!(f, "ended: {status}"),
        }
    }
}

/// The last lines of a child's log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogTail(pub Vec<String>);

impl fmt::Display for LogTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("; its log is empty");
        }
        f.write_str("; the end of its log:")?;
        self.0.iter().try_for_each(|line| write!(f, "\n    | {line}"))
    }
}
