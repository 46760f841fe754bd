use std::num::NonZeroU64;
use std::time::Duration;

use descriptor::memory::MemoryMap;
use descriptor::{Descriptor, FrameRange, FrameSet, Gfn, PageCount};
use thiserror::Error;

use crate::port::PortTraits;

/// What a pager must know of its clone, its port, and how eagerly it is to fetch.
#[derive(Clone, Debug)]
pub struct PagerConfig {
    /// The regions of the image; every set here is over their universe, and frames outside of them are ignored.
    pub memory: MemoryMap,
    /// Frames that hold nothing but zeros.
    pub zero: FrameSet,
    /// Frames whose contents do not matter.
    pub free: FrameSet,
    /// Frames that the clone has already, as after the recovery of an interrupted migration.
    pub present: FrameSet,
    /// Frames that must be there before the clone may run.
    pub eager: FrameSet,
    /// Frames in the order in which they are best fetched ahead of need; they are, unless [`Prefetch::Off`].
    pub order: Vec<FrameRange>,
    /// What the port can do.
    pub port: PortTraits,
    /// Which pages to fetch around and ahead of faults.
    pub prefetch: Prefetch,
    /// How to fetch the rest. A rate holds for [`PagerConfig::order`] too.
    pub hydrate: Hydrate,
    /// When to ask again.
    pub retry: Retry,
    /// How long the source may stay away before the clone is given up.
    pub patience: Duration,
    /// Whether to note what the guest needs, to be [taken](super::Pager::take_touched).
    pub record: bool,
    /// How long the guest may be kept from running while what siblings needed is fetched, from the source's being there on.
    pub head_start: Duration,
    /// The most frames of zeros to install for one fault. Zeros cost no fetch, but on shared memory they take host memory.
    pub zero_around: PageCount,
}

/// Which pages to fetch around and ahead of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefetch {
    /// None.
    Off,
    /// Follow sequential and strided streams of faults, up to `max` pages ahead of each.
    Adaptive {
        /// The farthest that a stream is followed ahead.
        max: PageCount,
    },
    /// This many pages after each fault.
    Fixed(PageCount),
    /// The aligned block of this many pages around each fault.
    Around(PageCount),
}

/// How to fetch what no fault has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hydrate {
    /// Not at all.
    Off,
    /// As fast as the source answers.
    Now,
    /// This many pages in a second.
    Rate(NonZeroU64),
}

/// When to ask again for pages that do not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// The shortest time to wait for an answer, however fast answers have been. Over a reliable stream an answer is late, not
    /// lost, and asking again only adds to the load.
    pub min: Duration,
    /// The longest time to wait for an answer; doubling stops there.
    pub max: Duration,
    /// How often a page is asked for in all while the source is there.
    pub attempts: u32,
}

impl Retry {
    /// For sources that lose nothing while they are connected.
    pub const STREAM: Retry = Retry { min: Duration::from_secs(1), max: Duration::from_secs(5), attempts: 8 };
    /// For sources that lose datagrams.
    pub const LOSSY: Retry = Retry { min: Duration::from_millis(2), max: Duration::from_millis(500), attempts: 32 };
}

/// A configuration that no pager can work by.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigError {
    /// A set over another universe than the memory map's.
    #[error("the {set} set is over {frames} frames, the memory map over {expected}")]
    Universe {
        /// Which set.
        set: &'static str,
        /// Its universe.
        frames: PageCount,
        /// The memory map's universe.
        expected: PageCount,
    },
    /// A granule that cannot be handled.
    #[error("a granule of {0} frames is no power of two up to 512")]
    Granule(PageCount),
    /// A region that does not consist of whole granules.
    #[error("region {region:?} at {frames} does not consist of whole granules of {granule} frames, as its port needs")]
    Unaligned {
        /// The region's name.
        region: String,
        /// Its frames.
        frames: FrameRange,
        /// The port's granule.
        granule: PageCount,
    },
}

impl PagerConfig {
    /// The usual configuration of a clone of `descriptor` behind a port with these traits: adaptive prefetch, no
    /// hydration, ten seconds of patience.
    pub fn for_clone(descriptor: &Descriptor, port: PortTraits) -> Self {
        Self {
            memory: descriptor.memory.clone(),
            zero: descriptor.zero.clone(),
            free: descriptor.free.clone(),
            present: FrameSet::empty(descriptor.memory.universe()),
            eager: descriptor.eager.clone(),
            order: descriptor.prefetch.clone(),
            port,
            prefetch: Prefetch::Adaptive { max: Self::PREFETCH_MAX },
            hydrate: Hydrate::Off,
            retry: Retry::STREAM,
            patience: Duration::from_secs(10),
            record: false,
            head_start: Duration::ZERO,
            zero_around: Self::ZERO_AROUND,
        }
    }

    /// How far ahead a stream of faults is followed by default: 1 MiB, some milliseconds of a guest that reads as fast as
    /// memory allows, and what one answer may carry at most.
    pub const PREFETCH_MAX: PageCount = PageCount::new(256);

    /// How many zero frames are installed for one fault by default: 1 MiB, which the kernel maps in some 20 µs, less than the
    /// few faults it saves.
    pub const ZERO_AROUND: PageCount = PageCount::new(256);

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let expected = self.memory.universe();
        let sets = [("zero", &self.zero), ("free", &self.free), ("present", &self.present), ("eager", &self.eager)];
        for (set, frames) in sets.map(|(name, set)| (name, set.universe())) {
            if frames != expected {
                return Err(ConfigError::Universe { set, frames, expected });
            }
        }
        let granule = self.port.granule;
        if !granule.get().is_power_of_two() || granule > MAX_GRANULE {
            return Err(ConfigError::Granule(granule));
        }
        for region in self.memory.regions() {
            let frames = region.frames;
            let whole = |n: u64| n.is_multiple_of(granule.get());
            if !whole(frames.start().index()) || !whole((frames.end() - Gfn::new(0)).get()) {
                return Err(ConfigError::Unaligned { region: region.name.clone(), frames, granule });
            }
        }
        Ok(())
    }
}

/// 2 MiB; the staging map of a granule has one bit for each of its frames.
const MAX_GRANULE: PageCount = PageCount::new(512);
