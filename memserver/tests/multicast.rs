//! Goal: one answer serves all clones of an image, and nobody who is out of reach of the group notices more than that it is
//! slower. Method: a server in this process, and clients of a few lines over its two kinds of connection, whose channels go
//! over the loopback interface. Each test has a group of its own.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
mod member;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::num::NonZeroUsize;
use std::process::Command;
use std::time::Duration;

use common::{Client, FRAMES, Got, TestImage, range, serve, wait_for};
use descriptor::Endpoint;
use descriptor::fetch::{Capabilities, ChannelGoneReason, Class, Delivery};
use mcast::wire::ShardKind;
use mcast_socket::Group;
use member::Member;
use member::clone::CloneMember;
use memserver::{MulticastConfig, ServeConfig, ServeError, Server};

/// Longer than the sender takes two requests for the same page as one.
const LATER: Duration = Duration::from_millis(300);

const MULTICAST: Capabilities = Capabilities::MULTICAST;

fn group(number: u8) -> Group {
    format!("239.255.72.{number}:{}%lo", 21_000 + u16::from(number)).parse().unwrap()
}

fn serve_group(image: &TestImage, number: u8, change: impl FnOnce(&mut MulticastConfig)) -> Server {
    let mut mcast = MulticastConfig { ttl: 0, ..MulticastConfig::new(group(number)) };
    change(&mut mcast);
    serve(image, |config| {
        (config.mcast, config.threads) = (Some(mcast), NonZeroUsize::new(2).unwrap());
    })
}

#[test]
fn whoever_asks_is_told_of_the_channel() {
    let image = TestImage::new(1);
    let server = serve_group(&image, 1, |mcast| mcast.max_datagram = Some(1472));
    let mut offers = Vec::new();
    let mut clients = Vec::new();
    for endpoint in server.endpoints() {
        let mut client = Client::open_with(endpoint, image.id, MULTICAST);
        assert_eq!(client.capabilities, MULTICAST);
        let offer = client.channel();
        assert_eq!((offer.group, offer.payload), (group(1).socket_address(), 1448));
        assert_eq!(offer.feedback.map(|ip| ip.is_loopback()), Some(true), "of use over a Unix socket too");
        assert_eq!(offer.chunk_frames.get(), 256);
        offers.push(offer);
        clients.push(client);
    }
    assert_eq!(offers[0].session, offers[1].session, "one channel for both");
    assert_ne!(offers[0].member, offers[1].member);
    wait_for("the members to be shown", || {
        server.status().multicast.unwrap().channels.iter().any(|c| c.members.len() == 2)
    });
    let status = server.status();
    assert!(status.sessions.iter().all(|session| session.multicast));
    assert!(status.to_string().contains(&format!("multicast: {}", group(1))), "{status}");
    drop(clients);
    wait_for("them to leave", || server.status().multicast.unwrap().channels.iter().all(|c| c.members.is_empty()));
}

#[test]
fn whoever_does_not_ask_or_has_the_image_itself_is_not() {
    let image = TestImage::new(2);
    let server = serve_group(&image, 2, |_| {});
    let mut plain = Client::open(&server.endpoints()[0], image.id);
    plain.check_fetch(Class::Demand, &[range(0, 10)]);
    let both = MULTICAST.union(Capabilities::LOCAL);
    let (_, got) = Client::hello(&server.endpoints()[1], image.id, both, b"");
    assert_eq!(got, Got::Welcome(Capabilities::LOCAL));
    let without = serve(&TestImage::new(2), |_| {});
    let (mut client, got) = Client::hello(&without.endpoints()[0], image.id, MULTICAST, b"");
    assert_eq!(got, Got::Welcome(Capabilities::default()));
    // What such a server is asked to multicast it answers all the same.
    let tag = client.request_by(Delivery::Multicast, Class::Demand, &[range(2001, 3)]);
    client.check_answers(&[(tag, vec![range(2001, 3)])]);
}

/// A client with its end of the channel.
fn join(server: &Server, image: &TestImage) -> (Client, Member) {
    let mut client = Client::open_with(&server.endpoints()[0], image.id, MULTICAST);
    let member = Member::join(client.channel(), "lo");
    (client, member)
}

