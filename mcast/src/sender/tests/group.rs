use std::time::Duration;

use descriptor::fetch::Class;
use descriptor::image::Layout;
use descriptor::{FrameRange, FrameSet, PageCount};

use super::peer::Peer;
use super::{SESSION, Solid, ms};
use crate::sender::{ExpelReason, Sender, SenderConfig, SenderEvent, Transmit};
use crate::wire::{Answer, Datagram, HEAD, Pulse, PulseKind, ShardKind};
use crate::{ChannelParameters, Member, Serial, Start};

/// Each way between the sender and the members.
const DELAY: Duration = Duration::from_micros(100);

/// A sender and its members.
pub(super) struct Group {
    pub(super) sender: Sender,
    pub(super) layout: Box<dyn Layout>,
    pub(super) now: Duration,
    pub(super) peers: Vec<Peer>,
    /// What is on its way to the sender.
    feedback: Vec<(Duration, Vec<u8>)>,
    pub(super) expelled: Vec<(Duration, Member, ExpelReason)>,
    pub(super) nacks: u64,
    pub(super) pulses: Vec<(Duration, Pulse)>,
    /// Frames whose block began.
    pub(super) begun: Vec<(Duration, Class, FrameRange)>,
    /// What was sent, by time, class, kind and datagrams.
    pub(super) bursts: Vec<(Duration, Class, ShardKind, u8)>,
}

impl Group {
    pub(super) fn with(frames: u64, change: impl FnOnce(&mut SenderConfig)) -> Self {
        let channel = ChannelParameters::new(SESSION, 1448, PageCount::new(frames)).unwrap();
        let mut config = SenderConfig::new(channel);
        // All of the wire's numbers wrap in every test.
        let near = Serial::new(0).minus(3);
        config.start = Some(Start { seq: Serial::new(0).minus(100), next_block: [near, near] });
        change(&mut config);
        Self {
            sender: Sender::new(Duration::ZERO, config, 1),
            layout: Box::new(Solid),
            now: Duration::ZERO,
            peers: Vec::new(),
            feedback: Vec::new(),
            expelled: Vec::new(),
            nacks: 0,
            pulses: Vec::new(),
            begun: Vec::new(),
            bursts: Vec::new(),
        }
    }

    pub(super) fn new(frames: u64) -> Self {
        Self::with(frames, |_| {})
    }

    pub(super) fn join(&mut self, loss: f64) -> &mut Peer {
        let member = Member(self.peers.len() as u64 + 100);
        let start = self.sender.start();
        self.sender.join(self.now, member).unwrap();
        let wanted = FrameSet::full(self.sender.config.channel.frames);
        self.peers.push(Peer::new(self.now, member, start, loss, wanted));
        self.peers.last_mut().unwrap()
    }

    pub(super) fn join_all(&mut self, members: u32, loss: f64) {
        (0..members).for_each(|_| {
            self.join(loss);
        });
    }

    /// Nobody wants anything to be pushed.
    pub(super) fn want_nothing(&mut self) {
        self.peers.iter_mut().for_each(Peer::fetch);
    }

    pub(super) fn run_until(&mut self, end: Duration) {
        let mut steps = 0;
        while self.now < end {
            self.step(end);
            steps += 1;
            assert!(steps < 1_000_000, "no busy loop");
        }
    }

    /// Runs until these members have everything, and tells when that was.
    pub(super) fn complete(&mut self, of: std::ops::Range<usize>, end: Duration) -> Duration {
        while self.now < end && self.peers[of.clone()].iter().any(|peer| !peer.wanted.is_empty()) {
            self.step(end);
        }
        assert!(self.now < end, "not complete in time: {:?}", self.sender.stats());
        self.now
    }

    /// Bytes sent, per byte of the image.
    pub(super) fn ratio(&self) -> f64 {
        self.sender.stats().bytes as f64 / self.sender.config.channel.frames.bytes() as f64
    }

