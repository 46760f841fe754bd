//! A member whose NACKs and reports are made up.

use std::time::Duration;

use descriptor::fetch::Class;
use fastrand::Rng;
use mcast::wire::{Lack, LackBits, Nack, Report};
use mcast::{BlockId, ChannelParameters, Member, Serial, ShardSet, Start};

/// A message that a liar sends at `now`, knowing its session and about where the sender is.
pub fn lie(now: Duration, channel: &ChannelParameters, member: Member, near: Start, rng: &mut Rng) -> Vec<u8> {
    let mut out = Vec::new();
    // Sometimes it tries to speak for somebody else, or for another session, or to say nothing at all.
    let member = if rng.u8(0..10) == 0 { Member(rng.u64(..)) } else { member };
    let session = if rng.u8(0..10) == 0 { rng.u64(..) } else { channel.session };
    let number = |base: Serial, rng: &mut Rng| match rng.u8(0..4) {
        0 => Serial::new(rng.u32(..)),
        1 => base.plus(rng.u32(0..100)),
        _ => base.minus(rng.u32(0..300)),
    };
    match rng.u8(0..10) {
        0 => out.extend((0..rng.usize(0..200)).map(|_| rng.u8(..))),
        1..=5 => {
            let entry = |rng: &mut Rng| {
                let class = if rng.bool() { Class::Demand } else { Class::Bulk };
                let number = number(near.next_block[mcast::class_index(class)], rng);
                let missing = match rng.u8(0..4) {
                    0 => ShardSet::EMPTY,
                    1 => ShardSet::first(mcast::Geometry::MAX_SHARDS),
                    _ => (0..rng.u8(..)).map(|_| rng.u8(0..mcast::Geometry::MAX_SHARDS)).collect(),
                };
                let need = if rng.u8(0..4) == 0 { Lack::EVERYTHING } else { rng.u8(1..=192) };
                Lack { block: BlockId { class, number }, need, missing }
            };
            let entries: Vec<_> = (0..rng.usize(1..=40)).map(|_| entry(rng)).collect();
            Nack::encode(session, member, &entries, &mut out);
        }
        _ => {
            let chunks = channel.chunks().min(mcast::wire::Report::max_chunks(channel.payload).into()) as u16;
            let bits = vec![0xff; usize::from(chunks).div_ceil(8)];
            let lacks = LackBits { first: if rng.u8(0..4) == 0 { rng.u32(..) } else { 0 }, chunks, bits: &bits };
            let report = Report {
                session,
                member,
                leaving: false,
                next_seq: number(near.seq, rng),
                received: if rng.bool() { rng.u32(..) } else { rng.u32(0..1000) },
                lost: if rng.bool() { rng.u32(..) } else { rng.u32(0..1000) },
                overflow: if rng.u8(0..4) == 0 { rng.u32(..) } else { 0 },
                buffer: if rng.bool() { rng.u32(..) } else { 0 },
                rate_kib: rng.u32(0..100),
                echo: match rng.u8(0..3) {
                    0 => Duration::ZERO,
                    1 => Duration::from_micros(rng.u64(..)),
                    _ => now.mul_f64(rng.f64()),
                },
                held: Duration::from_micros(u64::from(rng.u32(..) >> rng.u32(0..32))),
                missing: if rng.bool() { rng.u32(..) } else { channel.frames.get() as u32 },
                lacks: rng.bool().then_some(lacks),
            };
            report.encode(&mut out);
        }
    }
    out
}
