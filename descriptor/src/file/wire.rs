//! The bytes of a file: fixed-width little-endian structures without padding. The table in [`super`] explains them.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first bytes of a file, the same in every version.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Preamble {
    pub(super) magic: [u8; 4],
    pub(super) kind: U16,
    pub(super) major: u8,
    pub(super) minor: u8,
}

/// What follows the preamble.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    /// The length of the whole file in bytes.
    pub(super) length: U64,
    /// The number of entries in the section table that follows.
    pub(super) sections: U32,
    pub(super) reserved: U32,
}

/// An entry of the section table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Entry {
    pub(super) kind: U32,
    pub(super) flags: U32,
    /// The length in the file in bytes.
    pub(super) stored: U64,
    /// The length after decompression in bytes.
    pub(super) plain: U64,
    /// Of the bytes as they are stored.
    pub(super) checksum: [u8; 16],
}

/// The fixed part of the section `identity`; the three texts follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Identity {
    pub(super) image: [u8; 16],
    pub(super) captured_unix_ns: U64,
    pub(super) pause_us: U64,
    pub(super) hypervisor: U16,
    /// 1 when `pause_us` is known.
    pub(super) flags: U16,
    pub(super) parent_length: U16,
    pub(super) hypervisor_version_length: U16,
    pub(super) machine_length: U16,
    pub(super) reserved: [u8; 6],
}

/// The fixed part of a region; its name follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Region {
    pub(super) start: U64,
    pub(super) count: U64,
    pub(super) kind: u8,
    pub(super) page_size: u8,
    pub(super) name_length: u8,
    pub(super) reserved: u8,
}

/// The fixed part of a hypervisor record; its name and its data follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Record {
    pub(super) data_length: U64,
    pub(super) name_length: U16,
    pub(super) reserved: [u8; 6],
}

/// The fixed part of a file of the image; its path follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct File {
    pub(super) length: U64,
    pub(super) path_length: U16,
    pub(super) reserved: [u8; 6],
}

const _: () = assert!(size_of::<Preamble>() == 8);
const _: () = assert!(size_of::<Header>() == 16);
const _: () = assert!(size_of::<Entry>() == 40);
const _: () = assert!(size_of::<Identity>() == 48);
const _: () = assert!(size_of::<Region>() == 20);
const _: () = assert!(size_of::<Record>() == 16);
const _: () = assert!(size_of::<File>() == 16);
