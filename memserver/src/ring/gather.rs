//! What one send consists of, kept together with everything that it refers to.

use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use descriptor::FrameRange;

use crate::image::ServedImage;

/// Bytes of a pooled send's own buffers beyond which they are given back to the allocator.
const KEPT: usize = 1 << 20;

/// A message of many pieces: heads and compressed pages of its own, and pages of an image that it keeps mapped.
#[derive(Debug, Default)]
pub(super) struct Gather {
    image: Option<Arc<ServedImage>>,
    own: Vec<u8>,
    parts: Vec<Part>,
    descriptors: Vec<RawFd>,
    length: usize,
}

#[derive(Debug)]
enum Part {
    Own(Range<usize>),
    Image { address: usize, length: usize },
}

impl Gather {
    /// Makes it empty, to be filled from `image`.
    pub(super) fn reset(&mut self, image: Option<Arc<ServedImage>>) {
        self.image = image;
        self.own.clear();
        self.own.shrink_to(KEPT);
        self.parts.clear();
        self.descriptors.clear();
        self.length = 0;
    }

    /// Appends a copy of `bytes`.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.push_with(|own| own.extend_from_slice(bytes));
    }

    /// Appends what `write` appends to the buffer that it is given; it must not change what is there.
    pub(super) fn push_with<T>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let start = self.own.len();
        let result = write(&mut self.own);
        let end = self.own.len();
        self.length += end - start;
        match self.parts.last_mut() {
            Some(Part::Own(range)) if range.end == start => range.end = end,
            _ => self.parts.push(Part::Own(start..end)),
        }
        result
    }

    /// Appends the pages of `frames`, which must be stored in the image, without a copy.
    pub(super) fn push_stored(&mut self, frames: FrameRange) {
        let Some(image) = &self.image else { return };
        let (parts, total) = (&mut self.parts, &mut self.length);
        image.pieces(frames, |address, length| {
            parts.push(Part::Image { address: address as usize, length });
            *total += length;
        });
    }

    /// Appends the IMAGE message, with the files of the image.
    pub(super) fn push_local(&mut self) {
        let Some(image) = &self.image else { return };
        let (message, files) = image.local_message();
        // The message lives as long as the image.
        self.parts.push(Part::Image { address: message.as_ptr() as usize, length: message.len() });
        self.length += message.len();
        self.descriptors.extend(files.map(AsRawFd::as_raw_fd));
    }

    /// The length in bytes.
    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// The descriptors that go with the first byte.
    pub(super) fn descriptors(&self) -> &[RawFd] {
        &self.descriptors
    }

    /// The only piece of the image, where it is the last of all.
    pub(super) fn only_stored(&self) -> Option<(usize, usize)> {
        match self.parts.as_slice() {
            [Part::Own(_), Part::Image { address, length }] if self.descriptors.is_empty() => Some((*address, *length)),
            _ => None,
        }
    }

    /// The pieces from byte `skip` on, as addresses and lengths. They are good until the gather is changed or dropped.
    pub(super) fn pieces(&self, mut skip: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.parts.iter().filter_map(move |part| {
            let (address, length) = match part {
                Part::Own(range) => (self.own.as_ptr() as usize + range.start, range.len()),
                Part::Image { address, length } => (*address, *length),
            };
            let skipped = skip.min(length);
            skip -= skipped;
            (skipped < length).then_some((address + skipped, length - skipped))
        })
    }
}
