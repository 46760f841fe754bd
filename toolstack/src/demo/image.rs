//! The memory of a guest that never ran: runs of zero, text-like, random and repeated pages, from a seed.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};

use descriptor::{PAGE_SIZE, PageCount};
use fastrand::Rng;

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nothing but zeros, as memory that the guest never used or gave back.
    Zero,
    /// Words and numbers, as logs, sources and heaps: compresses well.
    Text,
    /// Incompressible, as media and ciphertext.
    Random,
    /// One of a few pages that occur many times, as shared libraries and fill patterns.
    Repeated,
}

/// The shares of the kinds in percent; together 100.
const MIX: [(Kind, u8); 4] = [(Kind::Zero, 40), (Kind::Text, 25), (Kind::Random, 20), (Kind::Repeated, 15)];

/// Memory comes in runs of one kind; the longest is 1 MiB, as guests' allocators hand it out.
const RUN_MAX: u64 = 256;

/// A page in memory.
const PAGE: usize = PAGE_SIZE as usize;

/// How many different repeated pages there are.
const REPEATED: usize = 16;

const WORDS: [&str; 24] = [
    "page",
    "clone",
    "parent",
    "memory",
    "kernel",
    "struct",
    "return",
    "session",
    "error",
    "request",
    "the",
    "of",
    "and",
    "while",
    "index",
    "buffer",
    "/usr/lib/",
    "0x00007f",
    "GET /",
    "HTTP/1.1 200",
    "int",
    "static",
    "{\n\t",
    "};\n",
];

/// Writes an image of `pages` pages to `file`, an empty file. Zero pages stay holes in it. Before each run it tells how many
/// pages are done, and goes on only if that answers true.
///
/// # Errors
/// When the file cannot be written; most often the file system is full.
pub(super) fn write(
    file: &mut File,
    pages: PageCount,
    seed: u64,
    mut go_on: impl FnMut(PageCount) -> bool,
) -> io::Result<()> {
    let mut rng = Rng::with_seed(seed);
    let repeated: Vec<Vec<u8>> = (0..REPEATED).map(|_| text_page(&mut rng)).collect();
    let mut bytes = Vec::with_capacity(RUN_MAX as usize * PAGE);
    let mut done = 0;
    while done < pages.get() && go_on(PageCount::new(done)) {
        let run = rng.u64(1..=RUN_MAX).min(pages.get() - done);
        let kind = draw_kind(&mut rng);
        bytes.clear();
        for _ in 0..run {
            match kind {
                Kind::Zero => {}
                Kind::Text => bytes.extend_from_slice(&text_page(&mut rng)),
                Kind::Random => bytes.extend(random_page(&mut rng)),
                Kind::Repeated => bytes.extend_from_slice(&repeated[rng.usize(0..REPEATED)]),
            }
        }
        match kind {
            Kind::Zero => _ = file.seek(SeekFrom::Current(run.cast_signed() * PAGE as i64))?,
            _ => file.write_all(&bytes)?,
        }
        done += run;
    }
    file.set_len(pages.get() * PAGE_SIZE)
}

fn draw_kind(rng: &mut Rng) -> Kind {
    let mut draw = rng.u8(0..100);
    for (kind, percent) in MIX {
        if draw < percent {
            return kind;
        }
        draw -= percent;
    }
    Kind::Zero
}

fn text_page(rng: &mut Rng) -> Vec<u8> {
    let mut page = Vec::with_capacity(PAGE + 16);
    while page.len() < PAGE {
        page.extend_from_slice(WORDS[rng.usize(0..WORDS.len())].as_bytes());
        if rng.u8(0..6) == 0 {
            page.extend_from_slice(rng.u16(..).to_string().as_bytes());
        }
        page.push(b' ');
    }
    page.truncate(PAGE);
    page
}

fn random_page(rng: &mut Rng) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    rng.fill(&mut page);
    page
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn image(pages: u64, seed: u64) -> Vec<u8> {
        let mut file = tempfile::tempfile().unwrap();
        write(&mut file, PageCount::new(pages), seed, |_| true).unwrap();
        let mut bytes = vec![1; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn the_mix_is_as_stated_and_follows_the_seed() {
        let pages = 8192;
        let bytes = image(pages, 1);
        assert_eq!(bytes.len(), pages as usize * PAGE);
        let zero = bytes.chunks_exact(PAGE).filter(|page| page.iter().all(|&byte| byte == 0)).count();
        assert!((30..50).contains(&(zero * 100 / pages as usize)), "{zero} zero pages of {pages}");
        assert_eq!(bytes, image(pages, 1));
        assert_ne!(bytes[..], image(pages, 2)[..]);
    }

    #[test]
    fn the_shares_make_a_whole() {
        assert_eq!(MIX.iter().map(|(_, percent)| u32::from(*percent)).sum::<u32>(), 100);
    }
}
