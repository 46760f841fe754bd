//! A clone's end of a channel, as simple as can be: it keeps the shards of incomplete blocks, checks every page of a complete
//! one, reports every few milliseconds, and asks for what its blocks lack. Nothing of the crate's own receiver is in it.

#![allow(unreachable_pub, reason = "a module of a test program")]

pub mod clone;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use descriptor::fetch::{ChannelOffer, Class};
use descriptor::image::Content;
use descriptor::{FrameRange, Gfn, PageCount};
use mcast::wire::{Datagram, Lack, LackBits, Nack, Pulse, Report, ShardDatagram, ShardKind};
use mcast::{BlockId, BlockMap, ChannelParameters, ChunkSet, Serial, ShardSet, class_index, fec};
use mcast_socket::{Group, ReceiveConfig, Receiving};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::common::{FRAMES, PAGE, PATIENCE, page_of};

/// The time between two reports, and between two NACKs for a block.
const INTERVAL: Duration = Duration::from_millis(10);

pub struct Member {
    offer: ChannelOffer,
    channel: ChannelParameters,
    receiving: Receiving,
    blocks: BTreeMap<(usize, u32), Block>,
    next_seq: Serial,
    received: u32,
    pulse: Option<(Pulse, Instant)>,
    reported: Option<Instant>,
    nacked: Instant,
    /// The first frames of the blocks of bulk, in the order of their completion.
    pub pushed: Vec<u64>,
    /// How often each frame came.
    pub got: Vec<u32>,
    /// Datagrams of shards, by kind.
    pub datagrams: BTreeMap<&'static str, u64>,
    /// It wants all frames to be pushed.
    pub wants_all: bool,
    /// Which shards get lost on the way.
    pub loses: Box<dyn Fn(&ShardDatagram<'_>) -> bool>,
}

#[derive(Default)]
struct Block {
    shards: BTreeMap<u8, Vec<u8>>,
    parity: BTreeMap<u8, Vec<u8>>,
    count: u8,
    done: bool,
}

impl Member {
    pub fn join(offer: ChannelOffer, interface: &str) -> Self {
        let group = Group::new(offer.group.ip(), offer.group.port(), Some(interface.into())).unwrap();
        let server = (offer.feedback.unwrap(), offer.feedback_port).into();
        let receiving = Receiving::open(&ReceiveConfig::new(group, server)).unwrap();
        let (session, payload, chunk_frames) = (offer.session, offer.payload, offer.chunk_frames);
        Self {
            offer,
            channel: ChannelParameters { session, payload, frames: PageCount::new(FRAMES), chunk_frames },
            receiving,
            blocks: BTreeMap::new(),
            next_seq: Serial::new(offer.start_seq),
            received: 0,
            pulse: None,
            reported: None,
            nacked: Instant::now(),
            pushed: Vec::new(),
            got: vec![0; FRAMES as usize],
            datagrams: BTreeMap::new(),
            wants_all: false,
            loses: Box::new(|_| false),
        }
    }

    pub fn has(&self, range: FrameRange) -> bool {
        range.frames().all(|frame| self.got[frame.index() as usize] > 0)
    }

    /// True when the sender has told to fetch what is lacking by unicast.
    pub fn is_endgame(&self) -> bool {
        self.pulse.is_some_and(|(pulse, _)| pulse.endgame)
    }

    /// The frames that never came.
    pub fn lacking(&self) -> Vec<FrameRange> {
        let missing = (0..FRAMES).filter(|frame| self.got[*frame as usize] == 0);
        missing.map(|frame| FrameRange::new(Gfn::new(frame), PageCount::ONE)).collect()
    }

