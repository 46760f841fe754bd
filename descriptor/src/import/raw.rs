//! Raw memory: a file that holds nothing but pages.
//!
//! The regions lie in the file one behind the other; where they lie in the guest the caller says, as no header does. The file
//! is served in place.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::SystemTime;
use std::{fs, io};

use thiserror::Error;

use super::relative_to;
use crate::image::{Extent, ExtentError, ExtentTable, ImageError, ImageFile, ImageIndex, ImageReader};
use crate::memory::{MemoryMap, MemoryMapError, PageSize, Region, RegionKind};
use crate::vm::{Hypervisor, Identity};
use crate::{Descriptor, Endpoint, FrameRange, FrameSet, Gfn, ImageId, PAGE_SIZE, PageCount};

/// A raw memory file and what it does not say of itself.
#[derive(Clone, Debug)]
pub struct RawImage {
    /// The file.
    pub file: PathBuf,
    /// The regions in the order in which they lie in the file; where there are none, the file is one region called `ram`, from
    /// frame 0 on.
    pub regions: Vec<RawRegion>,
    /// The name of the new image.
    pub image: ImageId,
    /// The parent's name, for people.
    pub parent: String,
    /// The page servers to be written into the descriptor.
    pub servers: Vec<Endpoint>,
}

/// Where a region lies in the guest: `NAME@START:SIZE`, with `:2M` behind it for memory in huge pages. START and SIZE are in
/// bytes, decimal or hexadecimal with `0x`, or in `K`, `M` or `G`.
///
/// ```
/// use descriptor::import::raw::RawRegion;
///
/// let high: RawRegion = "high@4G:512M:2M".parse()?;
/// assert_eq!(high.frames.start().index(), 1 << 20);
/// # Ok::<(), descriptor::import::raw::ParseRegionError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawRegion {
    /// The name.
    pub name: String,
    /// The frames.
    pub frames: FrameRange,
    /// The size of the host pages that clones should back it with.
    pub page_size: PageSize,
}

/// A text that is no region.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{text:?} is not NAME@START:SIZE or NAME@START:SIZE:2M ({reason})")]
pub struct ParseRegionError {
    text: String,
    reason: &'static str,
}

/// A raw file that cannot be imported.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RawError {
    /// The file cannot be looked at.
    #[error("cannot open {path}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file is no regular one, so that it has no pages that stay.
    #[error("{path} is not a regular file", path = .0.display())]
    NotRegular(PathBuf),
    /// The file does not consist of pages.
    #[error("{path} has {length} bytes, which is not a multiple of {PAGE_SIZE}, or nothing", path = path.display())]
    NotPages {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        length: u64,
    },
    /// The regions do not make up the file.
    #[error("{path} has {length} bytes, but the regions given take {regions}", path = path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        length: u64,
        /// The length of the regions together.
        regions: u64,
    },
    /// The regions make no memory map.
    #[error("the regions make no memory map")]
    Memory(#[from] MemoryMapError),
    /// The regions make no extent table.
    #[error("the regions do not lie in the file")]
    Extents(#[from] ExtentError),
    /// The pages cannot be read.
    #[error("cannot look for zero pages")]
    Scan(#[from] ImageError),
}

/// Makes a descriptor and an image index of a raw file. In the index its path is relative to `base`, the folder that the index
/// will lie in, where it lies below it. The capture's time is the file's last modification.
///
/// `scan` finds the zero frames among those given; usually it is [`crate::image::zero_frames`].
///
/// # Errors
/// When the file cannot be read, or the regions do not fit it.
pub fn import(
    raw: &RawImage,
    base: &Path,
    scan: impl FnOnce(&ImageReader, &FrameSet) -> Result<FrameSet, ImageError>,
) -> Result<(Descriptor, ImageIndex), RawError> {
    let path = &raw.file;
    let metadata = fs::metadata(path).map_err(|source| RawError::Open { path: path.clone(), source })?;
    if !metadata.is_file() {
        return Err(RawError::NotRegular(path.clone()));
    }
    let length = metadata.len();
    let pages = PageCount::from_bytes_exact(length).filter(|pages| !pages.is_zero());
    let pages = pages.ok_or_else(|| RawError::NotPages { path: path.clone(), length })?;
    let (memory, extents) = layout(raw, pages)?;
    let index = ImageIndex {
        image: raw.image,
        zero: FrameSet::empty(memory.universe()),
        memory,
        files: vec![ImageFile { path: relative_to(path, base), length }],
        extents: ExtentTable::new(extents, &[length])?,
    };
    let reader = ImageReader::new(index, base)?;
    let zero = scan(&reader, &reader.index().memory.present())?;
    let index = ImageIndex { zero: zero.clone(), ..reader.into_index() };
    let empty = FrameSet::empty(index.memory.universe());
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    let descriptor = Descriptor {
        identity: Identity {
            image: raw.image,
            parent: raw.parent.clone(),
            hypervisor: Hypervisor::Raw,
            hypervisor_version: String::new(),
            machine: String::new(),
            captured_unix_ns: modified.map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)),
            pause_us: None,
        },
        memory: index.memory.clone(),
        records: Vec::new(),
        eager: empty.clone(),
        zero,
        free: empty,
        prefetch: Vec::new(),
        servers: raw.servers.clone(),
    };
    Ok((descriptor, index))
}

