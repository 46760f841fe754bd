use proptest::prelude::*;

use super::*;
use crate::image::Extent;

fn encoded(message: &Message<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

fn range(start: u64, length: u64) -> FrameRange {
    FrameRange::new(Gfn::new(start), PageCount::new(length))
}

fn hello() -> Message<'static> {
    let image = ImageId::from_bytes(*b"0123456789abcdef");
    Message::Hello(Hello { image, capabilities: Capabilities::LZ4, ticket: b"secret" })
}

#[test]
fn golden_preamble() {
    let mut out = Vec::new();
    Preamble.encode(&mut out);
    assert_eq!(out, b"SFfe\x01\0\x02\0");
    assert_eq!(decode_preamble(&out), Ok(Some((VERSION, 8))));
    assert_eq!(decode_preamble(&out[..7]), Ok(None));
    assert_eq!(decode_preamble(b"GET / HT"), Err(FetchError::Magic(*b"GET ")));
    assert_eq!(
        decode_preamble(b"SFfe\x01\0\0\0"),
        Ok(Some((Version { major: 1, minor: 0 }, 8))),
        "minor 0 goes on working"
    );
    let error = decode_preamble(b"SFfe\x02\0\x05\0").unwrap_err().to_string();
    assert_eq!(error, "peer speaks version 2.5 of the fetch protocol, this side 1.2: install matching releases");
}

#[test]
fn golden_hello() {
    let expected = b"\x01\0\0\0\x1e\0\0\0\0\0\0\0\0\0\0\x000123456789abcdef\x01\0\0\0\x06\0\0\0secret";
    assert_eq!(encoded(&hello()), expected);
}

#[test]
fn golden_welcome() {
    let welcome = Message::Welcome(Welcome {
        image: ImageId::from_bytes(*b"0123456789abcdef"),
        frames: PageCount::new(0x40000),
        capabilities: Capabilities::LOCAL,
        limits: Limits { max_requests: 64, max_pages: 8192, idle_timeout_ms: 30_000 },
    });
    let expected = b"\x02\0\0\0\x28\0\0\0\0\0\0\0\0\0\0\x000123456789abcdef\
        \0\0\x04\0\0\0\0\0\x02\0\0\0\x40\0\0\0\0\x20\0\0\x30\x75\0\0";
    assert_eq!(encoded(&welcome), expected);
    assert_eq!(decode(expected), Ok(Some((welcome, expected.len()))));
}

#[test]
fn golden_request() {
    let mut out = Vec::new();
    Request::encode(7, Class::Bulk, Delivery::Unicast, &[range(0x1234, 5)], &mut out);
    let expected = b"\x04\x01\0\0\x10\0\0\0\x07\0\0\0\0\0\0\0\x34\x12\0\0\0\0\0\0\x05\0\0\0\0\0\0\0";
    assert_eq!(out, expected);
    let Ok(Some((Message::Request(request), 32))) = decode(&out) else { panic!("{:?}", decode(&out)) };
    assert_eq!((request.tag, request.class, request.delivery), (7, Class::Bulk, Delivery::Unicast));
    assert_eq!(request.ranges().collect::<Vec<_>>(), [range(0x1234, 5)]);
    out.clear();
    Request::encode(7, Class::Demand, Delivery::Multicast, &[range(0x1234, 5)], &mut out);
    assert_eq!((out[1], &out[2..]), (2, &expected[2..]));
    let Ok(Some((Message::Request(request), 32))) = decode(&out) else { panic!("{:?}", decode(&out)) };
    assert_eq!((request.class, request.delivery), (Class::Demand, Delivery::Multicast));
}

#[test]
fn golden_pages() {
    let zero = PageRun { tag: 9, frames: range(3, 1000), encoding: Encoding::Zero, last: true, payload: &[] };
    let expected = b"\x05\x01\0\0\x10\0\0\0\x09\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\xe8\x03\0\0\x01\0\0\0";
    assert_eq!(encoded(&Message::Pages(zero)), expected);
    assert_eq!(decode(expected), Ok(Some((Message::Pages(zero), 32))));
}

