//! Streams of faults, and how far ahead to follow each.
//!
//! A fault on the course of a stream, at or behind what was fetched ahead for it, shows that the guest used what was fetched:
//! the stream's window doubles. Faults that belong to no stream make the windows of silent streams shrink until they are
//! forgotten. So a random workload fetches nothing ahead, and a sequential one soon faults once in a window.
//!
//! Positions and lengths are in granules.

use super::config::Prefetch;

/// Streams at one time: some per vCPU of a usual guest.
const MAX_STREAMS: usize = 16;

/// The longest stride followed: 256 KiB at 4 KiB pages. Pages farther apart than that are unlikely to be one loop.
const MAX_STRIDE: i64 = 64;

/// The window of a new stream, in steps.
const FIRST_WINDOW: u64 = 4;

/// A stream's window halves when this many faults elsewhere came since it was last heard of.
const SILENCE: u32 = 32;

#[derive(Debug)]
pub(super) struct Streams {
    policy: Prefetch,
    granule: u64,
    streams: Vec<Stream>,
    used: Option<Ahead>,
}

/// Positions to fetch ahead: `count` of them from `start` on, `stride` apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ahead {
    pub(super) start: i64,
    pub(super) stride: i64,
    pub(super) count: u64,
}

#[derive(Debug)]
struct Stream {
    /// The position of the last fault.
    last: i64,
    /// The distance between two positions; 0 after a first fault, when there is none.
    stride: i64,
    /// False until a second distance confirmed the stride.
    confirmed: bool,
    /// Steps to be fetched ahead of `last`.
    window: u64,
    /// The first position that was not fetched ahead.
    next: i64,
    silent: u32,
}

impl Streams {
    pub(super) fn new(policy: Prefetch, granule: u64) -> Self {
        Self { policy, granule, streams: Vec::new(), used: None }
    }

    /// What to fetch ahead after a fault at `position`.
    pub(super) fn fault(&mut self, position: i64) -> Option<Ahead> {
        let max = match self.policy {
            Prefetch::Off => return None,
            Prefetch::Fixed(pages) => {
                let count = pages.get().div_ceil(self.granule);
                // Nothing tells whether they are used, but for the next clone to fetch the same is no loss.
                self.used = (count > 0).then_some(Ahead { start: position + 1, stride: 1, count });
                return self.used;
            }
            Prefetch::Around(pages) => {
                let count = (pages.get() / self.granule).max(1);
                let start = position - position.rem_euclid(count as i64);
                self.used = (count > 1).then_some(Ahead { start, stride: 1, count });
                return self.used;
            }
            Prefetch::Adaptive { max } => max.get() / self.granule,
        };
        if max == 0 {
            return None;
        }
        if let Some(index) = self.streams.iter().position(|stream| stream.is_on_course(position)) {
            // The most recently heard of stands last.
            let mut stream = self.streams.remove(index);
            self.used = stream.passed(position);
            let ahead = stream.advance(position, max);
            self.streams.push(stream);
            return ahead;
        }
        self.miss();
        if let Some(index) = self.streams.iter().rposition(|stream| stream.could_turn_to(position)) {
            let mut stream = self.streams.remove(index);
            let ahead = stream.turn_to(position, max);
            self.streams.push(stream);
            return ahead;
        }
        if self.streams.len() == MAX_STREAMS {
            self.streams.remove(0);
        }
        self.streams.push(Stream { last: position, stride: 0, confirmed: false, window: 0, next: 0, silent: 0 });
        None
    }

    /// What was fetched ahead before the last fault and was used, as that showed.
    pub(super) fn take_used(&mut self) -> Option<Ahead> {
        self.used.take()
    }

    fn miss(&mut self) {
        for stream in &mut self.streams {
            stream.silent += 1;
            if stream.silent == SILENCE {
                stream.silent = 0;
                stream.window /= 2;
            }
        }
        self.streams.retain(|stream| stream.window > 0 || stream.silent > 0 || !stream.confirmed);
    }
}

impl Stream {
    /// True for a position that is ahead by a whole number of strides, no farther than just beyond the window.
    fn is_on_course(&self, position: i64) -> bool {
        let distance = position - self.last;
        if !self.confirmed || distance % self.stride != 0 {
            return false;
        }
        let steps = distance / self.stride;
        (1..=self.window as i64 + 2).contains(&steps)
    }

    fn could_turn_to(&self, position: i64) -> bool {
        let distance = position - self.last;
        !self.confirmed && distance != 0 && distance.abs() <= MAX_STRIDE
    }

    /// Takes `position` as the stream's next. Neighbours are a stream at once, other strides when they repeat.
    fn turn_to(&mut self, position: i64, max: u64) -> Option<Ahead> {
        let stride = position - self.last;
        self.confirmed = stride.abs() == 1 || stride == self.stride;
        (self.last, self.stride, self.silent) = (position, stride, 0);
        if !self.confirmed {
            return None;
        }
        self.window = FIRST_WINDOW.min(max);
        self.next = position + stride;
        self.plan()
    }

