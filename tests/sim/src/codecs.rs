//! Decoders on bytes from anywhere: what fuzzing and property tests share.

use descriptor::fetch::{Message, Preamble, decode, decode_preamble};
use descriptor::image::{ImageError, ReadPages};
use descriptor::import::qemu::Layout;
use descriptor::import::qemu::stream::Stream;
use descriptor::import::xen;
use descriptor::memory::MemoryMap;
use descriptor::vm::{Hypervisor, Identity};
use descriptor::{Descriptor, FrameRange, FrameSet, ImageId, PAGE_SIZE, PageCount};
use mcast::wire::Datagram;
use mcast::{BlockMap, ChunkSet};
use memtap::port::qemu::return_path::{Message as QemuMessage, ReturnPath, ReturnPathError};

/// The universe of the frame sets: 4 GiB of memory, more than one chunk of bitmap and not a whole number of them.
const UNIVERSE: PageCount = PageCount::new((1 << 20) - 100);

/// Decodes `bytes` as a stream of the fetch protocol.
///
/// # Panics
/// When a message that was accepted is not the same after it was encoded and decoded again, or takes more bytes than there are.
pub fn fetch(bytes: &[u8]) {
    if let Ok(Some((_, length))) = decode_preamble(bytes) {
        let mut preamble = Vec::new();
        Preamble.encode(&mut preamble);
        assert_eq!(preamble.len(), length);
    }
    let mut rest = bytes;
    while let Ok(Some((message, length))) = decode(rest) {
        assert!((1..=rest.len()).contains(&length), "a message of {length} bytes in {}", rest.len());
        check(&message);
        rest = &rest[length..];
    }
}

/// Decodes `bytes` as a datagram of a multicast channel, and what a shard or a report holds.
///
/// # Panics
/// When what was accepted is not the same after it was encoded and decoded again, or grew by that.
pub fn mcast_wire(bytes: &[u8]) {
    if let Some(map) = bytes.first_chunk::<{ BlockMap::LENGTH }>()
        && let Ok(decoded) = BlockMap::decode(map, UNIVERSE)
    {
        assert_eq!(decoded.encode(), *map);
        assert!(decoded.runs().all(|(range, _)| range.end().index() <= UNIVERSE.get()));
    }
    let Ok(datagram) = Datagram::decode(bytes) else {
        return;
    };
    let mut encoded = Vec::new();
    datagram.encode(&mut encoded);
    assert!(encoded.len() <= bytes.len(), "{} bytes became {}", bytes.len(), encoded.len());
    assert_eq!(Datagram::decode(&encoded), Ok(datagram));
    match datagram {
        Datagram::Shard(shard) => mcast_wire(shard.payload),
        Datagram::Report(report) => {
            let chunks = report.lacks.map_or(ChunkSet::new(100), |lacks| lacks.set(100));
            assert!(chunks.iter().all(|chunk| chunk < 100));
        }
        Datagram::Pulse(_) | Datagram::Confirm(_) | Datagram::Nack(_) => {}
    }
}

/// Decodes `bytes` as a frame set.
///
/// # Panics
/// When a set that was accepted does not encode to the bytes that it came from in fewest, or not to itself.
pub fn frame_set(bytes: &[u8]) {
    let Ok(set) = FrameSet::decode(bytes, UNIVERSE) else {
        return;
    };
    let encoded = set.encode();
    assert!(encoded.len() <= bytes.len(), "{} bytes became {}", bytes.len(), encoded.len());
    assert_eq!(FrameSet::decode(&encoded, UNIVERSE).as_ref(), Ok(&set));
    let count: PageCount = set.runs().map(FrameRange::count).sum();
    assert_eq!(set.count(), count);
    assert_eq!(FrameSet::from_ranges(UNIVERSE, set.runs()), set);
}

/// Decodes `bytes`, after a first one that says how they are cut into pieces, as the return path of a QEMU.
///
/// # Panics
/// When the pieces make other messages, or another error, than the whole.
pub fn qemu_return_path(bytes: &[u8]) {
    let Some((piece, stream)) = bytes.split_first() else {
        return;
    };
    let whole = qemu_messages([stream]);
    let cut = qemu_messages(stream.chunks(usize::from(*piece) + 1));
    assert_eq!(cut, whole);
}

