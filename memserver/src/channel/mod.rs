//! The multicast channels: one thread that sends the pages of all images to one group.
//!
//! ```text
//!   rings ── Join, Leave, Request ─▶ hub ──▶ one mcast::Sender per image ──▶ bursts ──▶ station ──▶ group
//!     ▲                               │            ▲                                      │
//!     └── CHANNEL, CHANNEL_GONE ──────┘            └────────── NACK, REPORT ◀─────────────┘
//! ```
//!
//! The senders decide what is sent and when; the hub looks which of them has something to send, gathers its bytes from the
//! mapped image, and hands on what they say about their members. A channel begins when a clone of its image first asks for one.
//! If the thread fails, the rings tell their clients that the channel has gone, and serve them by unicast.

mod gather;
mod handle;
mod hub;
mod outbox;
mod parity;
pub(crate) mod report;
mod stream;

pub(crate) use handle::{ChannelHandle, Order, SessionKey};
pub(crate) use hub::{Hub, open};
