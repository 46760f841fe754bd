use std::path::Path;

use zerocopy::IntoBytes;

use super::container::{Container, ContainerWriter};
use super::parts::{check_count, check_length, check_set, decode_memory, decode_set, encode_memory};
use super::section::Cursor;
use super::{ContentError, FileError, FileKind, FormatError, SectionKind, disk, wire};
use crate::leb128::{push_number, push_signed, signed};
use crate::memory::MemoryMap;
use crate::vm::{Hypervisor, HypervisorRecord, Identity};
use crate::{Descriptor, Endpoint, FrameRange, Gfn, ImageId, PageCount};

/// Set where the pause is known.
const PAUSE_KNOWN: u16 = 1;

impl Descriptor {
    /// The longest text of the [`Identity`] in bytes; names of machines and people's machines fit many times over.
    pub const MAX_TEXT: usize = 1024;

    /// The longest name of a record in bytes.
    pub const MAX_RECORD_NAME: usize = 255;

    /// The most records; a hypervisor has one for each device and vCPU at most.
    pub const MAX_RECORDS: usize = 65536;

    /// The most page servers; a clone tries them in turn, and more than these would take it too long.
    pub const MAX_SERVERS: usize = 64;

    /// The descriptor as a file's bytes.
    ///
    /// # Panics
    /// When [`Descriptor::check`] refuses it.
    pub fn encode(&self) -> Vec<u8> {
        if let Err(error) = self.check() {
            panic!("descriptor that cannot be encoded: {error}");
        }
        let mut writer = ContainerWriter::new(FileKind::Descriptor);
        writer.required(SectionKind::IDENTITY, &encode_identity(&self.identity));
        writer.required(SectionKind::MEMORY, &encode_memory(&self.memory));
        if !self.records.is_empty() {
            writer.required(SectionKind::RECORDS, &encode_records(&self.records));
        }
        writer.optional(SectionKind::EAGER, &self.eager.encode());
        writer.optional(SectionKind::ZERO, &self.zero.encode());
        writer.optional(SectionKind::FREE, &self.free.encode());
        writer.optional(SectionKind::PREFETCH, &encode_prefetch(&self.prefetch));
        writer.optional(SectionKind::SERVERS, &encode_servers(&self.servers));
        writer.finish()
    }

    /// The descriptor in a file's bytes.
    ///
    /// # Errors
    /// When the bytes are damaged or malformed, or hold something else.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let container = Container::expect(bytes, FileKind::Descriptor)?;
        let identity = decode_identity(&container)?;
        let memory = decode_memory(&container)?;
        let descriptor = Self {
            identity,
            records: decode_records(&container)?,
            eager: decode_set(&container, SectionKind::EAGER, &memory)?,
            zero: decode_set(&container, SectionKind::ZERO, &memory)?,
            free: decode_set(&container, SectionKind::FREE, &memory)?,
            prefetch: decode_prefetch(&container, &memory)?,
            servers: decode_servers(&container)?,
            memory,
        };
        descriptor.check()?;
        Ok(descriptor)
    }

    /// The descriptor in the file at `path`.
    ///
    /// # Errors
    /// When the file cannot be read, or as [`Descriptor::decode`].
    pub fn read(path: &Path) -> Result<Self, FileError> {
        disk::read(path, Self::decode)
    }

    /// Writes the descriptor to `path`, whole or not at all: into a temporary file of the same folder, which is synced
    /// and renamed. Only its owner may read the file, for it holds the registers of the guest.
    ///
    /// # Errors
    /// When the file cannot be written, or [`Descriptor::check`] refuses the descriptor.
    pub fn write(&self, path: &Path) -> Result<(), FileError> {
        self.check().map_err(|source| FileError::Unwritable { path: path.to_owned(), source })?;
        disk::write(path, &self.encode())
    }

    /// Checks that the parts fit together: sets and orders hold only frames of the memory map, names and lists are within
    /// their bounds. Decoded descriptors always pass.
    ///
    /// # Errors
    /// Names the first part that does not fit.
    pub fn check(&self) -> Result<(), ContentError> {
        let Identity { parent, hypervisor_version, machine, .. } = &self.identity;
        check_length("parent's name", parent.len(), 0, Self::MAX_TEXT)?;
        check_length("hypervisor's version", hypervisor_version.len(), 0, Self::MAX_TEXT)?;
        check_length("machine type", machine.len(), 0, Self::MAX_TEXT)?;
        check_count("hypervisor records", self.records.len(), 0, Self::MAX_RECORDS)?;
        for record in &self.records {
            check_length("name of a hypervisor record", record.name.len(), 1, Self::MAX_RECORD_NAME)?;
        }
        check_set("eager", &self.eager, &self.memory)?;
        check_set("zero", &self.zero, &self.memory)?;
        check_set("free", &self.free, &self.memory)?;
        for (index, run) in self.prefetch.iter().enumerate() {
            if run.is_empty() {
                return Err(ContentError::EmptyRun { index });
            }
            if !self.memory.covers(*run) {
                return Err(ContentError::Absent { what: "prefetch order", frames: *run });
            }
        }
        check_count("servers", self.servers.len(), 0, Self::MAX_SERVERS)?;
        for server in &self.servers {
            let text = server.to_string();
            if text.parse().as_ref() != Ok(server) {
                return Err(ContentError::Server(text));
            }
        }
        Ok(())
    }
}

