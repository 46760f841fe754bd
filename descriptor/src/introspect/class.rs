//! What frames are used for, as far as their `struct page` tells.

use clap::ValueEnum;

use super::Refusal;
use super::note::Note;
use super::page_array::PageStruct;

/// What a frame is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
#[repr(u8)]
pub enum Class {
    /// Not known to the guest's kernel as memory: firmware, holes.
    Unknown = 0,
    /// In a free block of the buddy allocator.
    Free,
    /// On a processor's list of free pages.
    PerCpuFree,
    /// Taken from the guest by a balloon or by memory hot-unplug; its contents do not matter.
    Offline,
    /// The kernel's text and static data.
    KernelImage,
    /// A page table.
    PageTable,
    /// Objects of the slab allocator.
    Slab,
    /// The array of `struct page` itself.
    PageArray,
    /// Other memory of the kernel: stacks, modules, drivers' buffers.
    Kernel,
    /// Anonymous memory of processes.
    Anonymous,
    /// The page cache of files.
    File,
    /// Shared and temporary memory without a file.
    Shmem,
    /// Huge pages of hugetlbfs.
    Huge,
}

impl Class {
    /// All of them, in the order of their numbers.
    pub const ALL: [Class; 13] = [
        Class::Unknown,
        Class::Free,
        Class::PerCpuFree,
        Class::Offline,
        Class::KernelImage,
        Class::PageTable,
        Class::Slab,
        Class::PageArray,
        Class::Kernel,
        Class::Anonymous,
        Class::File,
        Class::Shmem,
        Class::Huge,
    ];

    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Class::Unknown => "unknown",
            Class::Free => "free",
            Class::PerCpuFree => "per-CPU free",
            Class::Offline => "offline",
            Class::KernelImage => "kernel image",
            Class::PageTable => "page table",
            Class::Slab => "slab",
            Class::PageArray => "page array",
            Class::Kernel => "kernel",
            Class::Anonymous => "anonymous",
            Class::File => "file",
            Class::Shmem => "shmem",
            Class::Huge => "huge",
        }
    }

    /// True when the contents of such a frame do not matter to the guest.
    pub fn is_droppable(self) -> bool {
        matches!(self, Class::Free | Class::PerCpuFree | Class::Offline)
    }
}

/// Page types, as this kernel writes them into `_mapcount`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Classifier {
    /// The type is the highest byte (from 6.12 on); before, it was a bit that is clear in an otherwise full word.
    by_byte: bool,
    table: u32,
    slab: Mark,
    offline: Option<u32>,
    huge: Option<u32>,
    lru: u64,
    swap_backed: u64,
}

/// How a slab page is told.
#[derive(Clone, Copy, Debug)]
enum Mark {
    Type(u32),
    Flag(u64),
}

impl Classifier {
    pub(super) fn of(note: &Note) -> Result<Self, Refusal> {
        let value = |name: &str| Ok::<_, Refusal>(note.number_if(name)?.map(|number| number as u32));
        let flag = |name: &str| {
            let bit = note.number(name)?;
            let bad = || Refusal::BadValue { key: format!("NUMBER({name})"), value: bit.to_string() };
            u32::try_from(bit).ok().filter(|bit| *bit < 64).map(|bit| 1u64 << bit).ok_or_else(bad)
        };
        let buddy = note.number("PAGE_BUDDY_MAPCOUNT_VALUE")? as u32;
        let by_byte = buddy >> 24 != 0xff;
        Ok(Self {
            by_byte,
            // The numbers of page tables are in no note: PGTY_table from 6.12 on, PG_table = 0x200 from 5.11 on, 0x400 before.
            table: if by_byte {
                0xf200_0000
            } else {
                !if is_before(note.text("OSRELEASE")?, (5, 11)) { 0x400 } else { 0x200 }
            },
            slab: match value("PAGE_SLAB_MAPCOUNT_VALUE")? {
                Some(mark) => Mark::Type(mark),
                None => Mark::Flag(flag("PG_slab")?),
            },
            offline: value("PAGE_OFFLINE_MAPCOUNT_VALUE")?,
            huge: value("PAGE_HUGETLB_MAPCOUNT_VALUE")?,
            lru: flag("PG_lru")?,
            swap_backed: flag("PG_swapbacked")?,
        })
    }

    /// The class of a page that is neither free nor a tail.
    pub(super) fn class(&self, page: PageStruct<'_>) -> Class {
        let slab = match self.slab {
            Mark::Type(mark) => self.is_type(page, mark),
            Mark::Flag(flag) => page.flags() & flag != 0,
        };
        // A slab page has other things where others have `mapping`.
        if slab {
            return Class::Slab;
        }
        if self.is_type(page, self.table) {
            return Class::PageTable;
        }
        if self.offline.is_some_and(|mark| self.is_type(page, mark)) {
            return Class::Offline;
        }
        if self.huge.is_some_and(|mark| self.is_type(page, mark)) {
            return Class::Huge;
        }
        let mapping = page.mapping();
        if is_kernel_address(mapping) && mapping & 1 != 0 {
            return Class::Anonymous;
        }
        if is_kernel_address(mapping) && mapping & 3 == 0 && page.flags() & self.lru != 0 {
            return if page.flags() & self.swap_backed != 0 { Class::Shmem } else { Class::File };
        }
        Class::Kernel
    }

    fn is_type(&self, page: PageStruct<'_>, mark: u32) -> bool {
        if self.by_byte { page.mapcount() >> 24 == mark >> 24 } else { page.mapcount() == mark }
    }
}

pub(super) fn is_kernel_address(address: u64) -> bool {
    address >> 56 == 0xff
}

/// True when `release`, such as `6.1.0-31-amd64`, is before `version`; an unreadable one is not.
fn is_before(release: &str, version: (u32, u32)) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    matches!((numbers.next(), numbers.next()), (Some(Ok(major)), Some(Ok(minor))) if (major, minor) < version)
}
