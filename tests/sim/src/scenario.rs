//! What a run consists of and what may go wrong in it, drawn from its seed.

use std::num::NonZeroU64;
use std::time::Duration;

use descriptor::fetch::Limits;
use descriptor::{FrameRange, Gfn, PageCount};
use fastrand::Rng;
use memtap::pager::{Hydrate, Prefetch, Retry};

use crate::image::Image;
use crate::network::Quality;

/// What a run consists of.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Where everything else came from, and the source of what is random in the run.
    pub seed: u64,
    /// The parent's image.
    pub image: Image,
    /// Frames that are installed at once.
    pub granule: u64,
    /// The number of clones.
    pub clones: usize,
    /// Threads of each guest.
    pub threads: u32,
    /// Accesses of each thread.
    pub accesses: u32,
    /// Accesses in a thousand that give memory up.
    pub discards: u32,
    /// Accesses in a thousand that overwrite a page wholly, and say so before.
    pub overwrites: u32,
    /// Installations in a thousand that find the port busy.
    pub busy: u32,
    /// Installing wakes the waiters; otherwise they are resumed one by one.
    pub wakes: bool,
    /// Zeros must be installed too.
    pub needs_zeros: bool,
    /// Datagrams instead of streams.
    pub datagrams: bool,
    /// How both directions of the network are.
    pub quality: Quality,
    /// Times at which the network fails, and for how long.
    pub outages: Vec<(Duration, Duration)>,
    /// Requests in a thousand that are answered with an error.
    pub errors: u32,
    /// A page that can never be read.
    pub bad: Option<Gfn>,
    /// What the server allows.
    pub limits: Limits,
    /// Frames that must be there first.
    pub eager: Vec<FrameRange>,
    /// Frames that are best fetched first.
    pub order: Vec<FrameRange>,
    /// The pagers' policies.
    pub prefetch: Prefetch,
    /// The pagers' policies.
    pub hydrate: Hydrate,
    /// The pagers' policies.
    pub retry: Retry,
    /// The pagers' policies.
    pub patience: Duration,
    /// Clones tell what they need, and are told what others needed.
    pub working_set: bool,
    /// The pagers' policies.
    pub head_start: Duration,
    /// The pagers' policies.
    pub zero_around: PageCount,
}

