use std::time::Duration;

use descriptor::image::{Content, Layout};
use descriptor::{FrameRange, FrameSet, Gfn, PageCount};

use crate::{BlockMap, ChannelParameters, ChunkSet};

/// The push of what somebody lacks: which frames are to go in this pass, and what comes after it.
///
/// ```text
///          a newcomer lacks something       everybody there                  all sent
///   Idle ──────────────────────────▶ Gathering ─────────▶ Pass ──────────────────────────▶ Draining
///    ▲                                                     ▲                                  │ no repair for a while
///    │ nobody lacks anything, or few lack little: end game │ much is lacking                  ▼
///    └─────────────────────────────────────────────────────┴───────────────────────────── Asking (END)
/// ```
#[derive(Debug)]
pub(super) struct Bulk {
    channel: ChannelParameters,
    phase: Phase,
    /// What is still to go in this pass.
    todo: FrameSet,
    order: Vec<FrameRange>,
    order_at: usize,
    cursor: Gfn,
    /// Passes since a newcomer came, and when the last began.
    pass: u32,
    began: Duration,
    /// The number of the last question; each is another, so that members answer each.
    burst: u32,
    endgame: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nobody is known to lack anything that is to be pushed.
    Idle,
    Gathering {
        since: Duration,
    },
    Pass,
    /// All was sent; the repairs are under way.
    Draining {
        since: Duration,
        active: Duration,
    },
    /// END was sent.
    Asking(Question),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Question {
    /// When it was first asked.
    since: Duration,
    /// ENDs to go, and when the next does.
    left: u32,
    next: Duration,
    /// When to ask again those who have not answered.
    until: Duration,
    round: u32,
}

/// What the members lack, as far as it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wants {
    /// Useful members that are known to lack something.
    pub(super) lacking: usize,
    /// The pages that they lack, all together.
    pub(super) pages: u64,
    /// Of these members, the ones that were not sent to the end game.
    pub(super) fresh: usize,
    /// When the last of these members joined.
    pub(super) newest: Duration,
    /// Useful members of which it is not known.
    pub(super) unknown: usize,
    /// Of these, the ones that say they lack something.
    pub(super) wanting: usize,
    /// Members from which there was no report yet.
    pub(super) silent: usize,
    /// When the last joined.
    pub(super) joined: Duration,
}

/// What a change of phase requires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A pass begins over the union of what the members lack: call [`Bulk::begin`] with it.
    Begin,
    /// A question begins: forget what the members lack.
    Ask,
    /// Members have to fetch the rest by unicast.
    EndGame,
    /// The series is over.
    Rest,
}

impl Bulk {
    /// ENDs for one question, since one alone is lost with the next best datagram.
    const ENDS: u32 = 3;

    /// Questions after which a pass goes on without the answers that are missing. At 30 % of losses a third of the members
    /// do not answer the first, a thirtieth none of three.
    const ROUNDS: u32 = 3;

    /// Passes of which the last leads to the end game at the latest. Each leaves over what was lost for good in it, so
    /// that more than this means a member for whom the channel is no good.
    const PASSES: u32 = 3;

    pub(super) fn new(channel: ChannelParameters) -> Self {
        Self {
            channel,
            phase: Phase::Idle,
            todo: FrameSet::empty(channel.frames),
            order: Vec::new(),
            order_at: 0,
            cursor: Gfn::new(0),
            pass: 0,
            began: Duration::ZERO,
            burst: 0,
            endgame: false,
        }
    }

    /// Sends these frames first in a pass; what reaches beyond the image is left out.
    pub(super) fn set_order(&mut self, order: Vec<FrameRange>) {
        let inside = order.into_iter().map(|range| range.intersection(self.todo.bounds()));
        self.order = inside.filter(|range| !range.is_empty()).collect();
        self.order_at = 0;
    }

    pub(super) fn burst(&self) -> u32 {
        self.burst
    }

    pub(super) fn endgame(&self) -> bool {
        self.endgame
    }

    /// True from the first lack of a newcomer until the series is over.
    pub(super) fn is_bursting(&self) -> bool {
        self.phase != Phase::Idle
    }

    /// True while there are frames to be sent.
    pub(super) fn has_work(&self) -> bool {
        self.phase == Phase::Pass && !self.todo.is_empty()
    }

    /// Notes that `frames` went to everybody, for whatever reason.
    pub(super) fn sent(&mut self, map: &BlockMap) {
        if !self.todo.is_empty() {
            map.runs().for_each(|(frames, _)| {
                self.todo.remove_range(frames);
            });
        }
    }

    /// Leaves out what nobody lacks any more.
    pub(super) fn keep(&mut self, union: &ChunkSet) {
        let keep = self.frames_of(union);
        self.todo.intersect_with(&keep);
    }

