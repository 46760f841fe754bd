//! One thread of the data plane: sockets, sessions, and an io_uring between them.
//!
//! ```text
//!   completions ─▶ session ─▶ schedule ─▶ gather ─▶ send          one turn of the loop; all demand, one quantum of bulk
//!        ▲                                            │
//!        └────────────────── io_uring ◀───────────────┘
//! ```
//!
//! The loop holds no policy: sessions decide what is allowed, the schedule what is next. An answer to a request that arrived
//! in a turn is submitted in the same turn.

mod channel;
mod compress;
mod connection;
mod features;
mod fixed;
mod gather;
mod send;
mod sys;

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use descriptor::ImageId;
use descriptor::fetch::{Capabilities, Refusal};

use self::compress::Compressor;
use self::connection::{Connection, Stage};
use self::fixed::FixedImages;
use self::gather::Gather;
use self::sys::{Completion, Key, Received, Socket, Uring};
use crate::ServeError;
use crate::channel::Order;
use crate::config::Compress;
use crate::image::ServedImage;
use crate::listen::Listener;
use crate::schedule::{Run, Schedule};
use crate::session::{Event, Session};
use crate::shared::{Command, RingHandle, SessionRecord, Shared};
use crate::stats::class_index;

pub use features::{Features, RingFeatures};

/// Direct descriptors beyond the connections that are allowed, for those that are being closed.
const SPARE_SOCKETS: usize = 64;

/// How long accepting rests when the process has run out of descriptors or memory.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// How long connections may take to close after they were broken off, when the server stops.
const LAST_GRACE: Duration = Duration::from_secs(1);

/// Gathers that are kept for later use.
const POOL: usize = 64;

/// The state of a ring's thread.
pub(crate) struct Ring {
    shared: Arc<Shared>,
    index: usize,
    uring: Uring,
    listeners: Vec<Acceptor>,
    connections: Vec<Option<Connection>>,
    free: Vec<u32>,
    generation: u32,
    max_handshakes: usize,
    schedule: Schedule,
    fixed: FixedImages,
    /// No session needs attention before.
    timer: Option<Duration>,
    deadline: Option<Duration>,
    runs: Vec<Run>,
    pool: Vec<Gather>,
}

struct Acceptor {
    listener: Listener,
    armed: bool,
    retry: Option<Duration>,
}

impl Ring {
    /// A ring for the calling thread.
    pub(crate) fn new(
        shared: Arc<Shared>,
        index: usize,
        listeners: Vec<Listener>,
        wanted: RingFeatures,
        (max_sessions, max_handshakes): (usize, usize),
    ) -> Result<Self, ServeError> {
        let sockets = u32::try_from(max_sessions.saturating_add(max_handshakes).saturating_add(SPARE_SOCKETS))
            .unwrap_or(u32::MAX);
        let mut uring = Uring::new(wanted, sockets)?;
        let zero_copy = uring.features().zero_copy;
        let fixed = FixedImages::new(&mut uring, zero_copy);
        Ok(Self {
            shared,
            index,
            uring,
            listeners: listeners.into_iter().map(|l| Acceptor { listener: l, armed: false, retry: None }).collect(),
            connections: Vec::new(),
            free: Vec::new(),
            generation: 0,
            max_handshakes,
            schedule: Schedule::default(),
            fixed,
            timer: None,
            deadline: None,
            runs: Vec::new(),
            pool: Vec::new(),
        })
    }

    /// What of io_uring is in use.
    pub(crate) fn features(&self) -> Features {
        self.uring.features()
    }

