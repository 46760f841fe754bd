//! What the messages' encoders and decoders share.

use std::time::Duration;

use descriptor::fetch::Class;
use zerocopy::{FromBytes, Immutable, IntoBytes, Unaligned};

use super::structs::{MemberHeader, SenderHeader};
use super::{MAX_ENTRIES, VERSION, WireError};
use crate::{BlockId, Member, Serial};

pub(super) fn sender_header(kind: u8, flags: u8, entries: u8, session: u64, seq: Serial) -> SenderHeader {
    SenderHeader { version: VERSION, kind, flags, entries, seq: seq.get().into(), session: session.into() }
}

pub(super) fn member_header(kind: u8, flags: u8, entries: u8, session: u64, member: Member) -> MemberHeader {
    let (session, member) = (session.into(), member.0.into());
    MemberHeader { version: VERSION, kind, flags, entries, reserved: 0.into(), session, member }
}

pub(super) fn push(value: impl IntoBytes + Immutable, out: &mut Vec<u8>) {
    out.extend_from_slice(value.as_bytes());
}

pub(super) fn count(entries: usize) -> u8 {
    assert!((1..=MAX_ENTRIES).contains(&entries), "{entries} entries in a datagram");
    entries as u8
}

pub(super) fn split<'a, T: FromBytes>(kind: &'static str, bytes: &'a [u8]) -> Result<(T, &'a [u8]), WireError> {
    split_body(kind, bytes, bytes)
}

pub(super) fn split_body<'a, T: FromBytes>(
    kind: &'static str,
    whole: &[u8],
    rest: &'a [u8],
) -> Result<(T, &'a [u8]), WireError> {
    T::read_from_prefix(rest).map_err(|_| WireError::Length { kind, length: whole.len() })
}

pub(super) fn split_entries<'a, T: FromBytes + Immutable + Unaligned>(
    kind: &'static str,
    count: u8,
    whole: &[u8],
    rest: &'a [u8],
) -> Result<&'a [T], WireError> {
    if !(1..=MAX_ENTRIES).contains(&usize::from(count)) {
        return Err(field(kind, "number of entries", count));
    }
    let (entries, _) = <[T]>::ref_from_prefix_with_elems(rest, count.into())
        .map_err(|_| WireError::Length { kind, length: whole.len() })?;
    Ok(entries)
}

pub(super) fn block(kind: &'static str, class: u8, number: u32) -> Result<BlockId, WireError> {
    let class = match class {
        0 => Class::Demand,
        1 => Class::Bulk,
        _ => return Err(field(kind, "class", class)),
    };
    Ok(BlockId { class, number: number.into() })
}

pub(super) fn field(kind: &'static str, field: &'static str, value: impl Into<u64>) -> WireError {
    WireError::Field { kind, field, value: value.into() }
}

pub(super) fn bytes_for(chunks: u16) -> usize {
    usize::from(chunks).div_ceil(8)
}

pub(super) fn micros(span: Duration) -> u32 {
    u32::try_from(span.as_micros()).unwrap_or(u32::MAX)
}
