//! Ten thousand receivers of one push: mcast's sender and receivers without any page bytes, so that they fit into memory.
//!
//! Every datagram comes to all receivers at the same moment, but for those that lose it, which is the hardest case for
//! feedback: all who have lost something find out at once.

use std::collections::BTreeMap;
use std::time::Duration;

use descriptor::{FrameRange, FrameSet, PAGE_SIZE, PageCount};
use fastrand::Rng;
use mcast::receiver::{ChannelEvent, Output, Receiver, ReceiverConfig};
use mcast::sender::{Sender, SenderConfig, Transmit};
use mcast::wire::{Datagram, ShardDatagram, ShardKind};
use mcast::{BlockId, ChannelParameters, ChunkSet, Geometry, Lacks, Member, Shard};

use super::report::OVERHEAD;
use crate::events::Queue;
use crate::image::Image;

/// What a group consists of.
#[derive(Clone, Copy, Debug)]
pub struct Sparse {
    /// The receivers.
    pub receivers: usize,
    /// Frames of the image, all stored.
    pub frames: u64,
    /// The probability that a datagram is lost, for each receiver anew, and on the way back too.
    pub loss: f64,
    /// What is random.
    pub seed: u64,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct SparseReport {
    /// Bytes that the server sent by multicast, with all headers, and by unicast at the end, for each byte of the image.
    pub bytes_ratio: f64,
    /// Pages fetched by unicast at the end, by all receivers.
    pub unicast: u64,
    /// Datagrams with shards.
    pub datagrams: u64,
    /// Those that somebody lost.
    pub lost: u64,
    /// NACK datagrams that the server received, the blocks named in them, and the most in ten milliseconds.
    pub nacks: u64,
    /// Blocks named in them.
    pub nacked: u64,
    /// The most NACKs in ten milliseconds.
    pub nacks_peak: u64,
    /// The most feedback of any kind in ten milliseconds.
    pub feedback_peak: u64,
    /// REPORTs that the server received.
    pub reports: u64,
    /// Members moved to unicast.
    pub expelled: u64,
    /// When the last was complete.
    pub time: Duration,
}

#[derive(Debug)]
enum Event {
    Server,
    Burst { shards: Vec<(BlockId, u8, ShardKind, u8, mcast::Serial)> },
    Control { datagram: Vec<u8> },
    Timer { receiver: usize },
    Feedback { datagram: Vec<u8> },
}

struct Group {
    config: Sparse,
    channel: ChannelParameters,
    image: Image,
    queue: Queue<Event>,
    sender: Sender,
    free_at: Duration,
    server_timer: Option<Duration>,
    receivers: Vec<Receiver>,
    missing: Vec<FrameSet>,
    timers: Vec<Option<Duration>>,
    incomplete: usize,
    report: SparseReport,
    bytes: u64,
    feedback: BTreeMap<u64, (u64, u64)>,
    zeros: Vec<u8>,
    rng: Rng,
}

/// When everything begins: a pulse sent at time 0 would look in reports as if none had come.
const BEGIN: Duration = Duration::from_micros(1);

/// One way of every path.
const DELAY: Duration = Duration::from_micros(50);

/// Bytes a second of the server's link.
const RATE: u64 = 1_250_000_000;

/// Pushes the image to the group.
///
/// # Panics
/// When somebody does not get all of it.
pub fn run(config: Sparse) -> SparseReport {
    let frames = PageCount::new(config.frames);
    let channel = ChannelParameters::new(7, 1448, frames).expect("possible parameters");
    let mut rng = Rng::with_seed(config.seed);
    let mut sender = Sender::new(BEGIN, SenderConfig::new(channel), rng.u64(..));
    let mut receivers = Vec::with_capacity(config.receivers);
    let everything = Lacks { chunks: ChunkSet::full(channel.chunks()), pages: frames };
    for at in 0..config.receivers {
        let member = Member(at as u64 + 1);
        sender.join(BEGIN, member).expect("there is room for all");
        let mut receiver =
            Receiver::new(BEGIN, ReceiverConfig::new(channel, member, sender.start(), 8 << 20), rng.u64(..));
        receiver.set_lacks(BEGIN, Some(everything.clone()));
        receivers.push(receiver);
    }
    let mut queue = Queue::new();
    queue.at(BEGIN, Event::Server);
    let group = Group {
        channel,
        image: Image::solid(config.frames, 1),
        queue,
        sender,
        free_at: Duration::ZERO,
        server_timer: Some(BEGIN),
        missing: vec![FrameSet::full(frames); config.receivers],
        timers: vec![None; config.receivers],
        incomplete: config.receivers,
        receivers,
        report: SparseReport::default(),
        bytes: 0,
        feedback: BTreeMap::new(),
        zeros: vec![0; channel.geometry().payload()],
        rng,
        config,
    };
    group.run()
}

impl Group {
    fn run(mut self) -> SparseReport {
        while self.incomplete > 0 {
            let event = self.queue.pop().expect("somebody always waits for a time");
            assert!(self.queue.now() < Duration::from_secs(120), "{} receivers lack something", self.incomplete);
            match event {
                Event::Server => {
                    self.server_timer = None;
                    self.pump();
                }
                Event::Feedback { datagram } => {
                    let now = self.queue.now();
                    let peak = self.feedback.entry(now.as_millis() as u64 / 10).or_default();
                    peak.0 += u64::from(datagram[1] == mcast::wire::kind::NACK);
                    peak.1 += 1;
                    self.sender.feedback(now, &datagram);
                    self.pump();
                }
                Event::Timer { receiver } => {
                    self.timers[receiver] = None;
                    self.settle(receiver);
                }
                Event::Control { datagram } => self.control(&datagram),
                Event::Burst { shards } => self.burst(&shards),
            }
        }
        let stats = self.sender.stats();
        let unicast = self.report.unicast * (PAGE_SIZE + OVERHEAD as u64 * 3 + 32);
        SparseReport {
            bytes_ratio: (self.bytes + unicast) as f64 / (self.config.frames * PAGE_SIZE) as f64,
            nacks: stats.nacks,
            nacked: stats.nacked,
            nacks_peak: self.feedback.values().map(|(nacks, _)| *nacks).max().unwrap_or(0),
            feedback_peak: self.feedback.values().map(|(_, all)| *all).max().unwrap_or(0),
            reports: stats.reports,
            expelled: stats.expelled,
            time: self.queue.now(),
            ..self.report
        }
    }

