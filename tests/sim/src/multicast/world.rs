//! Server, paths and clones together, and the properties that are checked.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use descriptor::FrameRange;
use fastrand::Rng;
use mcast::sender::SenderEvent;
use mcast::{ChannelParameters, Member, Start};

use super::clones::{Clone, Outgoing};
use super::liar::lie;
use super::network::{Passed, Path, chance};
use super::report::{OVERHEAD, Report};
use super::scenario::Scenario;
use super::server::Server;
use crate::events::Queue;

/// Events after which a run has got stuck in a circle.
const MAX_EVENTS: u64 = 20_000_000;

/// Virtual time after which a run has got stuck: far beyond every deadline and silence.
const MAX_TIME: Duration = Duration::from_secs(120);

/// Wake-ups at one and the same moment after which somebody spins.
const MAX_SPINS: u32 = 10_000;

/// When everything begins: a pulse sent at time 0 would look in reports as if none had come.
const BEGIN: Duration = Duration::from_micros(1);

/// Bytes that the server's shell hands to the network before it waits.
const UNDER_WAY: u64 = 8 * (60 << 10);

/// The longest that a guest may wait where nothing happens but losses: the longest deadline, and twice there and back by
/// unicast, see [`World::bound`].
const LONGEST_WAIT: Duration = Duration::from_millis(60);

/// A run.
#[derive(Debug)]
pub struct World {
    scenario: Scenario,
    queue: Queue<Event>,
    server: Server,
    /// Counts the server's restarts; what belongs to an earlier connection is lost.
    epoch: u32,
    members: BTreeMap<Member, usize>,
    ids: Vec<Option<Member>>,
    shared: Path,
    clones: Vec<Clone>,
    timers: Vec<Option<Duration>>,
    server_timer: Option<Duration>,
    spins: (Duration, u32),
    report: Report,
    rng: Rng,
}

#[derive(Debug)]
enum Event {
    Join { clone: usize },
    Joined { clone: usize, epoch: u32, channel: ChannelParameters, member: Member, start: Start },
    Leave { clone: usize },
    Gone { clone: usize, epoch: u32 },
    Asked { clone: usize, epoch: u32, range: FrameRange, multicast: bool },
    Answered { clone: usize, epoch: u32, range: FrameRange },
    Arrive { clone: usize, datagrams: Vec<Rc<[u8]>> },
    Feedback { bytes: Vec<u8> },
    Timer { clone: usize },
    Server,
    Lie { clone: usize },
    Restart,
    Cut { clone: usize, epoch: u32 },
}

impl World {
    /// The world of a scenario, at its beginning.
    pub fn new(scenario: Scenario) -> Self {
        let mut rng = Rng::with_seed(scenario.seed ^ 0xca57);
        let mut queue = Queue::new();
        let mut clones = Vec::new();
        for (at, member) in scenario.clones.iter().enumerate() {
            queue.at(member.joins.max(BEGIN), Event::Join { clone: at });
            if let Some(leaves) = member.leaves {
                queue.at(leaves, Event::Leave { clone: at });
            }
            clones.push(Clone::new(member.clone(), &scenario.image, scenario.lazy, rng.fork()));
        }
        if let Some(restart) = scenario.restart {
            queue.at(restart, Event::Restart);
        }
        queue.at(BEGIN, Event::Server);
        let report = Report { size: scenario.image.memory.present().count().bytes(), ..Report::default() };
        Self {
            server: Server::new(BEGIN, &scenario, rng.u64(..)),
            epoch: 0,
            members: BTreeMap::new(),
            ids: vec![None; clones.len()],
            shared: Path::new(scenario.shared),
            timers: vec![None; clones.len()],
            server_timer: Some(BEGIN),
            spins: (Duration::ZERO, 0),
            scenario,
            queue,
            clones,
            report,
            rng,
        }
    }

    /// Runs to the end.
    ///
    /// # Panics
    /// When a property does not hold.
    pub fn run(mut self) -> Report {
        while !self.clones.iter().all(Clone::is_done) {
            let event = self.queue.pop().expect("somebody always waits for a time");
            self.report.events += 1;
            assert!(
                self.report.events < MAX_EVENTS && self.queue.now() < MAX_TIME,
                "no end after {} events and {:?}: {}",
                self.report.events,
                self.queue.now(),
                self.stuck()
            );
            self.happen(event);
        }
        self.report.time = self.queue.now();
        self.conclude();
        self.report
    }

