//! Frames of guest memory: numbers, counts, ranges, and sets of them.
//!
//! A frame is 4096 bytes of the image's address space. For most hypervisors its number is the guest-physical address
//! divided by 4096; a QEMU capture, whose migration stream knows memory only as (RAM block, offset), lays its blocks end to
//! end instead (see [`crate::memory`]).

mod codec;
mod number;
mod range;
mod set;

pub use codec::FrameSetError;
pub use number::{Gfn, PAGE_SIZE, PageCount};
pub use range::FrameRange;
pub use set::FrameSet;
