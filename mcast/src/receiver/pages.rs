use std::ops::Range;

use descriptor::{FrameRange, Gfn, PageCount};

use crate::Geometry;

/// A set of the pages of one block.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PageSet([u64; Geometry::MAX_PAGES as usize / 64]);

impl PageSet {
    pub(super) fn contains(&self, page: u32) -> bool {
        self.0[page as usize / 64] & 1 << (page % 64) != 0
    }

    pub(super) fn insert(&mut self, pages: Range<u32>) {
        pages.for_each(|page| self.0[page as usize / 64] |= 1 << (page % 64));
    }
}

/// The frames of some pages of a block whose map is not there yet, as the headers of its shards name them.
#[derive(Debug, Default)]
pub(super) struct Names(Vec<(u32, u32)>);

impl Names {
    /// Notes that `page` is `gfn`. What was named first holds.
    pub(super) fn insert(&mut self, page: u32, gfn: u32) {
        if let Err(at) = self.0.binary_search_by_key(&page, |(page, _)| *page) {
            self.0.insert(at, (page, gfn));
        }
    }

    pub(super) fn frames(&self) -> impl Iterator<Item = Gfn> {
        self.0.iter().map(|(_, gfn)| Gfn::new(u64::from(*gfn)))
    }

    /// The runs of pages whose frames are known: those named, and those between two that are as far apart in frames as in
    /// pages, since the frames of a block ascend. Names that do not ascend make none.
    pub(super) fn runs(&self) -> Vec<(u32, FrameRange)> {
        let mut runs: Vec<(u32, FrameRange)> = Vec::new();
        let mut last: Option<(u32, u32)> = None;
        for (page, gfn) in &self.0 {
            let apart = last.map(|(last_page, last_gfn)| (page - last_page, gfn.checked_sub(last_gfn)));
            match (apart, runs.last_mut()) {
                (Some((pages, frames)), _) if frames.is_none_or(|frames| frames < pages) => return Vec::new(),
                (Some((pages, Some(frames))), Some((_, run))) if frames == pages => {
                    *run = FrameRange::new(run.start(), run.count() + PageCount::new(pages.into()));
                }
                _ => runs.push((*page, FrameRange::single(Gfn::new(u64::from(*gfn))))),
            }
            last = Some((*page, *gfn));
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(names: &[(u32, u32)]) -> Vec<(u32, u64, u64)> {
        let mut all = Names::default();
        names.iter().for_each(|(page, gfn)| all.insert(*page, *gfn));
        all.runs().iter().map(|(page, run)| (*page, run.start().index(), run.count().get())).collect()
    }

    #[test]
    fn ascending_order_names_what_lies_between() {
        assert_eq!(runs(&[(7, 107), (3, 103), (0, 50), (9, 200), (3, 999)]), [(0, 50, 1), (3, 103, 5), (9, 200, 1)]);
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[(0, 10), (5, 14)]), [], "five pages do not fit into four frames");
        assert_eq!(runs(&[(0, 10), (5, 9)]), []);
    }
}
