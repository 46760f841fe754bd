use std::time::Duration;

use descriptor::fetch::Class;
use fastrand::Rng;

use super::block::Block;
use crate::back_off::longest_back_off;
use crate::wire::{Answer, Pulse};

/// Where a block stands with what it lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// Nothing is known to be missing.
    Nothing,
    /// To be asked for by the next NACK that goes from then on; before, what is late may still come.
    From(Duration),
    /// Asked for, by this member or another: until then the repair may come.
    Held(Duration),
}

/// What the sender confirmed to send, and how long that may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Promise {
    pub(super) answer: Answer,
    pub(super) until: Duration,
}

/// The times that asking depends on, as the last pulse told them.
#[derive(Clone, Debug)]
pub(super) struct Timing {
    round_trip: Duration,
    members: u32,
    /// A pulse told these.
    known: bool,
    pace: Pace,
}

/// How fast bytes come when they do.
#[derive(Clone, Debug, Default)]
struct Pace {
    /// How long the last [`Pace::QUEUED`] bytes took to arrive.
    queue: Duration,
    /// The bytes counted since then, and the last of them.
    since: Duration,
    last: Duration,
    bytes: usize,
}

/// The back-off of one class. It is one for all blocks that wait, so that a NACK that goes asks for all of them, and the
/// distribution of the first one in the group is that of its random times.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Alarm {
    /// When the next NACK goes.
    pub(super) fire: Option<Duration>,
    /// When there is something to be done, that or the end of a wait.
    pub(super) wake: Option<Duration>,
}

impl Promise {
    /// True when what comes makes up for what `block` lacks.
    pub(super) fn covers(&self, block: &Block, need: u8) -> bool {
        match self.answer {
            Answer::Parity(rows) => need <= rows && !block.is_unseen(),
            Answer::Originals(shards) => block.is_unseen() || need <= block.missing().intersection(shards).len(),
            Answer::Gone => false,
        }
    }
}

impl Timing {
    /// NACKs for one block without anything new in between, after which it is given up. With waits that double that is a
    /// quarter of a second: the next pass, the end game or a deadline is better then.
    pub(super) const TRIES: u8 = 6;

    /// Nothing is called lost before; what networks reorder is closer together.
    const TOLERANCE: Duration = Duration::from_millis(1);

    /// Round trips that are believed; the sender tells none beyond.
    const ROUND_TRIPS: (Duration, Duration) = (Duration::from_micros(100), Duration::from_millis(200));

    /// The longest that such a queue is waited for.
    const MAX_QUEUE: Duration = Duration::from_millis(100);

    pub(super) fn new() -> Self {
        // Before the first pulse: a fast network and a group of middling size.
        Self { round_trip: Duration::from_millis(1), members: 16, known: false, pace: Pace::default() }
    }

    pub(super) fn learn(&mut self, pulse: &Pulse) {
        self.round_trip = pulse.round_trip.clamp(Self::ROUND_TRIPS.0, Self::ROUND_TRIPS.1);
        (self.members, self.known) = (pulse.members, true);
    }

    /// Notes that a shard of so many bytes arrived.
    pub(super) fn received(&mut self, now: Duration, bytes: usize) {
        self.pace.add(now, bytes);
    }

    /// True when a pulse told the times.
    pub(super) fn is_known(&self) -> bool {
        self.known
    }

    /// Members of the group, or what is assumed.
    pub(super) fn members(&self) -> u32 {
        self.members
    }

    pub(super) fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// How long a shard may be late before it is lost.
    pub(super) fn tolerance(&self) -> Duration {
        Self::TOLERANCE.max(self.round_trip / 4)
    }

    /// A random time to wait before a NACK, so that in a group of any size about one is the first.
    pub(super) fn back_off(&self, rng: &mut Rng) -> Duration {
        if self.members <= 1 {
            return Duration::ZERO;
        }
        longest_back_off(self.members, self.round_trip).mul_f64(random_back_off(self.members, rng.f64()))
    }

    /// How long a repair may take to come, the `tries`th time that it is asked for without success.
    pub(super) fn hold_off(&self, class: Class, tries: u8) -> Duration {
        let repair = Duration::from_millis(2) + self.round_trip * 5;
        let queue = match class {
            Class::Demand => Duration::ZERO,
            Class::Bulk => self.pace.queue.min(Self::MAX_QUEUE),
        };
        (repair + queue) * (1 << tries.clamp(1, Self::TRIES).saturating_sub(1))
    }
}

impl Pace {
    /// What may go before a repair of bulk: two bursts.
    const QUEUED: usize = 120 << 10;

    /// A pause as long as this is not the pace of anything.
    const PAUSE: Duration = Duration::from_millis(20);

