//! Goal: groups work between hosts: IPv4 and IPv6, by each interface's own MTU, with receivers on the sender's host and on
//! others, and where a device does no offload.
//!
//! Method: hosts are network namespaces on a bridge that snoops IGMP and MLD, so that only who has joined gets anything. That
//! needs root; without it the tests say that they are skipped.
#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.

mod common;

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use common::{Bytes, all_features, burst, finish, take};
use mcast_socket::{Event, Features, Group, ReceiveConfig, Receiving, Station, StationConfig};

/// Hosts on a bridge, numbered from 1. Host n has the addresses 10.71.0.n and fd71::n on its interface `net0`.
struct Lab {
    name: String,
    hosts: u32,
}

impl Lab {
    /// Builds it, or says why the test is skipped.
    fn new(test: &str, hosts: u32, mtu: u32) -> Option<Self> {
        static LABS: AtomicU32 = AtomicU32::new(0);
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED {test}: network namespaces need root");
            return None;
        }
        let lab = Self { name: format!("ms{}-{}", std::process::id(), LABS.fetch_add(1, Ordering::Relaxed)), hosts };
        let name = &lab.name;
        let mut script = format!(
            "set -e; ip netns add {name}-0; I='ip -n {name}-0'
             $I link add br0 mtu {mtu} type bridge mcast_snooping 1 mcast_querier 1; $I link set br0 up\n"
        );
        for host in 1..=hosts {
            script += &format!(
                "ip netns add {name}-{host}; H='ip -n {name}-{host}'
                 ip netns exec {name}-{host} sh -c 'echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad'
                 $H link add net0 mtu {mtu} type veth peer name port{host} mtu {mtu} netns {name}-0
                 $I link set port{host} master br0 up
                 $H addr add 10.71.0.{host}/24 dev net0; $H addr add fd71::{host}/64 dev net0 nodad
                 $H link set lo up; $H link set net0 up\n"
            );
        }
        match run(&script) {
            Ok(()) => Some(lab),
            Err(error) => {
                eprintln!("SKIPPED {test}: no bridge of network namespaces can be built here: {error}");
                None
            }
        }
    }

    /// Runs `work` on a host.
    fn on<T: Send>(&self, host: u32, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/run/netns/{}-{host}", self.name)).unwrap();
        let work = move || {
            use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        };
        std::thread::scope(|scope| scope.spawn(work).join().unwrap())
    }

    /// Runs a command on a host.
    fn run(&self, host: u32, command: &str) -> Result<(), String> {
        run(&format!("ip netns exec {}-{host} {command}", self.name))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for host in 0..=self.hosts {
            // What was never made cannot be deleted.
            let _missing = run(&format!("ip netns del {}-{host}", self.name));
        }
    }
}

fn run(script: &str) -> Result<(), String> {
    let output = Command::new("sh").arg("-c").arg(script).output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

fn open(config: StationConfig) -> Station<Bytes> {
    Station::open(&config, None).unwrap()
}

/// A receiver that is told no interface, only which address of its host its session has.
fn join(group: &Group, server: SocketAddr, local: Option<IpAddr>, features: Features) -> Receiving {
    let group = Group { interface: None, ..group.clone() };
    Receiving::open(&ReceiveConfig { local, features, ..ReceiveConfig::new(group, server) }).unwrap()
}

fn address(group: &Group, host: u32) -> IpAddr {
    if group.address.is_ipv4() { format!("10.71.0.{host}") } else { format!("fd71::{host}") }.parse().unwrap()
}

/// Sends bursts from host 1 to receivers there and on the others, and feedback back.
fn exchange(lab: &Lab, group: &Group, sending: Features, headers: u32, mtu: u32) {
    let mut station = lab.on(1, || open(StationConfig { features: sending, ..StationConfig::new(group.clone()) }));
    assert_eq!((station.interface(), station.local().ip()), (Some("net0"), address(group, 1)));
    assert_eq!(u32::from(station.max_datagram()), mtu - headers);
    let size = station.max_datagram();
    let count = (60 << 10) / size;
    let server = station.local();
    let (mut sent, receivers): (Vec<_>, u32) =
        ((0..4).map(|salt| burst(size, 77, count, salt)).collect(), lab.hosts + 1);
    let expected: Vec<_> = sent.iter_mut().flat_map(|(_, datagrams)| std::mem::take(datagrams)).collect();
    let (joined, joins) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let expected = &expected;
        for number in 0..receivers {
            // Two on the sender's own host, whose session may well be by a Unix socket.
            let host = number.max(1);
            let local = (number > 1).then(|| address(group, host));
            let receiving = all_features().nth(number as usize % 4).unwrap();
            let joined = joined.clone();
            scope.spawn(move || {
                lab.on(host, move || {
                    let mut receiver = join(group, server, local, receiving);
                    assert_eq!(receiver.interface(), Some("net0"));
                    assert!(receiver.send_to_server(&[number as u8; 100]).unwrap());
                    joined.send(()).unwrap();
                    let came = take(&mut receiver, expected.len());
                    assert!(came == *expected, "{sending:?} to {receiving:?} on host {host}");
                    assert_eq!(receiver.drops(), 0);
                });
            });
        }
        (0..receivers).for_each(|_| joins.recv_timeout(Duration::from_secs(5)).unwrap());
        // The bridge's own work on the reports of membership.
        std::thread::sleep(Duration::from_millis(100));
        let mut heard = Vec::new();
        while heard.len() < receivers as usize {
            station.wait(Some(Duration::from_secs(5))).unwrap();
            let before = heard.len();
            while let Some(event) = station.next_event() {
                let Event::Feedback { from, bytes } = event else { panic!("{event:?}") };
                assert_eq!((from.ip(), from.port()), (address(group, u32::from(bytes[0]).max(1)), group.port));
                heard.push(bytes[0]);
            }
            assert!(heard.len() > before, "feedback of {heard:?} only");
        }
        sent.into_iter().for_each(|(burst, _)| assert!(station.submit(burst).is_ok()));
        let results = finish(&mut station);
        assert!(results.iter().all(Result::is_ok), "{results:?}");
    });
}

