//! Working sets: which frames clones of an image need, learnt from the clones that there were.
//!
//! ```text
//!   clone ── frames in the order of first need ──▶ Witness ──▶ Merged ──▶ Order ──▶ the next clone fetches ahead
//!            (WorkingSet)                          one for       one for    what is common,
//!                                                  a clone       an image   most common first
//! ```
//!
//! A clone that fetched a frame ahead does not fault on it, so its silence says nothing: it may have needed the frame or not. If
//! silence counted as "not needed", sets would shrink to nothing and grow again; if only faults counted, they could only grow.
//! So what a clone says counts only where it would have said the contrary too. It is asked about
//! - every frame that was not in its order, and
//! - *probes*: one in [`Order::PROBES`] of the entries of the order, drawn for each clone, which are left out of it.
//!
//! The share of clones that needed an entry, of those that were asked, then estimates how common it is, without a bias by what
//! was fetched ahead. Old answers fade, as counts are halved at a bound: what no clone needs any more is forgotten, and what
//! clones begin to need is in the order after two or three of them.
//!
//! Many clones never say that this was all: they are killed, or cannot tell what they did not need. What they name counts as ever,
//! and their silence on what only one other clone needed counts once, so that chance is told from need without their last word.
//!
//! What clones say is believed. Whoever may ask a server for an image, that is whoever has its ticket, can say what it likes in the
//! names of as many clones as it likes, and so replace what is known within seconds: by nothing, or by up to
//! [`Merged::MAX_ENTRIES`] entries (1 GiB) that nobody needs. It can waste what every later clone fetches in the background, which
//! steps back behind what guests wait for. It cannot change what pages hold, nor learn anything that the ticket does not show it.
//!
//! Everything here is pure: who reports, and when, is told by the caller.

mod merged;
mod order;
mod record;

#[cfg(test)]
mod tests;

pub use merged::{Entry, Merged, MergedError, Summary, Witness};
pub use order::Order;
pub use record::WorkingSet;
