//! What was told of sessions and is not merged yet. Rings leave it, the keeper takes it; it is bounded, whatever clones say.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use descriptor::FrameRange;
use descriptor::working_set::Order;
use parking_lot::{Condvar, Mutex};

use super::ImageSet;

/// Ranges that may wait, 1 MiB of them. What clones of good will report in a second is far less, so more is a flood and is dropped.
const MAX_RANGES: usize = 1 << 16;

/// Sessions that came and went without the keeper having heard of them: those beyond are forgotten. Sessions that go on need no
/// bound, as the server has one for them.
const MAX_ENDED: usize = 1 << 10;

#[derive(Debug, Default)]
pub(super) struct Inbox {
    waiting: Mutex<Waiting>,
    news: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    sessions: BTreeMap<u64, Told>,
    /// The same in the order in which they came.
    turns: VecDeque<u64>,
    replaced: Vec<Arc<ImageSet>>,
    ranges: usize,
    ended: usize,
    flooded: bool,
    stopped: bool,
}

/// All that is new of a session.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// It began.
    pub(super) joined: Option<Joined>,
    /// What its clone needed, in the order of first need.
    pub(super) ranges: Vec<FrameRange>,
    /// That was all.
    pub(super) last: bool,
    /// It fetched nothing ahead.
    pub(super) declined: bool,
    /// Some of what it told was dropped.
    pub(super) cut: bool,
    /// It is over.
    pub(super) left: bool,
}

/// The beginning of a session: the order that its clone was told, and the seed of its probes.
#[derive(Debug)]
pub(super) struct Joined {
    pub(super) set: Arc<ImageSet>,
    pub(super) order: Arc<Order>,
    pub(super) seed: u64,
}

/// What the keeper takes at once.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) sessions: Vec<(u64, Told)>,
    /// Sets that were replaced.
    pub(super) replaced: Vec<Arc<ImageSet>>,
    /// Sessions that have to wait for the next round.
    pub(super) left: usize,
    /// The server ends.
    pub(super) stopped: bool,
}

impl Inbox {
    pub(super) fn joined(&self, session: u64, joined: Joined) {
        self.waiting.lock().of(session).joined = Some(joined);
        self.news.notify_one();
    }

    pub(super) fn touched(&self, session: u64, ranges: &[FrameRange], last: bool, declined: bool) {
        let mut waiting = self.waiting.lock();
        let fits = waiting.ranges + ranges.len() <= MAX_RANGES;
        if fits {
            waiting.ranges += ranges.len();
        } else if !std::mem::replace(&mut waiting.flooded, true) {
            tracing::warn!("clones tell more of what they need than can be noted; some of it is dropped");
        }
        let told = waiting.of(session);
        told.last |= last;
        told.declined |= declined;
        told.cut |= !fits;
        if fits {
            told.ranges.extend_from_slice(ranges);
        }
        self.news.notify_one();
    }

    pub(super) fn left(&self, session: u64) {
        let mut waiting = self.waiting.lock();
        let ended = waiting.ended;
        let told = waiting.of(session);
        told.left = true;
        if told.joined.is_some() {
            let is_silent = told.ranges.is_empty() && !told.last;
            if is_silent || ended >= MAX_ENDED {
                waiting.forget(session);
            } else {
                waiting.ended += 1;
            }
        }
        self.news.notify_one();
    }

    pub(super) fn replaced(&self, set: Arc<ImageSet>) {
        let mut waiting = self.waiting.lock();
        if !waiting.replaced.iter().any(|other| Arc::ptr_eq(other, &set)) {
            waiting.replaced.push(set);
        }
        self.news.notify_one();
    }

    pub(super) fn stop(&self) {
        self.waiting.lock().stopped = true;
        self.news.notify_one();
    }

    /// Takes what is new of at most `limit` sessions; waits for it, `patience` at most where there is one.
    pub(super) fn take(&self, limit: usize, patience: Option<Duration>) -> Round {
        let deadline = patience.map(|patience| Instant::now() + patience);
        let mut waiting = self.waiting.lock();
        while waiting.sessions.is_empty() && waiting.replaced.is_empty() && !waiting.stopped {
            match deadline {
                None => self.news.wait(&mut waiting),
                Some(deadline) if self.news.wait_until(&mut waiting, deadline).timed_out() => break,
                Some(_) => {}
            }
        }
        let turns = limit.min(waiting.turns.len());
        let turns: Vec<u64> = waiting.turns.drain(..turns).collect();
        let sessions = turns.into_iter().filter_map(|session| Some((session, waiting.remove(session)?))).collect();
        Round {
            sessions,
            replaced: std::mem::take(&mut waiting.replaced),
            left: waiting.turns.len(),
            stopped: waiting.stopped,
        }
    }
}

