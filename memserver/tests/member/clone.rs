//! A clone that receives as clones do, by the crate's own receiver, and loses a share of what it is sent.

use std::time::{Duration, Instant};

use descriptor::PageCount;
use descriptor::fetch::ChannelOffer;
use mcast::intake::{Intake, IntakeEvent};
use mcast::receiver::{ChannelEvent, ReceiverConfig};
use mcast::{ChannelParameters, ChunkSet, Lacks, Serial, Start};
use mcast_socket::{Group, ReceiveConfig, Receiving};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::common::{FRAMES, PAGE, PATIENCE, page_of};

/// The longest sleep.
const NAP: Duration = Duration::from_millis(10);

pub struct CloneMember {
    channel: ChannelParameters,
    receiving: Receiving,
    pub intake: Intake,
    start: Instant,
    random: fastrand::Rng,
    loss: f64,
    pub got: Vec<bool>,
    pub endgame: bool,
}

impl CloneMember {
    pub fn join(offer: &ChannelOffer, interface: &str, seed: u64, loss: f64) -> Self {
        let group = Group::new(offer.group.ip(), offer.group.port(), Some(interface.into())).unwrap();
        let server = (offer.feedback.unwrap(), offer.feedback_port).into();
        let receiving = Receiving::open(&ReceiveConfig::new(group, server)).unwrap();
        let (session, payload, chunk_frames) = (offer.session, offer.payload, offer.chunk_frames);
        let channel = ChannelParameters { session, payload, frames: PageCount::new(FRAMES), chunk_frames };
        let start = Start { seq: Serial::new(offer.start_seq), next_block: offer.start_block.map(Serial::new) };
        let buffer = receiving.buffer_bytes() as u32;
        let mut intake =
            Intake::new(Duration::ZERO, ReceiverConfig::new(channel, mcast::Member(offer.member), start, buffer), seed);
        let chunks = ChunkSet::full(channel.chunks());
        intake.set_lacks(Duration::ZERO, Some(Lacks { chunks, pages: PageCount::new(FRAMES) }));
        let random = fastrand::Rng::with_seed(seed);
        Self {
            channel,
            receiving,
            intake,
            start: Instant::now(),
            random,
            loss,
            got: vec![false; FRAMES as usize],
            endgame: false,
        }
    }

    /// Receives until the image is complete or the rest is to be fetched by unicast.
    pub fn run(&mut self) {
        while !self.endgame && self.got.contains(&false) {
            assert!(self.start.elapsed() < PATIENCE, "{:?}", self.intake.stats());
            let mut idle = true;
            for _ in 0..Intake::MAX_BATCH {
                let Some(datagram) = self.receiving.receive().unwrap() else { break };
                idle = false;
                if self.random.f64() >= self.loss {
                    self.intake.handle(self.start.elapsed(), datagram.bytes);
                }
            }
            self.intake.set_overflow(self.receiving.drops());
            self.take();
            if idle {
                let due =
                    self.intake.next_timeout().map_or(NAP, |due| due.saturating_sub(self.start.elapsed()).min(NAP));
                let timeout = Timespec { tv_sec: 0, tv_nsec: due.subsec_nanos().into() };
                poll(&mut [PollFd::from_borrowed_fd(self.receiving.fd(), PollFlags::IN)], Some(&timeout)).unwrap();
            }
        }
    }

    fn take(&mut self) {
        let now = self.start.elapsed();
        let mut ended = false;
        while let Some(event) = self.intake.poll(now) {
            match event {
                IntakeEvent::Pages { frames, bytes } => {
                    for (at, frame) in frames.frames().enumerate() {
                        let page = bytes.map_or(&[0; PAGE][..], |bytes| &bytes[at * PAGE..][..PAGE]);
                        assert!(page == page_of(frame.index()), "frame {frame} is wrong");
                        self.got[frame.index() as usize] = true;
                    }
                }
                IntakeEvent::Send { datagram } => drop(self.receiving.send_to_server(&datagram).unwrap()),
                IntakeEvent::Channel(ChannelEvent::BurstEnded { endgame }) => (ended, self.endgame) = (true, endgame),
                IntakeEvent::Channel(_) => {}
            }
        }
        if ended {
            self.tell_lacks(now);
        }
    }

    fn tell_lacks(&mut self, now: Duration) {
        let mut chunks = ChunkSet::new(self.channel.chunks());
        let missing = self.got.iter().enumerate().filter(|(_, got)| !**got);
        let pages =
            missing.map(|(frame, _)| chunks.insert((frame as u64 / self.channel.chunk_frames.get()) as u32)).count();
        self.intake.set_lacks(now, Some(Lacks { chunks, pages: PageCount::new(pages as u64) }));
    }
}
