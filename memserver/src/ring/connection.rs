//! One connection of a ring.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::compress::Compressor;
use super::sys::Socket;
use crate::image::ServedImage;
use crate::schedule::Run;
use crate::session::Session;
use crate::shared::SessionRecord;

/// Zero-copy sends of a connection whose pages the kernel may still look at; more would only pin memory.
const MAX_NOTIFICATIONS: u32 = 64;

/// Bytes from which on a send is worth the pinning of its pages.
const ZERO_COPY_FROM: usize = 32 << 10;

/// Zero-copy sends after which it is decided whether they avoid the copy.
const TRIAL: u32 = 4;

/// A socket, its session, and what is under way on it.
pub(super) struct Connection {
    pub(super) generation: u32,
    /// The index of the listener that it came from.
    pub(super) listener: u32,
    pub(super) socket: Option<Socket>,
    pub(super) peer: Option<SocketAddr>,
    pub(super) session: Session,
    /// True while it has a place among the sessions that are allowed.
    pub(super) placed: bool,
    pub(super) image: Option<Arc<ServedImage>>,
    pub(super) record: Option<Arc<SessionRecord>>,
    pub(super) compressor: Option<Compressor>,
    pub(super) zero_copy: ZeroCopy,
    /// The IMAGE message is to be sent as soon as the control bytes are out.
    pub(super) local_due: bool,
    /// The channel thread knows the session.
    pub(super) in_channel: bool,
    /// What the send under way answers.
    pub(super) running: Vec<Run>,
    pub(super) sending: bool,
    /// Operations that refer to the socket.
    pub(super) operations: u32,
    pub(super) stage: Stage,
}

/// How far the end of a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// It goes on.
    Open,
    /// The last words are being said.
    Finishing,
    /// They are said, and the sending direction is shut.
    Lingering,
    /// It is shut down, and closed when no operation is under way.
    Dying,
}

/// Whether to send without a copy on this path, as learnt from the kernel's notifications.
#[derive(Debug)]
pub(super) struct ZeroCopy {
    state: Verdict,
    notified: u32,
    copied: u32,
    pending: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Trial,
    Worthwhile,
    Plain,
}

impl Connection {
    pub(super) fn new(generation: u32, listener: u32, socket: Socket, session: Session, zero_copy: bool) -> Self {
        Self {
            generation,
            listener,
            socket: Some(socket),
            peer: None,
            session,
            placed: false,
            image: None,
            record: None,
            compressor: None,
            zero_copy: ZeroCopy::new(zero_copy),
            local_due: false,
            in_channel: false,
            running: Vec::new(),
            sending: false,
            operations: 0,
            stage: Stage::Open,
        }
    }

    /// True when the last words are out and the sending direction should be shut.
    pub(super) fn is_finished(&mut self) -> bool {
        self.stage == Stage::Finishing && !self.sending && self.session.control().is_empty()
    }

    /// When the session needs attention.
    pub(super) fn next_timeout(&self) -> Option<Duration> {
        if self.stage == Stage::Dying { None } else { self.session.next_timeout() }
    }
}

impl ZeroCopy {
    fn new(possible: bool) -> Self {
        let state = if possible { Verdict::Trial } else { Verdict::Plain };
        Self { state, notified: 0, copied: 0, pending: 0 }
    }

    /// Whether a send of `length` bytes should go without a copy; if so it is counted as under way.
    pub(super) fn choose(&mut self, length: usize) -> bool {
        let allowed = match self.state {
            Verdict::Plain => false,
            Verdict::Trial => self.notified + self.pending < TRIAL,
            Verdict::Worthwhile => self.pending < MAX_NOTIFICATIONS,
        };
        let chosen = allowed && length >= ZERO_COPY_FROM;
        self.pending += u32::from(chosen);
        chosen
    }

    /// A zero-copy send is over for good, and whether the kernel had copied.
    pub(super) fn released(&mut self, copied: bool) {
        self.pending = self.pending.saturating_sub(1);
        self.notified += 1;
        self.copied += u32::from(copied);
        if self.state == Verdict::Trial && self.notified >= TRIAL {
            // A path copies always or hardly ever; one copy in doubt is a retransmission.
            self.state = if self.copied * 2 > self.notified { Verdict::Plain } else { Verdict::Worthwhile };
        }
    }

    /// The kernel cannot do it on this socket.
    pub(super) fn give_up(&mut self) {
        self.state = Verdict::Plain;
        self.pending = self.pending.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_copy_is_kept_where_it_avoids_the_copy() {
        for copied in [true, false] {
            let mut path = ZeroCopy::new(true);
            assert!(!path.choose(4096), "a page is not worth it");
            for _ in 0..TRIAL {
                assert!(path.choose(1 << 20));
            }
            assert!(!path.choose(1 << 20), "no more before the verdict");
            (0..TRIAL).for_each(|_| path.released(copied));
            assert_eq!(path.choose(1 << 20), !copied);
        }
        assert!(!ZeroCopy::new(false).choose(1 << 20));
    }
}
