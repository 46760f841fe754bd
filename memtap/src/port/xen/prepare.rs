//! How a domain that was restored without memory comes to have all of it, paged out.
//!
//! Xen has no call that makes a paged-out frame; a frame has to be there first. So 2 MiB are populated at a time, then their 512
//! frames are nominated and evicted by one multicall, which gives their memory back before the next: the domain never has
//! more than that beside its special pages.

use std::time::{Duration, Instant};

use descriptor::{FrameRange, Gfn, PAGE_SIZE, PageCount};
use rustix::io::Errno;

use super::domain::Domain;
use super::error::XenError;

/// Frames of a large page, which Xen gives out in one piece where it has one.
const LARGE: PageCount = PageCount::new(512);

/// How often a frame that is in use is tried again, [`IN_USE_PAUSE`] apart: whatever looks at a paused domain's memory looks
/// for a moment.
const IN_USE_TRIES: u32 = 20;

const IN_USE_PAUSE: Duration = Duration::from_millis(10);

/// Chunks between two looks at how much memory the domain has.
const LOOK_EVERY: usize = 16;

/// How the preparation of a domain went.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Preparation {
    /// How long it took.
    pub(super) took: Duration,
    /// Frames that were paged out.
    pub(super) frames: PageCount,
    /// The most pages that the domain was seen to have.
    pub(super) peak: PageCount,
    /// Nothing was to be prepared: another memtap had done it.
    pub(super) taken_over: bool,
}

/// Pages all frames of `ram` out, which the domain does not have. Its ring must be enabled.
pub(super) fn page_out(domain: &mut Domain, ram: &[FrameRange]) -> Result<Preparation, XenError> {
    let began = Instant::now();
    let mut preparation = Preparation::default();
    let mut results = Vec::with_capacity(LARGE.get() as usize);
    for (number, chunk) in ram.iter().flat_map(|range| chunks(*range)).enumerate() {
        let frames: Vec<u64> = chunk.frames().map(Gfn::index).collect();
        populate(domain, &frames)?;
        if number % LOOK_EVERY == 0
            && let Some(info) = domain.info()?
        {
            preparation.peak = preparation.peak.max(info.pages);
        }
        domain.evict(&frames, &mut results)?;
        for (gfn, result) in chunk.frames().zip(&results) {
            if let Err(error) = *result {
                evict_again(domain, gfn, error)?;
            }
        }
        preparation.frames += chunk.count();
    }
    preparation.took = began.elapsed();
    Ok(preparation)
}

/// Evicts a frame that has memory, and that did not go because of `error`.
pub(super) fn evict_again(domain: &mut Domain, gfn: Gfn, mut error: Errno) -> Result<(), XenError> {
    let mut results = Vec::new();
    for _ in 0..IN_USE_TRIES {
        match error {
            Errno::BUSY => std::thread::sleep(IN_USE_PAUSE),
            Errno::NOMEM => return Err(XenError::NoMemory { domain: domain.id(), gfn }),
            error => return Err(domain.failed("XENMEM_paging_op_evict", error.into())),
        }
        // Back from wherever it stopped on its way out, where that is needed; its contents do not matter yet.
        domain.fill_zeros(gfn, 1, &mut results)?;
        domain.evict(&[gfn.index()], &mut results)?;
        match results.first() {
            Some(Err(again)) => error = *again,
            _ => return Ok(()),
        }
    }
    Err(XenError::InUse { domain: domain.id(), gfn, source: error.into() })
}

/// Gives the domain memory for `frames`, which follow each other: in one piece where they are a large page and Xen has one.
fn populate(domain: &mut Domain, frames: &[u64]) -> Result<(), XenError> {
    let large = LARGE.get();
    if let [first, ..] = frames
        && first.is_multiple_of(large)
        && frames.len() as u64 == large
        && domain.populate(large.ilog2(), &[*first])? == 1
    {
        return Ok(());
    }
    match domain.populate(0, frames)? {
        done if done == frames.len() => Ok(()),
        done => {
            let gfn = Gfn::containing(frames.get(done).copied().unwrap_or_default() * PAGE_SIZE);
            // The domain may have gone meanwhile.
            match domain.info()? {
                Some(_) => Err(XenError::NoMemory { domain: domain.id(), gfn }),
                None => Err(XenError::Gone { domain: domain.id() }),
            }
        }
    }
}

/// `range` in large pages, as far as it has whole ones, and what is before and behind them.
fn chunks(range: FrameRange) -> impl Iterator<Item = FrameRange> {
    let mut rest = range;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let to_boundary = LARGE.get() - rest.start().index() % LARGE.get();
        let (chunk, tail) = rest.split_at(PageCount::new(to_boundary));
        rest = tail;
        Some(chunk)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> FrameRange {
        FrameRange::between(Gfn::new(start), Gfn::new(end))
    }

    #[test]
    fn chunks_are_large_pages_and_their_edges() {
        let all: Vec<FrameRange> = chunks(range(0x11, 0x8005)).collect();
        assert_eq!(all[0], range(0x11, 0x200));
        assert_eq!(all[1], range(0x200, 0x400));
        assert_eq!(all.last(), Some(&range(0x8000, 0x8005)));
        assert_eq!(all.len(), 65);
        assert!(all.windows(2).all(|pair| pair[0].end() == pair[1].start()));
        assert_eq!(chunks(range(3, 7)).collect::<Vec<_>>(), [range(3, 7)]);
        assert_eq!(chunks(range(7, 7)).count(), 0);
    }
}
