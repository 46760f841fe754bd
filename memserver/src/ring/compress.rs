//! lz4 for the runs of one session, where it pays.

use std::io;

use descriptor::fetch::{Class, Encoding, PageRun};
use descriptor::{FrameRange, PAGE_SIZE, PageCount};
use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};

use super::gather::Gather;
use crate::image::ServedImage;
use crate::schedule::Run;

/// Pages in one block: 32 KiB, half of how far lz4 looks back, for which its smallest table suffices.
const BLOCK: PageCount = PageCount::new(8);

/// A block is sent raw when it does not shrink to this share of its size, as a saving of less does not pay for the work.
const WORTHWHILE: (usize, usize) = (3, 4);

/// Blocks after which it is decided whether to go on.
const SAMPLE: u32 = 32;

/// Blocks that are then sent raw before the next sample, when too few had shrunk.
const PAUSE: u32 = 512;

/// Compresses runs of a session.
pub(super) struct Compressor {
    always: bool,
    tried: u32,
    shrunk: u32,
    pause: u32,
    pages: Vec<u8>,
    block: Vec<u8>,
    table: CompressTable,
}

impl Compressor {
    /// One that compresses everything, or only bulk as long as it shrinks.
    pub(super) fn new(always: bool) -> Self {
        let table = CompressTable::small();
        Self { always, tried: 0, shrunk: 0, pause: 0, pages: Vec::new(), block: Vec::new(), table }
    }

    /// Appends the pages of a stored run in blocks, each compressed or not. Calls `sent` with each block's encoding and pages.
    ///
    /// # Errors
    /// When the image cannot be read. What was appended before is whole.
    pub(super) fn push(
        &mut self,
        gather: &mut Gather,
        image: &ServedImage,
        run: &Run,
        mut sent: impl FnMut(Encoding, PageCount),
    ) -> io::Result<()> {
        let mut blocks = run.frames.chunks(BLOCK).peekable();
        while let Some(frames) = blocks.next() {
            let last = run.last && blocks.peek().is_none();
            let encoding = if self.pause > 0 {
                self.pause -= 1;
                Encoding::Raw
            } else {
                self.compress(image, frames)?
            };
            if encoding == Encoding::Lz4 {
                gather.push(&PageRun::head(run.tag, frames, encoding, last, self.block.len()));
                gather.push(&self.block);
            } else {
                gather.push(&PageRun::head(run.tag, frames, encoding, last, frames.count().bytes() as usize));
                gather.push_stored(frames);
            }
            sent(encoding, frames.count());
        }
        Ok(())
    }

    /// True for the class of requests that are compressed at all. A single page costs more time to compress than to send.
    pub(super) fn takes(&self, class: Class) -> bool {
        self.always || class == Class::Bulk
    }

    /// Compresses `frames` into `self.block`.
    fn compress(&mut self, image: &ServedImage, frames: FrameRange) -> io::Result<Encoding> {
        let size = (frames.count().get() * PAGE_SIZE) as usize;
        self.pages.resize(size, 0);
        image.read(frames, &mut self.pages)?;
        self.block.resize(get_maximum_output_size(size), 0);
        let length = compress_into_with_table(&self.pages, &mut self.block, &mut self.table)
            .map_err(|error| io::Error::other(error.to_string()))?;
        let worthwhile = length <= size / WORTHWHILE.1 * WORTHWHILE.0;
        self.tried += 1;
        self.shrunk += u32::from(worthwhile);
        if self.tried == SAMPLE {
            self.pause = if self.shrunk * 2 < SAMPLE && !self.always { PAUSE } else { 0 };
            (self.tried, self.shrunk) = (0, 0);
        }
        self.block.truncate(length);
        Ok(if worthwhile { Encoding::Lz4 } else { Encoding::Raw })
    }
}
