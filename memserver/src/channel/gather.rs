//! From shards to bursts: heads of our own, page bytes straight from the mapped image.

use std::sync::Arc;

use descriptor::FrameRange;
use mcast::wire::{HEAD, ShardDatagram, ShardKind};
use mcast::{BlockMap, Geometry, Piece};
use mcast_socket::{Burst, MAX_BURST, MAX_DATAGRAMS};

use crate::image::ServedImage;

/// What a burst needs until the kernel is done with it, and what tells whose it was.
#[derive(Debug)]
pub(crate) struct Kept {
    session: u64,
    /// Keeps the pages mapped.
    _image: Arc<ServedImage>,
}

impl Kept {
    pub(super) fn new(image: Arc<ServedImage>, session: u64) -> Self {
        Self { session, _image: image }
    }

    /// The session of the sender whose burst it is.
    pub(super) fn session(&self) -> u64 {
        self.session
    }
}

/// Shards of one size that fit into a burst.
pub(super) fn shards_per_burst(geometry: Geometry) -> usize {
    (MAX_BURST / (HEAD + geometry.payload())).clamp(1, MAX_DATAGRAMS)
}

/// Appends a source shard of the block `map`, of whose page bytes only the places are noted.
pub(super) fn push_source(
    burst: &mut Burst<Kept>,
    image: &ServedImage,
    map: &BlockMap,
    geometry: Geometry,
    head: &ShardDatagram<'_>,
) {
    burst.copy(&head.head());
    for piece in map.pieces(geometry, head.index) {
        match piece {
            Piece::Map(bytes) => burst.copy(map.encode().get(bytes).unwrap_or_default()),
            Piece::Pages { frames, skip, length } => push_pages(burst, image, frames, skip, length),
        }
    }
}

/// Appends a row of parity.
pub(super) fn push_parity(burst: &mut Burst<Kept>, head: &ShardDatagram<'_>, row: &[u8]) {
    debug_assert_eq!(head.kind, ShardKind::Parity);
    burst.copy(&head.head());
    burst.copy(row);
}

/// Notes the places of `length` bytes of `frames` after the first `skip`.
fn push_pages(burst: &mut Burst<Kept>, image: &ServedImage, frames: FrameRange, mut skip: usize, mut length: usize) {
    image.pieces(frames, |address, available| {
        let skipped = skip.min(available);
        let taken = length.min(available - skipped);
        burst.refer(address.addr() + skipped, taken);
        (skip, length) = (skip - skipped, length - taken);
    });
}
