use crate::Serial;

/// The numbers of the datagrams with shards: how many are lost, and which arrived before.
#[derive(Debug)]
pub(super) struct Sequence {
    /// The first that concerns this member. Numbers are without wrap here.
    start: u64,
    /// One more than the highest seen.
    next: u64,
    received: u64,
    /// The last [`Sequence::WINDOW`] numbers before `next` that arrived, each at its remainder.
    seen: [u64; Self::WINDOW as usize / 64],
}

/// What a number tells about its datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    New,
    /// Sent before this member joined.
    Early,
    Replayed,
    Old,
    Ahead,
}

impl Sequence {
    /// Numbers within which a replay is told from what comes late: 6 ms at 700,000 datagrams a second, more than networks
    /// hold anything back.
    const WINDOW: u64 = 4096;

    /// How far a shard may lead, unless a pulse says so: six seconds at 700,000 a second. A single forged number must not
    /// shut out what follows.
    const MAX_LEAD: u64 = 1 << 22;

    pub(super) fn new(start: Serial) -> Self {
        let start = (1 << 32) + u64::from(start.get());
        Self { start, next: start, received: 0, seen: [0; Self::WINDOW as usize / 64] }
    }

    /// One more than the highest number seen.
    pub(super) fn next(&self) -> Serial {
        Serial::new(self.next as u32)
    }

    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// What is not there of all numbers so far. What comes late counts until it comes.
    pub(super) fn lost(&self) -> u64 {
        self.next - self.start - self.received
    }

    /// Takes in the number of a shard's datagram.
    pub(super) fn arrived(&mut self, seq: Serial) -> Arrival {
        let number = seq.extend(self.next);
        if number >= self.next {
            if number - self.next > Self::MAX_LEAD {
                return Arrival::Ahead;
            }
            self.advance(number + 1);
        } else if number < self.start {
            return Arrival::Early;
        } else if self.next - number > Self::WINDOW {
            return Arrival::Old;
        }
        let (word, bit) = place(number);
        if self.seen[word] & bit != 0 {
            return Arrival::Replayed;
        }
        self.seen[word] |= bit;
        self.received += 1;
        Arrival::New
    }

    /// Takes in the number that the sender uses next: all before are sent.
    pub(super) fn sent(&mut self, next: Serial) {
        let next = next.extend(self.next);
        if next > self.next {
            self.advance(next);
        }
    }

    fn advance(&mut self, next: u64) {
        if next - self.next >= Self::WINDOW {
            self.seen.fill(0);
        } else {
            for number in self.next..next {
                let (word, bit) = place(number);
                self.seen[word] &= !bit;
            }
        }
        self.next = next;
    }
}

fn place(number: u64) -> (usize, u64) {
    let at = number % Sequence::WINDOW;
    ((at / 64) as usize, 1 << (at % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_wrap_and_pulses_show_what_was_lost_last() {
        let mut sequence = Sequence::new(Serial::new(u32::MAX - 1));
        for seq in [u32::MAX - 1, 0, 1] {
            assert_eq!(sequence.arrived(Serial::new(seq)), Arrival::New);
        }
        assert_eq!((sequence.lost(), sequence.next()), (1, Serial::new(2)));
        sequence.sent(Serial::new(5));
        assert_eq!((sequence.lost(), sequence.received()), (4, 3));
        assert_eq!(sequence.arrived(Serial::new(u32::MAX)), Arrival::New);
        assert_eq!(sequence.arrived(Serial::new(u32::MAX)), Arrival::Replayed);
        assert_eq!(sequence.arrived(Serial::new(u32::MAX - 2)), Arrival::Early);
        sequence.sent(Serial::new(4));
        assert_eq!((sequence.lost(), sequence.next()), (3, Serial::new(5)));
    }

    #[test]
    fn only_a_pulse_leads_far_ahead() {
        let mut sequence = Sequence::new(Serial::new(0));
        let far = Serial::new(1 << 23);
        assert_eq!(sequence.arrived(far), Arrival::Ahead);
        assert_eq!(sequence.arrived(Serial::new(0)), Arrival::New);
        sequence.sent(far);
        assert_eq!(sequence.arrived(far), Arrival::New);
        assert_eq!(sequence.arrived(Serial::new(1)), Arrival::Old);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn each_number_counts_once(start: u32, steps in prop::collection::vec((0..40_u32, any::<bool>()), 0..2000)) {
            let mut sequence = Sequence::new(Serial::new(start));
            let (mut seen, mut next) = (BTreeSet::new(), 0_u32);
            for (back, pulse) in steps {
                let number = (next + 20).saturating_sub(back);
                if pulse && back % 8 == 0 {
                    sequence.sent(Serial::new(start).plus(number));
                    next = next.max(number);
                    continue;
                }
                let expected = if seen.insert(number) { Arrival::New } else { Arrival::Replayed };
                prop_assert_eq!(sequence.arrived(Serial::new(start).plus(number)), expected);
                next = next.max(number + 1);
            }
            prop_assert_eq!(sequence.received(), seen.len() as u64);
            prop_assert_eq!(sequence.lost(), u64::from(next) - seen.len() as u64);
        }
    }
}
