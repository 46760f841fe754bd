use std::collections::HashMap;
use std::ops::Range;

use descriptor::PageCount;
use thiserror::Error;

use crate::{BlockId, BlockMap, ChannelParameters, Geometry, MapError, Shard, ShardSet, fec};

/// The bytes of incomplete blocks: each has a buffer for its stream, in which shards are put in their places, so that pages
/// which follow each other come out as one slice.
///
/// It keeps at most as many blocks as it was made for, and decides nothing: what is received into which block, and when a block
/// is given up, is the receiver's business. A buffer is as long as the block's shards together: 271 KiB at an MTU of 1500, and
/// 1.1 MiB at most.
#[derive(Debug)]
pub struct Assembler {
    geometry: Geometry,
    frames: PageCount,
    blocks: HashMap<BlockId, Buffer>,
    max_blocks: usize,
    spare: Vec<Vec<u8>>,
}

/// Buffers of finished blocks that are kept for others. A receiver that loses nothing works on one or two blocks at a time.
const MAX_SPARE: usize = 8;

#[derive(Debug)]
struct Buffer {
    count: u8,
    /// Stored pages of the block, known from the length of its last shard.
    pages: Option<u32>,
    have: ShardSet,
    /// The shards, and what a larger block left behind them.
    stream: Vec<u8>,
    /// The numbers of the rows in `parity`.
    rows: Vec<u8>,
    parity: Vec<u8>,
}

/// What became of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// It is in its place.
    New,
    /// It was there before, or so much of the block is that it is of no use.
    Known,
    /// It cannot be a shard of this block: another count of shards, no such shard, or another length.
    Misfit,
    /// There are as many blocks as there may be.
    Full,
}

/// Why a block cannot be recovered.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecoverError {
    /// Nothing of the block is there.
    #[error("there is nothing of block {} of {:?}", .0.number, .0.class)]
    Unknown(BlockId),
    /// Too little of it is there.
    #[error("{missing} shards are missing, and {rows} rows of parity there")]
    Short {
        /// Source shards missing.
        missing: u8,
        /// Rows of parity.
        rows: usize,
    },
}

impl Assembler {
    /// An assembler for up to `max_blocks` incomplete blocks of a channel.
    pub fn new(channel: &ChannelParameters, max_blocks: usize) -> Self {
        let (geometry, frames) = (channel.geometry(), channel.frames);
        Self { geometry, frames, blocks: HashMap::new(), max_blocks, spare: Vec::new() }
    }

    /// Puts a shard into its place in a block of `count` shards.
    pub fn place(&mut self, block: BlockId, count: u8, shard: Shard, payload: &[u8]) -> Placed {
        let geometry = self.geometry;
        if !geometry.fits(count, shard, payload.len()) {
            return Placed::Misfit;
        }
        let Some(buffer) = self.buffer(block, count) else {
            return Placed::Full;
        };
        if buffer.count != count {
            return Placed::Misfit;
        }
        match shard {
            Shard::Source(index) => {
                if index + 1 == count && !buffer.have.contains(index) {
                    buffer.pages = geometry.pages_with_last(count, payload.len());
                }
                buffer.place(index, geometry.payload(), payload)
            }
            Shard::Parity(row) => buffer.place_parity(row, payload),
        }
    }

    /// The shards of the block that are in their places.
    #[cfg(test)]
    fn shards(&self, block: BlockId) -> ShardSet {
        self.blocks.get(&block).map_or(ShardSet::EMPTY, |buffer| buffer.have)
    }

    /// True when the block is not complete, and [`Assembler::recover`] would complete it.
    #[cfg(test)]
    fn is_recoverable(&self, block: BlockId) -> bool {
        self.blocks.get(&block).is_some_and(|buffer| {
            let missing = buffer.missing().len();
            missing > 0 && usize::from(missing) <= buffer.rows.len()
        })
    }

    /// Computes the missing shards of the block from its parity, which is used up.
    ///
    /// # Errors
    /// When too little of the block is there.
    pub fn recover(&mut self, block: BlockId) -> Result<(), RecoverError> {
        let payload = self.geometry.payload();
        let buffer = self.blocks.get_mut(&block).ok_or(RecoverError::Unknown(block))?;
        let missing = buffer.missing();
        let needed = usize::from(missing.len());
        if needed > buffer.rows.len() {
            return Err(RecoverError::Short { missing: missing.len(), rows: buffer.rows.len() });
        }
        let parity = &mut buffer.parity[..needed * payload];
        let stream = &mut buffer.stream[..usize::from(buffer.count) * payload];
        fec::recover(stream, payload, missing, &buffer.rows[..needed], parity);
        buffer.have = ShardSet::first(buffer.count);
        buffer.rows.clear();
        buffer.parity = Vec::new();
        if buffer.pages.is_none() {
            // The last shard was recovered with its padding; only the map tells where that begins.
            buffer.pages = Some(buffer.map(self.geometry, self.frames).map_or(0, |map| map.pages()));
        }
        Ok(())
    }

