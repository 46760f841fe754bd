use proptest::prelude::*;

use super::testing::{DESCRIPTION, DEVICES, StreamBuilder, sample};
use super::{BlockPages, PagePlace, PageRun, Stream, StreamError};
use crate::PageCount;

fn parse(bytes: &[u8]) -> Result<Stream, StreamError> {
    Stream::parse(&bytes)
}

fn refused(stream: StreamBuilder) -> StreamError {
    parse(&stream.bytes).unwrap_err()
}

fn run(block: u16, first: u64, count: u64, place: PagePlace) -> PageRun {
    PageRun { block, first, count: PageCount::new(count), place }
}

fn stored(offset: u64, stride: u32) -> PagePlace {
    PagePlace::Stored { offset, stride }
}

#[test]
fn a_streamed_capture_is_read_without_its_pages() {
    let bytes = sample();
    let stream = parse(&bytes).unwrap();
    assert_eq!(stream.machine, "pc-i440fx-7.2");
    assert_eq!(stream.configuration, b"\x05\x1econfiguration/target-page-bits\0\0\0\x01\0\0\0\x0c");
    assert_eq!(stream.ram_section_id, 2);
    assert_eq!(stream.device_state, DEVICES);
    assert_eq!(stream.vm_description, DESCRIPTION);
    assert!(stream.zeros_marked);
    let blocks: Vec<_> = stream.blocks.iter().map(|b| (b.name.as_str(), b.size.get(), b.pages)).collect();
    assert_eq!(blocks, [("pc.ram", 8, BlockPages::Stream), ("pc.rom", 2, BlockPages::Stream)]);
    let offset = |fill: u8, start: usize| {
        let from = &bytes[start..];
        (start + from.windows(4096).position(|page| page.iter().all(|byte| *byte == fill)).unwrap()) as u64
    };
    let expected = [
        run(0, 0, 3, stored(offset(0xa0, 0), 4104)),
        run(0, 3, 2, PagePlace::Zero),
        run(0, 5, 1, stored(offset(0xa5, 0), 4096)),
        run(0, 1, 1, stored(offset(0xb1, 0), 4096)),
        run(0, 2, 1, PagePlace::Zero),
        run(0, 6, 2, PagePlace::Zero),
        run(1, 0, 2, stored(offset(0xc0, 0), 4104)),
    ];
    assert_eq!(stream.pages, expected);
}

/// The golden bytes: what the two QEMU versions really write down to the device state, so that the builder and the parser
/// cannot agree on something else.
#[test]
fn golden_header() {
    let golden = b"QEVM\x00\x00\x00\x03\x07\x00\x00\x00\x0dpc-i440fx-7.2\
        \x05\x1econfiguration/target-page-bits\x00\x00\x00\x01\x00\x00\x00\x0c\
        \x01\x00\x00\x00\x02\x03ram\x00\x00\x00\x00\x00\x00\x00\x04\
        \x00\x00\x00\x00\x00\x00\xa0\x04\
        \x06pc.ram\x00\x00\x00\x00\x00\x00\x80\x00\
        \x06pc.rom\x00\x00\x00\x00\x00\x00\x20\x00\
        \x00\x00\x00\x00\x00\x00\x00\x10\x7e\x00\x00\x00\x02\
        \x02\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x08\x06pc.ram\xa0";
    assert!(sample().starts_with(golden));
}

fn mapped(completed: bool) -> Vec<u8> {
    let zero = [0; 4096];
    let pages = [[1; 4096], zero, [3; 4096], zero, zero, [6; 4096], [7; 4096], zero, [9; 4096]];
    // The bitmap says that page 2 became zero after it was written.
    let bitmap = if completed { [0b0110_0001, 1, 0, 0, 0, 0, 0, 0] } else { [0; 8] };
    let stream = StreamBuilder::new(&["mapped-ram"]).ram_start(9).mapped_block("pc.ram", &bitmap, &pages);
    let stream = stream.end_of_section().part().end_of_section();
    let stream = if completed { stream.raw(&[3]).be32(2).end_of_section() } else { stream };
    stream.devices().bytes
}

#[test]
fn a_bitmap_counts_only_in_a_completed_mapped_ram_file() {
    let stream = parse(&mapped(true)).unwrap();
    let expected =
        [run(0, 0, 1, stored(4096, 4096)), run(0, 5, 2, stored(24576, 4096)), run(0, 8, 1, stored(36864, 4096))];
    assert_eq!(stream.pages, expected);
    assert!(stream.zeros_marked);
    let stream = parse(&mapped(false)).unwrap();
    let expected = [
        run(0, 0, 1, stored(4096, 4096)),
        run(0, 2, 1, stored(12288, 4096)),
        run(0, 5, 2, stored(24576, 4096)),
        run(0, 8, 1, stored(36864, 4096)),
    ];
    assert_eq!(stream.pages, expected);
    assert!(!stream.zeros_marked);
    assert_eq!(stream.device_state, DEVICES);
}

#[test]
fn ignored_blocks_lie_elsewhere() {
    let stream = StreamBuilder::new(&["x-ignore-shared"]).ram_start(9);
    let stream = stream.block("pc.ram", 8).be64(0).block("pc.rom", 1).be64(0xe0000).end_of_section();
    let stream = stream.part().page(0, Some("pc.rom"), 1).end_of_section().devices();
    let stream = parse(&stream.bytes).unwrap();
    let pages: Vec<_> = stream.blocks.iter().map(|block| block.pages).collect();
    assert_eq!(pages, [BlockPages::External, BlockPages::Stream]);
}

