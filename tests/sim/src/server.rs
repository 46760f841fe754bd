//! A page server: requests in, runs of pages out, demand before bulk.

use std::collections::VecDeque;

use descriptor::fetch::{
    Capabilities, Class, Encoding, ErrorCode, Limits, Message, PageRun, Preamble, Tag, Welcome, decode, decode_preamble,
};
use descriptor::{FrameRange, Gfn, ImageId, PageCount};
use fastrand::Rng;

use crate::image::Image;

/// The image that every server serves.
pub const IMAGE: ImageId = ImageId::from_bytes(*b"the parent's one");

/// Answers that wait; of datagrams that ask for more, the server forgets the oldest.
const MAX_QUEUED: usize = 4096;

/// The server's side of one connection, or of one client's datagrams.
#[derive(Debug)]
pub struct Session {
    inbox: Vec<u8>,
    greeted: bool,
    demand: VecDeque<Answer>,
    bulk: VecDeque<Answer>,
    /// Pages and requests that the client is owed.
    owed: (u64, u64),
    limits: Limits,
    strict: bool,
}

#[derive(Debug)]
struct Answer {
    tag: Tag,
    ranges: Vec<FrameRange>,
    fails: bool,
}

impl Session {
    /// A session with a client that must keep to `limits`; `strict` where the client can know what it is owed.
    pub fn new(limits: Limits, strict: bool) -> Self {
        let (demand, bulk) = (VecDeque::new(), VecDeque::new());
        Self { inbox: Vec::new(), greeted: false, demand, bulk, owed: (0, 0), limits, strict }
    }

    /// Takes bytes of a stream; returns what is to be sent at once.
    pub fn receive(&mut self, bytes: &[u8], image: &Image, errors: u32, rng: &mut Rng) -> Vec<u8> {
        self.inbox.extend_from_slice(bytes);
        let mut reply = Vec::new();
        if !self.greeted {
            let Some((_, length)) = decode_preamble(&self.inbox).expect("the client speaks the protocol") else {
                return reply;
            };
            self.inbox.drain(..length);
            self.greeted = true;
            Preamble.encode(&mut reply);
        }
        let inbox = std::mem::take(&mut self.inbox);
        let mut rest = &inbox[..];
        while let Some((message, length)) = decode(rest).expect("the client speaks the protocol") {
            rest = &rest[length..];
            self.take(&message, image, errors, rng, &mut reply);
        }
        self.inbox = rest.to_vec();
        reply
    }

    /// Takes one message.
    pub fn take(&mut self, message: &Message<'_>, image: &Image, errors: u32, rng: &mut Rng, reply: &mut Vec<u8>) {
        match message {
            Message::Hello(hello) => {
                assert_eq!(hello.image, IMAGE);
                let frames = image.memory.universe();
                let capabilities = Capabilities::default();
                Message::Welcome(Welcome { image: IMAGE, frames, capabilities, limits: self.limits }).encode(reply);
            }
            Message::Request(request) => {
                let ranges: Vec<FrameRange> = request.ranges().collect();
                let pages: u64 = ranges.iter().map(|range| range.count().get()).sum();
                self.owed = (self.owed.0 + pages, self.owed.1 + 1);
                if self.strict {
                    assert!(self.owed.0 <= u64::from(self.limits.max_pages), "more pages asked for than allowed");
                    assert!(self.owed.1 <= u64::from(self.limits.max_requests), "more requests than allowed");
                }
                let queue = if request.class == Class::Demand { &mut self.demand } else { &mut self.bulk };
                queue.push_back(Answer { tag: request.tag, ranges, fails: rng.u32(0..1000) < errors });
                if queue.len() > MAX_QUEUED {
                    queue.pop_front();
                }
            }
            other => panic!("a client does not send {other:?}"),
        }
    }

    /// The next message to send: a run of at most `quantum` pages, demand first.
    pub fn next(&mut self, image: &Image, bad: Option<Gfn>, quantum: u64) -> Option<Vec<u8>> {
        let queue = if self.demand.is_empty() { &mut self.bulk } else { &mut self.demand };
        let answer = queue.front_mut()?;
        let tag = answer.tag;
        let mut message = Vec::new();
        let unreadable = |range: &FrameRange| bad.is_some_and(|bad| range.contains(bad));
        if answer.fails || answer.ranges.iter().any(unreadable) {
            let pages: u64 = answer.ranges.iter().map(|range| range.count().get()).sum();
            queue.pop_front();
            self.owed = (self.owed.0.saturating_sub(pages), self.owed.1 - 1);
            Message::Error(tag, ErrorCode::Unreadable, "the disk is bad").encode(&mut message);
            return Some(message);
        }
        let range = answer.ranges.remove(0);
        let zeros = image.zero.runs_in(range).next();
        let head = match zeros {
            Some(run) if run.start() == range.start() => run.count(),
            Some(run) => (run.start() - range.start()).min(PageCount::new(quantum)),
            None => PageCount::new(quantum),
        };
        let (run, rest) = range.split_at(head);
        if !rest.is_empty() {
            answer.ranges.insert(0, rest);
        }
        let last = answer.ranges.is_empty();
        if last {
            queue.pop_front();
        }
        self.owed = (self.owed.0.saturating_sub(run.count().get()), self.owed.1 - u64::from(last));
        let zero = image.zero.contains(run.start());
        let payload = if zero { 0 } else { run.count().bytes() as usize };
        let encoding = if zero { Encoding::Zero } else { Encoding::Raw };
        message.extend_from_slice(&PageRun::head(tag, run, encoding, last, payload));
        if !zero {
            run.frames().for_each(|gfn| image.push_page(gfn, &mut message));
        }
        Some(message)
    }
}