#[test]
fn groups_work_between_hosts() {
    for mtu in [1500, 9000] {
        let Some(lab) = Lab::new("groups_work_between_hosts", 3, mtu) else { return };
        for (group, headers) in [("239.71.0.1:7071%net0", 28), ("[ff15::71]:7071%net0", 48)] {
            for sending in all_features() {
                exchange(&lab, &group.parse().unwrap(), sending, headers, mtu);
            }
        }
    }
}

/// Hosts that may only speak the versions that know no sources join all the same.
#[test]
fn older_versions_of_igmp_and_mld_do() {
    let Some(lab) = Lab::new("older_versions_of_igmp_and_mld_do", 2, 1500) else { return };
    for host in [1, 2] {
        for setting in ["ipv4/conf/net0/force_igmp_version", "ipv6/conf/net0/force_mld_version"] {
            let version = if setting.starts_with("ipv4") { 2 } else { 1 };
            lab.run(host, &format!("sh -c 'echo {version} > /proc/sys/net/{setting}'")).unwrap();
        }
    }
    for (group, headers) in [("239.71.0.6:7071%net0", 28), ("[ff15::76]:7071%net0", 48)] {
        exchange(&lab, &group.parse().unwrap(), Features::ALL, headers, 1500);
    }
}

#[test]
fn a_device_without_offload_gets_datagrams_one_by_one() {
    let Some(lab) = Lab::new("a_device_without_offload_gets_datagrams_one_by_one", 2, 1500) else { return };
    if let Err(error) = lab.run(1, "ethtool -K net0 tx off sg off gso off") {
        eprintln!("SKIPPED a_device_without_offload_gets_datagrams_one_by_one: ethtool: {error}");
        return;
    }
    for sending in all_features() {
        exchange(&lab, &"239.71.0.2:7071%net0".parse().unwrap(), sending, 28, 1500);
    }
}

