//! Group endpoints as users write them.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use thiserror::Error;

/// A multicast group with its port, and the interface that it is reached by.
///
/// ```
/// let group: mcast_socket::Group = "239.1.2.3:7071%eth0".parse().unwrap();
/// assert_eq!(group.interface.as_deref(), Some("eth0"));
/// assert_eq!(group.to_string(), "239.1.2.3:7071%eth0");
/// assert!("10.0.0.1:7071".parse::<mcast_socket::Group>().is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The group's address.
    pub address: IpAddr,
    /// The UDP port.
    pub port: u16,
    /// The name of the interface; the routing table's choice where it is missing.
    pub interface: Option<String>,
}

impl Group {
    /// A group of these, where the address is one of a group and the port is not 0.
    ///
    /// # Errors
    /// Otherwise.
    pub fn new(address: IpAddr, port: u16, interface: Option<String>) -> Result<Self, ParseGroupError> {
        // An IPv4 group in IPv6's clothes is the IPv4 group.
        let address = address.to_canonical();
        if !address.is_multicast() {
            return Err(ParseGroupError::NotMulticast(address));
        }
        if port == 0 {
            return Err(ParseGroupError::NoPort);
        }
        Ok(Self { address, port, interface })
    }

    /// Address and port.
    pub fn socket_address(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }
}

impl FromStr for Group {
    type Err = ParseGroupError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (endpoint, interface) = match text.split_once('%') {
            Some((endpoint, interface)) => (endpoint, Some(interface)),
            None => (text, None),
        };
        if let Some(name) = interface
            && (name.is_empty() || name.len() >= libc::IF_NAMESIZE || name.contains(['/', '%', ':', ' ']))
        {
            return Err(ParseGroupError::InterfaceName(name.into()));
        }
        let endpoint: SocketAddr = endpoint.parse().map_err(|_| ParseGroupError::Form(text.into()))?;
        Self::new(endpoint.ip(), endpoint.port(), interface.map(Into::into))
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.socket_address())?;
        match &self.interface {
            Some(name) => write!(f, "%{name}"),
            None => Ok(()),
        }
    }
}

/// Why a text is no group.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ParseGroupError {
    /// It has another form.
    #[error(
        "`{0}` is not a group: expected ADDRESS:PORT or ADDRESS:PORT%INTERFACE, as 239.1.2.3:7071%eth0 or [ff15::1]:7071"
    )]
    Form(String),
    /// It is the address of a host.
    #[error("{0} is not a multicast address: groups are 224.0.0.0 to 239.255.255.255, and ff00::/8")]
    NotMulticast(IpAddr),
    /// Port 0.
    #[error("a group needs a port other than 0")]
    NoPort,
    /// No interface can have this name.
    #[error("`{0}` cannot be the name of an interface")]
    InterfaceName(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_read_and_written() {
        for text in ["239.1.2.3:7071", "239.1.2.3:7071%eth0", "[ff15::1]:7071", "[ff15::1]:7071%br-0.5"] {
            assert_eq!(text.parse::<Group>().unwrap().to_string(), text);
        }
        let mapped: Group = "[::ffff:239.1.2.3]:7071".parse().unwrap();
        assert_eq!(mapped.to_string(), "239.1.2.3:7071");
    }

    #[test]
    fn what_is_no_group_is_refused_in_words() {
        let error = |text: &str| text.parse::<Group>().unwrap_err();
        assert_eq!(error("10.0.0.1:7071"), ParseGroupError::NotMulticast([10, 0, 0, 1].into()));
        assert_eq!(error("239.1.2.3:0"), ParseGroupError::NoPort);
        assert!(matches!(error("239.1.2.3"), ParseGroupError::Form(_)));
        assert!(matches!(error("ff15::1:7071"), ParseGroupError::Form(_)));
        assert!(matches!(error("239.1.2.3:7071%"), ParseGroupError::InterfaceName(_)));
        assert!(matches!(error("239.1.2.3:7071%a-name-of-16-bytes"), ParseGroupError::InterfaceName(_)));
    }
}