    fn happen(&mut self, event: Event) {
        let now = self.queue.now();
        match event {
            Event::Join { clone } => self.join(clone),
            Event::Joined { clone, epoch, channel, member, start } => {
                if epoch == self.epoch && !self.clones[clone].left {
                    self.clones[clone].connect(now, channel, member, start);
                    if self.clones[clone].member.lies {
                        self.queue.after(Duration::ZERO, Event::Lie { clone });
                    }
                    self.settle(clone);
                }
            }
            Event::Leave { clone } => self.leave(clone),
            Event::Gone { clone, epoch } => {
                if epoch == self.epoch {
                    self.clones[clone].gone();
                    self.settle(clone);
                }
            }
            Event::Asked { clone, epoch, range, multicast } => {
                if epoch == self.epoch {
                    self.asked(clone, range, multicast);
                }
            }
            Event::Answered { clone, epoch, range } => {
                if epoch == self.epoch && !self.clones[clone].left {
                    self.clones[clone].answered(now, range);
                    self.settle(clone);
                }
            }
            Event::Arrive { clone, datagrams } => {
                if !self.clones[clone].left {
                    for datagram in datagrams {
                        self.clones[clone].receive(now, &datagram, &self.scenario.image);
                    }
                    self.settle(clone);
                }
            }
            Event::Feedback { bytes } => {
                self.server.sender.feedback(now, &bytes);
                self.pump();
            }
            Event::Timer { clone } => {
                self.timers[clone] = None;
                if !self.clones[clone].left {
                    self.settle(clone);
                }
            }
            Event::Server => {
                self.server_timer = None;
                self.pump();
            }
            Event::Lie { clone } => self.lie(clone),
            Event::Restart => self.restart(),
            Event::Cut { clone, epoch } => {
                if epoch == self.epoch {
                    self.clones[clone].disconnect();
                    self.settle(clone);
                }
            }
        }
    }

    fn join(&mut self, clone: usize) {
        if self.clones[clone].left {
            return;
        }
        let now = self.queue.now();
        let member = Member(self.rng.u64(..));
        self.server.sender.join(now, member).expect("there is room for all");
        let start = self.server.sender.start();
        self.members.insert(member, clone);
        self.ids[clone] = Some(member);
        let (epoch, channel) = (self.epoch, self.server.channel);
        let arrival = self.by_unicast(clone);
        self.queue.at(arrival, Event::Joined { clone, epoch, channel, member, start });
        self.pump();
    }

    fn leave(&mut self, clone: usize) {
        let now = self.queue.now();
        self.clones[clone].left = true;
        self.clones[clone].disconnect();
        if let Some(member) = self.ids[clone].take() {
            self.members.remove(&member);
            self.server.sender.leave(now, member);
            self.pump();
        }
    }

    fn restart(&mut self) {
        let now = self.queue.now();
        self.report.add_sender(self.server.stats());
        self.epoch += 1;
        self.server = Server::new(now, &self.scenario, self.rng.u64(..));
        self.members.clear();
        for clone in 0..self.clones.len() {
            if self.ids[clone].take().is_some() {
                let cut = self.by_unicast(clone);
                self.queue.at(cut, Event::Cut { clone, epoch: self.epoch });
                let again = Duration::from_micros(self.rng.u64(1000..50_000));
                self.queue.at(cut + again, Event::Join { clone });
            }
        }
        self.pump();
    }

    fn asked(&mut self, clone: usize, range: FrameRange, multicast: bool) {
        let now = self.queue.now();
        match self.ids[clone] {
            Some(member) if multicast => {
                self.server.sender.demand(now, member, [range]);
                self.pump();
            }
            _ => {
                let arrival = self.by_unicast(clone) + Duration::from_nanos(range.count().bytes());
                self.queue.at(arrival, Event::Answered { clone, epoch: self.epoch, range });
            }
        }
    }

