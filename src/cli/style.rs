//! Colour, and whether to use it.
//!
//! Every colour is one that can be read on a dark and on a light terminal, and none of them is the only
//! way in which something is said.

use std::fmt;
use std::io::{self, IsTerminal as _, Write};
use std::sync::OnceLock;

use clap::ValueEnum;

/// When output is coloured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ColorChoice {
    /// On a terminal, unless NO_COLOR is set
    #[default]
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

static CHOICE: OnceLock<ColorChoice> = OnceLock::new();

/// What `--color` said, from here on.
pub(super) fn choose(choice: ColorChoice) {
    // The command line is read once; a second choice would be a mistake of ours, and is ignored.
    let _first = CHOICE.set(choice);
}

impl ColorChoice {
    /// What `--color` said.
    pub(super) fn chosen() -> Self {
        CHOICE.get().copied().unwrap_or_default()
    }

    /// Whether what goes to a stream, a terminal or not, is to be coloured.
    pub(super) fn applies(self, terminal: bool) -> bool {
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Auto => {
                let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
                terminal && !dumb && !no_color()
            }
        }
    }
}

/// The user asked for no colours: <https://no-color.org>.
pub(super) fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// What output is written for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Screen {
    /// Columns; none: no terminal, so that nothing needs to be cut.
    pub width: Option<usize>,
    /// Lines, on a terminal.
    pub height: Option<usize>,
    /// Whether there are colours.
    pub colour: bool,
}

impl Screen {
    /// What standard output is.
    #[must_use]
    pub fn of_stdout() -> Self {
        let out = io::stdout();
        let terminal = out.is_terminal();
        let size = terminal
            .then(|| terminal_size::terminal_size_of(&out))
            .flatten();
        Self {
            width: size.map(|(width, _)| usize::from(width.0)),
            height: size.map(|(_, height)| usize::from(height.0)),
            colour: ColorChoice::chosen().applies(terminal),
        }
    }
}

/// A terminal of so many columns, without colour; none: a pipe.
impl From<Option<usize>> for Screen {
    fn from(width: Option<usize>) -> Self {
        Self {
            width,
            ..Self::default()
        }
    }
}

/// A way to write words: an ANSI SGR parameter list (ECMA-48 §8.3.117).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Style(pub(super) &'static str);

impl Style {
    pub(super) const PLAIN: Self = Self("");
    pub(super) const BOLD: Self = Self("1");
    pub(super) const DIM: Self = Self("2");
    pub(super) const GOOD: Self = Self("38;5;34");
    pub(super) const WARN: Self = Self("38;5;172");
    pub(super) const BAD: Self = Self("1;38;5;160");
    pub(super) const COMMAND: Self = Self("38;5;33");

    /// The words in this style, where there are colours.
    pub(super) fn paint<T: fmt::Display>(self, words: T, colour: bool) -> Painted<T> {
        Painted {
            style: self,
            words,
            colour,
        }
    }
}

/// Words in a style.
#[derive(Clone, Copy, Debug)]
pub(super) struct Painted<T> {
    style: Style,
    words: T,
    colour: bool,
}

impl<T: fmt::Display> fmt::Display for Painted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.colour && !self.style.0.is_empty() {
            write!(f, "\x1b[{}m{}\x1b[0m", self.style.0, self.words)
        } else {
            write!(f, "{}", self.words)
        }
    }
}

/// Colours for things that belong together, by their place in the 256-colour palette and as a picture
/// has them. Neighbours differ.
pub(super) const PALETTE: [(u8, [u8; 3]); 10] = [
    (33, [0x00, 0x87, 0xff]),
    (166, [0xd7, 0x5f, 0x00]),
    (35, [0x00, 0xaf, 0x5f]),
    (133, [0xaf, 0x5f, 0xaf]),
    (136, [0xaf, 0x87, 0x00]),
    (161, [0xd7, 0x00, 0x5f]),
    (31, [0x00, 0x87, 0xaf]),
    (99, [0x87, 0x5f, 0xff]),
    (70, [0x5f, 0xaf, 0x00]),
    (167, [0xd7, 0x5f, 0x5f]),
];

/// The style of the colour at `index`, begun anew past the end.
pub(super) fn of_palette(index: usize) -> Style {
    const STYLES: [Style; 10] = [
        Style("38;5;33"),
        Style("38;5;166"),
        Style("38;5;35"),
        Style("38;5;133"),
        Style("38;5;136"),
        Style("38;5;161"),
        Style("38;5;31"),
        Style("38;5;99"),
        Style("38;5;70"),
        Style("38;5;167"),
    ];
    STYLES[index % STYLES.len()]
}

/// Writes all of it. Whoever closed the pipe has seen enough.
pub(super) fn write_out(out: &mut dyn Write, text: &str) -> io::Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// WCAG 2.2: relative luminance.
    fn luminance(colour: [u8; 3]) -> f64 {
        let [r, g, b] = colour.map(|part| {
            let part = f64::from(part) / 255.0;
            if part <= 0.04045 {
                part / 12.92
            } else {
                ((part + 0.055) / 1.055).powf(2.4)
            }
        });
        0.2126 * r + 0.7152 * g + 0.0722 * b
    }

    /// The colour of the 256-colour palette's cube.
    fn of_cube(index: u8) -> [u8; 3] {
        let part = |step: u8| if step == 0 { 0 } else { 55 + 40 * step };
        let cube = index - 16;
        [part(cube / 36), part(cube / 6 % 6), part(cube % 6)]
    }

    #[test]
    fn every_colour_can_be_read_on_black_and_on_white() {
        let styles = [Style::GOOD, Style::WARN, Style::BAD, Style::COMMAND];
        let styles = styles.into_iter().chain((0..PALETTE.len()).map(of_palette));
        for style in styles {
            let index = style.0.rsplit(';').next().unwrap().parse().unwrap();
            let light = luminance(of_cube(index));
            let (on_black, on_white) = ((light + 0.05) / 0.05, 1.05 / (light + 0.05));
            assert!(
                on_black >= 3.0 && on_white >= 2.5,
                "{style:?} {on_black} {on_white}"
            );
        }
    }

    #[test]
    fn the_terminals_palette_is_the_pictures() {
        for (place, (index, colour)) in PALETTE.into_iter().enumerate() {
            assert_eq!(of_cube(index), colour);
            assert!(of_palette(place).0.ends_with(&format!(";{index}")));
        }
    }

    #[test]
    fn the_switch_overrules_the_terminal_both_ways() {
        assert!(ColorChoice::Always.applies(false));
        assert!(!ColorChoice::Never.applies(true));
        assert!(!ColorChoice::Auto.applies(false));
    }
}
