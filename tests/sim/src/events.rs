//! What is to happen when: a queue under a virtual clock.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

/// Events in the order of their times, those of one time in the order in which they were added.
#[derive(Debug)]
pub struct Queue<E> {
    now: Duration,
    added: u64,
    heap: BinaryHeap<Reverse<Entry<E>>>,
}

#[derive(Debug)]
struct Entry<E> {
    at: (Duration, u64),
    event: E,
}

impl<E> Queue<E> {
    /// An empty queue at time 0.
    pub fn new() -> Self {
        Self { now: Duration::ZERO, added: 0, heap: BinaryHeap::new() }
    }

    /// The time of the event that came last.
    pub fn now(&self) -> Duration {
        self.now
    }

    /// Adds an event; one in the past comes now.
    pub fn at(&mut self, time: Duration, event: E) {
        self.added += 1;
        self.heap.push(Reverse(Entry { at: (time.max(self.now), self.added), event }));
    }

    /// Adds an event that comes `delay` from now.
    pub fn after(&mut self, delay: Duration, event: E) {
        self.at(self.now + delay, event);
    }

    /// The next event, whose time it is now.
    pub fn pop(&mut self) -> Option<E> {
        let Reverse(entry) = self.heap.pop()?;
        self.now = entry.at.0;
        Some(entry.event)
    }
}

impl<E> Default for Queue<E> {
    fn default() -> Self {
        Self::new()
    }
}

impl<E> PartialEq for Entry<E> {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl<E> Eq for Entry<E> {}

impl<E> PartialOrd for Entry<E> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Entry<E> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}
