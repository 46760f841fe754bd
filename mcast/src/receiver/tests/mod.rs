//! The receiver with its bytes, against a small sender of its own.

mod asking;
mod receiving;
mod reporting;

use std::collections::BTreeMap;
use std::time::Duration;

use descriptor::fetch::Class;
use descriptor::image::Content;
use descriptor::{FrameRange, Gfn, PAGE_SIZE, PageCount};
use fastrand::Rng;

use super::{ChannelEvent, ReceiverConfig};
use crate::intake::{Intake, IntakeEvent};
use crate::wire::{
    Answer, Confirm, Confirmation, Datagram, Lack, Nack, Pulse, PulseKind, Report, ShardDatagram, ShardKind,
};
use crate::{BlockId, BlockMap, ChannelParameters, ChunkSet, Lacks, Member, Serial, ShardSet, Start, class_index, fec};

const FRAMES: u64 = 10_000;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn bulk(number: u32) -> BlockId {
    BlockId { class: Class::Bulk, number: Serial::new(number) }
}

fn demand(number: u32) -> BlockId {
    BlockId { class: Class::Demand, number: Serial::new(number) }
}

fn page(gfn: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE_SIZE as usize];
    Rng::with_seed(gfn).fill(&mut page);
    page
}

/// A map of runs: first frame, frames, whether they are stored.
fn map(runs: &[(u64, u64, bool)]) -> BlockMap {
    let mut map = BlockMap::new();
    for (start, count, stored) in runs {
        let content = if *stored { Content::Stored } else { Content::Zero };
        assert!(map.push(FrameRange::new(Gfn::new(*start), PageCount::new(*count)), content));
    }
    map
}

/// A sender without judgement, and what it sent.
struct Server {
    channel: ChannelParameters,
    seq: Serial,
    blocks: Vec<(BlockId, BlockMap, Vec<u8>)>,
    next: [Serial; 2],
    members: u32,
    rows: BTreeMap<(usize, u32), u8>,
}

impl Server {
    fn new(payload: u16, start: Start) -> Self {
        let channel = ChannelParameters::new(77, payload, PageCount::new(FRAMES)).unwrap();
        Self { channel, seq: start.seq, blocks: Vec::new(), next: start.next_block, members: 1, rows: BTreeMap::new() }
    }

    /// A new block: its number.
    fn block(&mut self, class: Class, map: BlockMap) -> BlockId {
        let number = self.next[class_index(class)];
        self.next[class_index(class)] = number.next();
        let mut stream = map.encode().to_vec();
        for (_, run) in map.frames_of(0..map.pages()) {
            run.frames().for_each(|gfn| stream.extend(page(gfn.index())));
        }
        let id = BlockId { class, number };
        self.blocks.push((id, map, stream));
        id
    }

    fn of(&self, id: BlockId) -> &(BlockId, BlockMap, Vec<u8>) {
        self.blocks.iter().find(|(block, _, _)| *block == id).unwrap()
    }

    fn count(&self, id: BlockId) -> u8 {
        self.of(id).1.shards(self.channel.geometry()) as u8
    }

    fn shards(&mut self, id: BlockId, kind: ShardKind, shards: impl IntoIterator<Item = u8>) -> Vec<Vec<u8>> {
        let geometry = self.channel.geometry();
        let (count, mut seq) = (self.count(id), self.seq);
        let (_, map, stream) = self.of(id);
        let mut row = vec![0; geometry.payload()];
        let mut out = Vec::new();
        for index in shards {
            let (gfn, payload) = if kind == ShardKind::Parity {
                fec::parity(index..index + 1, geometry.payload(), stream, &mut row);
                (Gfn::new(0), &row[..])
            } else {
                (map.named_by(geometry, index), &stream[geometry.shard_span(index, map.pages())])
            };
            let shard =
                ShardDatagram { session: self.channel.session, seq, kind, block: id, index, count, gfn, payload };
            seq = seq.next();
            let mut datagram = Vec::new();
            Datagram::Shard(shard).encode(&mut datagram);
            out.push(datagram);
        }
        self.seq = seq;
        out
    }

    fn data(&mut self, id: BlockId) -> Vec<Vec<u8>> {
        self.shards(id, ShardKind::Data, 0..self.count(id))
    }

    fn pulse(&self, kind: PulseKind, burst: u32) -> Pulse {
        Pulse {
            kind,
            session: self.channel.session,
            next_seq: self.seq,
            bursting: false,
            endgame: false,
            next_block: self.next,
            oldest_block: self.next.map(|next| next.minus(4096)),
            members: self.members,
            round_trip: ms(1),
            report_interval: ms(10),
            report_bytes: 0,
            burst,
            sent: ms(5),
        }
    }

    fn heartbeat(&self) -> Vec<u8> {
        encoded(&Datagram::Pulse(self.pulse(PulseKind::Heartbeat, 0)))
    }

