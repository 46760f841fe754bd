use super::cursor::Cursor;
use super::ram::Ram;
use super::{Source, Stream, StreamError, section};
use crate::PAGE_SIZE;

const MAGIC: u32 = u32::from_be_bytes(*b"QEVM");
const VERSION: u32 = 3;
const PAGE_BITS: u32 = PAGE_SIZE.trailing_zeros();

/// The longest name of a machine type; QEMU's longest have 30 bytes.
const MAX_MACHINE_NAME: u32 = 255;
/// The most capabilities in a configuration; QEMU has some 25 altogether.
const MAX_CAPABILITIES: u32 = 64;
/// A command that wraps a part of the stream, as only postcopy does.
const COMMAND_PACKAGED: u16 = 7;

pub(super) fn stream<S: Source + ?Sized>(source: &S) -> Result<Stream, StreamError> {
    let mut cursor = Cursor::new(source)?;
    let configuration = configuration(&mut cursor)?;
    let mut ram = Ram::new(&configuration.capabilities);
    let device_start = loop {
        let start = cursor.position();
        match cursor.u8("section type")? {
            section::START => ram.start(&mut cursor, start)?,
            section::PART => ram.part(&mut cursor)?,
            section::END => ram.end(&mut cursor)?,
            section::FULL if ram.section_id().is_some() => break start,
            section::FULL => return early_state(&mut cursor, start),
            section::COMMAND => command(&mut cursor)?,
            section::EOF => return Err(StreamError::NoDevices(start)),
            other => return Err(StreamError::value("section type", start, other)),
        }
    };
    let ram_section_id = ram.section_id().ok_or(StreamError::NoDevices(device_start))?;
    let zeros_marked = ram.find_mapped_pages(&cursor)?;
    let (blocks, pages) = ram.finish();
    let (device_state, vm_description) = device_state(&cursor, device_start)?;
    Ok(Stream {
        machine: configuration.machine,
        configuration: configuration.subsections,
        capabilities: configuration.capabilities,
        ram_section_id,
        blocks,
        pages,
        zeros_marked,
        device_state,
        vm_description,
        length: cursor.length(),
    })
}

struct Configuration {
    machine: String,
    subsections: Vec<u8>,
    capabilities: Vec<String>,
}

fn configuration<S: Source + ?Sized>(cursor: &mut Cursor<'_, S>) -> Result<Configuration, StreamError> {
    let magic = cursor.u32("magic")?;
    if magic != MAGIC {
        return Err(StreamError::Magic(magic));
    }
    let version = cursor.u32("version")?;
    if version != VERSION {
        return Err(StreamError::Version(version));
    }
    let offset = cursor.position();
    let kind = cursor.u8("configuration section")?;
    if kind != section::CONFIGURATION {
        return Err(StreamError::value("configuration section", offset, kind));
    }
    let length = cursor.u32("length of the machine type")?;
    if length > MAX_MACHINE_NAME {
        return Err(StreamError::value("length of the machine type", offset + 1, length));
    }
    let machine = cursor.text(length as usize, "machine type")?;
    let mut configuration = Configuration { machine, subsections: Vec::new(), capabilities: Vec::new() };
    loop {
        let start = cursor.position();
        if cursor.u8("section type")? != section::SUBSECTION {
            cursor.seek(start, "section type")?;
            return Ok(configuration);
        }
        subsection(cursor, start, &mut configuration)?;
    }
}

fn subsection<S: Source + ?Sized>(
    cursor: &mut Cursor<'_, S>,
    start: u64,
    configuration: &mut Configuration,
) -> Result<(), StreamError> {
    let name = cursor.cstr("subsection name")?;
    let version = cursor.u32("subsection version")?;
    if version != 1 {
        return Err(StreamError::value("subsection version", cursor.position() - 4, version));
    }
    match name.as_str() {
        "configuration/capabilities" => {
            let offset = cursor.position();
            let count = cursor.u32("number of capabilities")?;
            if count > MAX_CAPABILITIES {
                return Err(StreamError::value("number of capabilities", offset, count));
            }
            for _ in 0..count {
                configuration.capabilities.push(cursor.cstr("capability")?);
            }
            return Ok(());
        }
        "configuration/target-page-bits" => {
            let bits = cursor.u32("target page bits")?;
            if bits != PAGE_BITS {
                return Err(StreamError::TargetPage { bits });
            }
        }
        "configuration/uuid" => cursor.skip(16, "uuid")?,
        _ => return Err(StreamError::Subsection { name, offset: start }),
    }
    if configuration.subsections.len() > 1024 {
        // Each known subsection appears once; together they have 92 bytes.
        return Err(StreamError::Subsection { name, offset: start });
    }
    let mut bytes = vec![0; (cursor.position() - start) as usize];
    cursor.read_at(&mut bytes, start, "configuration")?;
    configuration.subsections.extend_from_slice(&bytes);
    Ok(())
}

/// Commands ahead of the device state speak of the return path, which a file does not have.
fn command<S: Source + ?Sized>(cursor: &mut Cursor<'_, S>) -> Result<(), StreamError> {
    let offset = cursor.position();
    let command = cursor.u16("command")?;
    if command == COMMAND_PACKAGED {
        return Err(StreamError::Capability { capability: "postcopy-ram", offset });
    }
    let length = cursor.u16("command length")?;
    cursor.skip(u64::from(length), "command")
}

/// A device that comes ahead of the RAM.
fn early_state<S: Source + ?Sized, T>(cursor: &mut Cursor<'_, S>, start: u64) -> Result<T, StreamError> {
    cursor.u32("section id")?;
    Err(StreamError::EarlyState { name: cursor.cstr("device name")?, offset: start })
}

/// The sections of the devices, and the description behind them.
///
/// The sections have no lengths, so the end is found from the end of the file: the description is JSON, which has no control
/// characters but white space, so that the first byte 6 before it that has the right length behind it is its section type.
fn device_state<S: Source + ?Sized>(cursor: &Cursor<'_, S>, start: u64) -> Result<(Vec<u8>, String), StreamError> {
    let bytes = cursor.length() - start;
    if bytes > Stream::MAX_DEVICE_STATE {
        return Err(StreamError::DeviceStateSize { bytes });
    }
    let mut tail = vec![0; bytes as usize];
    cursor.read_at(&mut tail, start, "device state")?;
    let end = tail.len();
    let header = (0..end.saturating_sub(4)).rev().find(|at| {
        let header = tail.get(*at..at + 5);
        header.is_some_and(|header| header[0] == section::DESCRIPTION && header[1..] == length_field(end - at - 5))
    });
    let description = header.and_then(|at| String::from_utf8(tail.get(at + 5..)?.to_vec()).ok());
    let (Some(at), Some(description)) = (header, description) else {
        return Err(StreamError::NoDescription);
    };
    if serde_json::from_str::<serde::de::IgnoredAny>(&description).is_err() {
        return Err(StreamError::NoDescription);
    }
    // Before it stands the end of the sections, and before that the footer of the last of them.
    let state_end = at.checked_sub(1).filter(|end| tail.get(*end) == Some(&section::EOF));
    let footer = state_end.and_then(|end| tail.get(end.checked_sub(5)?));
    let (Some(state_end), Some(&section::FOOTER)) = (state_end, footer) else {
        return Err(StreamError::NoDescription);
    };
    tail.truncate(state_end);
    Ok((tail, description))
}

fn length_field(length: usize) -> [u8; 4] {
    // The device state is bounded far below 4 GiB.
    (length as u32).to_be_bytes()
}
