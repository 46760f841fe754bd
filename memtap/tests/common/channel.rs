use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use descriptor::fetch::{ChannelOffer, Class};
use descriptor::image::Content;
use descriptor::{FrameRange, Gfn, PAGE_SIZE, PageCount};
use mcast::wire::{Datagram, Pulse, PulseKind, ShardDatagram, ShardKind};
use mcast::{BlockId, BlockMap, ChannelParameters, ChunkSet, Geometry, Piece, Serial, class_index};

use super::{Image, noise};

/// What every member is told of heartbeats.
const HEARTBEAT: Duration = Duration::from_millis(20);

/// How a model channel behaves.
#[derive(Clone, Debug)]
pub struct ChannelBehaviour {
    /// The clones that it claims to have.
    pub members: u32,
    /// Push what members report to lack.
    pub pushes: bool,
    /// Lose every so many-th datagram with pages.
    pub loses: Option<u64>,
    /// Send nothing from the beginning on.
    pub mute: bool,
    /// Send nothing after so many datagrams with pages.
    pub mute_after: Option<u64>,
}

impl Default for ChannelBehaviour {
    fn default() -> Self {
        Self { members: 4, pushes: true, loses: None, mute: false, mute_after: None }
    }
}

/// A channel over the loopback interface that sends everything once and repairs nothing.
pub struct ModelChannel {
    image: Arc<Image>,
    behaviour: ChannelBehaviour,
    parameters: ChannelParameters,
    group: SocketAddrV4,
    socket: UdpSocket,
    state: Mutex<State>,
    /// Nothing is sent as long as this is true.
    pub muted: AtomicBool,
    /// Datagrams with pages that were sent, lost ones not included.
    pub sent: AtomicU64,
    /// Frames that were sent because of requests.
    pub demanded: AtomicU64,
    /// Reports that came.
    pub reports: AtomicU64,
    stop: AtomicBool,
}

#[derive(Default)]
struct State {
    seq: Serial,
    next_block: [Serial; 2],
    tried: u64,
    burst: u32,
    /// What members lacked when they reported last.
    lacks: BTreeMap<u64, ChunkSet>,
}

