//! The datagrams of a multicast channel: one sender, many members, one image.
//!
//! ```text
//!   sender                                                      members of the group
//!     │ DATA {seq, block, index of count, frame} bytes of pages        │  a block is cut into `count` shards; each of them
//!     ├═══════════════════════════════════════════════════════════════▶│  is one datagram, useful by itself and in any order
//!     │ HEARTBEAT {next blocks, members, round trip, report times}     │
//!     ├═══════════════════════════════════════════════════════════════▶│  now the last gap shows too
//!     │                       NACK {block, shards lacking}…            │  after a random wait, to the sender alone
//!     │◀───────────────────────────────────────────────────────────────┤
//!     │ CONFIRM {block, what comes}…                                   │  everybody: no need to ask for the same
//!     ├═══════════════════════════════════════════════════════════════▶│
//!     │ REPAIR {…} bytes of a shard    PARITY {…} a Reed-Solomon row   │  one row of parity repairs another loss at each member
//!     ├═══════════════════════════════════════════════════════════════▶│
//!     │                       REPORT {received, lost, lacks…}          │  now and then: what the pace and the next burst follow
//!     │◀───────────────────────────────────────────────────────────────┤
//!     │ END {…}                                                        │  the burst is over: report what you lack
//!     ├═══════════════════════════════════════════════════════════════▶│
//! ```
//!
//! **Framing.** A datagram is one message. It begins with the version and the kind, a byte each. What the sender multicasts
//! carries the session, what a member sends also its number, which only the sender knows. Integers are little-endian. DATA,
//! REPAIR and PARITY share a header of [`HEAD`] bytes and one sequence, so that losses can be counted; bit [`kind::BULK`] of
//! their kind tells the class. The bytes behind the header are a shard: a piece of the block's stream, which is a map of its frames
//! (see [`crate::BlockMap`]) and then the stored pages. Zero frames are in the map alone.
//!
//! **Versions.** The first byte is the major version; a datagram of another is dropped and counted, and the unicast lane has
//! told both sides' versions before. Within a major version a message other than a shard may grow at its end, flags and
//! reserved bytes may get a meaning, and kinds may be added: a receiver ignores what lies behind the fields it knows, flags
//! and reserved bytes that it does not know, and drops unknown kinds. A new meaning that the other side must understand is
//! negotiated as a capability in the fetch protocol. So lengths are lower bounds here, except for shards, which end with the datagram.
//!
//! **Trust.** Whatever arrives is decoded by [`Datagram::decode`] into values that are valid by themselves: indices within
//! counts, classes known, numbers of entries within bounds. Session, member and the agreement with what came before are for
//! the receiving state machine to check.

mod codec;
mod confirm;
mod datagram;
mod error;
mod nack;
mod pulse;
mod report;
mod shard;
mod structs;
#[cfg(test)]
mod tests;

pub use confirm::{Answer, Confirm, Confirmation};
pub use datagram::Datagram;
pub use error::WireError;
pub use nack::{Lack, Nack};
pub use pulse::{Pulse, PulseKind};
pub use report::{LackBits, Report};
pub use shard::{ShardDatagram, ShardKind};
pub use structs::{
    Confirmation as ConfirmationEntry, Lack as LackEntry, MapRun, MemberHeader, PulseBody, ReportBody, SenderHeader,
    ShardHeader, flag, how, kind,
};

/// The major version that this code speaks.
pub const VERSION: u8 = 1;

/// Bytes before a shard in its datagram.
pub const HEAD: usize = size_of::<ShardHeader>();

/// Bytes of a datagram, at most.
pub const MAX_DATAGRAM: usize = HEAD + crate::ChannelParameters::MAX_PAYLOAD as usize;

/// Entries in a NACK or CONFIRM: what fits into an Ethernet frame.
pub const MAX_ENTRIES: usize = 40;

/// Entries in a NACK or CONFIRM on a channel whose shards have `payload` bytes, so that it needs no larger path than they do.
pub const fn max_entries(payload: u16) -> usize {
    let fit = payload as usize / size_of::<LackEntry>();
    if fit < MAX_ENTRIES { fit } else { MAX_ENTRIES }
}
