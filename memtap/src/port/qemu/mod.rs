//! QEMU, unmodified: memtap plays the source of a postcopy migration, and a QEMU that waits for one becomes a clone.
//!
//! ```text
//!   memtap (source)                                                    QEMU (destination)
//!     │ header, ADVISE, the RAM blocks' names and sizes, RAM_DISCARD for each │
//!     │ PACKAGED { LISTEN, device state, PING, RUN }                          │
//!     ├──────────────────────────────────────────────────────────────────────▶│ loads the device state,
//!     │                                                     REQ_PAGES … PONG  │ faulting, then runs
//!     │◀──────────────────────────────────────────────────────────────────────┤
//!     │ SECTION_PART { page, page, … } , …                                    │
//!     ├──────────────────────────────────────────────────────────────────────▶│
//!     │ once every page of every block was sent: SECTION_END, end of file     │
//!     ├──────────────────────────────────────────────────────────────────────▶│
//!     │                                                              SHUT 0   │
//!     │◀──────────────────────────────────────────────────────────────────────┤ the clone needs us no more
//! ```
//!
//! **Preempt channel.** With QEMU's capability `postcopy-preempt` a second connection carries bare page records, and only
//! pages that QEMU asked for: at the end it waits for those it asked for, but for no others, before it closes the channel.
//!
//! **Recovery.** When memtap dies, QEMU pauses the migration (not the guest, until it needs a page) and takes a new connection
//! by `migrate-recover`. A fresh memtap asks for the bitmap of received pages of every block (RECV_BITMAP), says RESUME, and
//! QEMU repeats the requests that are open. So nothing of memtap's state has to survive it.
//!
//! Rules of QEMU that the port keeps: no page twice (QEMU would pause the migration); not the end before every page (QEMU
//! would take the missing ones for zeros); a huge page in one piece; the captured id of the RAM section; all blocks, with
//! the ROMs and tables among them.
//!
//! Versions: the stream is that of QEMU 7.2 to 10.0, whose postcopy parts have not changed since 2.11.

mod channel;
pub mod return_path;
mod session;
mod sys;
#[cfg(test)]
mod testing;
mod wire;

use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use descriptor::import::qemu::record::RecordError;
use descriptor::{Descriptor, FrameRange, FrameSet, Gfn, PAGE_SIZE, PageCount};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;

pub(crate) use sys::inherited;

use self::channel::{Channel, Urgency};
use self::return_path::ReturnPath;
use self::session::{Next, Piece, Session};
use self::wire::RecordKind;
use super::{Event, FaultPort, Installed, PortError, PortFigures, PortTraits, Stop, Waiter};

/// How much is read from the return path at once: some two thousand requests.
const READ_SIZE: usize = 64 << 10;

/// How often the return path is read for one [`FaultPort::read_events`], so that a flood of requests cannot keep the pager
/// from answering them.
const READS_MAX: usize = 4;

/// Bulk of fewer pages than this is copied into the queue, to be written with its neighbours; more pages make a large write
/// by themselves.
const GATHERED_PAGES: u64 = 8;

/// How long QEMU may take from the last byte to SHUT: it has yet to load what lies in the sockets' buffers, some megabytes,
/// and to end its threads, which takes milliseconds, or seconds on a host that swaps.
const SHUT_TIMEOUT: Duration = Duration::from_secs(30);

/// The fault port of one QEMU clone.
#[derive(Debug)]
pub struct QemuPort {
    session: Session,
    return_path: ReturnPath,
    main: Channel,
    preempt: Option<Channel>,
    /// Watches both sockets, for writing while something is queued.
    epoll: OwnedFd,
    watched: Watched,
    buffer: Box<[u8]>,
    /// What was reported during a recovery, for the first [`FaultPort::read_events`].
    early: Vec<Event>,
    /// When the migration's end was written out.
    written: Option<Instant>,
}

/// A clone that cannot be started or taken over.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum QemuError {
    /// The descriptor has not what QEMU needs.
    #[error("no QEMU can be started from this descriptor")]
    Record(#[from] RecordError),
    /// The connection failed, or QEMU broke the protocol.
    #[error(transparent)]
    Port(#[from] PortError),
    /// QEMU did not tell what it has.
    #[error("QEMU did not finish the recovery within {0:?}; is its migration in state postcopy-paused?")]
    TimedOut(Duration),
}

/// Which sockets are watched for writing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Watched {
    main: bool,
    preempt: bool,
}

