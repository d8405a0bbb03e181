//! The table of `busway device list`.
//!
//! Where the terminal has room there are more columns, and what uses a device stands in one of them;
//! where it has not, on lines of its own below the device. Names are cut; addresses, drivers and groups,
//! which one copies into commands, never are.

use std::fmt;

use crate::cli::style::{Screen, Style};
use crate::cli::text::{fold, length, shorten};

/// A column: its title, and what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    Address,
    Class,
    Name,
    Driver,
    Group,
    Numa,
    Link,
    Functions,
    Reset,
    Bars,
    Alternatives,
}

use Column::*;

/// All, as they stand from left to right.
const COLUMNS: [Column; 11] = [
    Address,
    Class,
    Name,
    Driver,
    Alternatives,
    Group,
    Numa,
    Link,
    Functions,
    Reset,
    Bars,
];

/// Those that are left out where there is no room, the first one last.
const OPTIONAL: [Column; 5] = [Link, Reset, Functions, Bars, Alternatives];
/// Those of the rest that a narrow terminal does without, the first one first.
const DISPENSABLE: [Column; 2] = [Numa, Class];

const GAP: usize = 2;
/// A name cut shorter than this says too little, where there is anything to be left out.
const NAME_LEAST: usize = 24;
/// A name is this long before there is a further column.
const NAME_GOOD: usize = 34;
/// What is left of a name on a narrow terminal.
const NAME_SHORT: usize = 12;
/// Longer classes are cut before names are.
const CLASS_GOOD: usize = 14;
const CLASS_LEAST: usize = 8;
/// Where the uses of a device begin on lines of their own.
const INDENT: usize = 14;

impl Column {
    fn title(self) -> &'static str {
        match self {
            Address => "ADDRESS",
            Class => "CLASS",
            Name => "NAME",
            Driver => "DRIVER",
            Group => "GROUP",
            Numa => "NUMA",
            Link => "LINK GT/s",
            Functions => "VFS",
            Reset => "RESET",
            Bars => "BARS",
            Alternatives => "OTHERS",
        }
    }

    /// Numbers stand on the right of their column.
    fn is_number(self) -> bool {
        matches!(self, Group | Numa)
    }
}

/// One device, in words.
#[derive(Clone, Debug, Default)]
pub(super) struct Row {
    pub(super) address: String,
    pub(super) class: String,
    pub(super) name: String,
    pub(super) driver: String,
    pub(super) group: String,
    pub(super) node: String,
    pub(super) link: String,
    pub(super) functions: String,
    pub(super) reset: String,
    pub(super) bars: String,
    pub(super) alternatives: String,
    pub(super) uses: Vec<String>,
    /// What makes cells stand out.
    pub(super) styles: Styles,
}

/// The styles of the cells that have one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Styles {
    /// Of what it is.
    pub(super) name: Style,
    pub(super) driver: Style,
    pub(super) group: Style,
    pub(super) link: Style,
    pub(super) uses: Style,
}

impl Default for Styles {
    fn default() -> Self {
        Self {
            name: Style::PLAIN,
            driver: Style::PLAIN,
            group: Style::PLAIN,
            link: Style::PLAIN,
            uses: Style::PLAIN,
        }
    }
}

impl Row {
    fn cell(&self, column: Column) -> &str {
        match column {
            Address => &self.address,
            Class => &self.class,
            Name => &self.name,
            Driver => &self.driver,
            Group => &self.group,
            Numa => &self.node,
            Link => &self.link,
            Functions => &self.functions,
            Reset => &self.reset,
            Bars => &self.bars,
            Alternatives => &self.alternatives,
        }
    }

    fn style(&self, column: Column) -> Style {
        match column {
            Class | Name => self.styles.name,
            Driver => self.styles.driver,
            Group => self.styles.group,
            Link => self.styles.link,
            _ => Style::PLAIN,
        }
    }
}

/// Rows to be shown on a screen.
#[derive(Debug)]
pub(super) struct Table<'a> {
    pub(super) rows: &'a [Row],
    pub(super) screen: Screen,
}