impl ModelChannel {
    pub fn new(image: &Arc<Image>, behaviour: ChannelBehaviour) -> (Arc<Self>, Vec<JoinHandle<()>>) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(HEARTBEAT / 4)).unwrap();
        let reference = socket2::SockRef::from(&socket);
        reference.set_multicast_if_v4(&Ipv4Addr::LOCALHOST).unwrap();
        reference.set_multicast_loop_v4(true).unwrap();
        // A group of its own: tests run at the same time.
        let port = socket.local_addr().unwrap().port();
        let group = SocketAddrV4::new(Ipv4Addr::new(239, 255, (port >> 8) as u8, port as u8), port);
        let session = noise(u64::from(port) ^ u64::from(std::process::id()) << 16);
        let parameters = ChannelParameters::new(session, 8000, image.memory.universe()).unwrap();
        let muted = AtomicBool::new(behaviour.mute);
        let channel = Arc::new(Self {
            image: Arc::clone(image),
            behaviour,
            parameters,
            group,
            socket,
            state: Mutex::new(State { seq: Serial::new(u32::MAX - 5), ..State::default() }),
            muted,
            sent: AtomicU64::new(0),
            demanded: AtomicU64::new(0),
            reports: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let (pushing, listening) = (Arc::clone(&channel), Arc::clone(&channel));
        (channel, vec![std::thread::spawn(move || pushing.push()), std::thread::spawn(move || listening.listen())])
    }

    pub fn end(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// The offer for one more member.
    pub fn offer(&self) -> ChannelOffer {
        let state = self.state.lock().unwrap();
        ChannelOffer {
            group: SocketAddr::V4(self.group),
            feedback: Some(Ipv4Addr::LOCALHOST.into()),
            feedback_port: self.socket.local_addr().unwrap().port(),
            payload: self.parameters.payload,
            chunk_frames: self.parameters.chunk_frames,
            session: self.parameters.session,
            member: noise(state.seq.get().into()),
            start_seq: state.seq.get(),
            start_block: state.next_block.map(Serial::get),
        }
    }

    /// Multicasts what somebody asked for.
    pub fn demand(&self, ranges: impl Iterator<Item = FrameRange>) {
        for range in ranges {
            self.demanded.fetch_add(range.count().get(), Ordering::Relaxed);
            for part in range.chunks(PageCount::new(Geometry::MAX_DEMAND_PAGES.into())) {
                self.send(Class::Demand, part);
            }
        }
    }

    fn send(&self, class: Class, frames: FrameRange) {
        let mut map = BlockMap::new();
        for gfn in frames.frames() {
            let zero = self.image.page(gfn).is_none_or(|page| page.iter().all(|byte| *byte == 0));
            let content = if zero { Content::Zero } else { Content::Stored };
            if !map.push(FrameRange::single(gfn), content) {
                self.send_block(class, &std::mem::take(&mut map));
                assert!(map.push(FrameRange::single(gfn), content));
            }
        }
        self.send_block(class, &map);
    }

    fn send_block(&self, class: Class, map: &BlockMap) {
        let geometry = self.parameters.geometry();
        let mut state = self.state.lock().unwrap();
        let number = &mut state.next_block[class_index(class)];
        let block = BlockId { class, number: *number };
        *number = number.next();
        let count = map.shards(geometry) as u8;
        for index in 0..count {
            let seq = state.seq;
            (state.seq, state.tried) = (seq.next(), state.tried + 1);
            if self.behaviour.mute_after.is_some_and(|after| state.tried > after) {
                self.muted.store(true, Ordering::Relaxed);
            }
            if self.behaviour.loses.is_some_and(|every| state.tried.is_multiple_of(every)) {
                continue;
            }
            let payload = self.bytes(map, index);
            let (session, kind, gfn) = (self.parameters.session, ShardKind::Data, map.named_by(geometry, index));
            let shard = ShardDatagram { session, seq, kind, block, index, count, gfn, payload: &payload };
            self.transmit(&Datagram::Shard(shard));
            self.sent.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn bytes(&self, map: &BlockMap, index: u8) -> Vec<u8> {
        let mut bytes = Vec::new();
        for piece in map.pieces(self.parameters.geometry(), index) {
            match piece {
                Piece::Map(range) => bytes.extend_from_slice(&map.encode()[range]),
                Piece::Pages { frames, skip, length } => {
                    let pages: Vec<u8> = frames.frames().flat_map(|gfn| self.page(gfn).iter().copied()).collect();
                    bytes.extend_from_slice(&pages[skip..skip + length]);
                }
            }
        }
        bytes
    }

    fn page(&self, gfn: Gfn) -> &[u8] {
        self.image.page(gfn).unwrap_or(&[0; PAGE_SIZE as usize])
    }

    fn transmit(&self, datagram: &Datagram<'_>) {
        if self.muted.load(Ordering::Relaxed) {
            return;
        }
        let mut bytes = Vec::new();
        datagram.encode(&mut bytes);
        self.socket.send_to(&bytes, self.group).unwrap();
    }

    /// Sends heartbeats, and pushes what is lacking.
    fn push(&self) {
        let began = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            self.pulse(PulseKind::Heartbeat, began);
            let wanted = {
                let mut state = self.state.lock().unwrap();
                let chunks = 0..self.parameters.chunks();
                let wanted: Vec<u32> =
                    chunks.filter(|chunk| state.lacks.values().any(|l| l.contains(*chunk))).collect();
                state.lacks.clear();
                wanted
            };
            if !wanted.is_empty() && self.behaviour.pushes {
                for chunk in wanted {
                    self.send(Class::Bulk, self.parameters.chunk(chunk));
                    // Some hundred megabytes a second.
                    std::thread::sleep(Duration::from_millis(2));
                }
                self.state.lock().unwrap().burst += 1;
                self.pulse(PulseKind::End, began);
            }
            std::thread::sleep(HEARTBEAT);
        }
    }

    fn pulse(&self, kind: PulseKind, began: Instant) {
        let (next_seq, next_block, burst) = {
            let state = self.state.lock().unwrap();
            (state.seq, state.next_block, state.burst)
        };
        let end = kind == PulseKind::End;
        self.transmit(&Datagram::Pulse(Pulse {
            kind,
            session: self.parameters.session,
            next_seq,
            bursting: false,
            // What was lost is never repaired here.
            endgame: end || burst > 0,
            next_block,
            oldest_block: next_block,
            members: self.behaviour.members,
            round_trip: Duration::from_micros(200),
            report_interval: Duration::from_millis(10),
            report_bytes: 0,
            burst,
            sent: began.elapsed(),
        }));
    }

    /// Takes reports.
    fn listen(&self) {
        let mut buffer = [0; 4096];
        while !self.stop.load(Ordering::Relaxed) {
            let Ok((length, _)) = self.socket.recv_from(&mut buffer) else { continue };
            let Ok(Datagram::Report(report)) = Datagram::decode(&buffer[..length]) else { continue };
            self.reports.fetch_add(1, Ordering::Relaxed);
            let Some(lacks) = report.lacks else { continue };
            let chunks = ChunkSet::from_bits(self.parameters.chunks(), lacks.first, lacks.chunks, lacks.bits);
            self.state.lock().unwrap().lacks.insert(report.member.0, chunks);
        }
    }
}
