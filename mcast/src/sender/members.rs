use std::collections::BTreeMap;
use std::time::Duration;

use super::bulk::Wants;
use super::member::{MemberState, Sent, Verdict};
use super::pace::Strain;
use crate::wire::Report;
use crate::{ChannelParameters, ChunkSet, Member};

/// The members of the channel.
///
/// In a group of up to [`Members::WINDOWED`] each member has a window: so many datagrams may be on their way to it, or in its
/// socket, that half of its buffer takes them. It opens with the member's reports, which come after every eighth of the
/// smallest buffer, and so the slowest sets the pace without a loss. In larger groups reports are too rare for that, and the
/// rate alone follows them.
#[derive(Debug)]
pub(super) struct Members {
    channel: ChannelParameters,
    states: BTreeMap<Member, MemberState>,
    /// Up to which datagram the windows allow to send, and who says so.
    limit: Option<(u64, Member)>,
    /// The limit held something back since the last sweep.
    held: bool,
    useful: usize,
    round_trip: Duration,
    swept: Duration,
    /// The median of the members' rates at its best, which fades.
    reference: f64,
    joined: Duration,
    /// When something was last sent, or somebody joined, and when that began after a rest.
    busy: Duration,
    woke: Option<Duration>,
    /// How many members report losses, and the sum of them.
    losses: (u32, f64),
    /// When the wants were found out, and what they were; out of date when something changed since.
    wants: (Duration, Option<Wants>),
    changed: bool,
}

/// One member, for people and metrics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemberStatus {
    /// The member.
    pub member: Member,
    /// When it joined.
    pub joined: Duration,
    /// The share of datagrams that it loses, 0 to 1; `None` before it reported enough.
    pub loss: Option<f64>,
    /// Bytes of datagrams that it receives a second.
    pub rate: u64,
    /// Its round trip; `None` before it is known.
    pub round_trip: Option<Duration>,
    /// Datagrams sent that it has not reported yet.
    pub lag: u64,
    /// Pages that it lacks and wants to be pushed.
    pub missing: u32,
    /// It received and reported something lately, so that the group waits for it.
    pub useful: bool,
}

/// Why a member was moved to unicast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpelReason {
    /// It held the group below the floor.
    TooSlow,
    /// It no longer reports, or receives nothing.
    Silent,
    /// Its reports cannot be true.
    Nonsense,
}

/// What became of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reported {
    Taken,
    Stale,
    Nonsense,
    Stranger,
    Leaving,
}

impl Members {
    /// Members of a group with windows. More would have to report less often than windows need.
    pub(super) const WINDOWED: usize = 64;

    /// The round trip of a group before any report.
    const ROUND_TRIP: Duration = Duration::from_millis(1);

    /// No timer in the protocol is finer.
    const MIN_ROUND_TRIP: Duration = Duration::from_micros(100);

    /// A back-off is four of them: beyond, unicast is better. Also what a liar can make of it where there are few others.
    pub(super) const MAX_ROUND_TRIP: Duration = Duration::from_millis(200);

    /// When nothing was sent for so long, members report
    const REST: Duration = Duration::from_secs(1);

    /// only so often: idle clones by the hundred should cost nothing.
    const RESTING_INTERVAL: Duration = Duration::from_millis(250);

    /// The group does not wait for a member that is silent, or deaf, for so long or four intervals of reports.
    pub(super) const PATIENCE: Duration = Duration::from_millis(250);

    /// One that is silent for so long, or ten intervals of reports, is expelled. At 30 % of losses ten reports in a row are
    /// lost once in 170,000 times.
    const SILENCE: Duration = Duration::from_secs(2);

    /// One that is deaf for so long is expelled: twenty heartbeats of an idle channel.
    const DEAFNESS: Duration = Duration::from_secs(5);

    /// Whoever holds the group below the floor for so long is expelled.
    const SLOW: Duration = Duration::from_secs(1);

    /// The floor is also this share of what the group has done,
    const SHARE: f64 = 0.05;

    /// which is forgotten by half in so many seconds.
    const HALF_LIFE: f64 = 10.0;

    /// Reports and NACKs that cannot be true, after which the member is expelled. Not at once: a bug is likelier than malice.
    const NONSENSE: u32 = 32;

