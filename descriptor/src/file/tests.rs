//! What is written is read again, byte for byte as it was pinned; what was changed is refused; and what a hostile hand
//! sealed with correct checksums is a typed error that says where.

use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::container::ContainerWriter;
use super::*;
use crate::image::{Extent, ExtentError, ExtentTable, ImageFile, ImageIndex};
use crate::memory::{MemoryMap, MemoryMapError, PageSize, Region, RegionKind};
use crate::vm::{Hypervisor, HypervisorRecord, Identity};
use crate::working_set::{Entry, Merged, MergedError};
use crate::{Descriptor, Endpoint, FrameRange, FrameSet, Gfn, ImageId, PageCount, Report};

const IMAGE: ImageId = ImageId::from_bytes(*b"0123456789abcdef");

fn range(start: u64, count: u64) -> FrameRange {
    FrameRange::new(Gfn::new(start), PageCount::new(count))
}

fn memory() -> MemoryMap {
    let ram = Region { name: "ram".into(), frames: range(0, 1024), kind: RegionKind::Ram, page_size: PageSize::Huge };
    let rom = Region { name: "bios".into(), frames: range(2048, 32), kind: RegionKind::Rom, page_size: PageSize::Base };
    MemoryMap::new(vec![ram, rom]).unwrap()
}

fn set(ranges: &[FrameRange]) -> FrameSet {
    FrameSet::from_ranges(memory().universe(), ranges.iter().copied())
}

fn descriptor() -> Descriptor {
    Descriptor {
        identity: Identity {
            image: IMAGE,
            parent: "web".into(),
            hypervisor: Hypervisor::Qemu,
            hypervisor_version: "7.2".into(),
            machine: "pc".into(),
            captured_unix_ns: 1_700_000_000_000_000_000,
            pause_us: Some(6000),
        },
        memory: memory(),
        records: vec![HypervisorRecord { name: "device-state".into(), data: b"QEVM".to_vec() }],
        eager: set(&[range(2048, 2)]),
        zero: set(&[range(0, 1), range(300, 700)]),
        free: set(&[]),
        prefetch: vec![range(256, 16), range(1, 2)],
        servers: vec![Endpoint::Tcp("127.0.0.1:7000".into()), Endpoint::Unix("/s".into())],
    }
}

fn index() -> ImageIndex {
    let files = vec![
        ImageFile { path: "web.ram".into(), length: 1 << 22 },
        ImageFile { path: "/images/bios.bin".into(), length: 200_000 },
    ];
    let extents = vec![
        Extent { frames: range(0, 1024), file: 0, offset: 0, stride: 4096 },
        Extent { frames: range(2048, 20), file: 1, offset: 17, stride: 4104 },
    ];
    let extents = ExtentTable::new(extents, &[1 << 22, 200_000]).unwrap();
    ImageIndex { image: IMAGE, memory: memory(), files, extents, zero: set(&[range(5, 3)]) }
}

fn hex(bytes: &[u8]) -> String {
    let lines: Vec<String> =
        bytes.chunks(32).map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
    lines.join("\n")
}

#[test]
fn golden_descriptor() {
    let bytes = descriptor().encode();
    assert_eq!(hex(&bytes), include_str!("golden/descriptor.hex").trim_end());
    assert_eq!(Descriptor::decode(&bytes), Ok(descriptor()));
}

#[test]
fn golden_index() {
    let bytes = index().encode();
    assert_eq!(hex(&bytes), include_str!("golden/index.hex").trim_end());
    assert_eq!(ImageIndex::decode(&bytes), Ok(index()));
}

fn working_set() -> Merged {
    let entry = |start, count, needed, asked| Entry { range: range(start, count), needed, asked };
    let entries = vec![entry(0x120, 3, 2, 3), entry(0x20, 16, 16, 16), entry(0x40, 1, 1, 6)];
    Merged::from_parts(ImageId::from_bytes([7; 16]), PageCount::new(0x1000), 311, 300, entries).unwrap()
}