    /// Begins a pass over `union`.
    pub(super) fn begin(&mut self, union: &ChunkSet) {
        self.todo = self.frames_of(union);
        (self.order_at, self.cursor) = (0, Gfn::new(0));
        self.phase = Phase::Pass;
        self.pass += 1;
        self.burst = self.burst.wrapping_add(1);
        self.endgame = false;
    }

    /// The next block of the pass.
    pub(super) fn next_block(&mut self, layout: &dyn Layout) -> Option<BlockMap> {
        let geometry = self.channel.geometry();
        let mut left = u64::from(geometry.pages_per_block());
        let mut map = BlockMap::new();
        let mut end = Gfn::new(0);
        while left > 0 {
            let Some(range) = self.head().filter(|range| range.start() >= end) else { break };
            let (frames, content) = layout.head(range.split_at(BlockMap::MAX_RUN).0, PageCount::new(left));
            if !map.push(frames, content) {
                break;
            }
            if content == Content::Stored {
                left -= frames.count().get().min(left);
            }
            self.todo.remove_range(frames);
            end = frames.end();
        }
        (!map.is_empty()).then_some(map)
    }

    /// The next run that is to go: of the order, then by address.
    fn head(&mut self) -> Option<FrameRange> {
        if self.todo.is_empty() {
            return None;
        }
        while let Some(range) = self.order.get(self.order_at) {
            if let Some(run) = self.todo.runs_in(*range).next() {
                return Some(run);
            }
            self.order_at += 1;
        }
        let first = self.todo.first_member_from(self.cursor).or_else(|| self.todo.first_member_from(Gfn::new(0)))?;
        self.cursor = first;
        // No farther than a block can reach: the end of the run may lie behind the whole image.
        let near = FrameRange::between(first, self.todo.bounds().end()).split_at(BlockMap::MAX_RUN).0;
        self.todo.runs_in(near).next()
    }

    /// The next change of phase that is due.
    pub(super) fn step(&mut self, now: Duration, wants: &Wants, timing: &Timing) -> Option<Step> {
        match &mut self.phase {
            Phase::Idle if wants.fresh > 0 => {
                self.phase = Phase::Gathering { since: now };
                (self.pass, self.endgame) = (0, false);
                self.step(now, wants, timing)
            }
            // The first report was lost, or told of something new without saying what.
            Phase::Idle if wants.wanting > 0 => {
                (self.pass, self.endgame) = (0, false);
                Some(self.ask(now, timing))
            }
            Phase::Idle => None,
            Phase::Gathering { .. } if wants.lacking == 0 && wants.wanting == 0 => {
                self.phase = Phase::Idle;
                Some(Step::Rest)
            }
            Phase::Gathering { since } => {
                let waiting = wants.silent > 0 || wants.unknown > 0 || now < wants.joined + timing.gather;
                let ready = now >= *since + timing.gather * if waiting { 10 } else { 1 };
                ready.then(|| self.next_pass(now))
            }
            Phase::Pass if self.todo.is_empty() && !timing.sending => {
                self.phase = Phase::Draining { since: now, active: now };
                None
            }
            Phase::Pass => None,
            Phase::Draining { since, active } => {
                *active = timing.repaired.max(*active);
                let over = now >= *active + timing.quiet || now >= *since + timing.quiet * 20;
                over.then(|| self.ask(now, timing))
            }
            Phase::Asking(question) => {
                let question = *question;
                (wants.unknown == 0 || now >= question.until).then(|| self.judge(now, question, wants, timing))
            }
        }
    }

    fn ask(&mut self, now: Duration, timing: &Timing) -> Step {
        self.phase =
            Phase::Asking(Question { since: now, left: Self::ENDS, next: now, until: now + timing.answers, round: 1 });
        self.burst = self.burst.wrapping_add(1);
        Step::Ask
    }

    fn judge(&mut self, now: Duration, question: Question, wants: &Wants, timing: &Timing) -> Step {
        let patient = wants.lacking == 0 && wants.wanting > 0;
        if wants.unknown > 0 && (question.round < Self::ROUNDS || patient) {
            let round = question.round + 1;
            let until = now + timing.answers * round.min(4);
            self.phase = Phase::Asking(Question { left: Self::ENDS, next: now, until, round, ..question });
            self.burst = self.burst.wrapping_add(1);
            // Those who have answered need not be forgotten.
            return Step::Rest;
        }
        if wants.lacking == 0 {
            self.phase = Phase::Idle;
            return Step::Rest;
        }
        if wants.newest > self.began {
            self.pass = 0;
        }
        let little = wants.pages <= self.channel.frames.get() / 200;
        if self.pass > 0 && (wants.lacking <= 2 || little || self.pass >= Self::PASSES) {
            self.phase = Phase::Idle;
            self.endgame = true;
            return Step::EndGame;
        }
        self.next_pass(now)
    }

