//! The io_uring of one thread, behind an interface that owns whatever the kernel works on.
//!
//! A [`Gather`] that is given to [`Uring::send`] comes back in the completion after which the kernel no longer looks at it:
//! the send's own, or the notification of a zero-copy send. Receive buffers belong to the ring and are lent out.
#![allow(unsafe_code)]

mod buffers;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::types::{CancelBuilder, Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use self::buffers::{BUFFER, BUFFERS, Buffers, GROUP, provide, shared_buffers};
use super::features::{self, Features, RingFeatures};
use super::gather::Gather;
use crate::ServeError;
use crate::sys::Mapping;

/// Asks a zero-copy send to tell whether it copied after all, and the bit in which it tells (linux/io_uring.h).
const SEND_ZC_REPORT_USAGE: u16 = 1 << 3;
const NOTIF_USAGE_ZC_COPIED: u32 = 1 << 31;

/// Places for registered buffers: as many GiB of images.
pub(super) const FIXED: u16 = 64;

/// How long a ring that ends waits for the kernel to let go of its buffers.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// Builds an entry for either kind of descriptor.
macro_rules! with_socket {
    ($socket:expr, |$fd:ident| $build:expr) => {
        match $socket {
            RawSocket::Direct(slot) => {
                let $fd = Fixed(slot);
                $build
            }
            RawSocket::Plain(fd) => {
                let $fd = Fd(fd);
                $build
            }
        }
    };
}
/// Names a session of the ring. The generation tells late completions of an earlier holder of the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) slot: u32,
    pub(super) generation: u32,
}

/// A connected socket.
#[derive(Debug)]
pub(super) enum Socket {
    /// A slot in the ring's own table.
    Direct(u32),
    /// An ordinary descriptor.
    Plain(OwnedFd),
}

/// Bytes that arrived, in a buffer of the ring; [`Uring::recycle`] takes it back.
#[derive(Debug)]
pub(super) struct Received {
    buffer: u16,
    own: Option<u32>,
    length: usize,
}

/// What the kernel has done.
#[derive(Debug)]
pub(super) enum Completion {
    /// The wake-up counter was signalled; it is no longer watched.
    Woken,
    /// A connection, or the failure to accept one; `armed` while more come by themselves.
    Accepted { listener: u32, result: io::Result<Socket>, armed: bool },
    /// Bytes, or the end of them where `None`; `armed` while more come by themselves.
    Received { key: Key, result: io::Result<Option<Received>>, armed: bool },
    /// Some of a send is done.
    Progress,
    /// The socket knows no zero-copy sends; what was to be one goes on as a plain one.
    ZeroCopyRefused { key: Key },
    /// All of a send is done, or none will be any more. The gather is missing while a notification is still to come.
    Sent { key: Key, result: io::Result<()>, gather: Option<Gather> },
    /// The kernel no longer looks at the pages of a zero-copy send, and whether it had copied them.
    Released { key: Key, copied: bool, gather: Option<Gather> },
    /// A direct descriptor as an ordinary one.
    Installed { key: Key, result: io::Result<OwnedFd> },
    /// A socket is shut down.
    ShutDown { key: Key },
    /// Nothing of interest.
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Op {
    Wake = 1,
    Accept,
    Receive,
    Send,
    Install,
    ShutDown,
    Close,
    Cancel,
}

/// Room for a send, used again and again. The message header keeps its address.
struct SendSlot {
    send: Option<InFlight>,
    pieces: Vec<libc::iovec>,
    control: Vec<u64>,
    message: Box<libc::msghdr>,
}

/// A send that the kernel works on.
struct InFlight {
    key: Key,
    socket: RawSocket,
    gather: Gather,
    sent: usize,
    zero_copy: bool,
    /// Where the kernel has the image's pages registered, if they are one piece there and all else goes before them.
    fixed: Option<FixedPiece>,
    /// The send itself has not completed.
    active: bool,
    /// Notifications to come.
    notifications: u32,
    copied: bool,
}

/// The last piece of a gather, in a registered buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct FixedPiece {
    /// The number of the buffer.
    pub(super) buffer: u16,
    /// The address under which the piece was registered; nothing need be mapped there any more.
    pub(super) address: usize,
    /// The length in bytes.
    pub(super) length: usize,
}

#[derive(Clone, Copy, Debug)]
enum RawSocket {
    Direct(u32),
    Plain(RawFd),
}

