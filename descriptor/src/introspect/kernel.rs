//! The kernel's own view of its memory: virtual addresses, through its page tables.

use std::collections::BTreeMap;

use super::note::Note;
use super::{Physical, Refusal};
use crate::PAGE_SIZE;

/// Where every x86-64 Linux maps its own image; KASLR is in the symbols.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// The bits of a page-table entry that are an address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Set in an entry that leads somewhere, and in one that maps a large page.
const PRESENT: u64 = 1;
const LARGE: u64 = 0x80;

/// Pages kept: 16 MiB, of which page tables and zones of usual guests need a fraction.
const MAX_CACHED: usize = 4096;

/// The longest release string, as in the C library's `utsname`.
const RELEASE_LENGTH: usize = 65;

/// A kernel whose note was found true.
pub(super) struct Kernel<'p> {
    pub(super) physical: &'p Physical<'p>,
    pub(super) note: Note,
    root: u64,
    shifts: &'static [u32],
    address: u64,
    cache: BTreeMap<u64, Box<[u8]>>,
}

impl<'p> Kernel<'p> {
    /// The kernel of a note, if the memory agrees with it.
    pub(super) fn new(physical: &'p Physical<'p>, note: Note) -> Result<Self, Refusal> {
        let page_size = note.text("PAGESIZE")?;
        if page_size != "4096" {
            return Err(Refusal::PageSize(page_size.to_owned()));
        }
        let top = match note.symbol_if("init_top_pgt")? {
            Some(top) => top,
            None => note.symbol("swapper_pg_dir")?,
        };
        let root = top.wrapping_sub(KERNEL_MAP).wrapping_add(note.number("phys_base")?.cast_unsigned());
        let five_levels = note.number_if("pgtable_l5_enabled")?.unwrap_or(0) != 0;
        let encryption = note.number_if("sme_mask")?.unwrap_or(0).cast_unsigned();
        let mut kernel = Self {
            physical,
            note,
            root: root & !(PAGE_SIZE - 1),
            shifts: if five_levels { &[48, 39, 30, 21, 12] } else { &[39, 30, 21, 12] },
            address: ADDRESS & !encryption,
            cache: BTreeMap::new(),
        };
        if kernel.translate(top)?.0 != kernel.root {
            return Err(Refusal::PageTables);
        }
        kernel.check_release()?;
        if let Some(tables) = physical.page_tables()
            && !tables.iter().any(|table| kernel.is_used_by(*table, top))
        {
            return Err(Refusal::NotRunning(kernel.note.text("OSRELEASE")?.to_owned()));
        }
        Ok(kernel)
    }

    /// True when page tables, as CR3 names them, map the kernel's as the kernel does, at the address `top`.
    fn is_used_by(&mut self, table: u64, top: u64) -> bool {
        let table = table & self.address;
        // Under page-table isolation, processes run on the second of two pages, which lacks the kernel.
        [table, table & !PAGE_SIZE].into_iter().any(|table| {
            let place = self.translate_from(table, top);
            place.is_ok_and(|(place, _)| place == self.root)
        })
    }

    /// The guest-physical address of a virtual one, and for how many bytes the mapping goes on.
    pub(super) fn translate(&mut self, address: u64) -> Result<(u64, u64), Refusal> {
        self.translate_from(self.root, address)
    }

    fn translate_from(&mut self, mut table: u64, address: u64) -> Result<(u64, u64), Refusal> {
        for shift in self.shifts {
            let entry = self.physical_u64(table + ((address >> shift) & 511) * 8)?;
            if entry & PRESENT == 0 {
                return Err(Refusal::Unmapped(address));
            }
            let is_page = *shift == 12 || (*shift <= 30 && entry & LARGE != 0);
            if is_page {
                let within = (1 << shift) - 1;
                return Ok(((entry & self.address & !within) | (address & within), within + 1 - (address & within)));
            }
            table = entry & self.address;
        }
        Err(Refusal::Unmapped(address))
    }

    /// Reads `buffer` from a virtual address.
    pub(super) fn read(&mut self, address: u64, buffer: &mut [u8]) -> Result<(), Refusal> {
        let mut done = 0;
        while done < buffer.len() {
            let (physical, length) = self.translate(address.wrapping_add(done as u64))?;
            let within = (physical % PAGE_SIZE) as usize;
            let length = (buffer.len() - done).min(length as usize).min(PAGE_SIZE as usize - within);
            let page = self.page(physical / PAGE_SIZE)?;
            buffer[done..done + length].copy_from_slice(&page[within..within + length]);
            done += length;
        }
        Ok(())
    }

    /// The eight bytes at a virtual address.
    pub(super) fn u64(&mut self, address: u64) -> Result<u64, Refusal> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The four bytes at a virtual address.
    pub(super) fn u32(&mut self, address: u64) -> Result<u32, Refusal> {
        let mut bytes = [0; 4];
        self.read(address, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn physical_u64(&mut self, address: u64) -> Result<u64, Refusal> {
        // Entries are eight bytes and aligned, as the tables are.
        let within = (address % PAGE_SIZE) as usize & !7;
        let page = self.page(address / PAGE_SIZE)?;
        Ok(page[within..within + 8].try_into().map_or(0, u64::from_le_bytes))
    }

    fn page(&mut self, frame: u64) -> Result<&[u8], Refusal> {
        if self.cache.len() >= MAX_CACHED {
            self.cache.clear();
        }
        let physical = self.physical;
        match self.cache.entry(frame) {
            std::collections::btree_map::Entry::Occupied(page) => Ok(page.into_mut()),
            std::collections::btree_map::Entry::Vacant(place) => {
                let mut page = vec![0; PAGE_SIZE as usize].into_boxed_slice();
                physical.read_pages(frame, &mut page)?;
                Ok(place.insert(page))
            }
        }
    }

    /// Compares the release in the note with what the kernel answers to `uname`.
    fn check_release(&mut self) -> Result<(), Refusal> {
        let noted = self.note.text("OSRELEASE")?.to_owned();
        let space = self.note.symbol("init_uts_ns")?;
        // The key is missing before 5.11, where the name follows a reference count of four bytes.
        let name = self.note.offset_if("uts_namespace.name")?.unwrap_or(4);
        let mut field = [0; RELEASE_LENGTH];
        // After the system's and the node's name.
        self.read(space.wrapping_add(name + 2 * RELEASE_LENGTH as u64), &mut field)?;
        let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
        if field[..end] == *noted.as_bytes() {
            return Ok(());
        }
        Err(Refusal::Release { found: String::from_utf8_lossy(&field[..end]).into_owned(), noted })
    }
}
