//! Tables that fit the terminal: where there is no room, columns go that say least, and then long words are cut.

use crate::cli::style::{Screen, Style};
use crate::cli::text::{length, shorten};

/// Between two columns.
const GAP: usize = 2;

/// A column.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column {
    /// Its title.
    title: &'static str,
    /// Numbers stand at the right.
    right: bool,
    /// Which goes first where there is no room: the one with the highest; 0 stays.
    rank: u8,
    /// To how many columns it can be cut; none: it is copied into commands, and never cut.
    least: Option<usize>,
}

impl Column {
    /// Words, which stay whole.
    pub(super) const fn words(title: &'static str) -> Self {
        Self {
            title,
            right: false,
            rank: 0,
            least: None,
        }
    }

    /// A number.
    pub(super) const fn number(title: &'static str) -> Self {
        Self {
            right: true,
            ..Self::words(title)
        }
    }

    /// It goes where there is no room, those with a higher rank before it.
    pub(super) const fn rank(mut self, rank: u8) -> Self {
        self.rank = rank;
        self
    }

    /// It is cut where there is no room, to so many columns at least.
    pub(super) const fn cut_to(mut self, least: usize) -> Self {
        self.least = Some(least);
        self
    }
}

/// What stands in a column, and how.
#[derive(Clone, Debug)]
pub(super) struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    pub(super) fn styled(text: impl Into<String>, style: Style) -> Self {
        Self {
            text: text.into(),
            style,
        }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::styled(text, Style::PLAIN)
    }
}

/// The table. A column without any word in it is left out.
pub(super) fn table(columns: &[Column], rows: &[Vec<Cell>], screen: Screen) -> String {
    let said = |at: usize| rows.iter().filter_map(move |row| row.get(at));
    let width_of = |at: usize, column: &Column| {
        let longest = said(at).map(|cell| length(&cell.text)).max().unwrap_or(0);
        longest.max(column.title.len())
    };
    let mut shown: Vec<_> = columns
        .iter()
        .enumerate()
        .filter(|(at, _)| said(*at).any(|cell| !cell.text.is_empty()))
        .map(|(at, column)| (at, *column, width_of(at, column)))
        .collect();
    if let Some(width) = screen.width {
        fit(&mut shown, width);
    }
    let mut text = String::new();
    let titles = shown.iter().map(|(_, column, width)| {
        let cell = Cell::styled(column.title, Style::BOLD);
        (cell, *column, *width)
    });
    line(&mut text, titles, screen);
    for row in rows {
        let cells = shown.iter().map(|(at, column, width)| {
            let cell = row.get(*at).cloned();
            (cell.unwrap_or_else(|| "".into()), *column, *width)
        });
        line(&mut text, cells, screen);
    }
    text
}

/// Takes columns out, and makes them narrower, until they fit in so many columns of the terminal, or nothing more can
/// be done.
fn fit(shown: &mut Vec<(usize, Column, usize)>, width: usize) {
    let total = |shown: &[(usize, Column, usize)]| {
        let all: usize = shown.iter().map(|(_, _, width)| width + GAP).sum();
        all.saturating_sub(GAP)
    };
    // What cutting alone would save.
    let cuts = |shown: &[(usize, Column, usize)]| -> usize {
        let saved = shown.iter().filter_map(|(_, column, width)| {
            let least = column.least?.max(column.title.len());
            Some(width.saturating_sub(least))
        });
        saved.sum()
    };
    while total(shown).saturating_sub(cuts(shown)) > width {
        let ranked = shown.iter().enumerate().filter(|(_, one)| one.1.rank > 0);
        let Some((at, _)) = ranked.max_by_key(|(at, one)| (one.1.rank, *at)) else {
            break;
        };
        shown.remove(at);
    }
    while total(shown) > width {
        let can = shown.iter_mut().filter(|(_, column, width)| {
            let least = column.least.map(|least| least.max(column.title.len()));
            least.is_some_and(|least| *width > least)
        });
        let Some((_, _, widest)) = can.max_by_key(|(_, _, width)| *width) else {
            return;
        };
        *widest -= 1;
    }
}

fn line(text: &mut String, cells: impl Iterator<Item = (Cell, Column, usize)>, screen: Screen) {
    let mut line = String::new();
    // Spaces wait until something comes behind them.
    let mut spaces = 0;
    for (cell, column, width) in cells {
        let words = shorten(&cell.text, width);
        let room = width.saturating_sub(length(&words));
        let (before, after) = if column.right { (room, 0) } else { (0, room) };
        spaces += before;
        if !words.is_empty() {
            line.extend(std::iter::repeat_n(' ', spaces));
            line += &cell.style.paint(words, screen.colour).to_string();
            spaces = 0;
        }
        spaces += after + GAP;
    }
    *text += &line;
    text.push('\n');
}

/// A number in few characters: 0 to 999, and then with a decimal and `k`, `M`, `G`, `T`.
pub(super) fn short(number: f64) -> String {
    scaled(number, 1000.0, &["", "k", "M", "G", "T"])
}

/// Bytes in few characters.
pub(super) fn short_bytes(bytes: f64) -> String {
    scaled(bytes, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"])
}

fn scaled(number: f64, step: f64, units: &[&str]) -> String {
    let mut number = number.max(0.0);
    let mut units = units.iter().peekable();
    while let Some(unit) = units.next() {
        // What would be rounded to the next unit is of the next unit.
        if number + 0.5 < step || units.peek().is_none() {
            let tenths = (number * 10.0).round() / 10.0;
            let decimals = usize::from(tenths < 10.0 && tenths.fract() > 0.0);
            return format!("{number:.decimals$}{unit}");
        }
        number /= step;
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn screen(width: usize) -> Screen {
        Some(width).into()
    }

    #[test]
    fn what_says_least_goes_first_and_then_long_words_are_cut() {
        let columns = [
            Column::words("NAME").cut_to(6),
            Column::number("COUNT"),
            Column::words("MORE").rank(1),
            Column::words("MOST").rank(2),
            Column::words("EMPTY"),
        ];
        let row = ["a-long-name", "17", "more", "most", ""];
        let rows = [row.map(Cell::from).to_vec()];
        let wide = "NAME         COUNT  MORE  MOST\na-long-name     17  more  most\n";
        assert_eq!(table(&columns, &rows, Screen::default()), wide);
        assert_eq!(table(&columns, &rows, screen(30)), wide);
        let cut = "NAME      COUNT  MORE  MOST\na-long-…     17  more  most\n";
        assert_eq!(table(&columns, &rows, screen(27)), cut);
        let fewer = "NAME     COUNT  MORE\na-long…     17  more\n";
        assert_eq!(table(&columns, &rows, screen(20)), fewer);
        // No narrower than that.
        let least = "NAME    COUNT\na-lon…     17\n";
        assert_eq!(table(&columns, &rows, screen(3)), least);
    }

    #[test]
    fn numbers_are_short() {
        for (number, said) in [
            (0.0, "0"),
            (0.3, "0.3"),
            (9.0, "9"),
            (999.0, "999"),
            (999.6, "1k"),
            (1234.0, "1.2k"),
            (5e15, "5000T"),
            (-1.0, "0"),
        ] {
            assert_eq!(short(number), said);
        }
        assert_eq!(short_bytes(1536.0), "1.5KiB");
        assert_eq!(short_bytes(512.0 * 1024.0 * 1024.0), "512MiB");
    }
}
