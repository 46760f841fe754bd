use std::str::FromStr;

use thiserror::Error;

/// What the threads of an embedded guest do with its memory, in text such as `random,touches=20%,writes=30%,discards=1%`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Workload {
    /// Where they go.
    pub pattern: Pattern,
    /// How many touches there are, as a share of the guest's pages.
    pub touches: f64,
    /// The share of touches that write.
    pub writes: f64,
    /// The share of touches that give memory up instead.
    pub discards: f64,
    /// The share of touches that overwrite whole pages instead, and say so before.
    pub overwrites: f64,
    /// What makes the workload repeatable.
    pub seed: u64,
}

/// Where touches go.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pattern {
    /// One page after the other, each thread from another place on.
    Sequential,
    /// Every so many pages.
    Strided(u64),
    /// Anywhere.
    Random,
    /// Nine of ten touches to this share of the memory, the others anywhere.
    Hot(f64),
}

/// A text that is no workload.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "{part:?} of the workload {text:?} is not understood: it begins with sequential, strided:PAGES, random or hot:PERCENT%, \
     then come touches=PERCENT%, writes=PERCENT%, discards=PERCENT%, \
     overwrites=PERCENT%, seed=NUMBER"
)]
pub struct ParseWorkloadError {
    part: String,
    text: String,
}

impl Default for Workload {
    /// A guest that works on a fifth of its memory here and there.
    fn default() -> Self {
        Self { pattern: Pattern::Random, touches: 0.2, writes: 0.3, discards: 0.01, overwrites: 0.0, seed: 1 }
    }
}

impl FromStr for Workload {
    type Err = ParseWorkloadError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut workload = Workload::default();
        for (index, part) in text.split(',').enumerate() {
            let error = || ParseWorkloadError { part: part.into(), text: text.into() };
            if index == 0 {
                workload.pattern = pattern(part).ok_or_else(error)?;
                continue;
            }
            let (name, value) = part.split_once('=').ok_or_else(error)?;
            match name {
                "touches" => workload.touches = percent(value).ok_or_else(error)?,
                "writes" => workload.writes = percent(value).filter(|share| *share <= 1.0).ok_or_else(error)?,
                "discards" => workload.discards = percent(value).filter(|share| *share <= 1.0).ok_or_else(error)?,
                "overwrites" => workload.overwrites = percent(value).filter(|share| *share <= 1.0).ok_or_else(error)?,
                "seed" => workload.seed = value.parse().map_err(|_| error())?,
                _ => return Err(error()),
            }
        }
        Ok(workload)
    }
}

fn pattern(text: &str) -> Option<Pattern> {
    match text.split_once(':') {
        None if text == "sequential" => Some(Pattern::Sequential),
        None if text == "random" => Some(Pattern::Random),
        Some(("strided", pages)) => pages.parse().ok().filter(|pages| *pages > 0).map(Pattern::Strided),
        Some(("hot", share)) => percent(share).filter(|share| *share > 0.0 && *share <= 1.0).map(Pattern::Hot),
        _ => None,
    }
}

fn percent(text: &str) -> Option<f64> {
    let number: f64 = text.strip_suffix('%')?.parse().ok()?;
    (number.is_finite() && (0.0..=10_000.0).contains(&number)).then_some(number / 100.0)
}

/// What a thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Touch {
    Read,
    Write,
    Discard,
    Overwrite,
}

/// The touches of one thread: where (an index below `pages`), and what.
pub(super) struct Steps {
    workload: Workload,
    pages: u64,
    next: u64,
    random: Random,
}

impl Steps {
    pub(super) fn new(workload: Workload, pages: u64, thread: u64, threads: u64) -> Self {
        let next = (u128::from(pages) * u128::from(thread) / u128::from(threads.max(1))) as u64;
        let random = Random(workload.seed.wrapping_add(thread.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        Self { workload, pages, next, random }
    }

    /// How many touches each of `threads` threads makes, at least one.
    pub(super) fn count(&self, threads: u64) -> u64 {
        ((self.pages as f64 * self.workload.touches / threads.max(1) as f64) as u64).max(1)
    }

    pub(super) fn next(&mut self) -> (u64, Touch) {
        let place = match self.workload.pattern {
            Pattern::Sequential => self.advance(1),
            Pattern::Strided(stride) => self.advance(stride),
            Pattern::Random => self.random.below(self.pages),
            Pattern::Hot(share) => {
                let hot = ((self.pages as f64 * share) as u64).max(1);
                let everywhere = self.random.below(10) == 0;
                self.random.below(if everywhere { self.pages } else { hot })
            }
        };
        let dice = self.random.fraction();
        let Workload { writes, discards, overwrites, .. } = self.workload;
        let touch = if dice < discards {
            Touch::Discard
        } else if dice < discards + writes {
            Touch::Write
        } else if dice < discards + writes + overwrites {
            Touch::Overwrite
        } else {
            Touch::Read
        };
        (place, touch)
    }

    /// Goes on by `stride`; past the end from the start again, one page further on so that strides meet every page in time.
    fn advance(&mut self, stride: u64) -> u64 {
        let place = self.next;
        self.next += stride;
        if self.next >= self.pages {
            self.next = if stride == 1 { 0 } else { (place % stride + 1) % stride.min(self.pages).max(1) };
        }
        place
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }

    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Spreads a number over all 64 bits.
pub(super) fn mix(number: u64) -> u64 {
    let z = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_are_parsed() {
        let workload: Workload = "hot:5%,touches=200%,writes=50%,discards=0%,overwrites=2%,seed=9".parse().unwrap();
        let (pattern, touches, writes) = (Pattern::Hot(0.05), 2.0, 0.5);
        let expected = Workload { pattern, touches, writes, discards: 0.0, overwrites: 0.02, seed: 9 };
        assert_eq!(workload, expected);
        assert_eq!("strided:8".parse::<Workload>().unwrap().pattern, Pattern::Strided(8));
        for wrong in ["", "hot", "strided:0", "random,touches=5", "random,writes=101%", "random,x=1%", "random,seed=-1"]
        {
            assert!(wrong.parse::<Workload>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn steps_stay_within_the_guest() {
        for text in ["sequential", "strided:7", "strided:1000", "random", "hot:3%"] {
            for thread in 0..3 {
                let mut steps = Steps::new(text.parse().unwrap(), 100, thread, 3);
                assert!((0..10_000).all(|_| steps.next().0 < 100), "{text}");
            }
        }
    }

    #[test]
    fn strides_meet_every_page() {
        let mut steps = Steps::new("strided:7".parse().unwrap(), 100, 0, 1);
        let mut met: Vec<u64> = (0..100).map(|_| steps.next().0).collect();
        met.sort_unstable();
        met.dedup();
        assert_eq!(met.len(), 100);
    }
}
