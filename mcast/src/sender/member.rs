use std::time::Duration;

use super::members::Members;
use crate::wire::{HEAD, Report};
use crate::{ChannelParameters, ChunkSet, Serial};

/// One member, by what it reports.
#[derive(Debug)]
pub(super) struct MemberState {
    pub(super) joined: Duration,
    /// The first blocks that concern it.
    pub(super) start: [u64; 2],
    first_seq: u64,
    /// All datagrams before were received or lost.
    pub(super) acknowledged: u64,
    pub(super) reported: Option<Duration>,
    /// The last report that shows that it receives anything.
    pub(super) heard: Option<Duration>,
    echo: Duration,
    received: u32,
    lost: u32,
    overflow: u32,
    /// Since the last adaptation of the rate.
    pub(super) recent: Counts,
    sample: Sample,
    pub(super) loss: Option<f64>,
    /// Bytes a second.
    pub(super) rate: f64,
    pub(super) round_trip: Option<Duration>,
    pub(super) buffer: u32,
    /// The share of the buffer's half that the window is; shrinks when the socket overflows.
    share: f64,
    pub(super) lacks: Option<ChunkSet>,
    pub(super) missing: u32,
    /// It was sent to the end game.
    pub(super) told: bool,
    credit: Credit,
    /// How long it has held up the group.
    pub(super) slow: Duration,
    pub(super) nonsense: u32,
}

/// What a member counted in some time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) received: u32,
    pub(super) lost: u32,
    pub(super) overflow: u32,
}

/// What a member counted since loss and rate were last estimated.
#[derive(Debug)]
struct Sample {
    since: Duration,
    counts: Counts,
    acknowledged: u64,
}

/// What a member may still ask for, by NACKs.
#[derive(Debug)]
struct Credit {
    entries: f64,
    shards: f64,
    /// What was sent when it was last added to.
    sent: Sent,
}

/// What was sent so far, and by when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    pub(super) now: Duration,
    /// The next datagram.
    pub(super) seq: u64,
    /// The number of blocks, and of datagrams with shards that are no repairs.
    pub(super) blocks: u64,
    pub(super) data: u64,
}

/// Whether a report is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Taken,
    Stale,
    Nonsense,
}

impl MemberState {
    /// Bytes that are assumed for a buffer at least, and at most: what Linux gives without asking, and more than helps.
    pub(super) const BUFFER: (u32, u32) = (64 << 10, 64 << 20);

    /// NACK entries at once, and more with every block and second. A block is asked for up to six times.
    const ENTRIES: (f64, f64, f64) = (2048.0, 8.0, 200.0);

    /// Shards asked for at once, and more with every datagram of data: what a member with 40 % of losses needs. So the repairs
    /// that one member asks for are bounded by the data.
    const SHARDS: (f64, f64) = (4096.0, 0.75);

    /// Datagrams by which a member's counters may be off: those that it took before it began to count, and the late ones that
    /// it has counted as lost.
    const SLACK: i64 = 4096;

    /// One that begins with these blocks and the next datagram.
    pub(super) fn new(start: [u64; 2], sent: Sent) -> Self {
        let (entries, shards) = (Self::ENTRIES.0, Self::SHARDS.0);
        Self {
            joined: sent.now,
            start,
            first_seq: sent.seq,
            acknowledged: sent.seq,
            reported: None,
            heard: None,
            echo: Duration::ZERO,
            received: 0,
            lost: 0,
            overflow: 0,
            recent: Counts::default(),
            sample: Sample { since: sent.now, counts: Counts::default(), acknowledged: sent.seq },
            loss: None,
            rate: 0.0,
            round_trip: None,
            buffer: Self::BUFFER.0,
            share: 1.0,
            lacks: None,
            missing: 0,
            told: false,
            credit: Credit { entries, shards, sent },
            slow: Duration::ZERO,
            nonsense: 0,
        }
    }

