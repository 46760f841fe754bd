//! The parser of QEMU migration streams that were saved to a file.
//!
//! It reads everything but the pages: of those it only notes where they lie, so that a page server can send them from the
//! very file that QEMU wrote. All integers are big-endian; a `cstr` is a one-byte length and that many bytes.
//!
//! ```text
//! be32 "QEVM"  be32 3
//! 07 be32 len, machine type  { 05 cstr name, be32 version, data }*     CONFIGURATION and its subsections
//! 01 be32 id, cstr "ram", be32 instance, be32 4                         SECTION_START
//!    be64 total | 0x04  { cstr block, be64 length [be64 address]¹ [header, bitmap, pages]² }*  be64 0x10  7e be32 id
//! 02 be32 id  { be64 offset | flags  [cstr block]  page }*  be64 0x10  7e be32 id             SECTION_PART, repeated
//! 03 be32 id  …                                                         SECTION_END, where the RAM was completed
//! 04 be32 id, cstr device, be32 instance, be32 version, data  7e be32 id  SECTION_FULL, one per device: the device state
//! 00  06 be32 len, JSON                                                 EOF, and the description of the device state
//! ```
//!
//! ¹ With `x-ignore-shared`, whose blocks in named shared files stay there: the stream has no page of them.
//! ² With `mapped-ram`: pages lie at fixed places in the file, behind a header `be32 1, be64 page size, be64 offset of the
//! bitmap, be64 offset of the pages`; the stream goes on after the last page. The bitmap of stored pages is only written
//! when the RAM section ends, which it never does in a background snapshot: there the holes of the sparse file are the zero
//! pages.
//!
//! Versions: the stream's own has been 3 since 2009; everything else is announced by names. What the parser does not know
//! it refuses by name, and never guesses.

mod cursor;
mod error;
mod mapped;
mod pages;
mod parse;
mod ram;
mod source;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use error::StreamError;
pub use pages::{PagePlace, PageRun};
pub use source::Source;
pub(crate) use source::data_pages;

use crate::PageCount;

/// What a saved migration stream holds, but for the pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// The machine type, such as `pc-i440fx-7.2`.
    pub machine: String,
    /// The configuration's subsections as they stand in the stream, without `configuration/capabilities`, which speaks of
    /// the capture and not of the machine.
    pub configuration: Vec<u8>,
    /// The capabilities that the capture was made with, as far as QEMU records them: `x-ignore-shared`, `mapped-ram`.
    pub capabilities: Vec<String>,
    /// The section id of the RAM, which the device state counts on from.
    pub ram_section_id: u32,
    /// The RAM blocks in the order of the stream.
    pub blocks: Vec<RamBlock>,
    /// Where the pages lie, in the order of their arrival: of several copies of a page the last one counts. Pages of a block
    /// that is not [`BlockPages::External`] and which appear nowhere are zero.
    pub pages: Vec<PageRun>,
    /// True when QEMU looked for zero pages itself, so that what is stored is not zero.
    pub zeros_marked: bool,
    /// The sections of the devices as they stand in the stream.
    pub device_state: Vec<u8>,
    /// QEMU's description of the device state, in JSON.
    pub vm_description: String,
    /// The length of the file in bytes.
    pub length: u64,
}

/// One of QEMU's RAM blocks: guest memory, or the contents of a ROM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// The name, such as `pc.ram` or `/rom@etc/acpi/tables`.
    pub name: String,
    /// The size.
    pub size: PageCount,
    /// Where its pages are.
    pub pages: BlockPages,
}

/// Where the pages of a RAM block are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockPages {
    /// In the stream.
    Stream,
    /// In a file of their own, by `x-ignore-shared`.
    External,
}

impl Stream {
    /// The most bytes of device state and description that are taken in. QEMU's machines have some hundred kilobytes; only
    /// virtual graphics cards reach into the megabytes.
    pub const MAX_DEVICE_STATE: u64 = 256 << 20;

    /// Parses the stream that `source` holds from its beginning to its end.
    ///
    /// # Errors
    /// When it ends too early, has fields out of range, or uses features that cannot be forked from.
    pub fn parse(source: &(impl Source + ?Sized)) -> Result<Self, StreamError> {
        parse::stream(source)
    }
}

/// Types of sections.
mod section {
    pub(super) const EOF: u8 = 0;
    pub(super) const START: u8 = 1;
    pub(super) const PART: u8 = 2;
    pub(super) const END: u8 = 3;
    pub(super) const FULL: u8 = 4;
    pub(super) const SUBSECTION: u8 = 5;
    pub(super) const DESCRIPTION: u8 = 6;
    pub(super) const CONFIGURATION: u8 = 7;
    pub(super) const COMMAND: u8 = 8;
    pub(super) const FOOTER: u8 = 0x7e;
}
