//! A small client of QEMU's machine protocol (QMP): one JSON object per line over a Unix socket.
//!
//! ```text
//! QEMU                                  client
//! {"QMP": {"version": …}}        ──►           the greeting; only one client at a time gets it
//!                                ◄──    {"execute": "qmp_capabilities", "id": 0}
//! {"return": {}, "id": 0}        ──►
//!                                ◄──    {"execute": "migrate", "arguments": {…}, "id": 1}
//! {"event": "STOP", "timestamp": …} ──►        events come at any time and are kept until asked for
//! {"return": {}, "id": 1}        ──►           or {"error": {"class": …, "desc": …}, "id": 1}
//! ```
//!
//! Answers are matched by their id, so one that comes after its time-out is not taken for that of the next command.

mod client;
mod message;

pub use client::{Qmp, QmpError};
pub use message::{Event, Version};