/// Parses `bytes` as a migration stream that QEMU saved, and lays its RAM out.
///
/// # Panics
/// When what was accepted lies outside of the stream, or a frame is both stored and a hole.
pub fn qemu_stream(bytes: &[u8]) {
    let length = bytes.len() as u64;
    let Ok(stream) = Stream::parse(&bytes) else {
        return;
    };
    assert_eq!(stream.length, length);
    assert!(stream.device_state.len() + stream.vm_description.len() + stream.configuration.len() <= bytes.len());
    let Ok(layout) = Layout::new(&stream, &[], &[length]) else {
        return;
    };
    for extent in layout.extents.extents() {
        assert!(extent.frames.frames().all(|gfn| !layout.holes.contains(gfn)), "stored, and a hole: {extent:?}");
    }
}

/// Parses `bytes` as a stream of `xl save`, from memory and from a pipe, and lays its memory out.
///
/// # Panics
/// When what was accepted lies outside of the stream, a frame is both stored and a hole, a pipe makes something else, or a clone's
/// stream brings other things than its parent's.
pub fn xen_stream(bytes: &[u8]) {
    let parsed = xen::stream::Stream::parse(&mut &bytes[..]);
    if let Ok(stream) = &parsed {
        let kept: usize = stream.records.iter().map(|record| record.data.len()).sum();
        let length = usize::try_from(stream.length).unwrap_or(usize::MAX);
        assert!(kept < length && length <= bytes.len(), "{kept} of {length} bytes were kept, of {}", bytes.len());
        assert!(stream.pages_at < stream.records.len());
        if let Ok(layout) = xen::Layout::new(stream) {
            for extent in layout.extents.extents() {
                assert!(layout.holes.runs_in(extent.frames).next().is_none(), "stored, and a hole: {extent:?}");
                assert!(layout.memory.covers(extent.frames), "stored, and absent: {extent:?}");
            }
            check_clone(stream, layout, bytes);
        }
    }
    let (mut pipe, mut kept) = (bytes, Vec::new());
    match (xen::stream::Stream::parse(&mut xen::stream::Spool::new(&mut pipe, &mut kept)), parsed) {
        (Ok(spooled), Ok(parsed)) => {
            assert_eq!(spooled, parsed);
            assert!(bytes.starts_with(&kept));
            assert_eq!((kept.len() as u64, kept.len() + pipe.len()), (parsed.length, bytes.len()));
        }
        (spooled, parsed) => {
            assert!(spooled.is_err() && parsed.is_err(), "{spooled:?} from a pipe, {parsed:?} from memory")
        }
    }
}

/// A clone's stream has the records of its parent's and the special pages, and is what its own clone would get.
fn check_clone(stream: &xen::stream::Stream, layout: xen::Layout, bytes: &[u8]) {
    let pages = StreamPages { bytes, layout };
    let records = match xen::record::records(stream.clone(), &pages.layout, &pages) {
        Ok(records) => records,
        Err(error) => panic!("the special pages cannot be read: {error}"),
    };
    let empty = FrameSet::empty(pages.layout.memory.universe());
    let identity = Identity {
        image: ImageId::from_bytes([0; 16]),
        parent: String::new(),
        hypervisor: Hypervisor::Xen,
        hypervisor_version: String::new(),
        machine: String::new(),
        captured_unix_ns: 0,
        pause_us: None,
    };
    let descriptor = Descriptor {
        identity,
        memory: pages.layout.memory,
        records,
        eager: empty.clone(),
        zero: empty.clone(),
        free: empty,
        prefetch: Vec::new(),
        servers: Vec::new(),
    };
    let hole = match xen::hole_stream(&descriptor) {
        Ok(hole) => hole,
        Err(error) => panic!("no clone can be made: {error:?}"),
    };
    let again = match xen::stream::Stream::parse(&mut hole.as_slice()) {
        Ok(again) => again,
        Err(error) => panic!("the clone's stream is none: {error}"),
    };
    assert_eq!((again.records, again.pages_at), (stream.records.clone(), stream.pages_at));
}