fn channel() -> ChannelOffer {
    ChannelOffer {
        group: "239.1.2.3:7071".parse().unwrap(),
        feedback: None,
        feedback_port: 0x1234,
        payload: 1448,
        chunk_frames: PageCount::new(256),
        session: 0x0102_0304_0506_0708,
        member: 0x1112_1314_1516_1718,
        start_seq: 0xffff_fffe,
        start_block: [3, 0x0400_0000],
    }
}

#[test]
fn golden_channel() {
    let offer = Message::Channel(channel());
    let expected = b"\x0b\0\0\0\x48\0\0\0\0\0\0\0\0\0\0\0\
        \0\0\0\0\0\0\0\0\0\0\xff\xff\xef\x01\x02\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\
        \x9f\x1b\x34\x12\xa8\x05\0\0\0\x01\0\0\x08\x07\x06\x05\x04\x03\x02\x01\
        \x18\x17\x16\x15\x14\x13\x12\x11\xfe\xff\xff\xff\x03\0\0\0\0\0\0\x04";
    assert_eq!(encoded(&offer), expected);
    assert_eq!(decode(expected), Ok(Some((offer, expected.len()))));
    let gone = Message::ChannelGone(ChannelGoneReason::TooSlow, "slow");
    let expected = b"\x0c\0\0\0\x08\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0slow";
    assert_eq!(encoded(&gone), expected);
    assert_eq!(decode(expected), Ok(Some((gone, expected.len()))));
}

#[test]
fn a_channel_that_cannot_be_is_refused() {
    let bytes = encoded(&Message::Channel(channel()));
    let broken = |at: usize, values: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + values.len()].copy_from_slice(values);
        decode(&bytes).unwrap_err().to_string()
    };
    assert_eq!(broken(28, &[10]), "CHANNEL message has 10.1.2.3 as its group, which is not a multicast address");
    assert_eq!(broken(48, &[0, 0]), "CHANNEL message has 0 as its port");
    assert_eq!(broken(50, &[0, 0]), "CHANNEL message has 0 as its port");
    assert_eq!(broken(52, &[0xff, 1]), "CHANNEL message has 511 as its payload");
    assert_eq!(broken(56, &[3]), "CHANNEL message has 259 as its chunk size");
    assert_eq!(broken(4, &[71]), "CHANNEL message with a body of 71 bytes does not add up");
}

#[test]
fn golden_touched_and_order() {
    let mut out = Vec::new();
    Touched::encode(&[range(0x1234, 5)], true, true, &mut out);
    let ranges = b"\x34\x12\0\0\0\0\0\0\x05\0\0\0\0\0\0\0";
    assert_eq!(out, [&b"\x0d\x03\0\0\x10\0\0\0\0\0\0\0\0\0\0\0"[..], ranges].concat());
    let Ok(Some((Message::Touched(touched), 32))) = decode(&out) else { panic!("{:?}", decode(&out)) };
    assert_eq!((touched.last, touched.declined, touched.ranges.iter().collect()), (true, true, vec![range(0x1234, 5)]));
    out.clear();
    OrderPart::encode(&[range(0x1234, 5)], &mut out);
    assert_eq!(out, [&b"\x0e\x01\0\0\x10\0\0\0\0\0\0\0\0\0\0\0"[..], ranges].concat());
    let Ok(Some((Message::Order(part), 32))) = decode(&out) else { panic!("{:?}", decode(&out)) };
    assert_eq!((part.last, part.ranges.iter().collect()), (true, vec![range(0x1234, 5)]));
}

