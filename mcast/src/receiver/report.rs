use std::time::Duration;

use fastrand::Rng;

use super::{ReceiverConfig, ReceiverStats};
use crate::wire::{Datagram, LackBits, Pulse, Report};
use crate::{Lacks, Serial};

/// What is reported to the sender, and when: regularly, after so many bytes, when it asks what is lacking, and at first.
#[derive(Debug)]
pub(super) struct Reports {
    lacks: Option<Lacks>,
    overflow: u32,
    /// What the last pulse asks for.
    interval: Duration,
    bytes: u64,
    /// The last pulse: its own time, and when it came.
    echo: Option<(Duration, Duration)>,
    /// When the next report is due, and the next that tells what is lacking.
    due: Option<Duration>,
    answer: Option<Duration>,
    /// Further reports that tell it, unasked.
    repeats: u8,
    /// Bytes received since the last report.
    fresh: u64,
    rate: Rate,
}

/// Bytes a second, measured over no less than [`Rate::SPAN`].
#[derive(Debug)]
struct Rate {
    since: Duration,
    bytes: u64,
    rate: f64,
}

/// What a report tells of the numbers seen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) next: Serial,
    pub(super) received: u64,
    pub(super) lost: u64,
}

impl Reports {
    /// Intervals between reports that are believed, and the one before the first pulse.
    const INTERVALS: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(10));
    const INTERVAL: Duration = Duration::from_millis(10);

    /// The interval while nothing comes: often enough to count as there when a burst begins.
    const IDLE: Duration = Duration::from_millis(100);

    /// Early reports are no closer than the bytes that a clone receives in some ten microseconds.
    const MIN_BYTES: u64 = 16 << 10;

    /// A member's share of the time in which all answer a question: 10,000 answers a second.
    const ANSWER: Duration = Duration::from_micros(100);

    /// Reports that tell a newcomer's lacks, beside the first: a burst waits for all who joined, and one lost report would cost
    /// each of them a fifth of a second.
    const REPEATS: u8 = 2;

    /// The longest time over which answers are spread.
    const MAX_SPREAD: Duration = Duration::from_secs(2);

    pub(super) fn new(now: Duration) -> Self {
        Self {
            lacks: None,
            overflow: 0,
            interval: Self::INTERVAL,
            bytes: 0,
            echo: None,
            due: None,
            answer: None,
            repeats: 0,
            fresh: 0,
            rate: Rate { since: now, bytes: 0, rate: 0.0 },
        }
    }

    pub(super) fn lacks(&self) -> Option<&Lacks> {
        self.lacks.as_ref()
    }

    /// Says what is lacking and wanted in bulk; true when the sender has to know that something or nothing is, now.
    pub(super) fn set_lacks(&mut self, lacks: Option<Lacks>) -> bool {
        let lacks = lacks.filter(|lacks| !lacks.pages.is_zero() && !lacks.chunks.is_empty());
        let changed = lacks.is_some() != self.lacks.is_some();
        self.lacks = lacks;
        changed
    }

    pub(super) fn set_overflow(&mut self, total: u32) {
        self.overflow = total;
    }

    /// Notes that a shard of so many bytes arrived.
    pub(super) fn received(&mut self, now: Duration, bytes: usize, rng: &mut Rng) {
        self.rate.add(now, bytes);
        if self.fresh == 0 {
            // The last interval was one of an idle channel.
            self.hurry(now, rng);
        }
        self.fresh += bytes as u64;
    }

    pub(super) fn pulse(&mut self, now: Duration, pulse: &Pulse, rng: &mut Rng) {
        let before = self.interval;
        self.interval = pulse.report_interval.clamp(Self::INTERVALS.0, Self::INTERVALS.1);
        self.bytes = u64::from(pulse.report_bytes);
        self.echo = Some((pulse.sent, now));
        if self.fresh > 0 && self.interval < before {
            self.hurry(now, rng);
        }
    }

    /// Tells what is lacking soon, at a time that differs from member to member.
    pub(super) fn answer(&mut self, now: Duration, members: u32, round_trip: Duration, rng: &mut Rng) {
        let spread = (Self::ANSWER * members.min(1 << 20)).clamp(round_trip, Self::MAX_SPREAD.max(round_trip));
        let at = now + spread.mul_f64(0.05 + 0.95 * rng.f64());
        self.answer = Some(self.answer.map_or(at, |answer| answer.min(at)));
        self.due = self.due.or(self.answer);
    }

    /// Has the next reports tell what is lacking again.
    pub(super) fn repeat(&mut self) {
        self.repeats = Self::REPEATS;
    }

    /// Reports nothing more, until the next [`Reports::answer`].
    pub(super) fn stop(&mut self) {
        (self.due, self.answer, self.fresh) = (None, None, 0);
    }

    pub(super) fn next_timeout(&self) -> Option<Duration> {
        match self.due {
            Some(_) if self.is_full() => Some(Duration::ZERO),
            due => due.into_iter().chain(self.answer).min(),
        }
    }

    /// The report that is due, if one is.
    pub(super) fn poll(
        &mut self,
        now: Duration,
        config: &ReceiverConfig,
        seen: Seen,
        rng: &mut Rng,
        stats: &mut ReceiverStats,
    ) -> Option<Vec<u8>> {
        if self.next_timeout().is_none_or(|due| due > now) {
            return None;
        }
        let answers = self.answer.is_some_and(|answer| answer <= now);
        self.answer = self.answer.filter(|_| !answers);
        let tells = answers || self.repeats > 0;
        if !answers {
            self.repeats = self.repeats.saturating_sub(1);
        }
        let interval = if self.fresh > 0 || self.repeats > 0 { self.interval } else { self.interval.max(Self::IDLE) };
        self.due = Some(now + jittered(interval, rng));
        self.fresh = 0;
        self.rate.measure(now);
        stats.reports += 1;
        let (echo, came) = self.echo.unwrap_or((Duration::ZERO, now));
        let report = Report {
            session: config.channel.session,
            member: config.member,
            leaving: false,
            next_seq: seen.next,
            received: seen.received as u32,
            lost: seen.lost as u32,
            overflow: self.overflow,
            buffer: config.buffer,
            rate_kib: (self.rate.rate / 1024.0) as u32,
            echo,
            held: now.saturating_sub(came),
            missing: self.lacks.as_ref().map_or(0, |lacks| u32::try_from(lacks.pages.get()).unwrap_or(u32::MAX)),
            lacks: self.lacks.as_ref().filter(|_| tells).map(|lacks| LackBits::of(&lacks.chunks)),
        };
        let mut datagram = Vec::new();
        Datagram::Report(report).encode(&mut datagram);
        Some(datagram)
    }

    /// Sees to it that a report goes within an interval.
    fn hurry(&mut self, now: Duration, rng: &mut Rng) {
        let soon = now + jittered(self.interval, rng);
        self.due = self.due.map(|due| due.min(soon));
    }

    /// True when so much came that a report is due early.
    fn is_full(&self) -> bool {
        self.bytes > 0 && self.fresh >= self.bytes.max(Self::MIN_BYTES)
    }
}

impl Rate {
    const SPAN: Duration = Duration::from_millis(10);

    fn add(&mut self, now: Duration, bytes: usize) {
        self.bytes += bytes as u64;
        self.measure(now);
    }

    fn measure(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.since);
        if elapsed >= Self::SPAN {
            self.rate = self.bytes as f64 / elapsed.as_secs_f64();
            (self.since, self.bytes) = (now, 0);
        }
    }
}

/// A span of 80 to 120 % of `span`, so that members do not fall into step.
fn jittered(span: Duration, rng: &mut Rng) -> Duration {
    span.mul_f64(0.8 + 0.4 * rng.f64())
}
