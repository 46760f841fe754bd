//! Goal: clients get the right bytes, by every way there is, and nothing they do to the server harms another. Method: a real
//! server in this process, real sockets, a small blocking client.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::num::NonZeroUsize;

use common::{Client, FRAMES, Got, TestImage, range, serve, wait_for};
use descriptor::fetch::{Capabilities, Class, Delivery, Encoding, ErrorCode, GoodbyeReason, Message, Refusal};
use descriptor::{FrameRange, ImageId};
use memserver::{Compress, RingFeatures};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

fn random_ranges() -> impl Strategy<Value = Vec<Vec<FrameRange>>> {
    let one = (0..FRAMES).prop_flat_map(|start| (Just(start), 1..=(FRAMES - start).min(400)));
    let ranges = prop::collection::vec(one.prop_map(|(start, count)| range(start, count)), 1..5);
    prop::collection::vec(ranges, 1..6)
}

fn check_random(client: &mut Client, class: Class) {
    let mut runner = TestRunner::new(Config { cases: 8, failure_persistence: None, ..Config::default() });
    let client = std::cell::RefCell::new(client);
    runner
        .run(&random_ranges(), |requests| {
            let mut client = client.borrow_mut();
            let tagged: Vec<_> = requests.into_iter().map(|ranges| (client.request(class, &ranges), ranges)).collect();
            client.check_answers(&tagged);
            Ok(())
        })
        .unwrap();
}

#[test]
fn every_frame_is_right_over_tcp_and_unix() {
    let image = TestImage::new(1);
    for features in [RingFeatures::Auto, RingFeatures::Basic] {
        let server = serve(&image, |config| {
            config.ring_features = features;
            config.threads = NonZeroUsize::new(2).unwrap();
        });
        for endpoint in server.endpoints() {
            let mut client = Client::open(endpoint, image.id);
            client.check_fetch(Class::Bulk, &[range(0, FRAMES)]);
            client.check_fetch(Class::Demand, &[range(0, FRAMES)]);
            check_random(&mut client, Class::Demand);
            check_random(&mut client, Class::Bulk);
        }
        let status = server.status();
        assert_eq!(status.rings.len(), 2);
        if features == RingFeatures::Basic {
            assert_eq!(status.rings[0].lacking.len(), 6);
        }
    }
}

#[test]
fn compressed_pages_are_right_and_fewer_bytes() {
    let image = TestImage::new(2);
    let server = serve(&image, |config| config.compress = Compress::Always);
    for endpoint in server.endpoints() {
        let mut client = Client::open_with(endpoint, image.id, Capabilities::LZ4);
        check_random(&mut client, Class::Demand);
        check_random(&mut client, Class::Bulk);
        client.check_fetch(Class::Bulk, &[range(0, FRAMES)]);
        // One page: noise is sent as it is, text is not.
        for (frame, expected) in [(4, Encoding::Raw), (5, Encoding::Lz4), (101, Encoding::Zero)] {
            client.request(Class::Demand, &[range(frame, 1)]);
            assert!(matches!(client.receive(), Got::Pages { encoding, .. } if encoding == expected));
        }
    }
    let mut plain = Client::open(&server.endpoints()[0], image.id);
    plain.request(Class::Demand, &[range(5, 1)]);
    assert!(matches!(plain.receive(), Got::Pages { encoding: Encoding::Raw, .. }));
    let status = server.status();
    assert!(status.bulk.pages_lz4 > 0 && status.demand.pages_lz4 > 0, "{status:?}");
}

#[test]
fn the_wrong_client_is_refused_and_told_so() {
    let image = TestImage::new(3);
    let server = serve(&image, |config| config.session.ticket = Some(b"open sesame".to_vec()));
    let endpoint = &server.endpoints()[0];
    let refused = |ticket: &[u8], id| {
        let (mut client, got) = Client::hello(endpoint, id, Capabilities::default(), ticket);
        let Got::Refused(reason, _) = got else { panic!("{got:?}") };
        assert_eq!(client.receive(), Got::End);
        reason
    };
    let unknown = ImageId::from_bytes([99; 16]);
    assert_eq!(refused(b"", image.id), Refusal::Ticket);
    assert_eq!(refused(b"open sesamf", image.id), Refusal::Ticket);
    assert_eq!(refused(b"wrong", unknown), Refusal::Ticket);
    assert_eq!(refused(b"open sesame", unknown), Refusal::UnknownImage);
    let (mut client, got) = Client::hello(endpoint, image.id, Capabilities::default(), b"open sesame");
    assert!(matches!(got, Got::Welcome(_)));
    client.check_fetch(Class::Demand, &[range(7, 1)]);
    wait_for("counting", || server.status().refused == [("Ticket".to_owned(), 3), ("UnknownImage".to_owned(), 1)]);
}