/// The pages of a stream in memory.
struct StreamPages<'b> {
    bytes: &'b [u8],
    layout: xen::Layout,
}

impl ReadPages for StreamPages<'_> {
    fn memory(&self) -> &MemoryMap {
        &self.layout.memory
    }

    fn read_pages(&self, frames: FrameRange, buffer: &mut [u8]) -> Result<(), ImageError> {
        for (gfn, page) in frames.frames().zip(buffer.chunks_exact_mut(PAGE_SIZE as usize)) {
            let extent = self.layout.extents.find(gfn).ok_or(ImageError::Absent(frames))?;
            page.copy_from_slice(&self.bytes[extent.offset_of(gfn) as usize..][..PAGE_SIZE as usize]);
        }
        Ok(())
    }
}

fn qemu_messages<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<QemuMessage>, Option<ReturnPathError>) {
    let mut return_path = ReturnPath::new(4096);
    let mut messages = Vec::new();
    for piece in pieces {
        return_path.push(piece);
        loop {
            match return_path.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Some(error)),
            }
        }
    }
    (messages, None)
}

fn check(message: &Message<'_>) {
    let mut encoded = Vec::new();
    message.encode(&mut encoded);
    match decode(&encoded) {
        Ok(Some((again, length))) => {
            assert_eq!(length, encoded.len());
            assert_eq!(&again, message);
        }
        other => panic!("{message:?} was encoded, then decoded as {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use descriptor::Gfn;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            fetch(&bytes);
            mcast_wire(&bytes);
            frame_set(&bytes);
            qemu_return_path(&bytes);
            qemu_stream(&bytes);
            xen_stream(&bytes);
        }

        #[test]
        fn bytes_that_begin_well(kind in 1..11_u8, length in 0..64_u8, body in proptest::collection::vec(0..4_u8, 64)) {
            let mut bytes = vec![kind, 0, 0, 0, length, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
            bytes.extend(body);
            fetch(&bytes);
        }

        #[test]
        fn datagrams_that_begin_well(kind in 1..9_u8, bulk: bool, body in proptest::collection::vec(0..4_u8, 200)) {
            let mut bytes = vec![1, kind | if bulk { 0x80 } else { 0 }];
            bytes.extend(body);
            mcast_wire(&bytes);
        }

        #[test]
        fn qemu_messages_that_begin_well(piece in 0..40_u8, kinds in proptest::collection::vec((1..7_u8, 0..20_u8), 1..6)) {
            let mut bytes = vec![piece];
            for (kind, length) in kinds {
                bytes.extend([0, kind, 0, length]);
                bytes.extend((0..length).map(|at| if at == 12 { length.wrapping_sub(13) } else { 0 }));
            }
            qemu_return_path(&bytes);
        }

        /// A guest's stream, of which all but a few pages were cut out.
        #[test]
        fn real_streams_of_xen_with_a_few_changes(
            changes in proptest::collection::vec((0..21_000_usize, prop_oneof![Just(0), Just(0xff), any::<u8>()]), 0..4),
        ) {
            let mut bytes = include_bytes!("../../../descriptor/tests/data/xen-4.17-pvh.xl").to_vec();
            for (position, byte) in changes {
                if let Some(place) = bytes.get_mut(position) {
                    *place = byte;
                }
            }
            xen_stream(&bytes);
        }

        /// Found by fuzzing: bytes that a receiver ignores made two equal requests unequal.
        #[test]
        fn reserved_bytes_make_no_difference(reserved in any::<[u8; 4]>()) {
            let mut bytes = vec![4, 0, 0, 0, 16, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
            bytes.extend(reserved);
            fetch(&bytes);
        }

        #[test]
        fn any_frame_set(runs in proptest::collection::vec((0..UNIVERSE.get(), 1..100_000_u64), 0..20)) {
            let range = |(start, count): (u64, u64)| {
                FrameRange::new(Gfn::new(start), PageCount::new(count.min(UNIVERSE.get() - start)))
            };
            frame_set(&FrameSet::from_ranges(UNIVERSE, runs.into_iter().map(range)).encode());
        }
    }
}
