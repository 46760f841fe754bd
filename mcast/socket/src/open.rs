//! Opens the sockets of a group and sets their options.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::address::scoped;
use crate::error::SocketError;
use crate::group::Group;
use crate::interface::{self, Chosen};
use crate::sys;

/// Bytes of headers before the payload of a datagram.
const HEADERS_IPV4: u32 = 20 + 8;
const HEADERS_IPV6: u32 = 40 + 8;

/// The largest datagram that is used, whatever the MTU (loopback's is 64 KiB): the size of a burst.
const MAX_PAYLOAD: u32 = crate::MAX_BURST as u32;

/// The smallest that makes sense: half a kilobyte, beside the MTU of 576 bytes that every IPv4 path has.
const MIN_PAYLOAD: u32 = 512;

/// A socket to send to a group with.
pub(crate) struct SenderSocket {
    pub(crate) fd: OwnedFd,
    pub(crate) group: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) interface: Option<String>,
    pub(crate) max_datagram: u16,
}

/// What the options of a sending socket are to be.
pub(crate) struct SenderOptions {
    pub(crate) ttl: u8,
    pub(crate) loopback: bool,
    pub(crate) buffer: usize,
}

/// Opens a socket to send to `group`, bound to an address of its interface.
pub(crate) fn sender(group: &Group, options: &SenderOptions) -> Result<SenderSocket, SocketError> {
    let fd = socket(group)?;
    let mut chosen = group.interface.as_ref().map(|name| interface::named(fd.as_fd(), group, name)).transpose()?;
    set_sender_options(fd.as_fd(), group, chosen.as_ref(), options)?;
    let (route_source, mtu) = route(group, chosen.as_ref())?;
    let source = match &chosen {
        // The kernel prefers an address that is good for more than this host, which on loopback is another interface's.
        Some(chosen) => interface::own_address(chosen, route_source.ip()),
        None => {
            chosen = interface::with_address(fd.as_fd(), route_source.ip());
            route_source.ip()
        }
    };
    let index = chosen.as_ref().map_or(0, |chosen| chosen.index);
    let bind = || -> io::Result<SocketAddr> {
        rustix::net::bind(&fd, &scoped(SocketAddr::new(source, 0), index))?;
        Ok(SocketAddr::try_from(rustix::net::getsockname(&fd)?)?)
    };
    let local = bind().map_err(|source| SocketError::Bind { group: group.clone(), source })?;
    let headers = if group.address.is_ipv4() { HEADERS_IPV4 } else { HEADERS_IPV6 };
    let max_datagram = mtu.saturating_sub(headers).min(MAX_PAYLOAD);
    if max_datagram < MIN_PAYLOAD {
        return Err(SocketError::TinyMtu { group: group.clone(), mtu });
    }
    Ok(SenderSocket {
        fd,
        group: scoped(group.socket_address(), index),
        local,
        interface: chosen.map(|chosen| chosen.name),
        max_datagram: max_datagram as u16,
    })
}

/// A socket that has joined a group.
pub(crate) struct ReceiverSocket {
    pub(crate) fd: OwnedFd,
    pub(crate) server: SocketAddr,
    pub(crate) interface: Option<Chosen>,
    /// The only source that it was joined for.
    pub(crate) source: Option<IpAddr>,
    pub(crate) buffer: usize,
}

/// What a receiving socket is to be.
pub(crate) struct ReceiverOptions {
    pub(crate) server: SocketAddr,
    pub(crate) local: Option<IpAddr>,
    pub(crate) source_specific: bool,
    pub(crate) buffer: usize,
}

/// Opens a socket, binds it to `group` and joins.
pub(crate) fn receiver(group: &Group, options: &ReceiverOptions) -> Result<ReceiverSocket, SocketError> {
    let fd = socket(group)?;
    // An IPv4 address in IPv6's clothes is an IPv4 address; others keep their scope.
    let server = match options.server.ip().to_canonical() {
        IpAddr::V4(address) => SocketAddr::new(address.into(), options.server.port()),
        IpAddr::V6(_) => options.server,
    };
    if server.is_ipv4() != group.address.is_ipv4() {
        return Err(SocketError::Family { group: group.clone(), server: server.ip() });
    }
    let interface = receiver_interface(fd.as_fd(), group, server.ip(), options.local)?;
    let buffer = receive_buffer(fd.as_fd(), options.buffer).map_err(system(group, "size the receive buffer"))?;
    sys::set_int(fd.as_fd(), libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1).map_err(system(group, "have drops counted"))?;
    let index = interface.as_ref().map_or(0, |chosen| chosen.index);
    let bind = || -> io::Result<()> {
        sockopt::set_socket_reuseaddr(&fd, true)?;
        // Bound to the group's address, so that other groups on the port stay out.
        Ok(rustix::net::bind(&fd, &scoped(group.socket_address(), index))?)
    };
    bind().map_err(|source| SocketError::Bind { group: group.clone(), source })?;
    only_what_is_joined(fd.as_fd(), group);
    let source = Some(server.ip()).filter(|source| options.source_specific && !source.is_unspecified());
    let joined = sys::join(fd.as_fd(), group.address, index, source);
    joined.map_err(|source| {
        let interface = interface.as_ref().map(|chosen| chosen.name.clone());
        SocketError::Join { group: group.clone(), interface, source }
    })?;
    Ok(ReceiverSocket { fd, server: scoped(server, index), interface, source, buffer })
}

