use thiserror::Error;

use crate::Gfn;
use crate::image::ImageError;

/// Why a guest's memory is not believed. Any of these refuses the whole analysis: a page wrongly taken for free would be lost.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Refusal {
    /// No Linux kernel that tells of itself.
    #[error("no VMCOREINFO note: the guest is no Linux, one without CONFIG_CRASH_CORE, or its memory is encrypted")]
    NoNote,
    /// Notes that disagree, as a warm reset leaves them behind, or a guest's process forges them.
    #[error("{0} kernels that differ have left VMCOREINFO notes in this memory")]
    Conflict(usize),
    /// More notes than are worth looking at.
    #[error("more than {0} VMCOREINFO notes")]
    TooManyNotes(usize),
    /// The note lacks a key that the analysis needs.
    #[error("VMCOREINFO has no {0}")]
    MissingKey(String),
    /// The note has a value that makes no sense.
    #[error("VMCOREINFO has {key}={value}")]
    BadValue {
        /// The key.
        key: String,
        /// Its value.
        value: String,
    },
    /// Pages of another size than 4096 bytes.
    #[error("the guest's pages have {0} bytes")]
    PageSize(String),
    /// A guest-physical address without memory.
    #[error("{length} bytes at guest-physical {address:#x} are not memory")]
    NotMemory {
        /// The address.
        address: u64,
        /// How many bytes were to be read.
        length: u64,
    },
    /// A kernel address that is not mapped.
    #[error("the kernel address {0:#x} is not mapped")]
    Unmapped(u64),
    /// The page tables are not where the note says.
    #[error("the kernel's page tables are not where VMCOREINFO says")]
    PageTables,
    /// The running kernel is not the one of the note.
    #[error("the kernel in memory calls itself {found:?}, its VMCOREINFO {noted:?}")]
    Release {
        /// What the kernel says.
        found: String,
        /// What the note says.
        noted: String,
    },
    /// A kernel that runs no more, or does not run yet.
    #[error("no vCPU uses the page tables of Linux {0}: the guest was reset, or is booting")]
    NotRunning(String),
    /// A hypervisor's records that do not tell what the vCPUs do.
    #[error("the hypervisor's records do not tell which page tables the vCPUs use")]
    NoVcpus,
    /// A free block of an order that does not exist.
    #[error("frame {frame:#x} heads a free block of order {order}")]
    Order {
        /// The guest-physical frame.
        frame: u64,
        /// The order.
        order: u64,
    },
    /// A free block that lies askew, or beyond its section.
    #[error("the free block of order {order} at frame {frame:#x} is misaligned or too long")]
    Misaligned {
        /// The guest-physical frame.
        frame: u64,
        /// The order.
        order: u32,
    },
    /// Two free blocks that share frames.
    #[error("free blocks overlap at frame {0:#x}")]
    Overlap(u64),
    /// A page in a free block that is in use.
    #[error("frame {0:#x} lies in a free block, but is in use")]
    InUse(u64),
    /// The zones count otherwise.
    #[error("the zones count {counted} free blocks of order {order}, {found} were found: was the guest running?")]
    Counters {
        /// The order.
        order: usize,
        /// What the zones say.
        counted: u64,
        /// What was found.
        found: u64,
    },
    /// The kernel's tables name more than the memory can hold.
    #[error("the guest's {0} is larger than its memory allows")]
    TooLarge(&'static str),
    /// The free frames are filled with something else than they should be.
    #[error("free frame {0} holds neither zeros nor poison everywhere")]
    Fill(Gfn),
    /// The image cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
}
