//! Where the pages of an image lie, and reading them from there.
//!
//! An image is served in place, from the very files that a hypervisor wrote. An [`ExtentTable`] leads from frames to bytes
//! in those files: a raw memory file is one extent; in a streamed snapshot every page follows a few bytes of header, which an
//! extent's *stride* covers, so that a run of such pages is one extent too.

mod extent;
mod index;
mod layout;
mod reader;
mod scan;
pub(crate) mod sparse;
mod zero;

pub use extent::{Extent, ExtentError, ExtentTable, ExtentTableBuilder, Span};
pub use index::{ImageFile, ImageIndex};
pub use layout::{Content, Layout};
pub use reader::{ImageError, ImageReader, ReadPages};
pub use scan::{Survey, survey, zero_frames};
pub use zero::is_zero;