    /// The map of the block, as soon as its first shard is there.
    ///
    /// # Errors
    /// When the bytes are no map, or that of a block with another count of shards or pages.
    pub fn map(&self, block: BlockId) -> Option<Result<BlockMap, MapError>> {
        let buffer = self.blocks.get(&block).filter(|buffer| buffer.have.contains(0))?;
        Some(buffer.map(self.geometry, self.frames))
    }

    /// The bytes of these stored pages of the block, if all of them are there.
    pub fn pages(&self, block: BlockId, pages: Range<u32>) -> Option<&[u8]> {
        let buffer = self.blocks.get(&block)?;
        if buffer.pages.is_some_and(|there| pages.end > there) {
            return None;
        }
        if pages.is_empty() {
            return Some(&[]);
        }
        let shards = self.geometry.shards_with(pages.clone());
        let shards = u8::try_from(shards.start).ok()?..u8::try_from(shards.end).ok()?;
        if shards.end > buffer.count || shards.into_iter().any(|shard| !buffer.have.contains(shard)) {
            return None;
        }
        buffer.stream.get(self.geometry.page_span(pages.start).start..self.geometry.stream_length(pages.end))
    }

    /// Forgets the block.
    pub fn release(&mut self, block: BlockId) {
        if let Some(buffer) = self.blocks.remove(&block)
            && self.spare.len() < MAX_SPARE
        {
            self.spare.push(buffer.stream);
        }
    }

    /// The number of blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// True when there is no block.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    fn buffer(&mut self, block: BlockId, count: u8) -> Option<&mut Buffer> {
        if !self.blocks.contains_key(&block) {
            if self.blocks.len() >= self.max_blocks {
                return None;
            }
            let length = usize::from(count) * self.geometry.payload();
            // What a former block left stays, but never shows: only shards in their places are looked at. Small blocks and large
            // ones take turns, and to clear a large buffer again each time would cost as much as to fill it.
            let spare = self.spare.iter().rposition(|spare| spare.len() >= length);
            let spare = spare.or(self.spare.len().checked_sub(1)).map(|at| self.spare.swap_remove(at));
            let mut stream = spare.unwrap_or_default();
            stream.resize(length.max(stream.len()), 0);
            let (have, rows, parity) = (ShardSet::EMPTY, Vec::new(), Vec::new());
            self.blocks.insert(block, Buffer { count, pages: None, have, stream, rows, parity });
        }
        self.blocks.get_mut(&block)
    }
}

impl Buffer {
    fn place(&mut self, index: u8, size: usize, payload: &[u8]) -> Placed {
        if !self.have.insert(index) {
            return Placed::Known;
        }
        let place = &mut self.stream[usize::from(index) * size..][..size];
        let (head, padding) = place.split_at_mut(payload.len());
        head.copy_from_slice(payload);
        padding.fill(0);
        Placed::New
    }

    fn place_parity(&mut self, row: u8, payload: &[u8]) -> Placed {
        if self.rows.contains(&row) || self.rows.len() >= self.missing().len().into() {
            return Placed::Known;
        }
        self.rows.push(row);
        self.parity.extend_from_slice(payload);
        Placed::New
    }

    fn map(&self, geometry: Geometry, frames: PageCount) -> Result<BlockMap, MapError> {
        let map = BlockMap::decode(&self.stream[..BlockMap::LENGTH], frames)?;
        let pages = map.pages();
        let agrees = map.shards(geometry) == u32::from(self.count) && self.pages.is_none_or(|there| there == pages);
        if agrees { Ok(map) } else { Err(MapError::Pages(pages)) }
    }

    fn missing(&self) -> ShardSet {
        ShardSet::first(self.count).without(self.have)
    }
}

#[cfg(test)]
mod tests {
    use descriptor::fetch::Class;
    use descriptor::image::Content;
    use descriptor::{FrameRange, Gfn};
    use fastrand::Rng;
    use proptest::prelude::*;

    use super::*;
    use crate::Serial;

    const BLOCK: BlockId = BlockId { class: Class::Bulk, number: Serial::new(7) };

    fn channel(payload: u16) -> ChannelParameters {
        ChannelParameters::new(1, payload, PageCount::new(1000)).unwrap()
    }