#[test]
fn one_answer_serves_all() {
    let image = TestImage::new(4);
    let server = serve_group(&image, 4, |mcast| mcast.max_datagram = Some(1472));
    let (mut first, mut one) = join(&server, &image);
    let (mut second, mut other) = join(&server, &image);
    one.run_for(LATER);
    other.run_for(LATER);
    // Stored in one piece, stored page by page, zero in a file, zero by its absence, at the end.
    let ranges = [range(7, 2), range(1100, 20), range(120, 20), range(1590, 8), range(FRAMES - 1, 1)];
    for client in [&mut first, &mut second] {
        client.request_by(Delivery::Multicast, Class::Demand, &ranges);
    }
    for member in [&mut one, &mut other] {
        member.run_until("the pages", |member| ranges.iter().all(|range| member.has(*range)));
        member.run_for(LATER / 3);
    }
    assert_eq!(one.got, other.got);
    let pages: u64 = ranges.iter().map(|range| range.count().get()).sum();
    assert_eq!(one.got.iter().map(|times| u64::from(*times)).sum::<u64>(), pages, "each page once");
    wait_for("the count of what was spared", || server.status().multicast.unwrap().total.suppressed == pages);
    let total = server.status().multicast.unwrap().total;
    assert_eq!((total.repair.datagrams, total.parity.datagrams), (0, 0), "{total:?}");
    // Nothing came over the connections, which go on as ever.
    first.check_fetch(Class::Demand, &[range(7, 2)]);
    second.check_fetch(Class::Demand, &[range(7, 2)]);
}

