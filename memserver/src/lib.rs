//! The page server: serves the memory image of a forked VM to the pagers of its clones.
//!
//! - [`session`] and [`schedule`] are pure: one decides what a client may do, the other what is sent next. They deal in
//!   frames; page bytes never pass through them.
//! - [`image`] keeps the images mapped; the kernel sends from the mapping, the program does not read it.
//! - `ring` is the shell around them, one thread with one io_uring; `channel` the thread that multicasts pages to all clones of
//!   an image at once, after the decisions of [`mcast`]; `control` the admin and metrics sockets, on tokio-uring.
//! - `working_set` learns from clones what they need, and tells those that come later; a thread of its own.
//! - [`Server`] starts the threads and stops them; [`cli`] is the `memserver` command.
//!
//! What this crate deliberately does not do: it never writes to an image, knows nothing of guests or hypervisors, and keeps
//! no page but in the page cache.

mod channel;
pub mod cli;
mod config;
mod control;
pub mod image;
mod listen;
mod ring;
pub mod schedule;
mod server;
pub mod session;
mod shared;
pub mod stats;
mod sys;
mod working_set;

pub use channel::report::{ChannelStatus, MemberStatus, Report as MulticastStatus, Sent, Traffic};
pub use config::{Compress, MulticastConfig, ServeConfig};
pub use control::{ClassStatus, ImageStatus, RingStatus, SessionStatus, Status, WorkingSetStatus, client};
pub use ring::{Features, RingFeatures};
pub use server::{ServeError, Server};
pub use working_set::ImportError;