    fn next_pass(&mut self, now: Duration) -> Step {
        self.began = now;
        Step::Begin
    }

    /// True when an END is to go; it then counts as sent.
    pub(super) fn take_end(&mut self, now: Duration, spacing: Duration) -> bool {
        match &mut self.phase {
            Phase::Asking(question) if question.left > 0 && now >= question.next => {
                question.left -= 1;
                question.next = now + spacing;
                true
            }
            _ => false,
        }
    }

    /// When [`Bulk::step`] or [`Bulk::take_end`] has something to do although nothing else happens.
    pub(super) fn next_timeout(&self, timing: &Timing, joined: Duration) -> Option<Duration> {
        match self.phase {
            Phase::Idle | Phase::Pass => None,
            Phase::Gathering { since } => {
                let first = (since + timing.gather).max(joined + timing.gather);
                Some(if timing.now < first { first } else { since + timing.gather * 10 })
            }
            Phase::Draining { since, active } => {
                Some((timing.repaired.max(active) + timing.quiet).min(since + timing.quiet * 20))
            }
            Phase::Asking(question) if question.left > 0 => Some(question.next.min(question.until)),
            Phase::Asking(question) => Some(question.until),
        }
    }

    /// Ends whatever is under way, since nobody is there.
    pub(super) fn reset(&mut self) {
        self.todo = FrameSet::empty(self.channel.frames);
        self.phase = Phase::Idle;
        self.endgame = false;
    }

    fn frames_of(&self, union: &ChunkSet) -> FrameSet {
        let mut chunks = union.iter().peekable();
        let runs = std::iter::from_fn(|| {
            let first = chunks.next()?;
            let mut last = first;
            while let Some(next) = chunks.next_if_eq(&(last + 1)) {
                last = next;
            }
            Some(FrameRange::between(self.channel.chunk(first).start(), self.channel.chunk(last).end()))
        });
        FrameSet::from_ranges(self.channel.frames, runs)
    }
}