    /// What was fetched ahead and lies between the last position and this one, which is on course.
    fn passed(&self, position: i64) -> Option<Ahead> {
        let steps = ((position - self.last) / self.stride).min((self.next - self.last) / self.stride);
        let count = u64::try_from(steps - 1).ok().filter(|count| *count > 0)?;
        Some(Ahead { start: self.last + self.stride, stride: self.stride, count })
    }

    fn advance(&mut self, position: i64, max: u64) -> Option<Ahead> {
        self.window = (self.window * 2).clamp(1, max);
        (self.last, self.silent) = (position, 0);
        if (position - self.next) / self.stride >= 0 {
            self.next = position + self.stride;
        }
        self.plan()
    }

    /// What the window holds and was not fetched yet.
    fn plan(&mut self) -> Option<Ahead> {
        let end = self.last + self.stride * (self.window as i64 + 1);
        let count = (end - self.next) / self.stride;
        let ahead = Ahead { start: self.next, stride: self.stride, count: u64::try_from(count).ok()? };
        self.next = end;
        (ahead.count > 0).then_some(ahead)
    }
}

#[cfg(test)]
mod tests {
    use descriptor::PageCount;

    use super::*;

    fn adaptive() -> Streams {
        Streams::new(Prefetch::Adaptive { max: PageCount::new(256) }, 1)
    }

    /// Faults on every position of `course` that was not fetched ahead; the number of faults and of pages fetched ahead.
    fn follow(streams: &mut Streams, course: impl Iterator<Item = i64>) -> (usize, u64) {
        let mut ahead = std::collections::BTreeSet::new();
        let (mut faults, mut fetched) = (0, 0);
        for position in course {
            if !ahead.contains(&position) {
                faults += 1;
                if let Some(Ahead { start, stride, count }) = streams.fault(position) {
                    fetched += count;
                    ahead.extend((0..count as i64).map(|n| start + n * stride));
                }
            }
        }
        (faults, fetched)
    }

    #[test]
    fn sequential_streams_soon_fault_once_in_a_window() {
        let (faults, fetched) = follow(&mut adaptive(), 1000..5000);
        assert!(faults < 30, "{faults} faults");
        assert!(fetched < 4000 + 300);
        let (faults, _) = follow(&mut adaptive(), (1000..5000).rev());
        assert!(faults < 30, "{faults} faults downwards");
    }

    #[test]
    fn strided_streams_are_followed() {
        let (faults, _) = follow(&mut adaptive(), (0..2000).map(|n| 1000 + n * 7));
        assert!(faults < 30, "{faults} faults");
    }

    #[test]
    fn interleaved_streams_are_told_apart() {
        let course = (0..2000).flat_map(|n| [1000 + n, 1_000_000 - n, 5_000_000 + 3 * n]);
        let (faults, _) = follow(&mut adaptive(), course);
        assert!(faults < 100, "{faults} faults");
    }

    #[test]
    fn random_faults_fetch_next_to_nothing() {
        let mut position = 1_i64;
        let course = std::iter::from_fn(move || {
            position = position.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            Some((position >> 40).abs())
        });
        let (faults, fetched) = follow(&mut adaptive(), course.take(4000));
        assert!(fetched * 20 < faults as u64, "{fetched} pages for {faults} faults");
    }

    #[test]
    fn silent_streams_shrink() {
        let mut streams = adaptive();
        follow(&mut streams, 1000..3000);
        let window = |streams: &Streams| streams.streams.iter().map(|stream| stream.window).max();
        assert_eq!(window(&streams), Some(256));
        for n in 0..i64::from(SILENCE) {
            streams.streams.retain(|stream| stream.confirmed);
            assert_eq!(streams.fault(1_000_000 + n * 1000), None);
        }
        assert_eq!(window(&streams), Some(128));
    }

    #[test]
    fn what_a_stream_used_is_known_once_it_has_passed() {
        let mut streams = adaptive();
        let mut used: std::collections::BTreeSet<i64> = std::collections::BTreeSet::new();
        let mut ahead = std::collections::BTreeSet::new();
        for position in (0..600).map(|n| 1000 + n * 3).filter(|n| *n != 1300) {
            if !ahead.contains(&position) {
                used.insert(position);
                let Ahead { start, stride, count } =
                    streams.fault(position).unwrap_or(Ahead { start: 0, stride: 1, count: 0 });
                ahead.extend((0..count as i64).map(|n| start + n * stride));
                if let Some(Ahead { start, stride, count }) = streams.take_used() {
                    used.extend((0..count as i64).map(|n| start + n * stride));
                }
            }
        }
        assert!(used.iter().all(|position| (position - 1000) % 3 == 0 && *position < 2800), "{used:?}");
        assert!(used.len() > 400, "{} of 599", used.len());
    }

    #[test]
    fn fixed_and_off() {
        let mut fixed = Streams::new(Prefetch::Fixed(PageCount::new(8)), 1);
        assert_eq!(fixed.fault(10), Some(Ahead { start: 11, stride: 1, count: 8 }));
        let mut around = Streams::new(Prefetch::Around(PageCount::new(16)), 1);
        assert_eq!(around.fault(37), Some(Ahead { start: 32, stride: 1, count: 16 }));
        assert_eq!(Streams::new(Prefetch::Off, 1).fault(10), None);
    }
}