    pub(super) fn new(now: Duration, channel: ChannelParameters) -> Self {
        Self {
            channel,
            states: BTreeMap::new(),
            limit: None,
            held: false,
            useful: 0,
            round_trip: Self::ROUND_TRIP,
            swept: now,
            reference: 0.0,
            joined: now,
            busy: now,
            woke: None,
            losses: (0, 0.0),
            wants: (now, None),
            changed: false,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.states.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.states.is_empty()
    }

    /// Adds a member that begins with these blocks. One that is there already begins again.
    pub(super) fn join(&mut self, member: Member, start: [u64; 2], sent: Sent) {
        self.wake(sent.now);
        self.states.insert(member, MemberState::new(start, sent));
        self.joined = sent.now;
        self.changed(sent.now);
    }

    /// True when it was there.
    pub(super) fn remove(&mut self, now: Duration, member: Member) -> bool {
        let there = self.states.remove(&member).is_some();
        self.changed(now);
        there
    }

    pub(super) fn get(&self, member: Member) -> Option<&MemberState> {
        self.states.get(&member)
    }

    pub(super) fn get_mut(&mut self, member: Member) -> Option<&mut MemberState> {
        self.states.get_mut(&member)
    }

    /// When the last member joined.
    pub(super) fn joined(&self) -> Duration {
        self.joined
    }

    /// The members that the group waits for.
    pub(super) fn useful(&self) -> usize {
        self.useful
    }

    /// The round trip of the group, that of its farthest members.
    pub(super) fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Up to which datagram the windows allow to send, and by how much what is urgent may exceed that.
    pub(super) fn limit(&self) -> Option<(u64, u64)> {
        let (limit, member) = self.limit?;
        self.states.get(&member).map(|state| (limit, state.window(self.channel.payload) / 4))
    }

    /// Notes that the windows held something back.
    pub(super) fn hold(&mut self) {
        self.held = true;
    }

    /// The bytes after which members should report.
    pub(super) fn report_bytes(&self) -> u32 {
        if self.states.len() > Self::WINDOWED {
            return 0;
        }
        let smallest = self.states.values().filter(|state| state.reported.is_some()).map(|state| state.buffer).min();
        // Beyond 1 MiB the reports are rare enough.
        smallest.unwrap_or(MemberState::BUFFER.0).min(8 << 20) / 8
    }

    /// How often members should report: a group as a whole no more than 5000 times a second.
    pub(super) fn report_interval(&self, now: Duration) -> Duration {
        let least = if self.is_resting(now) { Self::RESTING_INTERVAL } else { Duration::from_millis(10) };
        self.spread().max(least)
    }

    /// Notes that something is sent.
    pub(super) fn wake(&mut self, now: Duration) {
        if self.is_resting(now) {
            self.woke = (!self.states.is_empty()).then_some(now);
        }
        self.busy = now;
    }

    /// Takes in a report. `echoed` is the next datagram when the pulse that it echoes was sent, if that is still known.
    pub(super) fn report(&mut self, report: &Report<'_>, sent: Sent, echoed: Option<u64>) -> Reported {
        let Some(state) = self.states.get_mut(&report.member) else { return Reported::Stranger };
        if report.leaving {
            return Reported::Leaving;
        }
        match state.report(report, sent, echoed, &self.channel) {
            Verdict::Stale => return Reported::Stale,
            Verdict::Nonsense => return Reported::Nonsense,
            Verdict::Taken => {}
        }
        self.changed = true;
        if self.states.len() <= Self::WINDOWED {
            self.renew_limit(sent.now);
        }
        Reported::Taken
    }

    /// What the members lack, all together; in a large group as of some milliseconds ago.
    pub(super) fn wants(&mut self, now: Duration) -> Wants {
        let recent = self.states.len() > Self::WINDOWED && now < self.wants.0 + self.rest();
        match self.wants.1 {
            Some(wants) if !self.changed || recent => wants,
            _ => {
                let wants = self.find_wants(now);
                (self.wants, self.changed) = ((now, Some(wants)), false);
                wants
            }
        }
    }

    /// The chunks that some member may lack.
    pub(super) fn union_of_all(&self) -> ChunkSet {
        self.union_where(|_| true)
    }

    /// The chunks that a useful member lacks.
    pub(super) fn union(&self, now: Duration) -> ChunkSet {
        let patience = self.patience(now);
        self.union_where(|state| state.is_useful(now, patience))
    }

    /// Forgets what the members lack, since they are about to be asked.
    pub(super) fn forget_lacks(&mut self, now: Duration) {
        self.states.values_mut().for_each(|state| state.lacks = None);
        self.wants.1 = None;
        self.changed(now);
    }

    /// Notes that all who are there were sent to the end game, but for those who have yet to say what they lack.
    pub(super) fn tell(&mut self, now: Duration) {
        self.states.values_mut().for_each(|state| state.told = !state.is_awaited(now));
        self.wants.1 = None;
        self.changed(now);
    }

    /// True while somebody who joined a moment ago has not reported.
    pub(super) fn awaits_newcomers(&self, now: Duration) -> bool {
        let recent = |joined: Duration| now < joined + Self::PATIENCE;
        recent(self.joined) && self.states.values().any(|state| state.is_awaited(now))
    }

    /// The mean loss of those who report any, when they are at least `enough`; else none.
    pub(super) fn mean_loss(&self, enough: u32) -> f64 {
        let (count, sum) = self.losses;
        if count >= enough { sum / f64::from(count) } else { 0.0 }
    }

    /// What useful members lost since this was last asked.
    pub(super) fn strain(&mut self, now: Duration) -> Strain {
        /// Datagrams below which a loss is chance.
        const ENOUGH: u32 = 64;
        let patience = self.patience(now);
        let large = self.states.len() > Self::WINDOWED;
        let mut strain = Strain::default();
        for state in self.states.values_mut().filter(|state| state.is_useful(now, patience)) {
            let recent = std::mem::take(&mut state.recent);
            let total = recent.received.saturating_add(recent.lost);
            if total >= ENOUGH {
                strain.loss = strain.loss.max(f64::from(recent.lost) / f64::from(total));
            }
            strain.overflow |= large && recent.overflow > 0;
        }
        strain
    }

    /// True when it is time for [`Members::sweep`].
    pub(super) fn is_due(&self, now: Duration) -> bool {
        now >= self.swept + self.rest()
    }

    /// When [`Members::sweep`] is due next, for whoever has nothing else to do.
    pub(super) fn next_timeout(&self) -> Option<Duration> {
        (!self.states.is_empty()).then(|| self.swept + Duration::from_millis(100).max(self.rest()))
    }

    /// Finds out who has to go. `active` while bulk is sent; `rate` is the group's.
    pub(super) fn sweep(&mut self, now: Duration, floor: f64, rate: f64, active: bool) -> Vec<(Member, ExpelReason)> {
        let elapsed = now.saturating_sub(self.swept);
        self.swept = now;
        let (patience, interval) = (self.patience(now), self.believed_interval(now));
        let useful = || self.states.values().filter(|state| state.is_useful(now, patience));
        let (median, _) = median_and_most(useful().map(|state| state.rate));
        if let (median, Some(most)) =
            median_and_most(useful().filter_map(|state| state.round_trip).map(|trip| trip.as_secs_f64()))
        {
            // One that claims to be very far off does not slow down the others' repairs.
            let trip = Duration::from_secs_f64(most.min(median * 4.0 + 0.002));
            self.round_trip = trip.clamp(Self::MIN_ROUND_TRIP, Self::MAX_ROUND_TRIP);
        }
        self.reference = median.max(self.reference * 0.5_f64.powf(elapsed.as_secs_f64() / Self::HALF_LIFE));
        // A rate that is kept low on purpose is nobody's fault.
        let floor = floor.max(self.reference * Self::SHARE).min(rate / 2.0);
        let blocker = self.limit.filter(|_| std::mem::take(&mut self.held)).map(|(_, member)| member);
        let mut expelled = Vec::new();
        for (member, state) in &mut self.states {
            let since = |at: Option<Duration>| now.saturating_sub(at.unwrap_or(state.joined));
            let silent = state.reported.is_some() && since(state.reported) >= Self::SILENCE.max(interval * 10);
            let deaf = since(state.heard) >= Self::DEAFNESS.max(interval * 10);
            let holds = blocker == Some(*member) && state.rate < floor;
            let useless = active && state.rate < median * Self::SHARE && state.heard.is_some();
            state.slow = if holds || useless { state.slow + elapsed } else { Duration::ZERO };
            let reason = match state {
                _ if silent || deaf => ExpelReason::Silent,
                state if state.nonsense >= Self::NONSENSE => ExpelReason::Nonsense,
                state if state.slow >= Self::SLOW => ExpelReason::TooSlow,
                _ => continue,
            };
            expelled.push((*member, reason));
        }
        for (member, _) in &expelled {
            self.states.remove(member);
        }
        let losses = self.states.values().filter_map(|state| state.loss).filter(|loss| *loss >= 0.001);
        self.losses = losses.fold((0, 0.0), |(count, sum), loss| (count + 1, sum + loss));
        self.changed(now);
        expelled
    }

    /// The members as they are, `seq` being the next datagram.
    pub(super) fn statuses(&self, now: Duration, seq: u64) -> impl Iterator<Item = MemberStatus> {
        let patience = self.patience(now);
        self.states.iter().map(move |(member, state)| MemberStatus {
            member: *member,
            joined: state.joined,
            loss: state.loss,
            rate: state.rate as u64,
            round_trip: state.round_trip,
            lag: seq - state.acknowledged,
            missing: state.missing,
            useful: state.is_useful(now, patience),
        })
    }

    fn changed(&mut self, now: Duration) {
        self.changed = true;
        if self.states.len() <= Self::WINDOWED || self.is_due(now) || self.swept == now {
            self.renew_limit(now);
        }
    }

    fn is_resting(&self, now: Duration) -> bool {
        now >= self.busy + Self::REST
    }

    /// The time that the members' reports take when they are as frequent as they may be.
    fn spread(&self) -> Duration {
        Duration::from_micros(200) * self.states.len() as u32
    }

    /// The longest interval at which a member may believe it should report. Soon after a rest not all have heard of its end.
    fn believed_interval(&self, now: Duration) -> Duration {
        let resting = self.is_resting(now) || self.woke.is_some_and(|woke| now < woke + Self::REST);
        self.spread().max(if resting { Self::RESTING_INTERVAL } else { Duration::from_millis(10) })
    }

    fn patience(&self, now: Duration) -> Duration {
        Self::PATIENCE.max(self.believed_interval(now) * 4)
    }

    /// The time between two looks at all members. In a large group each takes some hundred microseconds.
    fn rest(&self) -> Duration {
        Duration::from_millis(10).max(self.spread() / 10)
    }

    fn renew_limit(&mut self, now: Duration) {
        let (patience, payload) = (self.patience(now), self.channel.payload);
        let useful = || self.states.iter().filter(|(_, state)| state.is_useful(now, patience));
        self.useful = useful().count();
        let windowed = self.states.len() <= Self::WINDOWED;
        let limits = useful().filter(|_| windowed);
        self.limit = limits.map(|(member, state)| (state.acknowledged + state.window(payload), *member)).min();
    }

    fn find_wants(&self, now: Duration) -> Wants {
        let mut wants = Wants { joined: self.joined, ..Wants::default() };
        let patience = self.patience(now);
        for state in self.states.values() {
            match &state.lacks {
                _ if !state.is_useful(now, patience) => {
                    wants.silent += usize::from(state.is_awaited(now));
                }
                None => {
                    wants.unknown += 1;
                    wants.wanting += usize::from(state.missing > 0 && !state.told);
                }
                Some(lacks) if !lacks.is_empty() => {
                    wants.lacking += 1;
                    wants.newest = wants.newest.max(state.joined);
                    wants.pages += u64::from(state.missing);
                    wants.fresh += usize::from(!state.told);
                }
                Some(_) => {}
            }
        }
        wants
    }

    fn union_where(&self, of: impl Fn(&MemberState) -> bool) -> ChunkSet {
        let mut union = ChunkSet::new(self.channel.chunks());
        let lacks = self.states.values().filter(|state| of(state)).filter_map(|state| state.lacks.as_ref());
        lacks.for_each(|lacks| union.unite(lacks));
        union
    }
}

fn median_and_most(values: impl Iterator<Item = f64>) -> (f64, Option<f64>) {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    (values.get(values.len() / 2).copied().unwrap_or_default(), values.last().copied())
}