fn encode_identity(identity: &Identity) -> Vec<u8> {
    let Identity { parent, hypervisor_version, machine, .. } = identity;
    let fixed = wire::Identity {
        image: identity.image.to_bytes(),
        captured_unix_ns: identity.captured_unix_ns.into(),
        pause_us: identity.pause_us.unwrap_or(0).into(),
        hypervisor: (identity.hypervisor as u16).into(),
        flags: if identity.pause_us.is_some() { PAUSE_KNOWN } else { 0 }.into(),
        parent_length: (parent.len() as u16).into(),
        hypervisor_version_length: (hypervisor_version.len() as u16).into(),
        machine_length: (machine.len() as u16).into(),
        reserved: [0; 6],
    };
    [fixed.as_bytes(), parent.as_bytes(), hypervisor_version.as_bytes(), machine.as_bytes()].concat()
}

fn decode_identity(container: &Container<'_>) -> Result<Identity, FormatError> {
    let contents = container.required(SectionKind::IDENTITY)?;
    let mut cursor = Cursor::new(SectionKind::IDENTITY, &contents);
    let fixed: wire::Identity = cursor.fixed("the identity")?;
    cursor.reserved(42, &fixed.reserved)?;
    let number = fixed.hypervisor.get();
    let hypervisor =
        Hypervisor::from_number(number).ok_or_else(|| cursor.refused("the hypervisor", 32, number.into()))?;
    let pause_us = match (fixed.flags.get(), fixed.pause_us.get()) {
        (PAUSE_KNOWN, pause) => Some(pause),
        (0, 0) => None,
        (0, pause) => return Err(cursor.refused("an unknown pause", 24, pause)),
        (flags, _) => return Err(cursor.refused("the flags", 34, flags.into())),
    };
    let identity = Identity {
        image: ImageId::from_bytes(fixed.image),
        parent: cursor.text(fixed.parent_length.get().into(), "the parent's name")?,
        hypervisor,
        hypervisor_version: cursor.text(fixed.hypervisor_version_length.get().into(), "the hypervisor's version")?,
        machine: cursor.text(fixed.machine_length.get().into(), "the machine type")?,
        captured_unix_ns: fixed.captured_unix_ns.get(),
        pause_us,
    };
    cursor.finish()?;
    Ok(identity)
}

fn encode_records(records: &[HypervisorRecord]) -> Vec<u8> {
    let mut out = Vec::new();
    for record in records {
        let fixed = wire::Record {
            data_length: (record.data.len() as u64).into(),
            name_length: (record.name.len() as u16).into(),
            reserved: [0; 6],
        };
        out.extend_from_slice(fixed.as_bytes());
        out.extend_from_slice(record.name.as_bytes());
        out.extend_from_slice(&record.data);
    }
    out
}

fn decode_records(container: &Container<'_>) -> Result<Vec<HypervisorRecord>, FormatError> {
    let contents = container.contents(SectionKind::RECORDS)?;
    let mut cursor = Cursor::new(SectionKind::RECORDS, &contents);
    let mut records = Vec::new();
    while !cursor.is_at_end() {
        let at = cursor.offset();
        let fixed: wire::Record = cursor.fixed("a record")?;
        cursor.reserved(at + 10, &fixed.reserved)?;
        let name = cursor.text(fixed.name_length.get().into(), "a record's name")?;
        let data = cursor.bytes(fixed.data_length.get(), "a record's data")?.to_vec();
        records.push(HypervisorRecord { name, data });
    }
    Ok(records)
}

fn encode_prefetch(runs: &[FrameRange]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut end = 0;
    for run in runs {
        push_signed(&mut out, run.start().index() as i64 - end);
        push_number(&mut out, run.count().get());
        end = run.end().index() as i64;
    }
    out
}

fn decode_prefetch(container: &Container<'_>, memory: &MemoryMap) -> Result<Vec<FrameRange>, FormatError> {
    let contents = container.contents(SectionKind::PREFETCH)?;
    let mut cursor = Cursor::new(SectionKind::PREFETCH, &contents);
    let universe = FrameRange::new(Gfn::new(0), memory.universe());
    let mut runs = Vec::new();
    let mut end = universe.start();
    while !cursor.is_at_end() {
        let at = cursor.offset();
        let distance = signed(cursor.number("a run's distance")?);
        let count = cursor.number("a run's number of frames")?;
        let start = end.index().checked_add_signed(distance).and_then(Gfn::checked);
        let run = start.and_then(|start| FrameRange::checked(start, PageCount::new(count)));
        let run = run.filter(|run| universe.covers(*run));
        let run = run.ok_or_else(|| cursor.refused("a run's number of frames", at, count))?;
        runs.push(run);
        end = run.end();
    }
    Ok(runs)
}

fn encode_servers(servers: &[Endpoint]) -> Vec<u8> {
    let mut out = Vec::new();
    for server in servers {
        let text = server.to_string();
        out.extend_from_slice(&(text.len() as u16).to_le_bytes());
        out.extend_from_slice(text.as_bytes());
    }
    out
}

fn decode_servers(container: &Container<'_>) -> Result<Vec<Endpoint>, FormatError> {
    let section = SectionKind::SERVERS;
    let contents = container.contents(section)?;
    let mut cursor = Cursor::new(section, &contents);
    let mut servers = Vec::new();
    while !cursor.is_at_end() {
        let length: zerocopy::little_endian::U16 = cursor.fixed("a server's length")?;
        let offset = cursor.offset();
        let text = cursor.text(length.get().into(), "a server")?;
        let server = text.parse().map_err(|source| FormatError::Endpoint { section, offset, source })?;
        servers.push(server);
    }
    Ok(servers)
}
