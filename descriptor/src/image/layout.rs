use crate::{FrameRange, PageCount};

/// Tells which frames of an image have bytes to send.
pub trait Layout {
    /// The longest head of `range`, which is not empty, whose frames are either all stored or all zero. A stored one is
    /// at most `limit` pages long.
    fn head(&self, range: FrameRange, limit: PageCount) -> (FrameRange, Content);
}

/// What a run of frames consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Pages in the image's files.
    Stored,
    /// Nothing but zeros.
    Zero,
}
