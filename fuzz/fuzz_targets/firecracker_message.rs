//! The message by which a VMM hands its memory over: any bytes give regions of the image, each frame once, or an error.
#![no_main]

use descriptor::memory::{MemoryMap, PageSize, Region, RegionKind};
use descriptor::{FrameRange, Gfn, PageCount};
use memtap::port::firecracker::{describe, host_regions, parse};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let region = |name: &str, start, count| Region {
        name: name.to_owned(),
        frames: FrameRange::new(Gfn::new(start), PageCount::new(count)),
        kind: RegionKind::Ram,
        page_size: PageSize::Base,
    };
    // Two regions around a hole, as large guests have them.
    let regions = vec![region("low", 0, 1024), region("high", 4096, 512)];
    let memory = MemoryMap::new(regions).expect("two regions in ascending order");
    if let Ok(Some(message)) = parse(bytes)
        && let Ok(table) = host_regions(&message, &memory)
    {
        let frames: PageCount = table.regions().iter().map(|region| region.frames.count()).sum();
        assert_eq!(frames, memory.frame_count());
        assert_eq!(host_regions(&describe(&table, &memory), &memory).ok(), Some(table));
    }
});
