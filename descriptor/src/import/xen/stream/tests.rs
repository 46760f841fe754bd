use std::io::{self, Read};

use proptest::prelude::*;

use super::testing::{CONFIG, StreamBuilder, XALLOC, XTAB, sample};
use super::{Input, Layer, PagePlace, PageRun, Spool, Stream, StreamError};
use crate::PageCount;

fn parse(bytes: &[u8]) -> Result<Stream, StreamError> {
    Stream::parse(&mut &bytes[..])
}

fn refused(stream: StreamBuilder) -> StreamError {
    parse(&stream.bytes).unwrap_err()
}

fn run(first: u64, count: u64, place: PagePlace) -> PageRun {
    PageRun { first, count: PageCount::new(count), place }
}

#[test]
fn a_stream_is_read_without_its_pages() {
    let bytes = sample();
    let stream = parse(&bytes).unwrap();
    assert_eq!(stream.config.as_deref(), Some(CONFIG));
    assert_eq!((stream.version, stream.xen, stream.vcpus, stream.tsc_khz), (3, (4, 17), 2, Some(2_100_016)));
    assert_eq!(stream.params, [(1, 0xfeffc), (17, 0xfefff)]);
    assert_eq!((stream.length, stream.has_device_model), (bytes.len() as u64, false));
    let at = |fill: u8| PagePlace::Stored(bytes.windows(4096).position(|page| page == [fill; 4096]).unwrap() as u64);
    let expected = [
        run(0, 4, at(0xa0)),
        run(8, 2, PagePlace::Absent),
        run(4, 4, at(0xa4)),
        run(0xfc000, 2, at(0xe0)),
        run(0xfeffc, 1, at(0xe1).after(PageCount::ONE)),
        run(0xff000, 1, PagePlace::Absent),
        run(0x100000, 2, at(0xc0)),
        run(1, 1, at(0xb1)),
        run(5, 1, at(0xb5)),
        run(4, 1, PagePlace::Absent),
        run(6, 1, PagePlace::Unwritten),
    ];
    assert_eq!(stream.pages, expected);
    // What is kept, with the records of pages put where they belong, is the stream again.
    let (before, after) = stream.records.split_at(stream.pages_at);
    let joined =
        |records: &[crate::vm::HypervisorRecord]| records.iter().flat_map(|r| r.data.clone()).collect::<Vec<_>>();
    assert!(bytes.starts_with(&joined(before)) && bytes.ends_with(&joined(after)));
    assert_eq!(before.last().map(|record| record.name.as_str()), Some("libxc/STATIC_DATA_END"));
}

#[test]
fn a_million_holes_are_one_run() {
    let holes: Vec<_> = (0x8000..0x10_8000).map(|pfn| (pfn | XTAB, None)).collect();
    let stream = holes.chunks(1024).fold(StreamBuilder::new("").page_data(&[(0, Some(1))]), StreamBuilder::page_data);
    let stream = parse(&stream.state(1, &[]).end().bytes).unwrap();
    assert_eq!(stream.pages[1..], [run(0x8000, 0x10_0000, PagePlace::Absent)]);
}

#[test]
fn older_streams_and_those_with_more_are_read() {
    let old = StreamBuilder::xl("").raw(b"LibxlFmt\0\0\0\x02\0\0\0\x02").record(1, &[]).libxc(2);
    let stream = parse(&old.page_data(&[(0, Some(1))]).state(1, &[]).end().bytes).unwrap();
    assert_eq!((stream.version, stream.config, stream.pages_at), (2, None, 4));

    let more = StreamBuilder::new("").record(0x8000_0007, b"whatever").page_data(&[(0, Some(1))]).record(13, &[]);
    let more = more.page_data(&[(0, Some(2))]).state(1, &[]).record(11, &[5; 3]).record(0, &[]);
    let more = more.record(2, &[1; 30]).record(3, &[2; 9]).record(0x8000_0000, &[]).record(0, &[]);
    let stream = parse(&more.bytes).unwrap();
    assert!(stream.has_device_model);
    let names: Vec<_> = stream.records.iter().map(|r| (r.name.as_str(), r.data.len())).collect();
    let expected = [("libxc/TOOLSTACK", 16), ("libxc/END", 8), ("libxl/EMULATOR_XENSTORE_DATA", 40)];
    assert_eq!(names[11..14], expected);
    assert_eq!(names[14..], [("libxl/EMULATOR_CONTEXT", 24), ("libxl/optional", 8), ("libxl/END", 8)]);
    assert_eq!((stream.pages.len(), names[7]), (2, ("libxc/optional", 16)));
}

