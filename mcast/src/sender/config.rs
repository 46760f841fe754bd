use std::num::NonZeroU64;
use std::time::Duration;

use crate::{ChannelParameters, Start};

/// How a sender goes about its channel.
#[derive(Clone, Debug)]
pub struct SenderConfig {
    /// What both sides agree on.
    pub channel: ChannelParameters,
    /// The most that is sent, in bytes of datagrams a second; `None` leaves it to the members and the network.
    pub max_rate: Option<NonZeroU64>,
    /// What is sent at first, in bytes a second, until reports say otherwise.
    pub initial_rate: u64,
    /// Whoever holds the group below so many bytes a second is moved to unicast.
    pub floor: u64,
    /// Members at one time.
    pub max_members: usize,
    /// Bytes of datagrams in one [`super::Transmit::Shards`].
    pub burst: usize,
    /// Blocks of each class that can be repaired.
    pub history: usize,
    /// How long a burst waits for others to join, from the last that did; ten times that from the first.
    pub gather: Duration,
    /// The numbers to begin with; `None` takes random ones.
    pub start: Option<Start>,
}

impl SenderConfig {
    /// 10 Gbit/s, so that no common link is left idle while the first reports are on their way. The members' windows bound
    /// what that can lose.
    pub const INITIAL_RATE: u64 = 1_250_000_000;

    /// 16 Mbit/s: whoever is slower is served better, and disturbs less, by unicast.
    pub const FLOOR: u64 = 2_000_000;

    /// What one group was simulated with. A member costs some hundred bytes, and up to 1 KiB for what it lacks.
    pub const MAX_MEMBERS: usize = 10_000;

    /// Close to the 64 KiB that the kernel takes for one send with segmentation offload.
    pub const BURST: usize = 60 << 10;

    /// A second of bulk at 1 GB/s and an MTU of 1500, far more than any repair takes; 1 MiB of memory.
    pub const HISTORY: usize = 4096;

    /// Clones of one fork join within some milliseconds of each other. What is sent before one is there has to be sent again.
    pub const GATHER: Duration = Duration::from_millis(20);

    /// The defaults for `channel`.
    pub fn new(channel: ChannelParameters) -> Self {
        Self {
            channel,
            max_rate: None,
            initial_rate: Self::INITIAL_RATE,
            floor: Self::FLOOR,
            max_members: Self::MAX_MEMBERS,
            burst: Self::BURST,
            history: Self::HISTORY,
            gather: Self::GATHER,
            start: None,
        }
    }
}
