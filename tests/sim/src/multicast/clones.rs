//! A clone as far as the channel is concerned: mcast's intake, what the clone has, and a guest that touches one page after
//! the other. Lanes, deadlines and fallbacks are as in memtap, only simpler.

use std::time::Duration;

use descriptor::{FrameRange, FrameSet, Gfn, PAGE_SIZE, PageCount};
use fastrand::Rng;
use mcast::intake::{Intake, IntakeEvent};
use mcast::receiver::{ChannelEvent, ReceiverConfig, ReceiverStats};
use mcast::{ChannelParameters, ChunkSet, Lacks, Member, Start};

use super::network::{Path, Socket};
use super::scenario;
use crate::image::Image;

/// How long a clone waits for a first datagram of the channel before it fetches everything by unicast.
const PROBE: Duration = Duration::from_secs(1);

/// How long a push may bring nothing before the rest is fetched by unicast.
const STALL: Duration = Duration::from_secs(2);

/// The time after which a page that was asked for by multicast is asked for by unicast: at least, at most, and at first.
const DEADLINE: (Duration, Duration, Duration) =
    (Duration::from_millis(2), Duration::from_millis(50), Duration::from_millis(20));

/// Pages that are fetched by unicast at a time when nobody waits for them.
const BATCH: PageCount = PageCount::new(64);

/// A clone.
#[derive(Debug)]
pub struct Clone {
    /// What it is like.
    pub member: scenario::Member,
    /// Its way from the server.
    pub down: Path,
    /// Its way to the server.
    pub up: Path,
    /// The socket of the channel.
    pub socket: Socket,
    /// What it does not have yet.
    pub missing: FrameSet,
    /// It is connected to the unicast lane.
    pub connected: bool,
    /// It has gone.
    pub left: bool,
    /// How long the guest waited for each page that was not there.
    pub waits: Vec<Wait>,
    /// What it did.
    pub stats: CloneStats,
    /// What earlier channels received.
    pub received: Vec<ReceiverStats>,
    /// What it wants to be sent.
    pub outbox: Vec<Outgoing>,
    link: Link,
    channel: Option<ChannelParameters>,
    intake: Option<Intake>,
    /// Missing pages of each chunk.
    chunks: Vec<u32>,
    stale_lacks: bool,
    lazy: bool,
    endgame: bool,
    pushed: Duration,
    /// The access that the guest waits for.
    waiting: Option<Waiting>,
    /// The next access, by its place in the list, and its time.
    next: (usize, Duration),
    /// The guest runs once the clone was connected.
    runs: bool,
    /// Fetched by unicast and not come yet.
    fetching: Option<FrameRange>,
    smoothed: Option<Duration>,
    rng: Rng,
}

/// How long the guest waited for a page.
#[derive(Clone, Copy, Debug)]
pub struct Wait {
    /// From then on.
    pub since: Duration,
    /// So long.
    pub time: Duration,
    /// The request went by multicast.
    pub multicast: bool,
}

/// What a clone did.
#[derive(Clone, Copy, Debug, Default)]
pub struct CloneStats {
    /// Accesses that waited.
    pub waited: u64,
    /// Demand requests answered by unicast after their deadline.
    pub fallbacks: u64,
    /// Pages that came by unicast.
    pub unicast: u64,
    /// Pages that came by multicast, and were missing.
    pub multicast: u64,
    /// Pages that came by multicast and were there.
    pub known: u64,
    /// Times that the channel went silent.
    pub silences: u64,
}

/// Something for the server.
#[derive(Clone, Debug)]
pub enum Outgoing {
    /// By the channel.
    Feedback(Vec<u8>),
    /// By the unicast lane.
    Ask {
        /// The pages.
        range: FrameRange,
        /// They are to be multicast.
        multicast: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    /// There is none.
    None,
    Probing {
        until: Duration,
    },
    Live,
    Silent,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    gfn: Gfn,
    since: Duration,
    /// When it is asked for by unicast; `None` when it was.
    deadline: Option<Duration>,
    multicast: bool,
}

impl CloneStats {
    /// Adds another clone.
    pub fn add(&mut self, other: &CloneStats) {
        self.waited += other.waited;
        self.fallbacks += other.fallbacks;
        self.unicast += other.unicast;
        self.multicast += other.multicast;
        self.known += other.known;
        self.silences += other.silences;
    }
}

impl Clone {
    /// A clone that has nothing yet.
    pub fn new(member: scenario::Member, image: &Image, lazy: bool, rng: Rng) -> Self {
        let mut socket = Socket::new(member.buffer, member.speed);
        socket.stall = member.stall;
        Self {
            down: Path::new(member.down),
            up: Path::new(member.up),
            socket,
            missing: image.memory.present(),
            connected: false,
            left: false,
            waits: Vec::new(),
            stats: CloneStats::default(),
            received: Vec::new(),
            outbox: Vec::new(),
            link: Link::None,
            channel: None,
            intake: None,
            chunks: Vec::new(),
            stale_lacks: true,
            lazy,
            endgame: false,
            pushed: Duration::ZERO,
            waiting: None,
            next: (0, Duration::ZERO),
            runs: false,
            fetching: None,
            smoothed: None,
            member,
            rng,
        }
    }

