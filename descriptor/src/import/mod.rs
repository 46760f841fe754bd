//! Importers: how the hypervisors' own formats become a [`crate::Descriptor`] and an [`crate::image::ImageIndex`].
//!
//! An importer reads where the pages lie and leaves them there; the image is served from the hypervisor's own files.

pub mod qemu;