    pub(super) fn expelled_for(&self, at: usize) -> Option<(Duration, ExpelReason)> {
        let member = self.peers[at].member;
        self.expelled.iter().find(|(_, who, _)| *who == member).map(|(at, _, reason)| (*at, *reason))
    }

    fn step(&mut self, end: Duration) {
        let (arrived, later) = std::mem::take(&mut self.feedback).into_iter().partition(|(at, _)| *at <= self.now);
        self.feedback = later;
        arrived.into_iter().for_each(|(_, datagram): (_, Vec<u8>)| self.sender.feedback(self.now, &datagram));
        while let Some(SenderEvent::Expelled { member, reason }) = self.sender.poll_event() {
            self.expelled.push((self.now, member, reason));
        }
        let transmit = self.sender.poll(self.now, &*self.layout);
        if let Some(transmit) = &transmit {
            self.deliver(transmit);
        }
        let (now, channel) = (self.now, self.sender.config.channel);
        for peer in self.peers.iter_mut().filter(|peer| peer.reports()) {
            peer.work(now);
            if (now >= peer.next_report || peer.is_due()) && peer.sends() {
                self.feedback.push((now + DELAY, peer.report(now, channel, false)));
            }
            if now >= peer.next_report {
                peer.next_report = now + ms(10);
            }
        }
        if transmit.is_some() {
            // A burst takes a while to be handed over.
            self.now += Duration::from_micros(20);
            return;
        }
        let reports = self.peers.iter().filter(|peer| peer.reports()).map(|peer| peer.next_report);
        let next = reports.chain(self.feedback.iter().map(|(at, _)| *at)).chain(self.sender.next_timeout()).min();
        let next = next.unwrap_or(end).min(now + ms(1));
        self.now = next.clamp(now + Duration::from_nanos(100), end.max(now + DELAY));
    }

    fn deliver(&mut self, transmit: &Transmit) {
        let (now, channel) = (self.now, self.sender.config.channel);
        match transmit {
            Transmit::Shards { block, count, kind, shards, first_seq } => {
                assert!(!shards.is_empty());
                assert!(usize::from(shards.len()) * (HEAD + 1448) <= self.sender.config.burst);
                let map = *self.sender.block(*block).expect("a block under way is known");
                assert_eq!(u32::from(*count), map.shards(channel.geometry()));
                if *kind == ShardKind::Data && shards.iter().next() == Some(0) {
                    self.begun.extend(map.runs().map(|(frames, _)| (now, block.class, frames)));
                }
                self.bursts.push((now, block.class, *kind, shards.len()));
                for peer in self.peers.iter_mut().filter(|peer| peer.hears()) {
                    for (seq, index) in (0..).zip(shards.iter()) {
                        peer.arrive(now, (*block, *count, *kind), index, first_seq.plus(seq), &map);
                    }
                }
            }
            Transmit::Control { datagram } => match Datagram::decode(datagram).unwrap() {
                Datagram::Pulse(pulse) => self.deliver_pulse(&pulse),
                Datagram::Confirm(confirm) => {
                    for entry in confirm.entries().filter(|entry| entry.answer == Answer::Gone) {
                        self.peers.iter_mut().for_each(|peer| peer.gone(entry.block));
                    }
                }
                other => panic!("a sender sends no {other:?}"),
            },
        }
    }

    fn deliver_pulse(&mut self, pulse: &Pulse) {
        let (now, channel) = (self.now, self.sender.config.channel);
        self.pulses.push((now, *pulse));
        for peer in self.peers.iter_mut().filter(|peer| peer.hears()) {
            for datagram in peer.pulse(now, pulse) {
                self.nacks += 1;
                self.feedback.push((now + DELAY, datagram));
            }
            if pulse.kind == PulseKind::End && peer.is_asked(pulse) && peer.sends() {
                self.feedback.push((now + DELAY, peer.report(now, channel, true)));
            }
            if pulse.endgame {
                peer.fetch();
            }
        }
    }
}