#[test]
fn golden_working_set() {
    let bytes = working_set().encode();
    assert_eq!(hex(&bytes), include_str!("golden/working_set.hex").trim_end());
    assert_eq!(Merged::decode(&bytes), Ok(working_set()));
}

#[test]
fn a_damaged_or_hostile_working_set_is_refused() {
    let bytes = working_set().encode();
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Merged::decode(&damaged).is_err(), "bit {bit}");
    }
    let forged = |needed: &[u8]| {
        let mut writer = ContainerWriter::new(FileKind::WorkingSet);
        writer.required(SectionKind::IMAGE, &[7; 16]);
        writer.required(SectionKind::NEEDED, needed);
        Merged::decode(&writer.finish()).unwrap_err()
    };
    let hold = |error| FormatError::WorkingSet(error);
    let counts = |needed, asked| MergedError::Counts { range: range(0, 1), needed, asked };
    for (needed, expected) in [
        (&[64, 1, 1, 0, 17, 1, 1][..], hold(MergedError::Range(range(0, 17)))),
        (&[64, 1, 1, 0, 0, 1, 1], hold(MergedError::Range(range(0, 0)))),
        (&[64, 1, 1, 16, 9, 1, 1], hold(MergedError::Range(range(8, 9)))),
        (&[8, 1, 1, 0, 9, 1, 1], hold(MergedError::Range(range(0, 9)))),
        (&[64, 1, 1, 0, 2, 1, 1, 1, 2, 1, 1], hold(MergedError::Twice(range(1, 2)))),
        (&[64, 1, 1, 0, 1, 0, 1], hold(counts(0, 1))),
        (&[64, 1, 1, 0, 1, 2, 1], hold(counts(2, 1))),
        (&[64, 1, 1, 0, 1, 1, 17], hold(counts(1, 17))),
        (&[64, 1, 2], hold(MergedError::Clones { heard: 1, whole: 2 })),
        (&[0x80, 0x80, 0x80, 0x80, 0x40, 1, 1], hold(MergedError::Universe(PageCount::new(1 << 34)))),
    ] {
        assert_eq!(forged(needed), expected, "{needed:?}");
    }
    let text = forged(&[64, 1, 1, 1, 1, 1, 1]).to_string();
    assert_eq!(
        text,
        "section needed: an entry's distance at byte 3 is 18446744073709551615, which the format does not allow"
    );
    let many: Vec<u8> = (0..=Merged::MAX_ENTRIES).flat_map(|_| [0, 1, 1, 1]).collect();
    let many = [&[0x80, 0x80, 0x80, 1, 1, 1][..], &many].concat();
    assert_eq!(forged(&many), hold(MergedError::TooMany));
}

#[test]
fn every_truncation_is_refused() {
    for bytes in [descriptor().encode(), index().encode()] {
        for length in 0..bytes.len() {
            let cut = &bytes[..length];
            for error in [Descriptor::decode(cut).err(), ImageIndex::decode(cut).err()] {
                let typed = matches!(error, Some(FormatError::Truncated { .. } | FormatError::Length { .. }));
                assert!(typed, "cut to {length} bytes: {error:?}");
            }
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(matches!(Descriptor::decode(&longer), Err(FormatError::Length { .. })));
    }
}

#[test]
fn every_flipped_bit_is_refused() {
    let check = |mut bytes: Vec<u8>, decode: fn(&[u8]) -> bool| {
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);

            assert!(!decode(&bytes), "bit {bit} flipped unnoticed");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        assert!(decode(&bytes));
    };
    check(descriptor().encode(), |bytes| Descriptor::decode(bytes).is_ok());
    check(index().encode(), |bytes| ImageIndex::decode(bytes).is_ok());
}

#[test]
fn a_flipped_bit_is_located() {
    let mut bytes = descriptor().encode();
    let offset = Container::open(&bytes).unwrap().sections()[4].offset;
    bytes[offset as usize] ^= 1;
    let expected = FormatError::SectionChecksum { section: SectionKind::ZERO, offset };
    assert_eq!(Descriptor::decode(&bytes), Err(expected));
}