/// Gives a socket a receive buffer of `wanted` bytes of datagrams, or as much as it may have; tells how much it is.
pub(crate) fn receive_buffer(fd: BorrowedFd<'_>, wanted: usize) -> io::Result<usize> {
    // The kernel doubles what it is asked for, to have room for its own bookkeeping, and tells the double.
    if sockopt::set_socket_recv_buffer_size_force(fd, wanted).is_err() {
        sockopt::set_socket_recv_buffer_size(fd, wanted)?;
    }
    Ok(sockopt::socket_recv_buffer_size(fd)? / 2)
}

/// Turns an error of a call into one that says what was tried.
pub(crate) fn system(group: &Group, what: &'static str) -> impl Fn(io::Error) -> SocketError {
    move |source| SocketError::System { group: group.clone(), what, source }
}

fn socket(group: &Group) -> Result<OwnedFd, SocketError> {
    let family = if group.address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, None);
    socket.map_err(|error| system(group, "open a UDP socket")(error.into()))
}

fn set_sender_options(
    fd: BorrowedFd<'_>,
    group: &Group,
    chosen: Option<&Chosen>,
    options: &SenderOptions,
) -> Result<(), SocketError> {
    leave_by(fd, group, chosen).map_err(system(group, "choose the interface"))?;
    let set = || -> rustix::io::Result<()> {
        // Never fragmented, and whatever a router says about the MTU is not believed: the sizes are those of the interface.
        if group.address.is_ipv4() {
            sockopt::set_ip_multicast_ttl(fd, options.ttl.into())?;
            sockopt::set_ip_multicast_loop(fd, options.loopback)?;
            sockopt::set_ip_mtu_discover(fd, Ipv4PathMtuDiscovery::PROBE)
        } else {
            sockopt::set_ipv6_multicast_hops(fd, options.ttl.into())?;
            sockopt::set_ipv6_multicast_loop(fd, options.loopback)?;
            sockopt::set_ipv6_mtu_discover(fd, Ipv6PathMtuDiscovery::PROBE)
        }
    };
    set().map_err(|error| system(group, "set the options of the socket")(error.into()))?;
    // Beyond net.core.wmem_max only with CAP_NET_ADMIN; where that is lower, it serves.
    if sockopt::set_socket_send_buffer_size_force(fd, options.buffer).is_err() {
        let _smaller = sockopt::set_socket_send_buffer_size(fd, options.buffer);
    }
    Ok(())
}

/// Has datagrams to groups leave by an interface.
fn leave_by(fd: BorrowedFd<'_>, group: &Group, chosen: Option<&Chosen>) -> io::Result<()> {
    let Some(Chosen { index, .. }) = chosen else { return Ok(()) };
    if group.address.is_ipv4() {
        let any = Ipv4Addr::UNSPECIFIED;
        sockopt::set_ip_multicast_if_with_ifindex(fd, &any, &any, *index)?;
    } else {
        sockopt::set_ipv6_multicast_if(fd, *index)?;
    }
    Ok(())
}

/// The address that datagrams to the group come from, and the MTU of the path. A socket of its own is connected for that,
/// which sends nothing; an unconnected one does not know.
fn route(group: &Group, chosen: Option<&Chosen>) -> Result<(SocketAddr, u32), SocketError> {
    let probe = socket(group)?;
    let ask = || -> io::Result<(SocketAddr, u32)> {
        leave_by(probe.as_fd(), group, chosen)?;
        rustix::net::connect(&probe, &scoped(group.socket_address(), chosen.map_or(0, |chosen| chosen.index)))?;
        let mtu = match group.address {
            IpAddr::V4(_) => sockopt::ip_mtu(&probe)?,
            IpAddr::V6(_) => sockopt::ipv6_mtu(&probe)?,
        };
        Ok((SocketAddr::try_from(rustix::net::getsockname(&probe)?)?, mtu))
    };
    let no_route = |source| {
        let interface = chosen.map(|chosen| chosen.name.clone());
        SocketError::NoRoute { group: group.clone(), interface, source }
    };
    let (source, mtu) = ask().map_err(no_route)?;
    let unspecified = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    if unspecified.contains(&source.ip()) {
        return Err(no_route(io::Error::new(io::ErrorKind::AddrNotAvailable, "the interface has no address")));
    }
    Ok((source, mtu))
}

/// Where a receiver joins: on the interface that the user named; else, where the server is on this host, on the interface
/// that has the server's address, for its datagrams are looped back there, whichever way the clone's session goes; else
/// where the session arrives; else the routing table's choice.
fn receiver_interface(
    fd: BorrowedFd<'_>,
    group: &Group,
    server: IpAddr,
    local: Option<IpAddr>,
) -> Result<Option<Chosen>, SocketError> {
    if let Some(name) = &group.interface {
        return interface::named(fd, group, name).map(Some);
    }
    let session = || local.filter(|local| !local.is_loopback()).and_then(|local| interface::with_address(fd, local));
    Ok(interface::with_address(fd, server).or_else(session))
}

/// Keeps out what other sockets of the host have joined: the same group on other interfaces, or from other sources.
fn only_what_is_joined(fd: BorrowedFd<'_>, group: &Group) {
    /// `IPV6_MULTICAST_ALL` and `IP_MULTICAST_ALL` (linux/in.h).
    const MULTICAST_ALL_IPV6: i32 = 29;
    const MULTICAST_ALL_IPV4: i32 = 49;
    let result = match group.address {
        IpAddr::V4(_) => sys::set_int(fd, libc::IPPROTO_IP, MULTICAST_ALL_IPV4, 0),
        IpAddr::V6(_) => sys::set_int(fd, libc::IPPROTO_IPV6, MULTICAST_ALL_IPV6, 0),
    };
    if let Err(error) = result {
        // Linux before 4.20, for IPv6. What arrives too much is dropped by the protocol.
        tracing::debug!(%error, "datagrams that others joined may arrive");
    }
}
