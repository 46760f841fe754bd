//! What the server counts. Rings write, the control plane reads; nobody waits for anybody.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use descriptor::fetch::{Class, Encoding, Refusal};
use serde::{Deserialize, Serialize};

use crate::session::AbortReason;

/// A number that one thread raises or sets and others read.
#[derive(Debug, Default)]
pub struct Number(AtomicU64);

/// Counters of one ring.
#[derive(Debug, Default)]
pub struct RingStats {
    /// By class, see [`class_index`].
    pub classes: [ClassStats; 2],
    /// Sessions that were welcomed.
    pub welcomed: Number,
    /// Sessions that were refused, by [`Refusal`] less one.
    pub refused: [Number; 5],
    /// Connections that were closed without further words, by [`AbortReason`].
    pub aborted: [Number; 4],
    /// Connections at this moment.
    pub connections: Number,
    /// Sends that the kernel was asked to do without a copy.
    pub zero_copy: Number,
    /// Those of them whose pages were sent from a registered buffer.
    pub fixed: Number,
    /// Bytes of images that are registered with the ring at this moment.
    pub registered_bytes: Number,
    /// Those of them of which it told that it had copied.
    pub copied: Number,
    /// Pages that new clones were told to fetch ahead.
    pub ordered_pages: Number,
    /// Ranges that clones told they needed.
    pub touched_ranges: Number,
}

/// Counters of one class of requests.
#[derive(Debug, Default)]
pub struct ClassStats {
    /// Requests received.
    pub requests: Number,
    /// Pages sent, by [`Encoding`].
    pub pages: [Number; 3],
    /// Bytes sent, heads included.
    pub bytes: Number,
    /// Requests that wait at this moment.
    pub queued: Number,
    /// From the receipt of a request to the moment when a send with pages for it is in the kernel's hands.
    pub latency: Histogram,
}

/// Both classes, in the order of the arrays of [`RingStats`].
pub const CLASSES: [Class; 2] = [Class::Demand, Class::Bulk];

/// All encodings, in the order of [`ClassStats::pages`].
pub const ENCODINGS: [Encoding; 3] = [Encoding::Raw, Encoding::Zero, Encoding::Lz4];

/// All refusals, in the order of [`RingStats::refused`].
pub const REFUSALS: [Refusal; 5] =
    [Refusal::Ticket, Refusal::UnknownImage, Refusal::Busy, Refusal::Draining, Refusal::Protocol];

/// All reasons to abort, in the order of [`RingStats::aborted`].
pub const ABORTS: [AbortReason; 4] =
    [AbortReason::Handshake, AbortReason::Stalled, AbortReason::Lingering, AbortReason::Flood];

/// Where `class` stands in arrays.
pub fn class_index(class: Class) -> usize {
    match class {
        Class::Demand => 0,
        Class::Bulk => 1,
    }
}

impl Number {
    /// Adds.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Relaxed);
    }

    /// Sets.
    pub fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// Reads.
    pub fn read(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

impl RingStats {
    /// Counts a refusal.
    pub fn count_refusal(&self, reason: Refusal) {
        count(&REFUSALS, &self.refused, reason);
    }

    /// Counts an abort.
    pub fn count_abort(&self, reason: AbortReason) {
        count(&ABORTS, &self.aborted, reason);
    }
}

fn count<T: PartialEq>(all: &[T], numbers: &[Number], one: T) {
    if let Some((_, number)) = all.iter().zip(numbers).find(|(each, _)| **each == one) {
        number.add(1);
    }
}

/// Steps of a histogram for each doubling: an error of at most 19 percent in a quantile.
const STEPS: u32 = 4;

/// Doublings from one microsecond on: up to half a minute.
const DOUBLINGS: u32 = 25;

const BUCKETS: usize = (STEPS * DOUBLINGS) as usize + 1;

/// How long something took, in buckets of a geometric scale.
#[derive(Debug)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

/// A histogram at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistogramSnapshot {
    buckets: Vec<u64>,
    sum_ns: u64,
}

