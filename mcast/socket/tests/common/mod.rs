//! What tests of sockets share: bursts of known bytes, and waiting that ends.
#![allow(clippy::unwrap_used)] // A helper that fails is a test that fails.
#![allow(dead_code)] // Each test program uses its own part of this.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mcast_socket::{Burst, Event, Features, Receiving, SendError, Station};
use rustix::event::{PollFd, PollFlags, Timespec};

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// What bursts refer to is kept by this.
pub(crate) type Bytes = Arc<Vec<u8>>;

/// Every way to use the kernel.
pub(crate) fn all_features() -> impl Iterator<Item = Features> {
    [(true, true), (true, false), (false, true), (false, false)]
        .map(|(ring, offload)| Features { ring, offload })
        .into_iter()
}

/// `count` datagrams of `size` bytes but the last, of headers that are copied and bytes that are referred to.
pub(crate) fn burst(segment: u16, last: u16, count: u16, salt: u8) -> (Burst<Bytes>, Vec<Vec<u8>>) {
    let bytes: Bytes = Arc::new((0..=u16::MAX).map(|i| (i / 7) as u8 ^ salt).collect());
    let mut burst = Burst::new(segment);
    let mut expected = Vec::new();
    for index in 0..count {
        let size = if index + 1 == count { last } else { segment };
        let start = usize::from(index) * 100;
        let body = usize::from(size) - 8;
        burst.copy(&[salt, index as u8, 0, 0, 1, 2, 3, 4]);
        // Two pieces, so that datagrams are of several.
        burst.refer(bytes.as_ptr().addr() + start, body / 3);
        burst.refer(bytes.as_ptr().addr() + start + body / 3, body - body / 3);
        let mut datagram = vec![salt, index as u8, 0, 0, 1, 2, 3, 4];
        datagram.extend_from_slice(&bytes[start..start + body]);
        expected.push(datagram);
    }
    burst.keep(bytes);
    (burst, expected)
}

/// Takes `count` datagrams.
pub(crate) fn take(receiver: &mut Receiving, count: usize) -> Vec<Vec<u8>> {
    let start = Instant::now();
    let mut all = Vec::new();
    while all.len() < count {
        while let Some(datagram) = receiver.receive().unwrap() {
            all.push(datagram.bytes.to_vec());
        }
        assert!(start.elapsed() < PATIENCE, "{} of {count} datagrams came", all.len());
        if all.len() < count {
            readable(receiver, Duration::from_millis(100));
        }
    }
    all
}

pub(crate) fn readable(receiver: &Receiving, timeout: Duration) -> bool {
    let timeout = Timespec::try_from(timeout).unwrap();
    rustix::event::poll(&mut [PollFd::from_borrowed_fd(receiver.fd(), PollFlags::IN)], Some(&timeout)).unwrap() > 0
}

/// Waits until all bursts are done.
pub(crate) fn finish(station: &mut Station<Bytes>) -> Vec<Result<(), SendError>> {
    let start = Instant::now();
    let mut results = Vec::new();
    while station.room() < 8 {
        assert!(start.elapsed() < PATIENCE, "{} bursts are under way", 8 - station.room());
        station.wait(Some(Duration::from_millis(100))).unwrap();
        while let Some(event) = station.next_event() {
            match event {
                Event::Sent { result, .. } => results.push(result),
                other => panic!("{other:?}"),
            }
        }
    }
    results
}
