//! The server's end of the channel: mcast's sender, and a model of its shell, which gathers the bytes.

use std::rc::Rc;
use std::time::Duration;

use descriptor::PAGE_SIZE;
use mcast::sender::{Sender, SenderConfig, SenderStats, Transmit};
use mcast::wire::{ShardDatagram, ShardKind};
use mcast::{BlockId, BlockMap, ChannelParameters, Geometry, Piece, fec};

use super::Scenario;
use crate::image::Image;

/// A sender and the image that it sends.
#[derive(Debug)]
pub struct Server {
    /// The sender.
    pub sender: Sender,
    /// What its members are told.
    pub channel: ChannelParameters,
    image: Image,
    stream: Vec<u8>,
    parity: Vec<u8>,
}

impl Server {
    /// A server of the scenario's image, with the numbers that `session` makes.
    pub fn new(now: Duration, scenario: &Scenario, session: u64) -> Self {
        let frames = scenario.image.memory.universe();
        let channel =
            ChannelParameters::new(session, scenario.payload, frames).expect("scenarios have possible channels");
        let config =
            SenderConfig { max_rate: scenario.max_rate, history: scenario.history, ..SenderConfig::new(channel) };
        let mut sender = Sender::new(now, config, session);
        sender.set_order(scenario.order.clone());
        Self { sender, channel, image: scenario.image.clone(), stream: Vec::new(), parity: Vec::new() }
    }

    /// The datagrams to be sent now.
    pub fn poll(&mut self, now: Duration) -> Option<Vec<Rc<[u8]>>> {
        match self.sender.poll(now, &self.image)? {
            Transmit::Control { datagram } => Some(vec![datagram.into()]),
            Transmit::Shards { block, count, kind, shards, first_seq } => {
                let map = *self.sender.block(block).expect("what is sent is known");
                self.gather(&map);
                if kind == ShardKind::Parity {
                    let rows = shards.iter().next().unwrap_or(0)..shards.iter().last().map_or(0, |last| last + 1);
                    assert_eq!(rows.len(), usize::from(shards.len()), "rows of parity follow each other");
                    self.parity.resize(rows.len() * self.channel.geometry().payload(), 0);
                    fec::parity(rows, self.channel.geometry().payload(), &self.stream, &mut self.parity);
                }
                let seqs = (0..).map(|at| first_seq.plus(at));
                let datagrams = shards.iter().enumerate().zip(seqs).map(|((at, index), seq)| {
                    let payload = self.payload(&map, kind, at, index);
                    let gfn = match kind {
                        ShardKind::Parity => descriptor::Gfn::new(0),
                        ShardKind::Data | ShardKind::Repair => map.named_by(self.channel.geometry(), index),
                    };
                    let session = self.channel.session;
                    let datagram = ShardDatagram { session, seq, kind, block, index, count, gfn, payload };
                    [&datagram.head()[..], payload].concat().into()
                });
                Some(datagrams.collect())
            }
        }
    }

    /// What the sender did.
    pub fn stats(&self) -> &SenderStats {
        self.sender.stats()
    }

    /// Checks what must hold of the sender at any time.
    ///
    /// # Panics
    /// When it does not.
    pub fn check(&self, scenario: &Scenario) {
        let next = self.sender.start().next_block;
        for class in [descriptor::fetch::Class::Demand, descriptor::fetch::Class::Bulk] {
            let number = next[mcast::class_index(class)].minus(scenario.history as u32 + 1);
            assert!(self.sender.block(BlockId { class, number }).is_none(), "a block beyond the history is kept");
        }
        assert!(self.sender.members().count() <= scenario.clones.len(), "members that never joined");
    }

    fn payload(&self, map: &BlockMap, kind: ShardKind, at: usize, index: u8) -> &[u8] {
        let geometry = self.channel.geometry();
        match kind {
            ShardKind::Parity => &self.parity[at * geometry.payload()..][..geometry.payload()],
            ShardKind::Data | ShardKind::Repair => &self.stream[geometry.shard_span(index, map.pages())],
        }
    }

    /// Makes the stream of a block, by the pieces of its shards as the real shell does.
    fn gather(&mut self, map: &BlockMap) {
        let geometry = self.channel.geometry();
        self.stream.clear();
        let mut pages = Vec::new();
        for shard in 0..map.shards(geometry) as u8 {
            assert!(shard < Geometry::MAX_SHARDS);
            for piece in map.pieces(geometry, shard) {
                match piece {
                    Piece::Map(bytes) => self.stream.extend_from_slice(&map.encode()[bytes]),
                    Piece::Pages { frames, skip, length } => {
                        pages.clear();
                        frames.frames().for_each(|gfn| self.image.push_page(gfn, &mut pages));
                        assert!(frames.count().bytes() - (skip as u64) < length as u64 + PAGE_SIZE, "a frame too many");
                        self.stream.extend_from_slice(&pages[skip..skip + length]);
                    }
                }
            }
        }
        assert_eq!(self.stream.len(), geometry.stream_length(map.pages()), "the pieces make the stream");
    }
}