/// The memory map, and one extent for each region, both in ascending order of frames.
fn layout(raw: &RawImage, pages: PageCount) -> Result<(MemoryMap, Vec<Extent>), RawError> {
    let whole = FrameRange::checked(Gfn::new(0), pages).ok_or(MemoryMapError::TooLarge(Gfn::MAX))?;
    let only = [RawRegion { name: "ram".to_owned(), frames: whole, page_size: PageSize::Base }];
    let given = if raw.regions.is_empty() { only.as_slice() } else { &raw.regions };
    let total = given.iter().fold(0u64, |total, region| total.saturating_add(region.frames.count().bytes()));
    if total != pages.bytes() {
        return Err(RawError::Length { path: raw.file.clone(), length: pages.bytes(), regions: total });
    }
    let mut offset = 0;
    let mut placed: Vec<(&RawRegion, u64)> = Vec::with_capacity(given.len());
    for region in given {
        placed.push((region, offset));
        offset += region.frames.count().bytes();
    }
    placed.sort_by_key(|(region, _)| region.frames.start());
    let regions = placed.iter().map(|(region, _)| Region {
        name: region.name.clone(),
        frames: region.frames,
        kind: RegionKind::Ram,
        page_size: region.page_size,
    });
    let memory = MemoryMap::new(regions.collect())?;
    let stride = PAGE_SIZE as u32;
    let extents =
        placed.iter().map(|(region, offset)| Extent { frames: region.frames, file: 0, offset: *offset, stride });
    Ok((memory, extents.collect()))
}

impl FromStr for RawRegion {
    type Err = ParseRegionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = |reason| ParseRegionError { text: text.chars().take(300).collect(), reason };
        let (name, place) = text.split_once('@').ok_or_else(|| refused("there is no @"))?;
        let (start, size) = place.split_once(':').ok_or_else(|| refused("there is no size"))?;
        let (size, page_size) = match size.split_once(':') {
            None => (size, PageSize::Base),
            Some((size, "4K")) => (size, PageSize::Base),
            Some((size, "2M")) => (size, PageSize::Huge),
            Some(_) => return Err(refused("the page size is neither 4K nor 2M")),
        };
        let bytes = |text| parse_bytes(text).ok_or_else(|| refused("START and SIZE are numbers, or end in K, M or G"));
        let pages = |text| {
            PageCount::from_bytes_exact(bytes(text)?).ok_or_else(|| refused("START and SIZE are multiples of 4096"))
        };
        let start = Gfn::checked(pages(start)?.get()).ok_or_else(|| refused("START is too large"))?;
        let frames = FrameRange::checked(start, pages(size)?).ok_or_else(|| refused("SIZE is too large"))?;
        if name.is_empty() || frames.is_empty() {
            return Err(refused("the name or the size is nothing"));
        }
        Ok(Self { name: name.to_owned(), frames, page_size })
    }
}

