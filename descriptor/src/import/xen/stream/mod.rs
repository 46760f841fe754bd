//! The parser of the streams that `xl save` and `xl migrate` write.
//!
//! It reads everything but the pages: of those it only notes where they lie, so that a page server can send them from the
//! very file that the toolstack wrote. Three layers lie one in the other; a record of the inner two is `u32 type, u32 length`,
//! the body, and zeros up to a multiple of 8 bytes. Integers are little-endian but where BE is said.
//!
//! ```text
//! xl      "Xen saved domain, xl format\n \0 \r", u32 0x01020304, u32 mandatory flags (1 JSON, 2 stream v2), u32 optional flags,
//!         u32 length, { u32 length, the domain's configuration in JSON, 0 }
//! libxl   BE u64 "LibxlFmt"  BE u32 2  BE u32 options (1 big-endian)
//!         1 LIBXC_CONTEXT, empty; behind it stands
//! libxc           u64 -1  BE u32 "XENF"  BE u32 3  BE u16 options (1 big-endian)  zero [6]
//!                 u32 type (2 HVM and PVH)  u16 page shift 12  zero [2]  u32, u32 version of Xen
//!                 17 X86_CPUID_POLICY  18 X86_MSR_POLICY  16 STATIC_DATA_END
//!                 1 PAGE_DATA  u32 count, zero [4], count × u64 (bits 60–63 type, 0–51 frame), pages;  repeated
//!                 8 X86_TSC_INFO  9 HVM_CONTEXT  10 HVM_PARAMS
//!                 0 END
//!         2 EMULATOR_XENSTORE_DATA  3 EMULATOR_CONTEXT  where there is a device model
//!         0 END
//! ```
//!
//! A live stream has pages several times; the last time counts. Of the types of pages, 0 is followed by its bytes, 14 (XALLOC)
//! has memory whose contents do not matter, 13 (BROKEN) and 15 (XTAB) have none; a stream names every hole of the guest as one
//! of the latter, a million of them below 4 GiB.
//!
//! Versions: libxc's stream has been 3 since Xen 4.14 and was 2 from 4.6 on, without STATIC_DATA_END and the policies; both are
//! read. What the parser does not know it refuses by name, unless it is marked as optional (bit 31 of the type).
//!
//! Sources: `docs/specs/libxc-migration-stream.pandoc`, `libxl-migration-stream.pandoc` and `tools/xl/xl.h` of Xen.

mod cursor;
mod error;
mod input;
mod pages;
mod parse;
mod state;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use error::{Layer, StreamError};
pub use input::{FileInput, Input, Spool, SpoolError};
pub use pages::{PagePlace, PageRun};
pub(super) use parse::{PAGE_DATA, page_data_record, xl_header};

use crate::vm::HypervisorRecord;

/// What a stream holds, but for the pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// The domain's configuration in JSON, where `xl` wrote one.
    pub config: Option<String>,
    /// The version of libxc's stream: 2 or 3.
    pub version: u32,
    /// The version of Xen that wrote it, major and minor.
    pub xen: (u32, u32),
    /// All headers and records but those of pages, to the byte, in the order of the stream. See [`super::record`] for their
    /// names.
    pub records: Vec<HypervisorRecord>,
    /// Where in [`Stream::records`] the pages belong.
    pub pages_at: usize,
    /// Where the pages lie, in the order of their arrival: of several copies of a page the last one counts.
    pub pages: Vec<PageRun>,
    /// The frequency of the guest's time stamp counter in kHz; `None` where the stream does not tell.
    pub tsc_khz: Option<u32>,
    /// The guest's virtual processors.
    pub vcpus: u32,
    /// The parameters of an HVM guest, by their numbers in Xen's `public/hvm/params.h`.
    pub params: Vec<(u64, u64)>,
    /// True when the guest has a device model, as PVH guests have not.
    pub has_device_model: bool,
    /// The length of the stream in bytes.
    pub length: u64,
}

impl Stream {
    /// The longest record that is not of pages, and the longest configuration, in bytes. A processor takes some 5 KiB, a device
    /// model's state may reach into the megabytes.
    pub const MAX_RECORD: u64 = 64 << 20;

    /// The most bytes of all such records together.
    pub const MAX_RECORDS_BYTES: u64 = 128 << 20;

    /// Parses the stream that `input` holds; nothing is read beyond its end.
    ///
    /// # Errors
    /// When it ends too early, has fields out of range, or is of a guest that cannot be forked.
    pub fn parse(input: &mut (impl Input + ?Sized)) -> Result<Self, StreamError> {
        parse::stream(input)
    }
}