impl Scenario {
    /// The scenario that `seed` stands for.
    pub fn draw(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let rng = &mut rng;
        let granule = if rng.u8(0..8) == 0 { 512 } else { 1 };
        let frames = if granule == 1 { 8 << rng.u32(0..6) } else { rng.u64(1..4) * granule };
        let image = Image::draw(rng, frames, granule);
        let universe = image.memory.universe().get();
        let troubled = rng.u8(0..3) > 0;
        let datagrams = rng.u8(0..3) == 0;
        let quality = Quality {
            delay: Duration::from_micros(rng.u64(5..500)),
            jitter: Duration::from_micros(if troubled { rng.u64(0..2000) } else { 10 }),
            rate: 100 << rng.u32(0..7),
            loss: if troubled && datagrams { rng.u32(0..200) } else { 0 },
            duplication: if troubled && datagrams { rng.u32(0..200) } else { 0 },
        };
        let mut outages = Vec::new();
        if troubled && rng.bool() {
            for _ in 0..rng.u32(1..4) {
                let start = Duration::from_micros(rng.u64(0..50_000));
                outages.push((start, Duration::from_micros(rng.u64(0..100_000))));
            }
        }
        if troubled && rng.u8(0..20) == 0 {
            outages.push((Duration::from_micros(rng.u64(0..10_000)), Duration::from_secs(3600)));
        }
        let bad = (troubled && rng.u8(0..10) == 0).then(|| Gfn::new(rng.u64(0..universe)));
        let mut ranges = |share: u8, most: usize| {
            let count = if rng.u8(0..share) == 0 { rng.usize(1..=most) } else { 0 };
            let range = |start: u64, count: u64| FrameRange::new(Gfn::new(start), PageCount::new(count));
            let mut draw = || {
                let start = rng.u64(0..universe);
                range(start, rng.u64(1..40).min(universe - start))
            };
            (0..count).map(|_| draw()).collect::<Vec<_>>()
        };
        let (eager, order) = (ranges(2, 4), ranges(2, 8));
        Self {
            granule,
            clones: rng.usize(1..4),
            threads: rng.u32(1..6),
            accesses: rng.u32(1..40),
            discards: if rng.bool() { rng.u32(0..100) } else { 0 },
            overwrites: if rng.bool() { rng.u32(0..200) } else { 0 },
            busy: if troubled && rng.bool() { rng.u32(0..300) } else { 0 },
            wakes: rng.bool(),
            needs_zeros: rng.u8(0..3) == 0,
            datagrams,
            quality,
            outages,
            errors: if troubled && rng.u8(0..3) == 0 { rng.u32(0..50) } else { 0 },
            bad,
            limits: Limits {
                max_requests: 1 << rng.u32(0..8),
                max_pages: 1 << rng.u32(0..13),
                idle_timeout_ms: 30_000,
            },
            eager,
            order,
            prefetch: match rng.u8(0..4) {
                0 => Prefetch::Off,
                1 => Prefetch::Fixed(PageCount::new(rng.u64(1..16))),
                _ => Prefetch::Adaptive { max: PageCount::new(1 << rng.u32(0..11)) },
            },
            hydrate: match rng.u8(0..4) {
                0 => Hydrate::Off,
                1 => Hydrate::Rate(NonZeroU64::new(rng.u64(100..1_000_000)).expect("not zero")),
                _ => Hydrate::Now,
            },
            retry: if datagrams { Retry::LOSSY } else { Retry::STREAM },
            patience: Duration::from_secs(5),
            zero_around: PageCount::new(1 << rng.u32(0..9)),
            // There is no session that could agree on it.
            working_set: !datagrams && rng.bool(),
            head_start: if !datagrams && rng.u8(0..4) == 0 {
                Duration::from_micros(rng.u64(0..20_000))
            } else {
                Duration::ZERO
            },
            seed,
            image,
        }
    }

    /// The same scenario over streams, where nothing goes wrong and nothing is fetched in the background.
    pub fn without_mishaps(self) -> Self {
        let quality = Quality { loss: 0, duplication: 0, jitter: Duration::from_micros(10), ..self.quality };
        Self {
            quality,
            discards: 0,
            busy: 0,
            datagrams: false,
            outages: Vec::new(),
            errors: 0,
            bad: None,
            limits: Limits { max_requests: 64, max_pages: 8192, ..self.limits },
            eager: Vec::new(),
            order: Vec::new(),
            hydrate: Hydrate::Off,
            retry: Retry::STREAM,
            ..self
        }
    }

    /// True when a pager has a reason to give up.
    pub fn may_fail(&self) -> bool {
        let longest = self.outages.iter().map(|(_, length)| *length).max().unwrap_or_default();
        // Datagrams need no connection: their pagers notice an outage by missing answers only.
        self.bad.is_some() || longest >= self.patience
    }

    /// True when nothing goes wrong, so that every fault must be answered soon.
    pub fn is_calm(&self) -> bool {
        self.outages.is_empty()
            && self.quality.loss == 0
            && self.errors == 0
            && self.bad.is_none()
            && self.busy == 0
            && self.discards == 0
            && self.granule == 1
            && self.limits.max_requests >= 8
            && self.limits.max_pages >= 64
    }

    /// The time for which a calm network may be taken by what was sent before a demand page, and by the page's batch.
    pub fn calm_extra(&self) -> Duration {
        let quality = &self.quality;
        let bytes = 2 * 3 * 256 * 4096;
        (quality.delay + quality.jitter) * 8 + Duration::from_nanos(bytes * 1000 / quality.rate)
    }
}
