//! What one send consists of, kept together with whatever it refers to.

use std::ops::Range;

/// Bytes in a burst at most, so that it leaves as one message of the IP layer, whose length has 16 bits.
pub const MAX_BURST: usize = 60 << 10;

/// Datagrams in a burst at most: what every kernel that segments takes (`UDP_MAX_SEGMENTS`).
pub const MAX_DATAGRAMS: usize = 64;

/// Parts in a burst at most, the kernel's limit (`UIO_MAXIOV`).
const MAX_PARTS: usize = 1024;

/// Datagrams that are sent together: a stream of bytes cut into segments of one size, the last of which may be shorter.
///
/// Bytes are either copied in, or stay where they are and are only referred to; `K` is what keeps those in place (an `Arc` of
/// the mapping, say) and comes back with the burst when the kernel is done with it.
///
/// ```
/// let mut burst = mcast_socket::Burst::<std::sync::Arc<Vec<u8>>>::new(1000);
/// let pages = std::sync::Arc::new(vec![7; 4096]);
/// burst.copy(&[1; 24]);
/// burst.refer(pages.as_ptr().addr(), 976);
/// burst.keep(pages);
/// assert_eq!((burst.len(), burst.datagrams()), (1000, 1));
/// ```
#[derive(Debug)]
pub struct Burst<K> {
    segment: u16,
    own: Vec<u8>,
    parts: Vec<Part>,
    length: usize,
    kept: Option<K>,
}

#[derive(Debug)]
enum Part {
    Own(Range<usize>),
    Elsewhere { address: usize, length: usize },
}

impl<K> Burst<K> {
    /// An empty burst of datagrams of `segment` bytes, headers of the protocol included and those of UDP not.
    ///
    /// # Panics
    /// When `segment` is 0.
    pub fn new(segment: u16) -> Self {
        assert!(segment > 0, "datagrams of no bytes");
        Self { segment, own: Vec::new(), parts: Vec::new(), length: 0, kept: None }
    }

    /// Makes it empty again, for datagrams of `segment` bytes; its memory stays.
    ///
    /// # Panics
    /// When `segment` is 0.
    pub fn reset(&mut self, segment: u16) {
        assert!(segment > 0, "datagrams of no bytes");
        self.segment = segment;
        self.own.clear();
        self.parts.clear();
        self.length = 0;
        self.kept = None;
    }

    /// Appends a copy of `bytes`.
    pub fn copy(&mut self, bytes: &[u8]) {
        let start = self.own.len();
        self.own.extend_from_slice(bytes);
        self.length += bytes.len();
        match self.parts.last_mut() {
            Some(Part::Own(range)) if range.end == start => range.end = self.own.len(),
            _ => self.parts.push(Part::Own(start..self.own.len())),
        }
    }

    /// Appends the `length` bytes at `address` without a copy. Only the kernel reads them: where nothing is mapped (any more),
    /// the burst fails with [`SendError::Unreadable`](crate::SendError::Unreadable), and nothing else happens.
    ///
    /// They go to the network as they are when the burst is sent, so what is there must stay there: see [`Burst::keep`].
    pub fn refer(&mut self, address: usize, length: usize) {
        if length > 0 {
            self.length += length;
            match self.parts.last_mut() {
                Some(Part::Elsewhere { address: before, length: so_far }) if *before + *so_far == address => {
                    *so_far += length
                }
                _ => self.parts.push(Part::Elsewhere { address, length }),
            }
        }
    }

    /// Keeps `owner` until the kernel is done with the burst.
    pub fn keep(&mut self, owner: K) {
        self.kept = Some(owner);
    }

    /// Takes out what was kept.
    pub fn take_kept(&mut self) -> Option<K> {
        self.kept.take()
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// True when there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The size of each datagram but the last in bytes.
    pub fn segment(&self) -> u16 {
        self.segment
    }

    /// How many datagrams it is.
    pub fn datagrams(&self) -> usize {
        self.length.div_ceil(usize::from(self.segment))
    }

    /// True when a burst of this size can be sent.
    pub fn fits(&self) -> bool {
        !self.is_empty()
            && self.length <= MAX_BURST
            && self.datagrams() <= MAX_DATAGRAMS
            && self.parts.len() <= MAX_PARTS
    }

    /// Calls `piece` with address and length of each piece in its order, cut where a part ends and, with `cut`, where a
    /// datagram ends. They are good until the burst is changed or dropped.
    pub(crate) fn for_each_piece(&self, cut: bool, mut piece: impl FnMut(usize, usize)) {
        let segment = if cut { usize::from(self.segment) } else { usize::MAX };
        let mut room = segment;
        for part in &self.parts {
            let (mut start, mut left) = match part {
                Part::Own(range) => (self.own.as_ptr().addr() + range.start, range.len()),
                Part::Elsewhere { address, length } => (*address, *length),
            };
            while left > 0 {
                let length = left.min(room);
                piece(start, length);
                (start, left, room) = (start.wrapping_add(length), left - length, room - length);
                if room == 0 {
                    room = segment;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_bytes_in_order_cut_where_datagrams_end() {
        // Every size of segment, parts of many lengths: the cuts must fall on the multiples, and nothing get lost.
        for segment in 1..40u16 {
            let bytes: Vec<u8> = (0..=255).collect();
            let mut burst = Burst::<()>::new(segment);
            let mut expected = Vec::new();
            for length in [3usize, 1, 40, 7, 39, 38, 2, 80] {
                let part = &bytes[expected.len() % 100..][..length];
                expected.extend_from_slice(part);
                if length % 2 == 1 { burst.copy(part) } else { burst.refer(part.as_ptr().addr(), length) }
            }
            assert_eq!((burst.len(), burst.datagrams()), (210, 210usize.div_ceil(segment.into())));
            for cut in [true, false] {
                let mut position = 0;
                burst.for_each_piece(cut, |address, length| {
                    let end = position + length;
                    if cut {
                        assert!((end - 1) / usize::from(segment) == position / usize::from(segment), "crosses a cut");
                    }
                    let piece = &expected[position..end];
                    let here = [burst.own.as_slice(), &bytes].into_iter().any(|memory| {
                        address.checked_sub(memory.as_ptr().addr()).and_then(|at| memory.get(at..at + length))
                            == Some(piece)
                    });
                    assert!(here, "segment {segment}: {length} bytes at {position}");
                    position = end;
                });
                assert_eq!(position, 210);
            }
        }
    }

    #[test]
    fn bursts_have_a_bound() {
        let mut burst = Burst::<()>::new(1448);
        assert!(!burst.fits());
        burst.refer(0x1000, MAX_BURST);
        assert!(burst.fits());
        burst.copy(&[0]);
        assert!(!burst.fits());
        burst.reset(10);
        burst.refer(0x1000, 640);
        assert!(burst.fits());
        burst.copy(&[0]);
        assert!(!burst.fits());
    }
}