    fn confirm(&self, block: BlockId, answer: Answer) -> Vec<u8> {
        let mut out = Vec::new();
        Confirm::encode(self.channel.session, self.seq, &[Confirmation { block, answer }], &mut out);
        out
    }

    /// The repair that a NACK's entry asks for.
    fn repair(&mut self, lack: &Lack, parity: bool) -> Vec<Vec<u8>> {
        let count = self.count(lack.block);
        if lack.need == Lack::EVERYTHING {
            return self.shards(lack.block, ShardKind::Repair, 0..count);
        }
        assert!(lack.missing.is_subset(ShardSet::first(count)) && lack.need <= lack.missing.len(), "{lack:?}");
        let row = self.rows.entry((class_index(lack.block.class), lack.block.number.get())).or_default();
        if parity && *row + lack.need <= 63 {
            let from = *row;
            *row += lack.need;
            self.shards(lack.block, ShardKind::Parity, from..from + lack.need)
        } else {
            self.shards(lack.block, ShardKind::Repair, lack.missing.iter())
        }
    }
}

fn encoded(datagram: &Datagram<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    datagram.encode(&mut out);
    out
}

fn everything(channel: &ChannelParameters) -> Option<Lacks> {
    Some(Lacks { chunks: ChunkSet::full(channel.chunks()), pages: channel.frames })
}

fn config(server: &Server) -> ReceiverConfig {
    let start = Start { seq: server.seq, next_block: server.next };
    ReceiverConfig::new(server.channel, Member(9), start, 8 << 20)
}

/// One clone, and what came out of its channel.
struct Clone {
    now: Duration,
    intake: Intake,
    /// How often each frame came, zeros included.
    frames: BTreeMap<u64, u32>,
    /// The runs that came, in order.
    runs: Vec<FrameRange>,
    nacks: Vec<Vec<Lack>>,
    reports: Vec<(Duration, Option<ChunkSet>)>,
    events: Vec<ChannelEvent>,
}

impl Clone {
    fn new(config: ReceiverConfig) -> Self {
        let channel = config.channel;
        let mut intake = Intake::new(ms(0), config, 4);
        intake.set_lacks(ms(0), everything(&channel));
        let (nacks, reports, events, runs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { now: ms(0), intake, frames: BTreeMap::new(), runs, nacks, reports, events }
    }

    fn of(server: &Server) -> Self {
        Self::new(config(server))
    }

    fn hear(&mut self, datagrams: impl IntoIterator<Item = Vec<u8>>) {
        for datagram in datagrams {
            self.intake.handle(self.now, &datagram);
            self.take();
        }
    }

    /// Lets time pass, event by event.
    fn wait(&mut self, span: Duration) {
        let end = self.now + span;
        loop {
            self.take();
            match self.intake.next_timeout() {
                Some(at) if at <= end => self.now = at.max(self.now),
                _ => break,
            }
        }
        self.now = end;
    }

    fn take(&mut self) {
        let mut rounds = 0;
        while let Some(event) = self.intake.poll(self.now) {
            rounds += 1;
            assert!(rounds < 100_000, "no end of events");
            match event {
                IntakeEvent::Pages { frames, bytes } => {
                    assert!(!frames.is_empty());
                    if let Some(bytes) = bytes {
                        let expected: Vec<u8> = frames.frames().flat_map(|gfn| page(gfn.index())).collect();
                        assert!(bytes == expected, "other bytes than those of {frames}");
                    }
                    self.runs.push(frames);
                    frames.frames().for_each(|gfn| *self.frames.entry(gfn.index()).or_default() += 1);
                }
                IntakeEvent::Send { datagram } => match Datagram::decode(&datagram).unwrap() {
                    Datagram::Nack(nack) => {
                        assert_eq!((nack.session, nack.member), (77, Member(9)));
                        self.nacks.push(Nack::entries(&nack).collect());
                    }
                    Datagram::Report(report) => {
                        let lacks = report.lacks.map(|lacks| lacks.set(40));
                        self.reports.push((self.now, lacks));
                    }
                    other => panic!("{other:?}"),
                },
                IntakeEvent::Channel(event) => self.events.push(event),
            }
        }
    }

    /// Waits for NACKs; what they ask for.
    fn asked(&mut self, span: Duration) -> Vec<Lack> {
        self.nacks.clear();
        self.wait(span);
        self.nacks.concat()
    }

    fn last_report(&mut self, span: Duration) -> Option<Report<'static>> {
        let end = self.now + span;
        let mut last = None;
        while self.now <= end {
            while let Some(event) = self.intake.poll(self.now) {
                if let IntakeEvent::Send { datagram } = event
                    && let Ok(Datagram::Report(report)) = Datagram::decode(&datagram)
                {
                    last = Some(Report { lacks: None, ..report });
                }
            }
            self.now += Duration::from_micros(100);
        }
        last
    }
}
