//! Where pages come from: a page server, reached over TCP or a Unix socket, or the image's own files on the same host.
//!
//! A [`Source`] keeps a session with one of several servers, begins a new one when it ends, and turns answers into pages. It
//! never blocks, and page bytes are handed out where they were received, or where they are mapped. It never installs a page
//! and never repeats a request: the pager's core asks again after [`SourceEvent::Up`].

mod backoff;
mod connection;
mod error;
mod inbox;
mod local;
mod socket;
mod sys;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use descriptor::fetch::{ChannelGoneReason, ChannelOffer, Class, Delivery, Encoding, ErrorCode, Limits, Tag};
use descriptor::{Endpoint, FrameRange, ImageId, PageCount};

pub use error::{SessionError, SourceError};

use backoff::Backoff;
use connection::{Connection, Incoming};
use local::LocalLane;
use socket::Socket;

/// Requests open at a time on the local lane: they wait in a queue here, so a few are as good as many.
const LOCAL_REQUESTS: u32 = 32;

/// Pages asked for at a time on the local lane.
const LOCAL_PAGES: u32 = 8192;

/// How long the server may take to hear the last words; the guest has ended, and someone may wait for this process.
const LEAVE_PATIENCE: Duration = Duration::from_millis(300);

/// Which way pages may come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Lane {
    /// The image's files where the server hands them out, the socket elsewhere.
    #[default]
    Auto,
    /// The socket.
    Socket,
    /// The image's files, or nothing.
    Local,
}

/// What a source must know.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// The servers, tried in turn.
    pub endpoints: Vec<Endpoint>,
    /// The image whose pages are wanted.
    pub image: ImageId,
    /// The frames of its memory map.
    pub universe: PageCount,
    /// The ticket; empty for none.
    pub ticket: Vec<u8>,
    /// Which way pages may come.
    pub lane: Lane,
    /// Offer to share a multicast channel with other clones. It is not used where the local lane is.
    pub multicast: bool,
    /// Offer to tell the server what the guest needs, and to be told what its siblings needed.
    pub working_set: bool,
    /// The pages that the port installs at once; runs of the local lane end at multiples of some of them.
    pub granule: PageCount,
    /// For the jitter of reconnects.
    pub seed: u64,
}

/// What a source reports.
#[derive(Debug)]
pub enum SourceEvent<'a> {
    /// A session is open. Requests of an earlier one will not be answered any more.
    Up {
        /// What requests must keep to.
        limits: Limits,
        /// Pages come from the image's files.
        local: bool,
        /// The server has a multicast channel, and is about to offer it.
        multicast: bool,
        /// The server is about to tell what siblings needed, and wants to know what this guest needs.
        ordered: bool,
    },
    /// What siblings needed, in the order in which it is best fetched; empty when nothing is known.
    Order(Vec<FrameRange>),
    /// The server offers a multicast channel.
    Channel(ChannelPeer),
    /// The server has ended the channel for this clone.
    ChannelGone {
        /// Why.
        reason: ChannelGoneReason,
        /// The server's words.
        text: String,
    },
    /// The session is over, or could not be opened; another attempt will be made.
    Down {
        /// Why.
        reason: SessionError,
    },
    /// Pages for a request.
    Pages {
        /// The request.
        tag: Tag,
        /// The frames.
        frames: FrameRange,
        /// Their bytes; `None` for zeros.
        bytes: Option<&'a [u8]>,
        /// No further pages belong to the request.
        last: bool,
    },
    /// A request failed.
    Failed {
        /// The request.
        tag: Tag,
        /// Why.
        code: ErrorCode,
        /// The server's words.
        text: String,
    },
}

/// A multicast channel, and where its server is.
#[derive(Clone, Copy, Debug)]
pub struct ChannelPeer {
    /// The offer.
    pub offer: ChannelOffer,
    /// Where feedback goes, and where datagrams come from.
    pub server: SocketAddr,
    /// Our address in the session, which lies on the interface that the server is reached by.
    pub local: Option<IpAddr>,
    /// Frames of the image.
    pub frames: PageCount,
}

/// The unicast lane: sessions with page servers.
pub struct Source {
    config: SourceConfig,
    state: State,
    /// The index of the server that is asked now or next.
    current: usize,
    /// Servers that said no for good.
    refused: Vec<bool>,
    /// The image's files came and could not be used: the socket serves from now on.
    no_files: bool,
    backoff: Backoff,
    scratch: Vec<u8>,
    bytes_received: u64,
}

