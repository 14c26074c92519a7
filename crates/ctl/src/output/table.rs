//! Plain tables: a heading, aligned columns, two spaces between, no lines.

use crate::console::clean;

/// A table under construction.
pub struct Table {
    all: bool,
    columns: Vec<Column>,
    /// Heading and rows, each with the chosen cells only.
    lines: Vec<Vec<String>>,
}

/// A column: its heading and whether only the wide table has it.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    heading: &'static str,
    wide: bool,
}

/// A column of every table.
pub const fn column(heading: &'static str) -> Column {
    Column { heading, wide: false }
}

/// A column of the wide table only.
pub const fn wide(heading: &'static str) -> Column {
    Column { heading, wide: true }
}

impl Table {
    /// Starts a table.
    pub fn new(all: bool, columns: &[Column]) -> Self {
        let mut table = Self { all, columns: columns.to_vec(), lines: Vec::new() };
        let heading = table.chosen(columns.iter().map(|column| column.heading.to_owned()));
        table.lines.push(heading);
        table
    }

    /// Adds a row; its cells stand in the order of the columns.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.columns.len(), "one cell per column");
        let cells = self.chosen(cells.into_iter().map(|cell| clean(&cell.replace('\n', " "))));
        self.lines.push(cells);
    }

    /// The text, or `empty` when there is no row.
    ///
    /// A cell's width is its number of characters: names, times and numbers are
    /// ASCII, and free text stands in the last column.
    pub fn finish(self, empty: &str) -> String {
        if self.lines.len() == 1 {
            return empty.to_owned();
        }
        let mut widths = vec![0; self.columns.len()];
        for line in &self.lines {
            for (width, cell) in widths.iter_mut().zip(line) {
                *width = cell.chars().count().max(*width);
            }
        }
        let aligned = self.lines.iter().map(|line| {
            let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        });
        aligned.collect::<Vec<_>>().join("\n")
    }

    fn chosen(&self, cells: impl Iterator<Item = String>) -> Vec<String> {
        let shown = self.columns.iter().map(|column| self.all || !column.wide);
        cells.zip(shown).filter_map(|(cell, shown)| shown.then_some(cell)).collect()
    }
}

/// Key and value lines, aligned.
pub fn pairs(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(key, _)| key.len() + 1).max().unwrap_or(0);
    let lines: Vec<String> =
        pairs.iter().map(|(key, value)| format!("{:width$}  {}", format!("{key}:"), clean(value))).collect();
    lines.join("\n")
}

/// The text, or `-`.
pub fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(all: bool) -> String {
        let mut table = Table::new(all, &[column("NAME"), wide("ID"), column("AGE")]);
        table.row(["a".into(), "1".into(), "3d".into()]);
        table.row(["longer\u{1b}[1m".into(), "2".into(), "4d".into()]);
        table.finish("nothing")
    }

    #[test]
    fn columns_are_aligned_and_what_steers_a_terminal_is_replaced() {
        assert_eq!(table(false), "NAME        AGE\na           3d\nlonger\u{fffd}[1m  4d");
    }

    #[test]
    fn the_wide_table_has_all_columns() {
        assert!(table(true).starts_with("NAME        ID  AGE"));
    }

    #[test]
    fn an_empty_table_says_so() {
        assert_eq!(Table::new(false, &[column("A")]).finish("no clusters"), "no clusters");
    }

    #[test]
    fn pairs_are_aligned() {
        assert_eq!(pairs(&[("id", "1".into()), ("longer", "2".into())]), "id:      1\nlonger:  2");
    }
}
