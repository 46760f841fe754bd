//! Guest-physical memory, as an image keeps it.

use super::Refusal;
use crate::image::ReadPages;
use crate::{FrameRange, Gfn, PAGE_SIZE, PageCount};

/// Some of the guest's memory: where it is for the guest, and which frames of the image it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bank {
    /// Its first guest-physical frame.
    pub physical: u64,
    /// Its frames in the image.
    pub frames: FrameRange,
}

/// The guest's memory by guest-physical address.
pub struct Physical<'i> {
    image: &'i dyn ReadPages,
    banks: Vec<Bank>,
    page_tables: Option<Vec<u64>>,
}

impl<'i> Physical<'i> {
    /// The memory of `image` that lies in `banks`, which are in ascending order and do not overlap.
    pub fn new(image: &'i dyn ReadPages, mut banks: Vec<Bank>) -> Self {
        banks.retain(|bank| !bank.frames.is_empty());
        debug_assert!(banks.is_sorted_by_key(|bank| bank.physical));
        Self { image, banks, page_tables: None }
    }

    /// The same, with what CR3 holds in each vCPU that uses paging.
    #[must_use]
    pub fn with_page_tables(self, page_tables: Option<Vec<u64>>) -> Self {
        Self { page_tables, ..self }
    }

    /// CR3 of the vCPUs, where it is known.
    pub(super) fn page_tables(&self) -> Option<&[u64]> {
        self.page_tables.as_deref()
    }

    /// The banks in ascending order.
    pub(super) fn banks(&self) -> &[Bank] {
        &self.banks
    }

    /// The image.
    pub(super) fn image(&self) -> &dyn ReadPages {
        self.image
    }

    /// The frame of the image that is the guest-physical `frame`.
    pub(super) fn gfn(&self, frame: u64) -> Option<Gfn> {
        let bank = &self.banks[self.banks.partition_point(|bank| bank.physical <= frame).checked_sub(1)?];
        let gfn = bank.frames.start().checked_add(PageCount::new(frame - bank.physical))?;
        bank.frames.contains(gfn).then_some(gfn)
    }

    /// The frames of the image that are the `count` guest-physical frames from `frame` on; they must lie in one bank.
    pub(super) fn frames(&self, frame: u64, count: u64) -> Result<FrameRange, Refusal> {
        let absent =
            || Refusal::NotMemory { address: frame.saturating_mul(PAGE_SIZE), length: count.saturating_mul(PAGE_SIZE) };
        let start = self.gfn(frame).ok_or_else(absent)?;
        let range = FrameRange::checked(start, PageCount::new(count)).ok_or_else(absent)?;
        self.banks.iter().any(|bank| bank.frames.covers(range)).then_some(range).ok_or_else(absent)
    }

    /// Reads whole pages from the guest-physical `frame` on; they must lie in one bank.
    pub(super) fn read_pages(&self, frame: u64, pages: &mut [u8]) -> Result<(), Refusal> {
        let range = self.frames(frame, pages.len() as u64 / PAGE_SIZE)?;
        Ok(self.image.read_pages(range, pages)?)
    }
}
