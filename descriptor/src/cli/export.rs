use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::{CliError, Outcome};
use crate::Descriptor;
use crate::import::xen::hole_stream;

#[derive(Debug, Subcommand)]
pub(super) enum Export {
    /// For `xl restore -p CONFIG FILE`: a stream with the guest's state and without its memory
    Xl(Xl),
}

#[derive(Debug, Args)]
pub(super) struct Xl {
    /// The descriptor (.snow) of a Xen guest
    descriptor: PathBuf,
    /// The file to write; - for the standard output
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Replace a file that exists
    #[arg(long)]
    force: bool,
}

impl Export {
    pub(super) fn run(&self) -> Result<Outcome, CliError> {
        match self {
            Export::Xl(xl) => xl.run(),
        }
    }
}

impl Xl {
    fn run(&self) -> Result<Outcome, CliError> {
        let descriptor = Descriptor::read(&self.descriptor)?;
        let stream =
            hole_stream(&descriptor).map_err(|source| CliError::NoStream { path: self.descriptor.clone(), source })?;
        if self.output == Path::new("-") {
            let mut out = io::stdout().lock();
            out.write_all(&stream).and_then(|()| out.flush()).map_err(CliError::Output)?;
            return Ok(Outcome::Good);
        }
        let failed = |source| CliError::Write { path: self.output.clone(), source };
        let special = std::fs::metadata(&self.output).is_ok_and(|metadata| !metadata.is_file());
        let mut options = OpenOptions::new();
        // It holds the guest's registers. What is no regular file, as a pipe, is there to be written to.
        options.write(true).mode(0o600).create(true).truncate(self.force).create_new(!self.force && !special);
        let mut file = options.open(&self.output).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => CliError::Exists(self.output.clone()),
            _ => failed(source),
        })?;
        file.write_all(&stream).map_err(failed)?;
        Ok(Outcome::Good)
    }
}