    /// True when it has done and got all that it wanted.
    pub fn is_done(&self) -> bool {
        let ran = self.waiting.is_none() && self.next.0 == self.member.accesses.len();
        self.left || self.member.lies || ran && (self.lazy || self.missing.is_empty())
    }

    /// It is connected, and offered the channel.
    pub fn connect(&mut self, now: Duration, channel: ChannelParameters, member: Member, start: Start) {
        self.disconnect();
        self.connected = true;
        if !std::mem::replace(&mut self.runs, true) {
            self.next.1 = now;
        }
        let config = ReceiverConfig::new(channel, member, start, self.member.buffer.min(1 << 30) as u32);
        self.intake = Some(Intake::new(now, config, self.rng.u64(..)));
        self.channel = Some(channel);
        self.link = Link::Probing { until: now + PROBE };
        self.chunks = (0..channel.chunks()).map(|at| self.missing.count_in(channel.chunk(at)).get() as u32).collect();
        (self.stale_lacks, self.endgame) = (true, false);
        if let Some(waiting) = self.waiting.take() {
            self.ask(now, waiting.gfn, waiting.since);
        }
    }

    /// The connection is lost.
    pub fn disconnect(&mut self) {
        self.connected = false;
        self.fetching = None;
        self.gone();
    }

    /// It is no longer in the channel.
    pub fn gone(&mut self) {
        if let Some(intake) = self.intake.take() {
            self.received.push(*intake.stats());
        }
        self.link = Link::None;
    }

    /// Takes a datagram of the channel.
    pub fn receive(&mut self, now: Duration, datagram: &[u8], image: &Image) {
        if let Some(intake) = &mut self.intake {
            intake.set_overflow(self.socket.overflow);
            intake.handle(now, datagram);
            self.take_in(now, image);
        }
    }

    /// Takes pages from the unicast lane.
    pub fn answered(&mut self, now: Duration, range: FrameRange) {
        self.stats.unicast += range.count().get();
        if self.fetching == Some(range) {
            self.fetching = None;
        }
        self.arrived(now, range);
    }

    /// Does what is due.
    pub fn act(&mut self, now: Duration, image: &Image) {
        self.step(now);
        self.hydrate(now);
        if self.stale_lacks
            && let (Some(intake), Some(channel)) = (&mut self.intake, &self.channel)
        {
            self.stale_lacks = false;
            let mut lacks = Lacks { chunks: ChunkSet::new(channel.chunks()), pages: PageCount::ZERO };
            for (chunk, missing) in (0..).zip(&self.chunks).filter(|(_, missing)| **missing > 0) {
                lacks.chunks.insert(chunk);
                lacks.pages += PageCount::new((*missing).into());
            }
            intake.set_lacks(now, (!self.lazy && !self.endgame).then_some(lacks));
        }
        self.take_in(now, image);
    }

    /// When [`Clone::act`] has something to do although nothing comes.
    pub fn next_timeout(&self) -> Option<Duration> {
        let access =
            (self.runs && self.waiting.is_none() && self.next.0 < self.member.accesses.len()).then_some(self.next.1);
        let deadline = self.waiting.filter(|_| self.connected).and_then(|waiting| waiting.deadline);
        let hydrates = self.connected && !self.lazy && !self.missing.is_empty() && self.fetching.is_none();
        let background = match self.link {
            Link::Probing { until } if hydrates => Some(until),
            Link::Live if hydrates => Some(self.pushed + STALL),
            _ => None,
        };
        let intake = self.intake.as_ref().and_then(Intake::next_timeout);
        [access, deadline, background, intake].into_iter().flatten().min()
    }

    /// What the current receiver counted.
    pub fn receiver(&self) -> Option<&ReceiverStats> {
        self.intake.as_ref().map(Intake::stats)
    }

    fn take_in(&mut self, now: Duration, image: &Image) {
        let Some(mut intake) = self.intake.take() else { return };
        while let Some(event) = intake.poll(now) {
            match event {
                IntakeEvent::Pages { frames, bytes } => {
                    check(image, frames, bytes);
                    let new = self.missing.count_in(frames).get();
                    self.stats.multicast += new;
                    self.stats.known += frames.count().get() - new;
                    if new > 0 {
                        self.pushed = now;
                    }
                    self.arrived(now, frames);
                }
                IntakeEvent::Send { datagram } => self.outbox.push(Outgoing::Feedback(datagram)),
                IntakeEvent::Channel(event) => self.channel_event(now, event),
            }
        }
        self.intake = Some(intake);
    }

