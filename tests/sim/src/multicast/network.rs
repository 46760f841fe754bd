//! Paths of datagrams that lose them in various ways, and sockets that overflow.

use std::time::Duration;

use fastrand::Rng;

/// How a path loses datagrams, overload aside.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Loss {
    /// Each with this probability, whatever became of the others.
    Independent(f64),
    /// In bursts, as Gilbert and Elliott model them: the path changes between a good state, which loses nothing, and a bad
    /// one.
    Bursty {
        /// The probability that a datagram finds the state changed to the bad one.
        enter: f64,
        /// And back to the good one.
        leave: f64,
        /// The probability of a loss in the bad state.
        bad: f64,
    },
}

/// What a path does to datagrams.
#[derive(Clone, Copy, Debug)]
pub struct Quality {
    /// The shortest way through.
    pub delay: Duration,
    /// How much longer those take that are overtaken, at most.
    pub lag: Duration,
    /// The share of datagrams that others may overtake.
    pub overtaken: f64,
    /// The share of datagrams that come twice.
    pub duplicated: f64,
    /// What is lost.
    pub loss: Loss,
    /// Bytes a second.
    pub rate: u64,
    /// Bytes that wait for the link; what comes on top is lost.
    pub queue: u64,
}

/// One direction of a path.
#[derive(Clone, Debug)]
pub struct Path {
    quality: Quality,
    free_at: Duration,
    bad: bool,
}

/// When a datagram that was not lost arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed {
    /// When it would have arrived in order, so that those behind it do not wait for it.
    pub at: Duration,
    /// How much later it arrives, and its duplicate if there is one.
    pub lags: [Option<Duration>; 2],
}

/// The buffer of a socket, and whoever empties it.
#[derive(Clone, Debug)]
pub struct Socket {
    /// Bytes that wait in it, at most.
    pub buffer: u64,
    /// Bytes a second that its owner takes.
    pub speed: u64,
    /// When its owner stands still, from and until.
    pub stall: Option<(Duration, Duration)>,
    /// Datagrams for which there was no room.
    pub overflow: u32,
    free_at: Duration,
}

impl Loss {
    /// Bursts of `length` datagrams on average, which make for a loss of `mean` altogether.
    pub fn bursty(mean: f64, length: f64) -> Self {
        let bad = 0.9;
        let leave = 1.0 / length;
        // Of all datagrams, enter / (enter + leave) find the bad state.
        let share = (mean / bad).min(0.9);
        Self::Bursty { enter: leave * share / (1.0 - share), leave, bad }
    }

    /// The share that is lost in the long run.
    pub fn mean(self) -> f64 {
        match self {
            Loss::Independent(loss) => loss,
            Loss::Bursty { enter, leave, bad } => bad * enter / (enter + leave),
        }
    }
}

impl Quality {
    /// A path in a rack: nothing is lost, 10 Gbit/s, 20 us.
    pub const GOOD: Quality = Quality {
        delay: Duration::from_micros(20),
        lag: Duration::ZERO,
        overtaken: 0.0,
        duplicated: 0.0,
        loss: Loss::Independent(0.0),
        rate: 1_250_000_000,
        queue: 1 << 20,
    };
}

impl Passed {
    /// When each copy arrives.
    pub fn arrivals(self) -> impl Iterator<Item = Duration> {
        self.lags.into_iter().flatten().map(move |lag| self.at + lag)
    }
}

impl Path {
    /// A path with nothing on it.
    pub fn new(quality: Quality) -> Self {
        Self { quality, free_at: Duration::ZERO, bad: false }
    }

    /// When the link has sent all that waits for it.
    pub fn free_at(&self) -> Duration {
        self.free_at
    }

    /// When a datagram that is sent now arrives; `None` when it does not.
    pub fn pass(&mut self, now: Duration, bytes: usize, rng: &mut Rng) -> Option<Passed> {
        let start = self.free_at.max(now);
        let waiting = (start - now).as_nanos() as u64 * (self.quality.rate / 1000) / 1_000_000;
        if waiting + bytes as u64 > self.quality.queue {
            return None;
        }
        self.free_at = start + transmission(bytes, self.quality.rate);
        if self.loses(rng) {
            return None;
        }
        let mut lag = || self.quality.lag.mul_f64(rng.f64());
        let lags = [lag(), lag()];
        let first = if chance(self.quality.overtaken, rng) { lags[0] } else { Duration::ZERO };
        let second = chance(self.quality.duplicated, rng).then_some(lags[1]);
        Some(Passed { at: self.free_at + self.quality.delay, lags: [Some(first), second] })
    }

    fn loses(&mut self, rng: &mut Rng) -> bool {
        match self.quality.loss {
            Loss::Independent(loss) => chance(loss, rng),
            Loss::Bursty { enter, leave, bad } => {
                if chance(if self.bad { leave } else { enter }, rng) {
                    self.bad = !self.bad;
                }
                self.bad && chance(bad, rng)
            }
        }
    }
}

