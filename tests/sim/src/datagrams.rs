//! A page server behind a network of datagrams: every message is one, and nobody knows whether it arrives.
//!
//! It stands for what multicast will be: memserver's own sessions need a stream.

use std::collections::VecDeque;

use descriptor::fetch::{Class, Encoding, ErrorCode, Message, PageRun, Request, Tag};
use descriptor::{FrameRange, Gfn, PageCount};
use fastrand::Rng;

use crate::image::Image;

/// Answers of a class that wait; of a client that asks for more, the oldest are forgotten.
const MAX_QUEUED: usize = 4096;

/// Pages in one datagram.
const QUANTUM: PageCount = PageCount::new(8);

/// What one client asked for.
#[derive(Debug, Default)]
pub struct Responder {
    demand: VecDeque<Answer>,
    bulk: VecDeque<Answer>,
}

#[derive(Debug)]
struct Answer {
    tag: Tag,
    ranges: VecDeque<FrameRange>,
    fails: bool,
}

impl Responder {
    /// Takes a request; of a thousand, `errors` fail.
    pub fn take(&mut self, request: Request<'_>, errors: u32, rng: &mut Rng) {
        let queue = if request.class == Class::Demand { &mut self.demand } else { &mut self.bulk };
        let fails = rng.u32(0..1000) < errors;
        queue.push_back(Answer { tag: request.tag, ranges: request.ranges().collect(), fails });
        if queue.len() > MAX_QUEUED {
            queue.pop_front();
        }
    }

    /// The next datagram to send, demand first.
    pub fn next(&mut self, image: &Image, bad: Option<Gfn>) -> Option<Vec<u8>> {
        let queue = if self.demand.is_empty() { &mut self.bulk } else { &mut self.demand };
        let mut answer = queue.pop_front()?;
        let mut message = Vec::new();
        let unreadable = |range: &FrameRange| bad.is_some_and(|bad| range.contains(bad));
        let range = answer.ranges.pop_front()?;
        if answer.fails || unreadable(&range) {
            Message::Error(answer.tag, ErrorCode::Unreadable, "the disk is bad").encode(&mut message);
            return Some(message);
        }
        let (run, zero) = image.head(range, QUANTUM);
        let (_, rest) = range.split_at(run.count());
        if !rest.is_empty() {
            answer.ranges.push_front(rest);
        }
        let last = answer.ranges.is_empty();
        push_run(image, answer.tag, run, zero, last, &mut message);
        if !last {
            queue.push_front(answer);
        }
        Some(message)
    }
}

/// Appends a PAGES message.
pub fn push_run(image: &Image, tag: Tag, run: FrameRange, zero: bool, last: bool, out: &mut Vec<u8>) {
    let (encoding, payload) = if zero { (Encoding::Zero, 0) } else { (Encoding::Raw, run.count().bytes() as usize) };
    out.extend_from_slice(&PageRun::head(tag, run, encoding, last, payload));
    if !zero {
        run.frames().for_each(|gfn| image.push_page(gfn, out));
    }
}