/// The columns that are shown, how wide each is, and how wide the uses are beside them.
struct Layout {
    columns: Vec<(Column, usize)>,
    beside: Option<usize>,
}

impl Table<'_> {
    fn layout(&self) -> Layout {
        let limit = self.screen.width.unwrap_or(usize::MAX);
        let wide = |column: Column| {
            let cells = self.rows.iter().map(|row| length(row.cell(column)));
            cells.max().unwrap_or(0).max(column.title().len())
        };
        let says = |column| {
            let mut cells = self.rows.iter().map(|row| row.cell(column));
            cells.any(|cell| !matches!(cell, "" | "-"))
        };
        let mut shown: Vec<_> = COLUMNS
            .into_iter()
            .filter(|column| !OPTIONAL.contains(column))
            .filter(|column| *column != Numa || says(Numa))
            .map(|column| (column, wide(column)))
            .collect();

        for column in DISPENSABLE {
            if least(&shown, NAME_LEAST) > limit {
                shown.retain(|(shown, _)| *shown != column);
            }
        }
        for column in OPTIONAL.into_iter().filter(|column| says(*column)) {
            let mut more = shown.clone();
            let place = |of: Column| COLUMNS.iter().position(|column| *column == of);
            let at = more.partition_point(|(shown, _)| place(*shown) < place(column));
            more.insert(at, (column, wide(column)));
            if least(&more, NAME_GOOD) <= limit {
                shown = more;
            }
        }
        let uses = self.rows.iter().flat_map(|row| &row.uses);
        // Each with the comma after it.
        let longest = uses.map(|usage| length(usage) + 1).max().unwrap_or(0);
        let longest = longest.max("USED BY".len());
        let fits = least(&shown, NAME_LEAST).saturating_add(GAP + longest) <= limit;
        let left = limit - if fits { longest + GAP } else { 0 };
        cut_to(&mut shown, left);
        // What the names do not need, the uses may have.
        let beside = fits.then(|| limit.saturating_sub(total(&shown) + GAP));
        Layout {
            columns: shown,
            beside,
        }
    }
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Layout { columns, beside } = self.layout();
        let colour = self.screen.colour;
        let limit = self.screen.width.unwrap_or(usize::MAX);
        let (indent, width, lead) = match beside {
            Some(width) => (total(&columns) + GAP, width, ""),
            None => (INDENT, limit.saturating_sub(INDENT), "used by "),
        };

        let mut line = Line::new(colour);
        for &(column, width) in &columns {
            line.cell(column.title(), width, column.is_number(), Style::BOLD);
        }
        if beside.is_some() {
            line.last("USED BY", Style::BOLD);
        }
        writeln!(f, "{line}")?;
        for row in self.rows {
            let mut uses = wrap(lead, &row.uses, width).into_iter();
            let mut line = Line::new(colour);
            for &(column, width) in &columns {
                let style = row.style(column);
                line.cell(row.cell(column), width, column.is_number(), style);
            }
            if let Some(first) = beside.and_then(|_| uses.next()) {
                line.last(&first, row.styles.uses);
            }
            writeln!(f, "{line}")?;
            for uses in uses {
                let uses = row.styles.uses.paint(uses, colour);
                writeln!(f, "{:indent$}{uses}", "")?;
            }
        }
        Ok(())
    }
}

/// A line of cells, without white space at its end.
struct Line {
    text: String,
    /// White space that is written once something follows.
    gap: usize,
    colour: bool,
}

impl Line {
    fn new(colour: bool) -> Self {
        Self {
            text: String::new(),
            gap: 0,
            colour,
        }
    }

    fn cell(&mut self, text: &str, width: usize, right: bool, style: Style) {
        let text = shorten(text, width);
        let pad = width - length(&text);
        if right {
            self.gap += pad;
        }
        self.last(&text, style);
        self.gap += GAP + if right { 0 } else { pad };
    }

