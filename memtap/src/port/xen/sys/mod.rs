//! Xen as a process of the control domain sees it: hypercalls through /dev/xen/privcmd, guest pages mapped there, event
//! channels through /dev/xen/evtchn. Everything here is a call that tells what became of it; what calls are for is decided above.
//!
//! No library of Xen is used: these two devices are the kernel's own stable interface, and the structures that Xen takes are few.
#![allow(unsafe_code)]

pub(super) mod abi;
mod event_channel;
mod hypercalls;
mod lock;
mod mapping;
mod page;

pub(super) use event_channel::EventChannel;
pub(super) use hypercalls::{Hypercalls, PREP_PAGES, PagingCall};
pub(super) use lock::lock_byte;
pub(super) use page::ForeignPage;
