//! What the system tests share: an image with every kind of frame, and a small blocking client.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use descriptor::fetch::{
    Capabilities, ChannelGoneReason, ChannelOffer, Class, Delivery, Encoding, Hello, Limits, Message, Preamble,
    Request, Tag, decode, decode_preamble,
};
use descriptor::image::{Extent, ExtentTable, ImageFile, ImageIndex};
use descriptor::memory::{MemoryMap, PageSize, Region, RegionKind};
use descriptor::{Endpoint, FrameRange, FrameSet, Gfn, ImageId, PAGE_SIZE, PageCount};
use memserver::{ServeConfig, Server};

/// Longer than anything here takes on a busy machine; reaching it is a failure.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The frames of the test image: 0..1000 in a raw file, 1000..1500 in a stream with 8 bytes between pages, 1500..1600
/// nowhere (zero), 2000..4096 in a raw file again. Of the stored ones 100..130 and every 7th from 2000 to 2100 are zero.
pub const FRAMES: u64 = 4096;

pub const PAGE: usize = PAGE_SIZE as usize;

pub struct TestImage {
    pub folder: tempfile::TempDir,
    pub index: PathBuf,
    pub id: ImageId,
}

pub fn range(start: u64, count: u64) -> FrameRange {
    FrameRange::new(Gfn::new(start), PageCount::new(count))
}

fn is_zero(frame: u64) -> bool {
    (100..130).contains(&frame)
        || (1500..2000).contains(&frame)
        || (2000..2100).contains(&frame) && frame.is_multiple_of(7)
}

/// What the page of a frame holds. Half of the pages are noise, the others text-like.
pub fn page_of(frame: u64) -> &'static [u8] {
    static PAGES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| (0..FRAMES).map(make_page).collect());
    &PAGES[frame as usize]
}

fn make_page(frame: u64) -> Vec<u8> {
    if is_zero(frame) {
        return vec![0; PAGE];
    }
    let mut state = frame.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut page = Vec::with_capacity(PAGE);
    while page.len() < PAGE {
        let word = if frame.is_multiple_of(2) { next() } else { next() & 0x0101 | frame << 32 };
        page.extend_from_slice(&word.to_le_bytes());
    }
    page
}

impl TestImage {
    pub fn new(number: u8) -> Self {
        Self::within(number, tempfile::tempdir().unwrap())
    }

    pub fn within(number: u8, folder: tempfile::TempDir) -> Self {
        let id = ImageId::from_bytes([number; 16]);
        let raw: Vec<u8> = (0..1000).chain(2000..FRAMES).flat_map(page_of).copied().collect();
        let stream: Vec<u8> = (1000..1500).flat_map(|frame| [&[0xee; 8], page_of(frame)].concat()).collect();
        std::fs::write(folder.path().join("raw"), &raw).unwrap();
        std::fs::write(folder.path().join("stream"), &stream).unwrap();
        let extents = vec![
            Extent { frames: range(0, 1000), file: 0, offset: 0, stride: 4096 },
            Extent { frames: range(1000, 500), file: 1, offset: 8, stride: 4104 },
            Extent { frames: range(2000, FRAMES - 2000), file: 0, offset: 1000 * PAGE_SIZE, stride: 4096 },
        ];
        let lengths = [raw.len() as u64, stream.len() as u64];
        let region =
            |name: &str, frames| Region { name: name.into(), frames, kind: RegionKind::Ram, page_size: PageSize::Base };
        let universe = PageCount::new(FRAMES);
        let index = ImageIndex {
            image: id,
            memory: MemoryMap::new(vec![region("low", range(0, 1600)), region("high", range(2000, FRAMES - 2000))])
                .unwrap(),
            files: vec![
                ImageFile { path: "raw".into(), length: lengths[0] },
                ImageFile { path: "stream".into(), length: lengths[1] },
            ],
            extents: ExtentTable::new(extents, &lengths).unwrap(),
            zero: FrameSet::from_ranges(
                universe,
                (0..1600).chain(2000..FRAMES).filter(|frame| is_zero(*frame)).map(|frame| range(frame, 1)),
            ),
        };
        let path = folder.path().join("test.snowidx");
        index.write(&path).unwrap();
        Self { folder, index: path, id }
    }