    fn channel_event(&mut self, now: Duration, event: ChannelEvent) {
        match event {
            ChannelEvent::Live => (self.link, self.pushed) = (Link::Live, now),
            ChannelEvent::Silent => {
                self.link = Link::Silent;
                self.stats.silences += 1;
            }
            ChannelEvent::BurstEnded { endgame } => {
                self.stale_lacks |= self.endgame != endgame;
                self.endgame = endgame;
            }
            // Whatever else there may be one day.
            _ => {}
        }
    }

    fn arrived(&mut self, now: Duration, frames: FrameRange) {
        if let Some(channel) = &self.channel {
            for run in self.missing.runs_in(frames) {
                let mut rest = run;
                while !rest.is_empty() {
                    let chunk = channel.chunk_of(rest.start());
                    let (piece, after) = rest.split_at(channel.chunk(chunk).end() - rest.start());
                    self.chunks[chunk as usize] -= piece.count().get() as u32;
                    self.stale_lacks = true;
                    rest = after;
                }
            }
        }
        self.missing.remove_range(frames);
        if let Some(waiting) = self.waiting.filter(|waiting| !self.missing.contains(waiting.gfn)) {
            let time = now - waiting.since;
            self.waits.push(Wait { since: waiting.since, time, multicast: waiting.multicast });
            if waiting.multicast && waiting.deadline.is_some() {
                self.smoothed = Some(self.smoothed.map_or(time, |smoothed| (smoothed * 7 + time) / 8));
            }
            self.waiting = None;
            self.next = (self.next.0 + 1, now + self.member.thinks.mul_f64(self.rng.f64()));
        }
    }

    /// Lets the guest go on, and asks again for what has waited too long.
    fn step(&mut self, now: Duration) {
        while self.runs && self.waiting.is_none() && self.next.1 <= now {
            let Some(gfn) = self.member.accesses.get(self.next.0).copied() else { break };
            if self.missing.contains(gfn) {
                self.stats.waited += 1;
                self.ask(now, gfn, now);
            } else {
                self.next = (self.next.0 + 1, now + self.member.thinks.mul_f64(self.rng.f64()));
            }
        }
        if let Some(waiting) = &mut self.waiting
            && self.connected
            && waiting.deadline.is_some_and(|deadline| deadline <= now)
        {
            waiting.deadline = None;
            self.stats.fallbacks += 1;
            self.outbox.push(Outgoing::Ask { range: FrameRange::single(waiting.gfn), multicast: false });
        }
    }

    fn ask(&mut self, now: Duration, gfn: Gfn, since: Duration) {
        let shared = self.intake.as_ref().is_some_and(|intake| intake.members() != 1);
        let multicast = self.link == Link::Live && shared;
        let (least, most, first) = DEADLINE;
        let patience = self.smoothed.map_or(first, |smoothed| (smoothed * 3).clamp(least, most));
        self.waiting = Some(Waiting { gfn, since, deadline: multicast.then(|| now + patience), multicast });
        if self.connected {
            self.outbox.push(Outgoing::Ask { range: FrameRange::single(gfn), multicast });
        }
    }

    /// Fetches by unicast what nobody pushes.
    fn hydrate(&mut self, now: Duration) {
        let alone = match self.link {
            Link::None | Link::Silent => true,
            Link::Probing { until } => until <= now,
            Link::Live => self.endgame || self.pushed + STALL <= now,
        };
        if !alone || self.lazy || !self.connected || self.fetching.is_some() {
            return;
        }
        if let Some(run) = self.missing.runs().next() {
            let (range, _) = run.split_at(BATCH);
            self.fetching = Some(range);
            self.outbox.push(Outgoing::Ask { range, multicast: false });
        }
    }
}

/// Checks that these are the bytes of the image.
fn check(image: &Image, frames: FrameRange, bytes: Option<&[u8]>) {
    assert!(image.memory.universe() >= frames.end() - Gfn::new(0), "pages {frames} beyond the image");
    let Some(bytes) = bytes else {
        assert!(frames.frames().all(|gfn| image.zero.contains(gfn)), "{frames} are not zero");
        return;
    };
    assert_eq!(bytes.len() as u64, frames.count().bytes(), "bytes of {frames}");
    for (gfn, page) in frames.frames().zip(bytes.chunks(PAGE_SIZE as usize)) {
        assert!(image.is_page(gfn, page), "page {gfn} is not the image's");
    }
}
