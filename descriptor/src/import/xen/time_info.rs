//! The pages by which the hypervisor tells a guest the time.
//!
//! A guest registers a `vcpu_info` for each processor when it resumes, and Xen 4.17 does not ask the pager for its page then: it
//! fails, and the guest gives up. So these pages have to be there from the beginning. No record says where they are, but each
//! holds a clock, `vcpu_time_info`, whose factor follows from the frequency of the guest's time stamp counter:
//!
//! ```text
//! u32 version, even  u32 0  u64 time stamp  u64 system time in ns  u32 factor, from 2^31 on  i8 shift  u8 flags  zero [2]
//! ```
//!
//! The time is `(ticks << shift) * factor / 2^32` nanoseconds. A page that only looks so costs no more than its early fetch.

use crate::image::{ImageError, ReadPages};
use crate::{FrameRange, FrameSet, PAGE_SIZE, PageCount};

/// Bytes in a clock.
const LENGTH: usize = 32;

/// By how much a factor may differ from the one that the frequency in whole kHz makes. Xen measures more finely than it tells,
/// and calibrates; a wrong guess at the frequency differs by more.
const TOLERANCE: f64 = 1e-3;

/// Pages read at once.
const BATCH: PageCount = PageCount::new(256);

/// The frames among `frames` that hold a clock of a guest whose time stamp counter counts `tsc_khz`, and how many clocks these are.
pub(super) fn find(image: &dyn ReadPages, frames: &FrameSet, tsc_khz: u32) -> Result<(FrameSet, u64), ImageError> {
    let mut found = FrameSet::empty(frames.universe());
    let mut clocks = 0;
    let mut buffer = Vec::new();
    for batch in frames.runs().flat_map(|run| run.chunks(BATCH).collect::<Vec<FrameRange>>()) {
        buffer.resize(batch.count().bytes() as usize, 0);
        image.read_pages(batch, &mut buffer)?;
        for (gfn, page) in batch.frames().zip(buffer.chunks_exact(PAGE_SIZE as usize)) {
            let in_page = clocks_in(page, tsc_khz);
            if in_page > 0 {
                clocks += in_page;
                found.insert(gfn);
            }
        }
    }
    Ok((found, clocks))
}

fn clocks_in(page: &[u8], tsc_khz: u32) -> u64 {
    let (words, _) = page.as_chunks::<8>();
    // The highest bit of the factor is the first thing that most of memory does not have.
    let clocks = words.windows(LENGTH / 8).filter(|clock| clock[3][3] & 0x80 != 0 && is_clock(clock, tsc_khz));
    clocks.count() as u64
}

fn is_clock(words: &[[u8; 8]], tsc_khz: u32) -> bool {
    let [head, stamp, time, scale] = [0, 1, 2, 3].map(|index| u64::from_le_bytes(words[index]));
    let version = head as u32;
    let [shift, flags, zeros @ ..] = ((scale >> 32) as u32).to_le_bytes();
    // What few words of any memory pass comes first.
    let sound = zeros == [0, 0]
        && head >> 32 == 0
        && version != 0
        && version & 1 == 0
        // Stable, and stopped.
        && flags <= 3
        && stamp != 0
        && time != 0
        // Two years of uptime.
        && time >> 56 == 0;
    sound && {
        let ns_per_tick = f64::from(scale as u32) * f64::from(i32::from(shift.cast_signed()) - 32).exp2();
        (ns_per_tick * f64::from(tsc_khz) / 1e6 - 1.0).abs() <= TOLERANCE
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::Gfn;
    use crate::memory::{MemoryMap, PageSize, Region, RegionKind};

    /// A clock as Xen 4.17 left it in a guest with 2,100,016 kHz.
    pub(in super::super) fn clock(version: u32, factor: u32, shift: i8) -> [u8; LENGTH] {
        let mut clock = [0; LENGTH];
        clock[..4].copy_from_slice(&version.to_le_bytes());
        clock[8..16].copy_from_slice(&71_234_567_890_u64.to_le_bytes());
        clock[16..24].copy_from_slice(&33_921_112_233_u64.to_le_bytes());
        clock[24..28].copy_from_slice(&factor.to_le_bytes());
        clock[28..30].copy_from_slice(&[shift.cast_unsigned(), 1]);
        clock
    }

    /// The factor and shift that Xen's `set_time_scale` computes.
    pub(in super::super) fn scale(khz: u32) -> (u32, i8) {
        let (mut ticks, mut shift) = (u64::from(khz) * 1000, 0);
        while ticks > 2_000_000_000 {
            ticks >>= 1;
            shift -= 1;
        }
        while ticks <= 1_000_000_000 {
            ticks <<= 1;
            shift += 1;
        }
        (((1_000_000_000 << 32) / ticks) as u32, shift)
    }

    struct Pages(MemoryMap, Vec<u8>);

    impl ReadPages for Pages {
        fn memory(&self) -> &MemoryMap {
            &self.0
        }

        fn read_pages(&self, frames: FrameRange, buffer: &mut [u8]) -> Result<(), ImageError> {
            buffer.copy_from_slice(&self.1[frames.start().address() as usize..][..buffer.len()]);
            Ok(())
        }
    }

    fn pages(clocks: &[(usize, [u8; LENGTH])]) -> Pages {
        let frames = FrameRange::new(Gfn::new(0), PageCount::new(600));
        let region = Region { name: "ram".into(), frames, kind: RegionKind::Ram, page_size: PageSize::Base };
        let mut bytes = vec![0x85; 600 * PAGE_SIZE as usize];
        for (at, clock) in clocks {
            bytes[*at..at + LENGTH].copy_from_slice(clock);
        }
        Pages(MemoryMap::new(vec![region]).unwrap(), bytes)
    }

    #[test]
    fn clocks_of_any_frequency_are_found_where_they_are() {
        for khz in [800_000, 1_000_000, 2_000_000, 2_100_016, 3_999_999, 5_700_123] {
            let (factor, shift) = scale(khz);
            let good = clock(0x12, factor + 1000, shift);
            let pages = pages(&[(4096 * 3 + 32, good), (4096 * 3 + 128, good), (4096 * 600 - 32, good)]);
            let mut frames = FrameSet::full(PageCount::new(600));
            let (found, clocks) = find(&pages, &frames, khz).unwrap();
            assert_eq!(found.runs().map(|run| run.start().index()).collect::<Vec<_>>(), [3, 599], "{khz} kHz");
            assert_eq!(clocks, 3);
            frames.remove(Gfn::new(3));
            assert_eq!(find(&pages, &frames, khz).unwrap().1, 1);
        }
    }

    #[test]
    fn what_only_resembles_a_clock_is_none() {
        let khz = 2_100_016;
        let (factor, shift) = scale(khz);
        let good = clock(2, factor, shift);
        let with = |at: usize, byte: u8| {
            let mut clock = good;
            clock[at] = byte;
            clock
        };
        let bad = [
            clock(3, factor, shift),
            clock(0, factor, shift),
            clock(2, factor / 2, shift),
            clock(2, factor, shift + 1),
            clock(2, factor - factor / 500, shift),
            clock(2, factor, i8::MIN),
            with(4, 1),
            with(23, 1),
            with(29, 4),
            with(31, 1),
        ];
        assert!(is_clock(good.as_chunks().0, khz));
        for clock in bad {
            assert!(!is_clock(clock.as_chunks().0, khz), "{clock:?}");
        }
        assert!(!is_clock(good.as_chunks().0, 0));
    }
}