impl QemuPort {
    /// Starts the clone behind `main`, a stream socket on which a QEMU waits for a migration; `preempt` is the second
    /// connection where that QEMU has the capability `postcopy-preempt`, and must be there exactly then.
    ///
    /// # Errors
    /// When the descriptor is not of QEMU, or the sockets cannot be used.
    pub fn start(descriptor: &Descriptor, main: OwnedFd, preempt: Option<OwnedFd>) -> Result<Self, QemuError> {
        let mut opening = Vec::new();
        let session = Session::start(descriptor, &mut opening)?;
        Ok(Self::new(session, opening, main, preempt)?)
    }

    /// Takes over a clone whose source died; QEMU must have been told `migrate-recover`. Waits, for at most `timeout`, until
    /// it has said which pages it has. These are then in [`QemuPort::sent`], and are the pager's present pages.
    ///
    /// # Errors
    /// As [`QemuPort::start`], and when QEMU does not answer as it should.
    pub fn recover(
        descriptor: &Descriptor,
        main: OwnedFd,
        preempt: Option<OwnedFd>,
        timeout: Duration,
    ) -> Result<Self, QemuError> {
        let mut opening = Vec::new();
        let session = Session::recover(descriptor, &mut opening)?;
        let mut port = Self::new(session, opening, main, preempt)?;
        let mut early = Vec::new();
        let deadline = Instant::now() + timeout;
        loop {
            port.read_events(&mut early)?;
            if port.session.is_running() {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(QemuError::TimedOut(timeout));
            }
            port.wait(left)?;
        }
        port.early = early;
        // A socket with room makes the descriptor readable, so that the early events are fetched.
        port.watch(Watched { main: true, ..port.watched })?;
        Ok(port)
    }

    /// The frames that were sent, or had arrived before a recovery.
    pub fn sent(&self) -> &FrameSet {
        self.session.sent()
    }

    fn new(session: Session, opening: Vec<u8>, main: OwnedFd, preempt: Option<OwnedFd>) -> Result<Self, PortError> {
        let main = Channel::new(main).map_err(os("fcntl", MAIN))?;
        let preempt = preempt.map(Channel::new).transpose().map_err(os("fcntl", PREEMPT))?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(os("epoll_create1", MAIN))?;
        let data = EventData::new_u64(0);
        epoll::add(&epoll, &main, data, EventFlags::IN).map_err(os("epoll_ctl", MAIN))?;
        if let Some(preempt) = &preempt {
            epoll::add(&epoll, preempt, data, EventFlags::IN).map_err(os("epoll_ctl", PREEMPT))?;
        }
        let return_path = ReturnPath::new(session.bitmap_max());
        let buffer = vec![0; READ_SIZE].into_boxed_slice();
        let watched = Watched::default();
        let mut port =
            Self { session, return_path, main, preempt, epoll, watched, buffer, early: Vec::new(), written: None };
        port.main.push(Urgency::Demand, opening);
        port.flush()?;
        Ok(port)
    }