#[test]
fn commands_are_passed_over() {
    let stream = StreamBuilder::new(&[]).raw(&[8]).be16(2).be16(4).be32(1).ram_start(1).block("ram", 1);
    let stream = stream.end_of_section().part().zero(0, Some("ram")).end_of_section().devices();
    assert!(parse(&stream.bytes).is_ok());
}

#[test]
fn what_is_not_understood_is_refused_by_name() {
    let start = || StreamBuilder::new(&[]);
    let ram = || start().ram_start(1).block("ram", 1).end_of_section().part();
    assert!(matches!(refused(StreamBuilder::default().raw(&[0; 64])), StreamError::Magic(0)));
    let version = StreamBuilder::default().raw(b"QEVM\0\0\0\x02");
    assert!(matches!(refused(version), StreamError::Version(2)));
    let block = start().raw(&[1]).be32(1).cstr("block");
    assert!(matches!(refused(block), StreamError::LiveSection { name, .. } if name == "block"));
    let early = start().raw(&[4]).be32(1).cstr("virtio-mem-early");
    assert!(matches!(refused(early), StreamError::EarlyState { name, .. } if name == "virtio-mem-early"));
    let unknown = start().raw(&[5]).cstr("configuration/new").be32(1);
    assert!(matches!(refused(unknown), StreamError::Subsection { name, .. } if name == "configuration/new"));
    let xbzrle = ram().be64(0x40).cstr("ram");
    assert!(matches!(refused(xbzrle), StreamError::Capability { capability: "xbzrle", .. }));
    let packaged = start().raw(&[8]).be16(7).be16(4).be32(100);
    assert!(matches!(refused(packaged), StreamError::Capability { capability: "postcopy-ram", .. }));
}

#[test]
fn impossible_blocks_and_pages_are_refused() {
    let start = || StreamBuilder::new(&[]);
    let ram = || start().ram_start(1).block("ram", 1).end_of_section().part();
    let odd = start().ram_start(1).cstr("ram").be64(4095);
    assert!(matches!(refused(odd), StreamError::BlockLength { length: 4095, .. }));
    let long = start().ram_start(1).block("ram", 2);
    assert!(matches!(refused(long), StreamError::Value { field: "RAM block length", value: 8192, .. }));
    let twins = start().ram_start(2).block("ram", 1).block("ram", 1);
    assert!(matches!(refused(twins), StreamError::DuplicateBlock { .. }));
    let giant = start().ram_start(1 << 40).block("ram", 1 << 40);
    assert!(matches!(refused(giant), StreamError::TooLarge { .. }));
    let stranger = ram().page(0, Some("rom"), 0);
    assert!(matches!(refused(stranger), StreamError::UnknownBlock { name, .. } if name == "rom"));
    let beyond = ram().zero(1, Some("ram"));
    assert!(matches!(refused(beyond), StreamError::PageBeyondBlock { page: 1, .. }));
    assert!(matches!(refused(ram().zero(0, None)), StreamError::Value { field: "first page header", .. }));
    let footer = start().ram_start(1).block("ram", 1).be64(0x10).raw(&[0x7e]).be32(3);
    assert!(matches!(refused(footer), StreamError::Value { field: "section footer", value: 3, .. }));
    assert!(matches!(refused(start().raw(&[0])), StreamError::NoDevices(_)));
    let wild = StreamBuilder::new(&["mapped-ram"]).ram_start(1).block("ram", 1);
    let wild = wild.be32(1).be64(4096).be64(u64::MAX).be64(u64::MAX);
    assert!(matches!(refused(wild), StreamError::Value { field: "mapped-ram bitmap offset", .. }));
}

#[test]
fn a_stream_that_was_cut_off_is_refused_wherever_it_was() {
    for bytes in [sample(), mapped(true)] {
        let end = bytes.len();
        let cuts = (0..end.min(300)).chain((0..end).step_by(517)).chain(end - 120..end);
        for length in cuts {
            assert!(parse(&bytes[..length]).is_err(), "cut to {length} of {end} bytes");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn hostile_bytes_are_an_error(at in any::<prop::sample::Index>(), bytes in prop::collection::vec(any::<u8>(), 1..12), is_mapped: bool) {
        let mut stream = if is_mapped { mapped(true) } else { sample() };
        let at = at.index(stream.len() - 12);
        stream[at..at + bytes.len()].copy_from_slice(&bytes);
        let _ = parse(&stream);
    }

    #[test]
    fn hostile_structure_is_an_error(pieces in prop::collection::vec(0..12_u8, 0..40), word in any::<u64>()) {
        let start = StreamBuilder::new(if word & 1 == 0 { &[] } else { &["mapped-ram"] });
        let stream = pieces.into_iter().fold(start, |stream, piece| match piece {
            0 => stream.ram_start(word % 100),
            1 => stream.block("ram", word % 7),
            2 => stream.part(),
            3 => stream.zero(word % 9, Some("ram")),
            4 => stream.zero(word % 9, None),
            5 => stream.page(word % 9, None, 1),
            6 => stream.end_of_section(),
            7 => stream.devices(),
            8 => stream.be64(word),
            9 => stream.be32(1).be64(4096),
            10 => stream.raw(&[word as u8]),
            _ => stream.cstr("ram"),
        });
        let _ = parse(&stream.bytes);
    }
}
