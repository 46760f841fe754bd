use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use descriptor::fetch::{
    Capabilities, ChannelGoneReason, Delivery, Encoding, ErrorCode, GoodbyeReason, Limits, LocalImage, Message,
    PageRun, Preamble, Refusal, Request, Welcome, decode, decode_preamble,
};
use descriptor::image::ImageIndex;
use descriptor::{Endpoint, FrameRange, Gfn, PageCount};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::{ChannelBehaviour, Image, ModelChannel};

/// How a model server behaves, beyond serving.
#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    /// Hand out the image's file.
    pub local: bool,
    /// Hand it out in words alone, as it is seen by a client that has no file descriptor free.
    pub file_lost: bool,
    /// Compress where that pays.
    pub lz4: bool,
    /// Say no.
    pub refuse: Option<Refusal>,
    /// The ticket that clients need.
    pub ticket: Vec<u8>,
    /// Break each connection after so many requests.
    pub break_after: Option<u64>,
    /// Say goodbye after so many requests.
    pub drain_after: Option<u64>,
    /// Answer every so many-th request with an error.
    pub fail_every: Option<u64>,
    /// How long each answer takes.
    pub delay: Duration,
    /// Offer a multicast channel.
    pub channel: Option<ChannelBehaviour>,
    /// End the channel for the client after so many requests.
    pub gone_after: Option<u64>,
}

/// A page server of some threads.
pub struct ModelServer {
    pub endpoint: Endpoint,
    stop: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<Stream>>>,
    /// Sessions that were opened.
    pub sessions: Arc<AtomicU64>,
    /// Requests that were answered.
    pub requests: Arc<AtomicU64>,
    /// The multicast channel.
    pub channel: Option<Arc<ModelChannel>>,
    accepting: Vec<JoinHandle<()>>,
}

enum Stream {
    Tcp(std::net::TcpStream),
    Unix(UnixStream),
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl ModelServer {
    /// Serves over TCP, at a port of the kernel's choice.
    pub fn tcp(image: &Arc<Image>, behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = Endpoint::Tcp(listener.local_addr().unwrap().to_string());
        listener.set_nonblocking(true).unwrap();
        Self::start(endpoint, Listener::Tcp(listener), image, behaviour)
    }

    /// Serves at a Unix socket.
    pub fn unix(path: &Path, image: &Arc<Image>, behaviour: Behaviour) -> Self {
        let _gone = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self::start(Endpoint::Unix(path.into()), Listener::Unix(listener), image, behaviour)
    }

    /// Ends the server and all sessions, as a killed process would.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(channel) = &self.channel {
            channel.end();
        }
        for thread in self.accepting.drain(..) {
            thread.join().unwrap();
        }
        for stream in self.streams.lock().unwrap().drain(..) {
            stream.shut();
        }
    }

    fn start(endpoint: Endpoint, listener: Listener, image: &Arc<Image>, behaviour: Behaviour) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let streams = Arc::new(Mutex::new(Vec::new()));
        let (sessions, requests) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let shared = (Arc::clone(&stop), Arc::clone(&streams), Arc::clone(&sessions), Arc::clone(&requests));
        let opened = behaviour.channel.clone().map(|channel| ModelChannel::new(image, channel));
        let (channel, threads) = opened.unzip();
        let mut threads = threads.unwrap_or_default();
        let (image, offered) = (Arc::clone(image), channel.clone());
        threads.push(std::thread::spawn(move || {
            let (stop, streams, sessions, requests) = shared;
            while !stop.load(Ordering::Relaxed) {
                let stream = match &listener {
                    Listener::Tcp(listener) => listener.accept().map(|(stream, _)| Stream::Tcp(stream)),
                    Listener::Unix(listener) => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
                };
                let Ok(stream) = stream else {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                };
                streams.lock().unwrap().push(stream.again());
                let (image, behaviour, channel) = (Arc::clone(&image), behaviour.clone(), offered.clone());
                let counters = (Arc::clone(&sessions), Arc::clone(&requests));
                std::thread::spawn(move || {
                    let mut session = Session { stream, image, behaviour, counters, channel, gone: false };
                    // How the connection ends is the client's to judge.
                    let _ended = session.run();
                    session.stream.shut();
                });
            }
        }));
        Self { endpoint, stop, streams, sessions, requests, channel, accepting: threads }
    }
}