    /// True when it reported and received something in the last `patience`, so that the group waits for it.
    pub(super) fn is_useful(&self, now: Duration, patience: Duration) -> bool {
        let lately = |at: Option<Duration>| at.is_some_and(|at| now < at + patience);
        lately(self.reported) && lately(self.heard)
    }

    /// True when it joined a moment ago and has not reported that it receives anything.
    pub(super) fn is_awaited(&self, now: Duration) -> bool {
        self.heard.is_none() && now < self.joined + Members::PATIENCE
    }

    /// The datagrams that may be on their way to it: half of its buffer, since the kernel counts more than their bytes.
    pub(super) fn window(&self, payload: u16) -> u64 {
        let datagrams = f64::from(self.buffer / 2) / (HEAD + usize::from(payload)) as f64;
        ((datagrams * self.share) as u64).max(4)
    }

    /// Takes in a report. `echoed` is the next datagram when the pulse that it echoes was sent, if that is still known.
    pub(super) fn report(
        &mut self,
        report: &Report<'_>,
        sent: Sent,
        echoed: Option<u64>,
        channel: &ChannelParameters,
    ) -> Verdict {
        let next = report.next_seq.extend(self.acknowledged);
        let since = |counter: u32, before: u32| Serial::new(counter).since(Serial::new(before));
        let (received, lost) = (since(report.received, self.received), since(report.lost, self.lost));
        let overflow = since(report.overflow, self.overflow);
        if self.reported.is_some() && (received < 0 || report.echo < self.echo) {
            return Verdict::Stale;
        }
        let possible = (sent.seq - self.first_seq) as i64 + Self::SLACK;
        let counted = i64::from(received) + i64::from(lost.max(0));
        if next > sent.seq
            || counted > possible
            || received < 0
            || i64::from(report.received) > possible
            || overflow < 0
            || report.echo > sent.now
        {
            self.nonsense += 1;
            return Verdict::Nonsense;
        }
        if received > 0 || report.echo > self.echo {
            self.heard = Some(sent.now);
        }
        (self.received, self.lost, self.overflow) = (report.received, report.lost, report.overflow);
        // Reordered datagrams are taken for lost at first, so that the losses may go down a little.
        let counts = Counts { received: received as u32, lost: lost.max(0) as u32, overflow: overflow as u32 };
        self.recent.add(counts);
        self.sample.counts.add(counts);
        self.reported = Some(sent.now);
        self.echo = report.echo;
        self.acknowledged = self.acknowledged.max(next).max(echoed.unwrap_or(0)).min(sent.seq);
        self.buffer = report.buffer.clamp(Self::BUFFER.0, Self::BUFFER.1);
        self.share = if overflow == 0 { (self.share * 1.02).min(1.0) } else { (self.share * 0.7).max(0.1) };
        self.estimate(sent.now, channel.payload);
        if !report.echo.is_zero() {
            let sample = sent.now.saturating_sub(report.echo).saturating_sub(report.held).min(Members::MAX_ROUND_TRIP);
            self.round_trip = Some(self.round_trip.map_or(sample, |smoothed| (smoothed * 7 + sample) / 8));
        }
        self.missing = report.missing;
        if let Some(lacks) = &report.lacks {
            self.lacks = Some(lacks.set(channel.chunks()));
        }
        if report.missing == 0 {
            self.lacks = Some(ChunkSet::new(channel.chunks()));
        }
        Verdict::Taken
    }

    /// How much it may still ask for: entries, then shards; adds to that what was sent meanwhile.
    pub(super) fn credit(&mut self, sent: Sent) -> (u32, u8) {
        let credit = &mut self.credit;
        let seconds = sent.now.saturating_sub(credit.sent.now).as_secs_f64();
        let entries = (sent.blocks - credit.sent.blocks) as f64 * Self::ENTRIES.1 + seconds * Self::ENTRIES.2;
        let shards = (sent.data - credit.sent.data) as f64 * Self::SHARDS.1;
        credit.entries = (credit.entries + entries).min(Self::ENTRIES.0);
        credit.shards = (credit.shards + shards).min(Self::SHARDS.0);
        credit.sent = Sent { now: sent.now.max(credit.sent.now), ..sent };
        (credit.entries as u32, credit.shards.min(255.0) as u8)
    }

