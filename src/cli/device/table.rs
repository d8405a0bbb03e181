//! The table of `busway device list`.
//!
//! Where the terminal has room, what uses a device stands in a column; where it has not, on lines of
//! its own below the device; nothing of it is lost either way. Names are cut; addresses, drivers and
//! groups, which one copies into commands, never are.

use std::fmt;

/// One device, in words.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) address: String,
    pub(super) class: String,
    pub(super) name: String,
    pub(super) driver: String,
    pub(super) group: String,
    pub(super) node: String,
    pub(super) uses: Vec<String>,
}

/// Rows to be shown in `width` columns; none: as wide as they are.
#[derive(Debug)]
pub(super) struct Table<'a> {
    pub(super) rows: &'a [Row],
    pub(super) width: Option<usize>,
}

const GAP: usize = 2;
const CLASS: usize = 1;
const NAME: usize = 2;
/// A name cut shorter than this says too little.
const NAME_LEAST: usize = 24;
const CLASS_LEAST: usize = 8;
/// Where the uses of a device begin on lines of their own.
const INDENT: usize = 14;

impl Row {
    fn cells(&self) -> [&str; 6] {
        let Self {
            address,
            class,
            name,
            driver,
            group,
            node,
            uses: _,
        } = self;
        [address, class, name, driver, group, node]
    }
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let titles = ["ADDRESS", "CLASS", "NAME", "DRIVER", "GROUP", "NUMA"];
        let mut widths = titles.map(str::len);
        for row in self.rows {
            for (width, cell) in widths.iter_mut().zip(row.cells()) {
                *width = (*width).max(length(cell));
            }
        }
        let limit = self.width.unwrap_or(usize::MAX);
        let uses = self.uses_beside(&widths, limit);
        let left = limit - uses.map_or(0, |uses| uses + GAP);
        cut(&mut widths, NAME, NAME_LEAST, left);
        cut(&mut widths, CLASS, CLASS_LEAST, left);
        // What the names do not need, the uses may have.
        let rest = total(&widths) + GAP;
        let (indent, width, lead) = match uses {
            Some(_) => (rest, limit.saturating_sub(rest), ""),
            None => (INDENT, limit.saturating_sub(INDENT), "used by "),
        };

        writeln(f, &widths, titles, uses.map_or("", |_| "USED BY"))?;
        for row in self.rows {
            let mut lines = wrap(lead, &row.uses, width).into_iter();
            let beside = uses.and_then(|_| lines.next());
            writeln(f, &widths, row.cells(), &beside.unwrap_or_default())?;
            for line in lines {
                writeln!(f, "{:indent$}{line}", "")?;
            }
        }
        Ok(())
    }
}

impl Table<'_> {
    /// How wide the uses are beside the rest, if names can still be read there.
    fn uses_beside(&self, widths: &[usize; 6], limit: usize) -> Option<usize> {
        let uses = self.rows.iter().flat_map(|row| &row.uses);
        // Each with the comma after it.
        let longest = uses.map(|usage| length(usage) + 1).max().unwrap_or(0);
        let longest = longest.max("USED BY".len());
        let least = total(widths) - widths[NAME] + widths[NAME].min(NAME_LEAST);
        (least + GAP + longest <= limit).then_some(longest)
    }
}

fn length(text: &str) -> usize {
    text.chars().count()
}

fn total(widths: &[usize]) -> usize {
    widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1)
}

/// Makes one column narrower, not below `least`, until all fit in `limit`.
fn cut(widths: &mut [usize; 6], column: usize, least: usize, limit: usize) {
    let over = total(widths).saturating_sub(limit);
    let width = &mut widths[column];
    *width = width.saturating_sub(over).max(least.min(*width));
}

fn writeln(
    f: &mut fmt::Formatter<'_>,
    widths: &[usize; 6],
    cells: [&str; 6],
    uses: &str,
) -> fmt::Result {
    let mut text = String::new();
    for (index, (cell, &width)) in cells.into_iter().zip(widths).enumerate() {
        // Numbers stand on the right of their column.
        let cell = if index > 3 {
            format!("{cell:>width$}")
        } else if length(cell) > width {
            let kept: String = cell.chars().take(width.saturating_sub(1)).collect();
            format!("{}…", kept.trim_end()) + &" ".repeat(width - 1 - length(kept.trim_end()))
        } else {
            format!("{cell:width$}")
        };
        text.push_str(&cell);
        text.push_str("  ");
    }
    text.push_str(uses);
    writeln!(f, "{}", text.trim_end())
}

/// Uses in lines of `width` columns, as many to a line as fit, after `lead`.
fn wrap(lead: &str, uses: &[String], width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for (index, usage) in uses.iter().enumerate() {
        let comma = if index + 1 < uses.len() { "," } else { "" };
        match lines.last_mut() {
            Some(line) if length(line) + 1 + length(usage) + comma.len() <= width => {
                line.push(' ');
                line.push_str(usage);
            }
            Some(_) => lines.push(usage.clone()),
            None => lines.push(format!("{lead}{usage}")),
        }
        if let Some(line) = lines.last_mut() {
            line.push_str(comma);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row(name: &str, uses: &[&str]) -> Row {
        Row {
            address: "0000:01:00.0".to_owned(),
            class: "Ethernet".to_owned(),
            name: name.to_owned(),
            driver: "e1000e".to_owned(),
            group: "12".to_owned(),
            node: "0".to_owned(),
            uses: uses.iter().map(|&usage| usage.to_owned()).collect(),
        }
    }

    proptest! {
        #[test]
        fn a_terminal_of_80_columns_is_never_overrun(
            names in prop::collection::vec("[a-zé ]{0,90}", 0..5),
            width in 80..200usize,
        ) {
            let rows: Vec<_> = names.iter().map(|n| row(n, &["/ (sda2 > vg-root)"])).collect();
            let table = Table { rows: &rows, width: Some(width) }.to_string();
            for line in table.lines() {
                prop_assert!(length(line) <= width, "{line}");
            }
        }
    }

    #[test]
    fn nothing_is_cut_where_there_is_no_terminal() {
        let name = "x".repeat(300);
        let rows = [row(&name, &["eth0"])];
        let table = Table {
            rows: &rows,
            width: None,
        }
        .to_string();
        assert!(table.contains(&name) && table.ends_with("  eth0\n"));
    }
}
