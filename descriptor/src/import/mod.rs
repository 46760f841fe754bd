//! Importers: how the hypervisors' own formats become a [`crate::Descriptor`] and an [`crate::image::ImageIndex`].
//!
//! An importer reads where the pages lie and leaves them there; the image is served from the hypervisor's own files.

pub mod qemu;
pub mod raw;
pub mod xen;

use std::path::{Path, PathBuf};

/// `path` as seen from `base` where it lies below it, or else as an absolute path.
pub(crate) fn relative_to(path: &Path, base: &Path) -> PathBuf {
    let base = if base.as_os_str().is_empty() { Path::new(".") } else { base };
    let absolute = |path: &Path| path.canonicalize().or_else(|_| std::path::absolute(path));
    match (absolute(path), absolute(base)) {
        (Ok(path), Ok(base)) => path.strip_prefix(&base).map(Path::to_owned).unwrap_or(path),
        _ => path.to_owned(),
    }
}