    /// Takes datagrams until `done`.
    pub fn run_until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            let elapsed = start.elapsed();
            assert!(elapsed < PATIENCE, "{what} did not happen: {:?}, last {:?}", self.datagrams, self.pulse);
            self.turn(INTERVAL);
        }
    }

    /// Takes datagrams for some time.
    pub fn run_for(&mut self, time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            self.turn(INTERVAL);
        }
    }

    fn turn(&mut self, timeout: Duration) {
        let mut datagrams = Vec::new();
        while let Some(datagram) = self.receiving.receive().unwrap() {
            datagrams.push(datagram.bytes.to_vec());
            if datagrams.len() >= 256 {
                break;
            }
        }
        for bytes in &datagrams {
            match Datagram::decode(bytes).unwrap() {
                datagram if datagram.session() != self.offer.session => {}
                Datagram::Shard(shard) => self.shard(&shard),
                Datagram::Pulse(pulse) => self.pulse = Some((pulse, Instant::now())),
                Datagram::Confirm(_) => {}
                other => panic!("a server does not send {other:?}"),
            }
        }
        self.report();
        self.nack();
        if datagrams.is_empty() {
            let timeout = Timespec { tv_sec: 0, tv_nsec: timeout.subsec_nanos().into() };
            poll(&mut [PollFd::from_borrowed_fd(self.receiving.fd(), PollFlags::IN)], Some(&timeout)).unwrap();
        }
    }

    fn shard(&mut self, shard: &ShardDatagram<'_>) {
        self.next_seq = self.next_seq.later(shard.seq.next());
        let kind = match shard.kind {
            ShardKind::Data => "data",
            ShardKind::Repair => "repair",
            ShardKind::Parity => "parity",
        };
        *self.datagrams.entry(kind).or_default() += 1;
        if (self.loses)(shard) {
            return;
        }
        self.received += 1;
        let block = self.blocks.entry((class_index(shard.block.class), shard.block.number.get())).or_default();
        block.count = shard.count;
        let place = if shard.kind == ShardKind::Parity { &mut block.parity } else { &mut block.shards };
        place.insert(shard.index, shard.payload.to_vec());
        let known = block.shards.len() + block.parity.len();
        if !block.done && known >= usize::from(block.count) {
            block.done = true;
            let stream = block.stream(self.channel.geometry().payload());
            let first = take_pages(&stream, &mut self.got);
            block.shards.clear();
            self.pushed.extend(Some(first).filter(|_| shard.block.class == Class::Bulk));
        }
    }

    fn lacks(&self) -> (ChunkSet, u32) {
        let mut chunks = ChunkSet::new(self.channel.chunks());
        let missing = self.got.iter().enumerate().filter(|(_, times)| **times == 0 && self.wants_all);
        let count = missing.map(|(frame, _)| chunks.insert(self.channel.chunk_of(Gfn::new(frame as u64)))).count();
        (chunks, count as u32)
    }

    fn report(&mut self) {
        if self.reported.is_some_and(|last| last.elapsed() < INTERVAL) {
            return;
        }
        self.reported = Some(Instant::now());
        let (chunks, missing) = self.lacks();
        let report = Report {
            session: self.offer.session,
            member: mcast::Member(self.offer.member),
            leaving: false,
            next_seq: self.next_seq,
            received: self.received,
            lost: 0,
            overflow: 0,
            buffer: self.receiving.buffer_bytes() as u32,
            rate_kib: 0,
            echo: self.pulse.map_or(Duration::ZERO, |(pulse, _)| pulse.sent),
            held: self.pulse.map_or(Duration::ZERO, |(_, at)| at.elapsed()),
            missing,
            lacks: Some(LackBits::of(&chunks)),
        };
        let mut datagram = Vec::new();
        report.encode(&mut datagram);
        self.receiving.send_to_server(&datagram).unwrap();
    }

    /// Asks for what blocks lack that were sent in full.
    fn nack(&mut self) {
        let Some((pulse, _)) = self.pulse.filter(|_| self.nacked.elapsed() >= INTERVAL) else { return };
        self.nacked = Instant::now();
        let over = |(class, number): (usize, u32)| Serial::new(number).is_before(pulse.next_block[class]);
        let incomplete = self.blocks.iter().filter(|(id, block)| !block.done && over(**id));
        let entries: Vec<_> = incomplete
            .take(20)
            .map(|((class, number), block)| Lack {
                block: BlockId { class: [Class::Demand, Class::Bulk][*class], number: Serial::new(*number) },
                need: block.count - (block.shards.len() + block.parity.len()) as u8,
                missing: block.missing(),
            })
            .collect();
        if !entries.is_empty() {
            let mut datagram = Vec::new();
            Nack::encode(self.offer.session, mcast::Member(self.offer.member), &entries, &mut datagram);
            self.receiving.send_to_server(&datagram).unwrap();
        }
    }
}

impl Block {
    fn missing(&self) -> ShardSet {
        (0..self.count).filter(|index| !self.shards.contains_key(index)).collect()
    }

    /// The bytes of all shards, the missing ones recovered.
    fn stream(&self, payload: usize) -> Vec<u8> {
        let mut stream = vec![0; usize::from(self.count) * payload];
        for (index, bytes) in &self.shards {
            stream[usize::from(*index) * payload..][..bytes.len()].copy_from_slice(bytes);
        }
        let missing = self.missing();
        let rows: Vec<u8> = self.parity.keys().copied().take(missing.len().into()).collect();
        let mut parity: Vec<u8> = rows.iter().flat_map(|row| &self.parity[row]).copied().collect();
        if !rows.is_empty() {
            fec::recover(&mut stream, payload, missing, &rows, &mut parity);
        }
        stream
    }
}

/// Checks every page of a block, and counts it; tells the first frame.
fn take_pages(stream: &[u8], got: &mut [u32]) -> u64 {
    let map = BlockMap::decode(&stream[..BlockMap::LENGTH], PageCount::new(FRAMES)).unwrap();
    let mut pages = stream[BlockMap::LENGTH..].chunks_exact(PAGE);
    for (frames, content) in map.runs() {
        for frame in frames.frames() {
            let page = if content == Content::Stored { pages.next().unwrap() } else { &[0; PAGE] };
            assert!(page == page_of(frame.index()), "frame {frame} is wrong");
            got[frame.index() as usize] += 1;
        }
    }
    map.runs().next().unwrap().0.start().index()
}
