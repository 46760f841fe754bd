use std::io;

use thiserror::Error;

use crate::{FrameSet, PageCount};

/// A migration stream that cannot be imported. Offsets are bytes from the start of the file.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The file could not be read.
    #[error("cannot read {field} at offset {offset:#x}")]
    Read {
        /// What was to be read.
        field: &'static str,
        /// Where.
        offset: u64,
        /// Why not.
        source: io::Error,
    },
    /// The file ends too early.
    #[error("the stream ends at offset {length:#x}, within {field} at {offset:#x}: the capture is not complete")]
    Truncated {
        /// What was to be read.
        field: &'static str,
        /// Where it begins.
        offset: u64,
        /// Where the stream ends.
        length: u64,
    },
    /// No migration stream.
    #[error("not a QEMU migration stream: it begins with {0:#010x}")]
    Magic(u32),
    /// A stream of another version.
    #[error("the stream has version {0}; only version 3 is known")]
    Version(u32),
    /// A number that cannot stand where it does.
    #[error("{field} at offset {offset:#x} is {value:#x}, which is not possible here")]
    Value {
        /// What the number is.
        field: &'static str,
        /// Where it stands.
        offset: u64,
        /// The number.
        value: u64,
    },
    /// A name that is no UTF-8 text.
    #[error("{field} at offset {offset:#x} is no text")]
    Text {
        /// What the text is.
        field: &'static str,
        /// Where it stands.
        offset: u64,
    },
    /// A subsection of the configuration that is not known.
    #[error("the configuration has a subsection {name:?} at offset {offset:#x}, which is not known")]
    Subsection {
        /// Its name.
        name: String,
        /// Where it begins.
        offset: u64,
    },
    /// Target pages of another size.
    #[error("the guest has pages of 2^{bits} bytes; only 4096-byte pages can be forked")]
    TargetPage {
        /// The binary logarithm of the page size.
        bits: u32,
    },
    /// A section beside the RAM that is sent while the guest runs: a disk, a VFIO device, dirty bitmaps.
    #[error("{name:?} at offset {offset:#x} is not memory but is migrated live; detach it before the capture")]
    LiveSection {
        /// Its name.
        name: String,
        /// Where it begins.
        offset: u64,
    },
    /// Device state that comes ahead of the RAM, as virtio-mem sends it.
    #[error("{name:?} at offset {offset:#x} sends its state ahead of the memory, which is not supported")]
    EarlyState {
        /// The device.
        name: String,
        /// Where it begins.
        offset: u64,
    },
    /// The stream was captured with a capability whose page format cannot be served in place.
    #[error("the page at offset {offset:#x} uses {capability}; capture again with that capability off")]
    Capability {
        /// The capability's name in QMP.
        capability: &'static str,
        /// Where the page begins.
        offset: u64,
    },
    /// A RAM block whose length is not a multiple of 4096 bytes.
    #[error("RAM block {name:?} at offset {offset:#x} has {length:#x} bytes, which are no whole pages")]
    BlockLength {
        /// The block's name.
        name: String,
        /// Where its length stands.
        offset: u64,
        /// The length in bytes.
        length: u64,
    },
    /// Two RAM blocks of one name.
    #[error("RAM block {name:?} at offset {offset:#x} appears twice")]
    DuplicateBlock {
        /// The block's name.
        name: String,
        /// Where the second one stands.
        offset: u64,
    },
    /// A page of a RAM block that the stream has not announced.
    #[error("the page at offset {offset:#x} belongs to RAM block {name:?}, which the stream did not announce")]
    UnknownBlock {
        /// The block's name.
        name: String,
        /// Where the page begins.
        offset: u64,
    },
    /// A page beyond the end of its block.
    #[error("the page at offset {offset:#x} is number {page} of RAM block {name:?}, which has {size}")]
    PageBeyondBlock {
        /// The block's name.
        name: String,
        /// The page's number in the block.
        page: u64,
        /// The block's pages.
        size: PageCount,
        /// Where the page begins in the stream.
        offset: u64,
    },
    /// More memory than can be handled.
    #[error("the RAM blocks at offset {offset:#x} have more than {max} pages", max = FrameSet::MAX_UNIVERSE)]
    TooLarge {
        /// Where the last of them stands.
        offset: u64,
    },
    /// Stored and zero pages in too many pieces.
    #[error("the stored pages lie in more than {0} pieces")]
    Fragmented(usize),
    /// An end before the device state.
    #[error("the stream ends at offset {0:#x} without device state")]
    NoDevices(u64),
    /// Device state or description larger than [`super::Stream::MAX_DEVICE_STATE`].
    #[error("{bytes} bytes of device state, more than {max}", max = super::Stream::MAX_DEVICE_STATE)]
    DeviceStateSize {
        /// How many there are.
        bytes: u64,
    },
    /// The end of the stream is not what QEMU writes.
    #[error(
        "the stream does not end with QEMU's description of the devices: the capture is not complete, or the machine has \
         suppress-vmdesc on"
    )]
    NoDescription,
}

impl StreamError {
    pub(super) fn value(field: &'static str, offset: u64, value: impl Into<u64>) -> Self {
        Self::Value { field, offset, value: value.into() }
    }
}
