//! Goal: what a station sends is what every receiver gets, byte for byte, on the real kernel, by every combination of what
//! may be used of it.
//!
//! Method: station and receivers in one process on the loopback interface, which takes datagrams of up to 60 KiB. Each test
//! has a group of its own, so that tests may run at a time.

#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

mod common;
mod sys;

use std::collections::HashMap;
use std::io::Write;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use common::{Bytes, PATIENCE, all_features, burst, finish, readable, take};
use mcast_socket::{Burst, Event, Features, Group, ReceiveConfig, Receiving, SendError, Station, StationConfig};

fn group(number: u8) -> Group {
    format!("239.255.71.{number}:{}%lo", 20_000 + u16::from(number)).parse().unwrap()
}

fn station(group: &Group, features: Features) -> Station<Bytes> {
    Station::open(&StationConfig { features, ttl: 0, ..StationConfig::new(group.clone()) }, None).unwrap()
}

fn receiver(group: &Group, server: SocketAddr, features: Features) -> Receiving {
    Receiving::open(&ReceiveConfig { features, ..ReceiveConfig::new(group.clone(), server) }).unwrap()
}

#[test]
fn every_receiver_gets_every_datagram_whole() {
    let group = group(1);
    for sending in all_features() {
        let mut station = station(&group, sending);
        if station.features() != sending {
            eprintln!("SKIPPED {sending:?}: this kernel has but {:?}", station.features());
            continue;
        }
        assert_eq!(station.interface(), Some("lo"));
        let mut receivers: Vec<_> =
            all_features().map(|features| receiver(&group, station.local(), features)).collect();
        for (number, (segment, last, count)) in
            [(1448, 1448, 40), (1448, 9, 41), (1448, 1000, 1), (100, 8, 64), (8972, 8, 6), (60 << 10, 60 << 10, 1)]
                .into_iter()
                .enumerate()
        {
            let (burst, expected) = burst(segment, last, count, number as u8);
            assert!(station.submit(burst).is_ok());
            assert!(finish(&mut station).iter().all(Result::is_ok));
            for receiver in &mut receivers {
                let features = receiver.features();
                assert_eq!(
                    take(receiver, expected.len()),
                    expected,
                    "{sending:?} to {features:?}: {segment} × {count}"
                );
            }
        }
        assert!(receivers.iter_mut().all(|receiver| receiver.receive().unwrap().is_none()));
    }
}

#[test]
fn many_bursts_and_controls_keep_their_order() {
    let group = group(2);
    for features in all_features() {
        let mut station = station(&group, features);
        let mut receiver = receiver(&group, station.local(), features);
        let mut expected = Vec::new();
        for salt in 0..8 {
            let (burst, datagrams) = burst(1448, 700, 10, salt);
            assert!(station.submit(burst).is_ok());
            assert!(station.send(&[0xcc, salt]));
            expected.extend(datagrams);
            expected.push(vec![0xcc, salt]);
        }
        let (one_more, _) = burst(1448, 700, 10, 9);
        assert!(station.submit(one_more).is_err(), "eight are under way");
        assert!(finish(&mut station).iter().all(Result::is_ok));
        assert!(take(&mut receiver, expected.len()) == expected, "{features:?}");
    }
}

