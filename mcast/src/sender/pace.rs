use std::time::Duration;

use super::SenderConfig;

/// How fast datagrams may go: a token bucket whose rate follows the members' losses.
///
/// In a small group the windows of the members do most of the work (see `Members`); the rate bounds what a network
/// without back-pressure has to drop.
#[derive(Debug)]
pub(super) struct Pace {
    /// Bytes a second.
    rate: f64,
    initial: f64,
    cap: f64,
    floor: f64,
    /// Bytes that may go now; below zero after a burst.
    tokens: f64,
    filled: Duration,
    adapted: Duration,
    /// Bytes sent since then.
    sent: f64,
    /// Loss that does not count as congestion.
    tolerated: f64,
    /// The loss at the first of the latest decreases in a row, and how many they are.
    hopeless: (f64, u32),
}

/// What the members' reports since the last adaptation amount to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Strain {
    /// The greatest loss of a useful member, 0 to 1.
    pub(super) loss: f64,
    /// A socket overflowed in a group that is too large for windows.
    pub(super) overflow: bool,
}

impl Pace {
    /// What may go at once after a pause.
    const BURST: f64 = 120.0 * 1024.0;

    /// At high rates, what may go after having slept for so long: timers are no finer.
    const SLICE: f64 = 0.0005;

    /// 10 GB/s: beyond what this code can emit.
    const CAP: f64 = 1e10;

    /// Independent losses of up to a tenth are common on bad paths and no congestion; a full queue loses more than this.
    const TOLERATED: f64 = 0.15;

    /// Decreases in a row that did not lower the loss, after which it is taken for the path's own.
    const HOPELESS: u32 = 3;

    pub(super) fn new(now: Duration, config: &SenderConfig) -> Self {
        let cap = config.max_rate.map_or(Self::CAP, |rate| rate.get() as f64).clamp(1.0, Self::CAP);
        let rate = (config.initial_rate as f64).clamp(1.0, cap);
        Self {
            rate,
            initial: rate,
            cap,
            floor: (config.floor as f64).clamp(1.0, cap),
            tokens: Self::BURST,
            filled: now,
            adapted: now,
            sent: 0.0,
            tolerated: Self::TOLERATED,
            hopeless: (0.0, 0),
        }
    }

    /// Bytes a second.
    pub(super) fn rate(&self) -> f64 {
        self.rate
    }

    /// True when something may go.
    pub(super) fn ready(&mut self, now: Duration) -> bool {
        let elapsed = now.saturating_sub(self.filled).as_secs_f64();
        self.filled = self.filled.max(now);
        self.tokens = (self.tokens + elapsed * self.rate).min(Self::BURST.max(self.rate * Self::SLICE));
        self.tokens > 0.0
    }

    /// When something may go.
    pub(super) fn ready_at(&self) -> Duration {
        // A nanosecond more than the debt takes, so that rounding does not make for a second wake-up.
        let debt = (-self.tokens).max(0.0);
        self.filled + Duration::from_secs_f64(debt / self.rate) + Duration::from_nanos(u64::from(self.tokens <= 0.0))
    }

    pub(super) fn spend(&mut self, bytes: usize) {
        self.tokens -= bytes as f64;
        self.sent += bytes as f64;
    }

    /// When the rate was last adapted.
    pub(super) fn adapted(&self) -> Duration {
        self.adapted
    }

    /// Bytes a second sent since then.
    pub(super) fn sending(&self, now: Duration) -> f64 {
        self.sent / now.saturating_sub(self.adapted).as_secs_f64().max(0.001)
    }

