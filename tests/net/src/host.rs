//! A host of a network.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::process::Command;

use crate::namespace::Namespace;
use crate::{Loss, NetworkError, Process};

/// The one interface of each host but `lo`.
pub(crate) const INTERFACE: &str = "eth0";

/// A host: a network namespace with one interface on the bridge.
#[derive(Debug)]
pub struct Host {
    pub(crate) namespace: Namespace,
    pub(crate) number: u8,
    pub(crate) loss: Option<OwnedFd>,
}

/// What went through an interface since it was made, Ethernet headers included. A coalesced frame counts as one, with one header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes that arrived.
    pub received_bytes: u64,
    /// Frames that arrived.
    pub received_frames: u64,
    /// Bytes that were sent.
    pub sent_bytes: u64,
    /// Frames that were sent.
    pub sent_frames: u64,
}

impl Host {
    /// The name of its interface.
    pub const INTERFACE: &str = INTERFACE;

    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, self.number)
    }

    /// Its other address.
    pub fn address_v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, self.number.into())
    }

    /// Starts a process in this host.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, command: Command) -> Result<Process, NetworkError> {
        self.namespace.spawn(command)
    }

    /// Moves the calling thread into this host: sockets that it opens and processes that it starts from now on are the host's.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn enter(&self) -> Result<(), NetworkError> {
        self.namespace.enter()
    }

    /// Does something short in this host, on a thread of the host's own.
    ///
    /// # Panics
    /// When the job does.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        self.namespace.run(job)
    }

    /// What went through its interface.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn counters(&self) -> Result<Counters, NetworkError> {
        let table = self.run(|| fs::read_to_string("/proc/thread-self/net/dev"));
        let table = table.map_err(|error| NetworkError::Kernel("read the interfaces' counters", error))?;
        parse_counters(&table).ok_or(NetworkError::NoInterface(INTERFACE))
    }

    /// Has this host lose what is sent to it, from now on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn lose(&mut self, loss: Loss) -> Result<(), NetworkError> {
        loss.impose(&self.namespace, &mut self.loss)
    }

    /// Drops everything that is sent to `group` before this host receives it, as a network does that carries no multicast.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn block(&self, group: IpAddr) -> Result<(), NetworkError> {
        let family = if group.is_ipv4() { "ip" } else { "ip6" };
        let chain = "type filter hook prerouting priority -300";
        let table = format!("table inet block {{ chain block {{ {chain}; {family} daddr {group} drop; }}; }}\n");
        self.namespace.order(&["nft", "-f", "-"], &table)
    }

    /// Undoes [`Host::block`].
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unblock(&self) -> Result<(), NetworkError> {
        self.namespace.order(&["nft", "-f", "-"], "table inet block\ndelete table inet block\n")
    }

    /// Switches an offload of the interface by `ethtool -K`, such as `tx-udp-segmentation`.
    ///
    /// # Errors
    /// When there is no `ethtool`, or the kernel refuses.
    pub fn set_offload(&self, feature: &str, on: bool) -> Result<(), NetworkError> {
        self.namespace.order(&["ethtool", "-K", INTERFACE, feature, if on { "on" } else { "off" }], "")
    }
}

/// The numbers of the interface in the text of /proc/net/dev.
fn parse_counters(table: &str) -> Option<Counters> {
    let line = table.lines().find_map(|line| line.trim_start().strip_prefix(INTERFACE)?.strip_prefix(':'))?;
    let mut numbers = line.split_whitespace().map(|word| word.parse::<u64>().ok());
    // Received: bytes, packets and six more; then the same for what was sent.
    let mut number = |skip| numbers.nth(skip).flatten();
    Some(Counters {
        received_bytes: number(0)?,
        received_frames: number(0)?,
        sent_bytes: number(6)?,
        sent_frames: number(0)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_from_the_kernels_table() {
        let table = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
            lo:       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0\n  \
            eth0:     1000       2    3    4    5     6          7         8     9000      10   11   12   13    14      15         16\n";
        let counters = Counters { received_bytes: 1000, received_frames: 2, sent_bytes: 9000, sent_frames: 10 };
        assert_eq!(parse_counters(table), Some(counters));
        assert_eq!(parse_counters("eth0: 1 2"), None);
        assert_eq!(parse_counters(""), None);
    }
}