    fn add(&mut self, now: Duration, bytes: usize) {
        if now >= self.last + Self::PAUSE {
            (self.since, self.bytes) = (now, 0);
        }
        self.last = now;
        self.bytes += bytes;
        if self.bytes >= Self::QUEUED {
            self.queue = now.saturating_sub(self.since);
            (self.since, self.bytes) = (now, 0);
        }
    }
}

impl Alarm {
    pub(super) fn is_due(&self, now: Duration) -> bool {
        self.wake.is_some_and(|wake| wake <= now)
    }

    /// Sees to it that a NACK goes for what may be asked for from `from` on; one that goes before anyhow does not wait.
    pub(super) fn arm(&mut self, from: Duration, timing: &Timing, rng: &mut Rng) {
        let fire = *self.fire.get_or_insert_with(|| from + timing.back_off(rng));
        self.wake_by(fire);
    }

    pub(super) fn wake_by(&mut self, at: Duration) {
        self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
    }
}

/// The truncated exponential distribution of RFC 5401, section 3.2.2 (RandomBackoff), for a longest back-off of 1. `uniform`
/// is a random number from 0 to 1. Most of a large group wait long, so that the first one's repair spares the others.
fn random_back_off(members: u32, uniform: f64) -> f64 {
    let lambda = f64::from(members).ln() + 1.0;
    ((lambda.exp() - 1.0) * uniform + 1.0).ln() / lambda
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_off_is_a_truncated_exponential() {
        let mut rng = Rng::with_seed(1);
        for members in [2, 8, 64, 1000, 10_000] {
            let lambda = f64::from(members).ln() + 1.0;
            let mut times: Vec<f64> = (0..100_000).map(|_| random_back_off(members, rng.f64())).collect();
            times.sort_unstable_by(f64::total_cmp);
            assert!(times[0] >= 0.0 && times[99_999] <= 1.0);
            for decile in 1..10 {
                let time = times[decile * 10_000];
                let expected = ((lambda * time).exp() - 1.0) / (lambda.exp() - 1.0);
                assert!((expected - decile as f64 / 10.0).abs() < 0.01, "{members}: {expected} at {time}");
            }
        }
    }

    #[test]
    fn few_of_a_group_are_first() {
        // How many ask before the first one's NACK has had its effect everywhere, a quarter of the longest back-off later.
        let mut rng = Rng::with_seed(2);
        for members in [8, 100, 10_000_u32] {
            let mut senders = 0;
            for _ in 0..100 {
                let times: Vec<f64> = (0..members).map(|_| random_back_off(members, rng.f64())).collect();
                let first = times.iter().copied().fold(1.0, f64::min);
                senders += times.iter().filter(|time| **time < first + 0.25).count();
            }
            assert!(senders < 100 * 20, "{members} members: {senders} NACKs for 100 losses");
        }
    }

    #[test]
    fn times_follow_the_group() {
        let mut rng = Rng::with_seed(3);
        let ms = Duration::from_millis;
        let timing = |round_trip, members| Timing { round_trip, members, known: true, pace: Pace::default() };
        assert_eq!(timing(ms(1), 1).back_off(&mut rng), Duration::ZERO);
        let far = timing(ms(100), 50);
        assert_eq!(far.tolerance(), ms(25));
        assert!((0..1000).all(|_| far.back_off(&mut rng) <= ms(400)));
        assert!((0..100).any(|_| far.back_off(&mut rng) >= ms(300)));
        assert_eq!(far.hold_off(Class::Demand, 1), ms(502));
        assert_eq!(far.hold_off(Class::Demand, 3), ms(2008));
    }

    #[test]
    fn repairs_of_bulk_are_waited_for_as_long_as_two_bursts_take() {
        let (ms, piece) = (Duration::from_millis, 12 << 10);
        let mut timing = Timing::new();
        let hold_offs = |timing: &Timing| (timing.hold_off(Class::Demand, 1), timing.hold_off(Class::Bulk, 1));
        (0..9).for_each(|at| timing.received(ms(1000 * at), piece));
        assert_eq!(hold_offs(&timing), (ms(7), ms(7)), "what comes now and then tells no pace");
        (0..11).for_each(|at| timing.received(ms(10_000 + 5 * at), piece));
        assert_eq!(hold_offs(&timing), (ms(7), ms(52)));
        (0..19).for_each(|_| timing.received(ms(10_050), piece));
        assert_eq!(hold_offs(&timing), (ms(7), ms(7)));
        (0..10).for_each(|at| timing.received(ms(20_000 + 19 * at), piece));
        assert_eq!(hold_offs(&timing), (ms(7), ms(107)));
    }
}
