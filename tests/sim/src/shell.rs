//! A clone: its pager, its port, its guest, and what a shell does between them.

use std::collections::BTreeMap;
use std::time::Duration;

use descriptor::fetch::{
    Capabilities, Delivery, Encoding, GoodbyeReason, Hello, Message, PageRun, Preamble, Refusal, Request, Touched,
    decode, decode_preamble,
};
use descriptor::{FrameRange, FrameSet, Gfn, PAGE_SIZE, PageCount};
use memtap::pager::{Failure, Input, Output, Pager, PagerConfig, Wanted};
use memtap::port::{Event, PortTraits, Stop};

use crate::guest::Guest;
use crate::port::Port;
use crate::scenario::Scenario;
use crate::server::IMAGE;

/// A clone.
#[derive(Debug)]
pub struct Shell {
    /// Its pager.
    pub pager: Pager,
    /// Its memory.
    pub port: Port,
    /// Its threads.
    pub guest: Guest,
    /// Messages to be sent.
    pub outbox: Vec<Vec<u8>>,
    /// Ranges whose discards were read.
    pub discarded: Vec<FrameRange>,
    /// The guest may run.
    pub ready: bool,
    /// Every page is there.
    pub complete: bool,
    /// The pager gave up.
    pub failed: Option<Failure>,
    staging: BTreeMap<Gfn, Vec<u8>>,
    inbox: Vec<u8>,
    greeted: bool,
    /// Working sets are wanted.
    working_set: bool,
    /// The order as far as it has come.
    order: Vec<FrameRange>,
    /// One was followed.
    followed: bool,
    sessions: u32,
}

impl Shell {
    /// A clone that is about to begin.
    pub fn new(scenario: &Scenario, port: Port, guest: Guest, seed: u64) -> Self {
        let image = &scenario.image;
        let universe = image.memory.universe();
        let config = PagerConfig {
            memory: image.memory.clone(),
            zero: image.zero.clone(),
            free: image.free.clone(),
            present: FrameSet::empty(universe),
            eager: FrameSet::from_ranges(universe, scenario.eager.iter().copied()),
            order: scenario.order.clone(),
            port: PortTraits { granule: PageCount::new(scenario.granule), needs_zeros: scenario.needs_zeros },
            prefetch: scenario.prefetch,
            hydrate: scenario.hydrate,
            retry: scenario.retry,
            patience: scenario.patience,
            record: scenario.working_set,
            head_start: scenario.head_start,
            zero_around: scenario.zero_around,
        };
        let pager = Pager::new(Duration::ZERO, config, seed).expect("the scenario is consistent");
        Self {
            pager,
            port,
            guest,
            outbox: Vec::new(),
            discarded: Vec::new(),
            ready: false,
            complete: false,
            failed: None,
            staging: BTreeMap::new(),
            inbox: Vec::new(),
            greeted: false,
            working_set: scenario.working_set,
            order: Vec::new(),
            followed: false,
            sessions: 0,
        }
    }

    /// Begins a new connection; returns what to send first.
    pub fn connect(&mut self) -> Vec<u8> {
        self.inbox.clear();
        self.greeted = false;
        let mut bytes = Vec::new();
        Preamble.encode(&mut bytes);
        self.order.clear();
        let capabilities = if self.working_set { Capabilities::WORKING_SET } else { Capabilities::default() };
        Message::Hello(Hello { image: IMAGE, capabilities, ticket: b"" }).encode(&mut bytes);
        bytes
    }

    /// Takes bytes of the stream.
    pub fn receive(&mut self, now: Duration, bytes: &[u8]) {
        let mut inbox = std::mem::take(&mut self.inbox);
        inbox.extend_from_slice(bytes);
        let mut rest = &inbox[..];
        if !self.greeted {
            let Some((_, length)) = decode_preamble(rest).expect("the server speaks the protocol") else {
                self.inbox = inbox;
                return;
            };
            rest = &rest[length..];
            self.greeted = true;
        }
        while let Some((message, length)) = decode(rest).expect("the server speaks the protocol") {
            rest = &rest[length..];
            self.take(now, &message);
        }
        self.inbox = rest.to_vec();
    }

    /// Takes one message from the server.
    pub fn take(&mut self, now: Duration, message: &Message<'_>) {
        match message {
            Message::Welcome(welcome) => {
                self.sessions += 1;
                self.pager.handle(now, Input::SourceUp { limits: welcome.limits });
            }
            Message::Order(part) => {
                self.order.extend(part.ranges.iter());
                if part.last && !std::mem::replace(&mut self.followed, true) {
                    self.pager.follow(std::mem::take(&mut self.order));
                }
            }
            Message::Pages(run) => self.pages(now, *run),
            Message::Error(tag, code, _) => {
                self.pager.handle(now, Input::RequestFailed { tag: *tag, code: *code });
            }
            Message::Ping => {
                let mut bytes = Vec::new();
                Message::Pong.encode(&mut bytes);
                self.outbox.push(bytes);
            }
            Message::Goodbye(GoodbyeReason::Draining, _) | Message::Refused(Refusal::Draining, _) => {}
            other => panic!("a server does not send {other:?}"),
        }
    }

