use super::StreamError;
use crate::{PAGE_SIZE, PageCount};

/// A run of pages that are alike, and where they are stored lie one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The first frame.
    pub first: u64,
    /// How many there are.
    pub count: PageCount,
    /// Where they lie.
    pub place: PagePlace,
}

/// Where pages lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagePlace {
    /// In the stream, from this offset in bytes on.
    Stored(u64),
    /// Nowhere, since their contents do not matter.
    Unwritten,
    /// Nowhere, since there is no memory.
    Absent,
}

/// The most runs that are kept, 32 bytes each. Only a guest of more than 128 GiB, in which no two neighbouring pages are
/// alike, would need more; but a sparse file, which costs its maker nothing, could otherwise claim any number.
const MAX_RUNS: usize = 1 << 25;

/// Joins pages to runs as they arrive.
#[derive(Default)]
pub(super) struct PageLog {
    runs: Vec<PageRun>,
}

impl PageLog {
    pub(super) fn push(&mut self, pfn: u64, place: PagePlace) -> Result<(), StreamError> {
        if let Some(last) = self.runs.last_mut()
            && last.first + last.count.get() == pfn
            && place == last.place.after(last.count)
        {
            last.count += PageCount::ONE;
            return Ok(());
        }
        if self.runs.len() == MAX_RUNS {
            return Err(StreamError::Fragmented(MAX_RUNS));
        }
        self.runs.push(PageRun { first: pfn, count: PageCount::ONE, place });
        Ok(())
    }

    pub(super) fn finish(self) -> Vec<PageRun> {
        self.runs
    }
}

impl PagePlace {
    /// The place `count` pages farther on.
    pub fn after(self, count: PageCount) -> Self {
        match self {
            PagePlace::Stored(offset) => PagePlace::Stored(offset + count.get() * PAGE_SIZE),
            PagePlace::Unwritten | PagePlace::Absent => self,
        }
    }
}
