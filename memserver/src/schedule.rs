//! What is sent next: demand before bulk, within a session and across the sessions of a ring.
//!
//! Every session has at most one send under way, so a client that stops reading holds up nobody but itself. An answer to
//! demand waits for no more than the send of its own session, and one quantum of bulk of another. Sessions take turns. The
//! schedule knows frames only; whether their pages lie in a file or are zero it asks of a [`Layout`].

use std::collections::VecDeque;
use std::time::Duration;

use descriptor::fetch::{Class, MAX_PAGES_PER_RUN, Tag};
use descriptor::image::{Content, Layout};
use descriptor::{FrameRange, PageCount};

use crate::stats::class_index;

/// Stored pages in one bulk send: 1 MiB. Larger ones gain no throughput, and demand would wait longer.
pub const BULK_QUANTUM: u64 = 256;

/// Stored pages in one demand send: 256 KiB, so that many waiting vCPUs share a system call and the first of them is not
/// held up by the last.
pub const DEMAND_QUANTUM: u64 = 64;

/// Runs in one send. With a head and a gathered piece per page they stay below the kernel's 1024 pieces.
pub const MAX_RUNS: usize = 256;

/// A request on its way to being answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    tag: Tag,
    class: Class,
    received: Duration,
    /// What is left to send, the next range last.
    rest: Vec<FrameRange>,
}

/// One run of an answer, to be sent as one PAGES message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The request.
    pub tag: Tag,
    /// Its class.
    pub class: Class,
    /// The frames.
    pub frames: FrameRange,
    /// What they consist of.
    pub content: Content,
    /// The last of its request.
    pub last: bool,
    /// When the request was received.
    pub received: Duration,
}

/// The answers that the sessions of one ring wait for. Sessions are named by small numbers of the caller's choice.
#[derive(Debug, Default)]
pub struct Schedule {
    lanes: Vec<Lane>,
    /// Sessions with something urgent to send and no send under way, in the order of their turn.
    urgent: VecDeque<usize>,
    /// The same for those with bulk.
    bulk: VecDeque<usize>,
    depth: [usize; 2],
}

#[derive(Debug, Default)]
struct Lane {
    demand: VecDeque<Answer>,
    bulk: VecDeque<Answer>,
    /// Control bytes wait in the session.
    control: bool,
    busy: bool,
    /// Stands in the queue of the same name.
    in_urgent: bool,
    in_bulk: bool,
}

impl Answer {
    /// The answer to a request for `ranges`.
    pub fn new(tag: Tag, class: Class, mut ranges: Vec<FrameRange>, received: Duration) -> Self {
        ranges.reverse();
        Self { tag, class, received, rest: ranges }
    }

    /// The request's number.
    pub fn tag(&self) -> Tag {
        self.tag
    }

    /// What is left to send.
    pub fn ranges(&self) -> impl Iterator<Item = FrameRange> {
        self.rest.iter().rev().copied()
    }

    /// The request's class.
    pub fn class(&self) -> Class {
        self.class
    }

    /// The next run, of at most `limit` stored pages.
    fn next_run(&mut self, layout: &dyn Layout, limit: PageCount) -> Option<Run> {
        let range = self.rest.pop()?;
        let (frames, content) = layout.head(range, limit);
        let (_, rest) = range.split_at(frames.count());
        if !rest.is_empty() {
            self.rest.push(rest);
        }
        let (tag, class, received, last) = (self.tag, self.class, self.received, self.rest.is_empty());
        Some(Run { tag, class, frames, content, last, received })
    }
}

impl Schedule {
    /// Queues an answer for `session`.
    pub fn push(&mut self, session: usize, answer: Answer) {
        self.depth[class_index(answer.class)] += 1;
        let lane = self.lane(session);
        match answer.class {
            Class::Demand => lane.demand.push_back(answer),
            Class::Bulk => lane.bulk.push_back(answer),
        }
        self.enlist(session);
    }

    /// Notes that `session` has control bytes to send.
    pub fn push_control(&mut self, session: usize) {
        self.lane(session).control = true;
        self.enlist(session);
    }

