//! The compact encoding of a frame set: the lengths of its alternating gaps and runs as LEB128 numbers.
//!
//! The first number is the length of the gap before the first run, then a run, a gap, and so on; the encoding ends with a run.
//! A guest's zero set has long runs, so 1 GiB takes some kilobytes at worst, and lz4 works on what remains.

use thiserror::Error;

use super::{FrameRange, FrameSet, Gfn, PageCount};
use crate::leb128::{NumberError, push_number, take_number};

/// An encoded frame set that cannot be decoded; offsets count from its first byte.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrameSetError {
    /// The bytes end within a number.
    #[error("frame set ends within the number at byte {offset}")]
    Truncated {
        /// Where the number begins.
        offset: usize,
    },
    /// A number of more than 64 bits.
    #[error("frame set has a number of more than 64 bits at byte {offset}")]
    Overlong {
        /// Where the number begins.
        offset: usize,
    },
    /// An empty run, or an empty gap other than the first.
    #[error("frame set has an empty run at byte {offset}")]
    EmptyRun {
        /// Where the number begins.
        offset: usize,
    },
    /// A run or gap that reaches beyond the universe.
    #[error("frame set has a run of {length} frames at byte {offset} that ends beyond its {universe} frames")]
    Beyond {
        /// Where the number begins.
        offset: usize,
        /// The length of the run.
        length: u64,
        /// The frames that the set can hold.
        universe: PageCount,
    },
    /// A gap at the end, which a well-formed encoding leaves out.
    #[error("frame set ends with a gap")]
    TrailingGap,
}

impl FrameSet {
    /// The compact encoding: LEB128 lengths of gaps and runs in turn.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut end = Gfn::new(0);
        for run in self.runs() {
            push_number(&mut out, (run.start() - end).get());
            push_number(&mut out, run.count().get());
            end = run.end();
        }
        out
    }

    /// The set over `universe` frames that [`FrameSet::encode`] made `bytes` from.
    ///
    /// # Errors
    /// When the bytes are no such encoding; each set has exactly one.
    ///
    /// # Panics
    /// When `universe` is above [`FrameSet::MAX_UNIVERSE`].
    pub fn decode(bytes: &[u8], universe: PageCount) -> Result<Self, FrameSetError> {
        let mut set = FrameSet::empty(universe);
        let mut next = Gfn::new(0);
        let mut offset = 0;
        let mut in_run = false;
        while offset < bytes.len() {
            let (length, size) = take_length(bytes, offset)?;
            if length == 0 && offset > 0 {
                return Err(FrameSetError::EmptyRun { offset });
            }
            let range = FrameRange::checked(next, PageCount::new(length))
                .filter(|range| set.bounds().covers(*range) || range.is_empty())
                .ok_or(FrameSetError::Beyond { offset, length, universe })?;
            if in_run {
                set.insert_range(range);
            }
            next = range.end();
            in_run = !in_run;
            offset += size;
        }
        if in_run { Err(FrameSetError::TrailingGap) } else { Ok(set) }
    }
}

fn take_length(bytes: &[u8], offset: usize) -> Result<(u64, usize), FrameSetError> {
    take_number(bytes.get(offset..).unwrap_or_default()).map_err(|error| match error {
        NumberError::Truncated => FrameSetError::Truncated { offset },
        NumberError::Overlong => FrameSetError::Overlong { offset },
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, length: u64) -> FrameRange {
        FrameRange::new(Gfn::new(start), PageCount::new(length))
    }

    #[test]
    fn golden_bytes() {
        let universe = PageCount::new(1000);
        let set = FrameSet::from_ranges(universe, [range(3, 1), range(300, 700)]);
        assert_eq!(set.encode(), [3, 1, 0xa8, 2, 0xbc, 5]);
        assert_eq!(FrameSet::full(universe).encode(), [0, 0xe8, 7]);
        assert!(FrameSet::empty(universe).encode().is_empty());
    }

    #[test]
    fn malformed_encodings_name_their_fault() {
        let decode = |bytes: &[u8]| FrameSet::decode(bytes, PageCount::new(1000));
        assert_eq!(decode(&[3, 0x80]), Err(FrameSetError::Truncated { offset: 1 }));
        assert_eq!(decode(&[3, 0]), Err(FrameSetError::EmptyRun { offset: 1 }));
        assert_eq!(decode(&[3, 0x81, 0]), Err(FrameSetError::Overlong { offset: 1 }));
        assert_eq!(decode(&[0xff; 10]), Err(FrameSetError::Overlong { offset: 0 }));
        assert_eq!(decode(&[3]), Err(FrameSetError::TrailingGap));
        let beyond = FrameSetError::Beyond { offset: 1, length: 1000, universe: PageCount::new(1000) };
        assert_eq!(decode(&[1, 0xe8, 7]), Err(beyond));
    }

    proptest! {
        #[test]
        fn round_trip(ranges in proptest::collection::vec((0..10_000u64, 1..500u64), 0..50)) {
            let universe = PageCount::new(10_500);
            let set = FrameSet::from_ranges(universe, ranges.into_iter().map(|(s, l)| range(s, l)));
            prop_assert_eq!(FrameSet::decode(&set.encode(), universe), Ok(set));
        }

        #[test]
        fn whatever_decodes_encodes_to_the_same(bytes in proptest::collection::vec(any::<u8>(), 0..20)) {
            if let Ok(set) = FrameSet::decode(&bytes, PageCount::new(1 << 20)) {
                prop_assert_eq!(set.encode(), bytes);
            }
        }
    }
}
