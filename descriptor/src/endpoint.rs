use std::fmt;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Where a server listens: `tcp://HOST:PORT` or `unix:PATH` in text.
///
/// ```
/// use descriptor::Endpoint;
///
/// assert_eq!("tcp://[::1]:7000".parse(), Ok(Endpoint::Tcp("[::1]:7000".into())));
/// assert_eq!(Endpoint::Unix("/run/snow.sock".into()).to_string(), "unix:/run/snow.sock");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Endpoint {
    /// A TCP address: a host's name, IPv4 address or IPv6 address in brackets, then `:` and the port.
    Tcp(String),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

/// A text that is no endpoint.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ParseEndpointError {
    /// Neither of the two schemes.
    #[error("endpoint {0:?} is neither tcp://HOST:PORT nor unix:PATH")]
    Scheme(String),
    /// A host that cannot be one.
    #[error("endpoint {0:?} has no proper host (a name, an IPv4 address, or an IPv6 address in brackets)")]
    Host(String),
    /// A port that cannot be one.
    #[error("endpoint {0:?} does not end in a port from 0 to 65535")]
    Port(String),
    /// A path that no socket can have.
    #[error("endpoint {0:?} needs a path of 1 to {max} bytes", max = Endpoint::MAX_PATH)]
    Path(String),
}

impl Endpoint {
    /// The longest path of a Unix socket in bytes: `sun_path` with its closing zero.
    pub const MAX_PATH: usize = 107;

    /// The longest host: a domain name in text.
    const MAX_HOST: usize = 253;
}

impl FromStr for Endpoint {
    type Err = ParseEndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // What is shown of a hostile text stays short.
        let shown = || text.chars().take(300).collect::<String>();
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() || path.len() > Self::MAX_PATH || path.contains('\0') {
                return Err(ParseEndpointError::Path(shown()));
            }
            return Ok(Endpoint::Unix(path.into()));
        }
        let address = text.strip_prefix("tcp://").ok_or_else(|| ParseEndpointError::Scheme(shown()))?;
        let (host, port) = address.rsplit_once(':').ok_or_else(|| ParseEndpointError::Port(shown()))?;
        if !is_host(host) {
            return Err(ParseEndpointError::Host(shown()));
        }
        if !port.bytes().all(|digit| digit.is_ascii_digit()) || port.parse::<u16>().is_err() {
            return Err(ParseEndpointError::Port(shown()));
        }
        Ok(Endpoint::Tcp(address.to_owned()))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tcp(address) => write!(f, "tcp://{address}"),
            Endpoint::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        endpoint.to_string()
    }
}

impl TryFrom<String> for Endpoint {
    type Error = ParseEndpointError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

fn is_host(host: &str) -> bool {
    match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        // A link-local address names its interface after a percent sign.
        Some(address) => {
            let (address, zone) = address.split_once('%').unwrap_or((address, "zone"));
            address.parse::<Ipv6Addr>().is_ok() && is_name(zone)
        }
        None => is_name(host),
    }
}

fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    !name.is_empty() && name.len() <= Endpoint::MAX_HOST && name.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trip() {
        for text in ["tcp://127.0.0.1:0", "tcp://host.example:65535", "tcp://[fe80::1%eth0]:7", "unix:/a b", "unix:x"] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), text);
            assert_eq!(serde_json::to_string(&endpoint).unwrap(), format!("{text:?}"));
            assert_eq!(serde_json::from_str::<Endpoint>(&format!("{text:?}")).unwrap(), endpoint);
        }
    }

    #[test]
    fn what_is_no_endpoint_is_refused() {
        let refused = |text: &str| text.parse::<Endpoint>().unwrap_err();
        assert!(matches!(refused("localhost:80"), ParseEndpointError::Scheme(_)));
        assert!(matches!(refused("tcp://localhost"), ParseEndpointError::Port(_)));
        assert!(matches!(refused("tcp://localhost:"), ParseEndpointError::Port(_)));
        assert!(matches!(refused("tcp://localhost:+1"), ParseEndpointError::Port(_)));
        assert!(matches!(refused("tcp://localhost:65536"), ParseEndpointError::Port(_)));
        assert!(matches!(refused("tcp://:80"), ParseEndpointError::Host(_)));
        assert!(matches!(refused("tcp://::1:80"), ParseEndpointError::Host(_)));
        assert!(matches!(refused("tcp://[::g]:80"), ParseEndpointError::Host(_)));
        assert!(matches!(refused("tcp://a/b:80"), ParseEndpointError::Host(_)));
        assert!(matches!(refused("unix:"), ParseEndpointError::Path(_)));
        assert!(matches!(refused("unix:a\0b"), ParseEndpointError::Path(_)));
        assert!(matches!(refused(&format!("unix:{}", "x".repeat(108))), ParseEndpointError::Path(_)));
    }
}
