//! What the descriptor of a QEMU guest holds beside its memory.

use thiserror::Error;

use super::stream::Stream;
use super::vcpus::page_tables;
use crate::Descriptor;
use crate::vm::{Hypervisor, HypervisorRecord};

/// The names of QEMU's records in a descriptor. A record whose shape changes gets a new name.
pub mod name {
    /// The machine type in UTF-8, as the destination of a migration compares it.
    pub const MACHINE: &str = "machine";
    /// The subsections of the stream's configuration, to the byte.
    pub const CONFIGURATION: &str = "configuration";
    /// The section id of the RAM, u32 little-endian; the device state counts on from it.
    pub const RAM_SECTION_ID: &str = "ram-section-id";
    /// The sections of the devices, to the byte.
    pub const DEVICE_STATE: &str = "device-state";
    /// CR3 of every vCPU with paging turned on, u64 little-endian each; not there where QEMU's description does not tell.
    pub const PAGE_TABLES: &str = "page-tables";
}

/// What the source of a migration says to a clone, beside the RAM blocks, which are the regions of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CloneState<'d> {
    /// The machine type.
    pub machine: &'d str,
    /// The subsections that follow it.
    pub configuration: &'d [u8],
    /// The section id to send the RAM under.
    pub ram_section_id: u32,
    /// The sections of the devices.
    pub device_state: &'d [u8],
}

/// A descriptor that no QEMU clone can be made from.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordError {
    /// A descriptor of another hypervisor.
    #[error("the descriptor is of {0:?}, not of QEMU")]
    NotQemu(Hypervisor),
    /// A record that is not there.
    #[error("the descriptor has no record {0:?}")]
    Missing(&'static str),
    /// A record of another shape.
    #[error("record {name:?} of {bytes} bytes is malformed")]
    Malformed {
        /// The record's name.
        name: &'static str,
        /// Its length.
        bytes: usize,
    },
}

impl<'d> CloneState<'d> {
    /// Finds the records of QEMU in a descriptor.
    ///
    /// # Errors
    /// When it is not QEMU's, or records are missing or malformed.
    pub fn of(descriptor: &'d Descriptor) -> Result<Self, RecordError> {
        if descriptor.identity.hypervisor != Hypervisor::Qemu {
            return Err(RecordError::NotQemu(descriptor.identity.hypervisor));
        }
        let record = |name| {
            let record = descriptor.records.iter().find(|record| record.name == name);
            record.map(|record| record.data.as_slice()).ok_or(RecordError::Missing(name))
        };
        let malformed = |name, data: &[u8]| RecordError::Malformed { name, bytes: data.len() };
        let machine = record(name::MACHINE)?;
        let id = record(name::RAM_SECTION_ID)?;
        Ok(Self {
            machine: std::str::from_utf8(machine).map_err(|_| malformed(name::MACHINE, machine))?,
            configuration: record(name::CONFIGURATION)?,
            ram_section_id: u32::from_le_bytes(id.try_into().map_err(|_| malformed(name::RAM_SECTION_ID, id))?),
            device_state: record(name::DEVICE_STATE)?,
        })
    }
}

/// The records of a stream.
pub(super) fn records(stream: Stream) -> Vec<HypervisorRecord> {
    let record = |name: &str, data| HypervisorRecord { name: name.to_owned(), data };
    let tables = page_tables(&stream);
    let tables =
        tables.map(|tables| record(name::PAGE_TABLES, tables.into_iter().flat_map(u64::to_le_bytes).collect()));
    let records = [
        record(name::MACHINE, stream.machine.into_bytes()),
        record(name::CONFIGURATION, stream.configuration),
        record(name::RAM_SECTION_ID, stream.ram_section_id.to_le_bytes().to_vec()),
        record(name::DEVICE_STATE, stream.device_state),
    ];
    records.into_iter().chain(tables).collect()
}