impl Socket {
    /// An empty socket.
    pub fn new(buffer: u64, speed: u64) -> Self {
        Self { buffer, speed, stall: None, overflow: 0, free_at: Duration::ZERO }
    }

    /// When the owner has taken a datagram that arrives at `at`; `None` when there is no room for it.
    pub fn take(&mut self, at: Duration, bytes: usize) -> Option<Duration> {
        let start = self.awake(at);
        let waiting = self.free_at.saturating_sub(start).as_nanos() as u64 * (self.speed / 1000) / 1_000_000;
        if waiting + bytes as u64 > self.buffer {
            self.overflow = self.overflow.wrapping_add(1);
            return None;
        }
        self.free_at = self.free_at.max(start) + transmission(bytes, self.speed);
        Some(self.free_at)
    }

    /// `at`, or the end of the stall that `at` lies in.
    pub fn awake(&self, at: Duration) -> Duration {
        self.stall.filter(|(from, until)| (*from..*until).contains(&at)).map_or(at, |(_, until)| until)
    }
}

/// True with this probability.
pub fn chance(probability: f64, rng: &mut Rng) -> bool {
    probability > 0.0 && rng.f64() < probability
}

fn transmission(bytes: usize, rate: u64) -> Duration {
    Duration::from_nanos(bytes as u64 * 1_000_000 / (rate / 1000).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn losses(loss: Loss) -> Vec<bool> {
        let mut path = Path::new(Quality { loss, ..Quality::GOOD });
        let rng = &mut Rng::with_seed(1);
        (0..200_000).map(|at| path.pass(Duration::from_micros(at * 10), 1500, rng).is_none()).collect()
    }

    fn mean(lost: &[bool]) -> f64 {
        lost.iter().filter(|lost| **lost).count() as f64 / lost.len() as f64
    }

    #[test]
    fn losses_are_as_many_as_said() {
        for loss in [0.0, 0.01, 0.3] {
            assert!((mean(&losses(Loss::Independent(loss))) - loss).abs() < 0.005);
            let bursty = Loss::bursty(loss, 10.0);
            assert!((bursty.mean() - loss).abs() < 1e-9);
            assert!((mean(&losses(bursty)) - loss).abs() < 0.02, "{loss}");
        }
    }

    #[test]
    fn bursts_are_longer_than_chance() {
        let pairs = |lost: &[bool]| lost.windows(2).filter(|pair| pair[0] && pair[1]).count();
        let (independent, bursty) = (losses(Loss::Independent(0.05)), losses(Loss::bursty(0.05, 10.0)));
        assert!(pairs(&bursty) > 5 * pairs(&independent));
    }

    #[test]
    fn a_link_that_is_offered_too_much_loses() {
        let rng = &mut Rng::with_seed(1);
        let mut path = Path::new(Quality { rate: 1_500_000, queue: 15_000, ..Quality::GOOD });
        let passed: Vec<_> = (0..100).map(|_| path.pass(Duration::ZERO, 1500, rng)).collect();
        assert_eq!(passed.iter().flatten().count(), 10);
        assert_eq!(passed[0].unwrap().at, Duration::from_micros(1020));
        assert!(path.pass(Duration::from_millis(1), 1500, rng).is_some(), "one has left the queue");
        assert!(path.pass(Duration::from_millis(1), 1500, rng).is_none());
    }

    #[test]
    fn a_socket_overflows_while_its_owner_stands_still() {
        let ms = Duration::from_millis;
        let mut socket = Socket::new(3000, 1_000_000_000);
        socket.stall = Some((ms(1), ms(10)));
        let taken: Vec<_> = (0..4).map(|at| socket.take(ms(at), 1000)).collect();
        assert!(taken[0] < Some(ms(1)) && taken[3] > Some(ms(10)) && taken[3] < Some(ms(11)));
        assert_eq!((socket.take(ms(5), 1000), socket.overflow), (None, 1));
        assert!(socket.take(ms(11), 1000).is_some());
    }

    #[test]
    fn some_are_overtaken_and_some_come_twice() {
        let lag = Duration::from_millis(1);
        let mut path = Path::new(Quality { lag, overtaken: 0.1, duplicated: 0.1, ..Quality::GOOD });
        let rng = &mut Rng::with_seed(1);
        let passed: Vec<_> = (0..10_000).map(|at| path.pass(Duration::from_micros(at * 10), 100, rng)).collect();
        let passed: Vec<_> = passed.into_iter().flatten().collect();
        let twice = passed.iter().filter(|passed| passed.lags[1].is_some()).count();
        let late = |passed: &Passed| passed.arrivals().next();
        let overtaken = passed.windows(2).filter(|pair| late(&pair[0]) > late(&pair[1])).count();
        assert!((800..1200).contains(&twice) && (800..1200).contains(&overtaken), "{twice} {overtaken}");
    }
}
