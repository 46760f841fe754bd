use zerocopy::{FromBytes, IntoBytes};

use super::error::FetchError;
use super::wire;
use crate::image::{Extent, ExtentError};
use crate::{FrameRange, Gfn, PageCount};

/// What a client of the local lane learns: how many files are attached and which frames lie where in them.
///
/// The client checks the extents against the lengths of the files that it got, with [`crate::image::ExtentTable::new`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalImage {
    /// The number of file descriptors that come with the message.
    pub files: u16,
    /// The extents in ascending order of frames.
    pub extents: Vec<Extent>,
}

impl LocalImage {
    /// The most files: what one `SCM_RIGHTS` message may carry is 253, and images have a handful.
    pub const MAX_FILES: u16 = 64;

    /// The most extents in the message, 32 MiB of it; an image in more pieces is served through the socket.
    pub const MAX_EXTENTS: usize = 1 << 20;

    pub(super) const MAX_BODY: usize = size_of::<wire::Image>() + Self::MAX_EXTENTS * size_of::<wire::Extent>();

    pub(super) fn encode(&self) -> Vec<u8> {
        assert!(
            self.files <= Self::MAX_FILES && self.extents.len() <= Self::MAX_EXTENTS,
            "too large for an IMAGE message"
        );
        let fixed =
            wire::Image { files: self.files.into(), reserved: 0.into(), extents: (self.extents.len() as u32).into() };
        let mut body = fixed.as_bytes().to_vec();
        for extent in &self.extents {
            let extent = wire::Extent {
                gfn: extent.frames.start().index().into(),
                pages: extent.frames.count().get().into(),
                offset: extent.offset.into(),
                stride: extent.stride.into(),
                file: extent.file.into(),
                reserved: 0.into(),
            };
            body.extend_from_slice(extent.as_bytes());
        }
        body
    }

    pub(super) fn decode(body: &[u8]) -> Result<Self, FetchError> {
        let bad_length = || FetchError::Length { kind: "IMAGE", length: body.len() };
        let (fixed, rest) = wire::Image::read_from_prefix(body).map_err(|_| bad_length())?;
        let extents = <[wire::Extent]>::ref_from_bytes(rest).map_err(|_| bad_length())?;
        if extents.len() != fixed.extents.get() as usize {
            return Err(bad_length());
        }
        let files = fixed.files.get();
        if files == 0 || files > Self::MAX_FILES {
            return Err(FetchError::Field { kind: "IMAGE", field: "number of files", value: files.into() });
        }
        let extents = extents.iter().map(decode_extent).collect::<Result<_, _>>()?;
        Ok(Self { files, extents })
    }
}

fn decode_extent(extent: &wire::Extent) -> Result<Extent, FetchError> {
    let gfn = extent.gfn.get();
    let start = Gfn::checked(gfn).ok_or(FetchError::Field { kind: "IMAGE", field: "frame number", value: gfn })?;
    let frames = FrameRange::checked(start, PageCount::new(extent.pages.get()))
        .filter(|frames| !frames.is_empty())
        .ok_or(ExtentError::Empty(start))?;
    Ok(Extent { frames, file: extent.file.get(), offset: extent.offset.get(), stride: extent.stride.get() })
}
