use std::ops::Range;

use descriptor::PAGE_SIZE;

use crate::Shard;

/// How the stream of a block is cut into shards: [`Geometry::MAP`] bytes of map, then the stored pages, in pieces of `payload`
/// bytes of which the last may be shorter.
///
/// Pages are counted within a block here, in the order of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    payload: u16,
}

const PAGE: usize = PAGE_SIZE as usize;

impl Geometry {
    /// Source shards of a block, at most. With [`Geometry::MAX_PARITY`] rows of parity they fill the 255 symbols of a
    /// Reed-Solomon code over GF(2^8). A block of 192 shards is 271 KiB at an MTU of 1500: enough to spread the cost of parity,
    /// and 64 incomplete ones are still small.
    pub const MAX_SHARDS: u8 = 192;

    /// Rows of parity of a block, at most: repairs a third of it.
    pub const MAX_PARITY: u8 = 63;

    /// Bytes of the map that opens the stream.
    pub const MAP: usize = 128;

    /// Stored pages in a bulk block, at most: 1 MiB, so that a loss delays no more than that.
    pub const MAX_PAGES: u32 = 256;

    /// Stored pages in a demand block, at most. Somebody waits for each of them, and whoever misses a shard of them too.
    pub const MAX_DEMAND_PAGES: u32 = 16;

    /// Shards of `payload` bytes.
    ///
    /// # Panics
    /// When the map does not fit into one shard.
    pub const fn new(payload: u16) -> Self {
        assert!(payload as usize >= Self::MAP, "a shard holds the map of its block");
        Self { payload }
    }

    /// Bytes in a shard.
    pub const fn payload(self) -> usize {
        self.payload as usize
    }

    /// Stored pages that a block can hold.
    pub const fn pages_per_block(self) -> u32 {
        let fit = (Self::MAX_SHARDS as usize * self.payload() - Self::MAP) / PAGE;
        if fit < Self::MAX_PAGES as usize { fit as u32 } else { Self::MAX_PAGES }
    }

    /// Shards of the largest block.
    pub const fn max_shards(self) -> u8 {
        self.shards_of(self.pages_per_block()) as u8
    }

    /// The stored pages of a block of `shards` whose last one has `length` bytes; `None` when no block has.
    pub const fn pages_with_last(self, shards: u8, length: usize) -> Option<u32> {
        if shards == 0 || length == 0 || length > self.payload() {
            return None;
        }
        let stream = (shards as usize - 1) * self.payload() + length;
        if stream < Self::MAP || !(stream - Self::MAP).is_multiple_of(PAGE) {
            return None;
        }
        let pages = ((stream - Self::MAP) / PAGE) as u32;
        if pages <= self.pages_per_block() { Some(pages) } else { None }
    }

    /// True when a block of `count` shards may have one of `length` bytes as `shard`.
    pub(crate) fn fits(self, count: u8, shard: Shard, length: usize) -> bool {
        (1..=self.max_shards()).contains(&count)
            && match shard {
                Shard::Source(index) if index.checked_add(1) == Some(count) => {
                    self.pages_with_last(count, length).is_some()
                }
                Shard::Source(index) => index < count && length == self.payload(),
                Shard::Parity(row) => row < Self::MAX_PARITY && length == self.payload(),
            }
    }

    /// Bytes in the stream of a block with `pages` stored pages.
    pub const fn stream_length(self, pages: u32) -> usize {
        Self::MAP + pages as usize * PAGE
    }

    /// Shards of a block with `pages` stored pages; above [`Geometry::MAX_SHARDS`] when there is no such block.
    pub const fn shards_of(self, pages: u32) -> u32 {
        self.stream_length(pages).div_ceil(self.payload()) as u32
    }

    /// The bytes of the stream that `shard` has when the block has `pages` stored pages.
    pub fn shard_span(self, shard: u8, pages: u32) -> Range<usize> {
        let length = self.stream_length(pages);
        let start = usize::from(shard) * self.payload();
        start.min(length)..(start + self.payload()).min(length)
    }

    /// The bytes of the stream that are `page`.
    pub const fn page_span(self, page: u32) -> Range<usize> {
        let start = self.stream_length(page);
        start..start + PAGE
    }

    /// The shards that hold bytes of `pages`, which is not empty.
    pub const fn shards_with(self, pages: Range<u32>) -> Range<u32> {
        let first = self.stream_length(pages.start) / self.payload();
        first as u32..self.shards_of(pages.end)
    }

    /// The page that the first page byte in `shard` belongs to, if the block has as many.
    pub const fn first_page(self, shard: u8) -> u32 {
        ((shard as usize * self.payload()).saturating_sub(Self::MAP) / PAGE) as u32
    }

    /// The pages of a block with `pages` stored pages that have bytes in `shard`.
    pub fn pages_in(self, shard: u8, pages: u32) -> Range<u32> {
        let span = self.shard_span(shard, pages);
        if span.end <= Self::MAP {
            return 0..0;
        }
        self.first_page(shard)..((span.end - Self::MAP).div_ceil(PAGE) as u32)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn blocks_on_common_paths() {
        let blocks = |payload| {
            let geometry = Geometry::new(payload);
            (geometry.pages_per_block(), geometry.shards_of(geometry.pages_per_block()))
        };
        assert_eq!(blocks(512), (23, 185));
        assert_eq!(blocks(1448), (67, 190));
        assert_eq!(blocks(8948), (256, 118));
        assert_eq!(blocks(61440), (256, 18));
    }

    #[test]
    fn pages_lie_where_they_are_said_to() {
        let geometry = Geometry::new(1448);
        assert_eq!(geometry.page_span(0), 128..4224);
        assert_eq!(geometry.shards_with(0..1), 0..3);
        assert_eq!(geometry.shards_with(1..2), 2..6);
        assert_eq!(geometry.pages_in(2, 2), 0..2);
        assert_eq!(geometry.pages_in(0, 0), 0..0);
        assert_eq!(geometry.shard_span(5, 2), 7240..8320);
        assert_eq!(geometry.shards_of(0), 1);
        assert_eq!(Geometry::new(128).pages_in(0, 1), 0..0);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn spans_agree(payload in 128_u16..=61440, pages in 0..=256_u32) {
            let geometry = Geometry::new(payload);
            let pages = pages.min(geometry.pages_per_block());
            let shards = u8::try_from(geometry.shards_of(pages)).unwrap();
            prop_assert!(shards <= Geometry::MAX_SHARDS);
            let mut at = 0;
            for shard in 0..shards {
                let span = geometry.shard_span(shard, pages);
                prop_assert_eq!(span.start, at);
                prop_assert!(!span.is_empty());
                at = span.end;
                let overlaps = |page: &u32| {
                    let page = geometry.page_span(*page);
                    page.start < span.end && span.start < page.end
                };
                prop_assert_eq!(geometry.pages_in(shard, pages).collect::<Vec<_>>(), (0..pages).filter(overlaps).collect::<Vec<_>>());
                for page in geometry.pages_in(shard, pages) {
                    prop_assert!(geometry.shards_with(page..page + 1).contains(&shard.into()));
                }
            }
            prop_assert_eq!(at, geometry.stream_length(pages));
            prop_assert_eq!(geometry.pages_with_last(shards, geometry.shard_span(shards - 1, pages).len()), Some(pages));
            prop_assert!(shards <= geometry.max_shards());
        }
    }
}