#[test]
fn other_files_are_told_apart() {
    assert_eq!(Descriptor::decode(b"\x7fELF\x02"), Err(FormatError::Magic(*b"\x7fELF")));
    assert_eq!(Descriptor::decode(b"\x7f"), Err(FormatError::Magic([0x7f, 0, 0, 0])));
    let wrong = FormatError::WrongKind { found: FileKind::ImageIndex, expected: FileKind::Descriptor };
    assert_eq!(Descriptor::decode(&index().encode()), Err(wrong));
    // Only the preamble is looked at when the version is another.
    let newer = FormatError::Version { file: Version { major: 2, minor: 7 }, ours: Version::OURS };
    assert_eq!(Descriptor::decode(b"SNOW\x01\x00\x02\x07"), Err(newer));
    assert_eq!(Descriptor::decode(b"SNOW\x09\x00\x01\x00"), Err(FormatError::UnknownKind(9)));
}

/// A file with the sections of `descriptor()`, changed by `change`, sealed as if it were genuine.
fn forged(change: impl Fn(&mut Vec<(SectionKind, Vec<u8>)>)) -> Result<Descriptor, FormatError> {
    let bytes = descriptor().encode();
    let container = Container::open(&bytes).unwrap();
    let mut sections: Vec<_> = container
        .sections()
        .iter()
        .map(|entry| (entry.kind, container.contents(entry.kind).unwrap().to_vec()))
        .collect();
    change(&mut sections);
    let mut writer = ContainerWriter::new(FileKind::Descriptor);
    sections.iter().for_each(|(kind, contents)| writer.required(*kind, contents));
    Descriptor::decode(&writer.finish())
}

fn forged_section(kind: SectionKind, contents: &[u8]) -> FormatError {
    let replace = |sections: &mut Vec<(SectionKind, Vec<u8>)>| {
        let section = sections.iter_mut().find(|(other, _)| *other == kind).unwrap();
        section.1 = contents.to_vec();
    };
    forged(replace).unwrap_err()
}

#[test]
fn unknown_sections_are_skipped_or_refused() {
    let unknown = SectionKind(77);
    let refused = forged(|sections| sections.push((unknown, vec![1])));
    assert_eq!(refused, Err(FormatError::UnknownRequired { section: unknown, offset: 24 + 7 * 40 }));
    assert!(refused.unwrap_err().to_string().contains("number 77"));

    let mut writer = ContainerWriter::new(FileKind::Descriptor);
    let bytes = descriptor().encode();
    let container = Container::open(&bytes).unwrap();
    for entry in container.sections() {
        writer.required(entry.kind, &container.contents(entry.kind).unwrap());
    }
    writer.optional(unknown, &[1]);
    assert_eq!(Descriptor::decode(&writer.finish()), Ok(descriptor()));
    // A section of the other kind of file is as unknown as any.
    let foreign = forged(|sections| sections.push((SectionKind::FILES, vec![])));
    assert!(matches!(foreign, Err(FormatError::UnknownRequired { section: SectionKind::FILES, .. })));
}

#[test]
fn the_table_is_in_order_without_duplicates() {
    let swapped = forged(|sections| sections.swap(0, 1));
    let order = FormatError::Order { section: SectionKind::IDENTITY, previous: SectionKind::MEMORY, offset: 24 + 40 };
    assert_eq!(swapped, Err(order));
    let twice = forged(|sections| sections.insert(1, sections[0].clone()));
    assert_eq!(twice, Err(FormatError::Duplicate { section: SectionKind::IDENTITY, offset: 24 + 40 }));
    let missing = forged(|sections| drop(sections.remove(1)));
    assert_eq!(missing, Err(FormatError::Missing(SectionKind::MEMORY)));
}