    /// Notes that the send of `session` has ended, so that it can have another.
    pub fn sent(&mut self, session: usize) {
        self.lane(session).busy = false;
        self.enlist(session);
    }

    /// Forgets the answers of `session` and gives their numbers. A send under way is still under way.
    pub fn clear(&mut self, session: usize) -> Vec<Tag> {
        let lane = self.lane(session);
        let answers: Vec<Answer> = lane.demand.drain(..).chain(lane.bulk.drain(..)).collect();
        answers.iter().for_each(|answer| self.depth[class_index(answer.class)] -= 1);
        answers.into_iter().map(|answer| answer.tag).collect()
    }

    /// Forgets all of `session`, so that another may have its number.
    pub fn remove(&mut self, session: usize) {
        self.clear(session);
        let lane = self.lane(session);
        (lane.control, lane.busy) = (false, false);
    }

    /// The next session whose demand or control bytes are to be sent. Puts the runs into `runs`, which it empties first;
    /// where there are only control bytes it stays empty. The session is busy until [`Schedule::sent`].
    pub fn next_urgent<'a>(
        &mut self,
        layout_of: impl Fn(usize) -> Option<&'a dyn Layout>,
        runs: &mut Vec<Run>,
    ) -> Option<usize> {
        runs.clear();
        while let Some(session) = self.urgent.pop_front() {
            let lane = self.lane(session);
            lane.in_urgent = false;
            if lane.busy || !lane.is_urgent() {
                continue;
            }
            let layout = layout_of(session);
            // With neither, the same would come out again and again.
            if !std::mem::take(&mut lane.control) && layout.is_none() {
                continue;
            }
            lane.busy = true;
            if let Some(layout) = layout {
                let done = take_runs(&mut lane.demand, layout, DEMAND_QUANTUM, runs);
                self.depth[class_index(Class::Demand)] -= done;
            }
            return Some(session);
        }
        None
    }

    /// The next session whose bulk is to be sent, as [`Schedule::next_urgent`]; to be asked when that has nothing, and
    /// once for every look at the completion queue.
    pub fn next_bulk<'a>(
        &mut self,
        layout_of: impl Fn(usize) -> Option<&'a dyn Layout>,
        runs: &mut Vec<Run>,
    ) -> Option<usize> {
        runs.clear();
        while let Some(session) = self.bulk.pop_front() {
            let lane = self.lane(session);
            lane.in_bulk = false;
            if lane.busy || lane.bulk.is_empty() || lane.is_urgent() {
                continue;
            }
            let Some(layout) = layout_of(session) else { continue };
            lane.busy = true;
            let done = take_runs(&mut lane.bulk, layout, BULK_QUANTUM, runs);
            self.depth[class_index(Class::Bulk)] -= done;
            return Some(session);
        }
        None
    }

    /// True while a session without a send under way has bulk to send.
    pub fn has_ready_bulk(&self) -> bool {
        !self.bulk.is_empty()
    }

    /// Answers of which something waits to be sent, by [`class_index`].
    pub fn depth(&self) -> [usize; 2] {
        self.depth
    }

    fn lane(&mut self, session: usize) -> &mut Lane {
        if session >= self.lanes.len() {
            self.lanes.resize_with(session + 1, Lane::default);
        }
        &mut self.lanes[session]
    }

    /// Puts a session that could send into the queues that it belongs into.
    fn enlist(&mut self, session: usize) {
        let lane = self.lane(session);
        if lane.busy {
            return;
        }
        let urgent = lane.is_urgent() && !lane.in_urgent;
        let bulk = !lane.bulk.is_empty() && !lane.in_bulk;
        lane.in_urgent |= urgent;
        lane.in_bulk |= bulk;
        if urgent {
            self.urgent.push_back(session);
        }
        if bulk {
            self.bulk.push_back(session);
        }
    }
}

impl Lane {
    fn is_urgent(&self) -> bool {
        self.control || !self.demand.is_empty()
    }
}

