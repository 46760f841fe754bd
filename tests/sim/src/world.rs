//! Everything together: clones, links, sessions, and what happens when.

use std::time::Duration;

use descriptor::FrameRange;
use descriptor::fetch::{Message, decode};
use descriptor::working_set::Merged;
use fastrand::Rng;
use memtap::pager::{Hydrate, Input, PagerStats};

use crate::datagrams::Responder;
use crate::events::Queue;
use crate::guest::{Guest, Habits, Step};
use crate::network::Link;
use crate::port::Port;
use crate::scenario::Scenario;
use crate::server::{Send, Server};
use crate::shell::Shell;

/// Events after which a run has got stuck in a circle; usual runs have some thousands.
const MAX_EVENTS: u64 = 5_000_000;

/// Virtual time after which a run has got stuck: far beyond every patience and retry.
const MAX_TIME: Duration = Duration::from_secs(600);

/// How often clones tell what they need: as much more often than real ones as their lives are shorter.
const REPORT_EVERY: Duration = Duration::from_millis(2);

/// Longer than anything is on its way.
const MAX_DELAY: Duration = Duration::from_secs(10);

/// The longest that a fault may take where nothing goes wrong, beside the bulk answers that it may find on the link.
const CALM_FAULT: Duration = Duration::from_millis(4);

/// A run.
#[derive(Debug)]
pub struct World {
    scenario: Scenario,
    queue: Queue<Event>,
    server: Server,
    clones: Vec<Clone>,
    rng: Rng,
}

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The events of the run.
    pub events: u64,
    /// Its length in virtual time.
    pub time: Duration,
    /// The longest time that a thread waited for a page.
    pub longest_fault: Duration,
    /// What the pagers did.
    pub pagers: Vec<PagerStats>,
    /// What the server knows of what clones needed.
    pub needed: Option<Merged>,
    /// The clones whose pager failed with a reason.
    pub failed: usize,
}

#[derive(Debug)]
struct Clone {
    shell: Shell,
    /// What answers its datagrams, where there is no stream.
    responder: Responder,
    connected: bool,
    /// Bytes and datagrams of an earlier connection are lost.
    epoch: u64,
    up: Link,
    down: Link,
    /// The responder is at work.
    sending: bool,
    timer: Option<Duration>,
    /// Threads that wait until what they gave up is taken.
    discards: Vec<(u32, FrameRange)>,
    blocked: Vec<bool>,
    running: bool,
    threads_left: u32,
    /// Nothing is reported any more.
    reported: bool,
}

#[derive(Debug)]
enum Event {
    Step { clone: usize, thread: u32 },
    Taken { clone: usize, thread: u32, range: FrameRange },
    Timer { clone: usize },
    Connect { clone: usize },
    ToServer { clone: usize, epoch: u64, bytes: Vec<u8> },
    ToClone { clone: usize, epoch: u64, bytes: Vec<u8> },
    Sent { clone: usize, epoch: u64 },
    HangUp { clone: usize, epoch: u64 },
    Respond { clone: usize },
    OutageBegins,
    Report { clone: usize },
}

impl World {
    /// The world of a scenario, at its beginning.
    pub fn new(scenario: Scenario) -> Self {
        let mut rng = Rng::with_seed(scenario.seed ^ 0x5eed);
        let mut queue = Queue::new();
        let frames = scenario.image.memory.universe().get();
        let clones = (0..scenario.clones).map(|clone| {
            let port = Port::new(frames, scenario.granule, scenario.wakes, scenario.busy, rng.fork());
            let guest = Guest::draw(&scenario.image, scenario.threads, scenario.accesses, rng.fork());
            queue.after(Duration::from_micros(rng.u64(0..100)), Event::Connect { clone });
            if scenario.working_set {
                queue.after(REPORT_EVERY, Event::Report { clone });
            }
            Clone {
                shell: Shell::new(&scenario, port, guest, rng.u64(..)),
                responder: Responder::default(),
                connected: false,
                epoch: 0,
                up: Link::new(scenario.quality),
                down: Link::new(scenario.quality),
                sending: false,
                timer: None,
                discards: Vec::new(),
                blocked: vec![false; scenario.threads as usize],
                running: false,
                threads_left: scenario.threads,
                reported: !scenario.working_set,
            }
        });
        let clones = clones.collect();
        for (start, _) in &scenario.outages {
            queue.at(*start, Event::OutageBegins);
        }
        let server = Server::new(scenario.image.clone(), scenario.limits, scenario.errors, scenario.bad);
        Self { scenario, queue, server, clones, rng }
    }