    /// Takes one entry, and so many shards, from what it may ask for.
    pub(super) fn charge(&mut self, shards: u8) {
        self.credit.entries -= 1.0;
        self.credit.shards -= f64::from(shards);
    }

    /// Estimates loss and rate every tenth of a second.
    fn estimate(&mut self, now: Duration, payload: u16) {
        let elapsed = now.saturating_sub(self.sample.since);
        if elapsed < Duration::from_millis(100) {
            return;
        }
        let fresh = Sample { since: now, counts: Counts::default(), acknowledged: self.acknowledged };
        let Sample { counts, acknowledged, .. } = std::mem::replace(&mut self.sample, fresh);
        // Whoever counts datagrams without getting on does not receive them.
        let received = u64::from(counts.received).min(self.acknowledged - acknowledged);
        self.rate = received as f64 * (HEAD + usize::from(payload)) as f64 / elapsed.as_secs_f64();
        let total = counts.received.saturating_add(counts.lost);
        if total > 0 {
            let loss = f64::from(counts.lost) / f64::from(total);
            // Few datagrams tell little.
            let weight = f64::from(total.min(1000)) / 4000.0;
            self.loss = Some(self.loss.map_or(loss, |smoothed| smoothed + (loss - smoothed) * weight));
        }
    }
}

impl Counts {
    fn add(&mut self, other: Counts) {
        self.received = self.received.saturating_add(other.received);
        self.lost = self.lost.saturating_add(other.lost);
        self.overflow = self.overflow.saturating_add(other.overflow);
    }
}

#[cfg(test)]
mod tests {
    use descriptor::PageCount;

    use super::*;
    use crate::Member;
    use crate::wire::LackBits;

    const CHANNEL: ChannelParameters = ChannelParameters {
        session: 1,
        payload: 1448,
        frames: PageCount::new(2560),
        chunk_frames: PageCount::new(256),
    };

    /// Datagrams of the sender are numbered from here, near the wrap of the wire.
    const FIRST: u64 = (2 << 32) - 50;

    fn sent(ms: u64, datagrams: u64) -> Sent {
        let (seq, blocks) = (FIRST + datagrams, datagrams / 100);
        Sent { now: Duration::from_millis(ms), seq, blocks, data: datagrams }
    }

    fn member() -> MemberState {
        MemberState::new([0, 0], sent(0, 0))
    }

