use std::collections::HashMap;

use super::cursor::Cursor;
use super::mapped::Mapped;
use super::pages::PageLog;
use super::{BlockPages, PageRun, RamBlock, Source, StreamError, section};
use crate::memory::{MemoryMap, Region};
use crate::{FrameSet, PAGE_SIZE, PageCount};

const RAM_VERSION: u32 = 4;

/// Flags in the low bits of a page's offset.
mod flag {
    pub(super) const ZERO: u64 = 0x02;
    pub(super) const BLOCKS: u64 = 0x04;
    pub(super) const PAGE: u64 = 0x08;
    pub(super) const END: u64 = 0x10;
    pub(super) const SAME_BLOCK: u64 = 0x20;
    pub(super) const XBZRLE: u64 = 0x40;
    pub(super) const HOOK: u64 = 0x80;
    pub(super) const COMPRESSED: u64 = 0x100;
    pub(super) const MULTIFD_FLUSH: u64 = 0x200;
}

/// The RAM section as far as it was read.
pub(super) struct Ram {
    ignore_shared: bool,
    mapped: bool,
    section_id: Option<u32>,
    completed: bool,
    blocks: Vec<Block>,
    by_name: HashMap<String, u16>,
    /// The block that the page before belonged to.
    current: Option<u16>,
    log: PageLog,
    zero_records: bool,
}

struct Block {
    name: String,
    size: PageCount,
    has_pages: bool,
    mapped: Option<Mapped>,
}

impl Ram {
    pub(super) fn new(capabilities: &[String]) -> Self {
        let has = |name: &str| capabilities.iter().any(|capability| capability == name);
        Self {
            ignore_shared: has("x-ignore-shared"),
            mapped: has("mapped-ram"),
            section_id: None,
            completed: false,
            blocks: Vec::new(),
            by_name: HashMap::new(),
            current: None,
            log: PageLog::default(),
            zero_records: false,
        }
    }

    pub(super) fn section_id(&self) -> Option<u32> {
        self.section_id
    }

    pub(super) fn start<S: Source + ?Sized>(
        &mut self,
        cursor: &mut Cursor<'_, S>,
        start: u64,
    ) -> Result<(), StreamError> {
        let id = cursor.u32("section id")?;
        let name = cursor.cstr("section name")?;
        if name != "ram" {
            return Err(StreamError::LiveSection { name, offset: start });
        }
        if self.section_id.is_some() {
            return Err(StreamError::value("second section of the RAM", start, section::START));
        }
        self.section_id = Some(id);
        cursor.u32("section instance")?;
        let version = cursor.u32("section version")?;
        if version != RAM_VERSION {
            return Err(StreamError::value("version of the RAM section", cursor.position() - 4, version));
        }
        self.records(cursor)?;
        footer(cursor, id)
    }

    pub(super) fn part<S: Source + ?Sized>(&mut self, cursor: &mut Cursor<'_, S>) -> Result<(), StreamError> {
        let offset = cursor.position();
        let id = cursor.u32("section id")?;
        if self.section_id != Some(id) {
            return Err(StreamError::value("section id", offset, id));
        }
        self.records(cursor)?;
        footer(cursor, id)
    }

    pub(super) fn end<S: Source + ?Sized>(&mut self, cursor: &mut Cursor<'_, S>) -> Result<(), StreamError> {
        self.completed = true;
        self.part(cursor)
    }

    fn records<S: Source + ?Sized>(&mut self, cursor: &mut Cursor<'_, S>) -> Result<(), StreamError> {
        loop {
            let offset = cursor.position();
            let word = cursor.u64("page header")?;
            let (address, flags) = (word & !(PAGE_SIZE - 1), word & (PAGE_SIZE - 1));
            let capability = |capability| Err(StreamError::Capability { capability, offset });
            match flags & !flag::SAME_BLOCK {
                flag::END => return Ok(()),
                flag::BLOCKS => self.block_list(cursor, address)?,
                flag::ZERO => {
                    let (block, page) = self.page(cursor, offset, address, flags)?;
                    cursor.skip(1, "zero page")?;
                    self.log.zero(block, page)?;
                    self.zero_records = true;
                }
                flag::PAGE => {
                    let (block, page) = self.page(cursor, offset, address, flags)?;
                    let stored = cursor.position();
                    cursor.skip(PAGE_SIZE, "page")?;
                    self.log.stored(block, page, stored)?;
                }
                flag::XBZRLE => return capability("xbzrle"),
                flag::HOOK => return capability("rdma"),
                flag::COMPRESSED => return capability("compress"),
                flag::MULTIFD_FLUSH => return capability("multifd"),
                _ => return Err(StreamError::Value { field: "page header", offset, value: word }),
            }
        }
    }