    fn pump(&mut self) {
        let now = self.queue.now();
        let due = loop {
            if self.free_at > now {
                break Some(self.free_at);
            }
            let Some(transmit) = self.sender.poll(now, &self.image) else { break self.sender.next_timeout() };
            let (bytes, event) = match transmit {
                Transmit::Control { datagram } => (datagram.len() + OVERHEAD, Event::Control { datagram }),
                Transmit::Shards { block, count, kind, shards, first_seq } => {
                    let seqs = (0..).map(|at| first_seq.plus(at));
                    let shards: Vec<_> =
                        shards.iter().zip(seqs).map(|(shard, seq)| (block, count, kind, shard, seq)).collect();
                    let datagram = mcast::wire::HEAD + usize::from(self.channel.payload) + OVERHEAD;
                    (shards.len() * datagram, Event::Burst { shards })
                }
            };
            self.bytes += bytes as u64;
            self.free_at = now + Duration::from_nanos(bytes as u64 * 1000 / (RATE / 1_000_000));
            self.queue.at(self.free_at + DELAY, event);
        };
        while self.sender.poll_event().is_some() {}
        if let Some(due) = due.map(|due| due.max(now))
            && self.server_timer.is_none_or(|timer| due < timer)
        {
            self.server_timer = Some(due);
            self.queue.at(due, Event::Server);
        }
    }

    fn control(&mut self, datagram: &[u8]) {
        let now = self.queue.now();
        let datagram = Datagram::decode(datagram).expect("the sender's own datagrams are sound");
        for receiver in 0..self.receivers.len() {
            if self.rng.f64() >= self.config.loss {
                self.receivers[receiver].handle(now, &datagram);
                self.settle(receiver);
            }
        }
    }