    /// The same world, whose server knows what earlier clones needed.
    pub fn knowing(self, needed: Merged) -> Self {
        Self { server: self.server.knowing(needed, self.scenario.seed << 8), ..self }
    }

    /// Runs to the end.
    ///
    /// # Panics
    /// When a property does not hold.
    pub fn run(mut self) -> Report {
        let mut report = Report::default();
        while !self.clones.iter().all(|clone| clone.is_done(self.scenario.hydrate)) {
            let Some(event) = self.queue.pop() else {
                panic!("nothing is left to happen, but the clones are not done: {:#?}", self.stuck());
            };
            report.events += 1;
            assert!(report.events < MAX_EVENTS && self.queue.now() < MAX_TIME, "no end: {:#?}", self.stuck());
            if let Some(clone) = self.happen(event, &mut report) {
                self.settle(clone);
            }
        }
        report.time = self.queue.now();
        self.hear_last_words();
        report.needed = self.scenario.working_set.then(|| self.server.needed().clone());
        for clone in &self.clones {
            clone.shell.guest.check_all(&clone.shell.port);
            report.pagers.push(*clone.shell.pager.stats());
            report.failed += usize::from(clone.shell.failed.is_some());
            if clone.shell.complete {
                assert_eq!(clone.shell.staged(), 0, "staging buffers are left");
            }
        }
        if self.scenario.is_calm() {
            let limit = CALM_FAULT + self.scenario.calm_extra();
            assert!(report.longest_fault < limit, "a fault took {:?}, more than {limit:?}", report.longest_fault);
        }
        report
    }

    /// Lets an event happen; the clone to which it matters.
    fn happen(&mut self, event: Event, report: &mut Report) -> Option<usize> {
        let now = self.queue.now();
        match event {
            Event::Step { clone, thread } => {
                let Clone { shell, discards, blocked, threads_left, .. } = &mut self.clones[clone];
                let Scenario { discards: rate, overwrites, granule, .. } = self.scenario;
                let habits = Habits { discards: rate, overwrites, granule };
                if std::mem::take(&mut blocked[thread as usize]) {
                    report.longest_fault = report.longest_fault.max(now - shell.guest.waits_since(thread));
                }
                match shell.guest.step(now, thread, &mut shell.port, habits) {
                    Step::Again(delay) => self.queue.after(delay, Event::Step { clone, thread }),
                    Step::Blocked => blocked[thread as usize] = true,
                    Step::Discards(range) => discards.push((thread, range)),
                    Step::Announces(gfn, delay) => {
                        shell.announce(gfn);
                        self.queue.after(delay, Event::Step { clone, thread });
                    }
                    Step::Done => *threads_left -= 1,
                }
                Some(clone)
            }
            Event::Taken { clone, thread, range } => {
                let shell = &mut self.clones[clone].shell;
                shell.port.take(range);
                shell.guest.taken(thread, range);
                self.queue.after(Duration::ZERO, Event::Step { clone, thread });
                Some(clone)
            }
            Event::Timer { clone } => {
                self.clones[clone].timer = None;
                Some(clone)
            }
            Event::Connect { clone } => {
                self.connect(clone);
                Some(clone)
            }
            Event::ToServer { clone, epoch, bytes } => {
                self.server_receives(clone, epoch, &bytes);
                None
            }
            Event::ToClone { clone, epoch, bytes } => {
                let Clone { shell, epoch: current, .. } = &mut self.clones[clone];
                if epoch != *current {
                    return None;
                }
                if self.scenario.datagrams {
                    let message = decode(&bytes).expect("a datagram is one message").expect("a datagram is whole").0;
                    shell.take(now, &message);
                } else {
                    shell.receive(now, &bytes);
                }
                Some(clone)
            }
            Event::Sent { clone, epoch } => {
                if epoch == self.clones[clone].epoch {
                    self.server.sent(now, clone);
                    self.serve();
                }
                None
            }
            Event::HangUp { clone, epoch } => {
                if epoch == self.clones[clone].epoch {
                    self.cut(clone);
                }
                None
            }
            Event::Respond { clone } => {
                self.respond(clone);
                None
            }
            Event::Report { clone } => {
                self.report(clone, false);
                None
            }
            Event::OutageBegins => {
                if self.scenario.datagrams {
                    return None;
                }
                if self.rng.bool() {
                    self.server.drain(now);
                    self.serve();
                } else {
                    (0..self.clones.len()).for_each(|clone| self.cut(clone));
                }
                None
            }
        }
    }

