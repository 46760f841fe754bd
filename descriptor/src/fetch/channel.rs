use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use super::error::FetchError;
use super::wire;
use crate::PageCount;

/// The multicast channel of an image, as the server offers it to one client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelOffer {
    /// The group and its port.
    pub group: SocketAddr,
    /// Where feedback goes; `None`: to the address of the server's end of this connection.
    pub feedback: Option<IpAddr>,
    /// The UDP port that feedback goes to.
    pub feedback_port: u16,
    /// Bytes of a block that a datagram carries, at least [`ChannelOffer::MIN_PAYLOAD`].
    pub payload: u16,
    /// Frames that one bit of a report stands for, a power of two.
    pub chunk_frames: PageCount,
    /// The sender's session; datagrams of another are not meant.
    pub session: u64,
    /// The client's name in its feedback, which nobody can guess.
    pub member: u64,
    /// The number of the next datagram.
    pub start_seq: u32,
    /// The numbers of the next block of each class, demand first.
    pub start_block: [u32; 2],
}

impl ChannelOffer {
    /// The least payload: paths of less than the 576 bytes that every IPv4 host must take in are not used.
    pub const MIN_PAYLOAD: u16 = 512;

    pub(super) fn encode(&self) -> wire::Channel {
        let feedback = self.feedback.unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        let chunk_frames = u32::try_from(self.chunk_frames.get()).expect("a chunk has less than 2^32 frames");
        wire::Channel {
            group: octets(self.group.ip()),
            feedback: octets(feedback),
            port: self.group.port().into(),
            feedback_port: self.feedback_port.into(),
            payload: self.payload.into(),
            flags: 0.into(),
            chunk_frames: chunk_frames.into(),
            session: self.session.into(),
            member: self.member.into(),
            start_seq: self.start_seq.into(),
            start_block: self.start_block.map(Into::into),
        }
    }

    pub(super) fn decode(fixed: &wire::Channel) -> Result<Self, FetchError> {
        let field = |field, value| Err(FetchError::Field { kind: "CHANNEL", field, value });
        let group = Ipv6Addr::from(fixed.group).to_canonical();
        if !group.is_multicast() {
            return Err(FetchError::Group(group));
        }
        if fixed.port.get() == 0 || fixed.feedback_port.get() == 0 {
            return field("port", 0);
        }
        if fixed.payload.get() < Self::MIN_PAYLOAD {
            return field("payload", fixed.payload.get().into());
        }
        if !fixed.chunk_frames.get().is_power_of_two() {
            return field("chunk size", fixed.chunk_frames.get().into());
        }
        let feedback = Ipv6Addr::from(fixed.feedback).to_canonical();
        Ok(Self {
            group: SocketAddr::new(group, fixed.port.get()),
            feedback: (!feedback.is_unspecified()).then_some(feedback),
            feedback_port: fixed.feedback_port.get(),
            payload: fixed.payload.get(),
            chunk_frames: PageCount::new(fixed.chunk_frames.get().into()),
            session: fixed.session.get(),
            member: fixed.member.get(),
            start_seq: fixed.start_seq.get(),
            start_block: fixed.start_block.map(Into::into),
        })
    }
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}