impl Drop for ModelServer {
    fn drop(&mut self) {
        self.end();
    }
}

impl Stream {
    /// Closes the connection, copies of the stream or not.
    fn shut(&self) {
        let _gone = match self {
            Stream::Tcp(stream) => stream.shutdown(std::net::Shutdown::Both),
            Stream::Unix(stream) => stream.shutdown(std::net::Shutdown::Both),
        };
    }

    fn again(&self) -> Stream {
        match self {
            Stream::Tcp(stream) => {
                stream.set_nonblocking(false).unwrap();
                stream.set_nodelay(true).unwrap();
                Stream::Tcp(stream.try_clone().unwrap())
            }
            Stream::Unix(stream) => {
                stream.set_nonblocking(false).unwrap();
                Stream::Unix(stream.try_clone().unwrap())
            }
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(buffer),
            Stream::Unix(stream) => stream.read(buffer),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.write_all(bytes),
            Stream::Unix(stream) => stream.write_all(bytes),
        }
    }
}

struct Session {
    stream: Stream,
    image: Arc<Image>,
    behaviour: Behaviour,
    counters: (Arc<AtomicU64>, Arc<AtomicU64>),
    channel: Option<Arc<ModelChannel>>,
    gone: bool,
}

impl Session {
    fn run(&mut self) -> io::Result<()> {
        let mut inbox = Vec::new();
        let mut preamble_seen = false;
        let mut answered = 0;
        loop {
            let mut chunk = vec![0; 1 << 16];
            let count = self.stream.read(&mut chunk)?;
            if count == 0 {
                return Ok(());
            }
            inbox.extend_from_slice(&chunk[..count]);
            if !preamble_seen {
                let Some((_, length)) = decode_preamble(&inbox).map_err(io::Error::other)? else { continue };
                inbox.drain(..length);
                preamble_seen = true;
            }
            while let Some((message, length)) = decode(&inbox).map_err(io::Error::other)? {
                let mut out = Vec::new();
                let mut file = false;
                let mut close = false;
                match message {
                    Message::Hello(hello) => {
                        Preamble.encode(&mut out);
                        if let Some(reason) = self.refusal(hello.ticket) {
                            Message::Refused(reason, "as the test wants it").encode(&mut out);
                            close = true;
                        } else {
                            self.counters.0.fetch_add(1, Ordering::Relaxed);
                            file = self.welcome(hello.capabilities, &mut out);
                        }
                    }
                    Message::Request(request) => {
                        std::thread::sleep(self.behaviour.delay);
                        answered += 1;
                        if self.behaviour.break_after.is_some_and(|after| answered > after) {
                            return Ok(());
                        }
                        self.counters.1.fetch_add(1, Ordering::Relaxed);
                        if self.behaviour.drain_after.is_some_and(|after| answered > after) {
                            Message::Goodbye(GoodbyeReason::Draining, "as the test wants it").encode(&mut out);
                            close = true;
                        } else if self.behaviour.fail_every.is_some_and(|every| answered % every == 0) {
                            Message::Error(request.tag, ErrorCode::Unreadable, "as the test wants it").encode(&mut out);
                        } else {
                            if self.behaviour.gone_after.is_some_and(|after| answered > after) && !self.gone {
                                self.gone = true;
                                Message::ChannelGone(ChannelGoneReason::TooSlow, "as the test wants it")
                                    .encode(&mut out);
                            }
                            match &self.channel {
                                Some(channel) if request.delivery == Delivery::Multicast && !self.gone => {
                                    channel.demand(request.ranges());
                                }
                                _ => self.answer(request, &mut out),
                            }
                        }
                    }
                    Message::Ping => Message::Pong.encode(&mut out),
                    _ => {}
                }
                inbox.drain(..length);
                if file && !self.behaviour.file_lost {
                    self.send_with_file(&out)?
                } else {
                    self.stream.write(&out)?
                }
                if close {
                    return Ok(());
                }
            }
        }
    }

