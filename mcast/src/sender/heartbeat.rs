use std::collections::VecDeque;
use std::time::Duration;

/// When a heartbeat is due, and what was sent before each of the last.
///
/// A heartbeat shows members that the last shards before it are lost. So one follows soon on whatever may have been the last
/// for a while, and then, since it may be lost too, others at doubling intervals.
#[derive(Debug)]
pub(super) struct Heartbeat {
    due: Duration,
    interval: Duration,
    /// When each of the last pulses was sent, in microseconds, and the next datagram then.
    sent: VecDeque<(u64, u64)>,
}

impl Heartbeat {
    /// The first follows so soon on a last shard: no sooner than reordering would pass for a loss.
    const FIRST: Duration = Duration::from_millis(1);

    /// The interval while bulk flows, whose own shards show most losses.
    const ACTIVE: Duration = Duration::from_millis(20);

    /// The interval when nothing happens. Members take a channel for silent after three of them.
    const IDLE: Duration = Duration::from_millis(250);

    /// Pulses whose echo is recognised: a second of them while bulk flows.
    const SENT: usize = 64;

    pub(super) fn new(now: Duration) -> Self {
        Self { due: now, interval: Self::IDLE, sent: VecDeque::with_capacity(Self::SENT) }
    }

    pub(super) fn due(&self) -> Duration {
        self.due
    }

    /// Notes that what was sent now may be the last for a while.
    pub(super) fn soon(&mut self, now: Duration) {
        // One that is due sooner shows the same, if it is not due at once.
        self.interval = Self::FIRST;
        if self.due < now || self.due > now + Self::FIRST {
            self.due = now + Self::FIRST;
        }
    }

    /// Makes one due at once, and others soon after.
    pub(super) fn now(&mut self, now: Duration) {
        (self.interval, self.due) = (Self::FIRST, now);
    }

    /// Notes that a pulse is sent; `busy` while bulk flows.
    pub(super) fn sent(&mut self, now: Duration, seq: u64, busy: bool) {
        self.due = now + self.interval;
        self.interval = (self.interval * 2).min(if busy { Self::ACTIVE } else { Self::IDLE });
        if self.sent.len() == Self::SENT {
            self.sent.pop_front();
        }
        self.sent.push_back((now.as_micros() as u64, seq));
    }

    /// The next datagram when the pulse of that time was sent.
    pub(super) fn echoed(&self, echo: Duration) -> Option<u64> {
        let echo = echo.as_micros() as u64;
        self.sent.iter().rev().find(|(sent, _)| *sent == echo).map(|(_, seq)| *seq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn intervals_double_until_idle() {
        let mut heartbeat = Heartbeat::new(ms(0));
        heartbeat.sent(ms(0), 0, false);
        assert_eq!(heartbeat.due(), ms(250));
        heartbeat.soon(ms(100));
        let mut dues = Vec::new();
        for seq in 0..10 {
            dues.push(heartbeat.due());
            heartbeat.sent(heartbeat.due(), seq, false);
        }
        assert_eq!(dues, [101, 102, 104, 108, 116, 132, 164, 228, 356, 606].map(ms));
        heartbeat.sent(ms(1000), 0, true);
        heartbeat.sent(ms(1001), 0, true);
        assert_eq!(heartbeat.due(), ms(1021));
    }

    #[test]
    fn echoes_are_recognised_for_a_while() {
        let mut heartbeat = Heartbeat::new(ms(0));
        (0..100).for_each(|seq| heartbeat.sent(ms(seq), seq * 10, false));
        assert_eq!(heartbeat.echoed(ms(99)), Some(990));
        assert_eq!(heartbeat.echoed(ms(36)), Some(360));
        assert_eq!((heartbeat.echoed(ms(35)), heartbeat.echoed(Duration::from_micros(99_001))), (None, None));
    }
}
