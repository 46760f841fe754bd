//! The buddy allocator's free blocks, as the page array tells of them, and as the zones count them.

use super::Refusal;
use super::kernel::Kernel;
use super::note::Note;
use super::page_array::PageStruct;

/// Orders of any configuration: 11 as a rule, more with huge pages of a gigabyte.
const MAX_ORDERS: u64 = 32;

/// NUMA nodes and zones of any configuration.
const MAX_NODES: u64 = 1024;
const MAX_ZONES: u32 = 16;

/// How far a zone's count of free blocks may be off: an allocation that the stop of the guest found half done.
const TOLERANCE: u64 = 2;

/// Collects free blocks from page structs in ascending order.
#[derive(Debug)]
pub(super) struct FreeBlocks {
    /// What `_mapcount` holds in the head of a free block.
    mark: u32,
    /// The flag that tells a slab page, in kernels where its mark could be mistaken.
    slab: Option<u32>,
    /// The end of the block that the latest head began.
    end: u64,
    /// Blocks found, by order.
    heads: Vec<u64>,
}

impl FreeBlocks {
    pub(super) fn new(note: &Note) -> Result<Self, Refusal> {
        let orders = note.length("zone.free_area")?;
        if orders > MAX_ORDERS {
            return Err(Refusal::TooLarge("zone.free_area"));
        }
        let slab = note.number_if("PG_slab")?.and_then(|bit| u32::try_from(bit).ok()).filter(|bit| *bit < 64);
        // Kernels write the 32-bit value signed or unsigned.
        let mark = note.number("PAGE_BUDDY_MAPCOUNT_VALUE")? as u32;
        Ok(Self { mark, slab, end: 0, heads: vec![0; orders as usize] })
    }

    /// Looks at the struct of `frame`, in a section that ends at `limit`: the number of frames of a free block that begins
    /// here, or whether the frame lies in one that began before.
    pub(super) fn look(&mut self, frame: u64, page: PageStruct<'_>, limit: u64) -> Result<Found, Refusal> {
        let is_head = page.mapcount() == self.mark && self.slab.is_none_or(|bit| page.flags() >> bit & 1 == 0);
        if is_head {
            if frame < self.end {
                return Err(Refusal::Overlap(frame));
            }
            let order = page.private();
            if order >= self.heads.len() as u64 {
                return Err(Refusal::Order { frame, order });
            }
            let order = order as u32;
            let count = 1u64 << order;
            if !frame.is_multiple_of(count) || frame + count > limit {
                return Err(Refusal::Misaligned { frame, order });
            }
            self.heads[order as usize] += 1;
            self.end = frame + count;
        }
        if frame >= self.end {
            return Ok(Found::Other);
        }
        if page.refcount() != 0 {
            return Err(Refusal::InUse(frame));
        }
        Ok(if is_head { Found::Block(self.end - frame) } else { Found::Within })
    }

    /// Compares what was found with what the zones of all nodes count.
    pub(super) fn check(&self, kernel: &mut Kernel<'_>) -> Result<(), Refusal> {
        let counted = count_in_zones(kernel, self.heads.len())?;
        for (order, (found, counted)) in self.heads.iter().zip(counted).enumerate() {
            if found.abs_diff(counted) > TOLERANCE {
                return Err(Refusal::Counters { order, counted, found: *found });
            }
        }
        Ok(())
    }
}

/// What [`FreeBlocks::look`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// The first of so many free frames.
    Block(u64),
    /// A frame of a free block that began before.
    Within,
    /// A frame that is not in a free block.
    Other,
}

fn count_in_zones(kernel: &mut Kernel<'_>, orders: usize) -> Result<Vec<u64>, Refusal> {
    let note = kernel.note.clone();
    let (zones_at, zone_size) = (note.offset("pglist_data.node_zones")?, note.size("zone")?);
    let (number_at, spanned_at) = (note.offset("pglist_data.nr_zones")?, note.offset("zone.spanned_pages")?);
    let (areas_at, area_size) = (note.offset("zone.free_area")?, note.size("free_area")?);
    // nr_free stands behind the lists of all migration types.
    let lists = note.length("free_area.free_list")? * note.size("list_head")?;
    let count_at = note.offset("free_area.free_list")? + lists;
    let mut counts = vec![0u64; orders];
    for node in nodes(kernel, &note)? {
        let zones = kernel.u32(node.wrapping_add(number_at))?;
        if zones > MAX_ZONES {
            return Err(Refusal::TooLarge("pglist_data.nr_zones"));
        }
        for zone in 0..u64::from(zones) {
            let zone = node.wrapping_add(zones_at + zone * zone_size);
            if kernel.u64(zone.wrapping_add(spanned_at))? == 0 {
                continue;
            }
            for (order, count) in (0..).zip(&mut counts) {
                let free = kernel.u64(zone.wrapping_add(areas_at + order * area_size + count_at))?;
                *count = count.saturating_add(free);
            }
        }
    }
    Ok(counts)
}

/// The addresses of the nodes' `pglist_data`.
fn nodes(kernel: &mut Kernel<'_>, note: &Note) -> Result<Vec<u64>, Refusal> {
    let Some(table) = note.symbol_if("node_data")? else {
        return Ok(vec![note.symbol("contig_page_data")?]);
    };
    let length = note.length("node_data")?;
    if length > MAX_NODES {
        return Err(Refusal::TooLarge("node_data"));
    }
    let nodes = (0..length).map(|index| kernel.u64(table.wrapping_add(8 * index)));
    let mut nodes = nodes.collect::<Result<Vec<u64>, Refusal>>()?;
    nodes.retain(|node| *node != 0);
    Ok(nodes)
}
