use std::collections::BTreeMap;
use std::time::Duration;

use super::bulk::Wants;
use super::pace::Strain;
use crate::wire::{HEAD, Report};
use crate::{ChannelParameters, ChunkSet, Member, Serial};

/// The members of the channel and what they report.
///
/// In a group of up to [`Members::WINDOWED`] each member has a window: so many datagrams may be on their way to it, or in its
/// socket, that half of its buffer takes them. It opens with the member's reports, which come after every eighth of the
/// smallest buffer, and so the slowest sets the pace without a loss. In larger groups reports are too rare for that, and the
/// rate alone follows them.
#[derive(Debug)]
pub(super) struct Members {
    channel: ChannelParameters,
    states: BTreeMap<Member, State>,
    /// Up to which datagram the windows allow to send, and who says so.
    limit: Option<(u64, Member)>,
    /// The limit held something back since the last sweep.
    blocked: bool,
    round_trip: Duration,
    /// The longest since `decayed`.
    peak: Duration,
    decayed: Duration,
    swept: Duration,
    /// The median of the members' rates at its best, which fades.
    reference: f64,
    joined: Duration,
    /// How many members report losses, and the sum of them, as of the last sweep.
    losses: (u32, f64),
    wants: Option<Wants>,
}

#[derive(Debug)]
pub(super) struct State {
    joined: Duration,
    /// The first datagram and blocks that concern it.
    start: (u64, [u64; 2]),
    /// All datagrams before were received or lost.
    acknowledged: u64,
    reported: Option<Duration>,
    received: u32,
    lost: u32,
    overflow: u32,
    /// Since the last adaptation of the rate.
    recent: Counts,
    /// Since the last sample of loss and rate.
    sample: Counts,
    sampled: Duration,
    loss: Option<f64>,
    /// Bytes a second.
    rate: f64,
    round_trip: Option<Duration>,
    buffer: u32,
    /// The share of the buffer's half that the window is; shrinks when the socket overflows.
    share: f64,
    lacks: Option<ChunkSet>,
    missing: u32,
    /// It was sent to the end game.
    told: bool,
    credit: Credit,
    /// How long it has held up the group.
    slow: Duration,
    nonsense: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    received: u32,
    lost: u32,
    overflow: u32,
}

/// What a member may still ask for, by NACKs.
#[derive(Debug)]
struct Credit {
    entries: f64,
    shards: f64,
    /// Blocks and datagrams sent, and the time, when it was last added to.
    blocks: u64,
    seq: u64,
    at: Duration,
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
    /// It reported lately, so that the group waits for it.
    pub useful: bool,
}

/// Why a member was moved to unicast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpelReason {
    /// It held the group below the floor.
    TooSlow,
    /// It no longer reports, or never did.
    Silent,
    /// Its reports can not be true.
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

/// What a report is judged by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sending {
    /// The next datagram.
    pub(super) seq: u64,
    /// The next datagram when the pulse that the report echoes was sent, if that is still known.
    pub(super) echoed: Option<u64>,
}

impl Members {
    /// Members of a group with windows. More would have to report less often than windows need.
    pub(super) const WINDOWED: usize = 64;

    /// The round trip of a group before any report.
    const ROUND_TRIP: Duration = Duration::from_millis(1);
    /// No timer in the protocol is finer.
    const MIN_ROUND_TRIP: Duration = Duration::from_micros(100);
    /// A back-off is four of them: beyond, unicast is better. Also what a liar can make of it.
    const MAX_ROUND_TRIP: Duration = Duration::from_millis(200);

    /// The group does not wait for a member that is silent for so long, or four intervals of reports.
    const PATIENCE: Duration = Duration::from_millis(250);
    /// One that is silent for so long, or ten intervals of reports, is expelled. At 30 % of losses ten reports in a row are
    /// lost once in 170,000 times.
    const SILENCE: Duration = Duration::from_secs(2);
    /// One that never reported has so long: it may have to find out first that it can receive.
    const PROBE: Duration = Duration::from_secs(5);
    /// Whoever holds the group below the floor for so long is expelled.
    const SLOW: Duration = Duration::from_secs(1);
    /// The floor is also this share of what the group has done.
    const SHARE: f64 = 0.05;

