//! The multicast channel under a virtual clock: one server, up to thousands of clones, and all that happens to datagrams.
//!
//! Sender and receivers are mcast's own. Models are:
//!
//! - [`network`]: paths that lose datagrams at random, in bursts or by overload, delay, duplicate and reorder them; sockets that
//!   overflow;
//! - [`server`]: the shell that gathers the bytes of shards; [`clones`]: what a clone has, a guest that touches pages, and the
//!   lane by which each is asked for; [`liar`]: a member that makes up its NACKs and reports;
//! - [`scenario`]: what a run consists of, drawn from its seed; [`world`]: all of it together, with the properties;
//! - [`report`] and [`table`]: figures of runs, compared with a file; [`sparse`]: a group of ten thousand.
//!
//! Checked is: every page that a clone gets is the image's, and every clone gets all of them, whatever happened to it; where
//! nothing but losses happens, no guest waits longer than a deadline and the unicast lane take; nobody wants to be woken without
//! end; nobody is expelled without a reason; the sender keeps to its bounds.

pub mod clones;
pub mod liar;
pub mod network;
pub mod receiver_operations;
pub mod report;
pub mod scenario;
pub mod sender_operations;
pub mod server;
pub mod sparse;
pub mod table;
pub mod world;

pub use report::Report;
pub use scenario::Scenario;
pub use world::World;

use crate::Named;

/// Runs the scenario that `seed` stands for; prints the seed when a property does not hold.
///
/// # Panics
/// When a property does not hold.
pub fn run(seed: u64) -> Report {
    let _named = Named { what: "the channel", variable: "MCAST_SEED", test: "multicast", seed };
    World::new(Scenario::draw(seed)).run()
}
