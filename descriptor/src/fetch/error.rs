use std::net::IpAddr;

use thiserror::Error;

use super::Version;
use crate::image::ExtentError;

/// Bytes from a peer that break the fetch protocol.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FetchError {
    /// The peer speaks something else.
    #[error("peer does not speak the SnowFlock fetch protocol (it began with {0:02x?})")]
    Magic([u8; 4]),
    /// The peer speaks another major version.
    #[error("peer speaks version {peer} of the fetch protocol, this side {ours}: install matching releases")]
    Version {
        /// The peer's version.
        peer: Version,
        /// This side's version.
        ours: Version,
    },
    /// A kind of message that this version does not know.
    #[error("message of unknown kind {0}")]
    Kind(u8),
    /// A body longer than the protocol allows.
    #[error("{kind} message of {length} bytes is longer than the {limit} allowed")]
    TooLong {
        /// The kind of message.
        kind: &'static str,
        /// The length of its body in bytes.
        length: u32,
        /// The longest allowed.
        limit: usize,
    },
    /// A body whose length does not fit its contents.
    #[error("{kind} message with a body of {length} bytes does not add up")]
    Length {
        /// The kind of message.
        kind: &'static str,
        /// The length of its body in bytes.
        length: usize,
    },
    /// A field with a value that the protocol does not allow.
    #[error("{kind} message has {value} as its {field}")]
    Field {
        /// The kind of message.
        kind: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A CHANNEL message names a group that is none.
    #[error("CHANNEL message has {0} as its group, which is not a multicast address")]
    Group(IpAddr),
    /// The extents of an IMAGE message make no table.
    #[error("IMAGE message: {0}")]
    Extents(#[from] ExtentError),
}