    pub fn socket(&self) -> Endpoint {
        Endpoint::Unix(self.folder.path().join("socket"))
    }
}

pub fn any_port() -> Endpoint {
    Endpoint::Tcp("127.0.0.1:0".into())
}

/// A server of one image over TCP and a Unix socket, changed by `change`.
pub fn serve(image: &TestImage, change: impl FnOnce(&mut ServeConfig)) -> Server {
    let mut config = ServeConfig::new(vec![image.index.clone()], vec![any_port(), image.socket()]);
    change(&mut config);
    Server::start(&config).unwrap()
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// A blocking client.
pub struct Client {
    stream: Box<dyn Stream>,
    buffer: Vec<u8>,
    pub limits: Option<Limits>,
    pub capabilities: Capabilities,
    /// It was told so while it waited for something else.
    pub channel_gone: Option<(ChannelGoneReason, String)>,
    tag: Tag,
}

/// A message that a client got, as far as the tests look at it.
#[derive(Clone, Debug, PartialEq)]
pub enum Got {
    Welcome(Capabilities),
    Refused(descriptor::fetch::Refusal, String),
    Pages { tag: Tag, frames: FrameRange, encoding: Encoding, last: bool, payload: Vec<u8> },
    Error(Tag, descriptor::fetch::ErrorCode),
    Pong,
    Ping,
    Goodbye(descriptor::fetch::GoodbyeReason),
    Channel(ChannelOffer),
    ChannelGone(ChannelGoneReason, String),
    End,
}

impl Client {
    pub fn connect(endpoint: &Endpoint) -> Self {
        Self::try_connect(endpoint).unwrap()
    }

    pub fn try_connect(endpoint: &Endpoint) -> io::Result<Self> {
        let stream: Box<dyn Stream> = match endpoint {
            Endpoint::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                Box::new(stream)
            }
            Endpoint::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                Box::new(stream)
            }
        };
        Ok(Self {
            stream,
            buffer: Vec::new(),
            limits: None,
            capabilities: Capabilities::default(),
            channel_gone: None,
            tag: 0,
        })
    }

    /// Connects and says hello; whatever the answer is comes with it.
    pub fn hello(endpoint: &Endpoint, image: ImageId, capabilities: Capabilities, ticket: &[u8]) -> (Self, Got) {
        let mut client = Self::connect(endpoint);
        let mut bytes = Vec::new();
        Preamble.encode(&mut bytes);
        Message::Hello(Hello { image, capabilities, ticket }).encode(&mut bytes);
        client.send(&bytes);
        client.expect_preamble();
        let got = client.receive();
        (client, got)
    }

    pub fn open(endpoint: &Endpoint, image: ImageId) -> Self {
        Self::open_with(endpoint, image, Capabilities::default())
    }

    pub fn open_with(endpoint: &Endpoint, image: ImageId, capabilities: Capabilities) -> Self {
        let (client, got) = Self::hello(endpoint, image, capabilities, b"");
        assert!(matches!(got, Got::Welcome(_)), "{got:?}");
        client
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// As `send`, but gives the error back.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    pub fn expect_preamble(&mut self) {
        let start = Instant::now();
        loop {
            if let Some((_, length)) = decode_preamble(&self.buffer).unwrap() {
                self.buffer.drain(..length);
                return;
            }
            assert!(self.fill() && start.elapsed() < PATIENCE, "no preamble");
        }
    }

    pub fn request(&mut self, class: Class, ranges: &[FrameRange]) -> Tag {
        self.request_by(Delivery::Unicast, class, ranges)
    }

    pub fn request_by(&mut self, delivery: Delivery, class: Class, ranges: &[FrameRange]) -> Tag {
        self.tag += 1;
        let mut bytes = Vec::new();
        Request::encode(self.tag, class, delivery, ranges, &mut bytes);
        self.send(&bytes);
        self.tag
    }

    /// The channel that a client which asked for one is told of.
    pub fn channel(&mut self) -> ChannelOffer {
        match self.receive() {
            Got::Channel(offer) => offer,
            other => panic!("{other:?} instead of a channel"),
        }
    }

    /// Asks for far more bulk than any socket buffer holds.
    pub fn request_plenty(&mut self) -> Vec<Tag> {
        (0..8).map(|_| self.request(Class::Bulk, &[range(2000, FRAMES - 2000)])).collect()
    }

    pub fn receive(&mut self) -> Got {
        loop {
            if let Some((message, length)) = decode(&self.buffer).unwrap() {
                let got = match message {
                    Message::Welcome(welcome) => {
                        self.limits = Some(welcome.limits);
                        self.capabilities = welcome.capabilities;
                        assert_eq!(welcome.frames, PageCount::new(FRAMES));
                        Got::Welcome(welcome.capabilities)
                    }
                    Message::Refused(reason, text) => Got::Refused(reason, text.into()),
                    Message::Pages(run) => Got::Pages {
                        tag: run.tag,
                        frames: run.frames,
                        encoding: run.encoding,
                        last: run.last,
                        payload: run.payload.into(),
                    },
                    Message::Error(tag, code, _) => Got::Error(tag, code),
                    Message::Ping => Got::Ping,
                    Message::Pong => Got::Pong,
                    Message::Goodbye(reason, _) => Got::Goodbye(reason),
                    Message::Channel(offer) => Got::Channel(offer),
                    Message::ChannelGone(reason, text) => Got::ChannelGone(reason, text.into()),
                    other => panic!("unexpected {other:?}"),
                };
                self.buffer.drain(..length);
                return got;
            }
            if !self.fill() {
                assert!(self.buffer.is_empty(), "the stream ends within a message");
                return Got::End;
            }
        }
    }

    /// Reads some bytes; false at the end of the stream.
    fn fill(&mut self) -> bool {
        let mut chunk = vec![0; 64 << 10];
        let length = match self.stream.read(&mut chunk) {
            Ok(length) => length,
            // A ring of this thread has something.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return self.fill(),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            Err(error) => panic!("receive: {error}"),
        };
        self.buffer.extend_from_slice(&chunk[..length]);
        length > 0
    }

    /// Receives the whole answer to each of `requests` and checks that it is right, each frame once.
    pub fn check_answers(&mut self, requests: &[(Tag, Vec<FrameRange>)]) {
        let mut wanted: BTreeMap<Tag, Vec<Gfn>> = BTreeMap::new();
        for (tag, ranges) in requests {
            wanted.insert(*tag, ranges.iter().flat_map(|range| range.frames()).collect());
        }
        let mut got: BTreeMap<Tag, Vec<Gfn>> = BTreeMap::new();
        let mut open = wanted.len();
        while open > 0 {
            match self.receive() {
                Got::Pages { tag, frames, encoding, last, payload } => {
                    check_run(frames, encoding, &payload);
                    assert!(wanted.contains_key(&tag), "tag {tag} was not asked for");
                    got.entry(tag).or_default().extend(frames.frames());
                    open -= usize::from(last);
                }
                Got::Ping => {}
                Got::ChannelGone(reason, text) => self.channel_gone = Some((reason, text)),
                other => panic!("{other:?}"),
            }
        }
        for frames in wanted.values_mut().chain(got.values_mut()) {
            frames.sort_unstable();
        }
        assert_eq!(got, wanted);
    }

    pub fn expect_channel_gone(&mut self) -> (ChannelGoneReason, String) {
        self.channel_gone.take().unwrap_or_else(|| match self.receive() {
            Got::ChannelGone(reason, text) => (reason, text),
            other => panic!("{other:?} instead of CHANNEL_GONE"),
        })
    }

    pub fn check_fetch(&mut self, class: Class, ranges: &[FrameRange]) {
        let tag = self.request(class, ranges);
        self.check_answers(&[(tag, ranges.to_vec())]);
    }
}

pub fn check_run(frames: FrameRange, encoding: Encoding, payload: &[u8]) {
    let pages = match encoding {
        Encoding::Raw => payload.to_vec(),
        Encoding::Zero => vec![0; frames.count().bytes() as usize],
        Encoding::Lz4 => lz4_flex::block::decompress(payload, frames.count().bytes() as usize).unwrap(),
    };
    for (page, frame) in pages.chunks(PAGE).zip(frames.frames()) {
        assert!(page == page_of(frame.index()), "frame {frame} is wrong");
    }
}

/// Waits until `condition` holds.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}
