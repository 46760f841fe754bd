//! Batches of messages by plain system calls.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::outgoing::{Outgoing, empty};
use crate::address::NAME;
use crate::control;

/// Sends the messages from number `first` on; tells how many the socket took.
pub(crate) fn send(fd: BorrowedFd<'_>, outgoing: &mut Outgoing, first: usize) -> io::Result<usize> {
    let messages = outgoing.messages().get_mut(first..).unwrap_or_default();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the headers are valid, see `Outgoing`. The kernel reads what they lead to, and answers EFAULT where nothing is
    // mapped; it writes only the length in each header.
    let sent = unsafe { libc::sendmmsg(fd.as_raw_fd(), messages.as_mut_ptr(), messages.len() as _, flags as _) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// A message that was received.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Message<'a> {
    pub(crate) payload: &'a [u8],
    pub(crate) control: &'a [u8],
    pub(crate) name: &'a [u8],
    /// The message was longer than its buffer.
    pub(crate) truncated: bool,
}

/// Buffers for several messages at a time.
pub(crate) struct Batch {
    /// The size of one buffer.
    size: usize,
    payload: Vec<u8>,
    control: Vec<[u8; control::ROOM]>,
    names: Vec<[u8; NAME]>,
    pieces: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
    filled: usize,
}

// SAFETY: the pointers in `headers` and `pieces` lead into this value's own heap memory. They are made anew for each call, and
// nothing dereferences them but the kernel during the call.
unsafe impl Send for Batch {}

impl Batch {
    /// Room for `messages` messages of at most `size` bytes.
    pub(crate) fn new(messages: usize, size: usize) -> Self {
        Self {
            size,
            payload: vec![0; messages * size],
            control: vec![[0; control::ROOM]; messages],
            names: vec![[0; NAME]; messages],
            pieces: Vec::with_capacity(messages),
            headers: Vec::with_capacity(messages),
            filled: 0,
        }
    }

    /// Receives what is there, in place of what was received before; tells how many messages that is.
    pub(crate) fn receive(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let Self { size, payload, control, names, pieces, headers, filled } = self;
        *filled = 0;
        pieces.clear();
        headers.clear();
        pieces.extend(
            payload
                .chunks_exact_mut(*size)
                .map(|buffer| libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }),
        );
        for (index, (control, name)) in control.iter_mut().zip(names).enumerate() {
            let mut header = empty();
            header.msg_name = name.as_mut_ptr().cast();
            header.msg_namelen = name.len() as _;
            header.msg_iov = pieces.as_mut_ptr().wrapping_add(index);
            header.msg_iovlen = 1;
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = control.len() as _;
            headers.push(libc::mmsghdr { msg_hdr: header, msg_len: 0 });
        }
        // SAFETY: each header leads to buffers of this value of the lengths that it says, which nothing else touches during
        // the call.
        let received = unsafe {
            let (first, count) = (headers.as_mut_ptr(), headers.len() as _);
            libc::recvmmsg(fd.as_raw_fd(), first, count, libc::MSG_DONTWAIT as _, std::ptr::null_mut())
        };
        *filled = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        Ok(*filled)
    }

    /// The message of that number among those received last.
    pub(crate) fn message(&self, index: usize) -> Option<Message<'_>> {
        let header = self.headers.get(..self.filled)?.get(index)?;
        let control = header.msg_hdr.msg_controllen.min(control::ROOM);
        let name = (header.msg_hdr.msg_namelen as usize).min(NAME);
        let start = index * self.size;
        Some(Message {
            payload: &self.payload[start..start + (header.msg_len as usize).min(self.size)],
            control: &self.control[index][..control],
            name: &self.names[index][..name],
            truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
        })
    }
}
