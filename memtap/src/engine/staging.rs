use std::collections::HashMap;

use descriptor::{FrameRange, Gfn, PAGE_SIZE, PageCount};

/// Buffers kept for reuse: clearing one is cheaper than having the kernel find 2 MiB of memory again.
const SPARE: usize = 4;

/// Buffers for granules (huge pages) whose pages arrive one by one. Which of them are complete is the pager's to know.
pub(super) struct StagingBuffers {
    granule: PageCount,
    buffers: HashMap<Gfn, Vec<u8>>,
    spare: Vec<Vec<u8>>,
}

impl StagingBuffers {
    pub(super) fn new(granule: PageCount) -> Self {
        Self { granule, buffers: HashMap::new(), spare: vec![] }
    }

    /// Puts the pages of `range`, all of one granule, into its buffer; without bytes they are zeros.
    pub(super) fn put(&mut self, range: FrameRange, pages: Option<&[u8]>) {
        let start = Gfn::new(range.start().index() - range.start().index() % self.granule.get());
        let length = self.granule.bytes() as usize;
        let buffer = self.buffers.entry(start).or_insert_with(|| {
            let mut buffer = self.spare.pop().unwrap_or_default();
            buffer.clear();
            buffer.resize(length, 0);
            buffer
        });
        let offset = ((range.start() - start).get() * PAGE_SIZE) as usize;
        let target = buffer.get_mut(offset..offset + range.count().bytes() as usize);
        match (target, pages) {
            (Some(target), Some(pages)) if target.len() == pages.len() => target.copy_from_slice(pages),
            (Some(target), None) => target.fill(0),
            // The pager stages runs of one granule alone, and callers cut `pages` to the run.
            _ => debug_assert!(false, "{range} does not lie in the granule at {start}"),
        }
    }

    /// The buffer of a granule.
    pub(super) fn get(&self, granule: FrameRange) -> Option<&[u8]> {
        self.buffers.get(&granule.start()).map(Vec::as_slice)
    }

    /// Gives the buffer of a granule back.
    pub(super) fn drop(&mut self, granule: FrameRange) {
        if let Some(buffer) = self.buffers.remove(&granule.start())
            && self.spare.len() < SPARE
        {
            self.spare.push(buffer);
        }
    }
}