fn parse_bytes(text: &str) -> Option<u64> {
    let (digits, unit) = match text.char_indices().last()? {
        (end, 'K' | 'k') => (&text[..end], 1 << 10),
        (end, 'M' | 'm') => (&text[..end], 1 << 20),
        (end, 'G' | 'g') => (&text[..end], 1 << 30),
        _ => (text, 1),
    };
    let number = match digits.strip_prefix("0x") {
        Some(hex) if hex.bytes().all(|digit| digit.is_ascii_hexdigit()) => u64::from_str_radix(hex, 16).ok()?,
        None if digits.bytes().all(|digit| digit.is_ascii_digit()) => digits.parse().ok()?,
        _ => return None,
    };
    number.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::zero_frames;

    const PAGE: usize = PAGE_SIZE as usize;

    fn raw(file: PathBuf, regions: &[&str]) -> RawImage {
        let regions = regions.iter().map(|text| text.parse().unwrap()).collect();
        RawImage { file, regions, image: ImageId::from_bytes([9; 16]), parent: "p".into(), servers: Vec::new() }
    }

    fn scan(image: &ImageReader, frames: &FrameSet) -> Result<FrameSet, ImageError> {
        zero_frames(image, frames, &|_| ())
    }

    fn range(start: u64, count: u64) -> FrameRange {
        FrameRange::new(Gfn::new(start), PageCount::new(count))
    }

    #[test]
    fn one_region_by_default() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ram");
        fs::write(&file, [[1; PAGE], [0; PAGE], [2; PAGE]].concat()).unwrap();
        let (descriptor, index) = import(&raw(file, &[]), folder.path(), scan).unwrap();
        assert_eq!((descriptor.check(), index.check()), (Ok(()), Ok(())));
        assert_eq!(index.files, [ImageFile { path: "ram".into(), length: 3 * PAGE_SIZE }]);
        assert_eq!(descriptor.memory.region_named("ram").map(|region| region.frames), Some(range(0, 3)));
        assert_eq!(descriptor.zero.runs().collect::<Vec<_>>(), [range(1, 1)]);
        assert_eq!((descriptor.zero, descriptor.memory), (index.zero, index.memory));
        assert!(descriptor.identity.captured_unix_ns > 1_600_000_000_000_000_000);
    }

    #[test]
    fn regions_lie_in_the_file_in_the_order_given() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ram");
        fs::write(&file, [[1; PAGE], [2; PAGE], [3; PAGE]].concat()).unwrap();
        let raw = raw(file, &["high@0x100000:8192", "low@0:4K"]);
        let (_, index) = import(&raw, folder.path(), scan).unwrap();
        let reader = ImageReader::new(index, folder.path()).unwrap();
        let first_byte = |gfn| {
            let mut page = [0; PAGE];
            reader.read_page(Gfn::new(gfn), &mut page).map(|()| page[0])
        };
        assert_eq!([0, 256, 257].map(|gfn| first_byte(gfn).unwrap()), [3, 1, 2]);
        assert!(matches!(first_byte(1), Err(ImageError::Absent(_))));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ram");
        let refused = |regions: &[&str]| import(&raw(file.clone(), regions), folder.path(), scan).unwrap_err();
        assert!(matches!(refused(&[]), RawError::Open { .. }));
        fs::write(&file, []).unwrap();
        assert!(matches!(refused(&[]), RawError::NotPages { length: 0, .. }));
        fs::write(&file, [1; PAGE + 1]).unwrap();
        assert!(matches!(refused(&[]), RawError::NotPages { length: 4097, .. }));
        fs::write(&file, [1; 2 * PAGE]).unwrap();
        assert!(matches!(refused(&["a@0:4K"]), RawError::Length { regions: 4096, .. }));
        assert!(matches!(refused(&["a@0:4K", "b@0:4K"]), RawError::Memory(MemoryMapError::Overlap { .. })));
        assert!(matches!(refused(&["a@0:8K:2M"]), RawError::Memory(MemoryMapError::Unaligned { .. })));
        let folder_itself = import(&raw(folder.path().to_owned(), &[]), folder.path(), scan);
        assert!(matches!(folder_itself, Err(RawError::NotRegular(_))));
    }

    #[test]
    fn texts_of_regions() {
        let region: RawRegion = "a:b@1G:0x200000:2M".parse().unwrap();
        assert_eq!((region.frames, region.page_size), (range(1 << 18, 512), PageSize::Huge));
        for text in
            ["", "a", "a@", "a@0", "@0:4K", "a@0:0", "a@0:4K:3M", "a@1:4K", "a@0:+4096", "a@0:17179869184G", "a@0:é"]
        {
            assert!(text.parse::<RawRegion>().is_err(), "{text}");
        }
    }
}
