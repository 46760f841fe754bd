//! Working sets between the pager and the server: the order that comes, the reports that go.

use std::time::Duration;

use descriptor::FrameRange;
use descriptor::fetch::MAX_RANGES;

use crate::pager::Pager;
use crate::source::Source;

/// How often the server is told what is new: soon enough for siblings that start a little later.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// Runs in one report, so that it does not stand in the way of demand: some 16 KiB.
const MAX_REPORT: usize = 4 * MAX_RANGES;

/// What to do with working sets, where the server keeps them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum WorkingSetPolicy {
    /// Fetch first what siblings needed, and tell what the guest needs.
    #[default]
    Auto,
    /// The same, and the guest begins when what siblings needed is there, or after some time.
    Wait,
    /// Only tell what the guest needs.
    Record,
    /// Nothing.
    Off,
}

/// What was told and heard so far.
#[derive(Debug)]
pub(super) struct Reports {
    policy: WorkingSetPolicy,
    /// Sessions that there were.
    sessions: u32,
    /// An order came that is or will be followed, even if it is empty.
    followed: bool,
    /// What it says, as long as it is not known by which lane it is best fetched.
    order: Option<Vec<FrameRange>>,
    /// Nothing can be told any more.
    closed: bool,
    next: Duration,
    /// When there is something to tell; `None` when there is not.
    due: Option<Duration>,
}

impl Reports {
    pub(super) fn new(policy: WorkingSetPolicy) -> Self {
        let closed = policy == WorkingSetPolicy::Off;
        Self { policy, sessions: 0, followed: false, order: None, closed, next: Duration::ZERO, due: None }
    }

    /// A session begins; `ordered` when an order will come.
    pub(super) fn session(&mut self, ordered: bool, pager: &mut Pager) {
        self.sessions += 1;
        if !ordered {
            // Nothing to wait for.
            pager.follow(Vec::new());
        }
    }

    /// Follows what siblings needed. Only that of the first session: later ones tell of other probes, and of what is there already.
    pub(super) fn ordered(&mut self, order: Vec<FrameRange>) {
        if self.takes_orders() && !self.followed {
            self.followed = true;
            self.order = Some(order);
        }
    }

    /// Has the pager follow the order. Not while a multicast channel is looked for: siblings that begin together would each
    /// fetch all of it for themselves.
    pub(super) fn follow(&mut self, is_probing: bool, pager: &mut Pager) {
        if is_probing {
            return;
        }
        let Some(order) = self.order.take() else { return };
        let pages: u64 = order.iter().map(|range| range.count().get()).sum();
        tracing::info!(pages, runs = order.len(), "siblings needed these pages; fetching them first");
        pager.follow(order);
    }

    /// When [`Reports::report`] wants to be called.
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.due
    }

    /// Tells the server what is new, not too often.
    pub(super) fn report(&mut self, now: Duration, pager: &mut Pager, source: &mut Source) {
        // What is taken is lost where nobody listens. Before the order came it is not known whether it is followed.
        if self.closed || !source.listens() || (self.takes_orders() && !self.followed) {
            self.due = None;
            return;
        }
        if pager.has_touched() && now >= self.next {
            source.touched(&pager.take_touched(MAX_REPORT), false, !self.followed);
            self.next = now + REPORT_EVERY;
        }
        self.due = pager.has_touched().then_some(self.next);
    }

    fn takes_orders(&self) -> bool {
        matches!(self.policy, WorkingSetPolicy::Auto | WorkingSetPolicy::Wait)
    }

    /// Tells the server all that is left, and that this was all, where the pager knows it.
    pub(super) fn finish(&mut self, pager: &mut Pager, source: &mut Source) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        let last = self.sessions == 1 && pager.saw_every_need();
        source.touched(&pager.take_touched(usize::MAX), last, !self.followed);
        self.due = None;
    }
}
