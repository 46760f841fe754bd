use std::ops::Range;

use descriptor::fetch::{LocalImage, MAX_MESSAGE, wire};

/// Room for some of the longest messages of pages, so that what is moved to the front of the buffer, at most one incomplete
/// message, is a fraction of what is received.
const CAPACITY: usize = 4 * MAX_MESSAGE;

/// No message is longer: an IMAGE with every extent that it may have.
const MAX_CAPACITY: usize =
    size_of::<wire::Header>() + size_of::<wire::Image>() + LocalImage::MAX_EXTENTS * size_of::<wire::Extent>();

/// Received bytes, parsed in place: pages are installed straight from here.
pub(super) struct Inbox {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self { buffer: vec![0; CAPACITY], start: 0, end: 0 }
    }

    /// What is received and not consumed.
    pub(super) fn unread(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Marks the first `count` unread bytes as consumed and returns where they are. They stay there until [`Inbox::spare`].
    pub(super) fn consume(&mut self, count: usize) -> Range<usize> {
        let start = self.start;
        self.start = self.end.min(start + count);
        start..self.start
    }

    /// Consumed bytes, by the place that [`Inbox::consume`] returned.
    pub(super) fn consumed(&self, place: Range<usize>) -> &[u8] {
        &self.buffer[place]
    }

    /// Where to receive to, never empty while what is unread is shorter than the longest message. Overwrites what is consumed.
    pub(super) fn spare(&mut self) -> &mut [u8] {
        if self.start == self.end {
            // From the front again: after short messages the cache still has these lines.
            (self.start, self.end) = (0, 0);
        } else if self.buffer.len() - self.end < CAPACITY / 4 && self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.end == self.buffer.len() {
            let length = (2 * self.buffer.len()).min(MAX_CAPACITY);
            self.buffer.resize(length, 0);
        }
        &mut self.buffer[self.end..]
    }

    /// Marks `count` bytes of [`Inbox::spare`] as received.
    pub(super) fn received(&mut self, count: usize) {
        self.end = self.buffer.len().min(self.end + count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_as_they_went_in() {
        let mut inbox = Inbox::new();
        let (mut next_in, mut next_out) = (0u32, 0u32);
        for step in 0..2_000usize {
            let count = (step * 7919 % 9_000).min(inbox.spare().len() / 4);
            let bytes: Vec<u8> = (next_in..next_in + count as u32).flat_map(u32::to_le_bytes).collect();
            inbox.spare()[..bytes.len()].copy_from_slice(&bytes);
            inbox.received(bytes.len());
            next_in += count as u32;
            let take = inbox.unread().len() / 4 * 3 / 4;
            let place = inbox.consume(4 * take);
            for word in inbox.consumed(place).chunks_exact(4) {
                assert_eq!(word, next_out.to_le_bytes());
                next_out += 1;
            }
        }
        assert!(next_out > 1_000_000 && inbox.buffer.len() == CAPACITY);
    }

    #[test]
    fn one_long_message_makes_it_grow_to_its_bound() {
        let mut inbox = Inbox::new();
        while inbox.unread().len() < MAX_CAPACITY {
            let spare = inbox.spare().len();
            assert!(spare > 0);
            inbox.received(spare);
        }
        assert_eq!(inbox.buffer.len(), MAX_CAPACITY);
    }
}