    /// Lets a clone do what is to be done, and takes note of what follows.
    fn settle(&mut self, index: usize) {
        let now = self.queue.now();
        let clone = &mut self.clones[index];
        clone.shell.pump(now);
        for range in std::mem::take(&mut clone.shell.discarded) {
            let position = clone.discards.iter().position(|(_, discarded)| *discarded == range);
            let (thread, range) = clone.discards.swap_remove(position.expect("a thread discards what is reported"));
            let delay = Duration::from_nanos(self.rng.u64(0..50_000));
            self.queue.after(delay, Event::Taken { clone: index, thread, range });
        }
        for thread in clone.shell.port.take_woken() {
            self.queue.after(Duration::from_nanos(self.rng.u64(0..2000)), Event::Step { clone: index, thread });
        }
        if clone.shell.ready && !std::mem::replace(&mut clone.running, true) {
            for thread in 0..clone.shell.guest.threads() {
                let delay = Duration::from_micros(self.rng.u64(0..100));
                self.queue.after(delay, Event::Step { clone: index, thread });
            }
        }
        if let Some(reason) = clone.shell.failed {
            assert!(self.scenario.may_fail(), "a pager failed without a reason: {reason}");
        }
        for bytes in std::mem::take(&mut clone.shell.outbox) {
            self.send_up(index, bytes);
        }
        let clone = &mut self.clones[index];
        if let Some(due) = clone.shell.pager.next_timeout()
            && clone.timer.is_none_or(|timer| due < timer)
        {
            clone.timer = Some(due);
            self.queue.at(due, Event::Timer { clone: index });
        }
    }

    fn connect(&mut self, index: usize) {
        let now = self.queue.now();
        if let Some(end) = self.outage(now) {
            // As a client that tries again and again.
            let again = end.max(now) + Duration::from_micros(self.rng.u64(0..20_000));
            self.queue.at(again, Event::Connect { clone: index });
            return;
        }
        let clone = &mut self.clones[index];
        if std::mem::replace(&mut clone.connected, true) {
            return;
        }
        if self.scenario.datagrams {
            clone.shell.pager.handle(now, Input::SourceUp { limits: self.scenario.limits });
        } else {
            self.server.connected(now, index);
            let hello = clone.shell.connect();
            self.send_up(index, hello);
        }
    }

    /// Ends the connection of a clone.
    fn cut(&mut self, index: usize) {
        let now = self.queue.now();
        let clone = &mut self.clones[index];
        if std::mem::take(&mut clone.connected) {
            self.server.gone(index);
            clone.epoch += 1;
            (clone.up, clone.down) = (Link::new(self.scenario.quality), Link::new(self.scenario.quality));
            clone.shell.pager.handle(now, Input::SourceDown);
            let delay = Duration::from_micros(self.rng.u64(0..5000));
            self.queue.after(delay, Event::Connect { clone: index });
            self.settle(index);
        }
    }

    fn send_up(&mut self, index: usize, bytes: Vec<u8>) {
        let now = self.queue.now();
        let lost = self.outage(now).is_some();
        let Clone { epoch, up, .. } = &mut self.clones[index];
        let epoch = *epoch;
        if !self.scenario.datagrams {
            for piece in pieces(&bytes, &mut self.rng) {
                let arrival = up.stream(now, piece.len(), &mut self.rng);
                self.queue.at(arrival, Event::ToServer { clone: index, epoch, bytes: piece });
            }
        } else if !lost {
            for arrival in up.datagram(now, bytes.len(), &mut self.rng) {
                self.queue.at(arrival, Event::ToServer { clone: index, epoch, bytes: bytes.clone() });
            }
        }
    }

    fn server_receives(&mut self, index: usize, epoch: u64, bytes: &[u8]) {
        let now = self.queue.now();
        let clone = &mut self.clones[index];
        if epoch != clone.epoch {
            return;
        }
        if !self.scenario.datagrams {
            self.server.receive(now, index, bytes);
            self.serve();
            return;
        }
        let message = decode(bytes).expect("a datagram is one message").expect("a datagram is whole").0;
        let Message::Request(request) = message else {
            panic!("a client sends {message:?}");
        };
        clone.responder.take(request, self.scenario.errors, &mut self.rng);
        if !std::mem::replace(&mut clone.sending, true) {
            self.queue.after(Duration::from_micros(2), Event::Respond { clone: index });
        }
    }

