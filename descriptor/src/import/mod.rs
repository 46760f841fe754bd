//! Importers: how the hypervisors' own formats become a [`crate::Descriptor`] and an [`crate::image::ImageIndex`].
//!
//! An importer reads where the pages lie and leaves them there; the image is served from the hypervisor's own files.

pub mod qemu;
pub mod raw;
pub mod xen;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::vm::{Hypervisor, Identity};
use crate::{Endpoint, ImageId};

/// What a hypervisor's stream does not say of the capture.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The name of the new image.
    pub image: ImageId,
    /// The parent's name, for people; where it is empty, the one that the stream tells is taken, if it does.
    pub parent: String,
    /// The hypervisor's version, such as `10.0.2`; empty where it is not known, or where the stream tells it.
    pub version: String,
    /// When the parent stood still.
    pub captured: SystemTime,
    /// For how long; `None` where it did not run, or where that is not known.
    pub pause: Option<Duration>,
    /// The page servers to be written into the descriptor.
    pub servers: Vec<Endpoint>,
}

impl Origin {
    /// The identity of what was captured, as far as this tells.
    fn identity(&self, hypervisor: Hypervisor) -> Identity {
        let since_1970 = self.captured.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Identity {
            image: self.image,
            parent: self.parent.clone(),
            hypervisor,
            hypervisor_version: self.version.clone(),
            machine: String::new(),
            captured_unix_ns: u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX),
            pause_us: self.pause.map(|pause| u64::try_from(pause.as_micros()).unwrap_or(u64::MAX)),
        }
    }
}

/// `path` as seen from `base` where it lies below it, or else as an absolute path.
pub(crate) fn relative_to(path: &Path, base: &Path) -> PathBuf {
    let base = if base.as_os_str().is_empty() { Path::new(".") } else { base };
    let absolute = |path: &Path| path.canonicalize().or_else(|_| std::path::absolute(path));
    match (absolute(path), absolute(base)) {
        (Ok(path), Ok(base)) => path.strip_prefix(&base).map(Path::to_owned).unwrap_or(path),
        _ => path.to_owned(),
    }
}
