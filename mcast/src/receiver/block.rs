use std::time::Duration;

use descriptor::fetch::Class;
use descriptor::image::Content;
use descriptor::{FrameRange, Gfn};

use super::nack::{Ask, Promise};
use super::pages::{Names, PageSet};
use crate::wire::{Lack, ShardDatagram, ShardKind};
use crate::{BlockId, BlockMap, ChannelParameters, ChunkSet, Geometry, Shard, ShardSet};

/// A block that is not finished: which shards of it are there, and which pages went out.
#[derive(Debug)]
pub(super) struct Block {
    class: Class,
    /// Its source shards; zero while nothing of it was seen.
    count: u8,
    have: ShardSet,
    /// Source shards that are not there.
    lacking: u8,
    /// The rows of parity that are there, a bit each.
    rows: u64,
    /// The source shards that are known to have been sent are those below.
    exposed: u8,
    map: Option<BlockMap>,
    names: Names,
    /// Stored pages, known from the length of the last shard.
    pages: Option<u32>,
    /// What went out: pages, and runs of zeros.
    delivered: PageSet,
    zeros: usize,
    /// When it was first seen.
    opened: Duration,
    /// Pages go out as they become complete, not with the whole block.
    pub(super) eager: bool,
    /// It is given up once what is there went out.
    pub(super) doomed: bool,
    /// It is in the queue of those that may have something to put out.
    pub(super) queued: bool,
    pub(super) ask: Ask,
    pub(super) promise: Option<Promise>,
    pub(super) tries: u8,
    /// Something new came since it was last asked for.
    pub(super) progress: bool,
}

/// What a block puts out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Pages { first_page: u32, frames: FrameRange },
    Zeros { frames: FrameRange },
}

impl Block {
    /// A block of `count` shards, zero where that is not known.
    pub(super) fn new(now: Duration, class: Class, count: u8) -> Self {
        Self {
            class,
            count,
            have: ShardSet::EMPTY,
            lacking: count,
            rows: 0,
            exposed: 0,
            map: None,
            names: Names::default(),
            pages: None,
            delivered: PageSet::default(),
            zeros: 0,
            opened: now,
            eager: class == Class::Demand,
            doomed: false,
            queued: false,
            ask: Ask::Nothing,
            promise: None,
            tries: 0,
            progress: false,
        }
    }

    pub(super) fn count(&self) -> u8 {
        self.count
    }

    pub(super) fn is_unseen(&self) -> bool {
        self.count == 0
    }

    pub(super) fn is_complete(&self) -> bool {
        self.lacking == 0 && !self.is_unseen()
    }

    pub(super) fn has_map(&self) -> bool {
        self.map.is_some()
    }

    /// True when enough parity is there to compute what is missing.
    pub(super) fn is_recoverable(&self) -> bool {
        self.lacking > 0 && u32::from(self.lacking) <= self.rows.count_ones()
    }

    /// True when it was first seen at least `age` ago.
    pub(super) fn is_older(&self, now: Duration, age: Duration) -> bool {
        now >= self.opened + age
    }

    /// Takes in a shard that [fits](Geometry::fits); true when it is of use.
    pub(super) fn place(&mut self, geometry: Geometry, shard: &ShardDatagram<'_>, frames: u64) -> bool {
        if self.is_unseen() {
            (self.count, self.lacking) = (shard.count, shard.count);
            self.exposed = if self.exposed > 0 { shard.count } else { 0 };
        }
        let useful = match shard.shard() {
            Shard::Parity(row) => self.place_parity(row),
            Shard::Source(index) => {
                // Whoever waits for demand does not wait for the end of the block.
                if self.class == Class::Demand && shard.kind == ShardKind::Data {
                    self.exposed = self.exposed.max(index + 1);
                }
                self.place_source(geometry, shard, index, frames)
            }
        };
        self.progress |= useful;
        useful
    }

    /// Notes that all of the block is known to have been sent.
    pub(super) fn ended(&mut self) {
        self.exposed = if self.is_unseen() { 1 } else { self.count };
    }

    /// The shards that are missing although they were sent; of an unseen block, none that can be told.
    pub(super) fn missing(&self) -> ShardSet {
        if self.is_unseen() { ShardSet::EMPTY } else { ShardSet::first(self.exposed).without(self.have) }
    }

    /// True when something is missing that was sent.
    pub(super) fn is_lossy(&self) -> bool {
        self.is_unseen() && self.exposed > 0 || !self.missing().is_empty()
    }

