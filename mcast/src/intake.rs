//! The receiver and the bytes of incomplete blocks, together: datagrams in, pages out.

use std::time::Duration;

use descriptor::{FrameRange, PageCount};

use crate::receiver::{ChannelEvent, Output, Receiver, ReceiverConfig, ReceiverStats};
use crate::wire::{Datagram, WireError};
use crate::{Assembler, BlockId, Lacks, Placed, Shard};

/// What one member makes of the datagrams of its channel.
///
/// Hand it each datagram, and after some of them, no more than [`Intake::MAX_BATCH`], take what comes out.
#[derive(Debug)]
pub struct Intake {
    receiver: Receiver,
    assembler: Assembler,
}

/// What comes out of an [`Intake`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IntakeEvent<'a> {
    /// Pages.
    Pages {
        /// Their frames.
        frames: FrameRange,
        /// Their bytes; `None` for zeros.
        bytes: Option<&'a [u8]>,
    },
    /// A datagram for the sender.
    Send {
        /// Its bytes.
        datagram: Vec<u8>,
    },
    /// Something happened to the channel.
    Channel(ChannelEvent),
}

/// What to look at next.
enum Found {
    Pages { block: BlockId, first_page: u32, frames: FrameRange },
    Other(IntakeEvent<'static>),
}

impl Intake {
    /// Datagrams between two looks at what they make, at most; were each of them a block, more would be dropped.
    pub const MAX_BATCH: usize = Receiver::MAX_UNTAKEN;

    /// An intake. `seed` makes the random waits of members differ.
    ///
    /// # Panics
    /// When the parameters make [no channel](crate::ChannelParameters::check).
    pub fn new(now: Duration, config: ReceiverConfig, seed: u64) -> Self {
        let assembler = Assembler::new(&config.channel, config.max_blocks.max(1) + Receiver::MAX_UNTAKEN);
        Self { assembler, receiver: Receiver::new(now, config, seed) }
    }

    /// Takes in a datagram, whatever it is.
    pub fn handle(&mut self, now: Duration, datagram: &[u8]) {
        let datagram = match Datagram::decode(datagram) {
            Ok(datagram) => datagram,
            Err(WireError::Version(_)) => return self.receiver.drops().version += 1,
            Err(_) => return self.receiver.drops().malformed += 1,
        };
        let Some(placement) = self.receiver.handle(now, &datagram) else { return };
        let Datagram::Shard(shard) = datagram else { return };
        let block = placement.block;
        match self.assembler.place(block, placement.count, placement.shard, shard.payload) {
            Placed::New if placement.shard == Shard::Source(0) => self.map(now, block),
            Placed::New => {}
            Placed::Known | Placed::Misfit | Placed::Full => self.receiver.spoiled(now, block),
        }
    }

    /// What comes out next, if anything. Bytes are there until the next call.
    pub fn poll(&mut self, now: Duration) -> Option<IntakeEvent<'_>> {
        match self.find(now)? {
            Found::Other(event) => Some(event),
            Found::Pages { block, first_page, frames } => {
                let pages = first_page..first_page + frames.count().get() as u32;
                let bytes = self.assembler.pages(block, pages);
                debug_assert!(bytes.is_some(), "the receiver knows what the assembler has");
                Some(match bytes {
                    bytes @ Some(_) => IntakeEvent::Pages { frames, bytes },
                    None => IntakeEvent::Pages {
                        frames: FrameRange::new(frames.start(), PageCount::ZERO),
                        bytes: Some(&[]),
                    },
                })
            }
        }
    }

    /// When [`Intake::poll`] may have something although no datagram comes. A time that is past means now.
    pub fn next_timeout(&self) -> Option<Duration> {
        self.receiver.next_timeout()
    }

    /// See [`Receiver::set_lacks`].
    ///
    /// # Panics
    /// When the chunks are not those of the channel.
    pub fn set_lacks(&mut self, now: Duration, lacks: Option<Lacks>) {
        self.receiver.set_lacks(now, lacks);
    }

    /// Tells how many datagrams the socket dropped so far, a counter that wraps.
    pub fn set_overflow(&mut self, total: u32) {
        self.receiver.set_overflow(total);
    }

    /// Members of the channel, as the sender last said; zero before it did.
    pub fn members(&self) -> u32 {
        self.receiver.members()
    }

    /// What was done and seen so far.
    pub fn stats(&self) -> &ReceiverStats {
        self.receiver.stats()
    }

    /// Blocks whose bytes are kept.
    #[cfg(test)]
    pub(crate) fn assembler_len(&self) -> usize {
        self.assembler.len()
    }

    /// Does what needs no one outside, up to the next that does.
    fn find(&mut self, now: Duration) -> Option<Found> {
        loop {
            return Some(match self.receiver.poll(now)? {
                Output::Pages { block, first_page, frames } => Found::Pages { block, first_page, frames },
                Output::Zeros { frames } => Found::Other(IntakeEvent::Pages { frames, bytes: None }),
                Output::Send { datagram } => Found::Other(IntakeEvent::Send { datagram }),
                Output::Event(event) => Found::Other(IntakeEvent::Channel(event)),
                Output::Recover { block } => {
                    match self.assembler.recover(block) {
                        Ok(()) => self.map(now, block),
                        Err(_) => self.receiver.spoiled(now, block),
                    }
                    continue;
                }
                Output::Release { block } => {
                    self.assembler.release(block);
                    continue;
                }
            });
        }
    }

    fn map(&mut self, now: Duration, block: BlockId) {
        match self.assembler.map(block) {
            Some(Ok(map)) => self.receiver.map(now, block, map),
            Some(Err(_)) | None => self.receiver.spoiled(now, block),
        }
    }
}
