//! Rows of parity, made of bytes that are read from the image's files.

use std::collections::VecDeque;
use std::io;

use descriptor::image::Content;
use mcast::{BlockId, BlockMap, Geometry, fec};

use crate::image::ServedImage;

/// Blocks whose bytes are kept, 1 MiB each at most: those that are being repaired at one time. Beyond them the page cache has
/// the bytes.
const KEPT: usize = 4;

/// The blocks of one channel that had parity last.
#[derive(Debug, Default)]
pub(super) struct Parity {
    recent: VecDeque<(BlockId, Vec<u8>)>,
    row: Vec<u8>,
}

impl Parity {
    /// Row `row` of the parity of a block.
    ///
    /// # Errors
    /// When the pages cannot be read.
    pub(super) fn row(
        &mut self,
        image: &ServedImage,
        block: BlockId,
        map: &BlockMap,
        geometry: Geometry,
        row: u8,
    ) -> io::Result<&[u8]> {
        if !self.recent.iter().any(|(id, _)| *id == block) {
            // The buffer of the oldest is used again.
            let oldest = if self.recent.len() < KEPT { None } else { self.recent.pop_back() };
            let mut stream = oldest.map_or_else(Vec::new, |(_, stream)| stream);
            read_stream(image, map, &mut stream)?;
            self.recent.push_front((block, stream));
        }
        let stream = self.recent.iter().find(|(id, _)| *id == block).map(|(_, stream)| stream.as_slice());
        self.row.clear();
        self.row.resize(geometry.payload(), 0);
        fec::parity(row..row + 1, geometry.payload(), stream.unwrap_or_default(), &mut self.row);
        Ok(&self.row)
    }
}

/// Reads the stream of a block.
fn read_stream(image: &ServedImage, map: &BlockMap, stream: &mut Vec<u8>) -> io::Result<()> {
    stream.clear();
    stream.extend_from_slice(&map.encode());
    for (frames, content) in map.runs() {
        if content == Content::Stored {
            let start = stream.len();
            stream.resize(start + frames.count().bytes() as usize, 0);
            image.read(frames, stream.get_mut(start..).unwrap_or_default())?;
        }
    }
    Ok(())
}