    /// What has to be asked for; `None` when nothing is missing that parity does not make up for.
    pub(super) fn lack(&self, block: BlockId) -> Option<Lack> {
        if self.is_unseen() {
            return (self.exposed > 0).then_some(Lack { block, need: Lack::EVERYTHING, missing: ShardSet::EMPTY });
        }
        let missing = self.missing();
        let need = missing.len().saturating_sub(self.rows.count_ones() as u8);
        (need > 0).then_some(Lack { block, need, missing })
    }

    /// Takes in the map. False when it contradicts what is there; the block is then of no use.
    pub(super) fn set_map(&mut self, geometry: Geometry, map: BlockMap) -> bool {
        let pages = map.pages();
        if map.shards(geometry) != u32::from(self.count) || self.pages.is_some_and(|there| there != pages) {
            return false;
        }
        self.names = Names::default();
        (self.map, self.pages) = (Some(map), Some(pages));
        true
    }

    /// Notes that the missing shards are computed; how many they were.
    pub(super) fn recovered(&mut self) -> u8 {
        self.have = ShardSet::first(self.count);
        self.rows = 0;
        std::mem::take(&mut self.lacking)
    }

    /// What goes out next, if anything.
    pub(super) fn next_part(&mut self, geometry: Geometry) -> Option<Part> {
        if !self.eager && !self.is_complete() {
            return None;
        }
        let zeros = self.zero_runs().nth(self.zeros);
        if let Some(frames) = zeros {
            self.zeros += 1;
            return Some(Part::Zeros { frames });
        }
        let before_last = || geometry.first_page(self.count.saturating_sub(1)).min(geometry.pages_per_block());
        let pages = self.pages.unwrap_or_else(before_last);
        let (first_page, frames) = match &self.map {
            Some(map) => map.frames_of(0..pages).find_map(|run| self.ready(geometry, run, pages)),
            None => self.names.runs().into_iter().find_map(|run| self.ready(geometry, run, pages)),
        }?;
        self.delivered.insert(first_page..first_page + frames.count().get() as u32);
        Some(Part::Pages { first_page, frames })
    }

    /// True when some of the block lies in `lacks`, or may.
    pub(super) fn concerns(&self, channel: &ChannelParameters, lacks: &ChunkSet) -> bool {
        let chunk = |gfn: Gfn| lacks.contains(channel.chunk_of(gfn));
        match &self.map {
            Some(map) => map.runs().any(|(frames, _)| {
                let last = Gfn::new(frames.end().index() - 1);
                (channel.chunk_of(frames.start())..=channel.chunk_of(last)).any(|at| lacks.contains(at))
            }),
            None => self.names.frames().next().is_none() || self.names.frames().any(chunk),
        }
    }

    fn place_parity(&mut self, row: u8) -> bool {
        let bit = 1_u64 << (row % 64);
        // As many rows as shards are missing are all that can be used, and all that the bytes are kept of.
        let useful = self.rows & bit == 0 && self.rows.count_ones() < u32::from(self.lacking);
        self.rows |= if useful { bit } else { 0 };
        useful
    }

    fn place_source(&mut self, geometry: Geometry, shard: &ShardDatagram<'_>, index: u8, frames: u64) -> bool {
        if !self.have.insert(index) {
            return false;
        }
        self.lacking -= 1;
        if index + 1 == self.count {
            self.pages = self.pages.or(geometry.pages_with_last(self.count, shard.payload.len()));
        }
        if index > 0 && self.map.is_none() && shard.gfn.index() < frames {
            self.names.insert(geometry.first_page(index), shard.gfn.index() as u32);
        }
        true
    }

    fn zero_runs(&self) -> impl Iterator<Item = FrameRange> {
        let runs = self.map.iter().flat_map(BlockMap::runs);
        runs.filter(|(_, content)| *content == Content::Zero).map(|(frames, _)| frames)
    }

    /// The first pages of a run that are there and did not go out.
    fn ready(&self, geometry: Geometry, (first, run): (u32, FrameRange), pages: u32) -> Option<(u32, FrameRange)> {
        let end = (first + run.count().get() as u32).min(pages);
        let complete = self.is_complete();
        let is_ready = |page: &u32| {
            let shards = || geometry.shards_with(*page..*page + 1).all(|shard| self.have.contains(shard as u8));
            !self.delivered.contains(*page) && (complete || shards())
        };
        let start = (first..end).find(is_ready)?;
        let end = (start..end).find(|page| !is_ready(page)).unwrap_or(end);
        let at = run.start().index() + u64::from(start - first);
        Some((start, FrameRange::between(Gfn::new(at), Gfn::new(at + u64::from(end - start)))))
    }
}