    /// Reads events and obeys the pager until there is nothing left to do.
    pub fn pump(&mut self, now: Duration) {
        loop {
            self.read_events(now);
            let Some(output) = self.pager.poll(now) else {
                break;
            };
            match output {
                Output::Request { tag, class, ranges } => {
                    let mut bytes = Vec::new();
                    Request::encode(tag, class, Delivery::Unicast, &ranges, &mut bytes);
                    self.outbox.push(bytes);
                }
                Output::InstallZeros { range } => {
                    let outcome = self.port.install_zeros(range);
                    self.pager.installed(now, range, outcome);
                }
                Output::InstallStaged { range } => {
                    let buffer = self.staging.get(&range.start()).expect("a staged granule has a buffer");
                    let outcome = self.port.install(range.start(), buffer);
                    self.pager.installed(now, range, outcome);
                    if outcome.stopped != Some(Stop::Busy) {
                        self.staging.remove(&range.start());
                    }
                }
                Output::DropStaged { range } => {
                    self.staging.remove(&range.start()).expect("a dropped granule has a buffer");
                }
                Output::Resume { gfn, waiter } => self.port.resume(gfn, waiter),
                Output::Ready => {
                    assert!(!std::mem::replace(&mut self.ready, true), "ready twice");
                }
                Output::Complete => {
                    assert!(!std::mem::replace(&mut self.complete, true), "complete twice");
                }
                Output::Failed { reason } => {
                    assert!(self.failed.replace(reason).is_none(), "failed twice");
                }
            }
        }
    }

    /// Tells the pager that a page of the guest's will be wholly overwritten.
    pub fn announce(&mut self, gfn: Gfn) {
        let noted = self.pager.overwrite(&[FrameRange::single(gfn)]).expect("a page of the guest's");
        // A pager that has given up notes nothing, and installs nothing either.
        if self.failed.is_none() && noted.present.is_zero() {
            self.port.forgo(gfn);
        }
    }

    /// What is new of what the guest needs, as a message; the last one of a clone that has `ended`.
    pub fn report(&mut self, ended: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.working_set && self.greeted {
            let touched = self.pager.take_touched(usize::MAX);
            let last = ended && self.sessions == 1 && self.pager.saw_every_need();
            Touched::encode(&touched, last, !self.followed, &mut bytes);
        }
        bytes
    }

    /// The number of staging buffers.
    pub fn staged(&self) -> usize {
        self.staging.len()
    }

    fn read_events(&mut self, now: Duration) {
        while self.port.has_events() {
            for event in self.port.read_events() {
                if let Event::Discard { range } = event {
                    self.discarded.push(range);
                }
                self.pager.handle(now, event.into());
            }
        }
    }

    fn pages(&mut self, now: Duration, run: PageRun<'_>) {
        let mut rest = run.frames;
        while let Some(wanted) = self.pager.wanted(now, run.tag, rest) {
            let range = wanted.range();
            assert!(rest.covers(range), "{range} is wanted of {rest}");
            let bytes = (run.encoding == Encoding::Raw).then(|| {
                let from = (range.start() - run.frames.start()).bytes() as usize;
                &run.payload[from..from + range.count().bytes() as usize]
            });
            let next = match wanted {
                Wanted::Install(range) => {
                    let outcome = match bytes {
                        Some(bytes) => self.port.install(range.start(), bytes),
                        None => self.port.install_zeros(range),
                    };
                    let next = self.pager.installed(now, range, outcome);
                    if outcome.stopped == Some(Stop::Busy) {
                        self.read_events(now);
                    }
                    next
                }
                Wanted::Stage(range) => {
                    self.stage(range, bytes);
                    self.pager.staged(now, range);
                    range.end()
                }
            };
            rest = FrameRange::between(next, run.frames.end());
        }
        if run.last {
            self.pager.answered(now, run.tag);
        }
    }

    fn stage(&mut self, range: FrameRange, bytes: Option<&[u8]>) {
        let granule = range.start().index() / GRANULE * GRANULE;
        let size = (GRANULE * PAGE_SIZE) as usize;
        let buffer = self.staging.entry(Gfn::new(granule)).or_insert_with(|| vec![0; size]);
        if let Some(bytes) = bytes {
            let from = (range.start().address() - granule * PAGE_SIZE) as usize;
            buffer[from..from + bytes.len()].copy_from_slice(bytes);
        }
    }
}

/// The frames of a granule where there is any staging.
const GRANULE: u64 = 512;
