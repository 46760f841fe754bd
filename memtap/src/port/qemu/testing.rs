//! A destination for tests: reads the stream as QEMU does, and panics where QEMU would give up.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use descriptor::import::qemu::record::name;
use descriptor::memory::{MemoryMap, PageSize, Region, RegionKind};
use descriptor::vm::{Hypervisor, HypervisorRecord, Identity};
use descriptor::{Descriptor, FrameRange, FrameSet, Gfn, ImageId, PageCount};

use super::return_path::{Message, testing::encode};

/// The section id of the RAM in [`descriptor`].
pub(super) const SECTION_ID: u32 = 0x1234;
const DEVICE_STATE: &[u8] = b"device state";

/// A machine of these blocks: name, pages, and whether those are huge.
pub(super) fn descriptor(blocks: &[(&str, u64, bool)]) -> Descriptor {
    let mut start = 0;
    let mut regions = Vec::new();
    for (name, pages, huge) in blocks {
        let frames = FrameRange::new(Gfn::new(start), PageCount::new(*pages));
        let page_size = if *huge { PageSize::Huge } else { PageSize::Base };
        regions.push(Region { name: (*name).to_owned(), frames, kind: RegionKind::Ram, page_size });
        start = frames.end().index().next_multiple_of(512);
    }
    let memory = MemoryMap::new(regions).unwrap();
    let empty = FrameSet::empty(memory.universe());
    let record = |name: &str, data: &[u8]| HypervisorRecord { name: name.to_owned(), data: data.to_vec() };
    Descriptor {
        identity: Identity {
            image: ImageId::from_bytes([7; 16]),
            parent: "parent".to_owned(),
            hypervisor: Hypervisor::Qemu,
            hypervisor_version: String::new(),
            machine: "pc".to_owned(),
            captured_unix_ns: 0,
            pause_us: None,
        },
        memory,
        records: vec![
            record(name::MACHINE, b"pc"),
            record(name::CONFIGURATION, b""),
            record(name::RAM_SECTION_ID, &SECTION_ID.to_le_bytes()),
            record(name::DEVICE_STATE, DEVICE_STATE),
        ],
        eager: empty.clone(),
        zero: empty.clone(),
        free: empty,
        prefetch: Vec::new(),
        servers: Vec::new(),
    }
}

/// What a destination has, which survives its source: the first byte of every page that arrived.
pub(super) type Received = BTreeMap<Gfn, u8>;

/// A destination that waits for a migration.
pub(super) struct Destination {
    pub(super) memory: MemoryMap,
    pub(super) received: Mutex<Received>,
    /// The pages that came on the preempt channel.
    pub(super) preempted: Mutex<Vec<Gfn>>,
    /// The pages to ask for once it runs, each of them twice.
    pub(super) wants: Vec<Gfn>,
}

struct Stream<'d> {
    input: UnixStream,
    destination: &'d Destination,
    block: Option<Region>,
    /// The huge page that is arriving: its first frame, and how many of its frames have arrived.
    partial: Option<(Gfn, u64)>,
    preempt: bool,
}

impl Destination {
    /// Loads everything, from the header on; true when the end arrived, false when the source went away before.
    pub(super) fn load(&self, main: &UnixStream) -> bool {
        let mut stream = self.stream(main);
        assert_eq!(stream.bytes::<8>(), *b"QEVM\0\0\0\x03");
        assert_eq!(stream.u8(), 7);
        assert_eq!(stream.u32(), 2);
        assert_eq!(stream.bytes::<2>(), *b"pc");
        stream.sections()
    }

    /// Goes on after the death of a source.
    pub(super) fn go_on(&self, main: &UnixStream) -> bool {
        self.stream(main).sections()
    }

    /// Loads what comes on the preempt channel.
    pub(super) fn load_preempt(&self, preempt: &UnixStream) {
        let mut stream = self.stream(preempt);
        stream.preempt = true;
        stream.records();
    }

    fn stream(&self, socket: &UnixStream) -> Stream<'_> {
        Stream { input: socket.try_clone().unwrap(), destination: self, block: None, partial: None, preempt: false }
    }
}

