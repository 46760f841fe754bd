//! The descriptor of a VM: what a clone needs to begin.

use std::fmt;

use crate::memory::MemoryMap;
use crate::{Endpoint, FrameRange, FrameSet, ImageId};

/// A condensed VM image: everything that a clone needs before its first instruction, and where to get the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// What was captured, when, and how.
    pub identity: Identity,
    /// The regions of guest memory.
    pub memory: MemoryMap,
    /// The hypervisor's own records of vCPUs and devices, in the order in which it wants them.
    pub records: Vec<HypervisorRecord>,
    /// Frames that must be there before the first instruction.
    pub eager: FrameSet,
    /// Frames that hold nothing but zeros.
    pub zero: FrameSet,
    /// Frames whose contents do not matter, because the guest's allocator holds them free.
    pub free: FrameSet,
    /// Frames in the order in which they are best fetched ahead of need.
    pub prefetch: Vec<FrameRange>,
    /// Page servers of the image, the preferred one first.
    pub servers: Vec<Endpoint>,
}

impl Descriptor {
    /// The free frames that are not zero: what knowing the guest's allocator spares a clone beyond the zero frames.
    pub fn free_data(&self) -> FrameSet {
        let mut free = self.free.clone();
        free.subtract(&self.zero);
        free
    }
}

/// What was captured, when, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The image that the frames belong to.
    pub image: ImageId,
    /// The parent's name, for people.
    pub parent: String,
    /// What the parent ran on.
    pub hypervisor: Hypervisor,
    /// The hypervisor's version, such as `10.0.2`; empty where there is none.
    pub hypervisor_version: String,
    /// The hypervisor's name of the machine type, such as `pc-i440fx-7.2`; empty where there is none.
    pub machine: String,
    /// When the image was captured, in nanoseconds since 1970.
    pub captured_unix_ns: u64,
    /// How long the parent stood still, in microseconds, where it ran at all.
    pub pause_us: Option<u64>,
}

/// What a parent ran on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Hypervisor {
    /// None that the descriptor knows: plain memory.
    Raw = 0,
    /// QEMU.
    Qemu = 1,
    /// Xen.
    Xen = 2,
}

impl Hypervisor {
    /// The hypervisor with this number in files.
    pub fn from_number(number: u16) -> Option<Self> {
        [Hypervisor::Raw, Hypervisor::Qemu, Hypervisor::Xen].into_iter().find(|known| *known as u16 == number)
    }
}

impl fmt::Display for Hypervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Hypervisor::Raw => "raw",
            Hypervisor::Qemu => "qemu",
            Hypervisor::Xen => "xen",
        })
    }
}

/// One of the hypervisor's own records, kept to the byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HypervisorRecord {
    /// The hypervisor's or importer's name of the record, such as `device-state`.
    pub name: String,
    /// The bytes.
    pub data: Vec<u8>,
}
