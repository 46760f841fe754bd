use super::cursor::Cursor;
use super::pages::{PageLog, PagePlace};
use super::{Input, Layer, Stream, StreamError, state};
use crate::vm::HypervisorRecord;
use crate::{Descriptor, FrameSet, PAGE_SIZE};

const XL_MAGIC: &[u8; 32] = b"Xen saved domain, xl format\n \0 \r";
const XL_BYTE_ORDER: u32 = 0x0102_0304;
/// There is a configuration, in JSON.
const XL_JSON: u32 = 1;
/// What follows is libxl's stream of version 2, as since Xen 4.6.
const XL_STREAM_V2: u32 = 2;

const LIBXL_IDENT: &[u8; 8] = b"LibxlFmt";
const LIBXL_VERSION: u32 = 2;

const LIBXC_MARKER: [u8; 8] = [0xff; 8];
const LIBXC_ID: &[u8; 4] = b"XENF";
const LIBXC_VERSIONS: std::ops::RangeInclusive<u32> = 2..=3;
const HVM: u32 = 2;

/// Marks a record that may be ignored.
const OPTIONAL: u32 = 1 << 31;

/// Types of libxl's records.
mod libxl {
    pub(super) const END: u32 = 0;
    pub(super) const LIBXC_CONTEXT: u32 = 1;
    pub(super) const EMULATOR_XENSTORE_DATA: u32 = 2;
    pub(super) const EMULATOR_CONTEXT: u32 = 3;
    pub(super) const CHECKPOINT_END: u32 = 4;
    pub(super) const CHECKPOINT_STATE: u32 = 5;
}

/// Types of libxc's records.
mod libxc {
    pub(super) const END: u32 = 0;
    pub(super) const PAGE_DATA: u32 = 1;
    pub(super) const X86_TSC_INFO: u32 = 8;
    pub(super) const HVM_CONTEXT: u32 = 9;
    pub(super) const HVM_PARAMS: u32 = 10;
    pub(super) const TOOLSTACK: u32 = 11;
    pub(super) const VERIFY: u32 = 13;
    pub(super) const CHECKPOINT: u32 = 14;
    pub(super) const CHECKPOINT_DIRTY_PFN_LIST: u32 = 15;
    pub(super) const STATIC_DATA_END: u32 = 16;
    pub(super) const X86_CPUID_POLICY: u32 = 17;
    pub(super) const X86_MSR_POLICY: u32 = 18;
}

/// Types of pages.
mod page {
    pub(super) const STORED: u8 = 0;
    pub(super) const BROKEN: u8 = 13;
    pub(super) const XALLOC: u8 = 14;
    pub(super) const XTAB: u8 = 15;
}

/// The name of a record of pages.
pub(in super::super) const PAGE_DATA: &str = "libxc/PAGE_DATA";

/// The longest body of a libxc record, as `xl restore` has it.
const MAX_BODY: u32 = 128 << 20;

/// Entries of a record of pages that are read at once; a record has 1024.
const ENTRIES: usize = 1024;

const PFN: u64 = (1 << 52) - 1;

pub(super) fn stream<I: Input + ?Sized>(input: &mut I) -> Result<Stream, StreamError> {
    let mut parser = Parser { cursor: Cursor::new(input), records: Vec::new(), kept: 0 };
    let config = parser.xl_header()?;
    parser.libxl_header()?;
    let mut domain: Option<Domain> = None;
    let mut has_device_model = false;
    loop {
        let offset = parser.cursor.position();
        let (kind, length) = parser.record_header()?;
        let name = match kind {
            libxl::END => "libxl/END",
            libxl::LIBXC_CONTEXT => "libxl/LIBXC_CONTEXT",
            libxl::EMULATOR_XENSTORE_DATA => "libxl/EMULATOR_XENSTORE_DATA",
            libxl::EMULATOR_CONTEXT => "libxl/EMULATOR_CONTEXT",
            libxl::CHECKPOINT_END | libxl::CHECKPOINT_STATE => {
                return Err(StreamError::Checkpoint { layer: Layer::Libxl, offset });
            }
            optional if optional & OPTIONAL != 0 => "libxl/optional",
            kind => return Err(StreamError::UnknownRecord { layer: Layer::Libxl, kind, offset }),
        };
        parser.keep(name, kind, length)?;
        match kind {
            libxl::END => break,
            libxl::LIBXC_CONTEXT if domain.is_some() => return Err(StreamError::Domains(2)),
            libxl::LIBXC_CONTEXT => domain = Some(parser.domain()?),
            _ => has_device_model |= kind == libxl::EMULATOR_CONTEXT,
        }
    }
    let domain = domain.ok_or(StreamError::Domains(0))?;
    Ok(Stream {
        config,
        version: domain.version,
        xen: domain.xen,
        pages_at: domain.pages_at,
        pages: domain.pages.finish(),
        tsc_khz: domain.tsc_khz,
        vcpus: domain.vcpus,
        params: domain.params,
        has_device_model,
        length: parser.cursor.position(),
        records: parser.records,
    })
}

