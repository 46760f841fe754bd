//! Which interface a group is reached by.

use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use rustix::net::netdevice;

use crate::error::SocketError;
use crate::group::Group;
use crate::sys;

/// An interface, by its name and its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub(crate) name: String,
    pub(crate) index: u32,
}

/// The interface of that name. Any socket will do for the question.
pub(crate) fn named(socket: BorrowedFd<'_>, group: &Group, name: &str) -> Result<Chosen, SocketError> {
    match netdevice::name_to_index(socket, name) {
        Ok(index) => Ok(Chosen { name: name.into(), index }),
        Err(_) => {
            let mut there: Vec<_> = sys::interfaces().unwrap_or_default().into_iter().map(|i| i.name).collect();
            there.sort_unstable();
            there.dedup();
            Err(SocketError::NoInterface { group: group.clone(), name: name.into(), there })
        }
    }
}

/// The interface that has this address; `None` when the address is not of this host.
pub(crate) fn with_address(socket: BorrowedFd<'_>, address: IpAddr) -> Option<Chosen> {
    let address = address.to_canonical();
    let interface = sys::interfaces().ok()?.into_iter().find(|interface| interface.address == address)?;
    let index = netdevice::name_to_index(socket, &interface.name).ok()?;
    Some(Chosen { name: interface.name, index })
}

/// `preferred` where the interface has it, else its first address of that family, else `preferred` all the same.
pub(crate) fn own_address(chosen: &Chosen, preferred: IpAddr) -> IpAddr {
    let all = sys::interfaces().unwrap_or_default().into_iter();
    let own: Vec<_> =
        all.filter(|interface| interface.name == chosen.name).map(|interface| interface.address).collect();
    let first = own.iter().copied().find(|address| address.is_ipv4() == preferred.is_ipv4());
    if own.contains(&preferred) { preferred } else { first.unwrap_or(preferred) }
}
