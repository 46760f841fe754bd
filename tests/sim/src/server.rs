//! A page server behind streams: memserver's own sessions and its schedule, with a model of its shell around them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use descriptor::fetch::{Capabilities, ErrorCode, Limits, Message, Tag};
use descriptor::image::{Content, Layout};
use descriptor::working_set::{Merged, Witness};
use descriptor::{FrameRange, Gfn, ImageId, PageCount};
use fastrand::Rng;
use memserver::schedule::{Run, Schedule};
use memserver::session::{Event, ImageFacts, Session, SessionConfig};

use crate::datagrams::push_run;
use crate::image::Image;

/// The image that is served.
pub const IMAGE: ImageId = ImageId::from_bytes(*b"the parent's one");

/// The server, its sessions numbered as the clones are.
#[derive(Debug)]
pub struct Server {
    image: Image,
    config: Arc<SessionConfig>,
    schedule: Schedule,
    sessions: BTreeMap<usize, Session>,
    /// What clones needed, as the keeper of memserver knows it, and who may have more to say.
    needed: Merged,
    witnesses: BTreeMap<usize, Witness>,
    /// The seed of the next clone's probes.
    probes: u64,
    /// Requests that were answered with an error.
    refused: Vec<(usize, Tag)>,
    /// Requests in a thousand that fail.
    errors: u32,
    bad: Option<Gfn>,
}

/// Bytes for a client.
#[derive(Debug)]
pub struct Send {
    /// The session.
    pub session: usize,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The client is to be hung up on behind them.
    pub finish: bool,
}

impl Server {
    /// A server of `image`, of whose answers `errors` in a thousand fail, and each with page `bad`.
    pub fn new(image: Image, limits: Limits, errors: u32, bad: Option<Gfn>) -> Self {
        let config = SessionConfig { limits, capabilities: Capabilities::WORKING_SET, ..SessionConfig::default() };
        Self {
            needed: Merged::new(IMAGE, image.memory.universe()),
            witnesses: BTreeMap::new(),
            probes: 0,
            image,
            config: Arc::new(config),
            schedule: Schedule::default(),
            sessions: BTreeMap::new(),
            refused: Vec::new(),
            errors,
            bad,
        }
    }

    /// A client connected.
    pub fn connected(&mut self, now: Duration, session: usize) {
        self.sessions.insert(session, Session::new(now, Arc::clone(&self.config)));
    }

    /// A connection broke or came to its end.
    pub fn gone(&mut self, session: usize) {
        self.sessions.remove(&session);
        self.schedule.remove(session);
        self.witnesses.remove(&session);
        self.refused.retain(|(refused, _)| *refused != session);
    }

    /// Ends all sessions in good order.
    pub fn drain(&mut self, now: Duration) {
        let indices: Vec<usize> = self.sessions.keys().copied().collect();
        for index in indices {
            if let Some(session) = self.sessions.get_mut(&index) {
                session.drain(now);
            }
            self.obey(index);
        }
    }

    /// Takes bytes from a client.
    pub fn receive(&mut self, now: Duration, index: usize, bytes: &[u8]) {
        let Some(session) = self.sessions.get_mut(&index) else {
            return;
        };
        let facts = ImageFacts { frames: self.image.memory.universe(), local: false, multicast: true };
        session.receive(now, bytes, &|image| (image == IMAGE).then_some(facts));
        self.obey(index);
    }

    /// What clones needed.
    pub fn needed(&self) -> &Merged {
        &self.needed
    }

    /// The same server with what an earlier one learnt, which draws probes by this seed.
    pub fn knowing(self, needed: Merged, probes: u64) -> Self {
        Self { needed, probes, ..self }
    }

    /// The bytes of a session are on their way.
    pub fn sent(&mut self, now: Duration, index: usize) {
        if let Some(session) = self.sessions.get_mut(&index) {
            session.sending(now, false);
            self.schedule.sent(index);
        }
    }

    /// What is to be sent next.
    pub fn next_send(&mut self, now: Duration, rng: &mut Rng) -> Option<Send> {
        let mut runs = Vec::new();
        let layout: &dyn Layout = &self.image;
        let next = self.schedule.next_urgent(|_| Some(layout), &mut runs);
        let index = next.or_else(|| self.schedule.next_bulk(|_| Some(layout), &mut runs))?;
        let session = self.sessions.get_mut(&index)?;
        session.sending(now, true);
        let mut bytes = std::mem::take(session.control());
        for Run { tag, frames, content, last, .. } in runs {
            session.answered(now, frames.count().get(), last);
            let fails = rng.u32(0..1000) < self.errors || self.bad.is_some_and(|bad| frames.contains(bad));
            if self.refused.contains(&(index, tag)) {
                self.refused.retain(|refused| !last || *refused != (index, tag));
            } else if fails {
                Message::Error(tag, ErrorCode::Unreadable, "the disk is bad").encode(&mut bytes);
                if !last {
                    self.refused.push((index, tag));
                }
            } else {
                push_run(&self.image, tag, frames, content == Content::Zero, last, &mut bytes);
            }
        }
        self.obey(index);
        let session = self.sessions.get_mut(&index)?;
        let finish = session.is_closing();
        if finish {
            bytes.append(session.control());
        }
        Some(Send { session: index, bytes, finish })
    }

    /// Does what a session wants done.
    fn obey(&mut self, index: usize) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        while let Some(event) = session.poll() {
            match event {
                Event::Welcomed { capabilities, .. } if capabilities.contains(Capabilities::WORKING_SET) => {
                    let order = Arc::new(self.needed.order());
                    self.probes += 1;
                    session.give_order(&order.for_clone(self.probes));
                    let witness = Witness::new(self.needed.frames(), order, self.probes);
                    self.witnesses.insert(index, witness);
                }
                Event::Welcomed { .. } => {}
                Event::Request(answer) => self.schedule.push(index, answer),
                Event::Touched { ranges, last, declined } => {
                    let witness = self.witnesses.get_mut(&index).expect("only who was told an order reports");
                    if declined {
                        witness.declines();
                    }
                    self.needed.touched(witness, &ranges);
                    self.needed.ended(witness, last);
                }
                // No channel is offered here.
                Event::Multicast { .. } => unreachable!(),
                Event::Finish => drop(self.schedule.clear(index)),
                Event::Abort(reason) => panic!("the server aborts a session: {reason:?}"),
            }
        }
        if !session.control().is_empty() {
            self.schedule.push_control(index);
        }
    }
}

impl Layout for Image {
    fn head(&self, range: FrameRange, limit: PageCount) -> (FrameRange, Content) {
        let (run, zero) = Image::head(self, range, limit);
        (run, if zero { Content::Zero } else { Content::Stored })
    }
}
