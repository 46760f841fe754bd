use zerocopy::FromBytes;

use super::structs::{MemberHeader, SenderHeader, ShardHeader, kind};
use super::{Confirm, Nack, Pulse, PulseKind, Report, ShardDatagram, ShardKind, VERSION, WireError};

/// A datagram, borrowing from the buffer that it was received in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Datagram<'a> {
    /// DATA, REPAIR or PARITY: a shard.
    Shard(ShardDatagram<'a>),
    /// HEARTBEAT or END.
    Pulse(Pulse),
    /// CONFIRM: how NACKs are answered.
    Confirm(Confirm<'a>),
    /// NACK: what a member asks for again.
    Nack(Nack<'a>),
    /// REPORT: how a member fares.
    Report(Report<'a>),
}

impl<'a> Datagram<'a> {
    /// The datagram that `bytes` are.
    ///
    /// # Errors
    /// When they are of another version or break the protocol.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, WireError> {
        let &[version, raw_kind, ..] = bytes else {
            return Err(WireError::Length { kind: "a", length: bytes.len() });
        };
        if version != VERSION {
            return Err(WireError::Version(version));
        }
        match raw_kind {
            kind::HEARTBEAT => Pulse::decode(PulseKind::Heartbeat, bytes).map(Datagram::Pulse),
            kind::END => Pulse::decode(PulseKind::End, bytes).map(Datagram::Pulse),
            kind::CONFIRM => Confirm::decode(bytes).map(Datagram::Confirm),
            kind::NACK => Nack::decode(bytes).map(Datagram::Nack),
            kind::REPORT => Report::decode(bytes).map(Datagram::Report),
            _ => match raw_kind & !kind::BULK {
                kind::DATA => ShardDatagram::decode(ShardKind::Data, bytes).map(Datagram::Shard),
                kind::REPAIR => ShardDatagram::decode(ShardKind::Repair, bytes).map(Datagram::Shard),
                kind::PARITY => ShardDatagram::decode(ShardKind::Parity, bytes).map(Datagram::Shard),
                _ => Err(WireError::Kind(raw_kind)),
            },
        }
    }

    /// The session that `bytes` belong to if they are a datagram, which is not looked at: for whoever has to choose who decodes
    /// it.
    pub fn session_of(bytes: &[u8]) -> Option<u64> {
        MemberHeader::ref_from_prefix(bytes).ok().map(|(head, _)| head.session.get())
    }

    /// The session that it belongs to.
    pub fn session(&self) -> u64 {
        match self {
            Datagram::Shard(shard) => shard.session,
            Datagram::Pulse(pulse) => pulse.session,
            Datagram::Confirm(confirm) => confirm.session,
            Datagram::Nack(nack) => nack.session,
            Datagram::Report(report) => report.session,
        }
    }

    /// Appends the datagram.
    ///
    /// # Panics
    /// When a number is beyond what the wire allows.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Datagram::Shard(shard) => {
                out.extend_from_slice(&shard.head());
                out.extend_from_slice(shard.payload);
            }
            Datagram::Pulse(pulse) => pulse.encode(out),
            Datagram::Confirm(confirm) => {
                let entries: Vec<_> = confirm.entries().collect();
                Confirm::encode(confirm.session, confirm.next_seq, &entries, out);
            }
            Datagram::Nack(nack) => {
                let entries: Vec<_> = nack.entries().collect();
                Nack::encode(nack.session, nack.member, &entries, out);
            }
            Datagram::Report(report) => report.encode(out),
        }
    }
}

// It stands at the same place in all datagrams, see `Datagram::session_of`; a shorter one than a member's head is none.
const _: () = {
    assert!(std::mem::offset_of!(ShardHeader, session) == std::mem::offset_of!(MemberHeader, session));
    assert!(std::mem::offset_of!(SenderHeader, session) == std::mem::offset_of!(MemberHeader, session));
};