#[test]
fn orders_and_reports_go_in_parts() {
    let ranges: Vec<FrameRange> = (0..600).map(|n| range(n * 3, 2)).chain([range(1 << 33, 1 << 33)]).collect();
    let mut out = Vec::new();
    Touched::encode(&ranges, false, false, &mut out);
    let (mut rest, mut seen, mut parts) = (&out[..], Vec::new(), 0);
    while let Some((Message::Touched(touched), length)) = decode(rest).unwrap() {
        assert!(!touched.last);
        seen.extend(touched.ranges.iter());
        (rest, parts) = (&rest[length..], parts + 1);
    }
    let frames = |ranges: &[FrameRange]| ranges.iter().map(|range| range.count()).sum::<PageCount>();
    assert_eq!((parts, seen.len(), frames(&seen)), (3, 603, frames(&ranges)));
    out.clear();
    OrderPart::encode(&ranges[..257], &mut out);
    let (Message::Order(first), length) = decode(&out).unwrap().unwrap() else { panic!("no order") };
    let (Message::Order(second), _) = decode(&out[length..]).unwrap().unwrap() else { panic!("no order") };
    assert_eq!((first.last, first.ranges.iter().len(), second.last, second.ranges.iter().len()), (false, 256, true, 1));
    out.clear();
    OrderPart::encode(&[], &mut out);
    assert_eq!(out, b"\x0e\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "an empty order is one message");
    out.clear();
    Touched::encode(&[], false, false, &mut out);
    assert!(out.is_empty(), "nothing to report is no message");
    let error = decode(b"\x0e\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0").unwrap_err().to_string();
    assert_eq!(error, "ORDER message with a body of 0 bytes does not add up");
}

#[test]
fn every_message_comes_back() {
    let page = [0xa5; 2 * PAGE_SIZE as usize];
    let raw = PageRun { tag: 1, frames: range(8, 2), encoding: Encoding::Raw, last: false, payload: &page };
    let extent = Extent { frames: range(5, 6), file: 1, offset: 4104, stride: 4104 };
    let messages = [
        hello(),
        Message::Refused(Refusal::Ticket, "the ticket is wrong"),
        Message::Pages(raw),
        Message::Pages(PageRun { encoding: Encoding::Lz4, payload: &page[..100], ..raw }),
        Message::Error(4, ErrorCode::OutOfRange, "frame 0x9 of 8"),
        Message::Ping,
        Message::Pong,
        Message::Goodbye(GoodbyeReason::Draining, "bye"),
        Message::Channel(channel()),
        Message::Channel(ChannelOffer {
            group: "[ff15::1]:9".parse().unwrap(),
            feedback: Some("fe80::1".parse().unwrap()),
            ..channel()
        }),
        Message::Channel(ChannelOffer { feedback: Some("10.0.0.1".parse().unwrap()), ..channel() }),
        Message::ChannelGone(ChannelGoneReason::Closed, "the image is no longer served"),
        Message::Image(LocalImage { files: 2, extents: vec![extent] }),
    ];
    for message in messages {
        let bytes = encoded(&message);
        for end in 0..bytes.len() {
            assert_eq!(decode(&bytes[..end]), Ok(None), "{end} bytes of {message:?}");
        }
        assert_eq!(decode(&bytes), Ok(Some((message, bytes.len()))));
    }
}

#[test]
fn malformed_messages_name_their_fault() {
    let mut request = Vec::new();
    Request::encode(7, Class::Demand, Delivery::Unicast, &[range(1, 1)], &mut request);
    let broken = |at: usize, value: u8| {
        let mut bytes = request.clone();
        bytes[at] = value;
        decode(&bytes).unwrap_err().to_string()
    };
    assert_eq!(broken(0, 99), "message of unknown kind 99");
    assert_eq!(broken(7, 1), "REQUEST message of 16777232 bytes is longer than the 4096 allowed");
    assert_eq!(broken(4, 15), "REQUEST message with a body of 15 bytes does not add up");
    assert_eq!(broken(8, 0), "REQUEST message has 0 as its tag");
    assert_eq!(broken(24, 0), "REQUEST message has 0 as its page count");
    assert!(broken(23, 0xff).ends_with("as its frame number"));
}

#[test]
fn long_texts_are_cut_at_a_character() {
    let text = "é".repeat(400);
    assert_eq!(Message::text(&text).len(), MAX_TEXT);
    let refusal = Message::Refused(Refusal::Busy, Message::text(&text[..]));
    assert!(decode(&encoded(&refusal)).is_ok());
}

proptest! {
    #[test]
    fn foreign_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0..16u8, body in 0..200u32) {
        if bytes.len() >= 8 {
            bytes[0] = kind;
            bytes[4..8].copy_from_slice(&body.to_le_bytes());
        }
        if let Ok(Some((message, length))) = decode(&bytes) {
            prop_assert!(length <= bytes.len());
            // Reserved bits and unknown flags are ignored, so compare what was understood, not the bytes.
            let again = encoded(&message);
            prop_assert_eq!(decode(&again), Ok(Some((message, again.len()))));
        }
    }
}
