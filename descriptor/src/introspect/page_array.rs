//! The kernel's array of `struct page`, one for each frame, in the sections of sparse memory.

use super::kernel::Kernel;
use super::note::Note;
use super::{Physical, Refusal};
use crate::PAGE_SIZE;

/// Flags in the low bits of `section_mem_map`: present, with an array, online. Only then its pages mean something.
const SECTION_IN_USE: u64 = 7;

/// Sizes of `struct page` that any configuration has, in bytes: 56 to 80, with room to grow.
const PAGE_STRUCT_SIZES: std::ops::RangeInclusive<u64> = 32..=256;

/// Where the fields of `struct page` lie, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields {
    pub(super) size: u64,
    flags: usize,
    mapcount: usize,
    refcount: usize,
    private: usize,
    mapping: usize,
    lru: usize,
    compound: usize,
}

impl Fields {
    pub(super) fn of(note: &Note) -> Result<Self, Refusal> {
        let size = note.size("page")?;
        if !PAGE_STRUCT_SIZES.contains(&size) || !size.is_multiple_of(8) {
            return Err(Refusal::BadValue { key: "SIZE(page)".to_owned(), value: size.to_string() });
        }
        let field = |name: &str| {
            let offset = note.offset(name)?;
            let fits = offset.is_multiple_of(4) && offset + 8 <= size;
            fits.then_some(offset as usize)
                .ok_or_else(|| Refusal::BadValue { key: format!("OFFSET({name})"), value: offset.to_string() })
        };
        Ok(Self {
            size,
            flags: field("page.flags")?,
            mapcount: field("page._mapcount")?,
            refcount: field("page._refcount")?,
            private: field("page.private")?,
            mapping: field("page.mapping")?,
            lru: field("page.lru")?,
            compound: match note.offset_if("page.compound_head")? {
                Some(_) => field("page.compound_head")?,
                // Its name from 7.1 on.
                None => field("page.compound_info")?,
            },
        })
    }

    /// Where `page.lru` lies.
    pub(super) fn lru(&self) -> u64 {
        self.lru as u64
    }
}

/// One `struct page`.
#[derive(Clone, Copy)]
pub(super) struct PageStruct<'b> {
    fields: Fields,
    bytes: &'b [u8],
}

impl PageStruct<'_> {
    pub(super) fn flags(self) -> u64 {
        self.u64(self.fields.flags)
    }

    pub(super) fn mapcount(self) -> u32 {
        self.u32(self.fields.mapcount)
    }

    pub(super) fn refcount(self) -> u32 {
        self.u32(self.fields.refcount)
    }

    /// The order of a free block's head.
    pub(super) fn private(self) -> u64 {
        self.u64(self.fields.private)
    }

    pub(super) fn mapping(self) -> u64 {
        self.u64(self.fields.mapping)
    }

    /// The next node of the list that the page is on.
    pub(super) fn next(self) -> u64 {
        self.u64(self.fields.lru)
    }

    /// Of the tail of a compound page, what leads to its head.
    pub(super) fn compound(self) -> u64 {
        self.u64(self.fields.compound)
    }

    fn u64(self, offset: usize) -> u64 {
        self.bytes[offset..offset + 8].try_into().map_or(0, u64::from_le_bytes)
    }

    fn u32(self, offset: usize) -> u32 {
        self.bytes[offset..offset + 4].try_into().map_or(0, u32::from_le_bytes)
    }
}

/// The frames of one section that are memory: their structs begin at `base + frame * size`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Section {
    pub(super) base: u64,
    pub(super) start: u64,
    pub(super) end: u64,
}

/// The sections that hold memory, in ascending order, cut to its banks.
pub(super) fn sections(kernel: &mut Kernel<'_>) -> Result<Vec<Section>, Refusal> {
    let bits = kernel.note.number_if("SECTION_SIZE_BITS")?.unwrap_or(27);
    let bits = u32::try_from(bits).ok().filter(|bits| (20..40).contains(bits));
    let bits =
        bits.ok_or_else(|| Refusal::BadValue { key: "NUMBER(SECTION_SIZE_BITS)".to_owned(), value: String::new() })?;
    let frames = (1u64 << bits) / PAGE_SIZE;
    let size = kernel.note.size("mem_section")?;
    let each = PAGE_SIZE / size.min(PAGE_SIZE);
    let root = kernel.note.symbol("mem_section")?;
    let map = kernel.note.offset("mem_section.section_mem_map")?;
    let banks = kernel.physical.banks().to_vec();
    let mut sections = Vec::new();
    for bank in banks {
        let (first, end) = (bank.physical, bank.physical + bank.frames.count().get());
        for number in first / frames..end.div_ceil(frames) {
            let table = kernel.u64(root.wrapping_add(8 * (number / each)))?;
            if table == 0 {
                continue;
            }
            let encoded = kernel.u64(table.wrapping_add(number % each * size + map))?;
            if encoded & SECTION_IN_USE == SECTION_IN_USE {
                let (start, end) = ((number * frames).max(first), ((number + 1) * frames).min(end));
                sections.push(Section { base: encoded & !(PAGE_SIZE - 1), start, end });
            }
        }
    }
    Ok(sections)
}

/// Hands over the structs of a section in ascending order; frames whose struct is not mapped are left out. Physical runs of the
/// array itself go to `array`, as (frame, count).
pub(super) fn for_each(
    kernel: &mut Kernel<'_>,
    fields: Fields,
    section: Section,
    array: &mut dyn FnMut(u64, u64),
    each: &mut dyn FnMut(u64, PageStruct<'_>) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    let physical: &Physical<'_> = kernel.physical;
    let mut buffer = Vec::new();
    let mut frame = section.start;
    while frame < section.end {
        let address = section.base.wrapping_add(frame.wrapping_mul(fields.size));
        let (place, run) = match kernel.translate(address) {
            Ok(found) => found,
            Err(Refusal::Unmapped(_)) => {
                let rest = PAGE_SIZE - address % PAGE_SIZE;
                frame += (rest / fields.size).max(1);
                continue;
            }
            Err(refusal) => return Err(refusal),
        };
        let whole = (run / fields.size).min(section.end - frame).min(BATCH);
        let within = (place % PAGE_SIZE) as usize;
        let bytes = if whole > 0 {
            let pages = (within as u64 + whole * fields.size).div_ceil(PAGE_SIZE);
            buffer.resize((pages * PAGE_SIZE) as usize, 0);
            physical.read_pages(place / PAGE_SIZE, &mut buffer)?;
            array(place / PAGE_SIZE, pages);
            &buffer[within..]
        } else {
            // It lies across the end of a mapping.
            buffer.resize(fields.size as usize, 0);
            kernel.read(address, &mut buffer)?;
            &buffer[..]
        };
        for (index, bytes) in bytes.chunks_exact(fields.size as usize).take(whole.max(1) as usize).enumerate() {
            each(frame + index as u64, PageStruct { fields, bytes })?;
        }
        frame += whole.max(1);
    }
    Ok(())
}

/// Structs read at once: those of 16 MiB, 256 KiB that stay in the second-level cache.
const BATCH: u64 = 1 << 12;
