use descriptor::{FrameRange, Gfn, PageCount};
use thiserror::Error;

use crate::{ChunkSet, Geometry, Serial, wire};

/// What both sides of a channel agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelParameters {
    /// Random for each start of a sender, so that a restarted one is not taken for its predecessor.
    pub session: u64,
    /// Bytes in a shard: what fits into a datagram on the path behind [`wire::HEAD`] bytes of header.
    pub payload: u16,
    /// Frames of the image, one more than its highest.
    pub frames: PageCount,
    /// Frames in a chunk, the unit in which receivers report what they lack.
    pub chunk_frames: PageCount,
}

/// A clone in a channel, by a random number that nobody else knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member(pub u64);

/// Where a member that joins begins: what was sent before is none of its concern.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// The number of the next datagram with pages.
    pub seq: Serial,
    /// The next block of each class, see [`crate::class_index`].
    pub next_block: [Serial; 2],
}

/// Why there can be no channel with these parameters.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChannelError {
    /// Shards too small or too large.
    #[error("a datagram payload of {0} bytes is not between {min} and {max}", min = ChannelParameters::MIN_PAYLOAD, max = ChannelParameters::MAX_PAYLOAD)]
    Payload(u16),
    /// An image without frames, or with more than the datagrams can name.
    #[error("an image of {0} frames has no multicast channel")]
    Frames(PageCount),
    /// Chunks that are not a power of two, or too many.
    #[error("chunks of {chunk_frames} frames do not suit an image of {frames}")]
    Chunks {
        /// Frames in a chunk.
        chunk_frames: PageCount,
        /// Frames of the image.
        frames: PageCount,
    },
}

impl ChannelParameters {
    /// The smallest payload: what a path with the least MTU of IPv4 (576 bytes) carries.
    pub const MIN_PAYLOAD: u16 = 512;

    /// The largest payload: 15 pages, close to what a datagram can hold at all.
    pub const MAX_PAYLOAD: u16 = 60 << 10;

    /// Frames of an image, at most: 16 TiB of memory, named by 32 bits.
    pub const MAX_FRAMES: PageCount = PageCount::new(u32::MAX as u64);

    /// The fewest frames in a chunk: 1 MiB, what a bulk block holds.
    pub const MIN_CHUNK: PageCount = PageCount::new(256);

    /// The parameters for an image of `frames`, with chunks small enough to be useful and large enough that a report fits
    /// into one datagram.
    ///
    /// # Errors
    /// When the payload or the image is too small or too large.
    pub fn new(session: u64, payload: u16, frames: PageCount) -> Result<Self, ChannelError> {
        let most = u64::from(wire::Report::max_chunks(payload));
        let chunk = frames.get().div_ceil(most.max(1)).max(Self::MIN_CHUNK.get()).next_power_of_two();
        let channel = Self { session, payload, frames, chunk_frames: PageCount::new(chunk) };
        channel.check()?;
        Ok(channel)
    }

    /// Finds out whether parameters from a peer make a channel.
    ///
    /// # Errors
    /// When they do not.
    pub fn check(&self) -> Result<(), ChannelError> {
        if !(Self::MIN_PAYLOAD..=Self::MAX_PAYLOAD).contains(&self.payload) {
            return Err(ChannelError::Payload(self.payload));
        }
        if self.frames.is_zero() || self.frames > Self::MAX_FRAMES {
            return Err(ChannelError::Frames(self.frames));
        }
        let chunk = self.chunk_frames.get();
        if !chunk.is_power_of_two() || self.frames.get().div_ceil(chunk) > ChunkSet::MAX.into() {
            return Err(ChannelError::Chunks { chunk_frames: self.chunk_frames, frames: self.frames });
        }
        Ok(())
    }

    /// How blocks are cut.
    pub fn geometry(&self) -> Geometry {
        Geometry::new(self.payload)
    }

    /// The number of chunks.
    pub fn chunks(&self) -> u32 {
        self.frames.get().div_ceil(self.chunk_frames.get()) as u32
    }

    /// The chunk that `gfn` lies in.
    pub fn chunk_of(&self, gfn: Gfn) -> u32 {
        (gfn.index() / self.chunk_frames.get()) as u32
    }

    /// The frames of a chunk; none beyond the image.
    pub fn chunk(&self, chunk: u32) -> FrameRange {
        let start = (u64::from(chunk) * self.chunk_frames.get()).min(self.frames.get());
        let end = (start + self.chunk_frames.get()).min(self.frames.get());
        FrameRange::between(Gfn::new(start), Gfn::new(end))
    }

    /// True when all of `range` lies in the image.
    pub fn holds(&self, range: FrameRange) -> bool {
        range.end().index() <= self.frames.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_fit_into_a_report() {
        for (payload, gib, expected) in
            [(1448, 1, 256), (1448, 8, 256), (1448, 16, 512), (1448, 1024, 32768), (512, 16, 2048)]
        {
            let channel = ChannelParameters::new(1, payload, PageCount::new(gib << 18)).unwrap();
            assert_eq!(channel.chunk_frames.get(), expected, "{gib} GiB at {payload}");
            assert!(channel.chunks() <= wire::Report::max_chunks(payload).into());
        }
    }

    #[test]
    fn chunks_partition_the_image() {
        let channel = ChannelParameters::new(1, 1448, PageCount::new(1000)).unwrap();
        let chunks: Vec<_> = (0..channel.chunks()).map(|chunk| channel.chunk(chunk)).collect();
        assert_eq!(chunks.len(), 4);
        assert_eq!(chunks[3], FrameRange::new(Gfn::new(768), PageCount::new(232)));
        assert_eq!(channel.chunk_of(Gfn::new(999)), 3);
        assert!(channel.chunk(4).is_empty() && channel.chunk(u32::MAX).is_empty());
    }

    #[test]
    fn impossible_channels_are_refused() {
        assert_eq!(ChannelParameters::new(1, 511, PageCount::ONE), Err(ChannelError::Payload(511)));
        assert_eq!(ChannelParameters::new(1, 512, PageCount::ZERO), Err(ChannelError::Frames(PageCount::ZERO)));
        let most = ChannelParameters::MAX_FRAMES;
        assert!(ChannelParameters::new(1, 512, most).is_ok());
        assert!(ChannelParameters::new(1, 512, most + PageCount::ONE).is_err());
        let chunk_frames = PageCount::new(100);
        let odd = ChannelParameters { session: 1, payload: 512, frames: PageCount::new(1000), chunk_frames };
        assert!(matches!(odd.check(), Err(ChannelError::Chunks { .. })));
    }
}
