//! Frames that will be wholly overwritten, so that what they hold in the image need not come.

use descriptor::{FrameRange, Gfn, PageCount};
use thiserror::Error;

use super::Pager;
use super::latency::Kind;
use super::presence::State;

/// What became of frames that will be wholly overwritten. The rest of them needed no fetch before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overwritten {
    /// Frames that were missing and need no fetch any more.
    pub frames: PageCount,
    /// Frames that the clone has already.
    pub present: PageCount,
}

/// Frames that are none of the guest's.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("frames {0} are not in the guest's memory")]
pub struct NotMemory(pub FrameRange);

impl Pager {
    /// Notes that whoever asks will overwrite every byte of `ranges` before anyone may read them: what is missing there needs no
    /// fetch any more and reads as zeros, or as in the image, until then. What is there stays, and what was asked for already
    /// is not installed when it comes.
    ///
    /// Over huge pages the frames around those named still come before any of a page can be installed.
    ///
    /// # Errors
    /// When some of the frames are not in the memory map; then nothing is noted of any of them.
    pub fn overwrite(&mut self, ranges: &[FrameRange]) -> Result<Overwritten, NotMemory> {
        // Each frame once, so that no list takes longer than all of memory.
        let ranges = joined(ranges);
        let memory = self.presence.memory();
        for range in &ranges {
            let inside = range.intersection(memory.bounds());
            if inside != *range {
                return Err(NotMemory(FrameRange::between(inside.end().max(range.start()), range.end())));
            }
            if let Some(gap) = memory.gaps_in(*range).next() {
                return Err(NotMemory(gap));
            }
        }
        let mut noted = Overwritten::default();
        for range in ranges {
            let lacks = self.presence.cold().count_in(range) + self.presence.blank().count_in(range);
            noted.present += range.count() - lacks;
            if !self.has_ended() {
                noted.frames += self.forgo(range);
            }
        }
        self.stats.overwritten += noted.frames.get();
        Ok(noted)
    }

    /// Makes the cold frames of `range` blank, and tells how many they were.
    fn forgo(&mut self, range: FrameRange) -> PageCount {
        let runs = self.presence.forgo(range);
        for run in &runs {
            self.requests.settle(*run);
            self.eager.remove_range(*run);
            self.zero_sweep = self.zero_sweep.map(|cursor| cursor.min(run.start()));
            let granules = self.presence.outward(*run);
            let staged: Vec<Gfn> = self.staging.in_range(granules).collect();
            for granule in staged {
                let frames = self.presence.granule_of(granule);
                if self.presence.state(granule) != State::Cold {
                    self.staging.discard(frames);
                } else if self.missing_in(frames).next().is_none() {
                    self.staging.complete(granule);
                }
            }
            let waited: Vec<Gfn> = self.waiting.in_range(granules).collect();
            for granule in waited {
                if self.presence.state(granule) != State::Cold {
                    self.waiting.reclassify(granule, Kind::Local);
                    self.zero_faults.push_back(granule);
                }
            }
        }
        runs.iter().map(|run| run.count()).sum()
    }
}

/// The same frames as ascending ranges that do not touch.
fn joined(ranges: &[FrameRange]) -> Vec<FrameRange> {
    let mut sorted: Vec<FrameRange> = ranges.iter().copied().filter(|range| !range.is_empty()).collect();
    sorted.sort_unstable_by_key(|range| range.start());
    let mut joined: Vec<FrameRange> = Vec::new();
    for range in sorted {
        match joined.last_mut() {
            Some(last) if range.start() <= last.end() => {
                *last = FrameRange::between(last.start(), last.end().max(range.end()));
            }
            _ => joined.push(range),
        }
    }
    joined
}