    /// A block of two runs with a run of zeros between them, and its stream.
    fn block(pages: u32) -> (BlockMap, Vec<u8>) {
        let mut map = BlockMap::new();
        let range = |start: u64, count: u32| FrameRange::new(Gfn::new(start), PageCount::new(count.into()));
        let first = pages / 2;
        for (range, content) in [
            (range(10, first), Content::Stored),
            (range(300, 5), Content::Zero),
            (range(400, pages - first), Content::Stored),
        ] {
            assert!(range.is_empty() || map.push(range, content));
        }
        let mut stream = map.encode().to_vec();
        let mut rng = Rng::with_seed(3);
        stream.extend((0..pages * 4096).map(|_| rng.u8(..)));
        (map, stream)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_sufficient_shards_make_the_block(
            seed: u64,
            payload in prop::sample::select(vec![512_u16, 1428, 1448, 8948, 61440]),
            pages in 0..=23_u32,
        ) {
            let mut rng = Rng::with_seed(seed);
            let (map, stream) = block(pages);
            let channel = channel(payload);
            let former = BlockId { number: Serial::new(6), ..BLOCK };
            let geometry = channel.geometry();
            let count = map.shards(geometry) as u8;
            let mut parity = vec![0; 63 * usize::from(payload)];
            fec::parity(0..63, payload.into(), &stream, &mut parity);
            let source = (0..count).map(|at| (Shard::Source(at), &stream[geometry.shard_span(at, pages)]));
            let rows = (0..63).zip(parity.chunks(payload.into())).map(|(at, row)| (Shard::Parity(at), row));
            let mut arriving: Vec<_> = source.chain(rows).collect();
            rng.shuffle(&mut arriving);
            let mut assembler = Assembler::new(&channel, 1);
            // The buffer of another block is used again.
            prop_assert_eq!(assembler.place(former, 2, Shard::Source(0), &vec![0xff; payload.into()]), Placed::New);
            assembler.release(former);
            let mut had = ShardSet::EMPTY;
            for (shard, bytes) in arriving {
                let placed = assembler.place(BLOCK, count, shard, bytes);
                if let Shard::Source(index) = shard {
                    prop_assert_eq!(placed == Placed::New, had.insert(index));
                }
                for page in 0..pages {
                    let there = geometry.shards_with(page..page + 1).all(|shard| had.contains(shard as u8));
                    let expected = there.then(|| &stream[geometry.page_span(page)]);
                    prop_assert!(assembler.pages(BLOCK, page..page + 1) == expected);
                }
                if assembler.is_recoverable(BLOCK) {
                    prop_assert_eq!(assembler.recover(BLOCK), Ok(()));
                    had = ShardSet::first(count);
                }
                prop_assert_eq!(assembler.shards(BLOCK), had);
                prop_assert_eq!(assembler.map(BLOCK).is_some(), had.contains(0));
                if had.len() == count {
                    break;
                }
            }
            prop_assert_eq!(assembler.map(BLOCK), Some(Ok(map)));
            prop_assert!(assembler.pages(BLOCK, 0..pages) == Some(&stream[BlockMap::LENGTH..]));
            prop_assert!(assembler.pages(BLOCK, 0..pages + 1).is_none());
        }
    }

    #[test]
    fn misfits_are_left_out() {
        let channel = channel(1448);
        let (_, stream) = block(2);
        let mut assembler = Assembler::new(&channel, 1);
        let shard = &stream[..1448];
        assert_eq!(assembler.place(BLOCK, 6, Shard::Source(0), &shard[1..]), Placed::Misfit);
        assert_eq!(assembler.place(BLOCK, 6, Shard::Source(6), shard), Placed::Misfit);
        assert_eq!(assembler.place(BLOCK, 6, Shard::Source(5), shard), Placed::Misfit);
        assert_eq!(assembler.place(BLOCK, 6, Shard::Parity(63), shard), Placed::Misfit);
        assert_eq!(assembler.place(BLOCK, 191, Shard::Source(0), shard), Placed::Misfit);
        assert_eq!(assembler.place(BLOCK, 0, Shard::Source(0), shard), Placed::Misfit);
        assert!(assembler.is_empty());
        assert_eq!(assembler.place(BLOCK, 6, Shard::Source(0), shard), Placed::New);
        assert_eq!(assembler.place(BLOCK, 6, Shard::Source(0), shard), Placed::Known);
        assert_eq!(assembler.place(BLOCK, 7, Shard::Source(1), shard), Placed::Misfit);
        assert_eq!(assembler.recover(BLOCK), Err(RecoverError::Short { missing: 5, rows: 0 }));
        let other = BlockId { class: Class::Demand, ..BLOCK };
        assert_eq!(assembler.place(other, 6, Shard::Source(0), shard), Placed::Full);
        assembler.release(BLOCK);
        assert_eq!(assembler.place(other, 6, Shard::Source(0), shard), Placed::New);
        assert_eq!(assembler.recover(BLOCK), Err(RecoverError::Unknown(BLOCK)));
    }

    #[test]
    fn a_map_that_contradicts_the_count_is_an_error() {
        let (_, stream) = block(2);
        let mut assembler = Assembler::new(&channel(1448), 1);
        assert_eq!(assembler.place(BLOCK, 9, Shard::Source(0), &stream[..1448]), Placed::New);
        assert_eq!(assembler.map(BLOCK), Some(Err(MapError::Pages(2))));
    }

    #[test]
    fn parity_beyond_what_is_missing_is_not_kept() {
        let mut assembler = Assembler::new(&channel(1448), 1);
        let row = [0; 1448];
        let placed: Vec<_> = (0..4).map(|at| assembler.place(BLOCK, 3, Shard::Parity(at), &row)).collect();
        assert_eq!(placed, [Placed::New, Placed::New, Placed::New, Placed::Known]);
        assert_eq!(assembler.place(BLOCK, 3, Shard::Parity(1), &row), Placed::Known);
        assert!(assembler.is_recoverable(BLOCK));
    }
}
