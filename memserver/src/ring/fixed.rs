//! Images as registered buffers, so that zero-copy sends need not look their pages up each time.
//!
//! The kernel registers only what it may pin for long and write to: of files, those in memory (tmpfs), mapped writable. Such
//! a mapping is made for the moment of registering and gone before anything is sent. Other images, and those beyond
//! RLIMIT_MEMLOCK, are sent from their ordinary mapping, without a copy all the same.

use std::io;
use std::sync::Arc;

use super::sys::{FIXED, FixedPiece, Uring};
use crate::image::ServedImage;
use crate::sys::{Mapping, reopen_in_memory};

/// The largest buffer that the kernel registers.
const BUFFER: usize = 1 << 30;

/// The registered images of a ring.
#[derive(Debug)]
pub(super) struct FixedImages {
    available: bool,
    used: [bool; FIXED as usize],
    images: Vec<FixedImage>,
}

#[derive(Debug)]
struct FixedImage {
    /// Kept, so that the addresses of its mapping mean nothing else meanwhile.
    image: Arc<ServedImage>,
    chunks: Vec<Chunk>,
}

/// A part of a file.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    /// Where it lies in the image's mapping.
    start: usize,
    length: usize,
    buffer: u16,
    /// Where it lay when it was registered.
    address: usize,
}

impl FixedImages {
    pub(super) fn new(uring: &mut Uring, wanted: bool) -> Self {
        Self { available: wanted && uring.prepare_fixed(), used: [false; FIXED as usize], images: Vec::new() }
    }

    /// Registers what can be registered of `image`, unless that was tried before.
    pub(super) fn add(&mut self, uring: &mut Uring, image: &Arc<ServedImage>) {
        if !self.available || self.images.iter().any(|fixed| Arc::ptr_eq(&fixed.image, image)) {
            return;
        }
        let mut chunks = Vec::new();
        if let Err(error) = self.register(uring, image, &mut chunks) {
            tracing::info!(%error, image = %image.id(), "not all of the image is registered with io_uring");
        }
        self.images.push(FixedImage { image: Arc::clone(image), chunks });
    }

    /// Gives up what is registered of an image.
    pub(super) fn remove(&mut self, uring: &mut Uring, image: &Arc<ServedImage>) {
        let Some(index) = self.images.iter().position(|fixed| Arc::ptr_eq(&fixed.image, image)) else { return };
        for chunk in self.images.swap_remove(index).chunks {
            uring.unregister(chunk.buffer);
            if let Some(used) = self.used.get_mut(usize::from(chunk.buffer)) {
                *used = false;
            }
        }
    }

    /// The registered place of a piece of `image`.
    pub(super) fn find(&self, image: &Arc<ServedImage>, address: usize, length: usize) -> Option<FixedPiece> {
        let fixed = self.images.iter().find(|fixed| Arc::ptr_eq(&fixed.image, image))?;
        let holds = |chunk: &&Chunk| chunk.start <= address && address + length <= chunk.start + chunk.length;
        let chunk = fixed.chunks.iter().find(holds)?;
        Some(FixedPiece { buffer: chunk.buffer, address: chunk.address + (address - chunk.start), length })
    }

    /// Bytes that are registered.
    pub(super) fn bytes(&self) -> u64 {
        self.images.iter().flat_map(|fixed| &fixed.chunks).map(|chunk| chunk.length as u64).sum()
    }

    fn register(&mut self, uring: &mut Uring, image: &ServedImage, chunks: &mut Vec<Chunk>) -> io::Result<()> {
        for (file, mapping) in image.mappings() {
            let Some(writable) = reopen_in_memory(file)? else { continue };
            let passing = Mapping::of_file_writable(&writable, mapping.len())?;
            for offset in (0..mapping.len()).step_by(BUFFER) {
                let free = self.used.iter().position(|used| !used);
                let free = free.ok_or_else(|| io::Error::other("no place is left for it"))?;
                let length = BUFFER.min(mapping.len() - offset);
                let buffer = free as u16;
                uring.register(buffer, &passing, offset, length)?;
                self.used[free] = true;
                let start = mapping.address() as usize + offset;
                chunks.push(Chunk { start, length, buffer, address: passing.address() as usize + offset });
            }
        }
        Ok(())
    }
}