    /// Lets the server send what it will, and takes note of what follows.
    fn pump(&mut self) {
        let now = self.queue.now();
        let most = Duration::from_nanos(UNDER_WAY * 1_000_000 / (self.scenario.shared.rate / 1000));
        let mut due = loop {
            let free = self.shared.free_at();
            if free > now + most {
                break Some(free - most);
            }
            let Some(datagrams) = self.server.poll(now) else { break self.server.sender.next_timeout() };
            self.multicast(&datagrams);
        };
        while let Some(SenderEvent::Expelled { member, reason }) = self.server.sender.poll_event() {
            let clone = self.members.remove(&member).expect("a member is expelled once");
            let sound = self.clones[clone].member.is_sound() && !self.is_large();
            assert!(!sound || self.is_lossy(clone), "clone {clone} was expelled without a reason: {reason:?}");
            let epoch = self.epoch;
            self.ids[clone] = None;
            let arrival = self.by_unicast(clone);
            self.queue.at(arrival, Event::Gone { clone, epoch });
        }
        if let Some(due) = due.as_mut() {
            *due = (*due).max(now);
            self.spin(*due);
            if self.server_timer.is_none_or(|timer| *due < timer) {
                self.server_timer = Some(*due);
                self.queue.at(*due, Event::Server);
            }
        }
    }

    /// Lets a clone do what is to be done, and takes note of what follows.
    fn settle(&mut self, index: usize) {
        let now = self.queue.now();
        let clone = &mut self.clones[index];
        if !clone.member.lies {
            clone.act(now, &self.scenario.image);
        }
        for outgoing in std::mem::take(&mut clone.outbox) {
            match outgoing {
                Outgoing::Feedback(bytes) => self.feedback(index, bytes),
                Outgoing::Ask { range, multicast } => {
                    let arrival = self.by_unicast(index);
                    self.queue.at(arrival, Event::Asked { clone: index, epoch: self.epoch, range, multicast });
                }
            }
        }
        let clone = &self.clones[index];
        if !clone.member.lies
            && let Some(due) = clone.next_timeout()
        {
            let due = clone.socket.awake(due.max(now));
            self.spin(due);
            if self.timers[index].is_none_or(|timer| due < timer) {
                self.timers[index] = Some(due);
                self.queue.at(due, Event::Timer { clone: index });
            }
        }
    }

    fn feedback(&mut self, index: usize, bytes: Vec<u8>) {
        let now = self.queue.now();
        let clone = &mut self.clones[index];
        let passed = clone.up.pass(now, bytes.len() + OVERHEAD, &mut self.rng);
        let parted = |at: Duration| parted(clone.member.partition, at);
        for at in passed.into_iter().flat_map(Passed::arrivals).filter(|at| !parted(*at)) {
            self.queue.at(at, Event::Feedback { bytes: bytes.clone() });
        }
    }

    fn lie(&mut self, index: usize) {
        let now = self.queue.now();
        let member = self.ids[index].unwrap_or(Member(0));
        let lie = lie(now, &self.server.channel, member, self.server.sender.start(), &mut self.rng);
        self.feedback(index, lie);
        if !self.clones[index].left {
            let pause = Duration::from_micros(1 << self.rng.u32(4..14));
            self.queue.after(pause, Event::Lie { clone: index });
        }
    }

    /// Sends datagrams to the group.
    fn multicast(&mut self, datagrams: &[Rc<[u8]>]) {
        let now = self.queue.now();
        let mut shared = Vec::with_capacity(datagrams.len());
        for datagram in datagrams {
            self.report.sent += (datagram.len() + OVERHEAD) as u64;
            shared.push(self.shared.pass(now, datagram.len() + OVERHEAD, &mut self.rng));
        }
        let is_shard = |datagram: &[u8]| datagram[1] & 0x7f <= mcast::wire::kind::PARITY;
        let mut lost = vec![false; datagrams.len()];
        for index in 0..self.clones.len() {
            let clone = &mut self.clones[index];
            if !clone.connected && self.ids[index].is_none() || clone.left || clone.member.deaf {
                continue;
            }
            let mut batch: Vec<Rc<[u8]>> = Vec::new();
            let mut taken = now;
            for ((datagram, passed), lost) in datagrams.iter().zip(&shared).zip(&mut lost) {
                let mut came = false;
                let own =
                    passed.and_then(|passed| clone.down.pass(passed.at, datagram.len() + OVERHEAD, &mut self.rng));
                let lags = passed.map_or([None; 2], |passed| passed.lags);
                for lag in lags.into_iter().flatten() {
                    for at in own.into_iter().flat_map(Passed::arrivals).map(|at| at + lag) {
                        if parted(clone.member.partition, at) {
                            continue;
                        }
                        let late = own.is_some_and(|own| at > own.at);
                        if late {
                            // It finds room in the socket, and holds up nobody.
                            let at = clone.socket.awake(at);
                            self.queue.at(at, Event::Arrive { clone: index, datagrams: vec![Rc::clone(datagram)] });
                            came = true;
                        } else if let Some(at) = clone.socket.take(at, datagram.len()) {
                            batch.push(Rc::clone(datagram));
                            taken = taken.max(at);
                            came = true;
                        }
                    }
                }
                if !came && is_shard(datagram) {
                    *lost = true;
                }
                if chance(f64::from(self.scenario.noise) / 1000.0, &mut self.rng) {
                    batch.push(foreign(datagram, &mut self.rng));
                }
            }
            if !batch.is_empty() {
                self.queue.at(taken, Event::Arrive { clone: index, datagrams: batch });
            }
        }
        self.report.datagrams += datagrams.iter().filter(|datagram| is_shard(datagram)).count() as u64;
        self.report.lost += lost.iter().filter(|lost| **lost).count() as u64;
    }

