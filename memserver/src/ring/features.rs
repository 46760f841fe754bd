//! Which of io_uring's features this kernel has.

use std::io;

use io_uring::{IoUring, Probe, opcode};
use serde::{Deserialize, Serialize};

use crate::ServeError;

/// Entries in the submission queue. It is flushed when it is full, so its size bounds nothing but the system calls saved.
const SUBMISSIONS: u32 = 1024;

/// Entries in the completion queue: several for each of many sessions, so that it overflows (which the kernel catches, at a
/// cost) only in a storm.
const COMPLETIONS: u32 = 8192;

/// What to use of what the kernel has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RingFeatures {
    /// Everything.
    #[default]
    Auto,
    /// Only what Linux 5.11 has, as if the kernel were that old; for tests.
    Basic,
}

/// What is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// Completions are worked off when the ring's thread asks, and only then (6.1).
    pub defer_taskrun: bool,
    /// One accept serves for many connections (5.19).
    pub multishot_accept: bool,
    /// One receive serves for many messages, into buffers that the ring shares (6.0).
    pub multishot_receive: bool,
    /// Sockets live in the ring alone and take no file descriptor (5.19).
    pub direct_descriptors: bool,
    /// Pages may be sent without a copy in the kernel (6.1).
    pub zero_copy: bool,
    /// A socket that lives in the ring can be asked for its peer's address (6.8).
    pub peer_names: bool,
}

impl Features {
    const NONE: Features = Features {
        defer_taskrun: false,
        multishot_accept: false,
        multishot_receive: false,
        direct_descriptors: false,
        zero_copy: false,
        peer_names: false,
    };

    /// What is missing, in words.
    pub fn lacking(&self) -> Vec<&'static str> {
        let all = [
            (self.defer_taskrun, "deferred task work (Linux 6.1)"),
            (self.multishot_accept, "multishot accept (Linux 5.19)"),
            (self.multishot_receive, "multishot receive (Linux 6.0)"),
            (self.direct_descriptors, "direct descriptors (Linux 5.19)"),
            (self.zero_copy, "zero-copy sends (Linux 6.1)"),
            (self.peer_names, "peer names of direct descriptors (Linux 6.8)"),
        ];
        all.into_iter().filter_map(|(there, name)| (!there).then_some(name)).collect()
    }
}

/// A ring with as much as the kernel has; `sockets` is how many direct descriptors it should have room for.
///
/// # Errors
/// When the kernel has no io_uring, forbids it, or lacks what is needed in any case.
pub(super) fn set_up(wanted: RingFeatures, sockets: u32) -> Result<(IoUring, Features), ServeError> {
    if wanted == RingFeatures::Basic {
        let ring = IoUring::builder().setup_cqsize(COMPLETIONS).build(SUBMISSIONS).map_err(ServeError::NoRing)?;
        return check(ring, Features::NONE);
    }
    let (ring, defer_taskrun) = match deferred() {
        Ok(ring) => (ring, true),
        Err(_) => (IoUring::builder().setup_cqsize(COMPLETIONS).build(SUBMISSIONS).map_err(ServeError::NoRing)?, false),
    };
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(ServeError::NoRing)?;
    // Multishot modes have no probe of their own; these operations came in the same releases.
    let has_5_19 = probe.is_supported(opcode::Socket::CODE);
    let has_6_0 = probe.is_supported(opcode::SendZc::CODE);
    let direct_descriptors = has_5_19 && ring.submitter().register_files_sparse(sockets).is_ok();
    let features = Features {
        defer_taskrun,
        multishot_accept: has_5_19,
        multishot_receive: has_6_0,
        direct_descriptors,
        zero_copy: probe.is_supported(opcode::SendMsgZc::CODE),
        peer_names: !direct_descriptors || probe.is_supported(opcode::FixedFdInstall::CODE),
    };
    check(ring, features)
}

fn deferred() -> io::Result<IoUring> {
    // The task-run flag lets a submission that does not wait still reap what is ready.
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_cqsize(COMPLETIONS)
        .build(SUBMISSIONS)
}

fn check(ring: IoUring, features: Features) -> Result<(IoUring, Features), ServeError> {
    // Waiting with a time-out, and completions that are never dropped: both 5.11.
    if ring.params().is_feature_ext_arg() && ring.params().is_feature_nodrop() {
        Ok((ring, features))
    } else {
        Err(ServeError::OldKernel)
    }
}