#[test]
fn metrics_tell_of_the_channel_and_its_members() {
    let image = TestImage::new(10);
    let mcast = MulticastConfig { ttl: 0, ..MulticastConfig::new(group(10)) };
    let server = serve(&image, |config| {
        (config.mcast, config.metrics) = (Some(mcast), Some("127.0.0.1:0".parse().unwrap()));
    });
    let (mut client, mut member) = join(&server, &image);
    member.run_for(LATER);
    client.request_by(Delivery::Multicast, Class::Demand, &[range(2000, 10)]);
    member.run_until("the pages", |member| member.has(range(2000, 10)));
    let session = server.status().sessions[0].id;
    let scrape = || {
        let mut stream = TcpStream::connect(server.metrics().unwrap()).unwrap();
        stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    wait_for("the count", || scrape().contains("memserver_multicast_datagrams_total{kind=\"data\"} 1\n"));
    let answer = scrape();
    for line in [
        format!("memserver_multicast_members{{image=\"{}\"}} 1", image.id),
        "memserver_multicast_joined_total 1".to_owned(),
        "memserver_multicast_nacks_total 0".to_owned(),
        "memserver_multicast_datagrams_total{kind=\"parity\"} 0".to_owned(),
        format!("memserver_multicast_receiver_loss{{session=\"{session}\"}} 0"),
        format!("memserver_multicast_receiver_rate_bytes{{session=\"{session}\"}}"),
    ] {
        assert!(answer.contains(&line), "{line} is missing in {answer}");
    }
}

/// Three clones that want the whole image, each in a thread of its own and changed by `change`; what came to each, by kind.
fn fill_three(
    server: &Server,
    image: &TestImage,
    change: impl Fn(u8, &mut Member) + Sync,
) -> Vec<BTreeMap<&'static str, u64>> {
    let fill = |index| {
        let (mut client, mut member) = join(server, image);
        member.wants_all = true;
        change(index, &mut member);
        // On a machine that is busy with other things a socket may overflow for long enough.
        member.run_until("the image", |member| member.has(range(0, FRAMES)) || member.is_endgame());
        let lacking = member.lacking();
        lacking.chunks(100).for_each(|ranges| client.check_fetch(Class::Bulk, ranges));
        assert!(lacking.len() < FRAMES as usize / 10, "{} frames came by unicast", lacking.len());
        member.datagrams
    };
    let fill = &fill;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|index| scope.spawn(move || fill(index))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn what_is_lacking_is_pushed_to_all_at_once() {
    let image = TestImage::new(5);
    for datagram in [1472, u16::MAX] {
        let server = serve_group(&image, 5, |mcast| mcast.max_datagram = Some(datagram));
        fill_three(&server, &image, |_, _| {});
        wait_for("the members to leave", || {
            let report = server.status().multicast.unwrap();
            report.joined == 3 && report.channels.iter().all(|channel| channel.members.is_empty())
        });
        let total = server.status().multicast.unwrap().total;
        let ratio = total.bytes() as f64 / (FRAMES * 4096) as f64;
        println!("datagrams of {datagram} bytes: {ratio:.3} of the image was sent");
        assert!(ratio < 1.5, "{total:?}");
    }
}

#[test]
fn what_others_waited_for_is_pushed_first() {
    let image = TestImage::new(12);
    let server = serve_group(&image, 12, |mcast| mcast.max_datagram = Some(1472));
    let mut earlier = Client::open(&server.endpoints()[1], image.id);
    earlier.check_fetch(Class::Demand, &[range(3000, 3)]);
    earlier.check_fetch(Class::Bulk, &[range(2500, 3)]);
    earlier.check_fetch(Class::Demand, &[range(3500, 80)]);
    let (_client, mut member) = join(&server, &image);
    member.wants_all = true;
    member.run_until("some pages", |member| member.pushed.len() >= 4);
    // 67 pages go into a block at most.
    assert_eq!(member.pushed[..3], [3000, 3564, 0], "{:?}", member.pushed);
}

#[test]
fn parity_gives_back_what_is_lost() {
    let image = TestImage::new(6);
    let server = serve_group(&image, 6, |mcast| mcast.max_datagram = Some(1472));
    // Each loses two other shards of every block, among them the map.
    let received = fill_three(&server, &image, |member, it| {
        it.loses = Box::new(move |shard| shard.kind == ShardKind::Data && [member, member + 9].contains(&shard.index));
    });
    // Where their NACKs come far apart, as on a busy machine, the lost shards themselves are sent again.
    assert!(received.iter().all(|kinds| kinds["parity"] >= 10), "{received:?}");
    wait_for("the counters", || server.status().multicast.unwrap().total.parity.datagrams >= 10);
    assert!(server.status().multicast.unwrap().total.nacks >= 10);
}

#[test]
fn clones_that_lose_datagrams_have_the_whole_image_in_the_end() {
    let image = TestImage::new(11);
    let server = serve_group(&image, 11, |mcast| mcast.max_datagram = Some(1472));
    let fill = |seed: u64| {
        let mut client = Client::open_with(&server.endpoints()[0], image.id, MULTICAST);
        let mut clone = CloneMember::join(&client.channel(), "lo", seed, 0.05);
        clone.run();
        let lacking: Vec<_> =
            (0..FRAMES).filter(|frame| !clone.got[*frame as usize]).map(|frame| range(frame, 1)).collect();
        lacking.chunks(100).for_each(|ranges| client.check_fetch(Class::Bulk, ranges));
        println!("clone {seed}: {} of {FRAMES} by unicast, {:?}", lacking.len(), clone.intake.stats());
        assert!(lacking.len() < FRAMES as usize / 10, "{} frames came by unicast", lacking.len());
    };
    let fill = &fill;
    std::thread::scope(|scope| (0..4).for_each(|seed| drop(scope.spawn(move || fill(seed)))));
    wait_for("the counters", || server.status().multicast.unwrap().total.data.datagrams > 9000);
    let total = server.status().multicast.unwrap().total;
    println!("{:.3} of the image was sent", total.bytes() as f64 / (FRAMES * 4096) as f64);
}

#[test]
fn whoever_hears_nothing_is_moved_to_unicast_and_told() {
    let image = TestImage::new(7);
    let server = serve_group(&image, 7, |_| {});
    let mut deaf = Client::open_with(&server.endpoints()[0], image.id, MULTICAST);
    let _offer = deaf.channel();
    deaf.request_by(Delivery::Multicast, Class::Demand, &[range(2000, 10)]);
    // It never gets them by multicast, and asks again.
    deaf.check_fetch(Class::Demand, &[range(2000, 10)]);
    assert_eq!(deaf.expect_channel_gone(), (ChannelGoneReason::Silent, "it reports nothing".to_owned()));
    let tag = deaf.request_by(Delivery::Multicast, Class::Demand, &[range(2001, 3)]);
    deaf.check_answers(&[(tag, vec![range(2001, 3)])]);
    wait_for("the status", || server.status().sessions.iter().all(|session| !session.multicast));
    wait_for("the count", || server.status().multicast.unwrap().moved == [("Silent".to_owned(), 1)]);
}

#[test]
fn an_image_that_goes_takes_its_channel_along() {
    let image = TestImage::new(8);
    let server = serve_group(&image, 8, |_| {});
    let (_client, mut member) = join(&server, &image);
    let (first, _) = join(&server, &image);
    drop(first);
    member.run_for(LATER);
    server.drop_image(image.id).unwrap();
    wait_for("its end", || server.status().multicast.unwrap().channels.is_empty());
    server.add_image(&image.index, memserver::image::Preload::Off).unwrap();
    let (mut client, mut member) = join(&server, &image);
    member.run_for(LATER);
    client.request_by(Delivery::Multicast, Class::Demand, &[range(2000, 10)]);
    member.run_until("the pages", |member| member.has(range(2000, 10)));
}

#[test]
fn an_image_that_cannot_be_read_ends_its_channel() {
    let image = TestImage::new(9);
    let server = serve_group(&image, 9, |mcast| mcast.max_datagram = Some(1472));
    let (mut client, mut member) = join(&server, &image);
    member.run_for(LATER);
    std::fs::File::options().write(true).open(image.folder.path().join("raw")).unwrap().set_len(100).unwrap();
    client.request_by(Delivery::Multicast, Class::Demand, &[range(3000, 10)]);
    let gone = (ChannelGoneReason::Closed, "pages of the image cannot be read".to_owned());
    assert_eq!(client.expect_channel_gone(), gone);
    wait_for("the image to be gone", || server.status().images.is_empty());
}

#[test]
fn a_group_that_cannot_be_is_an_error_in_words() {
    let image = TestImage::new(3);
    let start = |group: &str, change: &dyn Fn(&mut MulticastConfig)| {
        let mut mcast = MulticastConfig::new(group.parse().unwrap());
        change(&mut mcast);
        let listen = vec![Endpoint::Tcp("127.0.0.1:0".into())];
        let config = ServeConfig { mcast: Some(mcast), ..ServeConfig::new(vec![image.index.clone()], listen) };
        let error = Server::start(&config).unwrap_err();
        (descriptor::Report(&error).to_string(), matches!(error, ServeError::Multicast(_)))
    };
    let (text, multicast) = start("239.255.72.3:21003%nosuch0", &|_| {});
    assert!(multicast && text.contains("no interface `nosuch0`"), "{text}");
    let (text, _) = start("239.255.72.3:21003%lo", &|mcast| mcast.max_datagram = Some(500));
    assert_eq!(text, "cannot multicast in datagrams of 500 bytes: 536 are needed");
    let said = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memserver"));
        let refused = command.args(["serve", "--listen", "tcp://127.0.0.1:0"]).args(arguments).output().unwrap();
        (refused.status.code(), String::from_utf8(refused.stderr).unwrap())
    };
    let (code, text) = said(&["--mcast", "10.0.0.1:7071"]);
    assert!(code == Some(2) && text.contains("10.0.0.1 is not a multicast address"), "{text}");
    let (code, text) = said(&["--mcast-rate", "1M"]);
    assert!(code == Some(2) && text.contains("--mcast <GROUP:PORT[%IFACE]>"), "{text}");
    let (code, text) = said(&["--mcast", "239.255.72.3:21003%nosuch0"]);
    assert!(code == Some(1) && text.contains("memserver: cannot multicast: 239.255.72.3:21003%nosuch0: no "), "{text}");
}
