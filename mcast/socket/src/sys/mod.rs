//! The system calls that need unsafe code.
#![allow(unsafe_code)]

mod batch;
mod buffers;
mod interfaces;
mod mapping;
mod options;
mod outgoing;
mod ring;
mod socket_ring;

pub(crate) use batch::{Batch, Message, send};
pub(crate) use interfaces::interfaces;
pub(crate) use options::{get_int, join, leave, set_int};
pub(crate) use outgoing::Outgoing;
pub(crate) use ring::Waiting;
pub(crate) use socket_ring::{Completion, SocketRing};