    /// Reports that can not be true, after which the member is expelled. Not at once: a bug is likelier than malice.
    const NONSENSE: u32 = 32;

    /// Bytes that are assumed for a buffer at least, and at most: what Linux gives without asking, and more than helps.
    const BUFFER: (u32, u32) = (64 << 10, 64 << 20);

    /// NACK entries at once, and more with every block and second. A block is asked for up to six times.
    const ENTRIES: (f64, f64, f64) = (2048.0, 8.0, 200.0);
    /// Shards asked for at once, and more with every datagram: what a member with 40 % of losses needs. Repairs that one
    /// member asks for never take more than as much again as the data.
    const SHARDS: (f64, f64) = (4096.0, 0.75);

    pub(super) fn new(now: Duration, channel: ChannelParameters) -> Self {
        Self {
            channel,
            states: BTreeMap::new(),
            limit: None,
            blocked: false,
            round_trip: Self::ROUND_TRIP,
            peak: Duration::ZERO,
            decayed: now,
            swept: now,
            reference: 0.0,
            joined: now,
            losses: (0, 0.0),
            wants: None,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.states.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.states.is_empty()
    }

    /// Adds a member that begins with datagram `seq` and these blocks. One that is there already begins again.
    pub(super) fn join(&mut self, now: Duration, member: Member, seq: u64, blocks: [u64; 2], sent: u64) {
        let (entries, shards) = (Self::ENTRIES.0, Self::SHARDS.0);
        let state = State {
            joined: now,
            start: (seq, blocks),
            acknowledged: seq,
            reported: None,
            received: 0,
            lost: 0,
            overflow: 0,
            recent: Counts::default(),
            sample: Counts::default(),
            sampled: now,
            loss: None,
            rate: 0.0,
            round_trip: None,
            buffer: Self::BUFFER.0,
            share: 1.0,
            lacks: None,
            missing: 0,
            told: false,
            credit: Credit { entries, shards, blocks: sent, seq, at: now },
            slow: Duration::ZERO,
            nonsense: 0,
        };
        self.states.insert(member, state);
        self.joined = now;
        self.changed();
    }

    /// True when it was there.
    pub(super) fn remove(&mut self, member: Member) -> bool {
        let there = self.states.remove(&member).is_some();
        self.changed();
        there
    }

    pub(super) fn contains(&self, member: Member) -> bool {
        self.states.contains_key(&member)
    }

    /// The first blocks that concern `member`.
    pub(super) fn start(&self, member: Member) -> Option<[u64; 2]> {
        self.states.get(&member).map(|state| state.start.1)
    }

    /// The round trip of the group: the longest of its members, which fades once it is shorter.
    pub(super) fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Up to which datagram the windows allow to send, and by how much what is urgent may exceed that.
    pub(super) fn limit(&self) -> Option<(u64, u64)> {
        let (limit, member) = self.limit?;
        self.states.get(&member).map(|state| (limit, self.window(state) / 2))
    }

    /// Notes that the windows held something back.
    pub(super) fn held(&mut self) {
        self.blocked = true;
    }

    /// The bytes after which members should report.
    pub(super) fn report_bytes(&self) -> u32 {
        if self.states.len() > Self::WINDOWED {
            return 0;
        }
        let smallest = self.states.values().filter(|state| state.reported.is_some()).map(|state| state.buffer).min();
        // Beyond 1 MiB the reports are rare enough.
        smallest.unwrap_or(Self::BUFFER.0).min(8 << 20) / 8
    }

    /// How often members should report: a group as a whole no more than 5000 times a second.
    pub(super) fn report_interval(&self) -> Duration {
        (Duration::from_micros(200) * self.states.len() as u32).max(Duration::from_millis(10))
    }

    /// What became of a report, and whether the member now says what it lacks.
    pub(super) fn report(&mut self, now: Duration, report: &Report<'_>, sending: Sending) -> Reported {
        let Some(state) = self.states.get_mut(&report.member) else { return Reported::Stranger };
        if report.leaving {
            return Reported::Leaving;
        }
        let next = report.next_seq.extend(state.acknowledged);
        let received = Serial::new(report.received).since(Serial::new(state.received));
        let lost = Serial::new(report.lost).since(Serial::new(state.lost));
        let overflow = Serial::new(report.overflow).since(Serial::new(state.overflow));
        let echo = (!report.echo.is_zero()).then_some(report.echo);
        if state.reported.is_some() && (received < 0 || next < state.acknowledged && received <= 0) {
            return Reported::Stale;
        }
        // Reordered datagrams are taken for lost at first, so that the losses may go down a little.
        let counted = i64::from(received) + i64::from(lost.max(0));
        let possible = (sending.seq - state.start.0) as i64 + Self::SLACK;
        if next > sending.seq
            || counted > possible
            || i64::from(report.received) > possible
            || overflow < 0
            || echo.is_some_and(|echo| echo > now)
        {
            state.nonsense += 1;
            return Reported::Nonsense;
        }
        (state.received, state.lost, state.overflow) = (report.received, report.lost, report.overflow);
        let (received, lost, overflow) = (received.max(0) as u32, lost.max(0) as u32, overflow as u32);
        state.recent.add(received, lost, overflow);
        state.sample.add(received, lost, overflow);
        state.reported = Some(now);
        state.acknowledged = state.acknowledged.max(next).max(sending.echoed.unwrap_or(0)).min(sending.seq);
        state.buffer = report.buffer.clamp(Self::BUFFER.0, Self::BUFFER.1);
        state.share = match overflow {
            0 => (state.share * 1.02).min(1.0),
            _ => (state.share * 0.7).max(0.1),
        };
        state.measure(now, self.channel.payload);
        if let Some(echo) = echo {
            let sample = now.saturating_sub(echo).saturating_sub(report.held).min(Self::MAX_ROUND_TRIP);
            let smoothed = state.round_trip.map_or(sample, |smoothed| (smoothed * 7 + sample) / 8);
            state.round_trip = Some(smoothed);
            self.peak = self.peak.max(smoothed);
            self.round_trip = self.round_trip.max(smoothed);
        }
        state.missing = report.missing;
        if let Some(lacks) = &report.lacks {
            state.lacks = Some(lacks.set(self.channel.chunks()));
        }
        if report.missing == 0 {
            state.lacks = Some(ChunkSet::new(self.channel.chunks()));
        }
        self.wants = None;
        if self.states.len() <= Self::WINDOWED {
            self.renew_limit(now);
        }
        Reported::Taken
    }

    /// Datagrams by which a member's counters may be off: duplicates, and the first ones it took before it counted.
    const SLACK: i64 = 4096;

    /// How much `member` may still ask for: entries, then shards; adds to that what was sent meanwhile.
    pub(super) fn credit(&mut self, now: Duration, member: Member, blocks: u64, seq: u64) -> Option<(u32, u8)> {
        let credit = &mut self.states.get_mut(&member)?.credit;
        let seconds = now.saturating_sub(credit.at).as_secs_f64();
        let entries = (blocks - credit.blocks) as f64 * Self::ENTRIES.1 + seconds * Self::ENTRIES.2;
        credit.entries = (credit.entries + entries).min(Self::ENTRIES.0);
        credit.shards = (credit.shards + (seq - credit.seq) as f64 * Self::SHARDS.1).min(Self::SHARDS.0);
        (credit.blocks, credit.seq, credit.at) = (blocks, seq, now.max(credit.at));
        Some((credit.entries as u32, credit.shards.min(255.0) as u8))
    }

    /// Takes one entry, and so many shards, from what `member` may ask for.
    pub(super) fn charge(&mut self, member: Member, shards: u8) {
        if let Some(state) = self.states.get_mut(&member) {
            state.credit.entries -= 1.0;
            state.credit.shards -= f64::from(shards);
        }
    }

    pub(super) fn nonsense(&mut self, member: Member) {
        if let Some(state) = self.states.get_mut(&member) {
            state.nonsense += 1;
        }
    }

    /// What the members lack, all together.
    pub(super) fn wants(&mut self, now: Duration) -> Wants {
        if let Some(wants) = self.wants {
            return wants;
        }
        let mut wants = Wants { joined: self.joined, ..Wants::default() };
        let patience = self.patience();
        for state in self.states.values() {
            match &state.lacks {
                _ if state.reported.is_none() => wants.silent += usize::from(now < state.joined + Self::PATIENCE),
                _ if !state.is_useful(now, patience) => {}
                None => {
                    wants.unknown += 1;
                    wants.wanting += usize::from(state.missing > 0 && !state.told);
                }
                Some(lacks) if !lacks.is_empty() => {
                    wants.lacking += 1;
                    wants.pages += u64::from(state.missing);
                    wants.fresh += usize::from(!state.told);
                }
                Some(_) => {}
            }
        }
        self.wants = Some(wants);
        wants
    }

    /// When the last member joined.
    pub(super) fn joined(&self) -> Duration {
        self.joined
    }

    /// The chunks that some member may lack.
    pub(super) fn union_of_all(&self) -> ChunkSet {
        let mut union = ChunkSet::new(self.channel.chunks());
        self.states.values().filter_map(|state| state.lacks.as_ref()).for_each(|lacks| union.unite(lacks));
        union
    }

    /// The chunks that a useful member lacks.
    pub(super) fn union(&self, now: Duration) -> ChunkSet {
        let patience = self.patience();
        let mut union = ChunkSet::new(self.channel.chunks());
        let useful = self.states.values().filter(|state| state.is_useful(now, patience));
        useful.filter_map(|state| state.lacks.as_ref()).for_each(|lacks| union.unite(lacks));
        union
    }

    /// Forgets what the members lack, since they are about to be asked.
    pub(super) fn forget_lacks(&mut self) {
        self.states.values_mut().for_each(|state| state.lacks = None);
        self.changed();
    }

    /// Notes that all who are there were sent to the end game.
    pub(super) fn tell(&mut self) {
        self.states.values_mut().for_each(|state| state.told = true);
        self.changed();
    }

    /// The mean loss of those who report any, when they are at least `enough`; else none.
    pub(super) fn mean_loss(&self, enough: u32) -> f64 {
        let (count, sum) = self.losses;
        if count >= enough { sum / f64::from(count) } else { 0.0 }
    }

    /// The greatest loss of a useful member, for repairs that are lost themselves.
    pub(super) fn strain(&mut self, now: Duration) -> Strain {
        /// Datagrams below which a loss is chance.
        const ENOUGH: u32 = 64;
        let patience = self.patience();
        let large = self.states.len() > Self::WINDOWED;
        let mut strain = Strain::default();
        for state in self.states.values_mut().filter(|state| state.is_useful(now, patience)) {
            let recent = std::mem::take(&mut state.recent);
            let total = recent.received + recent.lost;
            if total >= ENOUGH {
                strain.loss = strain.loss.max(f64::from(recent.lost) / f64::from(total));
            }
            strain.overflow |= large && recent.overflow > 0;
        }
        strain
    }

    /// True when it is time for [`Members::sweep`].
    pub(super) fn is_due(&self, now: Duration) -> bool {
        // In a large group each takes some hundred microseconds.
        now >= self.swept + Duration::from_millis(10).max(self.report_interval() / 10)
    }

    /// When [`Members::sweep`] is due next, for whoever has nothing else to do.
    pub(super) fn next_timeout(&self) -> Option<Duration> {
        (!self.states.is_empty()).then(|| self.swept + Duration::from_millis(100))
    }

    /// Finds out who has to go. `active` when pages are being sent as fast as possible; `rate` is the group's.
    pub(super) fn sweep(
        &mut self,
        now: Duration,
        config_floor: f64,
        rate: f64,
        active: bool,
    ) -> Vec<(Member, ExpelReason)> {
        let elapsed = now.saturating_sub(self.swept);
        self.swept = now;
        if now >= self.decayed + Duration::from_millis(500) {
            self.round_trip = self.peak.max(self.round_trip.mul_f64(0.7)).max(Self::MIN_ROUND_TRIP);
            (self.peak, self.decayed) = (Duration::ZERO, now);
        }
        let (patience, interval) = (self.patience(), self.report_interval());
        let mut rates: Vec<f64> =
            self.states.values().filter(|state| state.is_useful(now, patience)).map(|state| state.rate).collect();
        rates.sort_unstable_by(f64::total_cmp);
        let median = rates.get(rates.len() / 2).copied().unwrap_or_default();
        // Halves in two seconds: half of the group's best is what it could do a while ago.
        self.reference = median.max(self.reference * 0.5_f64.powf(elapsed.as_secs_f64() / 2.0));
        // A rate that is kept low on purpose is nobody's fault.
        let floor = config_floor.max(self.reference * Self::SHARE).min(rate / 2.0);
        let blocker = self.limit.filter(|_| std::mem::take(&mut self.blocked)).map(|(_, member)| member);
        let mut expelled = Vec::new();
        for (member, state) in &mut self.states {
            let silence = now.saturating_sub(state.reported.unwrap_or(state.joined));
            let silent = match state.reported {
                Some(_) => silence >= Self::SILENCE.max(interval * 10),
                None => silence >= Self::PROBE.max(interval * 10),
            };
            let holds = blocker == Some(*member) && state.rate < floor;
            let useless = active && rates.len() > 1 && state.rate < median * Self::SHARE && state.reported.is_some();
            state.slow = if holds || useless { state.slow + elapsed } else { Duration::ZERO };
            let reason = match state {
                _ if silent => ExpelReason::Silent,
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
        self.changed();
        self.renew_limit(now);
        expelled
    }

    /// The members as they are, `seq` being the next datagram.
    pub(super) fn statuses(&self, now: Duration, seq: u64) -> impl Iterator<Item = MemberStatus> {
        let patience = self.patience();
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

    fn changed(&mut self) {
        self.wants = None;
        if self.limit.is_some_and(|(_, member)| !self.states.contains_key(&member)) {
            self.limit = None;
        }
    }

    fn patience(&self) -> Duration {
        Self::PATIENCE.max(self.report_interval() * 4)
    }

    fn renew_limit(&mut self, now: Duration) {
        self.limit = None;
        if self.states.len() > Self::WINDOWED {
            return;
        }
        let patience = self.patience();
        let useful = self.states.iter().filter(|(_, state)| state.is_useful(now, patience));
        self.limit = useful.map(|(member, state)| (state.acknowledged + self.window(state), *member)).min();
    }

    /// The datagrams that may be on their way to a member: half of its buffer, since the kernel counts more than their bytes.
    fn window(&self, state: &State) -> u64 {
        let datagrams = f64::from(state.buffer / 2) / (HEAD + usize::from(self.channel.payload)) as f64;
        ((datagrams * state.share) as u64).max(4)
    }
}

impl State {
    fn is_useful(&self, now: Duration, patience: Duration) -> bool {
        self.reported.is_some_and(|reported| now < reported + patience)
    }

    /// Samples loss and rate over a tenth of a second.
    fn measure(&mut self, now: Duration, payload: u16) {
        let elapsed = now.saturating_sub(self.sampled);
        if elapsed < Duration::from_millis(100) {
            return;
        }
        let sample = std::mem::take(&mut self.sample);
        self.sampled = now;
        let bytes = f64::from(sample.received) * (HEAD + usize::from(payload)) as f64;
        self.rate = bytes / elapsed.as_secs_f64();
        let total = sample.received + sample.lost;
        if total > 0 {
            let loss = f64::from(sample.lost) / f64::from(total);
            // Few datagrams tell little.
            let weight = f64::from(total.min(1000)) / 4000.0;
            self.loss = Some(self.loss.map_or(loss, |smoothed| smoothed + (loss - smoothed) * weight));
        }
    }
}

impl Counts {
    fn add(&mut self, received: u32, lost: u32, overflow: u32) {
        self.received = self.received.saturating_add(received);
        self.lost = self.lost.saturating_add(lost);
        self.overflow = self.overflow.saturating_add(overflow);
    }
}
