//! The stream from the source to the destination, as far as a source needs it. Integers are big-endian; a *cstr* is a
//! one-byte length and that many bytes.
//!
//! ```text
//! be32 "QEVM"  be32 3  07 be32 len machine                     header and CONFIGURATION
//! 08 be16 command be16 len payload                             a command
//! 01 be32 sid cstr "ram" be32 0 be32 4                         SECTION_START: every block's name and size
//!    be64 total|04  { cstr name, be64 length [be64 page size] }*  be64 10  7e be32 sid
//! 02 be32 sid  { be64 offset|flags [cstr name] page }*  be64 10  7e be32 sid     SECTION_PART: pages
//! 03 be32 sid  be64 10  7e be32 sid  00                        SECTION_END and end of file
//! ```

use descriptor::PAGE_SIZE;
use descriptor::import::qemu::CloneState;
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes, KnownLayout, Unaligned};

/// QEMU's magic and version of migration streams, in force since 2009.
const MAGIC: u32 = u32::from_be_bytes(*b"QEVM");
const VERSION: u32 = 3;

/// The RAM section's version, in force since 2012.
const RAM_VERSION: u32 = 4;

/// The version of the payload of RAM_DISCARD.
const DISCARD_VERSION: u8 = 0;

mod section {
    pub(super) const EOF: u8 = 0;
    pub(super) const START: u8 = 1;
    pub(super) const PART: u8 = 2;
    pub(super) const END: u8 = 3;
    pub(super) const CONFIGURATION: u8 = 7;
    pub(super) const COMMAND: u8 = 8;
    pub(super) const FOOTER: u8 = 0x7e;
}

mod flag {
    pub(super) const ZERO: u64 = 0x02;
    pub(super) const MEMORY_SIZE: u64 = 0x04;
    pub(super) const PAGE: u64 = 0x08;
    pub(super) const END_OF_SECTION: u64 = 0x10;
    pub(super) const CONTINUE: u64 = 0x20;
}

/// The number of a command.
#[derive(Clone, Copy)]
#[repr(u16)]
enum Command {
    OpenReturnPath = 1,
    Ping = 2,
    Advise = 3,
    Listen = 4,
    Run = 5,
    RamDiscard = 6,
    Packaged = 7,
    Resume = 9,
    ReceivedBitmap = 10,
}

#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct CommandHeader {
    kind: u8,
    command: U16,
    length: U16,
}

#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SectionHeader {
    kind: u8,
    id: U32,
}

const _: () = assert!(size_of::<CommandHeader>() == 5 && size_of::<SectionHeader>() == 5);

/// A RAM block as the stream announces it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block<'a> {
    /// The name, 1 to 255 bytes.
    pub(super) name: &'a str,
    /// The length in bytes.
    pub(super) length: u64,
    /// The size in bytes of the host pages behind it.
    pub(super) page_size: u64,
}

/// Whether a record carries a page or says that it is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RecordKind {
    /// 4096 bytes follow.
    Page,
    /// One byte 0 follows.
    Zero,
}

/// Everything from the first byte up to the device state: after it QEMU runs the clone. A PING stands right before the
/// command that runs it, so its PONG means that the device state was taken.
pub(super) fn opening(out: &mut Vec<u8>, state: &CloneState<'_>, blocks: &[Block<'_>], ping: u32) {
    push_u32(out, MAGIC);
    push_u32(out, VERSION);
    out.push(section::CONFIGURATION);
    push_u32(out, u32::try_from(state.machine.len()).expect("a machine type is a short name"));
    out.extend_from_slice(state.machine.as_bytes());
    out.extend_from_slice(state.configuration);

    command(out, Command::OpenReturnPath, &[]);
    let page_sizes = blocks.iter().fold(0, |all, block| all | block.page_size);
    command(out, Command::Advise, &two_u64(page_sizes, PAGE_SIZE));
    announce(out, state.ram_section_id, blocks);
    // QEMU leaves its listening state only after a discard, and without one deadlocks; so every block has its own.
    for block in blocks {
        let mut payload = vec![DISCARD_VERSION];
        push_cstr(&mut payload, block.name);
        payload.push(0);
        payload.extend_from_slice(&two_u64(0, block.length));
        command(out, Command::RamDiscard, &payload);
    }

    let mut package = Vec::with_capacity(state.device_state.len() + 64);
    command(&mut package, Command::Listen, &[]);
    package.extend_from_slice(state.device_state);
    command(&mut package, Command::Ping, &ping.to_be_bytes());
    command(&mut package, Command::Run, &[]);
    let length = u32::try_from(package.len()).expect("the device state's length is bounded by the caller");
    command(out, Command::Packaged, &length.to_be_bytes());
    out.extend_from_slice(&package);
}

/// Asks which pages of a block have arrived; for a paused migration alone.
pub(super) fn ask_received_bitmap(out: &mut Vec<u8>, block: &str) {
    let mut payload = Vec::with_capacity(1 + block.len());
    push_cstr(&mut payload, block);
    command(out, Command::ReceivedBitmap, &payload);
}

/// Lets a paused migration go on.
pub(super) fn resume(out: &mut Vec<u8>) {
    command(out, Command::Resume, &[]);
}

