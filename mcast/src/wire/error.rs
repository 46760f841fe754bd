use thiserror::Error;

use super::VERSION;

/// Bytes from a peer that are no datagram of a multicast channel.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum WireError {
    /// Another major version.
    #[error("datagram of version {0}, this side speaks {VERSION}")]
    Version(u8),
    /// A kind that this version does not know.
    #[error("datagram of unknown kind {0:#04x}")]
    Kind(u8),
    /// Too short for what it says it is, or longer than any.
    #[error("{kind} datagram of {length} bytes does not add up")]
    Length {
        /// The kind.
        kind: &'static str,
        /// Its length in bytes.
        length: usize,
    },
    /// A field with a value that the protocol does not allow.
    #[error("{kind} datagram has {value} as its {field}")]
    Field {
        /// The kind.
        kind: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}
