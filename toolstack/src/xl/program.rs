use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

use super::domain::{self, Domain};
use super::error::XlError;

/// The stock toolstack's command.
#[derive(Clone, Debug)]
pub(super) struct Xl {
    program: String,
}

impl Xl {
    pub(super) fn new(program: &str) -> Self {
        Self { program: program.to_owned() }
    }

    /// The command with these arguments, to be run to its end, whatever becomes of us: should this process or the one that
    /// reads from it be gone, it is told so by an error, not killed by SIGPIPE, and does not leave its domain suspended.
    pub(super) fn lasting(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "trap '' PIPE; exec \"$0\" \"$@\"", &self.program]).args(arguments);
        command.stdin(Stdio::null());
        command
    }

    /// Runs `xl` with these arguments, and gives what it printed.
    ///
    /// # Errors
    /// When it cannot be run, or fails.
    pub(super) fn run(&self, arguments: &[&str]) -> Result<String, XlError> {
        let Output { status, stdout, stderr } = self.output(arguments)?;
        if status.success() {
            return Ok(String::from_utf8_lossy(&stdout).into_owned());
        }
        Err(XlError::failed(arguments.first().unwrap_or(&""), status, &lines(&stderr)))
    }

    /// All domains.
    ///
    /// # Errors
    /// When `xl` does not work.
    pub(super) fn domains(&self) -> Result<Vec<Domain>, XlError> {
        Ok(domain::parse_list(&self.run(&["list"])?)?)
    }

    /// The domain of this name or number.
    ///
    /// # Errors
    /// When there is none, or `xl` does not work.
    pub(super) fn domain(&self, domain: &str) -> Result<Domain, XlError> {
        // Anything else would be an option, or no argument at all.
        if domain.is_empty() || domain.starts_with('-') {
            return Err(XlError::Name(domain.to_owned()));
        }
        let Output { status, stdout, stderr } = self.output(&["list", domain])?;
        let said = lines(&stderr);
        if !status.success() {
            // Of a name, and of a number.
            let unknown = ["invalid domain identifier", "does not exist"];
            let is_unknown = said.iter().any(|line| unknown.iter().any(|words| line.contains(words)));
            return Err(if is_unknown {
                XlError::NoDomain(domain.to_owned())
            } else {
                XlError::failed("list", status, &said)
            });
        }
        let found = domain::parse_list(&String::from_utf8_lossy(&stdout))?;
        found.into_iter().next().ok_or_else(|| XlError::NoDomain(domain.to_owned()))
    }

    fn output(&self, arguments: &[&str]) -> Result<Output, XlError> {
        // Out of reach of a terminal's Ctrl-C: what xl has begun, it is to end.
        let output = Command::new(&self.program).args(arguments).stdin(Stdio::null()).process_group(0).output();
        output.map_err(|source: io::Error| XlError::Program { program: self.program.clone(), source })
    }
}

fn lines(bytes: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(bytes).lines().map(str::to_owned).collect()
}
