//! A UDP socket behind an io_uring that owns whatever the kernel works on.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use io_uring::types::{CancelBuilder, Fd};
use io_uring::{cqueue, opcode, squeue};

use super::batch::Message;
use super::buffers::{GROUP, SharedBuffers};
use super::outgoing::{Outgoing, empty};
use super::ring::{Uring, Waiting};
use crate::address::NAME;
use crate::control;

/// The kernel's own head in a buffer (`struct io_uring_recvmsg_out`): the lengths of address, control messages and payload,
/// and the flags of the message, each of four bytes.
const OWN_HEAD: usize = 16;

/// What stands before the payload in a buffer: the kernel's head, room for the source's address, room for control messages.
/// A multiple of a cache line, for copies to odd addresses are slower.
const HEAD: usize = 128;

/// Room for the address.
const NAME_ROOM: usize = HEAD - OWN_HEAD - control::ROOM;
const _: () = assert!(NAME_ROOM >= NAME);

/// How long a ring that ends waits for the kernel to let go of its memory.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// Failures to receive one after the other that are taken for a socket that is broken; one alone may be any datagram's.
const FAILURES: u32 = 16;

/// What the kernel has done.
pub(crate) enum Completion<T> {
    /// A send is done, or failed after so many of its messages. What was chained to one that failed fails with ECANCELED.
    Sent { what: T, messages: usize, result: io::Result<()> },
    /// A message arrived, in a buffer that must be given back.
    Received(u16),
    /// The event counter is signalled.
    Woken,
    /// The socket takes messages again.
    Writable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Op {
    Receive = 1,
    Wake,
    Send,
    Writable,
    Cancel,
}

/// Room for a send, used again and again.
struct SendSlot<T> {
    outgoing: Box<Outgoing>,
    /// What the send refers to.
    what: Option<T>,
    /// Its messages under way.
    outstanding: usize,
    /// Those that are sent.
    sent: usize,
    failure: Option<io::Error>,
}

/// A socket with its ring. It belongs to the first thread that waits.
pub(crate) struct SocketRing<T> {
    uring: Uring,
    socket: OwnedFd,
    wake: Option<OwnedFd>,
    buffers: Option<SharedBuffers>,
    /// What the multishot receive takes as its pattern. It keeps its address.
    pattern: Box<libc::msghdr>,
    receives: bool,
    watches: bool,
    failures: u32,
    sends: usize,
    slots: Vec<SendSlot<T>>,
    free: Vec<u16>,
}

// SAFETY: all but `pattern` is `Send` by itself where `T` is; its header holds lengths and null pointers.
unsafe impl<T: Send> Send for SocketRing<T> {}

impl<T> SocketRing<T> {
    /// A ring that receives from `socket` into `buffers` buffers (a power of two) for messages of at least `size` bytes, and
    /// watches `wake`.
    pub(crate) fn new(
        waiting: Waiting,
        socket: BorrowedFd<'_>,
        wake: Option<BorrowedFd<'_>>,
        buffers: u16,
        size: usize,
    ) -> io::Result<Self> {
        let uring = Uring::new(waiting)?;
        let buffers = SharedBuffers::new(uring.inner(), buffers, (HEAD + size).next_multiple_of(64))?;
        let mut pattern = Box::new(empty());
        pattern.msg_namelen = NAME_ROOM as _;
        pattern.msg_controllen = control::ROOM as _;
        Ok(Self {
            uring,
            socket: socket.try_clone_to_owned()?,
            wake: wake.map(|wake| wake.try_clone_to_owned()).transpose()?,
            buffers: Some(buffers),
            pattern,
            receives: false,
            watches: false,
            failures: 0,
            sends: 0,
            slots: Vec::new(),
            free: Vec::new(),
        })
    }

    /// What becomes readable when there are completions, once the ring was waited for.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.uring.fd()
    }

