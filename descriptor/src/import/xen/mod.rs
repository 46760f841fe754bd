//! Xen, by the streams of its stock toolstack.
//!
//! - [`stream`]: what `xl save` and `xl migrate` write, read without its pages, from a file or from a pipe;
//! - [`Layout`]: the guest's memory as regions of frames, and where their pages lie;
//! - [`import()`]: both for a file, which becomes a descriptor and an image index;
//! - [`hole_stream`]: what `xl restore` makes a clone of that has no memory yet; [`with_config`] makes it another domain.

mod files;
mod guest;
mod layout;
pub mod record;
pub mod stream;
mod time_info;

pub use files::{ImportError, Imported, import, read, spool};
pub use layout::{Layout, LayoutError};
pub use record::{RecordError, hole_stream, with_config};
