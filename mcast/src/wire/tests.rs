use std::time::Duration;

use descriptor::Gfn;
use descriptor::fetch::Class;
use proptest::prelude::*;

use super::*;
use crate::{BlockId, ChannelParameters, ChunkSet, Geometry, Member, Serial, ShardSet};

const SESSION: u64 = 0x0102_0304_0506_0708;
const MEMBER: Member = Member(0x1112_1314_1516_1718);
const SESSION_BYTES: &[u8; 8] = b"\x08\x07\x06\x05\x04\x03\x02\x01";
const MEMBER_BYTES: &[u8; 8] = b"\x18\x17\x16\x15\x14\x13\x12\x11";

fn encoded(datagram: &Datagram<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    datagram.encode(&mut out);
    out
}

fn bulk(number: u32) -> BlockId {
    BlockId { class: Class::Bulk, number: Serial::new(number) }
}

fn demand(number: u32) -> BlockId {
    BlockId { class: Class::Demand, number: Serial::new(number) }
}

fn shard(kind: ShardKind) -> ShardDatagram<'static> {
    let gfn = Gfn::new(if kind == ShardKind::Parity { 0 } else { 0x1234 });
    let (seq, block) = (Serial::new(0xffff_fffe), bulk(0x21));
    ShardDatagram { session: SESSION, seq, kind, block, index: 5, count: 190, gfn, payload: b"page" }
}

fn pulse() -> Pulse {
    Pulse {
        kind: PulseKind::End,
        session: SESSION,
        next_seq: Serial::new(9),
        bursting: true,
        endgame: true,
        next_block: [Serial::new(1), Serial::new(2)],
        oldest_block: [Serial::new(3), Serial::new(4)],
        members: 5,
        round_trip: Duration::from_micros(6),
        report_interval: Duration::from_millis(10),
        report_bytes: 7,
        burst: 8,
        sent: Duration::from_micros(0x1_0000_0000),
    }
}

