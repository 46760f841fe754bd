//! Small streams made by hand, for tests.

/// Types of pages, as they stand in the entries.
pub(crate) const XALLOC: u64 = 14 << 60;
pub(crate) const XTAB: u64 = 15 << 60;

/// Writes a stream piece by piece.
#[derive(Clone, Default)]
pub(crate) struct StreamBuilder {
    pub(crate) bytes: Vec<u8>,
}

impl StreamBuilder {
    /// The headers of a stream of Xen 4.17, and the records before the first page.
    pub(crate) fn new(config: &str) -> Self {
        Self::xl(config)
            .raw(b"LibxlFmt\0\0\0\x02\0\0\0\0")
            .record(1, &[])
            .libxc(3)
            .record(17, &[0x17; 48])
            .record(18, &[0x18; 16])
            .record(16, &[])
    }

    /// The outermost header.
    pub(crate) fn xl(config: &str) -> Self {
        let flags = if config.is_empty() { 2 } else { 3 };
        let header = Self::default().raw(b"Xen saved domain, xl format\n \0 \r").le32(0x0102_0304).le32(flags).le32(0);
        if config.is_empty() {
            return header.le32(4).le32(0);
        }
        let length = config.len() as u32 + 1;
        header.le32(4 + length).le32(length).raw(config.as_bytes()).raw(&[0])
    }

    /// libxc's headers.
    pub(crate) fn libxc(self, version: u8) -> Self {
        let marked = self.raw(&[0xff; 8]).raw(b"XENF").raw(&[0, 0, 0, version]).raw(&[0; 8]);
        marked.le32(2).le32(12).le32(4).le32(17)
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    pub(crate) fn le32(self, value: u32) -> Self {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn le64(self, value: u64) -> Self {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn record(self, kind: u32, body: &[u8]) -> Self {
        let padding = body.len().next_multiple_of(8) - body.len();
        self.le32(kind).le32(body.len() as u32).raw(body).raw(&[0; 8][..padding])
    }

    /// A record of pages: entries, and the byte that fills the page of each that has one.
    pub(crate) fn page_data(self, pages: &[(u64, Option<u8>)]) -> Self {
        let stored = pages.iter().filter_map(|(_, fill)| *fill);
        let length = 8 + 8 * pages.len() + 4096 * stored.clone().count();
        let header = self.le32(1).le32(length as u32).le32(pages.len() as u32).le32(0);
        let entries = pages.iter().fold(header, |stream, (entry, _)| stream.le64(*entry));
        stored.fold(entries, |stream, fill| stream.raw(&[fill; 4096]))
    }

    /// The records behind the pages: a clock of 2,100,016 kHz, processors, parameters.
    pub(crate) fn state(self, vcpus: u16, params: &[(u64, u64)]) -> Self {
        let tsc = Self::default().le32(0).le32(2_100_016).le64(7).le32(1).le32(0);
        let context = Self::default().raw(b"\x01\0\0\0\x04\0\0\0head");
        let cpu = |stream: Self, vcpu: u16| {
            stream.raw(&2_u16.to_le_bytes()).raw(&vcpu.to_le_bytes()).le32(16).raw(&[0xcc; 16])
        };
        let context = (0..vcpus).fold(context, cpu).raw(&[0; 8]);
        let table = Self::default().le32(params.len() as u32).le32(0);
        let table = params.iter().fold(table, |table, (index, value)| table.le64(*index).le64(*value));
        self.record(8, &tsc.bytes).record(9, &context.bytes).record(10, &table.bytes)
    }

    /// The ends of both streams.
    pub(crate) fn end(self) -> Self {
        self.record(0, &[]).record(0, &[])
    }
}

pub(crate) const CONFIG: &str = r#"{"c_info": {"type": "pvh", "name": "lin"}, "b_info": {"max_vcpus": 2}}"#;

/// A live stream of a guest with memory on both sides of 4 GiB: some pages come twice, one is given back, one loses its contents.
pub(crate) fn sample() -> Vec<u8> {
    let pages = |range: std::ops::Range<u64>| range.map(|pfn| (pfn, Some(0xa0 + pfn as u8)));
    let first: Vec<_> = pages(0..4).chain([(8 | XTAB, None), (9 | XTAB, None)]).chain(pages(4..8)).collect();
    StreamBuilder::new(CONFIG)
        .page_data(&first)
        .page_data(&[(0xfc000, Some(0xe0)), (0xfc001, Some(0xe1)), (0xfeffc, Some(0)), (0xff000 | XTAB, None)])
        .page_data(&[(0x100000, Some(0xc0)), (0x100001, Some(0xc1))])
        .page_data(&[(1, Some(0xb1)), (5, Some(0xb5)), (4 | XTAB, None), (6 | XALLOC, None)])
        .state(2, &[(1, 0xfeffc), (17, 0xfefff)])
        .end()
        .bytes
}
