//! The note by which a Linux kernel tells a crash analyser, and us, where its tables are.

use std::collections::BTreeMap;

use super::Refusal;
use crate::image::{ImageError, ReadPages};
use crate::{FrameRange, Gfn, PAGE_SIZE, PageCount};

/// The longest text; kernels write some 3 KiB, and give it one page.
const MAX_TEXT: usize = 16 << 10;

/// Notes of one memory that are looked at: one, a copy or two, and what warm resets have left.
pub(super) const MAX_NOTES: usize = 64;

/// An ELF note's header: the sizes of its name and text, and its type, in four bytes each; then the name.
const NAME: &[u8; 11] = b"VMCOREINFO\0";
const TEXT_OFFSET: usize = 24;

/// True when `page` may be the first of a note.
pub fn is_note(page: &[u8]) -> bool {
    page.starts_with(&[11, 0, 0, 0]) && page[8..12] == [0; 4] && page[12..12 + NAME.len()] == NAME[..]
}

/// The text of the note that begins with the page of `gfn`; `None` when there is none after all.
pub(super) fn text(image: &dyn ReadPages, gfn: Gfn) -> Result<Option<String>, ImageError> {
    let mut bytes = vec![0; PAGE_SIZE as usize];
    image.read_pages(FrameRange::single(gfn), &mut bytes)?;
    let length = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
    if !is_note(&bytes) || length > MAX_TEXT {
        return Ok(None);
    }
    let pages = (TEXT_OFFSET + length).div_ceil(PAGE_SIZE as usize);
    let range = FrameRange::new(gfn, PageCount::new(pages as u64));
    if !image.memory().covers(range) {
        return Ok(None);
    }
    bytes.resize(pages * PAGE_SIZE as usize, 0);
    image.read_pages(range, &mut bytes)?;
    Ok(String::from_utf8(bytes[TEXT_OFFSET..TEXT_OFFSET + length].to_vec()).ok())
}

/// The keys and values of a note.
#[derive(Clone, Debug)]
pub(super) struct Note {
    values: BTreeMap<String, String>,
}

impl Note {
    pub(super) fn parse(text: &str) -> Self {
        let values = text.lines().filter_map(|line| line.split_once('='));
        Self { values: values.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect() }
    }

    pub(super) fn text(&self, key: &str) -> Result<&str, Refusal> {
        self.values.get(key).map(String::as_str).ok_or_else(|| Refusal::MissingKey(key.to_owned()))
    }

    /// A NUMBER; decimal, negative ones included, or hexadecimal.
    pub(super) fn number(&self, name: &str) -> Result<i64, Refusal> {
        let key = format!("NUMBER({name})");
        let value = self.text(&key)?;
        let number = match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok().map(u64::cast_signed),
            // Some kernels print what is meant as a negative one without its sign.
            None => value.parse().ok().or_else(|| value.parse::<u64>().ok().map(u64::cast_signed)),
        };
        number.ok_or_else(|| Refusal::BadValue { key, value: value.to_owned() })
    }

    /// A NUMBER that not every kernel has.
    pub(super) fn number_if(&self, name: &str) -> Result<Option<i64>, Refusal> {
        absent(self.number(name))
    }

    /// The address of a SYMBOL.
    pub(super) fn symbol(&self, name: &str) -> Result<u64, Refusal> {
        let key = format!("SYMBOL({name})");
        let value = self.text(&key)?;
        u64::from_str_radix(value, 16).map_err(|_| Refusal::BadValue { key, value: value.to_owned() })
    }

    /// The address of a SYMBOL that not every kernel has.
    pub(super) fn symbol_if(&self, name: &str) -> Result<Option<u64>, Refusal> {
        absent(self.symbol(name))
    }

    /// An OFFSET in bytes, within a structure of at most a mebibyte.
    pub(super) fn offset(&self, name: &str) -> Result<u64, Refusal> {
        self.measure("OFFSET", name, 0)
    }

    /// An OFFSET that not every kernel has.
    pub(super) fn offset_if(&self, name: &str) -> Result<Option<u64>, Refusal> {
        absent(self.offset(name))
    }

    /// A SIZE in bytes.
    pub(super) fn size(&self, name: &str) -> Result<u64, Refusal> {
        self.measure("SIZE", name, 1)
    }

    /// The LENGTH of an array.
    pub(super) fn length(&self, name: &str) -> Result<u64, Refusal> {
        self.measure("LENGTH", name, 1)
    }

    fn measure(&self, kind: &str, name: &str, least: u64) -> Result<u64, Refusal> {
        let key = format!("{kind}({name})");
        let value = self.text(&key)?;
        let number = value.parse().ok().filter(|number| (least..1 << 20).contains(number));
        number.ok_or_else(|| Refusal::BadValue { key, value: value.to_owned() })
    }
}

fn absent<T>(value: Result<T, Refusal>) -> Result<Option<T>, Refusal> {
    match value {
        Ok(value) => Ok(Some(value)),
        Err(Refusal::MissingKey(_)) => Ok(None),
        Err(refusal) => Err(refusal),
    }
}