/// The times that the phases depend on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    pub(super) now: Duration,
    /// How long to wait for others to join.
    pub(super) gather: Duration,
    /// A bulk block is partly sent.
    pub(super) sending: bool,
    /// The last time that a repair was asked for or sent; now, while one is under way.
    pub(super) repaired: Duration,
    /// How long it takes until a loss shows as a NACK.
    pub(super) quiet: Duration,
    /// How long the answers to a question may take.
    pub(super) answers: Duration,
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Solid, range};
    use super::*;

    fn bulk() -> Bulk {
        Bulk::new(ChannelParameters::new(1, 1448, PageCount::new(1024)).unwrap())
    }

    fn timing(now: u64) -> Timing {
        let ms = Duration::from_millis;
        Timing { now: ms(now), gather: ms(20), sending: false, repaired: ms(0), quiet: ms(6), answers: ms(30) }
    }

    fn step(bulk: &mut Bulk, now: u64, wants: Wants) -> Option<Step> {
        bulk.step(Duration::from_millis(now), &wants, &timing(now))
    }

    const ONE: Wants = Wants {
        lacking: 1,
        pages: 1000,
        fresh: 1,
        newest: Duration::ZERO,
        unknown: 0,
        wanting: 0,
        silent: 0,
        joined: Duration::ZERO,
    };

    fn drain(bulk: &mut Bulk) -> Vec<FrameRange> {
        let mut sent = Vec::new();
        while let Some(map) = bulk.next_block(&Solid) {
            sent.extend(map.runs().map(|(frames, _)| frames));
        }
        sent
    }

    #[test]
    fn a_pass_goes_by_the_order_and_then_by_address() {
        let mut bulk = bulk();
        bulk.set_order(vec![range(700, 10), range(300, 4), range(2000, 5), range(1020, 50)]);
        bulk.begin(&ChunkSet::full(4));
        let mut demand = BlockMap::new();
        demand.push(range(10, 5), Content::Stored);
        bulk.sent(&demand);
        let sent = drain(&mut bulk);
        assert_eq!(sent[..4], [range(700, 10), range(300, 4), range(1020, 4), range(0, 10)]);
        assert_eq!(sent[4], range(15, 57));
        assert_eq!(sent.iter().map(|range| range.count().get()).sum::<u64>(), 1024 - 5);
        assert!(!bulk.has_work());
    }

    #[test]
    fn only_lacking_chunks_are_sent() {
        let mut bulk = bulk();
        let mut union = ChunkSet::new(4);
        [1, 3].into_iter().for_each(|chunk| union.insert(chunk));
        bulk.begin(&union);
        union.remove(1);
        bulk.keep(&union);
        assert_eq!(drain(&mut bulk).iter().map(|range| range.start().index()).min(), Some(768));
    }

    #[test]
    fn a_burst_waits_for_others_asks_and_rests() {
        let mut bulk = bulk();
        assert_eq!(step(&mut bulk, 0, ONE), None);
        assert_eq!(step(&mut bulk, 19, ONE), None);
        assert_eq!(step(&mut bulk, 25, Wants { joined: Duration::from_millis(10), ..ONE }), None);
        assert_eq!(step(&mut bulk, 25, Wants { silent: 1, ..ONE }), None, "it will report in a moment");
        assert_eq!(step(&mut bulk, 200, Wants { silent: 1, ..ONE }), Some(Step::Begin), "or not");
        bulk.begin(&ChunkSet::full(4));
        assert_eq!(step(&mut bulk, 210, ONE), None);
        drain(&mut bulk);
        assert_eq!(step(&mut bulk, 220, ONE), None);
        assert_eq!(step(&mut bulk, 225, ONE), None);
        assert_eq!(step(&mut bulk, 226, ONE), Some(Step::Ask));
        let ends = (226..300).filter(|at| bulk.take_end(Duration::from_millis(*at), Duration::from_millis(2)));
        assert_eq!(ends.collect::<Vec<_>>(), [226, 228, 230]);
        assert_eq!(step(&mut bulk, 240, Wants { unknown: 1, ..Wants::default() }), None);
        assert_eq!(step(&mut bulk, 240, Wants::default()), Some(Step::Rest));
        assert!(!bulk.is_bursting());
    }

    #[test]
    fn few_who_lack_little_are_left_to_unicast_and_many_are_not() {
        for (lacking, pages, expected) in
            [(2, 1000, Step::EndGame), (3, 1000, Step::Begin), (3, 5, Step::EndGame), (0, 0, Step::Rest)]
        {
            let mut bulk = bulk();
            bulk.begin(&ChunkSet::full(4));
            drain(&mut bulk);
            assert_eq!(step(&mut bulk, 0, ONE), None);
            assert_eq!(step(&mut bulk, 10, ONE), Some(Step::Ask));
            assert_eq!(step(&mut bulk, 11, Wants { lacking, pages, ..Wants::default() }), Some(expected));
            assert_eq!(bulk.endgame(), expected == Step::EndGame);
        }
    }

    #[test]
    fn the_third_pass_is_the_last_and_a_newcomer_begins_again() {
        let mut bulk = bulk();
        for _ in 0..3 {
            bulk.begin(&ChunkSet::full(4));
        }
        drain(&mut bulk);
        let many = Wants { lacking: 5, pages: 1000, ..Wants::default() };
        step(&mut bulk, 0, many);
        step(&mut bulk, 10, many);
        assert_eq!(step(&mut bulk, 11, many), Some(Step::EndGame));
        assert_eq!(step(&mut bulk, 12, many), None, "they were told");
        assert_eq!(step(&mut bulk, 13, Wants { fresh: 1, ..many }), None);
        assert!(bulk.is_bursting() && !bulk.endgame());
        assert_eq!(step(&mut bulk, 33, Wants { fresh: 1, ..many }), Some(Step::Begin));
    }

    #[test]
    fn lost_answers_are_asked_for_again_and_not_for_ever() {
        let mut bulk = bulk();
        bulk.begin(&ChunkSet::full(4));
        drain(&mut bulk);
        let many = Wants { lacking: 5, pages: 1000, unknown: 1, ..Wants::default() };
        step(&mut bulk, 0, many);
        step(&mut bulk, 10, many);
        let first = bulk.burst();
        let steps: Vec<_> =
            (11..1000).filter_map(|now| step(&mut bulk, now, many).map(|step| (now, step))).take(3).collect();
        assert_eq!(steps, [(40, Step::Rest), (100, Step::Rest), (190, Step::Begin)]);
        assert_ne!(bulk.burst(), first, "each question has another number");
    }

    #[test]
    fn a_member_whose_lacks_are_unknown_is_asked_as_long_as_it_lacks() {
        let mut bulk = bulk();
        let wants = Wants { unknown: 1, wanting: 1, ..Wants::default() };
        assert_eq!(step(&mut bulk, 0, wants), Some(Step::Ask));
        let asked = (1..5000).filter(|now| step(&mut bulk, *now, wants).is_some()).count();
        assert!((30..60).contains(&asked), "{asked}");
        assert_eq!(step(&mut bulk, 5001, ONE), Some(Step::Begin));
    }
}
