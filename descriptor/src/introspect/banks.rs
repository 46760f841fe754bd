//! Where the regions of an image lie for the guest.

use super::Bank;
use crate::memory::{MemoryMap, RegionKind};
use crate::vm::Hypervisor;
use crate::{FrameRange, PageCount};

/// Frames below 4 GiB.
const LOW: u64 = 1 << 20;

/// Where QEMU's x86 machines split memory that does not fit below their PCI hole, in frames, with the size from which on they do:
/// pc at 3 GiB from 3.5 GiB on, q35 at 2 GiB from 2.75 GiB on, microvm at 3 GiB from 3 GiB on.
const SPLITS: [(u64, u64); 3] = [(3 << 18, 7 << 17), (2 << 18, 11 << 16), (3 << 18, 3 << 18)];

/// The ways in which the guest may see its memory, the likelier first. Only one of them makes sense of the guest's tables.
pub(super) fn candidates(hypervisor: Hypervisor, memory: &MemoryMap) -> Vec<Vec<Bank>> {
    let regions: Vec<FrameRange> =
        memory.regions().iter().filter(|region| region.kind == RegionKind::Ram).map(|region| region.frames).collect();
    if hypervisor != Hypervisor::Qemu {
        let bank = |frames: FrameRange| Bank { physical: frames.start().index(), frames };
        return vec![regions.into_iter().map(bank).collect()];
    }
    // RAM blocks lie one behind the other, interrupted by the hole.
    let total: u64 = regions.iter().map(|frames| frames.count().get()).sum();
    let mut splits: Vec<u64> = Vec::new();
    for (split, from) in SPLITS {
        let split = if total >= from { split } else { total };
        if !splits.contains(&split) {
            splits.push(split);
        }
    }
    splits.into_iter().map(|split| laid_out(&regions, split)).collect()
}

/// Lays `regions` end to end from 0 on, and from 4 GiB on what comes after `split` frames.
fn laid_out(regions: &[FrameRange], split: u64) -> Vec<Bank> {
    let mut banks = Vec::new();
    let mut position = 0;
    for frames in regions {
        let (low, high) = frames.split_at(PageCount::new(u64::saturating_sub(split, position)));
        for part in [low, high] {
            let physical = if position < split { position } else { LOW + position - split };
            if !part.is_empty() {
                banks.push(Bank { physical, frames: part });
            }
            position += part.count().get();
        }
    }
    banks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gfn;
    use crate::memory::{PageSize, Region};

    fn memory(sizes: &[u64]) -> MemoryMap {
        let mut start = 0;
        let mut regions = Vec::new();
        for (index, size) in sizes.iter().enumerate() {
            let frames = FrameRange::new(Gfn::new(start), PageCount::new(*size));
            regions.push(Region { name: index.to_string(), frames, kind: RegionKind::Ram, page_size: PageSize::Base });
            start += size;
        }
        MemoryMap::new(regions).unwrap()
    }

    fn physical(banks: &[Bank]) -> Vec<(u64, u64, u64)> {
        banks.iter().map(|bank| (bank.physical, bank.frames.start().index(), bank.frames.count().get())).collect()
    }

    #[test]
    fn small_memory_is_in_one_piece() {
        let candidates = candidates(Hypervisor::Qemu, &memory(&[1 << 16]));
        assert_eq!(candidates.len(), 1);
        assert_eq!(physical(&candidates[0]), [(0, 0, 1 << 16)]);
    }

    #[test]
    fn large_memory_goes_on_above_the_hole() {
        let candidates = candidates(Hypervisor::Qemu, &memory(&[1 << 19, 1 << 19]));
        assert_eq!(candidates.len(), 2);
        let (gib, half) = (1 << 18, 1 << 19);
        assert_eq!(physical(&candidates[0]), [(0, 0, half), (half, half, gib), (LOW, half + gib, gib)]);
        assert_eq!(physical(&candidates[1]), [(0, 0, half), (LOW, half, half)]);
    }

    #[test]
    fn elsewhere_frames_are_physical_ones() {
        let candidates = candidates(Hypervisor::Raw, &memory(&[100, 50]));
        assert_eq!(physical(&candidates[0]), [(0, 0, 100), (100, 100, 50)]);
    }
}