#[test]
fn hostile_contents_are_located() {
    let memory_region = |start: u64, count: u64, kind: u8, name: &[u8]| {
        [&start.to_le_bytes()[..], &count.to_le_bytes(), &[kind, 0, name.len() as u8, 0], name].concat()
    };
    let section = SectionKind::MEMORY;
    let refused = |contents: &[u8]| forged_section(section, contents);
    let field = |field, offset, value| FormatError::Field { section, field, offset, value };
    assert_eq!(refused(&[]), MemoryMapError::NoRegions.into());
    assert_eq!(refused(&[0; 19]), FormatError::SectionTruncated { section, field: "a region", offset: 0 });
    assert_eq!(refused(&memory_region(u64::MAX, 1, 0, b"a")), field("a region's first frame", 0, u64::MAX));
    assert_eq!(refused(&memory_region(1, u64::MAX, 0, b"a")), field("a region's number of frames", 8, u64::MAX));
    assert_eq!(refused(&memory_region(1, 1, 9, b"a")), field("a region's kind", 16, 9));
    let text = FormatError::Text { section, field: "a region's name", offset: 20 };
    assert_eq!(refused(&memory_region(1, 1, 0, b"\xff")), text);
    let overlap = [memory_region(0, 4096, 0, b"a"), memory_region(4095, 4096, 0, b"b")].concat();
    assert!(matches!(refused(&overlap), FormatError::Memory(MemoryMapError::Overlap { .. })));
    // A map that the other sections do not fit.
    let smaller = refused(&memory_region(0, 2049, 0, b"a"));
    assert!(matches!(smaller, FormatError::FrameSet { section: SectionKind::EAGER, .. }), "{smaller:?}");
}

#[test]
fn hostile_lists_end_with_their_section() {
    let record = [&u64::MAX.to_le_bytes()[..], &1u16.to_le_bytes(), &[0; 6], b"n"].concat();
    let section = SectionKind::RECORDS;
    let expected = FormatError::SectionTruncated { section, field: "a record's data", offset: 17 };
    assert_eq!(forged_section(section, &record), expected);

    let section = SectionKind::PREFETCH;
    let field = "a run's number of frames";
    assert_eq!(forged_section(section, &[0, 0x80]), FormatError::SectionTruncated { section, field, offset: 1 });
    assert_eq!(forged_section(section, &[0, 0x80, 0]), FormatError::Number { section, field, offset: 1 });
    assert_eq!(forged_section(section, &[0, 0]), ContentError::EmptyRun { index: 0 }.into());
    let beyond = FormatError::Field { section, field, offset: 0, value: 1 };
    assert_eq!(forged_section(section, &[1, 1]), beyond);
    let absent = ContentError::Absent { what: "prefetch order", frames: range(1024, 1) };
    assert_eq!(forged_section(section, &[0x80, 0x10, 1]), absent.into());

    let section = SectionKind::SERVERS;
    assert!(matches!(forged_section(section, b"\x03\x00foo"), FormatError::Endpoint { offset: 2, .. }));
    assert!(matches!(forged_section(section, b"\x04\x00foo"), FormatError::SectionTruncated { offset: 2, .. }));

    let identity = [forged_identity(), vec![0]].concat();
    let section = SectionKind::IDENTITY;
    assert_eq!(forged_section(section, &identity), FormatError::Trailing { section, offset: 56, count: 1 });
}

fn forged_identity() -> Vec<u8> {
    let bytes = descriptor().encode();
    Container::open(&bytes).unwrap().contents(SectionKind::IDENTITY).unwrap().to_vec()
}

