//! Tables for people: columns wide enough for what they hold.

use std::fmt;

/// A title, a line of headings, and rows. The first column is flush left, the others flush right.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    title: String,
    headings: Vec<String>,
    rows: Vec<Vec<String>>,
    notes: Vec<String>,
}

impl Table {
    /// A table without rows.
    pub fn new<const N: usize>(title: impl Into<String>, headings: [&str; N]) -> Self {
        Self { title: title.into(), headings: headings.map(str::to_owned).into(), rows: Vec::new(), notes: Vec::new() }
    }

    /// Adds a row, a cell for each heading.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        assert_eq!(N, self.headings.len(), "a cell for each heading");
        self.rows.push(cells.into());
    }

    /// Adds a sentence below the rows.
    pub fn note(&mut self, sentence: impl Into<String>) {
        self.notes.push(sentence.into());
    }

    fn widths(&self) -> Vec<usize> {
        let width = |column: usize| {
            let cells = self.rows.iter().map(|row| &row[column]);
            cells.chain([&self.headings[column]]).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        (0..self.headings.len()).map(width).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        writeln!(f, "{}", self.title)?;
        for row in std::iter::once(&self.headings).chain(&self.rows) {
            let mut line = String::from("  ");
            for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                match column {
                    0 => line.push_str(&format!("{cell:<width$}")),
                    _ => line.push_str(&format!("  {cell:>width$}")),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "  {note}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new("Speed", ["what", "rate"]);
        table.row(["bare".into(), "12.3".into()]);
        table.row(["through the farm".into(), "9".into()]);
        table.note("The farm waits for nothing.");
        assert_eq!(
            table.to_string(),
            "Speed\n  what              rate\n  bare              12.3\n  through the farm     9\n  The farm waits for nothing.\n"
        );
    }
}