enum State {
    Waiting {
        until: Duration,
    },
    Connected(Box<Connection>),
    /// The image's files are here. The session is kept only so that the server knows of its client.
    Local {
        lane: LocalLane,
        connection: Option<Box<Connection>>,
    },
}

impl Source {
    /// A source that will begin to connect when it is first polled.
    ///
    /// # Errors
    /// When there is no server to ask.
    pub fn new(config: SourceConfig) -> Result<Self, SourceError> {
        if config.endpoints.is_empty() {
            return Err(SourceError::NoServer);
        }
        Ok(Self {
            state: State::Waiting { until: Duration::ZERO },
            current: 0,
            refused: vec![false; config.endpoints.len()],
            no_files: false,
            backoff: Backoff::new(config.seed),
            scratch: vec![],
            bytes_received: 0,
            config,
        })
    }

    /// The server that is asked now or next.
    pub fn endpoint(&self) -> &Endpoint {
        &self.config.endpoints[self.current]
    }

    /// Bytes of pages received through sockets, as they were on the wire.
    pub fn bytes_received(&self) -> u64 {
        self.bytes_received
    }

    /// The socket to watch, and whether for room to send besides something to receive.
    pub fn watch(&self) -> Option<(BorrowedFd<'_>, bool)> {
        self.connection().map(|connection| (connection.fd(), connection.wants_write()))
    }

    /// True when [`Source::next`] may have something without waiting.
    pub fn has_work(&self) -> bool {
        match &self.state {
            State::Waiting { .. } => false,
            State::Connected(connection) => connection.has_work(),
            State::Local { lane, connection } => {
                !lane.is_idle() || connection.as_ref().is_some_and(|connection| connection.has_work())
            }
        }
    }

    /// When [`Source::next`] wants to be called at the latest.
    pub fn deadline(&self) -> Option<Duration> {
        match &self.state {
            State::Waiting { until } => Some(*until),
            _ => self.connection().map(Connection::deadline),
        }
    }