#[test]
fn hostile_extents_are_located() {
    let bytes = index().encode();
    let forged = |extents: &[u8]| {
        let container = Container::open(&bytes).unwrap();
        let mut writer = ContainerWriter::new(FileKind::ImageIndex);
        for entry in container.sections().iter().filter(|entry| entry.kind != SectionKind::EXTENTS) {
            writer.required(entry.kind, &container.contents(entry.kind).unwrap());
        }
        writer.required(SectionKind::EXTENTS, extents);
        ImageIndex::decode(&writer.finish()).unwrap_err()
    };
    let section = SectionKind::EXTENTS;
    assert_eq!(forged(&[0, 0, 0, 0, 0]), ExtentError::Empty(Gfn::new(0)).into());
    assert!(matches!(forged(&[0, 1, 2, 0, 0]), FormatError::Extents(ExtentError::NoSuchFile { .. })));
    assert!(matches!(forged(&[0, 1, 0, 1, 0]), FormatError::Extents(ExtentError::BeyondFile { .. })));
    let absent = ContentError::Absent { what: "extent table", frames: range(1030, 1) };
    assert_eq!(forged(&[0x86, 8, 1, 0, 0, 0]), absent.into());
    let file = FormatError::Field { section, field: "an extent's file", offset: 2, value: 1 << 16 };
    assert_eq!(forged(&[0, 1, 0x80, 0x80, 4, 0, 0]), file);
    assert!(matches!(forged(&[0, 1, 0]), FormatError::SectionTruncated { field: "an extent's offset", offset: 3, .. }));
}

#[test]
fn compression_cannot_ask_for_more_than_it_holds() {
    let mut large = descriptor();
    large.records[0].data = vec![0; 100_000];
    let bytes = large.encode();
    let entry = Container::open(&bytes).unwrap().sections()[2].clone();
    assert!(entry.compressed && entry.stored < 1000 && entry.plain > 100_000, "{entry:?}");
    assert_eq!(Descriptor::decode(&bytes), Ok(large));

    let plain_length = 24 + 2 * 40 + 16;
    let claim = |plain: u64| {
        let mut bytes = bytes.clone();
        bytes[plain_length..plain_length + 8].copy_from_slice(&plain.to_le_bytes());
        Container::open(&bytes).map(|_| ()).unwrap_err()
    };
    let stored = entry.stored;
    for plain in [stored * 255 + 1, u64::MAX, MAX_COMPRESSED + 1] {
        assert_eq!(claim(plain), FormatError::Expansion { section: SectionKind::RECORDS, stored, plain });
    }
}

#[test]
fn what_breaks_the_rules_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.snow");
    let mut broken = descriptor();
    broken.identity.parent = "x".repeat(Descriptor::MAX_TEXT + 1);
    assert!(matches!(broken.write(&path), Err(FileError::Unwritable { .. })));
    let mut broken = descriptor();
    broken.zero = FrameSet::empty(PageCount::new(1));
    assert!(matches!(broken.check(), Err(ContentError::Universe { set: "zero", .. })));
    broken.zero = set(&[range(1024, 1)]);
    assert!(matches!(broken.check(), Err(ContentError::Absent { what: "zero", .. })));
    let mut broken = descriptor();
    broken.servers.push(Endpoint::Tcp("nonsense".into()));
    assert!(matches!(broken.check(), Err(ContentError::Server(_))));
    let mut broken = index();
    broken.files[1].length = 100;
    assert!(matches!(broken.check(), Err(ContentError::Extents(_))));
    broken.files[1].path = PathBuf::new();
    assert!(matches!(broken.check(), Err(ContentError::TextLength { .. })));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn files_are_replaced_as_a_whole() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("x.snow"), folder.path().join("x.snowidx"));
    std::fs::write(&first, "old").unwrap();
    descriptor().write(&first).unwrap();
    index().write(&second).unwrap();
    assert_eq!(Descriptor::read(&first).unwrap(), descriptor());
    assert_eq!(ImageIndex::read(&second).unwrap(), index());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "no temporary file is left");

    let error = Report(&Descriptor::read(&second).unwrap_err()).to_string();
    assert!(error.contains("x.snowidx") && error.contains("an image index"), "{error}");
    let error = Report(&descriptor().write(&folder.path().join("none/x.snow")).unwrap_err()).to_string();
    assert!(error.contains("none") && error.contains("No such file"), "{error}");
    assert!(matches!(Descriptor::read(folder.path()), Err(FileError::NotRegular(_))));
    assert!(matches!(Descriptor::read(Path::new("/dev/zero")), Err(FileError::NotRegular(_))));
}

