//! The vocabulary of SnowFlock, which every other part speaks.
//!
//! - [`frame`]: guest frame numbers, page counts, ranges and sets of frames;
//! - [`memory`]: the memory map, regions of guest memory with names;
//! - [`vm`]: the descriptor of a VM, what a clone needs to begin;
//! - [`image`]: where the pages of an image lie in its files ([`image::ExtentTable`]);
//! - [`import`]: how the hypervisors' own formats become descriptors and image indexes;
//! - [`introspect`]: which frames an unmodified Linux guest holds free, and what it uses the others for;
//! - [`mod@file`]: the files that hold a descriptor or an image's index;
//! - [`cli`]: the `descriptor` command;
//! - [`working_set`]: which frames the clones of an image need, merged from what each of them tells;
//! - [`fetch`]: the protocol by which a pager asks a page server for pages, as a codec without I/O.
//!
//! What this crate deliberately does not do: it maps no memory, opens no network socket, and contains no unsafe code.
//! Page bytes are somebody else's burden; here are only the numbers that name them.
#![forbid(unsafe_code)]

pub mod cli;
mod endpoint;
pub mod fetch;
pub mod file;
pub mod frame;
pub mod image;
mod image_id;
pub mod import;
pub mod introspect;
mod leb128;
pub mod memory;
mod report;
pub mod vm;
pub mod working_set;

pub use endpoint::{Endpoint, ParseEndpointError};
pub use frame::{FrameRange, FrameSet, FrameSetError, Gfn, PAGE_SIZE, PageCount};
pub use image_id::ImageId;
pub use report::Report;
pub use vm::Descriptor;
