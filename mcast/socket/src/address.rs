//! Socket addresses as the kernel writes them: `struct sockaddr_in` and `sockaddr_in6`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

const IPV4: usize = 16;
const IPV6: usize = 28;
const _: () = assert!(size_of::<libc::sockaddr_in>() == IPV4 && size_of::<libc::sockaddr_in6>() == IPV6);

/// Bytes that hold either kind of address.
pub(crate) const NAME: usize = IPV6;

/// An address in the kernel's form.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Name {
    bytes: [u8; NAME],
    length: usize,
}

impl Name {
    pub(crate) fn new(address: SocketAddr) -> Self {
        let mut bytes = [0; NAME];
        bytes[2..4].copy_from_slice(&address.port().to_be_bytes());
        let (family, length) = match address {
            SocketAddr::V4(address) => {
                bytes[4..8].copy_from_slice(&address.ip().octets());
                (libc::AF_INET, IPV4)
            }
            SocketAddr::V6(address) => {
                bytes[4..8].copy_from_slice(&address.flowinfo().to_ne_bytes());
                bytes[8..24].copy_from_slice(&address.ip().octets());
                bytes[24..28].copy_from_slice(&address.scope_id().to_ne_bytes());
                (libc::AF_INET6, IPV6)
            }
        };
        bytes[..2].copy_from_slice(&(family as u16).to_ne_bytes());
        Self { bytes, length }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// The address in the kernel's form; `None` where it is of another family or cut short.
pub(crate) fn decode(name: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(*name.first_chunk()?));
    let port = u16::from_be_bytes(*name.get(2..)?.first_chunk()?);
    match family {
        libc::AF_INET => Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::from(*name.get(4..)?.first_chunk::<4>()?)), port)),
        libc::AF_INET6 => {
            let flow = u32::from_ne_bytes(*name.get(4..)?.first_chunk()?);
            let address = Ipv6Addr::from(*name.get(8..)?.first_chunk::<16>()?);
            let scope = u32::from_ne_bytes(*name.get(24..)?.first_chunk()?);
            Some(SocketAddr::V6(SocketAddrV6::new(address, port, flow, scope)))
        }
        _ => None,
    }
}

/// The address with the interface that a link-local one is useless without.
pub(crate) fn scoped(address: SocketAddr, interface: u32) -> SocketAddr {
    match address {
        SocketAddr::V6(mut address)
            if address.scope_id() == 0 && (address.ip().is_unicast_link_local() || address.ip().is_multicast()) =>
        {
            address.set_scope_id(interface);
            SocketAddr::V6(address)
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_kernels_form() {
        let link_local = SocketAddr::V6(SocketAddrV6::new("fe80::1".parse().unwrap(), 7071, 0, 3));
        for address in ["10.1.2.3:80".parse().unwrap(), "[ff15::1]:7071".parse().unwrap(), link_local] {
            assert_eq!(decode(Name::new(address).bytes()), Some(address));
        }
    }

    #[test]
    fn what_is_cut_short_is_no_address() {
        let name = Name::new("[ff15::1]:7071".parse().unwrap());
        assert!((0..NAME).all(|length| decode(&name.bytes()[..length]).is_none()));
        assert_eq!(decode(&[0xff; NAME]), None);
    }
}