#[test]
fn what_cannot_be_forked_is_refused_by_name() {
    let magic = refused(StreamBuilder::default().raw(&[b'x'; 48]));
    assert!(matches!(magic, StreamError::Magic { layer: Layer::Xl, offset: 0 }));
    let qemu = refused(StreamBuilder::xl("").raw(&[b'x'; 16]));
    assert!(matches!(qemu, StreamError::Magic { layer: Layer::Libxl, offset: 52 }));
    let version = refused(StreamBuilder::xl("").raw(b"LibxlFmt\0\0\0\x03\0\0\0\0"));
    assert!(matches!(version, StreamError::Version { layer: Layer::Libxl, version: 3, offset: 60 }));
    let big = refused(StreamBuilder::xl("").raw(b"LibxlFmt\0\0\0\x02\0\0\0\x01"));
    assert!(matches!(big, StreamError::Options { layer: Layer::Libxl, options: 1, offset: 64 }));
    let future = refused(StreamBuilder::xl("").raw(b"LibxlFmt\0\0\0\x02\0\0\0\0").record(1, &[]).libxc(4));
    assert!(matches!(future, StreamError::Version { layer: Layer::Libxc, version: 4, .. }));
    let none = refused(StreamBuilder::xl("").raw(b"LibxlFmt\0\0\0\x02\0\0\0\0").record(0, &[]));
    assert!(matches!(none, StreamError::Domains(0)));

    let mut pv = sample();
    let header = pv.windows(4).position(|bytes| bytes == b"XENF").unwrap();
    pv[header + 16] = 1;
    assert!(matches!(parse(&pv), Err(StreamError::NotHvm(1))));

    let start = StreamBuilder::new("");
    let offset = start.bytes.len() as u64;
    let body = offset + 8;
    let unknown = refused(start.clone().record(19, &[]));
    assert!(
        matches!(unknown, StreamError::UnknownRecord { layer: Layer::Libxc, kind: 19, offset: at } if at == offset)
    );
    assert!(matches!(refused(start.clone().record(14, &[])), StreamError::Checkpoint { layer: Layer::Libxc, .. }));
    assert!(matches!(refused(start.clone().record(0, &[])), StreamError::NoPages { .. }));
    let table = refused(start.clone().page_data(&[(7, Some(0)), (1 << 60 | 5, None)]));
    assert!(matches!(table, StreamError::PageType { pfn: 5, kind: 1, offset } if offset == body + 16));
    let far = refused(start.clone().page_data(&[(1 << 32 | XALLOC, None)]));
    assert!(matches!(far, StreamError::FrameTooLarge { pfn: 0x1_0000_0000, offset } if offset == body + 8));
    assert!(matches!(refused(start.clone().page_data(&[(1 << 32 | XTAB, None)])), StreamError::Truncated { .. }));
    for bad in [
        StreamBuilder::default().page_data(&[]),
        StreamBuilder::default().page_data(&[(1 | XTAB, Some(0))]),
        StreamBuilder::default().page_data(&[(1, None)]),
        StreamBuilder::default().record(1, &[9; 24]),
        StreamBuilder::default().record(1, &[]),
    ] {
        let bad = refused(start.clone().raw(&bad.bytes));
        assert!(matches!(bad, StreamError::Length { field: "PAGE_DATA", offset, .. } if offset == body), "{bad:?}");
    }
    let long = refused(start.clone().le32(9).le32(Stream::MAX_RECORD as u32 + 8));
    assert!(matches!(long, StreamError::TooLong { field: "libxc/HVM_CONTEXT", .. }));
    let huge = refused(start.clone().le32(1).le32(u32::MAX));
    assert!(matches!(huge, StreamError::Value { field: "a record's length", .. }));
    for (kind, bytes) in
        [(8, &[0; 16][..]), (9, &[0; 7]), (9, &[0, 0, 0, 0, 1, 0, 0, 0]), (10, &[0; 4]), (10, &[1; 16])]
    {
        let bad = refused(start.clone().record(kind, bytes));
        assert!(matches!(bad, StreamError::Length { offset, .. } if offset == body), "{kind}: {bad:?}");
    }
    let two = start.clone().page_data(&[(0, Some(0))]).record(0, &[]).record(1, &[]);
    assert!(matches!(refused(two), StreamError::Domains(2)));
    assert!(matches!(
        refused(start.page_data(&[(0, Some(0))]).record(0, &[]).record(5, &[])),
        StreamError::Checkpoint { .. }
    ));
}

#[test]
fn configurations_are_bounded_by_their_header() {
    let stream = |length: u32| {
        let header = StreamBuilder::xl(CONFIG).bytes;
        StreamBuilder::default().raw(&header[..48]).le32(length).raw(&header[52..])
    };
    let length = CONFIG.len() as u32 + 1;
    assert!(matches!(refused(stream(length)), StreamError::Truncated { field: "the libxl header", .. }));
    assert!(matches!(refused(stream(length + 1)), StreamError::Value { offset: 48, .. }));
    let text = StreamBuilder::xl("\u{fffd}").bytes;
    let broken = StreamBuilder::default().raw(&text[..text.len() - 2]).raw(&[0, 0]);
    assert!(matches!(refused(broken), StreamError::Text { offset: 52 }));
}

