//! Text for people: units, bars, tables.

use std::fmt::Write;

use crate::{FrameRange, FrameSet, PageCount};

/// A size in the unit that suits it.
pub(super) fn size(bytes: u64) -> String {
    const KIB: f64 = 1024.0;
    let exact = bytes as f64;
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.1} KiB", exact / KIB),
        1_048_576..0x4_0000_0000 => format!("{:.1} MiB", exact / KIB / KIB),
        _ => format!("{:.1} GiB", exact / KIB / KIB / KIB),
    }
}

/// A part of a whole in percent.
pub(super) fn share(part: PageCount, whole: PageCount) -> String {
    if part.is_zero() { "-".to_owned() } else { format!("{:.1} %", 100.0 * ratio(part, whole)) }
}

/// A bar of `width` cells for a part of a whole.
pub(super) fn bar(part: PageCount, whole: PageCount, width: usize) -> String {
    let filled = (ratio(part, whole) * width as f64).round() as usize;
    "█".repeat(filled.min(width)) + &"·".repeat(width - filled.min(width))
}

/// A line of at most `width` cells, each darker the more of its frames are not in `quiet`.
pub(super) fn map(frames: FrameRange, quiet: &FrameSet, width: u64) -> String {
    let cell = PageCount::new(frames.count().get().div_ceil(width).max(1));
    let shade = |cell: FrameRange| {
        let busy = cell.count() - quiet.count_in(cell);
        match (ratio(busy, cell.count()) * 4.0).ceil() as u8 {
            0 => '·',
            1 => '░',
            2 => '▒',
            3 => '▓',
            _ => '█',
        }
    };
    frames.chunks(cell).map(shade).collect()
}

/// A text from a file, with nothing in it that could command a terminal.
pub(super) fn harmless(text: &str) -> String {
    text.chars().fold(String::new(), |mut out, char| {
        if char.is_control() {
            out.extend(char.escape_default())
        } else {
            out.push(char)
        }
        out
    })
}

/// Appends rows in columns as wide as they need to be. A column is set to the right when its title begins with `>`.
pub(super) fn table(out: &mut String, titles: &[&str], rows: &[Vec<String>]) {
    let right: Vec<bool> = titles.iter().map(|title| title.starts_with('>')).collect();
    let head = titles.iter().map(|title| title.trim_start_matches('>').to_owned()).collect();
    let rows = || std::iter::once(&head).chain(rows);
    let width = |row: &Vec<String>, column: usize| row.get(column).map_or(0, |cell| cell.chars().count());
    let widths: Vec<usize> =
        (0..titles.len()).map(|column| rows().map(|row| width(row, column)).max().unwrap_or(0)).collect();
    for row in rows() {
        let mut line = String::new();
        for ((cell, width), right) in row.iter().zip(&widths).zip(&right) {
            // Writing to a String cannot fail.
            let _ = if *right { write!(line, "{cell:>width$}  ") } else { write!(line, "{cell:<width$}  ") };
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
}

fn ratio(part: PageCount, whole: PageCount) -> f64 {
    if whole.is_zero() { 0.0 } else { part.get() as f64 / whole.get() as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gfn;

    #[test]
    fn sizes_read_well() {
        let sizes = [0, 1023, 1024, 37 << 10, 1 << 20, 5 << 30, 64 << 30].map(size);
        assert_eq!(sizes, ["0 B", "1023 B", "1.0 KiB", "37.0 KiB", "1.0 MiB", "5120.0 MiB", "64.0 GiB"]);
        assert_eq!(share(PageCount::new(1), PageCount::new(8)), "12.5 %");
        assert_eq!(bar(PageCount::new(1), PageCount::new(8), 8), "█·······");
    }

    #[test]
    fn maps_are_darker_where_there_is_data() {
        let frame_range = |start, count| FrameRange::new(Gfn::new(start), PageCount::new(count));
        let quiet = FrameSet::from_ranges(PageCount::new(40), [frame_range(0, 13), frame_range(30, 10)]);
        assert_eq!(map(frame_range(0, 40), &quiet, 4), "·▓█·");
        assert_eq!(map(frame_range(0, 2), &quiet, 4), "··");
    }

    #[test]
    fn tables_are_aligned() {
        let mut out = String::new();
        table(&mut out, &["NAME", ">SIZE"], &[vec!["a".into(), "1".into()], vec!["long".into(), "12345".into()]]);
        assert_eq!(out, "NAME   SIZE\na         1\nlong  12345\n");
        assert_eq!(harmless("a\x1b[1mé"), "a\\u{1b}[1mé");
    }
}