    /// Sends what `describe` writes, from the message on that it returns, in the next wait and without blocking; `chained`:
    /// what is sent next depends on it. `what` owns the memory that the messages refer to, and comes back in the completion.
    pub(crate) fn send(&mut self, what: T, chained: bool, describe: impl FnOnce(&T, &mut Outgoing) -> usize) {
        let number = self.free.pop().unwrap_or_else(|| {
            self.slots.push(SendSlot { outgoing: Outgoing::new(), what: None, outstanding: 0, sent: 0, failure: None });
            (self.slots.len() - 1) as u16
        });
        let slot = &mut self.slots[usize::from(number)];
        let what = slot.what.insert(what);
        let first = describe(what, &mut slot.outgoing);
        let messages = slot.outgoing.messages().get_mut(first..).unwrap_or_default();
        (slot.outstanding, slot.sent) = (messages.len(), 0);
        self.sends += messages.len();
        let (fd, last) = (Fd(self.socket.as_raw_fd()), messages.len().saturating_sub(1));
        for (index, message) in messages.iter().enumerate() {
            let flags = (libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) as u32;
            let entry = opcode::SendMsg::new(fd, &raw const message.msg_hdr).flags(flags).build();
            let link = if chained || index < last { squeue::Flags::IO_LINK } else { squeue::Flags::empty() };
            // SAFETY: the header lies in the box of the slot, which is neither changed nor dropped before the last completion,
            // and neither is `what`, which owns what the header leads to.
            unsafe { self.uring.push(entry.flags(link).user_data(user_data(Op::Send, number))) };
        }
    }

    /// Asks to be told, once, when the socket takes messages again.
    pub(crate) fn watch_writable(&mut self) {
        let entry = opcode::PollAdd::new(Fd(self.socket.as_raw_fd()), libc::POLLOUT as u32).build();
        // SAFETY: it refers to no memory.
        unsafe { self.uring.push(entry.user_data(user_data(Op::Writable, 0))) };
    }

    /// Messages under way.
    pub(crate) fn sends(&self) -> usize {
        self.sends
    }

    /// Submits what there is, and waits for `wanted` completions: at most `timeout`, for ever where that is `None`.
    pub(crate) fn wait(&mut self, wanted: usize, timeout: Option<Duration>) -> io::Result<()> {
        if !self.receives && self.buffers.as_ref().is_some_and(SharedBuffers::any_free) {
            let entry = opcode::RecvMsgMulti::new(Fd(self.socket.as_raw_fd()), &raw const *self.pattern, GROUP).build();
            // SAFETY: the pattern is never changed, and lives as long as the ring or is leaked; so do the buffers.
            unsafe { self.uring.push(entry.user_data(user_data(Op::Receive, 0))) };
            self.receives = true;
        }
        if let Some(wake) = self.wake.as_ref().filter(|_| !self.watches) {
            let entry = opcode::PollAdd::new(Fd(wake.as_raw_fd()), libc::POLLIN as u32).build();
            // SAFETY: it refers to no memory.
            unsafe { self.uring.push(entry.user_data(user_data(Op::Wake, 0))) };
            self.watches = true;
        }
        self.uring.wait(wanted, timeout)
    }

    /// The next completion, without waiting.
    ///
    /// # Errors
    /// When receiving fails again and again.
    pub(crate) fn next(&mut self) -> io::Result<Option<Completion<T>>> {
        while let Some(entry) = self.uring.next() {
            let (op, number) = split(entry.user_data());
            let completion = match op {
                Some(Op::Receive) => self.received(&entry)?.map(Completion::Received),
                Some(Op::Send) => self.sent(number, entry.result()),
                Some(Op::Wake) => {
                    self.watches = false;
                    Some(Completion::Woken)
                }
                Some(Op::Writable) => Some(Completion::Writable),
                Some(Op::Cancel) | None => None,
            };
            if completion.is_some() {
                return Ok(completion);
            }
        }
        Ok(None)
    }

    /// True while more is received by itself.
    pub(crate) fn receives(&self) -> bool {
        self.receives
    }

