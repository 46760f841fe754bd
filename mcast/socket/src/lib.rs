//! The UDP sockets of the multicast channel.
//!
//! ```text
//!   page server                                                             each clone
//!   Station ── bursts, control datagrams ──▶ group:port ──▶ Receiving ── datagrams
//!      ▲  datagrams straight from the mapped image               │
//!      └───────────── feedback, unicast to the station ──────────┘
//! ```
//!
//! - [`Group`] is what a user writes: `239.1.2.3:7071%eth0`.
//! - [`Station`] is the sender's side. It sends [`Burst`]s of up to 64 datagrams, receives feedback, and watches one event
//!   counter, all in one place to wait.
//! - [`Receiving`] is the receiver's side: it joins the group and takes apart what the kernel has coalesced.
//!
//! Both sides use io_uring and the kernel's segmentation offloads (`UDP_SEGMENT`, `UDP_GRO`) where they are to be had, and
//! system calls on single datagrams where they are not; [`Features`] says which. Nothing here knows what is in a datagram:
//! no protocol, no pacing, no loss.

mod address;
mod burst;
mod control;
mod error;
mod group;
mod interface;
mod open;
mod receiving;
mod station;
mod sys;

pub use burst::{Burst, MAX_BURST, MAX_DATAGRAMS};
pub use error::{SendError, SocketError};
pub use group::{Group, ParseGroupError};
pub use receiving::{Datagram, ReceiveConfig, Receiving};
pub use station::{Event, Station, StationConfig};

/// The kernel's help: as a wish what may be used, as an answer what is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// io_uring with multishot receives into shared buffers (Linux 6.0).
    pub ring: bool,
    /// Datagrams travel through the kernel in bursts (`UDP_SEGMENT` of Linux 4.18, `UDP_GRO` of 5.0).
    pub offload: bool,
}

impl Features {
    /// All that the kernel has.
    pub const ALL: Features = Features { ring: true, offload: true };
}

impl Default for Features {
    fn default() -> Self {
        Self::ALL
    }
}