impl Waiting {
    fn of(&mut self, session: u64) -> &mut Told {
        self.sessions.entry(session).or_insert_with(|| {
            self.turns.push_back(session);
            Told::default()
        })
    }

    /// Takes a session out whose turn has come.
    fn remove(&mut self, session: u64) -> Option<Told> {
        let told = self.sessions.remove(&session)?;
        self.ranges -= told.ranges.len();
        self.ended -= usize::from(told.left && told.joined.is_some());
        Some(told)
    }

    /// Drops a session that was not counted as ended.
    fn forget(&mut self, session: u64) {
        self.turns.retain(|other| *other != session);
        if let Some(told) = self.sessions.remove(&session) {
            self.ranges -= told.ranges.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use descriptor::{Gfn, ImageId, PageCount};

    use super::*;

    const AT_ONCE: Option<Duration> = Some(Duration::ZERO);

    fn joined() -> Joined {
        let frames = PageCount::new(1000);
        let set = Arc::new(ImageSet::new(ImageId::from_bytes([7; 16]), frames));
        Joined { order: set.order(), set, seed: 1 }
    }

    fn ranges(count: u64) -> Vec<FrameRange> {
        (0..count).map(|n| FrameRange::new(Gfn::new(n), PageCount::ONE)).collect()
    }

    #[test]
    fn what_a_session_tells_is_gathered_in_its_order() {
        let inbox = Inbox::default();
        inbox.joined(1, joined());
        for range in ranges(1000) {
            inbox.touched(1, &[range], false, false);
        }
        inbox.touched(1, &[], true, true);
        let round = inbox.take(9, AT_ONCE);
        let [(1, told)] = &round.sessions[..] else { panic!("{round:?}") };
        assert_eq!(told.ranges, ranges(1000));
        assert!(told.joined.is_some() && told.last && told.declined && !told.cut && !told.left);
        inbox.left(1);
        let round = inbox.take(9, AT_ONCE);
        let [(1, told)] = &round.sessions[..] else { panic!("{round:?}") };
        assert!(told.joined.is_none() && told.left && told.ranges.is_empty());
        assert!(inbox.take(9, AT_ONCE).sessions.is_empty());
    }

    #[test]
    fn a_flood_is_dropped_and_nobody_it_concerns_is_whole() {
        let inbox = Inbox::default();
        let message = ranges(256);
        for session in [1, 2] {
            inbox.joined(session, joined());
        }
        for _ in 0..300 {
            inbox.touched(1, &message, false, false);
        }
        inbox.touched(2, &message, true, false);
        let round = inbox.take(9, AT_ONCE);
        let [(_, first), (_, second)] = &round.sessions[..] else { panic!("{}", round.sessions.len()) };
        assert_eq!((first.ranges.len(), first.cut), (MAX_RANGES, true));
        assert_eq!((second.ranges.len(), second.cut, second.last), (0, true, true));
        inbox.touched(2, &message, true, false);
        let round = inbox.take(9, AT_ONCE);
        assert!(!round.sessions[0].1.cut && round.sessions[0].1.ranges.len() == 256, "there is room again");
    }

    #[test]
    fn sessions_that_come_and_go_leave_little() {
        let inbox = Inbox::default();
        for session in 0..5000 {
            inbox.joined(session, joined());
            if session % 2 == 0 {
                inbox.touched(session, &ranges(1), true, false);
            }
            inbox.left(session);
        }
        assert_eq!(inbox.waiting.lock().sessions.len(), MAX_ENDED);
        assert_eq!(inbox.waiting.lock().turns.len(), MAX_ENDED);
        assert_eq!(inbox.waiting.lock().ranges, MAX_ENDED);
        // Rounds are bounded too, and in turn.
        let round = inbox.take(10, AT_ONCE);
        assert_eq!((round.sessions.len(), round.sessions[9].0, round.left), (10, 18, MAX_ENDED - 10));
        while !inbox.take(100, AT_ONCE).sessions.is_empty() {}
        let waiting = inbox.waiting.lock();
        assert_eq!((waiting.ranges, waiting.ended, waiting.turns.len()), (0, 0, 0));
    }

    #[test]
    fn who_waits_is_woken() {
        let inbox = Arc::new(Inbox::default());
        let taker = std::thread::spawn({
            let inbox = Arc::clone(&inbox);
            move || inbox.take(1, None)
        });
        std::thread::sleep(Duration::from_millis(20));
        inbox.stop();
        assert!(taker.join().unwrap().stopped);
    }
}