/// Begins a section of pages.
pub(super) fn begin_part(out: &mut Vec<u8>, section_id: u32) {
    section(out, section::PART, section_id);
}

/// Ends a section of pages.
pub(super) fn end_part(out: &mut Vec<u8>, section_id: u32) {
    push_u64(out, flag::END_OF_SECTION);
    section(out, section::FOOTER, section_id);
}

/// What stands before a page: its place, and its block unless it is that of the record before on the same channel.
pub(super) fn record(out: &mut Vec<u8>, kind: RecordKind, offset: u64, block: Option<&str>) {
    let kind_flag = match kind {
        RecordKind::Page => flag::PAGE,
        RecordKind::Zero => flag::ZERO,
    };
    match block {
        None => push_u64(out, offset | kind_flag | flag::CONTINUE),
        Some(name) => {
            push_u64(out, offset | kind_flag);
            push_cstr(out, name);
        }
    }
}

/// The one byte that follows the record of a zero page.
pub(super) const ZERO_FILL: u8 = 0;

/// Ends the migration: every page that did not arrive will be zero.
pub(super) fn end(out: &mut Vec<u8>, section_id: u32) {
    section(out, section::END, section_id);
    end_part(out, section_id);
    out.push(section::EOF);
}

/// Ends the preempt channel.
pub(super) fn end_preempt(out: &mut Vec<u8>) {
    push_u64(out, flag::END_OF_SECTION);
}

fn announce(out: &mut Vec<u8>, section_id: u32, blocks: &[Block<'_>]) {
    section(out, section::START, section_id);
    push_cstr(out, "ram");
    push_u32(out, 0);
    push_u32(out, RAM_VERSION);
    let total: u64 = blocks.iter().map(|block| block.length).sum();
    push_u64(out, total | flag::MEMORY_SIZE);
    for block in blocks {
        push_cstr(out, block.name);
        push_u64(out, block.length);
        if block.page_size != PAGE_SIZE {
            push_u64(out, block.page_size);
        }
    }
    end_part(out, section_id);
}

fn command(out: &mut Vec<u8>, command: Command, payload: &[u8]) {
    let length = u16::try_from(payload.len()).expect("payloads of commands are short");
    let header = CommandHeader { kind: section::COMMAND, command: (command as u16).into(), length: length.into() };
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(payload);
}

fn section(out: &mut Vec<u8>, kind: u8, id: u32) {
    out.extend_from_slice(SectionHeader { kind, id: id.into() }.as_bytes());
}

fn push_cstr(out: &mut Vec<u8>, text: &str) {
    out.push(u8::try_from(text.len()).expect("names of regions have at most 255 bytes"));
    out.extend_from_slice(text.as_bytes());
}

fn push_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_be_bytes());
}

fn push_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_be_bytes());
}

fn two_u64(first: u64, second: u64) -> [u8; 16] {
    zerocopy::transmute!([U64::new(first), U64::new(second)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
    }

    /// A machine with one block of small and one of huge pages.
    #[test]
    fn opening_golden_bytes() {
        let mut out = Vec::new();
        let blocks = [
            Block { name: "pc.ram", length: 0x20_0000, page_size: 0x20_0000 },
            Block { name: "rom", length: 0x3000, page_size: 0x1000 },
        ];
        let state = CloneState { machine: "pc", configuration: &[5], ram_section_id: 2, device_state: &[0xde, 0xad] };
        opening(&mut out, &state, &blocks, 7);
        let expected = bytes(
            "5145564d 00000003 07 00000002 7063 05
             08 0001 0000
             08 0003 0010 0000000000201000 0000000000001000
             01 00000002 03 72616d 00000000 00000004
                0000000000203004
                06 70632e72616d 0000000000200000 0000000000200000
                03 726f6d 0000000000003000
                0000000000000010 7e 00000002
             08 0006 0019 00 06 70632e72616d 00 0000000000000000 0000000000200000
             08 0006 0016 00 03 726f6d 00 0000000000000000 0000000000003000
             08 0007 0004 00000015
                08 0004 0000 dead 08 0002 0004 00000007 08 0005 0000",
        );
        assert_eq!(out, expected);
    }

    #[test]
    fn pages_golden_bytes() {
        let mut out = Vec::new();
        begin_part(&mut out, 2);
        record(&mut out, RecordKind::Zero, 0x5000, Some("pc.ram"));
        out.push(ZERO_FILL);
        record(&mut out, RecordKind::Page, 0x6000, None);
        end_part(&mut out, 2);
        end(&mut out, 2);
        end_preempt(&mut out);
        let expected = bytes(
            "02 00000002 0000000000005002 06 70632e72616d 00 0000000000006028 0000000000000010 7e 00000002
             03 00000002 0000000000000010 7e 00000002 00
             0000000000000010",
        );
        assert_eq!(out, expected);
    }

    #[test]
    fn recovery_golden_bytes() {
        let mut out = Vec::new();
        ask_received_bitmap(&mut out, "rom");
        resume(&mut out);
        assert_eq!(out, bytes("08 000a 0004 03 726f6d 08 0009 0000"));
    }
}
