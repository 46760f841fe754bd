//! QEMU, unmodified.
//!
//! - [`mod@capture`]: the capture of a running QEMU over [`qmp`];
//! - [`stream`]: a saved migration stream, read without its pages;
//! - [`Layout`]: its RAM blocks as regions of frames, and where their pages lie;
//! - [`import`]: both for files, which become a descriptor and an image index;
//! - [`CloneState`]: what the descriptor holds for the source of a clone's migration.

pub mod capture;
mod files;
mod layout;
pub mod qmp;
pub mod record;
pub mod stream;
mod vcpus;

pub use files::{ImportError, RamFile, SavedFiles, import};
pub use layout::{ExternalBlock, Layout, LayoutError};
pub use record::CloneState;