/// An io_uring with what it works on.
pub(super) struct Uring {
    ring: IoUring,
    features: Features,
    buffers: Buffers,
    sends: Vec<SendSlot>,
    free: Vec<u32>,
    /// Entries for which the submission queue had no room.
    backlog: VecDeque<squeue::Entry>,
    /// Operations whose last completion is still to come.
    outstanding: usize,
}

impl Uring {
    /// A ring for the calling thread, with room for `sockets` direct descriptors.
    pub(super) fn new(wanted: RingFeatures, sockets: u32) -> Result<Self, ServeError> {
        let (ring, mut features) = features::set_up(wanted, sockets)?;
        let buffers = match features.multishot_receive.then(|| shared_buffers(&ring)) {
            Some(Ok(buffers)) => buffers,
            Some(Err(error)) => {
                tracing::warn!(%error, "no shared receive buffers");
                features.multishot_receive = false;
                Buffers::Own(Vec::new())
            }
            None => Buffers::Own(Vec::new()),
        };
        Ok(Self {
            ring,
            features,
            buffers,
            sends: Vec::new(),
            free: Vec::new(),
            backlog: VecDeque::new(),
            outstanding: 0,
        })
    }

    /// What is in use.
    pub(super) fn features(&self) -> Features {
        self.features
    }

    /// Watches the wake-up counter, once. It must stay open as long as the ring.
    pub(super) fn watch(&mut self, counter: BorrowedFd<'_>) {
        let entry = opcode::PollAdd::new(Fd(counter.as_raw_fd()), libc::POLLIN as u32).build();
        self.push(entry, Op::Wake, 0, 0);
    }