    fn refusal(&self, ticket: &[u8]) -> Option<Refusal> {
        self.behaviour.refuse.or_else(|| (ticket != self.behaviour.ticket).then_some(Refusal::Ticket))
    }

    /// True when the image's file is to go along.
    fn welcome(&self, offered: Capabilities, out: &mut Vec<u8>) -> bool {
        let local = self.behaviour.local && offered.contains(Capabilities::LOCAL);
        let mut capabilities = if local { Capabilities::LOCAL } else { Capabilities::LZ4.intersection(offered) };
        let channel = self.channel.as_ref().filter(|_| !local && offered.contains(Capabilities::MULTICAST));
        if channel.is_some() {
            capabilities = capabilities.union(Capabilities::MULTICAST);
        }
        let limits = Limits { max_requests: 64, max_pages: 2048, idle_timeout_ms: 30_000 };
        let frames = self.image.memory.universe();
        Message::Welcome(Welcome { image: self.image.id, frames, capabilities, limits }).encode(out);
        if let Some(channel) = channel {
            Message::Channel(channel.offer()).encode(out);
        }
        if local {
            let index = ImageIndex::read(&self.image.index()).unwrap();
            let extents = index.extents.extents().to_vec();
            Message::Image(LocalImage { files: 1, extents }).encode(out);
        }
        local
    }

    fn send_with_file(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Stream::Unix(stream) = &self.stream else { return Err(io::ErrorKind::Unsupported.into()) };
        let file = std::fs::File::open(self.image.memory_file())?;
        let fds = [file.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        let sent = rustix::net::sendmsg(stream, &[io::IoSlice::new(bytes)], &mut ancillary, SendFlags::empty())?;
        assert_eq!(sent, bytes.len());
        Ok(())
    }

    fn answer(&self, request: Request<'_>, out: &mut Vec<u8>) {
        let universe = FrameRange::new(Gfn::new(0), self.image.memory.universe());
        if !request.ranges().all(|range| universe.covers(range)) {
            Message::Error(request.tag, ErrorCode::OutOfRange, "beyond the image").encode(out);
            return;
        }
        let mut runs: Vec<(FrameRange, bool)> = Vec::new();
        for gfn in request.ranges().flat_map(FrameRange::frames) {
            let zero = self.image.page(gfn).is_none_or(|page| page.iter().all(|byte| *byte == 0));
            match runs.last_mut() {
                Some((run, kind)) if *kind == zero && run.end() == gfn && run.count() < PageCount::new(256) => {
                    *run = FrameRange::between(run.start(), gfn + PageCount::ONE);
                }
                _ => runs.push((FrameRange::single(gfn), zero)),
            }
        }
        let count = runs.len();
        for (index, (frames, zero)) in runs.into_iter().enumerate() {
            let last = index + 1 == count;
            let raw: Vec<u8> =
                frames.frames().flat_map(|gfn| self.image.page(gfn).unwrap_or(&[0; 4096])).copied().collect();
            let packed = lz4_flex::block::compress(&raw);
            let (encoding, payload) = if zero {
                (Encoding::Zero, &[][..])
            } else if self.behaviour.lz4 && packed.len() < raw.len() {
                (Encoding::Lz4, &packed[..])
            } else {
                (Encoding::Raw, &raw[..])
            };
            Message::Pages(PageRun { tag: request.tag, frames, encoding, last, payload }).encode(out);
        }
    }
}