/// Moves runs with at most `quantum` stored pages from `answers` to `runs`; tells how many answers that completes.
fn take_runs(answers: &mut VecDeque<Answer>, layout: &dyn Layout, quantum: u64, runs: &mut Vec<Run>) -> usize {
    let before = answers.len();
    let mut left = quantum;
    while left > 0 && runs.len() < MAX_RUNS {
        let Some(answer) = answers.front_mut() else { break };
        let limit = PageCount::new(left.min(MAX_PAGES_PER_RUN.into()));
        if let Some(run) = answer.next_run(layout, limit) {
            if run.content == Content::Stored {
                left -= run.frames.count().get().min(left);
            }
            runs.push(run);
        }
        if answer.rest.is_empty() {
            answers.pop_front();
        }
    }
    before - answers.len()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use descriptor::Gfn;
    use proptest::prelude::*;

    use super::*;

    /// Every 100th frame begins ten zero ones.
    struct Pattern;

    impl Layout for Pattern {
        fn head(&self, range: FrameRange, limit: PageCount) -> (FrameRange, Content) {
            let into = range.start().index() % 100;
            let (length, content) = if into < 10 { (10 - into, Content::Zero) } else { (100 - into, Content::Stored) };
            let length = if content == Content::Stored { length.min(limit.get()) } else { length };
            (range.split_at(PageCount::new(length)).0, content)
        }
    }

    /// Stored throughout.
    struct Solid;

    impl Layout for Solid {
        fn head(&self, range: FrameRange, limit: PageCount) -> (FrameRange, Content) {
            (range.split_at(limit).0, Content::Stored)
        }
    }

    fn answer(tag: Tag, class: Class, start: u64, count: u64) -> Answer {
        let range = FrameRange::new(Gfn::new(start), PageCount::new(count));
        Answer::new(tag, class, vec![range], Duration::ZERO)
    }

    fn solid(_: usize) -> Option<&'static dyn Layout> {
        Some(&Solid)
    }

    fn urgent(schedule: &mut Schedule) -> Option<(usize, Vec<Run>)> {
        let mut runs = Vec::new();
        schedule.next_urgent(solid, &mut runs).map(|session| (session, runs))
    }

    fn bulk(schedule: &mut Schedule) -> Option<(usize, Vec<Run>)> {
        let mut runs = Vec::new();
        schedule.next_bulk(solid, &mut runs).map(|session| (session, runs))
    }

    #[test]
    fn without_a_layout_there_are_control_bytes_and_nothing_else() {
        let mut schedule = Schedule::default();
        let mut runs = Vec::new();
        schedule.push(0, answer(1, Class::Demand, 0, 1));
        assert_eq!(schedule.next_urgent(|_| None, &mut runs), None);
        schedule.push_control(0);
        assert_eq!(schedule.next_urgent(|_| None, &mut runs), Some(0));
        assert_eq!(runs, []);
        schedule.sent(0);
        assert_eq!(urgent(&mut schedule).map(|(session, runs)| (session, runs.len())), Some((0, 1)));
    }

    #[test]
    fn demand_overtakes_bulk_after_one_quantum() {
        let mut schedule = Schedule::default();
        schedule.push(0, answer(1, Class::Bulk, 0, 10_000));
        let (_, runs) = bulk(&mut schedule).unwrap();
        assert_eq!(runs.iter().map(|run| run.frames.count().get()).sum::<u64>(), BULK_QUANTUM);
        schedule.push(0, answer(2, Class::Demand, 5, 1));
        schedule.push(1, answer(3, Class::Demand, 5, 1));
        // Session 0 is busy with its quantum; session 1 need not wait for it.
        assert_eq!(urgent(&mut schedule).unwrap().0, 1);
        assert_eq!(urgent(&mut schedule), None);
        schedule.sent(0);
        let (session, runs) = urgent(&mut schedule).unwrap();
        assert_eq!((session, runs[0].tag, runs[0].last), (0, 2, true));
        assert_eq!(bulk(&mut schedule), None);
        schedule.sent(0);
        assert_eq!(bulk(&mut schedule).unwrap().1[0].frames.start(), Gfn::new(BULK_QUANTUM));
    }

    #[test]
    fn sessions_take_turns_and_a_stopped_one_holds_up_nobody() {
        let mut schedule = Schedule::default();
        (0..3).for_each(|session| schedule.push(session, answer(1, Class::Bulk, 0, 2000)));
        let mut order = Vec::new();
        for _ in 0..6 {
            let (session, _) = bulk(&mut schedule).unwrap();
            order.push(session);
            // Session 1 never reads.
            if session != 1 {
                schedule.sent(session);
            }
        }
        assert_eq!(order, [0, 1, 2, 0, 2, 0]);
    }

    #[test]
    fn control_bytes_go_before_and_need_no_runs() {
        let mut schedule = Schedule::default();
        schedule.push_control(4);
        schedule.push_control(4);
        assert_eq!(urgent(&mut schedule), Some((4, vec![])));
        schedule.sent(4);
        assert_eq!(urgent(&mut schedule), None);
    }

    #[test]
    fn what_is_cleared_is_not_sent() {
        let mut schedule = Schedule::default();
        schedule.push(0, answer(1, Class::Demand, 0, 1));
        schedule.push(0, answer(2, Class::Bulk, 0, 1));
        assert_eq!(schedule.depth(), [1, 1]);
        assert_eq!(schedule.clear(0), [1, 2]);
        assert_eq!(schedule.depth(), [0, 0]);
        assert_eq!((urgent(&mut schedule), bulk(&mut schedule)), (None, None));
    }

    #[test]
    fn a_send_is_bounded_in_pieces_even_among_zeros() {
        let mut schedule = Schedule::default();
        for tag in 1..1000 {
            schedule.push(0, answer(tag, Class::Bulk, 0, 1));
        }
        let mut runs = Vec::new();
        assert_eq!(schedule.next_bulk(|_| Some(&Pattern as &dyn Layout), &mut runs), Some(0));
        assert_eq!(runs.len(), MAX_RUNS);
        assert_eq!(schedule.depth(), [0, 999 - MAX_RUNS]);
    }

    proptest! {
        /// Every frame that was asked for is sent once, and the last run of a request is marked.
        #[test]
        fn everything_is_sent_once(
            requests in prop::collection::vec((0..3usize, any::<bool>(), 0..5000u64, 1..1500u64), 1..20),
            choices in prop::collection::vec(any::<bool>(), 16),
        ) {
            let mut schedule = Schedule::default();
            let mut wanted = BTreeMap::new();
            for (tag, (session, demand, start, count)) in (1..).zip(&requests) {
                let class = if *demand { Class::Demand } else { Class::Bulk };
                schedule.push(*session, answer(tag, class, *start, *count));
                wanted.insert(tag, (*start..start + count).collect::<Vec<_>>());
            }
            let mut got: BTreeMap<Tag, Vec<u64>> = BTreeMap::new();
            let (mut busy, mut runs, mut lasts) = (Vec::new(), Vec::new(), 0);
            let mut choices = choices.into_iter().cycle();
            loop {
                let layout = |_| Some(&Pattern as &dyn Layout);
                let next = schedule.next_urgent(layout, &mut runs).or_else(|| schedule.next_bulk(layout, &mut runs));
                if let Some(session) = next {
                    prop_assert!(!busy.contains(&session), "two sends at one time");
                    prop_assert!(!runs.is_empty() && runs.len() <= MAX_RUNS);
                    busy.push(session);
                }
                for run in &runs {
                    prop_assert!(run.content == Content::Zero || run.frames.count().get() <= MAX_PAGES_PER_RUN.into());
                    got.entry(run.tag).or_default().extend(run.frames.frames().map(Gfn::index));
                    lasts += usize::from(run.last);
                }
                if next.is_none() && busy.is_empty() {
                    break;
                }
                if (next.is_none() || choices.next() == Some(true)) && !busy.is_empty() {
                    schedule.sent(busy.remove(0));
                }
            }
            prop_assert_eq!(got, wanted);
            prop_assert_eq!(lasts, requests.len());
            prop_assert_eq!(schedule.depth(), [0, 0]);
        }
    }
}
