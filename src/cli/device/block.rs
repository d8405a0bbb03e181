//! A block of lines for one thing: its title, and what is known of it, each with a label.

use std::fmt::Write as _;

use crate::cli::style::{Screen, Style};
use crate::cli::text::{fold, shorten};

/// Where the words begin.
const INDENT: usize = 13;

/// A title, what it is, and lines below it, each with a label. One label serves all the lines that have it.
pub(super) fn labelled(
    title: &str,
    what: &str,
    mut lines: Vec<(&'static str, String)>,
    screen: Screen,
) -> String {
    let mut last = "";
    for (label, _) in &mut lines {
        if *label == last {
            *label = "";
        } else {
            last = label;
        }
    }
    let what = match screen.width {
        Some(width) => shorten(what, width.saturating_sub(title.len() + 2)),
        None => what.to_owned(),
    };
    let mut text = format!("{}  {what}\n", Style::BOLD.paint(title, screen.colour));
    for (label, words) in lines {
        let width = screen.width.unwrap_or(usize::MAX).saturating_sub(INDENT);
        for (index, line) in fold(&words, width).into_iter().enumerate() {
            let label = if index == 0 { label } else { "" };
            let _infallible = writeln!(text, "  {label:<11}{line}");
        }
    }
    text
}