/// The outermost header, to be written in front of libxl's.
pub(in super::super) fn xl_header(config: &str) -> Vec<u8> {
    // A configuration takes some kilobytes; one that is read back is bounded.
    let length = config.len() as u32 + 1;
    let mut header = XL_MAGIC.to_vec();
    for word in [XL_BYTE_ORDER, XL_STREAM_V2 | XL_JSON, 0, 4 + length, length] {
        header.extend_from_slice(&word.to_le_bytes());
    }
    header.extend_from_slice(config.as_bytes());
    header.push(0);
    header
}

/// A record of pages to be written: entries, which are frames that are stored and frames that are not, and the pages of the former.
pub(in super::super) fn page_data_record(stored: &[(u64, [u8; PAGE_SIZE as usize])], unwritten: &[u64]) -> Vec<u8> {
    let count = stored.len() + unwritten.len();
    let length = 8 + 8 * count + stored.len() * PAGE_SIZE as usize;
    // Callers write some thousands of pages at most.
    let mut record = Vec::with_capacity(8 + length);
    for word in [libxc::PAGE_DATA, length as u32, count as u32, 0] {
        record.extend_from_slice(&word.to_le_bytes());
    }
    let stored_entries = stored.iter().map(|(pfn, _)| *pfn);
    let unwritten_entries = unwritten.iter().map(|pfn| pfn | u64::from(page::XALLOC) << 60);
    for entry in stored_entries.chain(unwritten_entries) {
        record.extend_from_slice(&entry.to_le_bytes());
    }
    stored.iter().for_each(|(_, page)| record.extend_from_slice(page));
    record
}

struct Parser<'i, I: ?Sized> {
    cursor: Cursor<'i, I>,
    records: Vec<HypervisorRecord>,
    /// The bytes in `records`.
    kept: u64,
}

/// What libxc's stream holds.
struct Domain {
    version: u32,
    xen: (u32, u32),
    pages_at: usize,
    pages: PageLog,
    tsc_khz: Option<u32>,
    vcpus: u32,
    params: Vec<(u64, u64)>,
}