    /// When something that is sent now by the unicast lane, in either direction, is there.
    fn by_unicast(&self, clone: usize) -> Duration {
        let (now, clone) = (self.queue.now(), &self.clones[clone]);
        let arrival = now + self.scenario.unicast;
        let until = |at: Duration| clone.member.partition.filter(|partition| parted(Some(*partition), at));
        let arrival = until(now).or(until(arrival)).map_or(arrival, |(_, until)| until + self.scenario.unicast);
        clone.socket.awake(arrival)
    }

    /// Notices whoever wants to be woken at this very moment again and again.
    fn spin(&mut self, due: Duration) {
        let now = self.queue.now();
        if due > now || self.spins.0 != now {
            self.spins = (now, 0);
        } else {
            self.spins.1 += 1;
            assert!(self.spins.1 < MAX_SPINS, "somebody spins at {now:?}: {}", self.stuck());
        }
    }

    fn is_large(&self) -> bool {
        self.clones.len() > 64
    }

    /// True when a clone may lose so much that its reports are missed.
    fn is_lossy(&self, clone: usize) -> bool {
        let member = &self.clones[clone].member;
        let rate = self.scenario.shared.rate.min(member.down.rate).min(member.up.rate);
        let mean = member.up.loss.mean() + member.down.loss.mean() + self.scenario.shared.loss.mean();
        mean > 0.1 || rate < 1_000_000_000 || self.clones.iter().any(|clone| clone.member.lies)
    }

    fn conclude(&mut self) {
        self.server.check(&self.scenario);
        self.report.add_sender(self.server.stats());
        for clone in &mut self.clones {
            clone.gone();
            let bound = LONGEST_WAIT + self.scenario.unicast * 4;
            for wait in &clone.waits {
                let upset = self.scenario.restart.is_some_and(|restart| restart <= wait.since + wait.time);
                if clone.member.is_sound() && !upset {
                    assert!(wait.time <= bound, "a guest waited {:?} for a page", wait.time);
                }
            }
            self.report.clones.add(&clone.stats);
            self.report.waits.append(&mut clone.waits);
            for stats in &clone.received {
                self.report.add_receiver(stats);
            }
        }
        self.report.waits.sort_unstable_by_key(|wait| wait.time);
    }

    fn stuck(&self) -> String {
        let clones = self.clones.iter().filter(|clone| !clone.is_done());
        let clones: Vec<_> =
            clones.map(|clone| format!("{} missing, {:?}", clone.missing.count(), clone.member)).collect();
        format!("{:?} {:#?} {clones:#?}", self.server.sender.stats(), self.server.sender.members().collect::<Vec<_>>())
    }
}

fn parted(partition: Option<(Duration, Duration)>, at: Duration) -> bool {
    partition.is_some_and(|(from, until)| from <= at && at < until)
}

/// A datagram that is not of the channel, or no longer whole.
fn foreign(datagram: &[u8], rng: &mut Rng) -> Rc<[u8]> {
    let mut bytes = datagram.to_vec();
    match rng.u8(0..4) {
        0 => bytes.iter_mut().for_each(|byte| *byte = rng.u8(..)),
        1 => bytes.truncate(rng.usize(0..bytes.len())),
        2 => bytes[0] = rng.u8(2..),
        _ => bytes[8..16].copy_from_slice(&rng.u64(..).to_le_bytes()),
    }
    bytes.into()
}
