//! Tables for people: columns as wide as their widest cell, two spaces between them.

use std::fmt;

/// Rows of cells; the first column is set to the left, all others to the right.
#[derive(Default)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                match column {
                    0 => line += &format!("  {cell:<width$}", width = width(column)),
                    _ => line += &format!("  {cell:>width$}", width = width(column)),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// A number with its thousands apart: `65 536`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// A number of bytes in the unit that suits it: `3.2 MiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = if value < 10.0 { 1 } else { 0 };
    format!("{value:.decimals$} {}", UNITS[unit])
}

/// A time in microseconds in the unit that suits it: `38 µs`, `4.2 ms`, `1.3 s`.
pub(crate) fn micros(us: f64) -> String {
    match us {
        us if us < 10.0 => format!("{us:.1} µs"),
        us if us < 1e3 => format!("{us:.0} µs"),
        us if us < 10e3 => format!("{:.1} ms", us / 1e3),
        us if us < 1e6 => format!("{:.0} ms", us / 1e3),
        us => format!("{:.1} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::default();
        table.row(["", "one", "two"]);
        table.row(["pages", "12", "1 000"]);
        assert_eq!(table.to_string(), "         one    two\n  pages   12  1 000\n");
    }

    #[test]
    fn quantities_read_well() {
        let numbers = [0, 999, 1000, 65_536, 1_234_567].map(grouped);
        assert_eq!(numbers, ["0", "999", "1 000", "65 536", "1 234 567"]);
        assert_eq!([0, 1023, 1536, 100 << 20, 3 << 40].map(bytes), ["0 B", "1023 B", "1.5 KiB", "100 MiB", "3.0 TiB"]);
        assert_eq!(
            [5.04, 380.0, 4200.0, 157_000.0, 2e6].map(micros),
            ["5.0 µs", "380 µs", "4.2 ms", "157 ms", "2.0 s"]
        );
    }
}