    /// Serves until the server is told to stop.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        self.uring.watch(shared.rings[self.index].wake.as_fd());
        self.accept_everywhere();
        loop {
            let timeout = self.timeout(self.shared.now());
            self.uring.wait(timeout)?;
            let now = self.shared.now();
            while let Some(completion) = self.uring.next() {
                self.complete(now, completion);
            }
            self.handle_timers(now);
            self.send_all(now);
            if self.deadline.is_some_and(|deadline| now >= deadline.saturating_add(LAST_GRACE) || self.is_empty()) {
                return Ok(());
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.connections.iter().all(Option::is_none)
    }

    fn handle(&self) -> &RingHandle {
        &self.shared.rings[self.index]
    }

    /// How long to wait for a completion.
    fn timeout(&self, now: Duration) -> Option<Duration> {
        if self.schedule.has_ready_bulk() {
            return Some(Duration::ZERO);
        }
        let retries = self.listeners.iter().filter_map(|acceptor| acceptor.retry);
        let deadline =
            self.deadline.map(|deadline| if now < deadline { deadline } else { deadline.saturating_add(LAST_GRACE) });
        // A wait of zero would not wait at all, so what is due at this very moment waits for a microsecond.
        let next = retries.chain(self.timer).chain(deadline).min();
        next.map(|time| time.saturating_sub(now).max(Duration::from_micros(1)))
    }

    fn complete(&mut self, now: Duration, completion: Completion) {
        match completion {
            Completion::Woken => self.obey(now),
            Completion::Accepted { listener, result, armed } => self.accepted(now, listener, result, armed),
            Completion::Received { key, result, armed } => self.received(now, key, result, armed),
            Completion::Sent { key, result, gather } => self.sent(now, key, result, gather),
            Completion::Released { key, copied, gather } => {
                self.handle().stats.copied.add(copied.into());
                if let Some(connection) = self.connection(key) {
                    connection.zero_copy.released(copied);
                }
                self.reuse(gather);
            }
            Completion::Installed { key, result } => {
                if let (Some(connection), Ok(fd)) = (self.connection(key), result) {
                    connection.peer = peer_of(&fd);
                }
                self.operation_ended(key);
            }
            Completion::ZeroCopyRefused { key } => {
                if let Some(connection) = self.connection(key) {
                    connection.zero_copy.give_up();
                }
            }
            Completion::ShutDown { key } => self.operation_ended(key),
            Completion::Progress | Completion::Other => {}
        }
    }

    fn obey(&mut self, now: Duration) {
        let shared = Arc::clone(&self.shared);
        let handle = &shared.rings[self.index];
        handle.wake.reset();
        for command in handle.take_commands() {
            match command {
                Command::Drain(deadline) => self.drain(now, deadline),
                Command::ImageGone(image) => self.image_gone(now, &image),
                Command::Channel(session, news) => self.channel_news(now, session, news),
                Command::ChannelClosed => self.channel_closed(now),
            }
        }
        self.uring.watch(handle.wake.as_fd());
    }

    fn drain(&mut self, now: Duration, deadline: Duration) {
        self.deadline = Some(self.deadline.map_or(deadline, |earlier| earlier.min(deadline)));
        for acceptor in &mut self.listeners {
            acceptor.retry = None;
            acceptor.listener.stop();
        }
        for key in self.keys() {
            if let Some(connection) = self.connection(key) {
                connection.session.drain(now);
                self.attend(now, key);
            }
        }
    }

    fn image_gone(&mut self, now: Duration, image: &Arc<ServedImage>) {
        self.fixed.remove(&mut self.uring, image);
        self.handle().stats.registered_bytes.set(self.fixed.bytes());
        for key in self.keys() {
            let holds =
                |connection: &mut Connection| connection.image.as_ref().is_some_and(|mine| Arc::ptr_eq(mine, image));
            if !self.connection(key).is_some_and(holds) {
                continue;
            }
            let unanswered = self.schedule.clear(key.slot as usize);
            if let Some(connection) = self.connection(key) {
                connection.session.image_gone(now, unanswered.into_iter());
            }
            self.attend(now, key);
        }
    }

    fn accept_everywhere(&mut self) {
        for (index, acceptor) in self.listeners.iter_mut().enumerate() {
            self.uring.accept(index as u32, acceptor.listener.as_fd());
            acceptor.armed = true;
        }
    }

    fn accepted(&mut self, now: Duration, listener: u32, result: io::Result<Socket>, armed: bool) {
        let draining = self.deadline.is_some();
        let Some(acceptor) = self.listeners.get_mut(listener as usize) else { return };
        acceptor.armed = armed;
        let exhausted = result.as_ref().is_err_and(is_exhaustion);
        if !armed && !draining {
            if exhausted {
                acceptor.retry = Some(now + ACCEPT_REST);
            } else {
                self.uring.accept(listener, acceptor.listener.as_fd());
                acceptor.armed = true;
            }
        }
        match result {
            Ok(socket) => self.open(now, listener, socket),
            Err(error) if draining => tracing::trace!(%error, "accepting has ended"),
            Err(error) if exhausted => tracing::warn!(%error, "cannot accept; trying again soon"),
            Err(error) => tracing::debug!(%error, "accept"),
        }
    }

    fn open(&mut self, now: Duration, listener: u32, socket: Socket) {
        let is_tcp = self.listeners.get(listener as usize).is_some_and(|acceptor| acceptor.listener.is_tcp());
        let mut session = Session::new(now, self.shared.session_config(is_tcp));
        if self.deadline.is_some() {
            session.refuse(Refusal::Draining);
        }
        self.make_room();
        self.generation = self.generation.wrapping_add(1);
        let slot = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            (self.connections.len() - 1) as u32
        });
        let key = Key { slot, generation: self.generation };
        let zero_copy = is_tcp && self.uring.features().zero_copy;
        let peer_wanted = is_tcp && self.uring.features().peer_names;
        let mut connection = Connection::new(key.generation, listener, socket, session, zero_copy);
        match &connection.socket {
            Some(Socket::Direct(direct)) if peer_wanted => {
                self.uring.install(key, *direct);
                connection.operations += 1;
            }
            Some(Socket::Plain(fd)) if peer_wanted => connection.peer = peer_of(fd),
            _ => {}
        }
        self.connections[slot as usize] = Some(connection);
        self.handle().stats.connections.set((self.connections.len() - self.free.len()) as u64);
        self.receive(key);
        self.attend(now, key);
    }

    /// Breaks off the oldest connection without a session when there are as many as allowed.
    fn make_room(&mut self) {
        let without = |(slot, connection): (usize, &Option<Connection>)| {
            let connection = connection.as_ref().filter(|c| !c.placed && c.stage != Stage::Dying)?;
            Some(Key { slot: slot as u32, generation: connection.generation })
        };
        let waiting: Vec<Key> = self.connections.iter().enumerate().filter_map(without).collect();
        let oldest = waiting.iter().max_by_key(|key| self.generation.wrapping_sub(key.generation)).copied();
        if let Some(key) = oldest.filter(|_| waiting.len() >= self.max_handshakes) {
            tracing::debug!(waiting = waiting.len(), "too many handshakes; breaking the oldest off");
            self.kill(key);
        }
    }

    fn receive(&mut self, key: Key) {
        let Some(connection) = connection_of(&mut self.connections, key) else { return };
        if let Some(socket) = &connection.socket {
            self.uring.receive(key, socket);
            connection.operations += 1;
        }
    }

    fn received(&mut self, now: Duration, key: Key, result: io::Result<Option<Received>>, armed: bool) {
        let mut over = false;
        match result {
            Ok(Some(received)) => {
                // What a client said before its connection broke may come after a send has told of that.
                let connection = connection_of(&mut self.connections, key);
                if let Some(connection) = connection.filter(|connection| connection.stage != Stage::Dying) {
                    // A place is taken before the session can begin, and kept if it did. What has not shown a ticket has none.
                    let asks = !connection.placed && !connection.session.is_closing();
                    let taken = asks && self.shared.open_session();
                    if asks && !taken && self.deadline.is_none() {
                        connection.session.refuse(Refusal::Busy);
                    }
                    let catalog = &self.shared.catalog;
                    let bytes = self.uring.bytes(&received);
                    connection.session.receive(now, bytes, &|image| catalog.find(image).map(|image| image.facts()));
                    if taken && connection.session.is_serving() {
                        connection.placed = true;
                    } else if taken {
                        self.shared.close_session();
                    }
                }
                self.uring.recycle(received);
            }
            Ok(None) => over = true,
            // All buffers were in use for a moment.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(error) => {
                tracing::debug!(%error, "receive");
                over = true;
            }
        }
        if over {
            self.kill(key);
        } else {
            self.attend(now, key);
        }
        if !armed {
            if !over && self.connection(key).is_some_and(|connection| connection.stage != Stage::Dying) {
                self.receive(key);
            }
            self.operation_ended(key);
        }
    }

    /// Does what a session asks for after something happened to it.
    fn attend(&mut self, now: Duration, key: Key) {
        while let Some(event) = self.connection(key).and_then(|connection| connection.session.poll()) {
            match event {
                Event::Welcomed { image, capabilities } => self.welcomed(now, key, image, capabilities),
                Event::Request(answer) => {
                    self.note_demand(key, answer.class(), answer.ranges());
                    self.handle().stats.classes[class_index(answer.class())].requests.add(1);
                    self.schedule.push(key.slot as usize, answer);
                }
                Event::Multicast { class, ranges } => {
                    self.note_demand(key, class, ranges.iter().copied());
                    self.handle().stats.classes[class_index(class)].requests.add(1);
                    self.tell_channel(Order::Request { session: self.session_key(key), class, ranges });
                }
                Event::Touched { ranges, last, declined } => {
                    if let Some(keeper) = &self.shared.keeper {
                        self.handle().stats.touched_ranges.add(ranges.len() as u64);
                        keeper.touched(self.session_key(key).number(), &ranges, last, declined);
                    }
                }
                Event::Finish => {
                    self.schedule.clear(key.slot as usize);
                    self.leave_channel(key);
                    if let Some(connection) = self.connection(key).filter(|c| c.stage == Stage::Open) {
                        connection.stage = Stage::Finishing;
                        if let Some(reason) = connection.session.refused_for() {
                            self.handle().stats.count_refusal(reason);
                        }
                    }
                }
                Event::Abort(reason) => {
                    self.handle().stats.count_abort(reason);
                    self.kill(key);
                }
            }
        }
        let Some(connection) = self.connection(key) else { return };
        if !connection.session.control().is_empty() && connection.stage != Stage::Dying {
            self.schedule.push_control(key.slot as usize);
        }
        self.finish(key);
        self.note_timer(key);
    }

    fn welcomed(&mut self, now: Duration, key: Key, id: ImageId, capabilities: Capabilities) {
        let compress = self.shared.compress;
        let number = self.session_key(key).number();
        let image = self.shared.catalog.find(id);
        let Some(connection) = connection_of(&mut self.connections, key) else { return };
        let Some(acceptor) = self.listeners.get(connection.listener as usize) else { return };
        if image.is_none() {
            // It was dropped between HELLO and now.
            connection.session.image_gone(now, std::iter::empty());
            return;
        }
        let is_remote = acceptor.listener.is_tcp() && connection.peer.is_none_or(|peer| !peer.ip().is_loopback());
        connection.compressor = match compress {
            _ if !capabilities.contains(Capabilities::LZ4) => None,
            Compress::Always => Some(Compressor::new(true)),
            Compress::Auto if is_remote => Some(Compressor::new(false)),
            Compress::Auto | Compress::Off => None,
        };
        connection.local_due = capabilities.contains(Capabilities::LOCAL);
        if let Some(image) = image.as_ref().filter(|_| acceptor.listener.is_tcp()) {
            self.fixed.add(&mut self.uring, image);
        }
        connection.image = image;
        let record = Arc::new(SessionRecord {
            id: number,
            image: id,
            endpoint: acceptor.listener.endpoint.clone(),
            peer: connection.peer,
            local: connection.local_due,
            multicast: AtomicBool::new(false),
            since: now,
            pages: Default::default(),
            bytes: Default::default(),
        });
        tracing::info!(session = record.id, image = %id, endpoint = %record.endpoint, peer = ?record.peer, "session");
        connection.record = Some(Arc::clone(&record));
        self.shared.sessions.lock().insert(record.id, record);
        self.handle().stats.welcomed.add(1);
        self.handle().stats.registered_bytes.set(self.fixed.bytes());
        if capabilities.contains(Capabilities::WORKING_SET) {
            self.tell_order(key);
        }
        if capabilities.contains(Capabilities::MULTICAST) {
            self.join_channel(key);
        }
    }

    /// Tells a new clone what its siblings needed.
    fn tell_order(&mut self, key: Key) {
        let shared = Arc::clone(&self.shared);
        let number = self.session_key(key).number();
        let Some(keeper) = &shared.keeper else { return };
        let Some(connection) = self.connection(key) else { return };
        let Some(image) = connection.image.clone() else { return };
        let order = image.needed().order();
        // Drawn, so that no clone's probes are those of another.
        let seed = RandomState::new().hash_one(number);
        let told = order.for_clone(seed);
        connection.session.give_order(&told);
        let frames: u64 = told.iter().map(|range| range.count().get()).sum();
        self.handle().stats.ordered_pages.add(frames);
        keeper.joined(number, Arc::clone(image.needed()), order, seed);
    }

    /// Shuts the sending direction once the last words are out.
    fn finish(&mut self, key: Key) {
        let Some(connection) = connection_of(&mut self.connections, key) else { return };
        if connection.is_finished() {
            connection.stage = Stage::Lingering;
            if let Some(socket) = &connection.socket {
                self.uring.shut_down(key, socket, libc::SHUT_WR);
                connection.operations += 1;
            }
        }
    }

    /// Ends a connection at once.
    fn kill(&mut self, key: Key) {
        let Some(connection) = connection_of(&mut self.connections, key) else { return };
        if connection.stage == Stage::Dying {
            return;
        }
        connection.stage = Stage::Dying;
        self.schedule.clear(key.slot as usize);
        if let Some(socket) = &connection.socket {
            self.uring.shut_down(key, socket, libc::SHUT_RDWR);
            connection.operations += 1;
        }
        self.leave_channel(key);
    }

    /// Counts the end of an operation, and closes a dying connection after its last one.
    fn operation_ended(&mut self, key: Key) {
        let Some(connection) = connection_of(&mut self.connections, key) else { return };
        connection.operations = connection.operations.saturating_sub(1);
        if connection.stage != Stage::Dying || connection.operations > 0 {
            return;
        }
        if let Some(socket) = connection.socket.take() {
            self.uring.close(socket);
        }
        if let Some(record) = connection.record.take() {
            tracing::info!(session = record.id, "session is over");
            if let Some(keeper) = &self.shared.keeper {
                keeper.left(record.id);
            }
            self.shared.sessions.lock().remove(&record.id);
        }
        if connection.placed {
            self.shared.close_session();
        }
        self.schedule.remove(key.slot as usize);
        self.connections[key.slot as usize] = None;
        self.free.push(key.slot);
        self.handle().stats.connections.set((self.connections.len() - self.free.len()) as u64);
    }

    fn handle_timers(&mut self, now: Duration) {
        for (index, acceptor) in self.listeners.iter_mut().enumerate() {
            if acceptor.retry.is_some_and(|time| now >= time) {
                acceptor.retry = None;
                acceptor.armed = true;
                self.uring.accept(index as u32, acceptor.listener.as_fd());
            }
        }
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.keys().into_iter().for_each(|key| self.kill(key));
        }
        if self.timer.is_none_or(|timer| now < timer) {
            return;
        }
        self.timer = None;
        for key in self.keys() {
            let Some(connection) = self.connection(key).filter(|c| c.stage != Stage::Dying) else { continue };
            connection.session.handle_timeout(now);
            self.attend(now, key);
        }
    }

    fn note_timer(&mut self, key: Key) {
        let next = self.connection(key).and_then(|connection| connection.next_timeout());
        self.timer = [self.timer, next].into_iter().flatten().min();
    }

    fn keys(&self) -> Vec<Key> {
        let slots = self.connections.iter().enumerate();
        slots.filter_map(|(slot, c)| c.as_ref().map(|c| Key { slot: slot as u32, generation: c.generation })).collect()
    }

    fn connection(&mut self, key: Key) -> Option<&mut Connection> {
        connection_of(&mut self.connections, key)
    }

    fn reuse(&mut self, gather: Option<Gather>) {
        if let Some(mut gather) = gather.filter(|_| self.pool.len() < POOL) {
            gather.reset(None);
            self.pool.push(gather);
        }
    }
}

fn connection_of(connections: &mut [Option<Connection>], key: Key) -> Option<&mut Connection> {
    let connection = connections.get_mut(key.slot as usize)?.as_mut()?;
    (connection.generation == key.generation).then_some(connection)
}

fn peer_of(fd: &impl AsFd) -> Option<SocketAddr> {
    socket2::SockRef::from(fd).peer_addr().ok()?.as_socket()
}

/// True for what passes when other connections end.
fn is_exhaustion(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}
