use std::time::Duration;

use super::WireError;
use super::codec::{micros, push, sender_header, split, split_body};
use super::structs::{PulseBody, SenderHeader, flag, kind};
use crate::Serial;

/// Which of the two messages a [`Pulse`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PulseKind {
    /// HEARTBEAT: the sender is there.
    Heartbeat,
    /// END: a burst of bulk has ended, and members report what they lack.
    End,
}

/// What the sender says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pulse {
    /// HEARTBEAT or END.
    pub kind: PulseKind,
    /// The session of the sender.
    pub session: u64,
    /// The number of the next datagram with a shard.
    pub next_seq: Serial,
    /// A burst of bulk is under way.
    pub bursting: bool,
    /// What is lacking is to be fetched by unicast.
    pub endgame: bool,
    /// The next block of each class, see [`crate::class_index`]: all before it were sent.
    pub next_block: [Serial; 2],
    /// The oldest block of each class that can be repaired.
    pub oldest_block: [Serial; 2],
    /// Members of the channel.
    pub members: u32,
    /// The round trip of the group; at most 71 minutes, as the other spans of 32 bits.
    pub round_trip: Duration,
    /// The time between two reports of a member.
    pub report_interval: Duration,
    /// Bytes after which a member reports early; zero for never.
    pub report_bytes: u32,
    /// The number of the burst.
    pub burst: u32,
    /// When this was sent, by the sender's clock.
    pub sent: Duration,
}

impl Pulse {
    /// Appends the message. Spans of time are cut to microseconds, and to what 32 bits of them hold.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let kind = match self.kind {
            PulseKind::Heartbeat => kind::HEARTBEAT,
            PulseKind::End => kind::END,
        };
        let flags = if self.bursting { flag::BURST } else { 0 } | if self.endgame { flag::ENDGAME } else { 0 };
        push(sender_header(kind, flags, 0, self.session, self.next_seq), out);
        let body = PulseBody {
            next_block: self.next_block.map(|number| number.get().into()),
            oldest_block: self.oldest_block.map(|number| number.get().into()),
            members: self.members.into(),
            round_trip_us: micros(self.round_trip).into(),
            report_us: micros(self.report_interval).into(),
            report_bytes: self.report_bytes.into(),
            burst: self.burst.into(),
            reserved: 0.into(),
            sent_us: (self.sent.as_micros() as u64).into(),
        };
        push(body, out);
    }

    pub(super) fn decode(kind: PulseKind, bytes: &[u8]) -> Result<Self, WireError> {
        let name = if kind == PulseKind::Heartbeat { "HEARTBEAT" } else { "END" };
        let (header, rest) = split::<SenderHeader>(name, bytes)?;
        let (body, _) = split_body::<PulseBody>(name, bytes, rest)?;
        Ok(Self {
            kind,
            session: header.session.get(),
            next_seq: header.seq.get().into(),
            bursting: header.flags & flag::BURST != 0,
            endgame: header.flags & flag::ENDGAME != 0,
            next_block: body.next_block.map(|number| number.get().into()),
            oldest_block: body.oldest_block.map(|number| number.get().into()),
            members: body.members.get(),
            round_trip: Duration::from_micros(body.round_trip_us.get().into()),
            report_interval: Duration::from_micros(body.report_us.get().into()),
            report_bytes: body.report_bytes.get(),
            burst: body.burst.get(),
            sent: Duration::from_micros(body.sent_us.get()),
        })
    }
}