    /// The block and number of the page whose header was just read.
    fn page<S: Source + ?Sized>(
        &mut self,
        cursor: &mut Cursor<'_, S>,
        offset: u64,
        address: u64,
        flags: u64,
    ) -> Result<(u16, u64), StreamError> {
        let index = if flags & flag::SAME_BLOCK != 0 {
            self.current.ok_or(StreamError::Value { field: "first page header", offset, value: address | flags })?
        } else {
            let name = cursor.cstr("RAM block name")?;
            match self.by_name.get(&name) {
                Some(index) => *index,
                None => return Err(StreamError::UnknownBlock { name, offset }),
            }
        };
        self.current = Some(index);
        let page = address / PAGE_SIZE;
        let unknown = || StreamError::UnknownBlock { name: String::new(), offset };
        let block = self.blocks.get_mut(usize::from(index)).ok_or_else(unknown)?;
        if page >= block.size.get() {
            return Err(StreamError::PageBeyondBlock { name: block.name.clone(), page, size: block.size, offset });
        }
        block.has_pages = true;
        Ok((index, page))
    }

    fn block_list<S: Source + ?Sized>(&mut self, cursor: &mut Cursor<'_, S>, total: u64) -> Result<(), StreamError> {
        if !self.blocks.is_empty() {
            return Err(StreamError::Value {
                field: "second list of RAM blocks",
                offset: cursor.position(),
                value: total,
            });
        }
        let mut rest = total;
        while rest > 0 {
            let start = cursor.position();
            let name = cursor.cstr("RAM block name")?;
            let offset = cursor.position();
            let length = cursor.u64("RAM block length")?;
            let Some(size) = PageCount::from_bytes_exact(length).filter(|size| !size.is_zero()) else {
                return Err(StreamError::BlockLength { name, offset, length });
            };
            if total / PAGE_SIZE > FrameSet::MAX_UNIVERSE.get() || self.blocks.len() >= MemoryMap::MAX_REGIONS {
                return Err(StreamError::TooLarge { offset });
            }
            let too_long = StreamError::Value { field: "RAM block length", offset, value: length };
            rest = rest.checked_sub(length).ok_or(too_long)?;
            if name.is_empty() || name.len() > Region::MAX_NAME {
                return Err(StreamError::Text { field: "RAM block name", offset: start });
            }
            if self.ignore_shared {
                cursor.u64("RAM block address")?;
            }
            let mapped = if self.mapped { Mapped::header(cursor, size)? } else { None };
            if self.by_name.insert(name.clone(), self.blocks.len() as u16).is_some() {
                return Err(StreamError::DuplicateBlock { name, offset: start });
            }
            self.blocks.push(Block { name, size, has_pages: false, mapped });
        }
        Ok(())
    }

    /// Finds the pages of a `mapped-ram` file: by the bitmaps where QEMU has written them, by the file's holes otherwise.
    /// True when all pages were told from zeros, in the stream or by the bitmaps.
    pub(super) fn find_mapped_pages<S: Source + ?Sized>(
        &mut self,
        cursor: &Cursor<'_, S>,
    ) -> Result<bool, StreamError> {
        for (index, block) in self.blocks.iter_mut().enumerate() {
            let Some(mapped) = &block.mapped else { continue };
            block.has_pages = true;
            if self.completed {
                mapped.pages_by_bitmap(cursor, &mut self.log, index as u16)?;
            } else {
                mapped.pages_by_holes(cursor, &mut self.log, index as u16)?;
            }
        }
        Ok(if self.mapped { self.completed } else { self.zero_records })
    }

    /// The blocks and their pages in the order of their arrival.
    pub(super) fn finish(self) -> (Vec<RamBlock>, Vec<PageRun>) {
        let ram_block = |block: Block| {
            // QEMU sends the pages of a block at least once, zeros too; of one that it ignores it sends none.
            let external = self.ignore_shared && !block.has_pages;
            let pages = if external { BlockPages::External } else { BlockPages::Stream };
            RamBlock { name: block.name, size: block.size, pages }
        };
        (self.blocks.into_iter().map(ram_block).collect(), self.log.finish())
    }
}

fn footer<S: Source + ?Sized>(cursor: &mut Cursor<'_, S>, id: u32) -> Result<(), StreamError> {
    let offset = cursor.position();
    let kind = cursor.u8("section footer")?;
    if kind != section::FOOTER {
        return Err(StreamError::value("section footer", offset, kind));
    }
    let found = cursor.u32("section footer")?;
    if found == id { Ok(()) } else { Err(StreamError::value("section footer", offset + 1, found)) }
}