#[test]
fn strange_clients_do_no_harm() {
    let image = TestImage::new(4);
    let server = serve(&image, |_| {});
    let endpoint = &server.endpoints()[0];
    let mut good = Client::open(endpoint, image.id);

    let mut other_version = Client::connect(endpoint);
    other_version.send(b"SFfe\x09\0\0\0");
    other_version.expect_preamble();
    assert_eq!(other_version.receive(), Got::End);

    let mut garbage = Client::connect(endpoint);
    garbage.send(b"GET / HTTP/1.1\r\n\r\n");
    garbage.expect_preamble();
    assert_eq!(garbage.receive(), Got::End);

    let mut broken = Client::open(endpoint, image.id);
    broken.send(&[0xff; 64]);
    assert_eq!(broken.receive(), Got::Goodbye(GoodbyeReason::Protocol));
    assert_eq!(broken.receive(), Got::End);

    // A message that only servers send, with a length that must not be waited for.
    let mut pages = Client::open(endpoint, image.id);
    pages.send(b"\x0a\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0");
    assert_eq!(pages.receive(), Got::Goodbye(GoodbyeReason::Protocol));

    let mut early = Client::connect(endpoint);
    early.send(b"SFfe\x01\0\0\0");
    early.expect_preamble();
    early.request(Class::Demand, &[range(0, 1)]);
    assert!(matches!(early.receive(), Got::Refused(Refusal::Protocol, _)));

    good.request(Class::Demand, &[range(FRAMES, 1)]);
    assert_eq!(good.receive(), Got::Error(1, ErrorCode::OutOfRange));
    let mut ping = Vec::new();
    Message::Ping.encode(&mut ping);
    good.send(&ping);
    assert_eq!(good.receive(), Got::Pong);
    good.check_fetch(Class::Demand, &[range(0, 10)]);
    wait_for("the strange ones to be gone", || server.status().connections == 1);
}

#[test]
fn a_request_may_come_in_small_pieces_and_many_in_one() {
    let image = TestImage::new(5);
    let server = serve(&image, |_| {});
    for endpoint in server.endpoints() {
        let mut client = Client::open(endpoint, image.id);
        let mut bytes = Vec::new();
        let requests: Vec<_> =
            (1..=40).map(|tag| (1000 + tag, vec![range(tag * 20, 3), range(tag * 20 + 10, 1)])).collect();
        for (tag, ranges) in &requests {
            descriptor::fetch::Request::encode(*tag, Class::Demand, Delivery::Unicast, ranges, &mut bytes);
        }
        let (slowly, rest) = bytes.split_at(150);
        for byte in slowly {
            client.send(&[*byte]);
        }
        client.send(rest);
        client.check_answers(&requests);
    }
}

#[test]
fn more_than_the_limits_ends_the_session() {
    let image = TestImage::new(6);
    let server = serve(&image, |config| {
        config.session.limits.max_pages = 100;
        config.max_sessions = NonZeroUsize::new(2).unwrap();
    });
    let endpoint = &server.endpoints()[1];
    let mut client = Client::open(endpoint, image.id);
    assert_eq!(client.limits.unwrap().max_pages, 100);
    client.check_fetch(Class::Bulk, &[range(0, 100)]);
    client.request(Class::Bulk, &[range(0, 101)]);
    assert_eq!(client.receive(), Got::Goodbye(GoodbyeReason::Protocol));
    drop(client);
    wait_for("the end", || server.status().connections == 0);
    let _first = Client::open(endpoint, image.id);
    let _second = Client::open(endpoint, image.id);
    let (_, got) = Client::hello(endpoint, image.id, Capabilities::default(), b"");
    assert!(matches!(got, Got::Refused(Refusal::Busy, _)), "{got:?}");
}

