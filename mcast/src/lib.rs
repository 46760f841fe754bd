//! Reliable multicast of the pages of a VM's memory: one answer serves every clone.
//!
//! - [`wire`]: the datagrams, as checked views of bytes and their encoders;
//! - [`BlockMap`], [`BlockId`], [`Geometry`]: how pages are grouped into blocks and cut into shards;
//! - [`ChannelParameters`], [`Start`], [`Member`]: what both sides of a channel agree on over the unicast lane;
//! - [`fec`], [`Assembler`]: parity, and the bytes of incomplete blocks;
//! - [`sender`] and [`receiver`]: the state machines, which deal in frames and never see a page's bytes;
//! - [`intake`]: the receiver together with the bytes of incomplete blocks.
#![forbid(unsafe_code)]

mod assembler;
mod block;
mod channel;
mod chunks;
pub mod fec;
mod geometry;
pub mod intake;
pub mod receiver;
pub mod sender;
mod serial;
mod shard;
pub mod wire;

pub use assembler::{Assembler, Placed, RecoverError};
pub use block::{BlockId, BlockMap, MapError, Piece, class_index};
pub use channel::{ChannelError, ChannelParameters, Member, Start};
pub use chunks::{ChunkSet, Lacks};
pub use geometry::Geometry;
pub use serial::Serial;
pub use shard::{Shard, ShardSet};