    /// Accepts connections. The listener must stay open until that has ended.
    pub(super) fn accept(&mut self, listener: u32, fd: BorrowedFd<'_>) {
        let fd = Fd(fd.as_raw_fd());
        let entry = match (self.features.multishot_accept, self.features.direct_descriptors) {
            (true, direct) => {
                let flags = if direct { 0 } else { libc::SOCK_CLOEXEC };
                opcode::AcceptMulti::new(fd).allocate_file_index(direct).flags(flags).build()
            }
            (false, _) => {
                opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut()).flags(libc::SOCK_CLOEXEC).build()
            }
        };
        self.push(entry, Op::Accept, listener, 0);
    }

    /// Receives from a socket.
    pub(super) fn receive(&mut self, key: Key, socket: &Socket) {
        let entry = match &mut self.buffers {
            Buffers::Shared { .. } => with_socket!(socket.raw(), |fd| opcode::RecvMulti::new(fd, GROUP).build()),
            Buffers::Own(buffers) => {
                let slot = key.slot as usize;
                if slot >= buffers.len() {
                    buffers.resize_with(slot + 1, || None);
                }
                let buffer = buffers[slot].get_or_insert_with(|| vec![0; BUFFER].into_boxed_slice()).as_mut_ptr();
                with_socket!(socket.raw(), |fd| opcode::Recv::new(fd, buffer, BUFFER as u32).build())
            }
        };
        self.push(entry, Op::Receive, key.slot, key.generation);
    }

    /// The bytes that arrived.
    pub(super) fn bytes(&self, received: &Received) -> &[u8] {
        match (&self.buffers, received.own) {
            (Buffers::Shared { memory, .. }, _) => {
                let offset = usize::from(received.buffer % BUFFERS) * BUFFER;
                // SAFETY: the buffer lies in `memory` and the length is at most its size. The kernel filled that much of it
                // and leaves it alone until `recycle`, which takes the only `Received` of this buffer, gives it back.
                unsafe { std::slice::from_raw_parts(memory.address().add(offset), received.length) }
            }
            (Buffers::Own(buffers), Some(slot)) => {
                let buffer = buffers.get(slot as usize).and_then(Option::as_deref);
                buffer.and_then(|buffer| buffer.get(..received.length)).unwrap_or_default()
            }
            (Buffers::Own(_), None) => &[],
        }
    }

    /// Takes a receive buffer back.
    pub(super) fn recycle(&mut self, received: Received) {
        if let Buffers::Shared { ring, memory, tail } = &mut self.buffers {
            provide(ring, memory, tail, received.buffer % BUFFERS);
        }
    }

    /// Makes room for registered buffers; false when the kernel has none.
    pub(super) fn prepare_fixed(&mut self) -> bool {
        self.ring.submitter().register_buffers_sparse(FIXED.into()).is_ok()
    }

    /// Registers `length` bytes of `mapping` from `offset` on as a buffer, which pins their pages until
    /// [`Uring::unregister`].
    pub(super) fn register(&mut self, buffer: u16, mapping: &Mapping, offset: usize, length: usize) -> io::Result<()> {
        assert!(offset + length <= mapping.len(), "a buffer beyond its mapping");
        let start = mapping.address().wrapping_add(offset);
        let piece = libc::iovec { iov_base: start.cast(), iov_len: length };
        // SAFETY: the range is mapped during the call. From then on the kernel refers to the pages, which it has pinned, and
        // uses the address only to compute offsets into them, so the mapping need not last.
        unsafe { self.ring.submitter().register_buffers_update(buffer.into(), &[piece], None) }
    }

    /// Gives a registered buffer up. Sends under way keep its pages until they are done.
    pub(super) fn unregister(&mut self, buffer: u16) {
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: an empty place refers to nothing.
        let result = unsafe { self.ring.submitter().register_buffers_update(buffer.into(), &[nothing], None) };
        if let Err(error) = result {
            tracing::debug!(%error, "registered buffer not given up");
        }
    }

    /// Sends all of `gather`; without a copy in the kernel where `zero_copy`, and then from a registered buffer where the
    /// last piece is `fixed`.
    pub(super) fn send(
        &mut self,
        key: Key,
        socket: &Socket,
        gather: Gather,
        zero_copy: bool,
        fixed: Option<FixedPiece>,
    ) {
        let slot = self.free.pop().unwrap_or_else(|| {
            let message = Box::new(empty_message());
            self.sends.push(SendSlot { send: None, pieces: Vec::new(), control: Vec::new(), message });
            (self.sends.len() - 1) as u32
        });
        let socket = socket.raw();
        self.sends[slot as usize].send = Some(InFlight {
            key,
            socket,
            gather,
            sent: 0,
            zero_copy,
            fixed: fixed.filter(|_| zero_copy),
            active: true,
            notifications: 0,
            copied: false,
        });
        self.submit_send(slot);
    }

    /// Shuts a socket down, `how` as in shutdown(2). Operations under way on it end.
    pub(super) fn shut_down(&mut self, key: Key, socket: &Socket, how: i32) {
        let entry = with_socket!(socket.raw(), |fd| opcode::Shutdown::new(fd, how).build());
        self.push(entry, Op::ShutDown, key.slot, key.generation);
    }

    /// Asks for an ordinary descriptor of a direct one.
    pub(super) fn install(&mut self, key: Key, slot: u32) {
        let entry = opcode::FixedFdInstall::new(Fixed(slot), 0).build();
        self.push(entry, Op::Install, key.slot, key.generation);
    }

    /// Closes a socket; no operation on it may be under way.
    pub(super) fn close(&mut self, socket: Socket) {
        match socket {
            Socket::Direct(slot) => self.push(opcode::Close::new(Fixed(slot)).build(), Op::Close, 0, 0),
            Socket::Plain(fd) => drop(fd),
        }
    }

    /// Submits what was asked for, and waits for a completion: at most `timeout`, for ever where that is `None`.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.flush_backlog();
        let result = match timeout {
            Some(Duration::ZERO) => self.ring.submit(),
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec))
            }
            None => self.ring.submit_and_wait(1),
        };
        match result {
            Ok(_) => Ok(()),
            // Time-out, signal, and completions that must be reaped first.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The next completion, without waiting.
    pub(super) fn next(&mut self) -> Option<Completion> {
        let entry = self.ring.completion().next()?;
        let armed = cqueue::more(entry.flags());
        if !armed {
            self.outstanding = self.outstanding.saturating_sub(1);
        }
        let (op, slot, generation) = split(entry.user_data());
        let key = Key { slot, generation };
        let result = entry.result();
        Some(match op {
            Some(Op::Wake) => Completion::Woken,
            Some(Op::Accept) => {
                let direct = self.features.direct_descriptors && self.features.multishot_accept;
                let result = check(result).map(|number| match direct {
                    true => Socket::Direct(number),
                    // SAFETY: accept gave this descriptor to us alone.
                    false => Socket::Plain(unsafe { OwnedFd::from_raw_fd(number as RawFd) }),
                });
                Completion::Accepted { listener: slot, result, armed }
            }
            Some(Op::Receive) => Completion::Received { key, result: self.received(&entry, slot), armed },
            Some(Op::Send) => self.send_completed(slot, result, armed, cqueue::notif(entry.flags())),
            Some(Op::Install) => {
                // SAFETY: the kernel made this descriptor for us alone.
                let result = check(result).map(|number| unsafe { OwnedFd::from_raw_fd(number as RawFd) });
                Completion::Installed { key, result }
            }
            Some(Op::ShutDown) => Completion::ShutDown { key },
            Some(Op::Close | Op::Cancel) | None => Completion::Other,
        })
    }

    fn received(&mut self, entry: &cqueue::Entry, slot: u32) -> io::Result<Option<Received>> {
        let buffer = cqueue::buffer_select(entry.flags());
        let length = check(entry.result())? as usize;
        let received = match (&self.buffers, buffer) {
            (Buffers::Shared { .. }, Some(buffer)) => Received { buffer, own: None, length: length.min(BUFFER) },
            (Buffers::Shared { .. }, None) => return Ok(None),
            (Buffers::Own(_), _) => Received { buffer: 0, own: Some(slot), length: length.min(BUFFER) },
        };
        if length == 0 {
            self.recycle(received);
            return Ok(None);
        }
        Ok(Some(received))
    }

    fn send_completed(&mut self, slot: u32, result: i32, more: bool, notification: bool) -> Completion {
        let Some(send) = self.sends.get_mut(slot as usize).and_then(|slot| slot.send.as_mut()) else {
            return Completion::Other;
        };
        let key = send.key;
        if notification {
            // The result of a notification is a set of flags, not a number.
            send.copied |= result.cast_unsigned() & NOTIF_USAGE_ZC_COPIED != 0;
            send.notifications = send.notifications.saturating_sub(1);
            let copied = send.copied;
            return Completion::Released { key, copied, gather: self.release_send(slot) };
        }
        if more {
            send.notifications += 1;
        }
        let result = match check(result) {
            Ok(sent) => {
                send.sent += sent as usize;
                if send.sent < send.gather.len() && sent > 0 {
                    self.submit_send(slot);
                    return Completion::Progress;
                }
                if send.sent < send.gather.len() { Err(io::ErrorKind::WriteZero.into()) } else { Ok(()) }
            }
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) && send.zero_copy => {
                (send.zero_copy, send.fixed) = (false, None);
                self.submit_send(slot);
                return Completion::ZeroCopyRefused { key };
            }
            Err(error) => Err(error),
        };
        send.active = false;
        Completion::Sent { key, result, gather: self.release_send(slot) }
    }

    /// The gather of a send that the kernel has done with.
    fn release_send(&mut self, slot: u32) -> Option<Gather> {
        let held = &mut self.sends.get_mut(slot as usize)?.send;
        let send = held.take_if(|send| !send.active && send.notifications == 0)?;
        self.free.push(slot);
        Some(send.gather)
    }

    fn submit_send(&mut self, slot: u32) {
        let Some(SendSlot { send: Some(send), pieces, control, message }) = self.sends.get_mut(slot as usize) else {
            return;
        };
        // With the last piece in a registered buffer, what is before it goes by an ordinary send of its own.
        let own = send.fixed.map_or(send.gather.len(), |fixed| send.gather.len() - fixed.length);
        if let Some(fixed) = send.fixed.filter(|_| send.sent >= own) {
            let done = send.sent - own;
            let address = std::ptr::without_provenance(fixed.address + done);
            let length = (fixed.length - done) as u32;
            let entry = with_socket!(send.socket, |fd| opcode::SendZc::new(fd, address, length)
                .buf_index(Some(fixed.buffer))
                .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL)
                .zc_flags(SEND_ZC_REPORT_USAGE)
                .build());
            return self.push(entry, Op::Send, slot, 0);
        }
        pieces.clear();
        let mut left = own - send.sent;
        for (address, length) in send.gather.pieces(send.sent) {
            let length = length.min(left);
            left -= length;
            if length > 0 {
                pieces.push(libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: length });
            }
        }
        message.msg_iov = pieces.as_mut_ptr();
        message.msg_iovlen = pieces.len() as _;
        // Descriptors go with the first byte, so only once.
        *control = if send.sent == 0 { rights(send.gather.descriptors()) } else { Vec::new() };
        message.msg_control = if control.is_empty() { std::ptr::null_mut() } else { control.as_mut_ptr().cast() };
        message.msg_controllen = size_of_val(control.as_slice()) as _;
        let message = std::ptr::from_ref(&**message);
        let more = if send.fixed.is_some() { libc::MSG_MORE } else { 0 };
        let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL | more) as u32;
        let entry = match send.zero_copy && send.fixed.is_none() {
            true => with_socket!(send.socket, |fd| opcode::SendMsgZc::new(fd, message)
                .flags(flags)
                .ioprio(SEND_ZC_REPORT_USAGE)
                .build()),
            false => with_socket!(send.socket, |fd| opcode::SendMsg::new(fd, message).flags(flags).build()),
        };
        self.push(entry, Op::Send, slot, 0);
    }

    fn push(&mut self, entry: squeue::Entry, op: Op, slot: u32, generation: u32) {
        let entry = entry.user_data(user_data(op, slot, generation));
        self.outstanding += 1;
        self.backlog.push_back(entry);
        self.flush_backlog();
    }

    fn flush_backlog(&mut self) {
        while let Some(entry) = self.backlog.front() {
            // SAFETY: what the entry refers to stays as it is until its last completion: gathers and their headers in
            // `sends`, receive buffers in `buffers`, descriptors by the caller's promise.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                self.backlog.pop_front();
            } else if self.ring.submit().is_err() {
                // The completion queue must be worked off first; `wait` tries again.
                break;
            }
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if self.outstanding > 0 && self.features.multishot_accept {
            self.push(opcode::AsyncCancel2::new(CancelBuilder::any()).build(), Op::Cancel, 0, 0);
        }
        let start = Instant::now();
        while self.outstanding > 0 && self.features.multishot_accept && start.elapsed() < LAST_WAIT {
            if self.wait(Some(Duration::from_millis(100))).is_err() {
                break;
            }
            while self.next().is_some() {}
        }
        if self.outstanding > 0 {
            // The kernel may still work on these after the ring is closed.
            std::mem::forget(std::mem::take(&mut self.sends));
            std::mem::forget(std::mem::replace(&mut self.buffers, Buffers::Own(Vec::new())));
        }
    }
}

