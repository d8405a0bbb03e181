//! Scripts for sed that change whole words of a command line and nothing else.

use std::fmt::Write as _;

/// A sed script that takes `word` out of the lines of /etc/default/grub that have the command line: where
/// it stands between white space, quotes, the sign of equality behind the variable, and the line's end.
pub(super) fn without(word: &str) -> String {
    let word = pattern(word);
    format!(
        "/^[[:space:]]*GRUB_CMDLINE_/{{:a;\
         s/(^[[:space:]]*GRUB_CMDLINE_[A-Z_]*=|[\"'[:space:]]){word}([\"'[:space:]]|$)/\\1\\2/;ta}}"
    )
}

/// The same for a file that has nothing but the command line.
pub(super) fn without_in_line(word: &str) -> String {
    let word = pattern(word);
    format!(":a;s/(^|[[:space:]]){word}([[:space:]]|$)/\\1\\2/;ta")
}

/// An extended regular expression (XBD 9.4) that matches `word` and nothing else, for sed's `s/…/…/`.
fn pattern(word: &str) -> String {
    let mut pattern = String::with_capacity(word.len());
    for c in word.chars() {
        match c {
            '.' | '[' | ']' | '\\' | '(' | ')' | '*' | '+' | '?' | '{' | '}' | '|' | '^' | '$'
            | '/' => {
                let _infallible = write!(pattern, "\\{c}");
            }
            c => pattern.push(c),
        }
    }
    pattern
}

/// A script that puts `word` at the end of the first line.
pub(super) fn append(word: &str) -> String {
    format!("1s/$/ {}/", replacement(word))
}

/// `word` as the right side of sed's `s/…/…/`.
fn replacement(word: &str) -> String {
    let mut text = String::with_capacity(word.len());
    for c in word.chars() {
        if matches!(c, '/' | '\\' | '&') {
            text.push('\\');
        }
        text.push(c);
    }
    text
}