#[test]
fn every_cut_is_noticed() {
    let bytes = sample();
    for length in (0..bytes.len()).filter(|length| length % 97 == 0 || bytes.len() - length < 200) {
        let cut = parse(&bytes[..length]);
        assert!(
            matches!(cut, Err(StreamError::Truncated { offset, .. }) if offset <= length as u64),
            "{length}: {cut:?}"
        );
    }
}

/// The golden bytes: what the headers and the first record of pages of a guest look like that Xen 4.17 wrote, so that the builder
/// and the parser cannot agree on something else.
#[test]
fn golden_header() {
    let golden = b"Xen saved domain, xl format\n \0 \r\x04\x03\x02\x01\x03\0\0\0\0\0\0\0\x4b\0\0\0\x47\0\0\0\
        {\"c_info\": {\"type\": \"pvh\", \"name\": \"lin\"}, \"b_info\": {\"max_vcpus\": 2}}\0\
        LibxlFmt\0\0\0\x02\0\0\0\0\x01\0\0\0\0\0\0\0\
        \xff\xff\xff\xff\xff\xff\xff\xffXENF\0\0\0\x03\0\0\0\0\0\0\0\0\x02\0\0\0\x0c\0\0\0\x04\0\0\0\x11\0\0\0\
        \x11\0\0\0\x30\0\0\0\x17\x17";
    assert!(sample().starts_with(golden), "{:?}", String::from_utf8_lossy(&sample()[..300]));
}

/// Reads that fail after some bytes.
struct Broken<'b>(&'b [u8]);

impl Read for Broken<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.0.is_empty() { Err(io::Error::other("torn")) } else { self.0.read(buffer) }
    }
}

#[test]
fn errors_of_both_ends_of_a_spool_are_told_apart() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let bytes = sample();
    let mut reader = bytes.as_slice();
    let Err(StreamError::Read { source, .. }) = Stream::parse(&mut Spool::new(&mut reader, full)) else {
        panic!("a full disk is not noticed");
    };
    assert_eq!((source.kind(), source.to_string().contains("cannot write")), (io::ErrorKind::StorageFull, true));
    let mut torn = Broken(&bytes[..9000]);
    let torn = Stream::parse(&mut Spool::new(&mut torn, tempfile::tempfile().unwrap())).unwrap_err();
    assert!(matches!(torn, StreamError::Read { source, .. } if source.to_string() == "torn"));
}

/// An input that gives the bytes of another, and counts those that were read and not passed over.
struct Counting<'b>(&'b [u8], usize);

impl Input for Counting<'_> {
    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.1 += buffer.len();
        self.0.fill(buffer)
    }

    fn skip(&mut self, count: u64) -> io::Result<()> {
        self.0.skip(count)
    }
}

#[test]
fn pages_are_not_read() {
    let bytes = sample();
    let mut input = Counting(&bytes, 0);
    Stream::parse(&mut input).unwrap();
    assert_eq!(input.1, bytes.len() - 15 * 4096);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn changed_bytes_never_panic(changes in proptest::collection::vec((0..70_000_usize, any::<u8>()), 1..6), cut in 0..70_000_usize) {
        let mut bytes = sample();
        for (at, byte) in changes {
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
        }
        bytes.truncate(cut.max(1));
        if let Ok(stream) = parse(&bytes) {
            let _ = crate::import::xen::Layout::new(&stream);
        }
    }

    /// What the runs say of each entry is what it said itself.
    #[test]
    fn runs_say_the_same_as_entries(entries in proptest::collection::vec((0..40_u64, 0..4_u8), 1..60)) {
        let entries: Vec<_> = entries.into_iter().map(|(pfn, kind)| match kind {
            0 => (pfn | XTAB, None),
            1 => (pfn | XALLOC, None),
            fill => (pfn, Some(fill)),
        }).collect();
        let bytes = StreamBuilder::new("").page_data(&entries).state(1, &[]).end().bytes;
        let stream = parse(&bytes).unwrap();
        let told: Vec<_> = stream.pages.iter().flat_map(|run| (0..run.count.get()).map(|index| {
            match run.place.after(PageCount::new(index)) {
                PagePlace::Absent => ((run.first + index) | XTAB, None),
                PagePlace::Unwritten => ((run.first + index) | XALLOC, None),
                PagePlace::Stored(offset) => (run.first + index, Some(bytes[offset as usize])),
            }
        })).collect();
        prop_assert_eq!(told, entries);
    }
}
