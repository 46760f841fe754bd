//! The fetch protocol: how a pager asks a page server for pages over a stream (TCP, or a Unix socket on one host).
//!
//! ```text
//!   pager (client)                                    page server
//!     │ preamble {magic, major, minor}                     │
//!     │ HELLO {image, capabilities, ticket}                │
//!     ├───────────────────────────────────────────────────▶│
//!     │                     preamble {magic, major, minor} │
//!     │           WELCOME {image, frames, limits} or REFUSED {reason, text}; then the connection ends
//!     │◀───────────────────────────────────────────────────┤
//!     │                                                    │
//!     │ REQUEST {tag, class, ranges…}                      │   several may be under way; the server answers
//!     ├───────────────────────────────────────────────────▶│   demand before bulk, so answers overtake each other
//!     │   PAGES {tag, run, encoding} payload, … , last     │   the runs of one answer, in any order of frames;
//!     │◀───────────────────────────────────────────────────┤   LAST marks the final one
//!     │   or ERROR {tag, code, text}                       │   the request failed, the session goes on
//!     │◀───────────────────────────────────────────────────┤
//!     │   CHANNEL {group, feedback, session, member}       │   once, soon after WELCOME, where a multicast channel
//!     │◀───────────────────────────────────────────────────┤   carries the image; REQUESTs may then be flagged MULTICAST
//!     │   CHANNEL_GONE {reason, text}                      │   the channel has ended for this client, the session goes on
//!     │◀───────────────────────────────────────────────────┤
//!     │   ORDER {ranges…}, … , last                        │   once, after WELCOME, where working sets are kept: what
//!     │◀───────────────────────────────────────────────────┤   to fetch ahead of need; empty when nothing is known
//!     │ TOUCHED {ranges…}, … , last                        │   what the clone needed, in the order of first need, while
//!     ├───────────────────────────────────────────────────▶│   it runs and, LAST, at its end
//!     │ PING ◀─▶ PONG        GOODBYE {reason} ◀─▶          │   from either side
//! ```
//!
//! **Framing.** Every message is a 16-byte [`wire::Header`] with the length of the body behind it. Integers are little-endian.
//! A PAGES body is a 16-byte run followed by the payload, so a receiver can install pages straight from its buffer.
//!
//! **Versions.** Both sides open with an 8-byte preamble whose layout never changes. Peers must agree on the major version: the
//! server answers a strange one with its own preamble and closes, so that each side can name both versions. A higher minor
//! version only adds capabilities, which are used when HELLO offers and WELCOME accepts them. Minor version 1 added
//! [`Capabilities::MULTICAST`], CHANNEL, CHANNEL_GONE and the MULTICAST flag of REQUEST; minor version 2 [`Capabilities::WORKING_SET`],
//! TOUCHED and ORDER.
//!
//! **Roles and bounds.** The client bounds its outstanding requests by the limits in WELCOME; a server ends a session that
//! exceeds them. Frames beyond the image are an ERROR; frames without data (zero, free) come back as runs of zeros without
//! a payload.
//!
//! **The local lane.** On a Unix socket a client that offers [`Capabilities::LOCAL`] may get an IMAGE message after WELCOME: the
//! image's extents, with its files attached as read-only descriptors (`SCM_RIGHTS`), so that it can read pages itself.
//!
//! **The multicast lane.** A client that offers [`Capabilities::MULTICAST`], and is not given the local lane, may get a CHANNEL
//! message some time after WELCOME, or CHANNEL_GONE where the channel is full. The answer to a REQUEST with the MULTICAST flag
//! ([`Delivery::Multicast`]) goes to the group: nothing follows over the connection, so such a request counts as answered at once,
//! and a client that misses the pages asks again, without the flag. A server whose channel is not there (CHANNEL_GONE may cross
//! with requests) answers flagged requests like any others.

//!
//! **Working sets.** With [`Capabilities::WORKING_SET`] the server tells each clone what its siblings needed, by one ORDER behind
//! WELCOME (before or behind IMAGE), and the clone tells what it needs itself: every frame once that it had to wait for, or used of
//! what was fetched ahead of a stream of faults. The LAST report says that the clone, which came to its end, has named everything:
//! what it was not told by ORDER and did not name it did not need. A clone that got pages in other ways (hydration, multicast, an
//! ORDER of an earlier session) cannot say that, and leaves LAST out. DECLINED says that it went by no ORDER. What may be
//! concluded is told in [`working_set`](crate::working_set).

mod channel;
mod codec;
mod error;
mod local;
mod message;
pub mod wire;

pub use channel::ChannelOffer;
pub use codec::{MAX_MESSAGE, decode, decode_preamble};
pub use error::FetchError;
pub use local::LocalImage;
pub use message::{
    Capabilities, ChannelGoneReason, Class, Delivery, Encoding, ErrorCode, GoodbyeReason, Hello, Limits,
    MAX_PAGES_PER_RUN, MAX_RANGES, MAX_TEXT, MAX_TICKET, Message, OrderPart, PageRun, Preamble, Ranges, Refusal,
    Request, Tag, Touched, VERSION, Version, Welcome,
};
