//! Networks that misbehave.

use std::time::Duration;

use fastrand::Rng;

/// How one direction of a network treats what is sent.
#[derive(Clone, Copy, Debug)]
pub struct Quality {
    /// The shortest way through.
    pub delay: Duration,
    /// How much longer it may take. Datagrams overtake each other by it.
    pub jitter: Duration,
    /// Bytes in a microsecond.
    pub rate: u64,
    /// Datagrams in a thousand that are lost.
    pub loss: u32,
    /// Datagrams in a thousand that come twice.
    pub duplication: u32,
}

/// One direction of a connection or a path.
#[derive(Clone, Debug)]
pub struct Link {
    quality: Quality,
    free_at: Duration,
    delivered_at: Duration,
}

impl Link {
    /// A link with nothing on it.
    pub fn new(quality: Quality) -> Self {
        Self { quality, free_at: Duration::ZERO, delivered_at: Duration::ZERO }
    }

    /// When `bytes` of a stream that are sent now arrive: never before those sent earlier.
    pub fn stream(&mut self, now: Duration, bytes: usize, rng: &mut Rng) -> Duration {
        let arrival = self.sent(now, bytes) + self.delay(rng);
        self.delivered_at = self.delivered_at.max(arrival);
        self.delivered_at
    }

    /// When the copies of a datagram that is sent now arrive, if any does.
    pub fn datagram(&mut self, now: Duration, bytes: usize, rng: &mut Rng) -> Vec<Duration> {
        let sent = self.sent(now, bytes);
        let lost = rng.u32(0..1000) < self.quality.loss;
        let copies = if lost { 0 } else { 1 + usize::from(rng.u32(0..1000) < self.quality.duplication) };
        (0..copies).map(|_| sent + self.delay(rng)).collect()
    }

    /// When the last of `bytes` is on the way.
    fn sent(&mut self, now: Duration, bytes: usize) -> Duration {
        self.free_at = self.free_at.max(now) + Duration::from_nanos(bytes as u64 * 1000 / self.quality.rate);
        self.free_at
    }

    fn delay(&self, rng: &mut Rng) -> Duration {
        self.quality.delay + self.quality.jitter.mul_f64(rng.f64())
    }
}
