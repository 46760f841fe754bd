//! Small streams made by hand, for tests.

/// Writes a stream piece by piece.
#[derive(Clone, Default)]
pub(crate) struct StreamBuilder {
    pub(crate) bytes: Vec<u8>,
}

impl StreamBuilder {
    /// The header and configuration of a `pc-i440fx-7.2` machine.
    pub(crate) fn new(capabilities: &[&str]) -> Self {
        let mut stream = Self::default().raw(b"QEVM\0\0\0\x03\x07").be32(13).raw(b"pc-i440fx-7.2");
        if !capabilities.is_empty() {
            stream = stream.raw(&[5]).cstr("configuration/capabilities").be32(1).be32(capabilities.len() as u32);
            stream = capabilities.iter().fold(stream, |stream, name| stream.cstr(name));
        }
        stream.raw(&[5]).cstr("configuration/target-page-bits").be32(1).be32(12)
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    pub(crate) fn be16(self, value: u16) -> Self {
        self.raw(&value.to_be_bytes())
    }

    pub(crate) fn be32(self, value: u32) -> Self {
        self.raw(&value.to_be_bytes())
    }

    pub(crate) fn be64(self, value: u64) -> Self {
        self.raw(&value.to_be_bytes())
    }

    pub(crate) fn cstr(self, text: &str) -> Self {
        self.raw(&[text.len() as u8]).raw(text.as_bytes())
    }

    pub(crate) fn ram_start(self, total_pages: u64) -> Self {
        self.raw(&[1]).be32(2).cstr("ram").be32(0).be32(4).be64((total_pages * 4096) | 4)
    }

    pub(crate) fn block(self, name: &str, pages: u64) -> Self {
        self.cstr(name).be64(pages * 4096)
    }

    /// A block of a `mapped-ram` file, whose pages begin at the next multiple of 4096.
    pub(crate) fn mapped_block(self, name: &str, bitmap: &[u8; 8], pages: &[[u8; 4096]]) -> Self {
        let stream = self.block(name, pages.len() as u64).be32(1).be64(4096);
        let bitmap_offset = stream.bytes.len() as u64 + 16;
        let pages_offset = (bitmap_offset + 8).next_multiple_of(4096);
        let mut stream = stream.be64(bitmap_offset).be64(pages_offset).raw(bitmap);
        stream.bytes.resize(pages_offset as usize, 0);
        stream.raw(pages.as_flattened())
    }

    pub(crate) fn part(self) -> Self {
        self.raw(&[2]).be32(2)
    }

    pub(crate) fn page(self, page: u64, block: Option<&str>, fill: u8) -> Self {
        let stream = self.be64((page * 4096) | 8 | if block.is_none() { 0x20 } else { 0 });
        block.into_iter().fold(stream, |stream, name| stream.cstr(name)).raw(&[fill; 4096])
    }

    pub(crate) fn zero(self, page: u64, block: Option<&str>) -> Self {
        let stream = self.be64((page * 4096) | 2 | if block.is_none() { 0x20 } else { 0 });
        block.into_iter().fold(stream, |stream, name| stream.cstr(name)).raw(&[0])
    }

    pub(crate) fn end_of_section(self) -> Self {
        self.be64(0x10).raw(&[0x7e]).be32(2)
    }

    /// Two devices and the description.
    pub(crate) fn devices(self) -> Self {
        self.raw(&DEVICES).raw(&[0, 6]).be32(DESCRIPTION.len() as u32).raw(DESCRIPTION.as_bytes())
    }
}

pub(crate) const DEVICES: [u8; 39] = *b"\x04\0\0\0\x03\x05timer\0\0\0\0\0\0\0\x02abc\x7e\0\0\0\x03\
    \x04\0\0\0\x04\x01x\x7e\0\0\0\x04";
pub(crate) const DESCRIPTION: &str = r#"{"page_size": 4096, "devices": []}"#;

/// A stream with two blocks, zero pages, a page that was sent twice and one that became zero.
pub(crate) fn sample() -> Vec<u8> {
    StreamBuilder::new(&[])
        .ram_start(10)
        .block("pc.ram", 8)
        .block("pc.rom", 2)
        .end_of_section()
        .part()
        .page(0, Some("pc.ram"), 0xa0)
        .page(1, None, 0xa1)
        .page(2, None, 0xa2)
        .zero(3, None)
        .zero(4, None)
        .page(5, None, 0xa5)
        .end_of_section()
        .part()
        .page(1, Some("pc.ram"), 0xb1)
        .zero(2, None)
        .zero(6, None)
        .zero(7, None)
        .page(0, Some("pc.rom"), 0xc0)
        .page(1, None, 0xc1)
        .end_of_section()
        .raw(&[3])
        .be32(2)
        .end_of_section()
        .devices()
        .bytes
}
