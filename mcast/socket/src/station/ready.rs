use std::io;

use crate::burst::Burst;

/// What a lane has for its station.
#[derive(Debug)]
pub(crate) enum Ready<K> {
    Sent {
        burst: Burst<K>,
        result: io::Result<()>,
        control: bool,
    },
    /// A datagram, by its place in the lane's buffers.
    Feedback(u16),
    Woken,
}
