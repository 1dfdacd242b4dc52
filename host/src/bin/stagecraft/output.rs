//! Text for people: colours, columns, sizes.

use std::io::{self, BufWriter, StdoutLock, Write};

use anstream::AutoStream;
use anstyle::{AnsiColor, Style};

/// Headings.
pub const HEAD: Style = Style::new().bold();
/// What is as it should be.
pub const GOOD: Style = AnsiColor::Green.on_default();
/// What should not be so.
pub const WARN: Style = AnsiColor::Yellow.on_default();
/// What is wrong.
pub const BAD: Style = AnsiColor::Red.on_default().bold();
/// What matters less.
pub const DIM: Style = Style::new().dimmed();
/// Nothing special.
pub const PLAIN: Style = Style::new();

/// Rows of a list that are shown without `--all`.
pub const FEW: usize = 10;

/// Standard output for people.
pub type Human = BufWriter<AutoStream<StdoutLock<'static>>>;

/// Standard output for people: colours only where they are wanted.
pub fn human() -> Human {
    BufWriter::with_capacity(1 << 16, anstream::stdout().lock())
}

/// Standard output for programs.
pub fn raw() -> BufWriter<StdoutLock<'static>> {
    BufWriter::with_capacity(1 << 16, io::stdout().lock())
}

/// `text` from a file or plugin, on one line and without control characters: no terminal obeys a snapshot.
pub fn printable(text: &str) -> String {
    text.trim()
        .chars()
        .map(|c| {
            if c == '\n' {
                ' '
            } else if c.is_control() {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect()
}

/// A size: exact where a unit fits, else rounded to one digit after the point.
pub fn size(bytes: u128) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes >> (10 * (unit + 1)) != 0 {
        unit += 1;
    }
    let one = 1_u128 << (10 * unit);
    if bytes.is_multiple_of(one) {
        return format!("{} {}", bytes / one, UNITS[unit]);
    }
    let tenths = (bytes * 10 + one / 2) / one;
    match (tenths, UNITS.get(unit + 1)) {
        (10_240.., Some(next)) => format!("~1 {next}"),
        _ => format!("~{}.{} {}", tenths / 10, tenths % 10, UNITS[unit]),
    }
}

/// A number with commas.
pub fn count(number: impl Into<u128>) -> String {
    let digits = number.into().to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 run`, `2 runs`.
pub fn counted(number: impl Into<u128>, one: &str, many: &str) -> String {
    let number = number.into();
    format!("{} {}", count(number), if number == 1 { one } else { many })
}

/// A cell of a [`Columns`].
#[derive(Clone, Debug)]
pub struct Cell(String, Style);

impl Cell {
    /// With a style.
    pub fn styled(text: impl Into<String>, style: Style) -> Self {
        Self(text.into(), style)
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self(text.into(), PLAIN)
    }
}

/// Characters that a column is padded to at most: a snapshot may have labels of any length.
const WIDEST: usize = 160;

/// Rows whose columns stand below each other.
#[derive(Debug, Default)]
pub struct Columns {
    indent: usize,
    right: Vec<usize>,
    rows: Vec<Vec<Cell>>,
}

impl Columns {
    /// With a row of headings, all rows moved `indent` to the right.
    pub fn new(indent: usize, headings: &[&str]) -> Self {
        let rows = if headings.is_empty() { Vec::new() } else { vec![headings.iter().map(|heading| Cell::styled(*heading, HEAD)).collect()] };
        Self { indent, right: Vec::new(), rows }
    }

    /// Aligns these columns to the right.
    pub fn right(mut self, columns: &[usize]) -> Self {
        self.right = columns.to_vec();
        self
    }

    /// One more row.
    pub fn row<const N: usize>(&mut self, cells: [Cell; N]) {
        self.rows.push(cells.to_vec());
    }

    /// Writes all rows. A cell that is wider than [`WIDEST`] moves the rest of its row, and no other row.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.0.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(|column| width(column).min(WIDEST)).collect();
        for row in &self.rows {
            write!(out, "{:indent$}", "", indent = self.indent)?;
            let end = row.iter().rposition(|cell| !cell.0.is_empty()).map_or(0, |last| last + 1);
            for (column, Cell(text, style)) in row[..end].iter().enumerate() {
                let padding = widths[column].saturating_sub(text.chars().count());
                let (before, after) = if self.right.contains(&column) { (padding, 0) } else { (0, padding) };
                let last = column + 1 == end;
                let after = if last { 0 } else { after + 2 };
                write!(out, "{:before$}{style}{text}{style:#}{:after$}", "", "")?;
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact_where_they_can_be() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(4096), "4 KiB");
        assert_eq!(size(3 << 19), "~1.5 MiB");
        assert_eq!(size((1 << 30) - 1), "~1 GiB");
        assert_eq!(size(1 << 64), "16 EiB");
    }

    #[test]
    fn numbers_have_commas() {
        assert_eq!(count(0_u64), "0");
        assert_eq!(count(999_u64), "999");
        assert_eq!(count(1_234_567_u64), "1,234,567");
        assert_eq!(counted(1_u64, "run", "runs"), "1 run");
    }

    #[test]
    fn columns_stand_below_each_other_and_no_line_ends_with_blanks() {
        let mut columns = Columns::new(1, &["A", "LONG", "C"]).right(&[0]);
        columns.row(["10".into(), "x".into(), "".into()]);
        let mut text = Vec::new();
        columns.write(&mut text).expect("memory");
        let plain = anstream::adapter::strip_bytes(&text).into_vec();
        assert_eq!(String::from_utf8_lossy(&plain), "  A  LONG  C\n 10  x\n");
    }

    #[test]
    fn nothing_in_a_file_reaches_the_terminal_as_a_command() {
        assert_eq!(printable("a\u{1b}[31m\nb\n"), "a\u{fffd}[31m b");
    }
}
