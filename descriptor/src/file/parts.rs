//! The sections that descriptors and indices have in common.

use std::borrow::Cow;

use zerocopy::IntoBytes;

use super::container::Container;
use super::section::Cursor;
use super::{ContentError, FormatError, SectionKind, wire};
use crate::memory::{MemoryMap, PageSize, Region, RegionKind};
use crate::{FrameRange, FrameSet, Gfn, PageCount};

pub(super) fn encode_memory(memory: &MemoryMap) -> Vec<u8> {
    let mut out = Vec::new();
    for region in memory.regions() {
        let fixed = wire::Region {
            start: region.frames.start().index().into(),
            count: region.frames.count().get().into(),
            kind: region_kind_number(region.kind),
            page_size: page_size_number(region.page_size),
            name_length: region.name.len() as u8,
            reserved: 0,
        };
        out.extend_from_slice(fixed.as_bytes());
        out.extend_from_slice(region.name.as_bytes());
    }
    out
}

pub(super) fn decode_memory(container: &Container<'_>) -> Result<MemoryMap, FormatError> {
    let contents = container.required(SectionKind::MEMORY)?;
    let mut cursor = Cursor::new(SectionKind::MEMORY, &contents);
    let mut regions = Vec::new();
    while !cursor.is_at_end() {
        let at = cursor.offset();
        let fixed: wire::Region = cursor.fixed("a region")?;
        cursor.reserved(at + 19, &[fixed.reserved])?;
        let (start, count) = (fixed.start.get(), fixed.count.get());
        let start = Gfn::checked(start).ok_or_else(|| cursor.refused("a region's first frame", at, start))?;
        let frames = FrameRange::checked(start, PageCount::new(count))
            .ok_or_else(|| cursor.refused("a region's number of frames", at + 8, count))?;
        let kind = [RegionKind::Ram, RegionKind::Rom].into_iter().find(|kind| region_kind_number(*kind) == fixed.kind);
        let kind = kind.ok_or_else(|| cursor.refused("a region's kind", at + 16, fixed.kind.into()))?;
        let sizes = [PageSize::Base, PageSize::Huge];
        let page_size = sizes.into_iter().find(|size| page_size_number(*size) == fixed.page_size);
        let page_size =
            page_size.ok_or_else(|| cursor.refused("a region's page size", at + 17, fixed.page_size.into()))?;
        let name = cursor.text(fixed.name_length.into(), "a region's name")?;
        regions.push(Region { name, frames, kind, page_size });
    }
    Ok(MemoryMap::new(regions)?)
}

pub(super) fn decode_set(
    container: &Container<'_>,
    section: SectionKind,
    memory: &MemoryMap,
) -> Result<FrameSet, FormatError> {
    let contents: Cow<'_, [u8]> = container.contents(section)?;
    FrameSet::decode(&contents, memory.universe()).map_err(|source| FormatError::FrameSet { section, source })
}

/// Checks that a set is one of frames of the memory map.
pub(super) fn check_set(name: &'static str, set: &FrameSet, memory: &MemoryMap) -> Result<(), ContentError> {
    if set.universe() != memory.universe() {
        let (universe, map) = (set.universe().get(), memory.universe().get());
        return Err(ContentError::Universe { set: name, universe, map });
    }
    match set.runs().find(|run| !memory.covers(*run)) {
        Some(frames) => Err(ContentError::Absent { what: name, frames }),
        None => Ok(()),
    }
}

pub(super) fn check_length(what: &'static str, length: usize, min: usize, max: usize) -> Result<(), ContentError> {
    if (min..=max).contains(&length) { Ok(()) } else { Err(ContentError::TextLength { what, length, min, max }) }
}

pub(super) fn check_count(what: &'static str, count: usize, min: usize, max: usize) -> Result<(), ContentError> {
    if (min..=max).contains(&count) { Ok(()) } else { Err(ContentError::Count { what, count, min, max }) }
}

fn region_kind_number(kind: RegionKind) -> u8 {
    match kind {
        RegionKind::Ram => 0,
        RegionKind::Rom => 1,
    }
}

fn page_size_number(size: PageSize) -> u8 {
    match size {
        PageSize::Base => 0,
        PageSize::Huge => 1,
    }
}
