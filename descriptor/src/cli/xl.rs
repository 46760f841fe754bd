use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use clap::Args;

use super::make::{Target, Work};
use super::{CliError, Outcome};
use crate::ImageId;
use crate::file::FileKind;
use crate::import::{Origin, xen};

#[derive(Debug, Args)]
pub(super) struct XlStream {
    /// The file that xl saved to; it stays where it is, and clones are served from it. A pipe, or - for the standard input, is
    /// read to the end of the stream, which is kept in NAME.xen
    file: PathBuf,
    #[command(flatten)]
    target: Target,
}

impl XlStream {
    pub(super) fn run(&self) -> Result<Outcome, CliError> {
        self.target.check()?;
        let is_file = self.file != Path::new("-") && self.look()?.is_file();
        let (path, stream, captured) = if is_file {
            let captured = self.look()?.modified();
            let captured = captured.map_err(|source| CliError::Look { path: self.file.clone(), source })?;
            (self.file.clone(), xen::read(&self.file)?, captured)
        } else {
            let path = self.kept();
            if path.exists() && !self.target.force {
                return Err(CliError::Exists(path));
            }
            let stream = self.spool(&path)?;
            (path, stream, SystemTime::now())
        };
        let origin = Origin {
            image: ImageId::random().map_err(CliError::Random)?,
            parent: self.target.name.clone(),
            version: String::new(),
            captured,
            pause: None,
            servers: self.target.servers.clone(),
        };
        let mut work = Work::default();
        let begin = Instant::now();
        let scan = |image: &_, frames: &_| work.zero_frames(image, frames);
        let made = xen::import(&path, stream, origin, self.target.folder(), scan)?;
        work.make = begin.elapsed().saturating_sub(work.scan);
        if made.clocks < u64::from(made.vcpus) {
            eprintln!(
                "descriptor: found the clocks of {} of {} processors; a guest that knows of Xen may not resume in a clone",
                made.clocks, made.vcpus
            );
        }
        self.target.finish((made.descriptor, made.index), work)
    }

    fn look(&self) -> Result<std::fs::Metadata, CliError> {
        std::fs::metadata(&self.file).map_err(|source| CliError::Look { path: self.file.clone(), source })
    }

    /// Where a stream from a pipe goes.
    fn kept(&self) -> PathBuf {
        FileKind::Descriptor.path(&self.target.output).with_extension("xen")
    }

    fn spool(&self, path: &Path) -> Result<xen::stream::Stream, CliError> {
        if self.file == Path::new("-") {
            return Ok(xen::spool(&mut std::io::stdin().lock(), path)?);
        }
        let file = std::fs::File::open(&self.file);
        let mut file = file.map_err(|source| CliError::Look { path: self.file.clone(), source })?;
        Ok(xen::spool(&mut file, path)?)
    }
}
