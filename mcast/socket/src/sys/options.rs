//! Options of sockets that the other libraries do not know.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::address::Name;

/// `struct sockaddr_storage` in a [`GroupRequest`] or [`SourceRequest`].
type Storage = [u8; 128];

/// `struct group_req`: a group on an interface.
#[repr(C, align(8))]
struct GroupRequest {
    interface: u32,
    group: Aligned,
}

/// `struct group_source_req`: a group on an interface, from one source.
#[repr(C, align(8))]
struct SourceRequest {
    interface: u32,
    group: Aligned,
    source: Aligned,
}

#[repr(C, align(8))]
struct Aligned(Storage);

const _: () = assert!(size_of::<GroupRequest>() == size_of::<libc::group_req>());
const _: () = assert!(size_of::<SourceRequest>() == size_of::<libc::group_source_req>());
const _: () = assert!(std::mem::offset_of!(SourceRequest, source) == 136);

/// Joins a group on an interface (0: the routing table's choice), and hears only `source` where one is given.
pub(crate) fn join(fd: BorrowedFd<'_>, group: IpAddr, interface: u32, source: Option<IpAddr>) -> io::Result<()> {
    match source {
        Some(source) => source_request(fd, group, interface, source, libc::MCAST_JOIN_SOURCE_GROUP),
        None => {
            let request = GroupRequest { interface, group: storage(group) };
            set(fd, level(group), libc::MCAST_JOIN_GROUP, &request)
        }
    }
}

/// Leaves a group that was joined with a source.
pub(crate) fn leave(fd: BorrowedFd<'_>, group: IpAddr, interface: u32, source: IpAddr) -> io::Result<()> {
    source_request(fd, group, interface, source, libc::MCAST_LEAVE_SOURCE_GROUP)
}

/// Sets an option that is an integer.
pub(crate) fn set_int(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    set(fd, level, name, &value)
}

/// Reads an option that is an integer.
pub(crate) fn get_int(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let mut value = 0i32;
    let mut length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: `value` is a valid place for `length` bytes, of which the kernel writes at most that many.
    let result = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

fn source_request(fd: BorrowedFd<'_>, group: IpAddr, interface: u32, source: IpAddr, name: i32) -> io::Result<()> {
    let request = SourceRequest { interface, group: storage(group), source: storage(source) };
    set(fd, level(group), name, &request)
}

fn set<T>(fd: BorrowedFd<'_>, level: i32, name: i32, value: &T) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is valid for reads of its size, and the kernel keeps no reference to it. The types given are integers
    // and arrays of them; padding reaches the kernel alone, which ignores it.
    let result = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn storage(address: IpAddr) -> Aligned {
    let mut storage = [0; 128];
    let name = Name::new(SocketAddr::new(address, 0));
    storage[..name.bytes().len()].copy_from_slice(name.bytes());
    Aligned(storage)
}

fn level(group: IpAddr) -> i32 {
    if group.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 }
}