    /// Blocks until something can be read or written.
    fn wait(&self, timeout: Duration) -> Result<(), PortError> {
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
        match poll(&mut [PollFd::new(&self.epoll, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(os("poll", MAIN)(error)),
        }
    }

    fn read(&mut self, events: &mut Vec<Event>) -> Result<(), PortError> {
        for _ in 0..READS_MAX {
            let count = match self.main.read(&mut self.buffer) {
                Ok(Some(0)) => break,
                Ok(Some(count)) => count,
                Ok(None) => return Err(self.closed()),
                Err(error) if is_gone(&error) => return Err(self.closed()),
                Err(error) => return Err(os("recv", MAIN)(error)),
            };
            self.return_path.push(&self.buffer[..count]);
            let mut answer = Vec::new();
            while let Some(message) = self.return_path.next_message().map_err(|error| protocol(&error))? {
                tracing::trace!(?message, "QEMU says");
                self.session.handle(message, events, &mut answer).map_err(|error| protocol(&error))?;
            }
            if !answer.is_empty() {
                self.main.push(Urgency::Demand, answer);
            }
            if self.session.is_completed() {
                events.push(Event::Closed);
                return Ok(());
            }
        }
        self.read_preempt()
    }

    /// Nothing ever comes back on the preempt channel but its end.
    fn read_preempt(&mut self) -> Result<(), PortError> {
        let Some(preempt) = &mut self.preempt else {
            return Ok(());
        };
        match preempt.read(&mut self.buffer) {
            Ok(Some(0)) => Ok(()),
            Ok(Some(count)) => Err(protocol(&format!("{count} bytes on the preempt channel"))),
            Err(error) if !is_gone(&error) => Err(os("recv", PREEMPT)(error)),
            // QEMU 10 closes it as soon as it has what it asked for, and says SHUT after that.
            Ok(None) | Err(_) if self.session.has_ended() => {
                self.preempt = None;
                Ok(())
            }
            Ok(None) | Err(_) => Err(self.closed()),
        }
    }

    /// The end of a connection before SHUT, which QEMU sends when it has loaded everything, and only then: it failed to load
    /// what it got, or paused the migration.
    fn closed(&self) -> PortError {
        PortError::Closed { peer: "QEMU", missing: self.session.missing() }
    }

    /// Fails when SHUT is overdue: the time counts from the moment at which the last byte was written.
    fn check_patience(&mut self) -> Result<(), PortError> {
        if !self.session.has_ended() || self.session.is_completed() || self.watched != Watched::default() {
            return Ok(());
        }
        let written = *self.written.get_or_insert_with(Instant::now);
        if written.elapsed() < SHUT_TIMEOUT {
            return Ok(());
        }
        Err(PortError::Unconfirmed { peer: "QEMU", waited: SHUT_TIMEOUT })
    }

    /// Writes what the sockets take and watches for the rest.
    fn flush(&mut self) -> Result<(), PortError> {
        let mut pending = Watched::default();
        for (channel, name, watch) in
            [(Some(&mut self.main), MAIN, &mut pending.main), (self.preempt.as_mut(), PREEMPT, &mut pending.preempt)]
        {
            let Some(channel) = channel else { continue };
            match channel.flush() {
                // The end of the connection is seen, in its turn, by reading.
                Ok(()) => *watch = channel.is_pending(),
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(os("writev", name)(error)),
            }
        }
        self.watch(pending)
    }

    fn watch(&mut self, pending: Watched) -> Result<(), PortError> {
        let flags = |write| if write { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
        let data = EventData::new_u64(0);
        if pending.main != self.watched.main {
            epoll::modify(&self.epoll, &self.main, data, flags(pending.main)).map_err(os("epoll_ctl", MAIN))?;
        }
        if let Some(preempt) = &self.preempt
            && pending.preempt != self.watched.preempt
        {
            epoll::modify(&self.epoll, preempt, data, flags(pending.preempt)).map_err(os("epoll_ctl", PREEMPT))?;
        }
        self.watched = pending;
        Ok(())
    }

    /// Sends as much of `range` as may be sent; `pages` holds its bytes, or they are zeros.
    fn send(&mut self, range: FrameRange, pages: Option<&[u8]>) -> Result<Installed, PortError> {
        let mut rest = range;
        let stopped = loop {
            if rest.is_empty() {
                break None;
            }
            let piece = match self.session.next(rest) {
                Next::Send(piece) => piece,
                Next::AlreadySent => break Some(Stop::AlreadyPresent),
                Next::Unfit => return Err(protocol(&format!("pages {rest} are no whole pages of a RAM block"))),
            };
            if !self.channel(piece).has_room(urgency(piece)) {
                break Some(Stop::Busy);
            }
            let bytes = pages.map(|pages| {
                let first = (piece.frames.start() - range.start()).bytes() as usize;
                &pages[first..first + piece.frames.count().bytes() as usize]
            });
            self.send_piece(piece, bytes)?;
            (_, rest) = rest.split_at(piece.frames.count());
        };
        let pending =
            Watched { main: self.main.is_pending(), preempt: self.preempt.as_ref().is_some_and(Channel::is_pending) };
        self.watch(pending)?;
        Ok(Installed { count: range.count() - rest.count(), stopped })
    }

    fn send_piece(&mut self, piece: Piece, bytes: Option<&[u8]>) -> Result<(), PortError> {
        let framed = !self.by_preempt(piece);
        let section_id = self.session.section_id();
        let mut headers = Vec::with_capacity(piece.frames.count().get() as usize * 9 + 288);
        if framed {
            wire::begin_part(&mut headers, section_id);
        }
        let mut ends = Vec::new();
        let kind = if bytes.is_some() { RecordKind::Page } else { RecordKind::Zero };
        self.session.send(piece, kind, &mut headers, &mut ends);
        let records_end = headers.len();
        if framed {
            wire::end_part(&mut headers, section_id);
        }
        let mut parts = Vec::with_capacity(2 * ends.len() + 1);
        if let Some(bytes) = bytes {
            let mut begin = 0;
            for (end, page) in ends.into_iter().zip(bytes.chunks(PAGE_SIZE as usize)) {
                parts.push(IoSlice::new(&headers[begin..end]));
                parts.push(IoSlice::new(page));
                begin = end;
            }
            parts.push(IoSlice::new(&headers[records_end..]));
        } else {
            parts.push(IoSlice::new(&headers));
        }
        let urgency = urgency(piece);
        let name = if framed { MAIN } else { PREEMPT };
        let channel = match &mut self.preempt {
            Some(preempt) if !framed => preempt,
            _ => &mut self.main,
        };
        if urgency == Urgency::Bulk && (bytes.is_none() || piece.frames.count().get() < GATHERED_PAGES) {
            channel.push(urgency, parts.iter().map(|part| &part[..]).collect::<Vec<_>>().concat());
            return Ok(());
        }
        match channel.send(urgency, &parts) {
            Err(error) if !is_gone(&error) => Err(os("writev", name)(error)),
            // The end of the connection is seen, in its turn, by reading.
            _ => Ok(()),
        }
    }

    fn channel(&self, piece: Piece) -> &Channel {
        match &self.preempt {
            Some(preempt) if self.by_preempt(piece) => preempt,
            _ => &self.main,
        }
    }

    /// At its end QEMU waits on the preempt channel for what it asked for alone: no other page may go there.
    fn by_preempt(&self, piece: Piece) -> bool {
        piece.demand && self.preempt.is_some()
    }
}

impl FaultPort for QemuPort {
    fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    fn traits(&self) -> PortTraits {
        PortTraits { granule: self.session.granule(), needs_zeros: true }
    }

    fn read_events(&mut self, events: &mut Vec<Event>) -> Result<(), PortError> {
        events.append(&mut self.early);
        if self.session.is_completed() {
            return Ok(());
        }
        self.read(events)?;
        self.flush()?;
        self.check_patience()
    }

    fn install(&mut self, start: Gfn, pages: &[u8]) -> Result<Installed, PortError> {
        let count = PageCount::new(pages.len() as u64 / PAGE_SIZE);
        self.send(FrameRange::new(start, count), Some(pages))
    }

    fn install_zeros(&mut self, range: FrameRange) -> Result<Installed, PortError> {
        self.send(range, None)
    }

    /// QEMU lets everybody go on who waits for a page once it arrives.
    fn resume(&mut self, _gfn: Gfn, _waiter: Waiter) -> Result<(), PortError> {
        Ok(())
    }

    fn complete(&mut self) -> Result<(), PortError> {
        if self.session.has_ended() {
            return Ok(());
        }
        self.session.end().map_err(|missing| PortError::Protocol {
            peer: "the pager".to_owned(),
            what: format!("it ends the migration with {missing} pages missing, which QEMU would take for zeros"),
        })?;
        let mut end = Vec::new();
        wire::end(&mut end, self.session.section_id());
        self.main.push(Urgency::Bulk, end);
        if let Some(preempt) = &mut self.preempt {
            let mut end = Vec::new();
            wire::end_preempt(&mut end);
            preempt.push(Urgency::Bulk, end);
        }
        self.flush()
    }

    fn figures(&self) -> Option<PortFigures> {
        None
    }
}

const MAIN: &str = "QEMU's migration socket";
const PREEMPT: &str = "QEMU's preempt socket";

fn urgency(piece: Piece) -> Urgency {
    if piece.demand { Urgency::Demand } else { Urgency::Bulk }
}

fn protocol(what: &dyn std::fmt::Display) -> PortError {
    PortError::Protocol { peer: "QEMU".to_owned(), what: what.to_string() }
}

fn os<E: Into<io::Error>>(operation: &'static str, object: &str) -> impl FnOnce(E) -> PortError {
    let object = object.to_owned();
    move |source| PortError::Os { operation, object, source: source.into() }
}

/// True for the errors of a connection whose other end was closed.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::NotConnected)
}

#[cfg(test)]
mod tests;
