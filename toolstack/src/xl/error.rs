use std::io;
use std::process::ExitStatus;

use descriptor::import::xen::RecordError;
use thiserror::Error;

use super::config::ConfigError;
use super::domain::ParseDomainError;
use crate::supervise::{End, LogTail};

/// Something that `xl` was asked for and did not do.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum XlError {
    /// There is no `xl`.
    #[error(
        "{program:?} does not run; it comes with Xen's tools (on Debian the package xen-utils), and works in dom0 alone. \
         --xl names another one"
    )]
    Program {
        /// What was tried to be run.
        program: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// `xl` failed.
    #[error("`xl {what}` {end}{log}{hint}")]
    Failed {
        /// What it was asked for.
        what: String,
        /// How it ended.
        end: End,
        /// The end of what it said.
        log: LogTail,
        /// What to do about it.
        hint: &'static str,
    },
    /// A name that `xl` would not take for one.
    #[error("{0:?} is no name or number of a domain")]
    Name(String),
    /// There is no such domain.
    #[error("there is no domain {0:?}; `xl list` shows those that there are")]
    NoDomain(String),
    /// A clone's name is in use.
    #[error("there is a domain {0} already; give the clones other names by --name, or `xl destroy` it")]
    NameTaken(String),
    /// A name that a domain should not have.
    #[error(
        "{0:?} is no name for a clone: only letters, digits, `.`, `_` and `-` are allowed, and {{id}} where it is a template"
    )]
    CloneName(String),
    /// One name for several clones.
    #[error("{0:?} would be the name of all clones; put {{id}} into --name")]
    NamePattern(String),
    /// No clones can be made by a configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No clones can be made by the descriptor.
    #[error("{path} makes no clone")]
    Descriptor {
        /// The descriptor.
        path: String,
        /// Why not.
        #[source]
        source: RecordError,
    },
    /// A clone's domain ended badly.
    #[error("the domain {name} {end}; see the logs in {dir}")]
    Ended {
        /// The clone.
        name: String,
        /// How.
        end: &'static str,
        /// Where its logs are, for as long as the run lives.
        dir: String,
    },
    /// The list of domains is not understood.
    #[error("what `xl list` says is not understood")]
    List(#[from] ParseDomainError),
    /// The domain is in no state to be captured.
    #[error("{domain} is {state}, and cannot be captured; {advice}")]
    State {
        /// The domain's name.
        domain: String,
        /// Its state.
        state: &'static str,
        /// What to do about it.
        advice: &'static str,
    },
    /// Something of the system failed.
    #[error("cannot {0}")]
    Os(&'static str, #[source] io::Error),
    /// The stream did not come to its end.
    #[error("the stream of the domain was not taken: {0}")]
    NotTaken(String),
    /// `xl` does not end.
    #[error(
        "xl (pid {pid}) was told to give up {seconds} s ago and still works on the parent; `xl list {domain}` shows its state"
    )]
    Stuck {
        /// Its process.
        pid: u32,
        /// How long it had.
        seconds: u64,
        /// The domain.
        domain: String,
    },
    /// The parent was left suspended.
    #[error(
        "{domain} is still suspended, and could not be resumed. Try `xl migrate -s '' {domain} 'snowflock xl-receiver --resume'`, \
         or `xl resume {domain}` where xl has that. xl said{log}"
    )]
    Suspended {
        /// The domain.
        domain: String,
        /// What xl said when it was to resume it.
        log: LogTail,
        /// What went wrong before.
        #[source]
        cause: Option<Box<XlError>>,
    },
    /// The parent is not running any more.
    #[error("{domain} is {state} after the capture; {advice}")]
    After {
        /// The domain.
        domain: String,
        /// Its state.
        state: &'static str,
        /// What to do about it.
        advice: &'static str,
        /// What went wrong before.
        #[source]
        cause: Option<Box<XlError>>,
    },
}

impl XlError {
    /// Whether another method may do better.
    pub(super) fn is_of_migration(&self) -> bool {
        // A guest that does not suspend for one does not for the other.
        matches!(self, Self::Failed { hint, .. } if *hint != NO_SUSPEND)
    }

    /// Whether it says how the parent is, which is worth more than anything else.
    pub(super) fn is_of_the_parent(&self) -> bool {
        matches!(self, Self::Suspended { .. } | Self::After { .. } | Self::Stuck { .. })
    }

    /// For an `xl` that was asked for `what`, and ended badly.
    pub(super) fn failed(what: &str, status: ExitStatus, said: &[String]) -> Self {
        let (what, log) = (what.to_owned(), tail(said));
        Self::Failed { what, end: End(Some(status)), hint: hint(&log), log }
    }
}

/// How many of its last lines are shown.
const TAIL_LINES: usize = 12;

/// The last lines of what `xl` said, without what only its developers need.
pub(super) fn tail(said: &[String]) -> LogTail {
    let noise = [": debug:", ": detail:", "progress:", "verbose:"];
    let lines: Vec<&String> = said.iter().filter(|line| !noise.iter().any(|noise| line.contains(noise))).collect();
    let first = lines.len().saturating_sub(TAIL_LINES);
    LogTail(lines[first..].iter().map(|line| (*line).clone()).collect())
}

const NO_SUSPEND: &str = "\nthe guest does not answer a request to suspend: it needs the paravirtual drivers of Xen, as every Linux has them";

/// What to do about words that `xl` is known for.
fn hint(log: &LogTail) -> &'static str {
    let says = |words: &str| log.0.iter().any(|line| line.contains(words));
    if says("privileged command interface") || says("libxc handle") || says("cannot init xl context") {
        "\nxl works in dom0 alone, as root, with xenstored running"
    } else if says("No config file stored") {
        "\nthe domain was not created by xl; give the configuration to xl by `xl config-update`"
    } else if says("did not suspend") || says("didn't acknowledge suspend") {
        NO_SUSPEND
    } else {
        ""
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn what_xl_said_is_shown_without_noise() {
        let said = [
            "libxl: debug: libxl_event.c:1: much",
            "xencall: error: Could not obtain handle on privileged command interface: No such file or directory",
        ];
        let error = XlError::failed("list", ExitStatus::from_raw(256), &said.map(str::to_owned));
        let text = error.to_string();
        assert!(text.starts_with("`xl list` ended with exit code 1; the end of its log:\n    | xencall"), "{text}");
        assert!(text.ends_with("as root, with xenstored running") && !text.contains("much"), "{text}");
    }
}