    fn report(next: u64, received: u32, lost: u32) -> Report<'static> {
        Report {
            session: 1,
            member: Member(1),
            leaving: false,
            next_seq: Serial::new((FIRST + next) as u32),
            received,
            lost,
            overflow: 0,
            buffer: 1 << 20,
            rate_kib: 0,
            echo: Duration::ZERO,
            held: Duration::ZERO,
            missing: 1,
            lacks: None,
        }
    }

    fn take(member: &mut MemberState, report: &Report<'_>, sent: Sent) -> Verdict {
        member.report(report, sent, None, &CHANNEL)
    }

    #[test]
    fn counters_and_numbers_wrap() {
        let mut member = member();
        (member.received, member.lost) = (u32::MAX - 100, u32::MAX - 3);
        let wrapped = Report { received: 899, lost: 6, ..report(1000, 0, 0) };
        let long = Sent { seq: FIRST + (1 << 32) + 1000, ..sent(200, 0) };
        member.acknowledged += 1 << 32;
        member.sample.acknowledged = member.acknowledged;
        assert_eq!(take(&mut member, &wrapped, long), Verdict::Taken);
        assert_eq!(member.acknowledged, long.seq);
        assert_eq!((member.recent.received, member.recent.lost), (1000, 10));
        assert!((member.rate - 1000.0 * 1472.0 / 0.2).abs() < 1.0, "{}", member.rate);
    }

    #[test]
    fn what_cannot_be_true_is_not_taken() {
        let echo = |ms| Report { echo: Duration::from_millis(ms), ..report(10, 10, 0) };
        for nonsense in
            [report(101, 10, 0), report(10, 10_000, 0), report(10, 0, 10_000), echo(21), report(10, u32::MAX, 0)]
        {
            let mut member = member();
            assert_eq!(take(&mut member, &nonsense, sent(20, 100)), Verdict::Nonsense, "{nonsense:?}");
            assert_eq!((member.nonsense, member.acknowledged), (1, FIRST));
        }
        let mut member = member();
        assert_eq!(take(&mut member, &report(100, 90, 10), sent(20, 100)), Verdict::Taken);
        assert_eq!(take(&mut member, &report(50, 40, 10), sent(20, 100)), Verdict::Stale, "overtaken by a later one");
        assert_eq!(take(&mut member, &report(100, 95, 5), sent(21, 100)), Verdict::Taken, "late ones turned up");
    }

    #[test]
    fn a_pulse_stands_for_what_was_sent_before_it() {
        let mut member = member();
        let echo = Report { echo: Duration::from_millis(5), held: Duration::from_millis(3), ..report(10, 10, 0) };
        assert_eq!(member.report(&echo, sent(10, 100), Some(FIRST + 80), &CHANNEL), Verdict::Taken);
        assert_eq!(member.acknowledged, FIRST + 80);
        assert_eq!(member.round_trip, Some(Duration::from_millis(2)));
    }

    #[test]
    fn whoever_hears_nothing_is_not_waited_for() {
        let mut member = member();
        let patience = Duration::from_millis(250);
        take(&mut member, &report(0, 0, 0), sent(10, 100));
        assert!(!member.is_useful(Duration::from_millis(11), patience));
        take(&mut member, &report(10, 10, 0), sent(20, 100));
        assert!(member.is_useful(Duration::from_millis(21), patience));
        for at in (30..300).step_by(10) {
            take(&mut member, &report(10, 10, 0), sent(at, 100));
        }
        assert!(!member.is_useful(Duration::from_millis(300), patience));
    }

    #[test]
    fn an_overflow_shrinks_the_window_for_a_while() {
        let mut member = member();
        take(&mut member, &report(10, 10, 0), sent(10, 10));
        assert_eq!(member.window(1448), 356);
        take(&mut member, &Report { overflow: 5, ..report(20, 20, 0) }, sent(20, 20));
        assert_eq!(member.window(1448), 249);
        (0..20).for_each(|at| {
            take(&mut member, &Report { overflow: 5, ..report(20, 20, 0) }, sent(30 + at, 20));
        });
        assert_eq!(member.window(1448), 356);
        assert_eq!(member.window(61_440), 8);
    }

    #[test]
    fn lacks_replace_what_was_told_before() {
        let mut member = member();
        let set = ChunkSet::full(10);
        take(&mut member, &Report { lacks: Some(LackBits::of(&set)), ..report(0, 0, 0) }, sent(1, 0));
        assert_eq!(member.lacks, Some(set));
        let bits = LackBits { first: 8, chunks: 8, bits: &[0b101] };
        take(&mut member, &Report { lacks: Some(bits), ..report(0, 0, 0) }, sent(2, 0));
        assert_eq!(member.lacks.as_ref().map(|lacks| lacks.iter().collect()), Some(vec![8]));
        take(&mut member, &Report { missing: 0, ..report(0, 0, 0) }, sent(3, 0));
        assert_eq!(member.lacks, Some(ChunkSet::new(10)));
    }

    #[test]
    fn what_may_be_asked_for_follows_what_was_sent() {
        let mut member = member();
        assert_eq!(member.credit(sent(0, 0)), (2048, 255));
        (0..2048).for_each(|_| member.charge(2));
        assert_eq!(member.credit(sent(0, 0)), (0, 0));
        assert_eq!(member.credit(sent(0, 200)), (16, 150));
        assert_eq!(member.credit(sent(1000, 200)), (216, 150));
        assert_eq!(member.credit(sent(1000, 1_000_000)), (2048, 255));
    }
}
