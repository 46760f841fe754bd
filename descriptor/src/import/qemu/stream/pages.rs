use super::StreamError;
use crate::{PAGE_SIZE, PageCount};

/// A run of pages of one RAM block that are alike and lie at equal distances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The index of the block in [`super::Stream::blocks`].
    pub block: u16,
    /// The number of the first page in the block.
    pub first: u64,
    /// How many pages there are.
    pub count: PageCount,
    /// Where they lie.
    pub place: PagePlace,
}

/// Where pages lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagePlace {
    /// Nowhere: they are zero.
    Zero,
    /// In the stream's file.
    Stored {
        /// The offset in bytes of the first page.
        offset: u64,
        /// The distance in bytes from one page to the next, at least 4096.
        stride: u32,
    },
}

/// The most runs that are kept, 40 bytes each. Only a guest of more than 128 GiB, in which no two neighbouring pages are
/// alike, would need more; but a sparse file, which costs its maker nothing, could otherwise claim any number.
const MAX_RUNS: usize = 1 << 25;

/// Joins pages to runs as they arrive.
#[derive(Default)]
pub(super) struct PageLog {
    runs: Vec<PageRun>,
}

impl PageLog {
    pub(super) fn zero(&mut self, block: u16, page: u64) -> Result<(), StreamError> {
        if let Some(last) = self.runs.last_mut()
            && last.block == block
            && last.place == PagePlace::Zero
            && last.first + last.count.get() == page
        {
            last.count += PageCount::ONE;
            return Ok(());
        }
        self.push(PageRun { block, first: page, count: PageCount::ONE, place: PagePlace::Zero })
    }

    pub(super) fn stored(&mut self, block: u16, page: u64, offset: u64) -> Result<(), StreamError> {
        if let Some(last) = self.runs.last_mut()
            && last.block == block
            && last.first + last.count.get() == page
            && let Some(place) = continued(last, offset)
        {
            last.place = place;
            last.count += PageCount::ONE;
            return Ok(());
        }
        self.run(block, page, PageCount::ONE, offset)
    }

    /// Notes `count` contiguous pages.
    pub(super) fn run(&mut self, block: u16, first: u64, count: PageCount, offset: u64) -> Result<(), StreamError> {
        let place = PagePlace::Stored { offset, stride: PAGE_SIZE as u32 };
        self.push(PageRun { block, first, count, place })
    }

    pub(super) fn finish(self) -> Vec<PageRun> {
        self.runs
    }

    fn push(&mut self, run: PageRun) -> Result<(), StreamError> {
        if self.runs.len() == MAX_RUNS {
            return Err(StreamError::Fragmented(MAX_RUNS));
        }
        self.runs.push(run);
        Ok(())
    }
}

/// The place of `run` with one page more, which lies at `offset`; `None` when its distance is another.
fn continued(run: &PageRun, offset: u64) -> Option<PagePlace> {
    let PagePlace::Stored { offset: first, stride } = run.place else {
        return None;
    };
    let last = first + (run.count.get() - 1) * u64::from(stride);
    let distance = u32::try_from(offset.checked_sub(last)?).ok()?;
    let fits = u64::from(distance) >= PAGE_SIZE && (distance == stride || run.count == PageCount::ONE);
    fits.then_some(PagePlace::Stored { offset: first, stride: distance })
}
