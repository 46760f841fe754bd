//! The network does what it says, or the tests built on it show nothing: groups reach their listeners alone, loss and blocks
//! are what was asked for, processes end with it.
#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use testnet::{Host, Loss, Network, NetworkConfig};

const GROUP: Ipv4Addr = Ipv4Addr::new(239, 77, 0, 1);
const PORT: u16 = 7077;

/// Enough that a share of them says what the probability was.
const DATAGRAMS: usize = 4000;

fn network(test: &str) -> Option<Network> {
    if let Some(reason) = testnet::missing() {
        // Not by the macro, whose text the test harness would keep to itself.
        let _ = writeln!(io::stderr(), "SKIPPED {test}: {reason}");
        return None;
    }
    Some(Network::new(NetworkConfig { hosts: 3, mtu: 1500 }).unwrap())
}

/// Sockets of these hosts that listen to the group, once the bridge knows of them.
fn listeners(network: &Network, hosts: &[usize]) -> Vec<UdpSocket> {
    let listen = |host: &usize| {
        let host = &network.hosts()[*host];
        let address = host.address();
        host.run(move || {
            let socket = UdpSocket::bind(SocketAddr::from((GROUP, PORT))).unwrap();
            socket.join_multicast_v4(&GROUP, &address).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        })
    };
    let sockets: Vec<UdpSocket> = hosts.iter().map(listen).collect();
    let text = GROUP.to_string();
    poll(|| network.listeners().unwrap().matches(&text).count() == hosts.len());
    sockets
}

fn poll(mut look: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !look() {
        assert!(Instant::now() < deadline, "awaited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// How many of the datagrams that the first host sends to the group each listener gets.
fn received(network: &Network, listeners: &[UdpSocket]) -> Vec<usize> {
    let from = network.hosts()[0].address();
    let sender = network.hosts()[0].run(move || UdpSocket::bind((from, 0)).unwrap());
    let mut counts = vec![0; listeners.len()];
    for chunk in 0..DATAGRAMS / 100 {
        for _ in 0..100 {
            sender.send_to(&[chunk as u8; 100], (GROUP, PORT)).unwrap();
        }
        for (listener, count) in listeners.iter().zip(&mut counts) {
            while listener.recv(&mut [0; 200]).is_ok() {
                *count += 1;
            }
        }
    }
    counts
}

#[test]
fn a_group_reaches_its_listeners_alone() {
    let Some(network) = network("a_group_reaches_its_listeners_alone") else { return };
    let [_, second, third] = network.hosts() else { unreachable!("three hosts") };
    let listeners = listeners(&network, &[1]);
    let before = [second, third].map(|host| host.counters().unwrap().received_frames);
    assert_eq!(received(&network, &listeners), [DATAGRAMS]);
    let after = [second, third].map(|host| host.counters().unwrap().received_frames);
    let frames = [0, 1].map(|host| after[host] - before[host]);
    assert!(frames[0] >= DATAGRAMS as u64 && frames[1] < 100, "frames at the listener and at the other: {frames:?}");
    let sent = network.hosts()[0].counters().unwrap();
    let headers = 14 + 20 + 8;
    assert!(sent.sent_bytes >= (DATAGRAMS * (100 + headers)) as u64, "{sent:?}");
}

#[test]
fn hosts_lose_what_they_are_told_to() {
    let Some(mut network) = network("hosts_lose_what_they_are_told_to") else { return };
    network.hosts_mut()[1].lose(Loss::Frames(0.05)).unwrap();
    network.hosts_mut()[2].lose(Loss::Coalesced(0.05)).unwrap();
    let listeners = listeners(&network, &[1, 2]);
    for count in received(&network, &listeners) {
        let share = 1.0 - count as f64 / DATAGRAMS as f64;
        // Nine standard deviations.
        assert!((share - 0.05).abs() < 0.03, "{share} is lost");
    }
    for host in network.hosts_mut() {
        host.lose(Loss::None).unwrap();
    }
    assert_eq!(received(&network, &listeners), [DATAGRAMS, DATAGRAMS]);
}

#[test]
fn a_blocked_group_is_gone_and_comes_back() {
    let Some(network) = network("a_blocked_group_is_gone_and_comes_back") else { return };
    let listeners = listeners(&network, &[1, 2]);
    network.hosts()[1].block(IpAddr::V4(GROUP)).unwrap();
    assert_eq!(received(&network, &listeners), [0, DATAGRAMS]);
    network.hosts()[1].unblock().unwrap();
    assert_eq!(received(&network, &listeners), [DATAGRAMS, DATAGRAMS]);
}

#[test]
fn processes_are_in_their_host_and_end_with_it() {
    let Some(network) = network("processes_are_in_their_host_and_end_with_it") else { return };
    let mut command = Command::new("ip");
    command.args(["-4", "-brief", "address", "show", Host::INTERFACE]).stdout(Stdio::piped());
    let mut process = network.hosts()[2].spawn(command).unwrap();
    let mut said = String::new();
    io::Read::read_to_string(process.child().stdout.as_mut().unwrap(), &mut said).unwrap();
    assert!(said.contains("10.77.0.3/24"), "{said}");
    assert!(process.wait(Duration::from_secs(10)).unwrap().success());

    let mut command = Command::new("sleep");
    command.arg("600");
    let process = network.hosts()[0].spawn(command).unwrap();
    let path = format!("/proc/{}/stat", process.id());
    let state = || std::fs::read_to_string(&path).unwrap_or_default().split(' ').nth(2).map(str::to_owned);
    process.stop().unwrap();
    poll(|| state().as_deref() == Some("T"));
    process.resume().unwrap();
    poll(|| state().as_deref() == Some("S"));
    // As when a test panics past its processes: the host ends first.
    drop(network);
    let mut process = process;
    assert!(!process.wait(Duration::from_secs(10)).unwrap().success());
}