impl Stream<'_> {
    fn sections(&mut self) -> bool {
        loop {
            let mut kind = [0];
            if self.input.read(&mut kind).unwrap_or(0) == 0 {
                return false;
            }
            match kind[0] {
                0 => {
                    // As QEMU does where the preempt channel still has pages; without it all must be there.
                    let deadline = Instant::now() + Duration::from_secs(60);
                    while (self.destination.received.lock().unwrap().len() as u64) < self.frame_count() {
                        assert!(Instant::now() < deadline, "the end came before every page");
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    self.say(&Message::Shut { error: 0 });
                    return true;
                }
                1 => self.announced(),
                2 | 3 => {
                    assert_eq!(self.u32(), SECTION_ID);
                    self.records();
                    self.footer();
                }
                8 => self.command(),
                other => panic!("section of kind {other}"),
            }
        }
    }

    fn command(&mut self) {
        let (command, length) = (self.u16(), usize::from(self.u16()));
        let mut payload = vec![0; length];
        self.input.read_exact(&mut payload).unwrap();
        match command {
            1 | 3 | 6 => {}
            7 => self.package(u32::from_be_bytes(payload.try_into().unwrap())),
            9 => {
                self.say(&Message::ResumeAck { value: 1 });
                self.ask();
            }
            10 => {
                let name = std::str::from_utf8(&payload[1..]).unwrap();
                let region = self.destination.memory.region_named(name).unwrap().clone();
                let mut bits = vec![0u8; region.frames.count().get().div_ceil(64) as usize * 8];
                for gfn in self.destination.received.lock().unwrap().keys().filter(|gfn| region.frames.contains(**gfn))
                {
                    let bit = (*gfn - region.frames.start()).get() as usize;
                    bits[bit / 8] |= 1 << (bit % 8);
                }
                self.say(&Message::ReceivedBitmap { block: name.to_owned(), bits });
            }
            other => panic!("command {other}"),
        }
    }

    fn package(&mut self, length: u32) {
        let mut package = vec![0; length as usize];
        self.input.read_exact(&mut package).unwrap();
        let expected = [b"\x08\0\x04\0\0", DEVICE_STATE, b"\x08\0\x02\0\x04\0\0\0\x01", b"\x08\0\x05\0\0"].concat();
        assert_eq!(package, expected);
        self.say(&Message::Pong { value: 1 });
        self.ask();
    }

    fn ask(&mut self) {
        let mut last = None;
        for gfn in self.destination.wants.iter().flat_map(|gfn| [gfn, gfn]) {
            let region = self.destination.memory.region_of(*gfn).unwrap();
            let block = (last != Some(&region.name)).then(|| region.name.clone());
            last = Some(&region.name);
            let length = region.page_size.frames().bytes() as u32;
            let offset = (*gfn - region.frames.start()).bytes() / u64::from(length) * u64::from(length);
            self.input.write_all(&encode(&Message::RequestPages { block, offset, length })).unwrap();
        }
    }

    fn announced(&mut self) {
        assert_eq!(self.u32(), SECTION_ID);
        assert_eq!(self.name(), "ram");
        assert_eq!((self.u32(), self.u32()), (0, 4));
        let total = self.u64();
        assert_eq!(total, (self.frame_count() * 4096) | 4);
        for region in self.destination.memory.regions() {
            assert_eq!(self.name(), region.name);
            assert_eq!(self.u64(), region.frames.count().bytes());
            if region.page_size == PageSize::Huge {
                assert_eq!(self.u64(), 2 << 20);
            }
        }
        assert_eq!(self.u64(), 0x10);
        self.footer();
    }

    fn records(&mut self) {
        loop {
            let mut head = [0; 8];
            if self.input.read_exact(&mut head).is_err() {
                return;
            }
            let head = u64::from_be_bytes(head);
            let (offset, flags) = (head & !0xfff, head & 0xfff);
            if flags == 0x10 {
                return;
            }
            if flags & 0x20 == 0 {
                let name = self.name();
                self.block = Some(self.destination.memory.region_named(&name).unwrap().clone());
            }
            let region = self.block.clone().unwrap();
            let first = match flags & !0x20 {
                0x02 => {
                    assert_eq!(self.u8(), 0);
                    0
                }
                0x08 => self.bytes::<4096>()[0],
                other => panic!("flags {other:#x}"),
            };
            self.place(&region, region.frames.start() + PageCount::new(offset / 4096), first);
        }
    }

    fn place(&mut self, region: &Region, gfn: Gfn, first: u8) {
        assert!(region.frames.contains(gfn));
        if region.page_size == PageSize::Huge {
            let (start, count) = self.partial.take().unwrap_or((gfn, 0));
            assert_eq!((start.index() % 512, gfn), (0, start + PageCount::new(count)), "a huge page in pieces");
            self.partial = (count < 511).then_some((start, count + 1));
        }
        let twin = self.destination.received.lock().unwrap().insert(gfn, first);
        assert_eq!(twin, None, "page {gfn} came twice");
        if self.preempt {
            self.destination.preempted.lock().unwrap().push(gfn);
        }
    }

    fn frame_count(&self) -> u64 {
        self.destination.memory.frame_count().get()
    }

    fn say(&mut self, message: &Message) {
        self.input.write_all(&encode(message)).unwrap();
    }

    fn footer(&mut self) {
        assert_eq!((self.u8(), self.u32()), (0x7e, SECTION_ID));
    }

    fn name(&mut self) -> String {
        let mut name = vec![0; usize::from(self.u8())];
        self.input.read_exact(&mut name).unwrap();
        String::from_utf8(name).unwrap()
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn u8(&mut self) -> u8 {
        self.bytes::<1>()[0]
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.bytes())
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.bytes())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.bytes())
    }
}
