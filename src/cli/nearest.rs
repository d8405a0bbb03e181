//! The word that was probably meant.

use std::fmt;

/// Below this a word is another word. 1 is the same; a swapped or a missing letter in a short word is
/// above 0.8.
const ALIKE: f64 = 0.75;

/// Of `known`, the word most like `word`, where one is like it at all.
pub(super) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|known| (strsim::jaro_winkler(word, known), *known))
        .filter(|(alike, _)| *alike > ALIKE)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, known)| known)
}

/// The end of a message: `; did you mean X?`, or nothing.
pub(super) struct Nearest<'a>(pub(super) &'a str, pub(super) &'a [&'a str]);

impl fmt::Display for Nearest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match nearest(self.0, self.1) {
            Some(word) => write!(f, "; did you mean `{word}`?"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_find_the_word_that_was_meant() {
        let known = ["kernel", "cpus", "memory", "disk", "net", "device"];
        for (slip, meant) in [
            ("memroy", "memory"),
            ("mem", "memory"),
            ("disks", "disk"),
            ("cpu", "cpus"),
            ("devcie", "device"),
            ("network", "net"),
        ] {
            assert_eq!(nearest(slip, &known), Some(meant), "{slip}");
        }
        assert_eq!(nearest("balloon", &known), None);
        assert_eq!(nearest("", &known), None);
    }
}
