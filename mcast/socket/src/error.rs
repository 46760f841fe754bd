use std::io;
use std::net::IpAddr;

use thiserror::Error;

use crate::group::Group;

/// Why a socket of a group cannot be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SocketError {
    /// No interface has that name.
    #[error("{group}: no interface `{name}` on this host (there are {})", there.join(", "))]
    NoInterface {
        /// The group asked for.
        group: Group,
        /// The interface asked for.
        name: String,
        /// The interfaces that have an address.
        there: Vec<String>,
    },
    /// The group cannot be reached from here.
    #[error("{group}: no route to the group{}: {source}{}", on(interface), hint_route(group, interface))]
    NoRoute {
        /// The group.
        group: Group,
        /// The interface, where one was chosen.
        interface: Option<String>,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The interface's MTU leaves no room for a datagram.
    #[error("{group}: a path MTU of {mtu} bytes leaves no room for datagrams")]
    TinyMtu {
        /// The group.
        group: Group,
        /// The MTU in bytes.
        mtu: u32,
    },
    /// The address or port is not to be had.
    #[error("{group}: cannot bind: {source}{}", hint_bind(source))]
    Bind {
        /// The group.
        group: Group,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The group cannot be joined.
    #[error("{group}: cannot join{}: {source}{}", on(interface), hint_join(source))]
    Join {
        /// The group.
        group: Group,
        /// The interface, where one was chosen.
        interface: Option<String>,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The server to give feedback to is of the other family of addresses.
    #[error("{group}: the server's address {server} is not of the group's family")]
    Family {
        /// The group.
        group: Group,
        /// The server's address.
        server: IpAddr,
    },
    /// Any other call failed.
    #[error("{group}: cannot {what}: {source}")]
    System {
        /// The group.
        group: Group,
        /// What was tried, in words.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Why datagrams were not sent.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SendError {
    /// The kernel could not read the bytes: the file behind them was truncated, or a disk failed.
    #[error("the bytes to send cannot be read (the file was truncated?): {0}")]
    Unreadable(#[source] io::Error),
    /// The datagrams do not fit the path, whose MTU has shrunk since the socket was opened.
    #[error("datagrams of {size} bytes do not fit the path any more: {source}")]
    TooLarge {
        /// The size of the datagrams in bytes.
        size: u16,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The network does not take them at present: no route, the interface is down, a firewall says no, out of memory.
    #[error("the network does not take datagrams: {0}")]
    Network(#[source] io::Error),
}

impl SendError {
    pub(crate) fn new(size: u16, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EFAULT) => Self::Unreadable(source),
            Some(libc::EMSGSIZE | libc::EINVAL) => Self::TooLarge { size, source },
            _ => Self::Network(source),
        }
    }
}

fn on(interface: &Option<String>) -> String {
    interface.as_ref().map_or_else(String::new, |name| format!(" on {name}"))
}

fn hint_route(group: &Group, interface: &Option<String>) -> String {
    match interface {
        None => format!(" (name an interface, as {}%eth0)", group.socket_address()),
        // Other interfaces have a route to all groups from the kernel.
        Some(name) if name == "lo" && group.address.is_ipv6() => {
            format!(" (loopback has none by itself: `ip -6 route add local {} dev lo table local`)", group.address)
        }
        Some(_) => " (is it up?)".into(),
    }
}

fn hint_bind(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EADDRINUSE) => " (a program that does not share it has the port)",
        Some(libc::EACCES) => " (ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE)",
        _ => "",
    }
}

fn hint_join(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOBUFS) => " (see the sysctls net.ipv4.igmp_max_memberships and igmp_max_msf, net.core.optmem_max)",
        Some(libc::ENODEV) => " (no route to the group; name an interface)",
        _ => "",
    }
}