    fn last(&mut self, text: &str, style: Style) {
        if text.is_empty() {
            return;
        }
        self.text.push_str(&" ".repeat(self.gap));
        self.gap = 0;
        self.text
            .push_str(&style.paint(text, self.colour).to_string());
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn total(columns: &[(Column, usize)]) -> usize {
    columns
        .iter()
        .map(|(_, width)| width + GAP)
        .sum::<usize>()
        .saturating_sub(GAP)
}

/// Cuts what may be cut until all fit in `limit`: first what is longest of its kind, in the end as much as
/// there must be.
fn cut_to(columns: &mut [(Column, usize)], limit: usize) {
    for (column, least) in [
        (Class, CLASS_GOOD),
        (Name, NAME_LEAST),
        (Class, CLASS_LEAST),
        (Name, NAME_SHORT),
    ] {
        cut(columns, column, least, limit);
    }
}

/// How wide the columns are with the name cut to `name` and the class to its least.
fn least(columns: &[(Column, usize)], name: usize) -> usize {
    let mut columns = columns.to_vec();
    cut(&mut columns, Name, name, 0);
    cut(&mut columns, Class, CLASS_LEAST, 0);
    total(&columns)
}

/// Makes one column narrower, not below `least`, until all fit in `limit`.
fn cut(columns: &mut [(Column, usize)], column: Column, least: usize, limit: usize) {
    let over = total(columns).saturating_sub(limit);
    if let Some((_, width)) = columns.iter_mut().find(|(shown, _)| *shown == column) {
        *width = width.saturating_sub(over).max(least.min(*width));
    }
}

/// Uses in lines of `width` columns, as many to a line as fit, after `lead`; one that is longer than a
/// line is broken where it has a space.
fn wrap(lead: &str, uses: &[String], width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for (index, usage) in uses.iter().enumerate() {
        let comma = if index + 1 < uses.len() { "," } else { "" };
        let usage = format!("{usage}{comma}");
        match lines.last_mut() {
            Some(line) if length(line) + 1 + length(&usage) <= width => {
                line.push(' ');
                line.push_str(&usage);
            }
            Some(_) => lines.extend(fold(&usage, width)),
            None => lines.extend(fold(&format!("{lead}{usage}"), width)),
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
            driver: "megaraid_sas".to_owned(),
            group: "12".to_owned(),
            node: "0".to_owned(),
            link: "2.5/8.0 x4/16".to_owned(),
            functions: "2/64".to_owned(),
            reset: "flr,pm,bus".to_owned(),
            bars: "16M 256M 32M 128io".to_owned(),
            alternatives: "nvidiafb".to_owned(),
            uses: uses.iter().map(|&usage| usage.to_owned()).collect(),
            styles: Styles::default(),
        }
    }

    proptest! {
        #[test]
        fn a_terminal_is_never_overrun(
            names in prop::collection::vec("[a-zé ]{0,90}", 0..5),
            width in 56..240usize,
        ) {
            let uses = ["/ (sda2 > vg-root)", "/a/longer/way (nvme0n1p1 > md127 > luks > vg-root)"];
            let rows: Vec<_> = names.iter().map(|n| row(n, &uses)).collect();
            let table = Table { rows: &rows, screen: Some(width).into() }.to_string();
            for line in table.lines() {
                prop_assert!(length(line) <= width, "{line}");
            }
        }

        #[test]
        fn colour_changes_nothing_but_colour(width in 56..240usize) {
            let rows = [row("A name", &["eth0"])];
            let mut screen = Screen::from(Some(width));
            let plain = Table { rows: &rows, screen }.to_string();
            screen.colour = true;
            let mut coloured = Table { rows: &rows, screen }.to_string();
            while let Some(at) = coloured.find('\x1b') {
                let end = coloured[at..].find('m').unwrap();
                coloured.replace_range(at..=at + end, "");
            }
            prop_assert_eq!(plain, coloured);
        }
    }

    #[test]
    fn nothing_is_cut_where_there_is_no_terminal() {
        let name = "x".repeat(300);
        let rows = [row(&name, &["eth0"])];
        let table = Table {
            rows: &rows,
            screen: Screen::default(),
        }
        .to_string();
        assert!(table.contains(&name) && table.ends_with("  eth0\n"));
    }
}
