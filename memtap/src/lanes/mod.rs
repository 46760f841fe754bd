//! Which lane serves what: the stream to the page server, or the multicast channel that several clones share. Pure: no I/O,
//! no clock, no page bytes.
//!
//! ```text
//!            offer            first datagram           silence
//!   none ──────────▶ probing ───────────────▶ live ◀───────────▶ silent
//!     ▲                 │ nothing came          ▲
//!     │                 ▼                       │ something came after all
//!     └── gone ───── blocked ───────────────────┘
//! ```
//!
//! Only a live channel is asked for anything; whatever it is asked for has a deadline, after which the stream is asked for
//! what is missing. A request is told of once: either it [came](Step::Came), or it is to be [asked](Step::Ask) for elsewhere.
//!
//! As long as the channel is probed or live, and pushes, the pager is told to leave the background to it.

mod patience;
mod tracked;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

use descriptor::FrameRange;
use descriptor::fetch::{Class, Delivery, MAX_RANGES, Tag};
use serde::Serialize;

use patience::Patience;
use tracked::Tracked;

/// How long to wait for the channel's first datagram. An idle sender is heard of every quarter of a second, and a switch
/// needs some milliseconds to learn who is in a group.
pub const PROBE: Duration = Duration::from_secs(1);

/// How long a push may bring nothing before the stream is asked for the background: several times what a sender needs to
/// notice and expel a receiver that holds the others up.
pub const STALL: Duration = Duration::from_secs(2);

/// Requests in a row that the channel did not answer in time before it is given a rest: enough that chance losses of one
/// datagram in ten hardly ever add up to it, few enough that a guest loses less than half a second.
const MAX_FAILURES: u32 = 8;

/// How long the channel's first rest is, and its longest; each is twice the one before.
const REST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(32));

/// The lanes of one clone.
#[derive(Debug)]
pub struct Lanes {
    link: Link,
    /// Until when it is no wonder that nothing has come yet.
    probe_until: Duration,
    tracked: Tracked,
    patience: Patience,
    /// Clones in the channel; 0 as long as that is not known.
    members: u32,
    /// The background is to be fetched as fast as possible.
    hydrates: bool,
    /// The sender leaves what is missing to the stream.
    endgame: bool,
    /// When pages came last, or could have for the first time.
    fed: Duration,
    stalled: bool,
    /// What the pager was told.
    pushed: bool,
    failures: u32,
    /// Until when the channel is asked for nothing, and the length of its next rest.
    resting: Option<Duration>,
    rest: Duration,
    notices: VecDeque<Notice>,
    came: VecDeque<Tag>,
    stats: LaneStats,
}

/// How things are with the channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Link {
    /// There is none.
    #[default]
    None,
    /// Nothing has come yet.
    Probing,
    /// Nothing has ever come.
    Blocked,
    /// It serves.
    Live,
    /// Nothing comes any more.
    Silent,
}

/// What to do, from [`Lanes::poll`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Tell the pager that all pages of a request [came](crate::pager::Pager::came).
    Came(Tag),
    /// Ask the stream for these pages of a request, and tell the pager of [it](crate::pager::Pager::redirected).
    Ask {
        /// The request.
        tag: Tag,
        /// Whether someone waits.
        class: Class,
        /// What is missing of it; not empty, at most [`MAX_RANGES`].
        ranges: Vec<FrameRange>,
    },
    /// Tell the pager whether the background is [pushed](crate::pager::Input::Pushed).
    Pushed(bool),
    /// Tell people.
    Say(Notice),
}

/// What people want to know. Each is said once for each time that it becomes so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The channel serves.
    Live,
    /// Nothing came from it for [`PROBE`].
    Blocked,
    /// Nothing comes from it any more.
    Silent,
    /// It serves again.
    Back,
    /// It pushes nothing, though it should.
    Stalled,
    /// It does not answer in time, and is asked for nothing for so long.
    Resting(Duration),
}

/// What was done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LaneStats {
    /// Requests that went to the channel.
    pub requests: u64,
    /// Of these, requests whose pages all came from it, or were needed no more.
    pub answered: u64,
    /// Of these, requests that the stream was asked for in the end, wholly or in part.
    pub fallbacks: u64,
}

impl Lanes {
    /// The lanes of a clone without a session. `hydrates`: the background is to be fetched as fast as possible.
    pub fn new(hydrates: bool) -> Self {
        Self {
            link: Link::None,
            probe_until: Duration::ZERO,
            tracked: Tracked::default(),
            patience: Patience::default(),
            members: 0,
            hydrates,
            endgame: false,
            fed: Duration::ZERO,
            stalled: false,
            pushed: false,
            failures: 0,
            resting: None,
            rest: REST.0,
            notices: VecDeque::new(),
            came: VecDeque::new(),
            stats: LaneStats::default(),
        }
    }

    /// Notes that a session begins in which a channel is promised or offered. What an earlier one had under way is forgotten,
    /// as the pager forgets it.
    pub fn offered(&mut self, now: Duration) {
        self.down();
        (self.link, self.probe_until) = (Link::Probing, now + PROBE);
    }

    /// Notes that the session has ended, and the channel with it. The pager asks anew for what was under way.
    pub fn down(&mut self) {
        let (hydrates, pushed, notices, stats) =
            (self.hydrates, self.pushed, std::mem::take(&mut self.notices), self.stats);
        *self = Self { pushed, notices, stats, ..Self::new(hydrates) };
    }

    /// Notes that the channel cannot be used any more, while the session goes on: what is under way is asked of the stream.
    pub fn gone(&mut self, now: Duration) {
        self.link = Link::None;
        self.tracked.hurry(now);
    }

