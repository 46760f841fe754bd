use crate::{ChannelParameters, Member, Start};

/// How a receiver goes about its channel.
#[derive(Clone, Debug)]
pub struct ReceiverConfig {
    /// What both sides agree on; [checked](ChannelParameters::check).
    pub channel: ChannelParameters,
    /// Who this receiver is.
    pub member: Member,
    /// Where it begins.
    pub start: Start,
    /// Bytes of the socket's buffer, which the sender keeps from overflowing.
    pub buffer: u32,
    /// Incomplete blocks at one time; beyond, the oldest are given up.
    pub max_blocks: usize,
}

impl ReceiverConfig {
    /// A hundred milliseconds of repairs under way at 300 MB/s and an MTU of 1500; 34 MiB of buffers then, which only a
    /// receiver that loses something of each block ever has.
    pub const MAX_BLOCKS: usize = 128;

    /// The defaults for a member of `channel`.
    pub const fn new(channel: ChannelParameters, member: Member, start: Start, buffer: u32) -> Self {
        Self { channel, member, start, buffer, max_blocks: Self::MAX_BLOCKS }
    }
}