/// A queue before the device that takes 20 MB/s holds more than the socket may have in it.
#[test]
fn a_slow_device_is_waited_for() {
    const BURSTS: usize = 60;
    let Some(lab) = Lab::new("a_slow_device_is_waited_for", 2, 1500) else { return };
    if let Err(error) = lab.run(1, "tc qdisc add dev net0 root tbf rate 160mbit burst 100kb limit 64mb") {
        eprintln!("SKIPPED a_slow_device_is_waited_for: tc: {error}");
        return;
    }
    let group: Group = "239.71.0.5:7071%net0".parse().unwrap();
    for features in all_features() {
        let mut station = lab.on(1, || open(StationConfig { features, ..StationConfig::new(group.clone()) }));
        let server = station.local();
        let mut receiver =
            lab.on(2, || join(&group, server, Some(address(&group, 2)), Features { ring: false, ..features }));
        let (mut expected, mut sent, mut waits) = (Vec::new(), 0, 0);
        let start = Instant::now();
        let mut bursts = (0..BURSTS).map(|salt| burst(1472, 1472, 40, salt as u8));
        while sent < BURSTS {
            while station.room() > 0
                && let Some((burst, datagrams)) = bursts.next()
            {
                assert!(station.submit(burst).is_ok());
                expected.extend(datagrams);
            }
            station.wait(Some(Duration::from_secs(5))).unwrap();
            waits += 1;
            while let Some(event) = station.next_event() {
                assert!(matches!(event, Event::Sent { result: Ok(()), .. }), "{event:?}");
                sent += 1;
            }
        }
        // The rest is in the socket's buffer.
        assert!(start.elapsed() > Duration::from_millis(50), "{features:?}: {:?} for {BURSTS} bursts", start.elapsed());
        assert!(waits <= 2 * BURSTS, "{features:?}: {waits} waits for {BURSTS} bursts");
        assert!(take(&mut receiver, expected.len()) == expected, "{features:?}");
    }
}

#[test]
fn a_link_local_server_is_reached_on_the_groups_interface() {
    let Some(lab) = Lab::new("a_link_local_server_is_reached_on_the_groups_interface", 2, 1500) else { return };
    for host in [1, 2] {
        lab.run(host, "ip -6 addr flush scope global dev net0").unwrap();
    }
    let group: Group = "[ff12::71]:7071%net0".parse().unwrap();
    let mut station = lab.on(1, || open(StationConfig::new(group.clone())));
    let SocketAddr::V6(server) = station.local() else { panic!("{:?}", station.local()) };
    assert!(server.ip().is_unicast_link_local());
    // An address that has been through a message has no scope.
    let server = SocketAddr::new((*server.ip()).into(), server.port());
    lab.on(2, || {
        let mut receiver = Receiving::open(&ReceiveConfig::new(group.clone(), server)).unwrap();
        assert!(receiver.send_to_server(b"feedback").unwrap());
        station.wait(Some(Duration::from_secs(5))).unwrap();
        assert!(matches!(station.next_event(), Some(Event::Feedback { bytes: b"feedback", .. })));
        assert!(station.send(b"to all"));
        station.wait(Some(Duration::ZERO)).unwrap();
        assert_eq!(take(&mut receiver, 1), [b"to all"]);
    });
}

#[test]
fn a_group_out_of_reach_is_refused_in_words() {
    let Some(lab) = Lab::new("a_group_out_of_reach_is_refused_in_words", 1, 1500) else { return };
    let error = |group: &str| {
        let config = StationConfig::new(group.parse().unwrap());
        lab.on(1, || Station::<()>::open(&config, None).unwrap_err().to_string())
    };
    let lo = error("[ff15::71]:7071%lo");
    assert!(lo.starts_with("[ff15::71]:7071%lo: no route to the group on lo: Network is unreachable"), "{lo}");
    assert!(lo.contains("ip -6 route add local ff15::71 dev lo table local"), "{lo}");
    let unnamed = error("239.71.0.1:7071");
    assert!(unnamed.contains("no route to the group: Network is unreachable"), "{unnamed}");
    assert!(unnamed.contains("name an interface, as 239.71.0.1:7071%eth0"), "{unnamed}");

    lab.run(1, "ip -6 route add local ff15::71 dev lo table local").unwrap();
    let group: Group = "[ff15::71]:7071%lo".parse().unwrap();
    lab.on(1, || {
        let mut station = open(StationConfig::new(group.clone()));
        assert_eq!((station.local().ip(), station.max_datagram()), ("::1".parse().unwrap(), 60 << 10));
        let mut receiver = Receiving::open(&ReceiveConfig::new(group, station.local())).unwrap();
        assert!(station.send(b"here"));
        station.wait(Some(Duration::ZERO)).unwrap();
        assert_eq!(take(&mut receiver, 1), [b"here"]);
    });
}

#[test]
fn a_station_that_was_opened_elsewhere_belongs_to_the_thread_that_waits() {
    let group: Group = "239.255.71.200:20200%lo".parse().unwrap();
    let mut station = open(StationConfig { ttl: 0, ..StationConfig::new(group.clone()) });
    std::thread::spawn(move || {
        let mut receiver = Receiving::open(&ReceiveConfig::new(group, station.local())).unwrap();
        assert!(station.send(b"from here"));
        station.wait(Some(Duration::ZERO)).unwrap();
        assert_eq!(take(&mut receiver, 1), [b"from here"]);
    })
    .join()
    .unwrap();
}
