//! The system calls that need unsafe code.
#![allow(unsafe_code)]

mod batch;
mod interfaces;
mod options;
mod outgoing;

pub(crate) use batch::{Batch, Message, send};
pub(crate) use interfaces::interfaces;
pub(crate) use options::{get_int, join, leave, set_int};
pub(crate) use outgoing::Outgoing;