/// Quantiles in microseconds, for reports.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// How many were measured.
    pub count: u64,
    /// The median.
    pub p50: f64,
    /// One in a hundred took longer.
    pub p99: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; BUCKETS], sum_ns: AtomicU64::new(0) }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        if let Some(bucket) = self.buckets.get(bucket_of(ns)) {
            bucket.fetch_add(1, Relaxed);
        }
        self.sum_ns.fetch_add(ns, Relaxed);
    }

    /// The histogram now.
    pub fn snapshot(&self) -> HistogramSnapshot {
        let buckets = self.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect();
        HistogramSnapshot { buckets, sum_ns: self.sum_ns.load(Relaxed) }
    }
}

impl Default for HistogramSnapshot {
    fn default() -> Self {
        Self { buckets: vec![0; BUCKETS], sum_ns: 0 }
    }
}

impl HistogramSnapshot {
    /// Adds another one.
    pub fn merge(&mut self, other: &HistogramSnapshot) {
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(mine, theirs)| *mine += theirs);
        self.sum_ns += other.sum_ns;
    }

    /// How many durations were counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Their sum in seconds.
    pub fn sum_seconds(&self) -> f64 {
        self.sum_ns as f64 / 1e9
    }

    /// The upper bound in microseconds of the bucket that the quantile falls into; zero without any.
    pub fn quantile(&self, fraction: f64) -> f64 {
        let rank = (self.count() as f64 * fraction).ceil();
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if *count > 0 && seen as f64 >= rank {
                return upper_bound_us(index);
            }
        }
        0.0
    }

    /// The quantiles that reports show.
    pub fn quantiles(&self) -> Quantiles {
        Quantiles { count: self.count(), p50: self.quantile(0.5), p99: self.quantile(0.99) }
    }

    /// The counts by whole doublings, as upper bounds in seconds and how many fell between it and the one before.
    pub fn doublings(&self) -> Vec<(f64, u64)> {
        let (first, rest) = self.buckets.split_at(1);
        let start = (upper_bound_us(0) / 1e6, first.iter().sum());
        let each = rest.chunks(STEPS as usize).enumerate();
        let rest = each.map(|(doubling, counts)| (2f64.powi(doubling as i32 + 1) / 1e6, counts.iter().sum()));
        std::iter::once(start).chain(rest).collect()
    }
}

/// Bucket 0 is up to one microsecond; then STEPS for each doubling.
fn bucket_of(ns: u64) -> usize {
    if ns <= 1000 {
        return 0;
    }
    let steps = (ns as f64 / 1000.0).log2() * f64::from(STEPS);
    (steps.ceil() as usize).min(BUCKETS - 1)
}

fn upper_bound_us(bucket: usize) -> f64 {
    2f64.powf(bucket as f64 / f64::from(STEPS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_step() {
        let histogram = Histogram::default();
        for us in 1..=1000 {
            histogram.record(Duration::from_micros(us));
        }
        let snapshot = histogram.snapshot();
        assert_eq!(snapshot.count(), 1000);
        assert!((500.0..600.0).contains(&snapshot.quantile(0.5)), "{}", snapshot.quantile(0.5));
        assert!((990.0..1190.0).contains(&snapshot.quantile(0.99)), "{}", snapshot.quantile(0.99));
        assert_eq!(snapshot.doublings().iter().map(|(_, count)| count).sum::<u64>(), 1000);
        assert_eq!(HistogramSnapshot::default().quantile(0.5), 0.0);
    }

    #[test]
    fn extremes_have_a_bucket() {
        let histogram = Histogram::default();
        histogram.record(Duration::ZERO);
        histogram.record(Duration::from_secs(1 << 40));
        assert_eq!(histogram.snapshot().count(), 2);
    }
}