    fn burst(&mut self, shards: &[(BlockId, u8, ShardKind, u8, mcast::Serial)]) {
        let now = self.queue.now();
        let geometry = self.channel.geometry();
        let zeros = std::mem::take(&mut self.zeros);
        let datagrams: Vec<_> = shards.iter().map(|shard| self.datagram(geometry, shard, &zeros)).collect();
        let maps: Vec<_> = shards.iter().map(|(block, ..)| self.sender.block(*block).copied()).collect();
        let mut lost = vec![false; shards.len()];
        for receiver in 0..self.receivers.len() {
            let mut next_loss = self.gap();
            for (at, datagram) in datagrams.iter().enumerate() {
                if at == next_loss {
                    lost[at] = true;
                    next_loss += 1 + self.gap();
                    continue;
                }
                let Some(placement) = self.receivers[receiver].handle(now, datagram) else { continue };
                if let (Shard::Source(0), Some(map)) = (placement.shard, maps[at]) {
                    self.receivers[receiver].map(now, placement.block, map);
                }
            }
            self.settle(receiver);
        }
        self.report.datagrams += shards.len() as u64;
        self.report.lost += lost.iter().filter(|lost| **lost).count() as u64;
        drop(datagrams);
        self.zeros = zeros;
    }

    fn datagram<'a>(
        &self,
        geometry: Geometry,
        &(block, count, kind, index, seq): &(BlockId, u8, ShardKind, u8, mcast::Serial),
        zeros: &'a [u8],
    ) -> Datagram<'a> {
        let map = self.sender.block(block).expect("what is sent is known");
        let (gfn, length) = match kind {
            ShardKind::Parity => (descriptor::Gfn::new(0), geometry.payload()),
            _ => (map.named_by(geometry, index), geometry.shard_span(index, map.pages()).len()),
        };
        let session = self.channel.session;
        Datagram::Shard(ShardDatagram { session, seq, kind, block, index, count, gfn, payload: &zeros[..length] })
    }

    /// Datagrams until the next loss.
    fn gap(&mut self) -> usize {
        if self.config.loss <= 0.0 {
            return usize::MAX / 2;
        }
        ((1.0 - self.rng.f64()).ln() / (1.0 - self.config.loss).ln()) as usize
    }

    fn settle(&mut self, at: usize) {
        let now = self.queue.now();
        while let Some(output) = self.receivers[at].poll(now) {
            match output {
                Output::Pages { frames, .. } | Output::Zeros { frames } => self.arrived(at, frames),
                Output::Recover { block } => {
                    if let Some(map) = self.sender.block(block).copied() {
                        self.receivers[at].map(now, block, map);
                    }
                }
                Output::Release { .. } => {}
                Output::Send { datagram } => {
                    if self.rng.f64() >= self.config.loss {
                        self.queue.at(now + DELAY, Event::Feedback { datagram });
                    }
                }
                Output::Event(ChannelEvent::BurstEnded { endgame }) => {
                    if endgame && !self.missing[at].is_empty() {
                        self.report.unicast += self.missing[at].count().get();
                        let all = self.missing[at].bounds();
                        self.arrived(at, all);
                    }
                    let lacks = self.lacks(at);
                    self.receivers[at].set_lacks(now, lacks);
                }
                Output::Event(_) => {}
            }
        }
        if let Some(due) = self.receivers[at].next_timeout().map(|due| due.max(now))
            && self.timers[at].is_none_or(|timer| due < timer)
        {
            self.timers[at] = Some(due);
            self.queue.at(due, Event::Timer { receiver: at });
        }
    }

    fn arrived(&mut self, at: usize, frames: FrameRange) {
        let missing = &mut self.missing[at];
        if !missing.remove_range(frames).is_zero() && missing.is_empty() {
            self.incomplete -= 1;
            self.receivers[at].set_lacks(self.queue.now(), None);
        }
    }

    fn lacks(&self, at: usize) -> Option<Lacks> {
        let mut chunks = ChunkSet::new(self.channel.chunks());
        let missing = &self.missing[at];
        for run in missing.runs() {
            let last = descriptor::Gfn::new(run.end().index() - 1);
            (self.channel.chunk_of(run.start())..=self.channel.chunk_of(last)).for_each(|chunk| chunks.insert(chunk));
        }
        (!missing.is_empty()).then(|| Lacks { chunks, pages: missing.count() })
    }
}