impl<I: Input + ?Sized> Parser<'_, I> {
    /// Reads the outermost header and returns the configuration.
    fn xl_header(&mut self) -> Result<Option<String>, StreamError> {
        let header: [u8; 48] = self.cursor.array("the xl header")?;
        if header[..32] != XL_MAGIC[..] {
            return Err(StreamError::Magic { layer: Layer::Xl, offset: 0 });
        }
        let [order, mandatory, optional, length] = words(&header[32..]);
        if order != XL_BYTE_ORDER {
            return Err(StreamError::value("the byte order", 32, order));
        }
        // A stream of version 1 is one of Xen before 4.6.
        if mandatory & XL_STREAM_V2 == 0 || mandatory & !(XL_STREAM_V2 | XL_JSON) != 0 {
            return Err(StreamError::Options { layer: Layer::Xl, offset: 36, options: mandatory });
        }
        if optional != 0 {
            return Err(StreamError::Options { layer: Layer::Xl, offset: 40, options: optional });
        }
        let data = self.bounded("the domain's configuration", length.into(), header.to_vec())?;
        let config = match data.get(48..) {
            Some([a, b, c, d, text @ ..]) if mandatory & XL_JSON != 0 => {
                let length = u32::from_le_bytes([*a, *b, *c, *d]);
                let text = usize::try_from(length).ok().and_then(|length| text.get(..length));
                let text = text.ok_or(StreamError::value("the configuration's length", 48, length))?;
                let text = text.strip_suffix(&[0]).unwrap_or(text);
                Some(String::from_utf8(text.to_vec()).map_err(|_| StreamError::Text { offset: 52 })?)
            }
            _ => None,
        };
        self.push("xl/header", data)?;
        Ok(config)
    }

    fn libxl_header(&mut self) -> Result<(), StreamError> {
        let offset = self.cursor.position();
        let layer = Layer::Libxl;
        let header: [u8; 16] = self.cursor.array("the libxl header")?;
        if header[..8] != LIBXL_IDENT[..] {
            return Err(StreamError::Magic { layer, offset });
        }
        let [version, options] = words(&header[8..]).map(u32::swap_bytes);
        if version != LIBXL_VERSION {
            return Err(StreamError::Version { layer, offset: offset + 8, version });
        }
        // Bit 1 tells of a stream that was converted from an older version, which is as good.
        if options & !2 != 0 {
            return Err(StreamError::Options { layer, offset: offset + 12, options });
        }
        self.push("libxl/header", header.to_vec())
    }

    /// Reads the stream of libxc, from its headers to its last record.
    fn domain(&mut self) -> Result<Domain, StreamError> {
        let mut domain = self.libxc_headers()?;
        let mut pages_at = None;
        loop {
            let offset = self.cursor.position();
            let (kind, length) = self.record_header()?;
            if length > MAX_BODY {
                return Err(StreamError::value("a record's length", offset + 4, length));
            }
            let name = match kind {
                libxc::END => "libxc/END",
                libxc::PAGE_DATA => {
                    pages_at.get_or_insert(self.records.len());
                    self.pages(length, &mut domain.pages)?;
                    continue;
                }
                // The pages behind it are the same ones once more, to compare.
                libxc::VERIFY if length == 0 => continue,
                libxc::X86_TSC_INFO => "libxc/X86_TSC_INFO",
                libxc::HVM_CONTEXT => "libxc/HVM_CONTEXT",
                libxc::HVM_PARAMS => "libxc/HVM_PARAMS",
                libxc::TOOLSTACK => "libxc/TOOLSTACK",
                libxc::STATIC_DATA_END => "libxc/STATIC_DATA_END",
                libxc::X86_CPUID_POLICY => "libxc/X86_CPUID_POLICY",
                libxc::X86_MSR_POLICY => "libxc/X86_MSR_POLICY",
                libxc::CHECKPOINT | libxc::CHECKPOINT_DIRTY_PFN_LIST => {
                    return Err(StreamError::Checkpoint { layer: Layer::Libxc, offset });
                }
                optional if optional & OPTIONAL != 0 => "libxc/optional",
                kind => return Err(StreamError::UnknownRecord { layer: Layer::Libxc, kind, offset }),
            };
            let at = self.cursor.position();
            let body = self.keep(name, kind, length)?;
            match kind {
                libxc::END => break,
                libxc::X86_TSC_INFO => domain.tsc_khz = Some(state::tsc_khz(body, at)?),
                libxc::HVM_CONTEXT => domain.vcpus = state::vcpus(body, at)?,
                libxc::HVM_PARAMS => domain.params = state::params(body, at)?,
                _ => {}
            }
        }
        domain.pages_at = pages_at.ok_or(StreamError::NoPages { offset: self.cursor.position() })?;
        Ok(domain)
    }

    fn libxc_headers(&mut self) -> Result<Domain, StreamError> {
        let offset = self.cursor.position();
        let layer = Layer::Libxc;
        let header: [u8; 40] = self.cursor.array("the libxc headers")?;
        if header[..8] != LIBXC_MARKER || header[8..12] != LIBXC_ID[..] {
            return Err(StreamError::Magic { layer, offset });
        }
        let [version, options] = words(&header[12..]).map(u32::swap_bytes);
        if !LIBXC_VERSIONS.contains(&version) {
            return Err(StreamError::Version { layer, offset: offset + 12, version });
        }
        // The upper half of the word; the lower one is reserved.
        if options >> 16 != 0 {
            return Err(StreamError::Options { layer, offset: offset + 16, options: options >> 16 });
        }
        let [kind, page_shift, major, minor] = words(&header[24..]);
        if kind != HVM {
            return Err(StreamError::NotHvm(kind));
        }
        let page_shift = page_shift & 0xffff;
        if page_shift != PAGE_SIZE.trailing_zeros() {
            return Err(StreamError::value("the page shift", offset + 28, page_shift));
        }
        self.push("libxc/header", header.to_vec())?;
        let pages = PageLog::default();
        Ok(Domain { version, xen: (major, minor), pages_at: 0, pages, tsc_khz: None, vcpus: 0, params: Vec::new() })
    }

    /// Notes where the pages of a record lie, whose body of `length` bytes comes next.
    fn pages(&mut self, length: u32, log: &mut PageLog) -> Result<(), StreamError> {
        const FIELD: &str = "PAGE_DATA";
        let (start, length) = (self.cursor.position(), u64::from(length));
        let misfit = StreamError::Length { field: FIELD, offset: start, length };
        if length < 8 {
            return Err(misfit);
        }
        let [count, _] = words(&self.cursor.array::<8>(FIELD)?);
        let count = u64::from(count);
        // A whole number of pages, and so no padding behind them.
        let Some(data) = length.checked_sub(8 + 8 * count).filter(|data| data % PAGE_SIZE == 0 && count > 0) else {
            return Err(misfit);
        };
        let mut page = start + 8 + 8 * count;
        let end = page + data;
        let mut entries = [0; 8 * ENTRIES];
        let mut rest = count;
        while rest > 0 {
            let offset = self.cursor.position();
            let entries = &mut entries[..8 * ENTRIES.min(usize::try_from(rest).unwrap_or(ENTRIES))];
            self.cursor.fill(entries, FIELD)?;
            let (entries, _) = entries.as_chunks::<8>();
            for (entry, offset) in entries.iter().map(|entry| u64::from_le_bytes(*entry)).zip((offset..).step_by(8)) {
                let (pfn, kind) = (entry & PFN, (entry >> 60) as u8);
                let place = match kind {
                    page::STORED if page == end => return Err(misfit),
                    page::STORED => PagePlace::Stored(page),
                    page::XALLOC => PagePlace::Unwritten,
                    page::BROKEN | page::XTAB => PagePlace::Absent,
                    kind => return Err(StreamError::PageType { pfn, kind, offset }),
                };
                match place {
                    PagePlace::Absent if pfn >= FrameSet::MAX_UNIVERSE.get() => continue,
                    _ if pfn >= FrameSet::MAX_UNIVERSE.get() => return Err(StreamError::FrameTooLarge { pfn, offset }),
                    PagePlace::Stored(_) => page += PAGE_SIZE,
                    PagePlace::Unwritten | PagePlace::Absent => {}
                }
                log.push(pfn, place)?;
            }
            rest -= entries.len() as u64;
        }
        if page != end {
            return Err(misfit);
        }
        self.cursor.skip(data, "a page")
    }

    /// The type of a record and the length of its body.
    fn record_header(&mut self) -> Result<(u32, u32), StreamError> {
        let [kind, length] = words(&self.cursor.array::<8>("a record's header")?);
        Ok((kind, length))
    }

    /// Keeps a record whose header was read, and returns its body.
    fn keep(&mut self, name: &'static str, kind: u32, length: u32) -> Result<&[u8], StreamError> {
        let header = [kind.to_le_bytes(), length.to_le_bytes()].concat();
        let record = self.bounded(name, u64::from(length).next_multiple_of(8), header)?;
        self.push(name, record)?;
        let record = self.records.last().map(|record| record.data.as_slice());
        Ok(record.and_then(|record| record.get(8..8 + length as usize)).unwrap_or_default())
    }

    /// Appends the next `length` bytes to `head`.
    fn bounded(&mut self, field: &'static str, length: u64, head: Vec<u8>) -> Result<Vec<u8>, StreamError> {
        let offset = self.cursor.position();
        if length > Stream::MAX_RECORD {
            return Err(StreamError::TooLong { field, offset, length });
        }
        self.kept += length;
        if self.kept > Stream::MAX_RECORDS_BYTES {
            return Err(StreamError::TooMany { offset });
        }
        let mut bytes = head;
        self.cursor.append(&mut bytes, length, field)?;
        Ok(bytes)
    }

    fn push(&mut self, name: &str, data: Vec<u8>) -> Result<(), StreamError> {
        // The records of special pages come on top of these.
        if self.records.len() == Descriptor::MAX_RECORDS / 2 {
            return Err(StreamError::TooMany { offset: self.cursor.position() });
        }
        self.records.push(HypervisorRecord { name: name.to_owned(), data });
        Ok(())
    }
}

/// The first `N` little-endian words of `bytes`, which has them.
fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let (words, _) = bytes.as_chunks::<4>();
    std::array::from_fn(|index| u32::from_le_bytes(words[index]))
}
