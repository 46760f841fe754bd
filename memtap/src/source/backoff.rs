use std::time::Duration;

/// The first pause: about what a server needs to be started again by its supervisor's first try.
const FIRST: Duration = Duration::from_millis(10);

/// The longest pause: stopped vCPUs wait for no more than this once the server is back.
const LONGEST: Duration = Duration::from_secs(1);

/// Pauses between attempts to connect: doubling, with jitter, so that the clones of a server do not come back all at once.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
    state: u64,
}

impl Backoff {
    pub(super) fn new(seed: u64) -> Self {
        Self { next: FIRST, state: seed }
    }

    /// How long to wait now: half to all of a time that doubles with each call.
    pub(super) fn pause(&mut self) -> Duration {
        let whole = self.next;
        self.next = (2 * whole).min(LONGEST);
        let half = whole / 2;
        half + half.mul_f64(self.fraction())
    }

    /// Begins with short pauses again, after a success.
    pub(super) fn reset(&mut self) {
        self.next = FIRST;
    }

    /// The next number in 0..1, by SplitMix64.
    fn fraction(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_start_again() {
        let mut backoff = Backoff::new(1);
        let pauses: Vec<Duration> = (0..20).map(|_| backoff.pause()).collect();
        assert!(pauses[0] >= FIRST / 2 && pauses[0] <= FIRST);
        assert!(pauses[1] >= FIRST && pauses[1] <= 2 * FIRST);
        assert!(pauses[10..].iter().all(|pause| *pause >= LONGEST / 2 && *pause <= LONGEST));
        backoff.reset();
        assert!(backoff.pause() <= FIRST);
        assert_ne!(Backoff::new(1).pause(), Backoff::new(2).pause());
    }
}