    /// The message in a buffer.
    pub(crate) fn message(&self, buffer: u16) -> Message<'_> {
        let bytes = self.buffers.as_ref().map_or(&[][..], |buffers| buffers.bytes(buffer));
        read(bytes).unwrap_or_default()
    }

    /// Gives a buffer back to the kernel.
    pub(crate) fn give_back(&mut self, buffer: u16) {
        if let Some(buffers) = &mut self.buffers {
            buffers.give_back(buffer);
        }
    }

    fn received(&mut self, entry: &cqueue::Entry) -> io::Result<Option<u16>> {
        if !cqueue::more(entry.flags()) {
            self.receives = false;
        }
        let buffer = cqueue::buffer_select(entry.flags());
        match (check(entry.result()), buffer, &mut self.buffers) {
            (Ok(length), Some(buffer), Some(buffers)) => {
                self.failures = 0;
                Ok(buffers.take(buffer, length).then_some(buffer))
            }
            // All buffers are full; receiving goes on when some are given back.
            (Err(error), _, _) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(None),
            (Err(error), _, _) if self.failures == FAILURES => Err(error),
            _ => {
                self.failures += 1;
                Ok(None)
            }
        }
    }

    fn sent(&mut self, number: u16, result: i32) -> Option<Completion<T>> {
        let slot = self.slots.get_mut(usize::from(number))?;
        match check(result) {
            Ok(_) => slot.sent += 1,
            Err(error) => _ = slot.failure.get_or_insert(error),
        }
        slot.outstanding = slot.outstanding.saturating_sub(1);
        self.sends = self.sends.saturating_sub(1);
        if slot.outstanding > 0 {
            return None;
        }
        let what = slot.what.take()?;
        let result = slot.failure.take().map_or(Ok(()), Err);
        self.free.push(number);
        Some(Completion::Sent { what, messages: slot.sent, result })
    }
}

impl<T> Drop for SocketRing<T> {
    fn drop(&mut self) {
        if self.uring.outstanding() > 0 {
            let entry = opcode::AsyncCancel2::new(CancelBuilder::any()).build();
            // SAFETY: it refers to no memory.
            unsafe { self.uring.push(entry.user_data(user_data(Op::Cancel, 0))) };
        }
        let start = Instant::now();
        while self.uring.outstanding() > 0 && start.elapsed() < LAST_WAIT {
            // Another thread than the ring's cannot wait for it.
            if self.uring.wait(1, Some(Duration::from_millis(100))).is_err() {
                break;
            }
            while self.uring.next().is_some() {}
        }
        if self.uring.outstanding() > 0 {
            // The kernel may still work on these after the ring is closed.
            std::mem::forget(std::mem::take(&mut self.slots));
            std::mem::forget(self.buffers.take());
            std::mem::forget(std::mem::replace(&mut self.pattern, Box::new(empty())));
        }
    }
}

/// Reads a buffer that the kernel filled.
fn read(buffer: &[u8]) -> Option<Message<'_>> {
    let word = |index: usize| Some(u32::from_ne_bytes(*buffer.get(index * 4..)?.first_chunk()?));
    // The first two lengths are those that there were; what exceeded the room was cut.
    let (name, control, flags) = (word(0)? as usize, word(1)? as usize, word(3)?);
    Some(Message {
        name: buffer.get(OWN_HEAD..)?.get(..name.min(NAME_ROOM))?,
        control: buffer.get(OWN_HEAD + NAME_ROOM..)?.get(..control.min(control::ROOM))?,
        payload: buffer.get(HEAD..)?,
        truncated: flags & libc::MSG_TRUNC as u32 != 0,
    })
}

fn user_data(op: Op, number: u16) -> u64 {
    (op as u64) << 56 | u64::from(number)
}

fn split(user_data: u64) -> (Option<Op>, u16) {
    let op = [Op::Receive, Op::Wake, Op::Send, Op::Writable, Op::Cancel]
        .into_iter()
        .find(|op| *op as u64 == user_data >> 56);
    (op, user_data as u16)
}

fn check(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}