fn report(lacks: Option<LackBits<'_>>) -> Report<'_> {
    Report {
        session: SESSION,
        member: MEMBER,
        leaving: false,
        next_seq: Serial::new(1),
        received: 2,
        lost: 3,
        overflow: 4,
        buffer: 5,
        rate_kib: 6,
        echo: Duration::from_micros(7),
        held: Duration::from_micros(8),
        missing: 10,
        lacks,
    }
}

#[test]
fn golden_shards() {
    let golden = |kind: &[u8], gfn: &[u8]| {
        [b"\x01", kind, b"\x05\xbe\xfe\xff\xff\xff", SESSION_BYTES, b"\x21\0\0\0", gfn, b"page"].concat()
    };
    assert_eq!(encoded(&Datagram::Shard(shard(ShardKind::Data))), golden(b"\x81", b"\x34\x12\0\0"));
    assert_eq!(encoded(&Datagram::Shard(shard(ShardKind::Parity))), golden(b"\x83", b"\0\0\0\0"));
    let repair = ShardDatagram { block: demand(0x21), ..shard(ShardKind::Repair) };
    assert_eq!(encoded(&Datagram::Shard(repair)), golden(b"\x02", b"\x34\x12\0\0"));
}

#[test]
fn golden_pulse() {
    let head = b"\x01\x05\x03\0\x09\0\0\0";
    let body = b"\x01\0\0\0\x02\0\0\0\x03\0\0\0\x04\0\0\0\x05\0\0\0\x06\0\0\0\x10\x27\0\0\x07\0\0\0\x08\0\0\0\0\0\0\0";
    let expected = [&head[..], SESSION_BYTES, body, b"\0\0\0\0\x01\0\0\0"].concat();
    assert_eq!(encoded(&Datagram::Pulse(pulse())), expected);
    let idle = Pulse { kind: PulseKind::Heartbeat, bursting: false, endgame: false, ..pulse() };
    assert_eq!(encoded(&Datagram::Pulse(idle))[..4], *b"\x01\x04\0\0");
}

#[test]
fn golden_confirm() {
    let entries = [
        Confirmation { block: bulk(1), answer: Answer::Parity(9) },
        Confirmation { block: demand(2), answer: Answer::Originals([0, 9].into_iter().collect()) },
        Confirmation { block: bulk(3), answer: Answer::Gone },
    ];
    let mut out = Vec::new();
    Confirm::encode(SESSION, Serial::new(4), &entries, &mut out);
    let mut expected = [&b"\x01\x06\0\x03\x04\0\0\0"[..], SESSION_BYTES].concat();
    for entry in [b"\x01\0\0\0\x01\x01\x09\0\0\0", b"\x02\0\0\0\0\x02\x02\0\x01\x02", b"\x03\0\0\0\x01\x03\0\0\0\0"] {
        expected.extend(entry);
        expected.extend([0; 22]);
    }
    assert_eq!(out, expected);
    let Ok(Datagram::Confirm(confirm)) = Datagram::decode(&out) else { panic!("{:?}", Datagram::decode(&out)) };
    assert_eq!((confirm.session, confirm.next_seq), (SESSION, Serial::new(4)));
    assert_eq!(confirm.entries().collect::<Vec<_>>(), entries);
}

#[test]
fn golden_nack() {
    let entries = [
        Lack { block: demand(1), need: 2, missing: [8, 191].into_iter().collect() },
        Lack { block: bulk(3), need: Lack::EVERYTHING, missing: ShardSet::EMPTY },
    ];
    let mut out = Vec::new();
    Nack::encode(SESSION, MEMBER, &entries, &mut out);
    let head = [&b"\x01\x07\0\x02\0\0\0\0"[..], SESSION_BYTES, MEMBER_BYTES].concat();
    let mut first = b"\x01\0\0\0\0\x02\0\0\0\x01".to_vec();
    first.resize(31, 0);
    first.push(0x80);
    let mut second = b"\x03\0\0\0\x01\xff".to_vec();
    second.resize(32, 0);
    assert_eq!(out, [head, first, second].concat());
    let Ok(Datagram::Nack(nack)) = Datagram::decode(&out) else { panic!("{:?}", Datagram::decode(&out)) };
    assert_eq!((nack.session, nack.member), (SESSION, MEMBER));
    assert_eq!(nack.entries().collect::<Vec<_>>(), entries);
}

#[test]
fn golden_report() {
    let mut chunks = ChunkSet::new(10);
    [0, 9].into_iter().for_each(|chunk| chunks.insert(chunk));
    let lacks = LackBits { first: 9, ..LackBits::of(&chunks) };
    let numbers = b"\x01\0\0\0\x02\0\0\0\x03\0\0\0\x04\0\0\0\x05\0\0\0\x06\0\0\0\x07\0\0\0\0\0\0\0\x08\0\0\0";
    let golden = |flags: &[u8], chunks: &[u8], bits: &[u8]| {
        let head = [b"\x01\x08", flags, b"\0\0\0\0\0", SESSION_BYTES, MEMBER_BYTES].concat();
        [&head[..], numbers, chunks, b"\x0a\0\0\0", &[0; 8], bits].concat()
    };
    let expected = golden(b"\x01", b"\x09\0\0\0\x0a\0\0\0", b"\x01\x02");
    assert_eq!(encoded(&Datagram::Report(report(Some(lacks)))), expected);
    let leaving = Report { leaving: true, ..report(None) };
    assert_eq!(encoded(&Datagram::Report(leaving)), golden(b"\x02", &[0; 8], b""));
}

fn one_of_each() -> Vec<Vec<u8>> {
    let mut confirm = Vec::new();
    let confirmation = Confirmation { block: bulk(1), answer: Answer::Parity(63) };
    Confirm::encode(SESSION, Serial::new(4), &[confirmation; MAX_ENTRIES], &mut confirm);
    let mut nack = Vec::new();
    Nack::encode(SESSION, MEMBER, &[Lack { block: demand(1), need: 192, missing: ShardSet::first(192) }], &mut nack);
    let chunks = ChunkSet::full(ChunkSet::MAX.into());
    let report = Datagram::Report(report(Some(LackBits::of(&chunks))));
    vec![encoded(&Datagram::Pulse(pulse())), confirm, nack, encoded(&report)]
}

#[test]
fn messages_but_shards_may_grow_and_not_shrink() {
    for bytes in one_of_each() {
        let datagram = Datagram::decode(&bytes).unwrap();
        let longer = [&bytes[..], b"of a later minor version"].concat();
        assert_eq!(Datagram::decode(&longer), Ok(datagram));
        assert_eq!(encoded(&datagram), bytes);
        for end in 0..bytes.len() {
            assert!(matches!(Datagram::decode(&bytes[..end]), Err(WireError::Length { .. })), "{end} of {datagram:?}");
        }
    }
    let shard = encoded(&Datagram::Shard(shard(ShardKind::Data)));
    for end in 0..=HEAD {
        assert!(matches!(Datagram::decode(&shard[..end]), Err(WireError::Length { .. })), "{end} bytes of a shard");
    }
}

#[test]
fn unknown_flags_and_reserved_bytes_make_no_difference() {
    let [pulse, confirm, nack, report] = <[Vec<u8>; 4]>::try_from(one_of_each()).unwrap();
    for (bytes, at, value) in [
        (&pulse, 2, 0xff),
        (&pulse, 52, 1),
        (&confirm, 2, 0xff),
        (&confirm, 16 + 7, 1),
        (&nack, 4, 1),
        (&nack, 24 + 6, 1),
        (&report, 2, 0xfd),
        (&report, 24 + 50, 1),
    ] {
        let mut changed = bytes.clone();
        changed[at] = value;
        assert_eq!(Datagram::decode(&changed), Datagram::decode(bytes), "byte {at}");
    }
}

#[test]
fn malformed_datagrams_name_their_fault() {
    let broken = |bytes: &[u8], changes: &[(usize, u8)]| {
        let mut bytes = bytes.to_vec();
        changes.iter().for_each(|(at, value)| bytes[*at] = *value);
        Datagram::decode(&bytes).unwrap_err().to_string()
    };
    let data = encoded(&Datagram::Shard(shard(ShardKind::Data)));
    assert_eq!(broken(&data, &[(0, 2)]), "datagram of version 2, this side speaks 1");
    assert_eq!(broken(&data, &[(1, 9)]), "datagram of unknown kind 0x09");
    assert_eq!(broken(&data, &[(1, 0x84)]), "datagram of unknown kind 0x84");
    assert_eq!(broken(&data, &[(2, 190)]), "DATA datagram has 190 as its shard index");
    assert_eq!(broken(&data, &[(1, 0x83), (2, 63)]), "PARITY datagram has 63 as its shard index");
    assert_eq!(broken(&data, &[(3, 0)]), "DATA datagram has 0 as its shard count");
    assert_eq!(broken(&data, &[(3, 193)]), "DATA datagram has 193 as its shard count");
    assert_eq!(broken(&data[..HEAD], &[]), "DATA datagram of 24 bytes does not add up");
    assert_eq!(broken(&[&data[..HEAD], &[0; 61441]].concat(), &[]), "DATA datagram of 61465 bytes does not add up");
    let [_, confirm, nack, report] = <[Vec<u8>; 4]>::try_from(one_of_each()).unwrap();
    assert_eq!(broken(&confirm, &[(3, 0)]), "CONFIRM datagram has 0 as its number of entries");
    assert_eq!(broken(&confirm, &[(3, 41)]), "CONFIRM datagram has 41 as its number of entries");
    assert_eq!(broken(&confirm, &[(16 + 4, 2)]), "CONFIRM datagram has 2 as its class");
    assert_eq!(broken(&confirm, &[(16 + 5, 4)]), "CONFIRM datagram has 4 as its kind of answer");
    assert_eq!(broken(&confirm, &[(16 + 6, 64)]), "CONFIRM datagram has 64 as its count of parity rows");
    assert_eq!(broken(&confirm, &[(16 + 5, 2)]), "CONFIRM datagram has 63 as its count of originals");
    assert_eq!(broken(&nack, &[(3, 2)]), "NACK datagram of 56 bytes does not add up");
    assert_eq!(broken(&nack, &[(24 + 5, 0)]), "NACK datagram has 0 as its count of shards");
    assert_eq!(broken(&nack, &[(24 + 5, 193)]), "NACK datagram has 193 as its count of shards");
    assert_eq!(broken(&report, &[(24 + 40, 1)]), "REPORT datagram has 8193 as its count of chunks");
}

#[test]
fn control_messages_need_no_larger_path_than_shards() {
    for payload in [ChannelParameters::MIN_PAYLOAD, 1428, 1448, 8948, ChannelParameters::MAX_PAYLOAD] {
        let path = HEAD + usize::from(payload);
        assert!(max_entries(payload) >= 16);
        assert!(size_of::<MemberHeader>() + max_entries(payload) * size_of::<LackEntry>() <= path);
        let bits = usize::from(Report::max_chunks(payload)).div_ceil(8);
        assert!(size_of::<MemberHeader>() + size_of::<ReportBody>() + bits <= path);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn foreign_bytes_never_panic(
        kind in 0..10_u8,
        bulk: bool,
        small: bool,
        mut bytes in proptest::collection::vec(any::<u8>(), 0..1500),
    ) {
        if let [version, first, rest @ ..] = &mut bytes[..] {
            (*version, *first) = (VERSION, kind | if bulk { 0x80 } else { 0 });
            if small {
                rest.iter_mut().for_each(|byte| *byte %= 4);
            }
        }
        if let Ok(datagram) = Datagram::decode(&bytes) {
            // Reserved bytes and unknown flags are ignored, so what was understood is compared, not the bytes.
            let again = encoded(&datagram);
            prop_assert!(again.len() <= bytes.len());
            prop_assert_eq!(Datagram::decode(&again), Ok(datagram));
        }
    }

    #[test]
    fn shards_come_back(seq: u32, number: u32, index: u8, count in 1..=192_u8, gfn: u32, payload in proptest::collection::vec(any::<u8>(), 1..100)) {
        for (kind, below) in [(ShardKind::Data, count), (ShardKind::Repair, count), (ShardKind::Parity, Geometry::MAX_PARITY)] {
            let gfn = Gfn::new(if kind == ShardKind::Parity { 0 } else { gfn.into() });
            let (seq, block) = (Serial::new(seq), bulk(number));
            let shard = ShardDatagram { session: SESSION, seq, kind, block, index: index % below, count, gfn, payload: &payload };
            let bytes = encoded(&Datagram::Shard(shard));
            prop_assert_eq!(Datagram::decode(&bytes), Ok(Datagram::Shard(shard)));
        }
    }
}