#[test]
fn feedback_comes_with_its_source_and_the_counter_wakes() {
    let group = group(3);
    for features in all_features() {
        let wake = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        let config = StationConfig { features, ttl: 0, ..StationConfig::new(group.clone()) };
        let mut station = Station::<()>::open(&config, Some(wake.as_fd())).unwrap();
        let receivers: Vec<_> = (0..3).map(|_| receiver(&group, station.local(), features)).collect();
        let start = Instant::now();
        station.wait(Some(Duration::from_millis(30))).unwrap();
        assert!(station.next_event().is_none() && start.elapsed() >= Duration::from_millis(29), "{features:?}");

        // Three rounds of more than there are buffers for, so that every buffer is used again.
        for round in 0..3u8 {
            for number in 0..100u8 {
                assert!(
                    receivers[usize::from(number) % 3]
                        .send_to_server(&vec![number; 1 + usize::from(number) * 10])
                        .unwrap()
                );
            }
            rustix::io::write(&wake, &1u64.to_ne_bytes()).unwrap();
            let (mut came, mut woken) = (HashMap::new(), 0);
            let start = Instant::now();
            while came.len() < 100 || woken == 0 {
                assert!(start.elapsed() < PATIENCE, "{features:?}, round {round}: {} came, {woken} woken", came.len());
                station.wait(Some(Duration::from_millis(100))).unwrap();
                while let Some(event) = station.next_event() {
                    match event {
                        Event::Feedback { from, bytes } => {
                            assert_eq!((from.ip(), from.port()), (station_ip(), group.port));
                            assert!(came.insert(bytes[0], bytes.to_vec()).is_none());
                        }
                        Event::Woken => {
                            woken += 1;
                            rustix::io::read(&wake, &mut [0; 8]).unwrap();
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
            assert_eq!(woken, 1, "{features:?}");
            assert!(came.iter().all(|(number, bytes)| *bytes == vec![*number; 1 + usize::from(*number) * 10]));
        }
    }
}

fn station_ip() -> std::net::IpAddr {
    [127, 0, 0, 1].into()
}

#[test]
fn feedback_that_is_too_long_is_dropped() {
    let group = group(4);
    for features in all_features() {
        let mut station = station(&group, features);
        let receiver = receiver(&group, station.local(), features);
        assert!(receiver.send_to_server(&[1; 10_000]).unwrap());
        assert!(receiver.send_to_server(&[2; 2048]).unwrap());
        let start = Instant::now();
        let mut came = Vec::new();
        while came.is_empty() {
            assert!(start.elapsed() < PATIENCE);
            station.wait(Some(Duration::from_millis(100))).unwrap();
            while let Some(event) = station.next_event() {
                let Event::Feedback { bytes, .. } = event else { panic!("{event:?}") };
                came.push(bytes.to_vec());
            }
        }
        assert_eq!(came, [vec![2; 2048]], "{features:?}");
    }
}

#[test]
fn a_truncated_file_fails_its_burst_and_nothing_else() {
    let group = group(5);
    for features in all_features() {
        let mut station = station(&group, features);
        let mut receiver = receiver(&group, station.local(), features);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 3 * 4096]).unwrap();
        let mapping = sys::map(&file, 3 * 4096);
        file.set_len(4096).unwrap();
        let mut broken = Burst::new(1000);
        broken.copy(&[0; 24]);
        broken.refer(mapping + 4000, 1976);
        assert!(station.submit(broken).is_ok());
        let (good, expected) = burst(1000, 500, 3, 1);
        assert!(station.submit(good).is_ok());
        let results = finish(&mut station);
        assert!(matches!(&results[0], Err(SendError::Unreadable(_))), "{features:?}: {results:?}");
        assert!(results[1].is_ok(), "{features:?}: {results:?}");
        // Without offload the first of the broken burst's datagrams may have been sent.
        let all = take(&mut receiver, expected.len());
        assert!(all.iter().all(|datagram| expected.contains(datagram)), "{features:?}");
    }
}

#[test]
fn drops_are_counted_and_what_was_kept_is_whole() {
    let group = group(6);
    for features in all_features() {
        let mut station = station(&group, features);
        let server = station.local();
        let config = ReceiveConfig { features, buffer: 256 << 10, ..ReceiveConfig::new(group.clone(), server) };
        let mut receiver = Receiving::open(&config).unwrap();
        assert!((256 << 10..1 << 20).contains(&receiver.buffer_bytes()));
        assert_eq!(receiver.buffer_advice(), None);
        for salt in 0..100 {
            assert!(station.submit(burst(1448, 1448, 40, salt).0).is_ok());
            assert!(finish(&mut station).iter().all(Result::is_ok));
        }
        // The counter comes with the next datagram that finds room.
        let mut kept = 0;
        while receiver.receive().unwrap().is_some() {
            kept += 1;
        }
        assert!((40..4000).contains(&kept), "{features:?}: {kept} kept");
        let (last, expected) = burst(1448, 1448, 1, 200);
        assert!(station.submit(last).is_ok());
        assert!(finish(&mut station).iter().all(Result::is_ok));
        assert_eq!(take(&mut receiver, 1), expected);
        assert!(receiver.drops() > 0, "{features:?}: {kept} of 4000 kept");
    }
}

#[test]
fn other_groups_and_sources_stay_out() {
    let (group, other) = (group(7), "239.255.71.107:20007%lo".parse::<Group>().unwrap());
    let (mut ours, mut foreign) = (station(&group, Features::ALL), station(&other, Features::ALL));
    let stranger: SocketAddr = "127.0.0.2:9".parse().unwrap();
    let mut receiver_ours = receiver(&group, ours.local(), Features::ALL);
    let mut receiver_other = receiver(&other, foreign.local(), Features::ALL);
    let mut elsewhere = receiver(&group, stranger, Features::ALL);
    assert!(ours.send(b"ours") && foreign.send(b"foreign"));
    ours.wait(Some(Duration::ZERO)).unwrap();
    foreign.wait(Some(Duration::ZERO)).unwrap();
    assert_eq!(take(&mut receiver_ours, 1), [b"ours"]);
    assert_eq!(take(&mut receiver_other, 1), [b"foreign"]);
    assert!(!readable(&elsewhere, Duration::from_millis(20)), "joined for another source");
    assert!(elsewhere.widen().unwrap() && !elsewhere.widen().unwrap());
    assert!(ours.send(b"again"));
    ours.wait(Some(Duration::ZERO)).unwrap();
    assert_eq!(take(&mut elsewhere, 1), [b"again"]);
    assert!(receiver_other.receive().unwrap().is_none());
}

#[test]
fn a_receiver_finds_the_interface_of_a_server_on_its_host() {
    let named = group(8);
    let mut station = station(&named, Features::ALL);
    let unnamed = Group { interface: None, ..named };
    let mut receiver = receiver(&unnamed, station.local(), Features::ALL);
    assert_eq!(receiver.interface(), Some("lo"));
    assert!(station.send(b"here"));
    station.wait(Some(Duration::ZERO)).unwrap();
    assert_eq!(take(&mut receiver, 1), [b"here"]);
}

#[test]
fn errors_are_for_people() {
    let group: Group = "239.255.71.9:20009%nowhere0".parse().unwrap();
    let server: SocketAddr = "127.0.0.1:9".parse().unwrap();
    let error = Station::<()>::open(&StationConfig::new(group.clone()), None).unwrap_err().to_string();
    assert!(
        error.starts_with("239.255.71.9:20009%nowhere0: no interface `nowhere0` on this host (there are "),
        "{error}"
    );
    assert!(error.contains("lo"), "{error}");
    let error = Receiving::open(&ReceiveConfig::new(group.clone(), server)).unwrap_err().to_string();
    assert!(error.contains("no interface `nowhere0`"), "{error}");

    let group = Group { interface: Some("lo".into()), ..group };
    let _holder = std::net::UdpSocket::bind(group.socket_address()).unwrap();
    let error = Receiving::open(&ReceiveConfig::new(group.clone(), server)).unwrap_err().to_string();
    assert!(
        error.contains("cannot bind") && error.contains("(a program that does not share it has the port)"),
        "{error}"
    );

    let server: SocketAddr = "[::1]:9".parse().unwrap();
    let error = Receiving::open(&ReceiveConfig::new(group, server)).unwrap_err().to_string();
    assert!(error.contains("the server's address ::1 is not of the group's family"), "{error}");
}

#[test]
fn thirty_two_receivers_each_get_a_copy() {
    let group = group(10);
    let mut station = station(&group, Features::ALL);
    let mut receivers: Vec<_> = (0..32).map(|_| receiver(&group, station.local(), Features::ALL)).collect();
    let (burst, expected) = burst(1448, 100, 40, 3);
    assert!(station.submit(burst).is_ok());
    assert!(finish(&mut station).iter().all(Result::is_ok));
    assert!(receivers.iter_mut().all(|receiver| take(receiver, 40) == expected));
}

/// A descriptor that told nobody of what arrives once cost seconds: a ring that defers its work until it is entered wakes
/// nobody who polls it.
#[test]
fn waiting_ends_when_a_datagram_arrives() {
    let group = group(11);
    for features in all_features() {
        let mut station = station(&group, features);
        let mut receiver = receiver(&group, station.local(), features);
        std::thread::scope(|scope| {
            let (ask, asked) = std::sync::mpsc::channel();
            scope.spawn(move || {
                while asked.recv().is_ok() {
                    std::thread::sleep(Duration::from_millis(50));
                    assert!(station.send(b"now"));
                    station.wait(Some(Duration::ZERO)).unwrap();
                }
            });
            for _ in 0..3 {
                assert!(receiver.receive().unwrap().is_none());
                ask.send(()).unwrap();
                let start = Instant::now();
                assert!(readable(&receiver, PATIENCE), "{features:?}");
                assert!(start.elapsed() < PATIENCE / 2, "{features:?}: {:?}", start.elapsed());
                assert_eq!(take(&mut receiver, 1), [b"now"]);
            }
        });
    }
}

#[test]
fn another_thread_than_the_first_is_refused_in_words() {
    let group = group(12);
    let mut station = station(&group, Features::ALL);
    if !station.features().ring {
        eprintln!("SKIPPED another_thread_than_the_first_is_refused_in_words: no io_uring of Linux 6.0");
        return;
    }
    station.wait(Some(Duration::ZERO)).unwrap();
    let error = std::thread::spawn(move || station.wait(Some(Duration::ZERO)).unwrap_err()).join().unwrap();
    assert_eq!(error.to_string(), "the socket's io_uring belongs to the thread that waited first");
}