#[test]
fn pairs_of_files_have_one_name() {
    for name in ["a/web.1", "a/web.1.snow", "a/web.1.snowidx"] {
        assert_eq!(FileKind::Descriptor.path(Path::new(name)), Path::new("a/web.1.snow"));
        assert_eq!(FileKind::ImageIndex.path(Path::new(name)), Path::new("a/web.1.snowidx"));
    }
}

fn frame_sets() -> impl Strategy<Value = FrameSet> {
    proptest::collection::vec((0..1024u64, 1..200u64), 0..20).prop_map(|ranges| {
        let ranges: Vec<_> = ranges.into_iter().map(|(s, c)| range(s, c.min(1024 - s))).collect();
        set(&ranges)
    })
}

fn descriptors() -> impl Strategy<Value = Descriptor> {
    let texts = ("\\PC{0,20}", "\\PC{0,20}", "\\PC{0,20}");
    let records = proptest::collection::vec(("\\PC{1,20}", proptest::collection::vec(any::<u8>(), 0..300)), 0..5);
    let prefetch = proptest::collection::vec((0..1024u64, 1..200u64), 0..20);
    let sets = (frame_sets(), frame_sets(), frame_sets());
    (texts, any::<([u8; 16], u64, Option<u64>)>(), records, sets, prefetch).prop_map(
        |((parent, hypervisor_version, machine), (image, captured_unix_ns, pause_us), records, sets, prefetch)| {
            let records = records.into_iter().map(|(name, data)| HypervisorRecord { name, data }).collect();
            Descriptor {
                identity: Identity {
                    image: ImageId::from_bytes(image),
                    parent,
                    hypervisor: Hypervisor::Xen,
                    hypervisor_version,
                    machine,
                    captured_unix_ns,
                    pause_us,
                },
                records,
                eager: sets.0,
                zero: sets.1,
                free: sets.2,
                prefetch: prefetch.into_iter().map(|(s, c)| range(s, c.min(1024 - s))).collect(),
                ..descriptor()
            }
        },
    )
}

fn indices() -> impl Strategy<Value = ImageIndex> {
    let extent = (0..30u64, 1..30u64, 0..2u16, 0..(1u64 << 45), 4096..100_000u32);
    (proptest::collection::vec(extent, 0..40), frame_sets()).prop_map(|(extents, zero)| {
        let mut end = 0;
        let mut table = Vec::new();
        for (gap, count, file, offset, stride) in extents {
            let frames = range(end + gap, count);
            end = frames.end().index();
            if end <= 1024 {
                table.push(Extent { frames, file, offset, stride });
            }
        }
        let files: Vec<_> =
            ["a", "b"].map(|path| ImageFile { path: path.into(), length: u64::MAX }).into_iter().collect();
        let extents = ExtentTable::new(table, &[u64::MAX; 2]).unwrap();
        ImageIndex { extents, zero, files, ..index() }
    })
}

proptest! {
    #[test]
    fn descriptors_round_trip(descriptor in descriptors()) {
        prop_assert_eq!(Descriptor::decode(&descriptor.encode()), Ok(descriptor));
    }

    #[test]
    fn indices_round_trip(index in indices()) {
        prop_assert_eq!(ImageIndex::decode(&index.encode()), Ok(index));
    }

    #[test]
    fn what_is_read_from_forged_sections_can_be_written_again(
        which in 0..7usize,
        contents in proptest::collection::vec(prop_oneof![Just(0), Just(1), any::<u8>()], 0..64),
    ) {
        if let Ok(descriptor) = forged(|sections| sections[which].1 = contents.clone()) {
            prop_assert_eq!(Descriptor::decode(&descriptor.encode()), Ok(descriptor));
        }
    }

    #[test]
    fn any_bytes_never_panic(tail in proptest::collection::vec(any::<u8>(), 0..200)) {
        let bytes = [b"SNOW\x01\x00\x01\x00".as_slice(), &(tail.len() as u64 + 16).to_le_bytes(), &tail].concat();
        prop_assert!(Descriptor::decode(&bytes).is_err());
    }
}