    /// Notes what was found when the socket was watched.
    pub fn set_ready(&mut self, readable: bool, writable: bool, now: Duration) -> Option<SourceEvent<'static>> {
        let connection = self.connection_mut()?;
        if readable {
            connection.set_readable();
        }
        let result = if writable { connection.set_writable(now) } else { Ok(()) };
        result.err().and_then(|error| self.end(error, now))
    }

    /// Queues a request; [`Source::flush`] sends it. Lost when no session is open. One whose answer is delivered by multicast is
    /// not heard of again here.
    pub fn request(&mut self, tag: Tag, class: Class, delivery: Delivery, ranges: &[FrameRange]) {
        match &mut self.state {
            State::Waiting { .. } => {}
            State::Connected(connection) => connection.request(tag, class, delivery, ranges),
            State::Local { lane, .. } => lane.request(tag, class, ranges),
        }
    }

    /// True when there is a session whose server wants to know what the guest needs.
    pub fn listens(&self) -> bool {
        self.connection().is_some_and(Connection::listens)
    }

    /// Queues a report of what the guest needs, further to earlier ones; [`Source::flush`] sends it. Lost where no server
    /// [listens](Source::listens).
    pub fn touched(&mut self, ranges: &[FrameRange], last: bool, declined: bool) {
        if let Some(connection) = self.connection_mut().filter(|connection| connection.listens()) {
            connection.touched(ranges, last, declined);
        }
    }

    /// Takes leave of the server, which is waited for so that it hears what was queued.
    pub fn leave(self) {
        match self.state {
            State::Connected(connection) | State::Local { connection: Some(connection), .. } => {
                connection.leave(LEAVE_PATIENCE);
            }
            State::Waiting { .. } | State::Local { connection: None, .. } => {}
        }
    }

    /// Sends what is queued, as far as the socket takes it.
    pub fn flush(&mut self, now: Duration) -> Option<SourceEvent<'static>> {
        let result = self.connection_mut()?.flush(now);
        result.err().and_then(|error| self.end(error, now))
    }

    /// What happened next, if anything.
    ///
    /// # Errors
    /// When no server is left that could be asked.
    pub fn next(&mut self, now: Duration) -> Result<Option<SourceEvent<'_>>, SourceError> {
        if let State::Waiting { until } = self.state {
            return if now < until { Ok(None) } else { self.connect(now) };
        }
        match self.receive(now) {
            Ok(Some(Incoming::Open { limits, local, multicast, ordered })) => {
                Ok(self.open(limits, local, (multicast, ordered), now))
            }
            Ok(Some(Incoming::Order(order))) => Ok(Some(SourceEvent::Order(order))),
            Ok(Some(Incoming::Channel(offer))) => Ok(self.channel(offer)),
            Ok(Some(Incoming::ChannelGone { reason, text })) => Ok(Some(SourceEvent::ChannelGone { reason, text })),
            Ok(Some(Incoming::Failed { tag, code, text })) => Ok(Some(SourceEvent::Failed { tag, code, text })),
            Ok(Some(Incoming::Pages { tag, frames, encoding, last, payload })) => {
                self.bytes_received += payload.len() as u64;
                if encoding == Encoding::Lz4
                    && let State::Connected(connection) = &self.state
                    && let Err(error) =
                        connection::decompress(connection.payload(payload.clone()), frames, &mut self.scratch)
                {
                    return Ok(self.end(error, now));
                }
                let State::Connected(connection) = &self.state else { return Ok(None) };
                let bytes = match encoding {
                    Encoding::Raw => Some(connection.payload(payload)),
                    Encoding::Zero => None,
                    Encoding::Lz4 => Some(&self.scratch[..]),
                };
                Ok(Some(SourceEvent::Pages { tag, frames, bytes, last }))
            }
            Ok(None) => {
                let State::Local { lane, .. } = &mut self.state else { return Ok(None) };
                Ok(lane.next().map(|pages| SourceEvent::Pages {
                    tag: pages.tag,
                    frames: pages.frames,
                    bytes: pages.bytes,
                    last: pages.last,
                }))
            }
            Err(error) => {
                self.note_refusal(&error);
                if self.refused.iter().all(|refused| *refused) {
                    return Err(SourceError::Refused { endpoint: self.endpoint().clone(), error });
                }
                Ok(self.end(error, now))
            }
        }
    }

    fn receive(&mut self, now: Duration) -> Result<Option<Incoming>, SessionError> {
        let (connection, is_local) = match &mut self.state {
            State::Waiting { .. } => return Ok(None),
            State::Connected(connection) => (connection, false),
            State::Local { connection: Some(connection), .. } => (connection, true),
            State::Local { connection: None, .. } => return Ok(None),
        };
        connection.tick(now)?;
        match connection.next(now, &self.config)? {
            Some(Incoming::Order(order)) => Ok(Some(Incoming::Order(order))),
            // Nothing else is asked of the server any more.
            Some(_) if is_local => Err(SessionError::OutOfTurn("an answer")),
            incoming => Ok(incoming),
        }
    }

    fn connect(&mut self, now: Duration) -> Result<Option<SourceEvent<'static>>, SourceError> {
        while self.refused[self.current] {
            self.current = (self.current + 1) % self.config.endpoints.len();
        }
        let endpoint = self.endpoint();
        let wants_local = matches!(endpoint, Endpoint::Unix(_))
            && match self.config.lane {
                Lane::Auto => !self.no_files,
                Lane::Socket => false,
                Lane::Local => true,
            };
        match Socket::connect(endpoint, wants_local) {
            Ok(socket) => {
                self.state = State::Connected(Box::new(Connection::new(socket, wants_local, &self.config, now)));
                Ok(None)
            }
            Err(error) => Ok(self.end(SessionError::Connect(error), now)),
        }
    }

    fn open(
        &mut self,
        limits: Limits,
        local: Option<(descriptor::fetch::LocalImage, Vec<std::os::fd::OwnedFd>)>,
        (multicast, ordered): (bool, bool),
        now: Duration,
    ) -> Option<SourceEvent<'static>> {
        self.backoff.reset();
        self.refused.fill(false);
        let Some((image, files)) = local else {
            return Some(SourceEvent::Up { limits, local: false, multicast, ordered });
        };
        // Twice the port's granule at most: 1 MiB for small pages keeps a fault from waiting long behind bulk.
        let piece = self.config.granule.max(PageCount::new(256));
        let lane = match LocalLane::new(image, &files, piece) {
            Ok(lane) => lane,
            Err(error) => {
                if self.config.lane == Lane::Auto {
                    tracing::warn!(%error, "the image's files cannot be used; pages come through the socket instead");
                    self.no_files = true;
                }
                return self.end(error, now);
            }
        };
        let connection = match std::mem::replace(&mut self.state, State::Waiting { until: now }) {
            State::Connected(connection) => Some(connection),
            _ => None,
        };
        self.state = State::Local { lane, connection };
        let limits = Limits { max_requests: LOCAL_REQUESTS, max_pages: LOCAL_PAGES, ..limits };
        Some(SourceEvent::Up { limits, local: true, multicast: false, ordered })
    }

    /// Finds out where the server of a channel is. Over a Unix socket only the offer can tell.
    fn channel(&self, offer: ChannelOffer) -> Option<SourceEvent<'static>> {
        let (peer, local) = self.connection().and_then(Connection::addresses).unzip();
        let Some(address) = offer.feedback.or(peer.map(|peer| peer.ip())) else {
            tracing::warn!("the server offers a multicast channel and does not say where its feedback is to go");
            return None;
        };
        let server = SocketAddr::new(address.to_canonical(), offer.feedback_port);
        let local = local.map(|local| local.ip().to_canonical());
        Some(SourceEvent::Channel(ChannelPeer { offer, server, local, frames: self.config.universe }))
    }

    /// Ends the session, and plans the next with the next server. With the image's files in hand nothing ends.
    fn end(&mut self, reason: SessionError, now: Duration) -> Option<SourceEvent<'static>> {
        if let State::Local { connection, .. } = &mut self.state {
            tracing::info!(%reason, "the server is gone; the image's files are here, so that the clone goes on without it");
            *connection = None;
            return None;
        }
        self.current = (self.current + 1) % self.config.endpoints.len();
        self.state = State::Waiting { until: now + self.backoff.pause() };
        Some(SourceEvent::Down { reason })
    }

    fn note_refusal(&mut self, error: &SessionError) {
        if error.is_final() && !matches!(self.state, State::Local { .. }) {
            self.refused[self.current] = true;
        }
    }

    fn connection(&self) -> Option<&Connection> {
        match &self.state {
            State::Waiting { .. } => None,
            State::Connected(connection) => Some(connection),
            State::Local { connection, .. } => connection.as_deref(),
        }
    }

    fn connection_mut(&mut self) -> Option<&mut Connection> {
        match &mut self.state {
            State::Waiting { .. } => None,
            State::Connected(connection) => Some(connection),
            State::Local { connection, .. } => connection.as_deref_mut(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::time::Instant;

    use descriptor::fetch::{Capabilities, Message, Preamble, Welcome};

    use super::*;

    #[test]
    fn a_server_that_pings_and_never_reads_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("server");
        let listener = UnixListener::bind(&path).unwrap();
        let (image, universe) = (ImageId::from_bytes([7; 16]), PageCount::new(16));
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = Vec::new();
            Preamble.encode(&mut bytes);
            let limits = Limits { max_requests: 1, max_pages: 1, idle_timeout_ms: 0 };
            let capabilities = Capabilities::default();
            Message::Welcome(Welcome { image, frames: universe, capabilities, limits }).encode(&mut bytes);
            while stream.write_all(&bytes).is_ok() {
                bytes.clear();
                for _ in 0..1000 {
                    Message::Ping.encode(&mut bytes);
                }
            }
        });
        let config = SourceConfig {
            endpoints: vec![Endpoint::Unix(path)],
            image,
            universe,
            ticket: vec![],
            lane: Lane::Socket,
            multicast: true,
            working_set: false,
            granule: PageCount::ONE,
            seed: 1,
        };
        let mut source = Source::new(config).unwrap();
        let now = Duration::ZERO;
        let began = Instant::now();
        let reason = loop {
            assert!(began.elapsed() < Duration::from_secs(60), "the server is kept");
            if let Some(SourceEvent::Down { reason }) = source.set_ready(true, true, now) {
                break reason;
            }
            if let Some(SourceEvent::Down { reason }) = source.next(now).unwrap() {
                break reason;
            }
        };
        assert!(matches!(reason, SessionError::Backlog(_)), "{reason}");
        server.join().unwrap();
    }
}
