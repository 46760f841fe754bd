//! QEMU, unmodified.
//!
//! - [`stream`]: a saved migration stream, read without its pages;

pub mod stream;