#[test]
fn who_only_connects_keeps_nobody_out() {
    let image = TestImage::new(11);
    for features in [RingFeatures::Auto, RingFeatures::Basic] {
        let server = serve(&image, |config| {
            config.ring_features = features;
            config.max_sessions = NonZeroUsize::new(2).unwrap();
            config.max_handshakes = NonZeroUsize::new(4).unwrap();
            config.session.ticket = Some(b"open sesame".to_vec());
        });
        for endpoint in server.endpoints() {
            let open = || Client::hello(endpoint, image.id, Capabilities::default(), b"open sesame");
            let (mut first, got) = open();
            assert!(matches!(got, Got::Welcome(_)), "{got:?}");
            let silent: Vec<_> = (0..20).map(|_| Client::connect(endpoint)).collect();
            wait_for("the oldest to be broken off", || server.status().connections <= 5);
            let (mut second, got) = open();
            assert!(matches!(got, Got::Welcome(_)), "{got:?}");
            let (third, got) = open();
            assert!(matches!(got, Got::Refused(Refusal::Busy, _)), "{got:?}");
            for client in [&mut first, &mut second] {
                client.check_fetch(Class::Demand, &[range(7, 1)]);
            }
            drop((first, second, silent, third));
            wait_for("the end of all connections", || server.status().connections == 0);
        }
    }
}

#[test]
fn an_image_in_memory_is_sent_from_registered_buffers() {
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else {
        return println!("SKIPPED: no tmpfs at /dev/shm to keep an image in");
    };
    let image = TestImage::within(7, folder);
    let server = serve(&image, |_| {});
    let mut client = Client::open(&server.endpoints()[0], image.id);
    let ring = || server.status().rings[0].clone();
    if ring().features.is_none_or(|features| !features.zero_copy) || ring().registered_bytes == 0 {
        return println!("SKIPPED: the kernel has no zero-copy sends or lets no image be registered");
    }
    // Enough for the trial of zero-copy sends and what follows after it.
    for _ in 0..5 {
        client.check_fetch(Class::Bulk, &[range(2100, FRAMES - 2100)]);
    }
    wait_for("notifications", || ring().zero_copy_sends >= 4);
    assert!(ring().registered_sends >= 4, "{:?}", ring());
    server.drop_image(image.id).unwrap();
    assert_eq!(client.receive(), Got::Goodbye(GoodbyeReason::ImageGone));
    wait_for("the image to be given up", || ring().registered_bytes == 0);
}

#[test]
fn clients_that_vanish_leave_nothing_behind() {
    let image = TestImage::new(8);
    for features in [RingFeatures::Auto, RingFeatures::Basic] {
        let server = serve(&image, |config| {
            config.ring_features = features;
            config.max_sessions = NonZeroUsize::new(20).unwrap();
        });
        for round in 0..30 {
            let endpoint = &server.endpoints()[round % 2];
            let mut clients: Vec<_> = (0..5).map(|_| Client::connect(endpoint)).collect();
            // One each leaves before the handshake, in the middle of it, after it, and in the middle of an answer.
            clients[1].send(b"SFfe\x01");
            let mut open = Client::open(endpoint, image.id);
            open.request_plenty();
            assert!(matches!(open.receive(), Got::Pages { .. }));
            clients.push(open);
            clients.push(Client::open(endpoint, image.id));
            drop(clients);
            wait_for("the end of all connections", || server.status().connections == 0);
        }
        let status = server.status();
        assert_eq!((status.bulk.queued, status.sessions.len(), status.sessions_total), (0, 0, 60));
    }
}

#[test]
fn requests_of_a_client_that_is_gone_hold_up_nobody() {
    let image = TestImage::new(9);
    for features in [RingFeatures::Auto, RingFeatures::Basic] {
        let server = serve(&image, |config| config.ring_features = features);
        for round in 0..100 {
            let mut client = Client::open(&server.endpoints()[1], image.id);
            // What follows the first answer, which nobody takes, is received after its send has failed.
            for part in 0..=round % 8 {
                let mut bytes = Vec::new();
                for tag in 1..=100 {
                    let frames = [range(2100 + tag, 8)];
                    descriptor::fetch::Request::encode(
                        part * 100 + tag,
                        Class::Demand,
                        Delivery::Unicast,
                        &frames,
                        &mut bytes,
                    );
                }
                client.send(&bytes);
            }
        }
        wait_for("the end of all connections", || server.status().connections == 0);
        Client::open(&server.endpoints()[1], image.id).check_fetch(Class::Demand, &[range(7, 1)]);
    }
}

#[test]
fn an_image_that_cannot_be_read_for_compression_is_taken_out_of_service() {
    let image = TestImage::new(10);
    let server = serve(&image, |config| config.compress = Compress::Always);
    let mut client = Client::open_with(&server.endpoints()[1], image.id, Capabilities::LZ4);
    client.check_fetch(Class::Demand, &[range(5, 1)]);
    std::fs::File::options().write(true).open(image.folder.path().join("raw")).unwrap().set_len(4096).unwrap();
    client.request(Class::Demand, &[range(9, 1)]);
    while !matches!(client.receive(), Got::End) {}
    wait_for("the image to be gone", || server.status().images.is_empty());
}