impl Socket {
    fn raw(&self) -> RawSocket {
        match self {
            Socket::Direct(slot) => RawSocket::Direct(*slot),
            Socket::Plain(fd) => RawSocket::Plain(fd.as_raw_fd()),
        }
    }
}

fn user_data(op: Op, slot: u32, generation: u32) -> u64 {
    debug_assert!(slot < 1 << 24, "slots fit 24 bits");
    (op as u64) << 56 | u64::from(slot) << 32 | u64::from(generation)
}

fn split(user_data: u64) -> (Option<Op>, u32, u32) {
    let ops = [Op::Wake, Op::Accept, Op::Receive, Op::Send, Op::Install, Op::ShutDown, Op::Close, Op::Cancel];
    let op = ops.into_iter().find(|op| *op as u64 == user_data >> 56);
    (op, (user_data >> 32) as u32 & 0xff_ffff, user_data as u32)
}

fn check(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

fn empty_message() -> libc::msghdr {
    // SAFETY: all of its fields are integers and pointers, for which zero is a value.
    unsafe { std::mem::zeroed() }
}

/// The control message that hands descriptors over, in words for the sake of its alignment; empty for none.
fn rights(descriptors: &[RawFd]) -> Vec<u64> {
    if descriptors.is_empty() {
        return Vec::new();
    }
    let bytes = size_of_val(descriptors) as u32;
    // SAFETY: computes from its argument alone.
    let space = unsafe { libc::CMSG_SPACE(bytes) } as usize;
    let mut words = vec![0u64; space.div_ceil(size_of::<u64>())];
    let header = words.as_mut_ptr().cast::<libc::cmsghdr>();
    // SAFETY: `words` has room for the header and the descriptors behind it, by the size that CMSG_SPACE gave, and is
    // aligned to eight bytes, which is what a header needs.
    unsafe {
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(bytes) as _;
        std::ptr::copy_nonoverlapping(descriptors.as_ptr(), libc::CMSG_DATA(header).cast::<RawFd>(), descriptors.len());
    }
    words
}