    /// Lets the server send what it can.
    fn serve(&mut self) {
        let now = self.queue.now();
        while let Some(Send { session, bytes, finish }) = self.server.next_send(now, &mut self.rng) {
            let epoch = self.clones[session].epoch;
            self.queue.after(self.transmission(&bytes), Event::Sent { clone: session, epoch });
            self.send_down(session, bytes);
            if finish {
                let end = self.clones[session].down.stream(now, 0, &mut self.rng);
                self.queue.at(end, Event::HangUp { clone: session, epoch });
            }
        }
    }

    /// Sends the next datagram with pages, and comes back when it is on its way.
    fn respond(&mut self, index: usize) {
        let clone = &mut self.clones[index];
        let Some(bytes) = clone.responder.next(&self.scenario.image, self.scenario.bad) else {
            clone.sending = false;
            return;
        };
        self.queue.after(self.transmission(&bytes), Event::Respond { clone: index });
        self.send_down(index, bytes);
    }

    fn transmission(&self, bytes: &[u8]) -> Duration {
        Duration::from_nanos(bytes.len() as u64 * 1000 / self.scenario.quality.rate)
    }

    fn send_down(&mut self, index: usize, bytes: Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let now = self.queue.now();
        let lost = self.outage(now).is_some();
        let Clone { epoch, down, .. } = &mut self.clones[index];
        let epoch = *epoch;
        if !self.scenario.datagrams {
            for piece in pieces(&bytes, &mut self.rng) {
                let arrival = down.stream(now, piece.len(), &mut self.rng);
                self.queue.at(arrival, Event::ToClone { clone: index, epoch, bytes: piece });
            }
        } else if !lost {
            for arrival in down.datagram(now, bytes.len(), &mut self.rng) {
                self.queue.at(arrival, Event::ToClone { clone: index, epoch, bytes: bytes.clone() });
            }
        }
    }

    /// The end of the outage that there is, if there is one.
    fn outage(&self, now: Duration) -> Option<Duration> {
        let outages = self.scenario.outages.iter().map(|(start, length)| (*start, *start + *length));
        outages.filter(|(start, end)| *start <= now && now < *end).map(|(_, end)| end).max()
    }

    fn stuck(&self) -> Vec<String> {
        let line = |clone: &Clone| {
            format!(
                "{} threads left, blocked {:?}, ready {}, complete {}, {:?}, {:?}",
                clone.threads_left,
                clone.blocked,
                clone.shell.ready,
                clone.shell.complete,
                clone.shell.pager.progress(),
                clone.shell.pager.stats(),
            )
        };
        self.clones.iter().map(line).collect()
    }

    /// Lets a clone tell what it needs.
    fn report(&mut self, index: usize, ended: bool) {
        let clone = &mut self.clones[index];
        if clone.reported {
            return;
        }
        clone.reported = ended;
        if !ended {
            self.queue.after(REPORT_EVERY, Event::Report { clone: index });
        }
        let clone = &mut self.clones[index];
        if clone.connected {
            let bytes = clone.shell.report(ended);
            self.send_up(index, bytes);
        }
    }

    /// Lets clones that came to their end say all that they have to say.
    fn hear_last_words(&mut self) {
        let end = self.queue.now() + MAX_DELAY;
        for index in 0..self.clones.len() {
            if self.clones[index].shell.failed.is_none() {
                self.report(index, true);
            }
        }
        while let Some(event) = self.queue.pop().filter(|_| self.queue.now() < end) {
            if let Event::ToServer { clone, epoch, bytes } = event {
                self.server_receives(clone, epoch, &bytes);
            }
        }
    }
}

impl Clone {
    fn is_done(&self, hydrate: Hydrate) -> bool {
        let progress = self.shell.pager.progress();
        let given_up = !progress.given_up.is_zero() && progress.given_up == progress.missing;
        let complete = hydrate == Hydrate::Off || self.shell.complete || given_up;
        self.shell.failed.is_some() || (self.running && self.threads_left == 0 && complete)
    }
}

/// The pieces in which a stream delivers `bytes`.
fn pieces(bytes: &[u8], rng: &mut Rng) -> Vec<Vec<u8>> {
    if bytes.len() < 2 || rng.u8(0..4) > 0 {
        return vec![bytes.to_vec()];
    }
    let (head, tail) = bytes.split_at(rng.usize(1..bytes.len()));
    vec![head.to_vec(), tail.to_vec()]
}
