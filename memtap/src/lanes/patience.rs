//! How long to wait for the channel's answer to a request.

use std::time::Duration;

use descriptor::fetch::Class;

/// Before the first answer: many round trips in a data centre, and as long as a slow disk takes.
const UNKNOWN: Duration = Duration::from_millis(20);

/// The bounds. A repair takes 3 to 4 ms in a rack, most of it back-off: less patience would ask for everything twice that is lost
/// once, or that comes while the process is not scheduled, and each page is asked for by many. More than a spinning disk takes
/// would be felt by the guest.
const BOUNDS: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(50));

/// Bulk waits for so much longer: it stands behind other bulk, and nobody waits for it.
const BULK: u32 = 10;

/// Smoothed times from request to arrival, as RFC 6298 does it for round trips.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Patience {
    estimate: Option<(Duration, Duration)>,
    /// Doublings since an answer came in time: what is late gives no sample.
    doublings: u32,
}

impl Patience {
    /// How long to wait for an answer of this class.
    pub(super) fn of(&self, class: Class) -> Duration {
        let usual = self.estimate.map_or(UNKNOWN, |(smoothed, variation)| (smoothed * 3).max(smoothed + variation * 4));
        let wait = usual.max(BOUNDS.0).saturating_mul(1 << self.doublings).min(BOUNDS.1);
        match class {
            Class::Demand => wait,
            Class::Bulk => wait * BULK,
        }
    }

    /// Learns from a demand request that was answered in time.
    pub(super) fn sample(&mut self, sample: Duration) {
        self.doublings = 0;
        self.estimate = Some(match self.estimate {
            None => (sample, sample / 2),
            Some((smoothed, variation)) => {
                ((smoothed * 7 + sample) / 8, (variation * 3 + smoothed.abs_diff(sample)) / 4)
            }
        });
    }

    /// Learns that one was not.
    pub(super) fn lost(&mut self) {
        // Beyond five doublings every wait is at its bound.
        self.doublings = (self.doublings + 1).min(5);
    }
}