    /// Follows what members report.
    pub(super) fn adapt(&mut self, now: Duration, strain: Strain) {
        let sending = self.sending(now);
        (self.adapted, self.sent) = (now, 0.0);
        let congested = strain.loss > self.tolerated;
        if !congested && !strain.overflow {
            if strain.loss < self.tolerated / 2.0 {
                self.tolerated = Self::TOLERATED;
            }
            self.hopeless.1 = 0;
            // What was not tried shows nothing.
            if sending * 2.0 >= self.rate || self.rate < self.initial {
                self.rate = (self.rate * 1.1).min(self.cap);
            }
            return;
        }
        if congested {
            match &mut self.hopeless {
                (first, times) if *times > 0 && strain.loss > *first * 0.8 => *times += 1,
                hopeless => *hopeless = (strain.loss, 1),
            }
            if self.hopeless.1 > Self::HOPELESS {
                self.tolerated = (strain.loss * 1.25).min(0.75);
                self.hopeless.1 = 0;
                return;
            }
        }
        // What the slowest receives, less a tenth to drain the queue; a single measurement at most halves the rate.
        let delivered = self.rate.min(sending.max(self.floor)) * (1.0 - strain.loss);
        self.rate = (delivered * 0.9).max(self.rate / 2.0).max(self.floor).min(self.cap);
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use descriptor::PageCount;

    use super::*;
    use crate::ChannelParameters;

    const STEP: Duration = Duration::from_millis(10);

    fn config() -> SenderConfig {
        SenderConfig::new(ChannelParameters::new(1, 1448, PageCount::new(1000)).unwrap())
    }

    fn loss(loss: f64) -> Strain {
        Strain { loss, overflow: false }
    }

    /// Adapts every 10 ms, sending as fast as allowed.
    fn run(pace: &mut Pace, now: &mut Duration, steps: u32, mut strain: impl FnMut(f64) -> Strain) {
        for _ in 0..steps {
            *now += STEP;
            pace.spend((pace.rate() * STEP.as_secs_f64()) as usize);
            let strain = strain(pace.rate());
            pace.adapt(*now, strain);
        }
    }

    #[test]
    fn no_more_than_the_rate_goes() {
        let max_rate = NonZeroU64::new(1_000_000);
        let mut pace = Pace::new(Duration::ZERO, &SenderConfig { max_rate, ..config() });
        let (mut sent, mut now) = (0, Duration::ZERO);
        while now < Duration::from_secs(10) {
            assert!(pace.ready(now), "ready when it said so");
            pace.spend(61_440);
            sent += 61_440;
            now = pace.ready_at().max(now);
        }
        assert!((10_000_000..10_000_000 + 3 * 61_440).contains(&sent), "{sent}");
        assert!(!pace.ready(now - Duration::from_millis(1)));
    }

    #[test]
    fn a_tenth_of_losses_is_no_congestion() {
        let mut pace = Pace::new(Duration::ZERO, &config());
        let mut now = Duration::ZERO;
        run(&mut pace, &mut now, 100, |_| loss(0.12));
        assert!(pace.rate() > SenderConfig::INITIAL_RATE as f64);
    }

    #[test]
    fn a_bottleneck_is_found_and_left_again() {
        let mut pace = Pace::new(Duration::ZERO, &config());
        let mut now = Duration::ZERO;
        let bottleneck = |rate: f64| loss((1.0 - 1e8 / rate).max(0.0));
        let mut total = 0.0;
        run(&mut pace, &mut now, 100, bottleneck);
        run(&mut pace, &mut now, 100, |rate| {
            total += rate;
            bottleneck(rate)
        });
        assert!((7e7..1.3e8).contains(&(total / 100.0)), "{total}");
        run(&mut pace, &mut now, 50, |_| loss(0.0));
        assert!(pace.rate() > 5e9);
    }

    #[test]
    fn losses_that_no_slowness_cures_are_accepted() {
        let mut pace = Pace::new(Duration::ZERO, &config());
        let mut now = Duration::ZERO;
        run(&mut pace, &mut now, 100, |_| loss(0.3));
        assert!(pace.rate() > 1e9, "{}", pace.rate());
    }

    #[test]
    fn the_floor_and_the_cap_hold() {
        let mut pace = Pace::new(Duration::ZERO, &config());
        let mut now = Duration::ZERO;
        run(&mut pace, &mut now, 1000, |_| Strain { loss: 0.1, overflow: true });
        assert_eq!(pace.rate(), SenderConfig::FLOOR as f64);
        run(&mut pace, &mut now, 1000, |_| loss(0.0));
        assert_eq!(pace.rate(), Pace::CAP);
    }
}
