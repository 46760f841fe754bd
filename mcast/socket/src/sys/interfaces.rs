//! The addresses of this host.

use std::ffi::CStr;
use std::io;
use std::net::IpAddr;

use crate::address::decode;

/// An address of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) name: String,
    pub(crate) address: IpAddr,
}

/// Every address of every interface, those of the two families of IP.
pub(crate) fn interfaces() -> io::Result<Vec<Interface>> {
    let mut list = std::ptr::null_mut();
    // SAFETY: `list` is a valid place for the answer.
    if unsafe { libc::getifaddrs(&raw mut list) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut all = Vec::new();
    let mut entry = list;
    // SAFETY: getifaddrs gave a list whose entries are valid until it is freed, with a null pointer at its end.
    while let Some(interface) = unsafe { entry.as_ref() } {
        entry = interface.ifa_next;
        if interface.ifa_addr.is_null() {
            continue;
        }
        // SAFETY: the address is valid for as long as the list; its family, which any address has, says how long it is.
        let length = match i32::from(unsafe { (*interface.ifa_addr).sa_family }) {
            libc::AF_INET => size_of::<libc::sockaddr_in>(),
            libc::AF_INET6 => size_of::<libc::sockaddr_in6>(),
            _ => continue,
        };
        // SAFETY: an address of that family has that many bytes.
        let bytes = unsafe { std::slice::from_raw_parts(interface.ifa_addr.cast::<u8>(), length) };
        // SAFETY: the name is a string with a zero at its end, valid for as long as the list.
        let name = unsafe { CStr::from_ptr(interface.ifa_name) }.to_string_lossy().into_owned();
        all.extend(decode(bytes).map(|address| Interface { name, address: address.ip() }));
    }
    // SAFETY: the list is freed once, and nothing borrows from it any more.
    unsafe { libc::freeifaddrs(list) };
    Ok(all)
}
