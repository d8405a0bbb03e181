//! `busway device list --watch`: the same again whenever it changes.

use std::io::{self, Write};

use super::DeviceCommandError;
use crate::cli::style::Screen;
use crate::cli::text::fit;

/// What helps where the list is longer than the terminal.
const HINT: &str = "make the window higher, or say which with --class";

/// ECMA-48: the cursor goes home (CUP), and everything after it is erased (ED).
const CLEAR: &str = "\x1b[H\x1b[J";

/// Writes what `show` gives for a screen, and again whenever it gives something else. `wait` lets time
/// pass and says what the screen is then; none ends it.
pub(super) fn watch(
    show: &mut dyn FnMut(Screen) -> Result<String, DeviceCommandError>,
    mut screen: Screen,
    out: &mut dyn Write,
    wait: &mut dyn FnMut() -> Option<Screen>,
) -> Result<(), DeviceCommandError> {
    let mut last = String::new();
    let mut first = true;
    loop {
        let text = show(screen)?;
        let frame = match screen.height {
            Some(height) => format!("{CLEAR}{}", fit(&text, height, HINT)),
            None => text,
        };
        if first || frame != last {
            // In a pipe an empty line tells one list from the next; JSON has a line for each.
            let gap = match screen.height.is_none() && !first && !frame.starts_with('{') {
                true => "\n",
                false => "",
            };
            let written = write!(out, "{gap}{frame}").and_then(|()| out.flush());
            match written {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                result => result?,
            }
            last = frame;
            first = false;
        }
        match wait() {
            Some(now) => screen = now,
            None => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watched(texts: &[&str], screen: Screen) -> String {
        let mut texts = texts.iter();
        let mut left = texts.len();
        let mut out = Vec::new();
        watch(
            &mut |_| Ok(texts.next().map_or(String::new(), |t| (*t).to_owned())),
            screen,
            &mut out,
            &mut || {
                left -= 1;
                (left > 0).then_some(screen)
            },
        )
        .unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn only_what_changes_is_shown_again() {
        let pipe = Screen::default();
        assert_eq!(watched(&["a\n", "a\n", "b\n", "b\n"], pipe), "a\n\nb\n");
        assert_eq!(watched(&["{1}\n", "{2}\n"], pipe), "{1}\n{2}\n");
    }

    #[test]
    fn a_terminal_is_cleared_and_never_scrolled() {
        let screen = Screen {
            width: Some(80),
            height: Some(4),
            colour: false,
        };
        assert_eq!(watched(&["a\n"], screen), "\x1b[H\x1b[Ja\n");
        let long = watched(&["1\n2\n3\n4\n5\n"], screen);
        assert_eq!(long.lines().count(), 3);
        assert!(long.contains("1\n2\n… 3 more lines"), "{long}");
    }
}
