//! What the descriptor of a Xen guest holds beside its memory.
//!
//! Its records are the headers and records of the toolstack's stream to the byte, so that they are a stream again when they are
//! written one behind the other: one that brings a clone its state and its special pages, and leaves its memory out. They are
//! called by their layer and type, as in Xen's own documents: `xl/header`, `libxl/header`, `libxl/LIBXC_CONTEXT`, `libxc/header`,
//! `libxc/X86_CPUID_POLICY`, …, `libxc/PAGE_DATA` for the special pages, …, `libxl/END`; `libxl/optional` and `libxc/optional`
//! for records that are not known, and need not be.

use thiserror::Error;

use super::stream::{PAGE_DATA, Stream, StreamError, page_data_record, xl_header};
use super::{Layout, LayoutError};
use crate::image::{ImageError, ReadPages};
use crate::memory::RegionKind;
use crate::vm::{Hypervisor, HypervisorRecord};
use crate::{Descriptor, FrameSet, PAGE_SIZE};

/// Pages in a record, as `xl save` has it.
const BATCH: usize = 1024;

/// A descriptor that no Xen clone can be made from.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RecordError {
    /// A descriptor of another hypervisor.
    #[error("the descriptor is of {0:?}, not of Xen")]
    NotXen(Hypervisor),
    /// Records that make no stream.
    #[error("the descriptor's records are not a stream of xl")]
    Stream(#[from] StreamError),
    /// Pages in the records that make no memory.
    #[error("the pages in the descriptor's records make no memory")]
    Layout(#[from] LayoutError),
    /// Something behind the end of the stream.
    #[error("the descriptor's records go on for {0} bytes after the end of the stream")]
    Trailing(u64),
    /// Other pages than the special ones.
    #[error("the descriptor's records bring other pages along than its ROM regions")]
    Pages,
}

/// The stream that `xl restore` makes a clone of: all of the parent's state, its special pages (the ROM regions of the descriptor),
/// and no memory.
///
/// # Errors
/// When the descriptor is not of a Xen guest, or its records do not fit together.
pub fn hole_stream(descriptor: &Descriptor) -> Result<Vec<u8>, RecordError> {
    if descriptor.identity.hypervisor != Hypervisor::Xen {
        return Err(RecordError::NotXen(descriptor.identity.hypervisor));
    }
    let bytes: Vec<u8> = descriptor.records.iter().flat_map(|record| record.data.iter().copied()).collect();
    let stream = Stream::parse(&mut bytes.as_slice())?;
    if stream.length != bytes.len() as u64 {
        return Err(RecordError::Trailing(bytes.len() as u64 - stream.length));
    }
    let brought = Layout::new(&stream)?.memory;
    let brought = brought.regions().iter().map(|region| region.frames);
    let roms = descriptor.memory.regions().iter().filter(|region| region.kind == RegionKind::Rom);
    if brought.eq(roms.map(|region| region.frames)) { Ok(bytes) } else { Err(RecordError::Pages) }
}

/// The stream `hole` with another configuration in JSON, by which `xl restore` makes another domain of it: of another name, for one.
///
/// # Errors
/// When `hole` is no stream.
pub fn with_config(hole: &[u8], config: &str) -> Result<Vec<u8>, RecordError> {
    let mut bytes = hole;
    let stream = Stream::parse(&mut bytes)?;
    let header = stream.records.first().map_or(0, |record| record.data.len());
    Ok([xl_header(config), hole[header..].to_vec()].concat())
}

/// The records of a stream, with those pages of its `layout` that are special; `image` reads them.
///
/// # Errors
/// When a page cannot be read.
pub fn records(stream: Stream, layout: &Layout, image: &dyn ReadPages) -> Result<Vec<HypervisorRecord>, ImageError> {
    let mut special = FrameSet::empty(layout.memory.universe());
    let roms = layout.memory.regions().iter().filter(|region| region.kind == RegionKind::Rom);
    roms.for_each(|region| _ = special.insert_range(region.frames));
    let mut unwritten = special.clone();
    unwritten.intersect_with(&layout.holes);
    let mut stored = special;
    stored.subtract(&layout.holes);
    let mut pages = Vec::new();
    for run in stored.runs() {
        let mut bytes = vec![0; run.count().bytes() as usize];
        image.read_pages(run, &mut bytes)?;
        let (bytes, _) = bytes.as_chunks::<{ PAGE_SIZE as usize }>();
        pages.extend(run.frames().map(|gfn| gfn.index()).zip(bytes.iter().copied()));
    }
    let unwritten: Vec<u64> =
        unwritten.runs().flat_map(|run| run.frames().collect::<Vec<_>>()).map(|gfn| gfn.index()).collect();
    let of_pages = pages.chunks(BATCH).map(|batch| page_data_record(batch, &[]));
    let of_holes = unwritten.chunks(BATCH).map(|batch| page_data_record(&[], batch));
    let pages = of_pages.chain(of_holes).map(|data| HypervisorRecord { name: PAGE_DATA.to_owned(), data });
    let mut records = stream.records;
    let at = stream.pages_at.min(records.len());
    records.splice(at..at, pages.collect::<Vec<_>>());
    Ok(records)
}
