//! Rows of parity, made of bytes that are read from the image's files.

use std::io;
use std::ops::Range;

use descriptor::image::Content;
use descriptor::{PAGE_SIZE, PageCount};
use mcast::{BlockMap, Geometry, fec};

use crate::image::ServedImage;

/// Pages that are read at once: 64 KiB stay in the processor's cache until they are in all rows.
const PIECE: PageCount = PageCount::new(16);

/// Makes parity, in memory that it uses again.
#[derive(Debug, Default)]
pub(super) struct ParityMaker {
    rows: Vec<u8>,
    piece: Vec<u8>,
}

impl ParityMaker {
    /// These rows of the parity of the block `map`, one after the other, each of the geometry's payload.
    ///
    /// # Errors
    /// When pages cannot be read.
    pub(super) fn rows(
        &mut self,
        image: &ServedImage,
        map: &BlockMap,
        geometry: Geometry,
        rows: Range<u8>,
    ) -> io::Result<&[u8]> {
        self.rows.resize(rows.len() * geometry.payload(), 0);
        let mut parity = fec::Parity::new(rows, geometry.payload(), &mut self.rows);
        add(&mut parity, geometry, 0, &map.encode());
        let mut offset = BlockMap::LENGTH;
        for (mut rest, _) in map.runs().filter(|(_, content)| *content == Content::Stored) {
            while !rest.is_empty() {
                let (frames, after) = rest.split_at(PIECE);
                self.piece.resize((frames.count().get() * PAGE_SIZE) as usize, 0);
                image.read(frames, &mut self.piece)?;
                add(&mut parity, geometry, offset, &self.piece);
                offset += self.piece.len();
                rest = after;
            }
        }
        Ok(&self.rows)
    }
}

/// Adds `bytes` of the block's stream from `offset` on, shard by shard.
fn add(parity: &mut fec::Parity<'_>, geometry: Geometry, mut offset: usize, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let (shard, within) = (offset / geometry.payload(), offset % geometry.payload());
        let (head, rest) = bytes.split_at(bytes.len().min(geometry.payload() - within));
        // A block has fewer than 256 shards.
        parity.add(shard as u8, within, head);
        (offset, bytes) = (offset + head.len(), rest);
    }
}
