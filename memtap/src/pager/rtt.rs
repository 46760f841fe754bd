//! How long answers take, and so how long to wait for one.

use std::time::Duration;

/// Smoothed round-trip times after RFC 6298.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rtt {
    estimate: Option<(Duration, Duration)>,
}

impl Rtt {
    /// What to assume before the first answer.
    const UNKNOWN: Duration = Duration::from_millis(1);

    pub(super) fn sample(&mut self, sample: Duration) {
        self.estimate = Some(match self.estimate {
            None => (sample, sample / 2),
            Some((smoothed, variation)) => {
                ((smoothed * 7 + sample) / 8, (variation * 3 + smoothed.abs_diff(sample)) / 4)
            }
        });
    }

    pub(super) fn smoothed(&self) -> Duration {
        self.estimate.map_or(Self::UNKNOWN, |(smoothed, _)| smoothed)
    }

    /// How long to wait for an answer.
    pub(super) fn timeout(&self, min: Duration, max: Duration) -> Duration {
        let (smoothed, variation) = self.estimate.unwrap_or((Self::UNKNOWN, Self::UNKNOWN));
        (smoothed + variation * 4).min(max).max(min)
    }
}

/// Spreads the retries of clones that fork in lockstep: a xorshift generator, which is random enough for that.
#[derive(Debug)]
pub(super) struct Jitter(u64);

impl Jitter {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// `time` and up to an eighth more.
    pub(super) fn of(&mut self, time: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        time + (time / 8).mul_f64((self.0 >> 32) as f64 / f64::from(u32::MAX))
    }
}
