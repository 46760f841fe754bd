//! Reliable multicast of the pages of a VM's memory: one answer serves every clone.
//!
//! ```text
//!         server                                                    each clone
//!   ┌────────────────────────┐                            ┌──────────────────────────────┐
//!   │ demand, order, members │                            │ pages of runs of frames      │
//!   │           ▼            │                            │           ▲                  │
//!   │        Sender ◀────────┼──── NACK, REPORT ◀─────────┼─ Intake = Receiver, which    │
//!   │           │ Transmit   │        (unicast)           │    │      says where a shard │
//!   │           ▼            │                            │    │      belongs and what   │
//!   │ shell: bytes of the    │                            │    │      is asked for again │
//!   │ image, in pieces of a  │                            │    └─── + Assembler, which   │
//!   │ BlockMap; fec::parity  │                            │           keeps the bytes    │
//!   └───────────┬────────────┘                            └───────────▲──────────────────┘
//!               └───── DATA, REPAIR, PARITY, CONFIRM, HEARTBEAT, END ─┘
//!                                    (to the group)
//! ```
//!
//! A sender groups pages into *blocks*, whose bytes (a map of the frames, then the stored pages) it cuts into *shards*, one a
//! datagram. Whoever misses shards asks for them by block; the answer, the shards themselves or rows of parity, goes to
//! everybody. There are two classes: *demand*, which somebody waits for, and *bulk*, which is pushed ahead of need.
//!
//! - [`wire`]: the datagrams, as values that were checked, and their encoders; with the protocol's diagram and versioning rule;
//! - [`BlockId`], [`BlockMap`], [`Piece`]: which frames a block has, and where the bytes of a shard come from;
//! - [`Geometry`], [`Shard`], [`ShardSet`]: how the bytes of a block are cut;
//! - [`ChannelParameters`], [`Start`], [`Member`]: what both sides agree on over the unicast lane;
//! - [`ChunkSet`], [`Lacks`]: what a clone lacks, coarsely; [`Serial`]: numbers that wrap;
//! - [`sender`]: what is multicast next, and how fast; it sees frames, never bytes;
//! - [`receiver`]: what is missing, asked for again and reported; it never sees bytes either;
//! - [`fec`], [`Assembler`]: parity, and the bytes of blocks that are not complete yet;
//! - [`intake`]: the receiver and the bytes together, from datagrams to pages.
//!
//! A block, a loss, and parity:
//!
//! ```
//! use descriptor::{FrameRange, Gfn, PageCount, fetch::Class, image::Content};
//! use mcast::{Assembler, BlockId, BlockMap, ChannelParameters, Placed, Serial, Shard, fec};
//!
//! let channel = ChannelParameters::new(7, 1448, PageCount::new(1 << 18))?;
//! let mut map = BlockMap::new();
//! map.push(FrameRange::new(Gfn::new(0x1234), PageCount::new(2)), Content::Stored);
//! let stream = [&map.encode()[..], &[0xa5; 8192]].concat();
//! let mut row = vec![0; 1448];
//! fec::parity(0..1, 1448, &stream, &mut row);
//!
//! let block = BlockId { class: Class::Bulk, number: Serial::new(0) };
//! let mut assembler = Assembler::new(&channel, 1);
//! for (index, shard) in stream.chunks(1448).enumerate().skip(1) {
//!     assert_eq!(assembler.place(block, 6, Shard::Source(index as u8), shard), Placed::New);
//! }
//! assert_eq!(assembler.map(block), None, "the first shard was lost");
//! assembler.place(block, 6, Shard::Parity(0), &row);
//! assembler.recover(block)?;
//! assert_eq!(assembler.map(block), Some(Ok(map)));
//! assert_eq!(assembler.pages(block, 0..2), Some(&[0xa5; 8192][..]));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What this crate deliberately does not do: it opens no socket, reads no clock, starts no thread and contains no unsafe code.
//! Time is a `Duration` since an epoch of the caller's, randomness comes from a seed. It decides neither which lane a request
//! takes nor when it has waited long enough, since the unicast lane and its deadlines are the pager's. Nothing is authenticated
//! here: a datagram of another session, or one that contradicts what came before, is dropped and counted.
#![forbid(unsafe_code)]

mod assembler;
mod back_off;
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
