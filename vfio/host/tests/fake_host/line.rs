//! The language of the descriptions in `tests/hosts`: words, and a line of them.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

pub(super) struct Line {
    pub(super) what: String,
    pub(super) words: Vec<String>,
    pub(super) number: usize,
}

impl Line {
    pub(super) fn wrong(&self, why: &str) -> ! {
        panic!("line {} ({}): {why}", self.number, self.what)
    }

    pub(super) fn bare(&self, index: usize) -> String {
        let word = self.words.get(index);
        word.unwrap_or_else(|| self.wrong("too few words")).clone()
    }

    /// A word as a path: its characters up to U+00FF are its bytes where it has such.
    pub(super) fn path(&self, index: usize) -> PathBuf {
        let text = self.bare(index);
        if text.chars().any(|c| ('\u{80}'..='\u{ff}').contains(&c)) {
            let bytes = text.chars().map(|c| c as u8).collect();
            return OsString::from_vec(bytes).into();
        }
        std::ffi::OsStr::from_bytes(text.as_bytes()).into()
    }

    pub(super) fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.words.iter().filter_map(|word| word.split_once('='))
    }

    pub(super) fn all(&self, key: &str) -> Vec<String> {
        let mine = self.pairs().filter(|(k, _)| *k == key);
        mine.map(|(_, value)| value.to_owned()).collect()
    }

    pub(super) fn get(&self, key: &str) -> Option<String> {
        self.all(key).into_iter().next()
    }

    pub(super) fn has(&self, word: &str) -> bool {
        self.words.iter().any(|w| w == word)
    }
}

/// The words of a line.
pub(super) fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '\\' if chars.clone().next() == Some('x') => {
                let code: String = chars.by_ref().skip(1).take(2).collect();
                let byte = u8::from_str_radix(&code, 16).unwrap();
                word.get_or_insert_default().push(char::from(byte));
            }
            '\\' if matches!(chars.clone().next(), Some('n' | 't')) => {
                let c = if chars.next() == Some('n') {
                    '\n'
                } else {
                    '\t'
                };
                word.get_or_insert_default().push(c);
            }
            '#' if !quoted && word.is_none() => break,
            c if c.is_whitespace() && !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// Bytes: `16K`, `2M`, `8G`.
pub(super) fn size(text: &str) -> u64 {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        Some(b'T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    digits.parse::<u64>().unwrap() << shift
}
