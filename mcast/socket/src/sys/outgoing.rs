//! Messages as sendmsg(2) wants them.

use std::net::SocketAddr;

use crate::address::Name;
use crate::burst::Burst;
use crate::control;

/// A burst to one address as message headers, with the memory that they point into.
///
/// The headers are good until the next `set`, and as long as the burst is unchanged. They must be heap memory of a fixed
/// address, so it is made in a box.
pub(crate) struct Outgoing {
    name: Name,
    control: [u8; control::SEGMENT],
    pieces: Vec<libc::iovec>,
    messages: Vec<libc::mmsghdr>,
}

// SAFETY: the pointers in the headers lead into this value's own heap memory and into that of the burst, neither of which
// belongs to a thread. Nothing dereferences them but the kernel.
unsafe impl Send for Outgoing {}

impl Outgoing {
    pub(crate) fn new() -> Box<Self> {
        let (name, control) = (Name::new(SocketAddr::from(([0; 4], 0))), [0; control::SEGMENT]);
        Box::new(Self { name, control, pieces: Vec::new(), messages: Vec::new() })
    }

    /// Describes `burst` to an address: one message that the kernel cuts, with `offload`; else a message for each datagram.
    pub(crate) fn set<K>(&mut self, to: SocketAddr, burst: &Burst<K>, offload: bool) {
        let Self { name, control, pieces, messages } = self;
        *name = Name::new(to);
        let whole = offload || burst.datagrams() == 1;
        let segment = if whole { burst.len() } else { usize::from(burst.segment()) };
        pieces.clear();
        messages.clear();
        let mut counts = Vec::with_capacity(if whole { 1 } else { burst.datagrams() });
        let (mut count, mut filled) = (0, 0);
        burst.for_each_piece(!whole, |address, length| {
            pieces.push(libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: length });
            (count, filled) = (count + 1, filled + length);
            if filled == segment {
                counts.push(count);
                (count, filled) = (0, 0);
            }
        });
        if count > 0 {
            counts.push(count);
        }
        let mut first = 0;
        for count in counts {
            let mut message = empty();
            message.msg_name = name.bytes().as_ptr().cast_mut().cast();
            message.msg_namelen = name.bytes().len() as _;
            message.msg_iov = pieces.as_mut_ptr().wrapping_add(first);
            message.msg_iovlen = count as _;
            if whole && burst.datagrams() > 1 {
                *control = control::segment(burst.segment());
                message.msg_control = control.as_mut_ptr().cast();
                message.msg_controllen = control.len() as _;
            }
            messages.push(libc::mmsghdr { msg_hdr: message, msg_len: 0 });
            first += count;
        }
    }

    /// The messages that make up the burst.
    pub(super) fn messages(&mut self) -> &mut [libc::mmsghdr] {
        &mut self.messages
    }

    /// How many messages make up the burst.
    pub(crate) fn len(&self) -> usize {
        self.messages.len()
    }
}

/// A header that refers to nothing.
pub(super) fn empty() -> libc::msghdr {
    // SAFETY: all of its fields are integers and pointers, for which zero is a value.
    unsafe { std::mem::zeroed() }
}
