//! The station with what waits for room in it.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use mcast_socket::{Burst, Event, Station};

use super::gather::Kept;

/// Bursts that are kept for later use: as many as are ever under way.
const SPARE: usize = 16;

/// Sends bursts in their order, and uses their memory again.
#[derive(Debug)]
pub(super) struct Outbox {
    station: Station<Kept>,
    waiting: VecDeque<Burst<Kept>>,
    spare: Vec<Burst<Kept>>,
}

impl Outbox {
    pub(super) fn new(station: Station<Kept>) -> Self {
        Self { station, waiting: VecDeque::new(), spare: Vec::new() }
    }

    pub(super) fn station(&self) -> &Station<Kept> {
        &self.station
    }

    /// An empty burst of datagrams of `segment` bytes.
    pub(super) fn burst(&mut self, segment: u16) -> Burst<Kept> {
        match self.spare.pop() {
            Some(mut burst) => {
                burst.reset(segment);
                burst
            }
            None => Burst::new(segment),
        }
    }

    /// Sends a burst, now or as soon as there is room.
    pub(super) fn push(&mut self, burst: Burst<Kept>) {
        if burst.is_empty() {
            return self.reuse(burst);
        }
        if !self.waiting.is_empty() {
            self.waiting.push_back(burst);
        } else if let Err(burst) = self.station.submit(burst) {
            self.waiting.push_back(burst);
        }
    }

    /// Sends a small datagram.
    pub(super) fn control(&mut self, datagram: &[u8]) -> bool {
        self.station.send(datagram)
    }

    /// True when what is pushed goes out at once.
    pub(super) fn has_room(&mut self) -> bool {
        while self.station.room() > 0
            && let Some(burst) = self.waiting.pop_front()
        {
            if let Err(burst) = self.station.submit(burst) {
                self.waiting.push_front(burst);
                return false;
            }
        }
        self.waiting.is_empty() && self.station.room() > 0
    }

    /// Takes a burst back that the kernel is done with.
    pub(super) fn reuse(&mut self, mut burst: Burst<Kept>) {
        drop(burst.take_kept());
        if self.spare.len() < SPARE {
            self.spare.push(burst);
        }
    }

    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.station.wait(timeout)
    }

    pub(super) fn next_event(&mut self) -> Option<Event<'_, Kept>> {
        self.station.next_event()
    }
}

#[cfg(test)]
mod tests {
    use mcast_socket::{Station, StationConfig};

    use super::*;

    #[test]
    fn what_finds_no_room_waits_in_its_order() {
        let group = "239.255.70.17:17071%lo".parse().unwrap();
        let station = Station::open(&StationConfig { ttl: 0, ..StationConfig::new(group) }, None).unwrap();
        let mut outbox = Outbox::new(station);
        let room = outbox.station().room();
        for length in 1..=room + 3 {
            let mut burst = outbox.burst(1000);
            burst.copy(&vec![0; length]);
            outbox.push(burst);
        }
        let mut sent = Vec::new();
        while sent.len() < room + 3 {
            assert!(!outbox.has_room() || sent.len() >= 3);
            outbox.wait(Some(Duration::from_secs(5))).unwrap();
            while let Some(event) = outbox.next_event() {
                if let Event::Sent { burst, .. } = event {
                    sent.push(burst.len());
                }
            }
        }
        assert_eq!(sent, (1..=room + 3).collect::<Vec<_>>());
    }
}
