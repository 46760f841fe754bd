//! The front door of SnowFlock: the `snowflock` command.
//!
//! It starts a page server and a pager per clone as processes of their own, by running its own program again in their
//! [roles](cli), watches them ([`supervise`]), and ends them together. What it does with them:
//!
//! - [`demo`]: forks a memory image into embedded guests, and checks every page;
//! - [`qemu`]: captures a running QEMU, and starts clones of it;
//! - [`xl`]: the same for a domain of Xen, by its stock toolstack;
//! - [`status`]: asks what runs.
//!
//! What this crate deliberately does not do: it serves no page and installs none, and knows no format of an image or a
//! stream; that is the libraries' work. Unsafe code stands in `supervise/sys.rs` alone.

pub mod admin;
mod capture;
pub mod cli;
mod clones;
pub mod demo;
mod error;
pub mod interrupt;
mod multicast;
pub mod qemu;
mod report;
mod server;
pub mod status;
pub mod supervise;
mod table;
mod working_set;
pub mod xl;

pub use clones::CloneState;
pub use error::ToolError;
pub use report::{CloneReport, Memory, RunReport, ServerReport};
