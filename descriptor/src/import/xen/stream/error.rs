use std::fmt;
use std::io;

use thiserror::Error;

use super::Stream;
use crate::{Descriptor, FrameSet};

/// One of the formats that lie in each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// The outermost, with the configuration.
    Xl,
    /// The records of the toolstack's library.
    Libxl,
    /// The domain itself.
    Libxc,
}

/// A stream that cannot be imported. Offsets are bytes from its start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The stream could not be read.
    #[error("cannot read {field} at offset {offset:#x}")]
    Read {
        /// What was to be read.
        field: &'static str,
        /// Where.
        offset: u64,
        /// Why not.
        source: io::Error,
    },
    /// The stream ends too early.
    #[error("the stream ends within {field} at offset {offset:#x}: the capture is not complete")]
    Truncated {
        /// What was to be read.
        field: &'static str,
        /// Where it begins.
        offset: u64,
    },
    /// Something else than a stream.
    #[error("not a stream of xl: there is no {layer} header at offset {offset:#x}")]
    Magic {
        /// Whose header is missing.
        layer: Layer,
        /// Where it should be.
        offset: u64,
    },
    /// A stream of another version.
    #[error("the {layer} stream at offset {offset:#x} has version {version}, which is not known")]
    Version {
        /// Whose stream.
        layer: Layer,
        /// Where its version stands.
        offset: u64,
        /// The version.
        version: u32,
    },
    /// A stream with options that are not known; big-endian ones are among them.
    #[error("the {layer} stream has the options {options:#x} at offset {offset:#x}, which are not known")]
    Options {
        /// Whose stream.
        layer: Layer,
        /// Where they stand.
        offset: u64,
        /// The options.
        options: u32,
    },
    /// A domain that is not HVM or PVH.
    #[error(
        "the domain has type {0}; only HVM and PVH guests (type 2) can be forked, since a PV guest manages its own frames"
    )]
    NotHvm(u32),
    /// A record that is not known, and not marked as optional.
    #[error("the {layer} record at offset {offset:#x} has type {kind:#x}, which is not known")]
    UnknownRecord {
        /// Whose record.
        layer: Layer,
        /// Its type.
        kind: u32,
        /// Where it begins.
        offset: u64,
    },
    /// A record of a stream that goes on for as long as the domain lives.
    #[error("the {layer} record at offset {offset:#x} is one of a checkpointed stream (Remus, COLO), which has no end")]
    Checkpoint {
        /// Whose record.
        layer: Layer,
        /// Where it begins.
        offset: u64,
    },
    /// A number that cannot stand where it does.
    #[error("{field} at offset {offset:#x} is {value:#x}, which is not possible here")]
    Value {
        /// What the number is.
        field: &'static str,
        /// Where it stands.
        offset: u64,
        /// The number.
        value: u64,
    },
    /// A record that is too long to be kept.
    #[error("{field} at offset {offset:#x} has {length} bytes, more than {max}", max = Stream::MAX_RECORD)]
    TooLong {
        /// What it is.
        field: &'static str,
        /// Where it begins.
        offset: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// Records that are too many, or too long together, to be kept.
    #[error(
        "there are more than {records} records, or {bytes} bytes of them, at offset {offset:#x}",
        records = Descriptor::MAX_RECORDS,
        bytes = Stream::MAX_RECORDS_BYTES
    )]
    TooMany {
        /// Where the first one stands that is too much.
        offset: u64,
    },
    /// A record whose length does not fit what it holds.
    #[error("{field} at offset {offset:#x} has {length} bytes, which does not fit its contents")]
    Length {
        /// The record.
        field: &'static str,
        /// Where its body begins.
        offset: u64,
        /// The length of the body in bytes.
        length: u64,
    },
    /// A page of a type that an HVM guest's pages do not have.
    #[error(
        "the entry at offset {offset:#x} gives frame {pfn:#x} the type {kind:#x}, which an HVM guest's pages never have"
    )]
    PageType {
        /// The frame.
        pfn: u64,
        /// The type.
        kind: u8,
        /// Where the entry stands.
        offset: u64,
    },
    /// A frame number that is too large.
    #[error("the entry at offset {offset:#x} is for frame {pfn:#x}, beyond the limit of {max} frames", max = FrameSet::MAX_UNIVERSE)]
    FrameTooLarge {
        /// The frame.
        pfn: u64,
        /// Where the entry stands.
        offset: u64,
    },
    /// Pages in too many pieces.
    #[error("the pages lie in more than {0} pieces")]
    Fragmented(usize),
    /// A configuration that is no text.
    #[error("the domain's configuration at offset {offset:#x} is no text")]
    Text {
        /// Where it stands.
        offset: u64,
    },
    /// No domain, or two of them.
    #[error("the stream has {0} domains, which should be one")]
    Domains(u32),
    /// A domain without memory.
    #[error("the domain that ends at offset {offset:#x} has no pages")]
    NoPages {
        /// Where it ends.
        offset: u64,
    },
}

impl StreamError {
    pub(super) fn value(field: &'static str, offset: u64, value: impl Into<u64>) -> Self {
        Self::Value { field, offset, value: value.into() }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Layer::Xl => "xl",
            Layer::Libxl => "libxl",
            Layer::Libxc => "libxc",
        })
    }
}