    /// Notes that a datagram came, the first or after silence.
    pub fn live(&mut self, now: Duration) {
        match self.link {
            Link::None | Link::Live => return,
            Link::Probing | Link::Blocked => self.notices.push_back(Notice::Live),
            Link::Silent => self.notices.push_back(Notice::Back),
        }
        self.link = Link::Live;
        (self.fed, self.stalled) = (now, false);
    }

    /// Notes that nothing comes any more: what is under way is asked of the stream at once.
    pub fn silent(&mut self, now: Duration) {
        if self.link == Link::Live {
            self.link = Link::Silent;
            self.notices.push_back(Notice::Silent);
            self.tracked.hurry(now);
        }
    }

    /// Notes how many clones share the channel. A single one is served better by the stream.
    pub fn set_members(&mut self, members: u32) {
        self.members = members;
    }

    /// Notes whether the sender leaves what is missing to the stream, as only few lack a little.
    pub fn set_endgame(&mut self, now: Duration, endgame: bool) {
        if self.endgame && !endgame {
            self.fed = now;
        }
        self.endgame = endgame;
    }

    /// Fetches the background as fast as possible from now on, or does not; true when that changes something.
    pub fn set_hydrates(&mut self, now: Duration, hydrates: bool) -> bool {
        if hydrates && !self.hydrates {
            self.fed = now;
        }
        std::mem::replace(&mut self.hydrates, hydrates) != hydrates
    }

    /// Which way to ask for `ranges`. What goes to the channel is looked after from now on.
    pub fn route(&mut self, now: Duration, tag: Tag, class: Class, ranges: &[FrameRange]) -> Delivery {
        self.resting = self.resting.filter(|until| now < *until);
        let shared = self.link == Link::Live && self.members != 1 && self.resting.is_none();
        if !shared || (class == Class::Bulk && self.endgame) || self.tracked.is_full() {
            return Delivery::Unicast;
        }
        self.stats.requests += 1;
        self.tracked.add(now, tag, class, ranges, now + self.patience.of(class));
        Delivery::Multicast
    }

    /// Notes that pages came from the channel.
    pub fn arrived(&mut self, now: Duration, frames: FrameRange) {
        (self.fed, self.stalled) = (now, false);
        for done in self.tracked.arrived(frames) {
            self.came.push_back(done.tag);
            self.stats.answered += 1;
            (self.failures, self.rest) = (0, REST.0);
            if done.class == Class::Demand {
                self.patience.sample(now.saturating_sub(done.asked_at));
            }
        }
    }

    /// What to do next; `None` when there is nothing to do until something is noted or [`Lanes::next_timeout`] has passed.
    ///
    /// `drained`: all that has come was noted, so that what is late is late. `owed` tells which frames of a request are
    /// missing, whichever way they were to come.
    pub fn poll(&mut self, now: Duration, drained: bool, owed: impl Fn(Tag) -> Vec<FrameRange>) -> Option<Step> {
        self.advance(now);
        if self.pushed != self.is_pushed() {
            self.pushed = !self.pushed;
            return Some(Step::Pushed(self.pushed));
        }
        if let Some(tag) = self.came.pop_front() {
            return Some(Step::Came(tag));
        }
        if let Some(late) = self.tracked.next_late(now, drained) {
            let mut ranges = owed(late.tag);
            if ranges.is_empty() {
                self.stats.answered += 1;
                return Some(Step::Came(late.tag));
            }
            self.failed(now);
            // What does not fit is missing when the answer has come, and asked for then.
            ranges.truncate(MAX_RANGES);
            return Some(Step::Ask { tag: late.tag, class: late.class, ranges });
        }
        self.notices.pop_front().map(Step::Say)
    }

    /// When [`Lanes::poll`] must be called next, should nothing be noted before.
    pub fn next_timeout(&self) -> Option<Duration> {
        let probe = (self.link == Link::Probing).then_some(self.probe_until);
        let stall = (self.link == Link::Live && self.is_pushed()).then_some(self.fed + STALL);
        [probe, stall, self.tracked.next_deadline()].into_iter().flatten().min()
    }

    /// True when the background is to be fetched as fast as possible.
    pub fn hydrates(&self) -> bool {
        self.hydrates
    }

    /// How things are with the channel.
    pub fn link(&self) -> Link {
        self.link
    }

    /// Clones in the channel; 0 where that is not known.
    pub fn members(&self) -> u32 {
        self.members
    }

    /// What was done so far.
    pub fn stats(&self) -> &LaneStats {
        &self.stats
    }

    fn advance(&mut self, now: Duration) {
        match self.link {
            Link::Probing if self.probe_until <= now => {
                self.link = Link::Blocked;
                self.notices.push_back(Notice::Blocked);
            }
            Link::Live if self.is_pushed() && now >= self.fed + STALL => {
                self.stalled = true;
                self.notices.push_back(Notice::Stalled);
            }
            _ => {}
        }
    }

    fn is_pushed(&self) -> bool {
        let pushes = match self.link {
            Link::Probing => true,
            Link::Live => !self.endgame && !self.stalled,
            Link::None | Link::Blocked | Link::Silent => false,
        };
        self.hydrates && pushes
    }

    /// A request was not answered in time.
    fn failed(&mut self, now: Duration) {
        self.stats.fallbacks += 1;
        if self.link != Link::Live {
            return;
        }
        self.patience.lost();
        self.failures += 1;
        if self.failures >= MAX_FAILURES {
            self.notices.push_back(Notice::Resting(self.rest));
            (self.failures, self.resting) = (0, Some(now + self.rest));
            self.rest = (self.rest * 2).min(REST.1);
        }
    }
}
