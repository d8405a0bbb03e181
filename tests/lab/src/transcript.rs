//! What a guest wrote to its console, as data.

use std::collections::BTreeMap;

/// One line, with the host's time when it was complete.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// Seconds since the epoch by the emulated host's clock.
    pub at: f64,
    /// The line without its end.
    pub text: String,
}

/// A guest's console, and what its script said there in the words that `guest-init` gives it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Transcript {
    /// Every line, as it came.
    pub lines: Vec<Line>,
    /// `value KEY WORDS`: figures by name, the last one if there are several.
    pub values: BTreeMap<String, String>,
    /// `COMMAND | block NAME`: texts by name.
    pub blocks: BTreeMap<String, String>,
}

/// The line that stands for the VMM's start.
pub(crate) const EXEC: &str = "@@exec";
/// What a guest's first program says before all else.
pub(crate) const UP: &str = "@@up";

impl Transcript {
    /// Reads the output of `guest-run.sh`: each line has its time in front.
    pub(crate) fn parse(text: &str) -> Self {
        let mut transcript = Self::default();
        let mut open: Option<(String, String)> = None;
        for line in text.lines() {
            let Some((at, text)) = line.split_once(' ') else {
                continue;
            };
            let Ok(at) = at.parse() else { continue };
            transcript.lines.push(Line {
                at,
                text: text.to_owned(),
            });
            // The kernel's own lines can stand in front on the same line.
            let said = text.find("@@").map_or("", |start| &text[start..]);
            // A guest that begins anew does not go on with what it said before.
            if said == UP {
                open = None;
            }
            if let Some((name, content)) = &mut open {
                if said.strip_prefix("@@end ") == Some(name) {
                    transcript.blocks.extend(open.take());
                } else {
                    content.push_str(text);
                    content.push('\n');
                }
            } else if let Some(name) = said.strip_prefix("@@begin ") {
                open = Some((name.to_owned(), String::new()));
            } else if let Some(value) = said.strip_prefix("@@value ") {
                let (key, words) = value.split_once(' ').unwrap_or((value, ""));
                transcript.values.insert(key.to_owned(), words.to_owned());
            }
        }
        transcript
    }

    /// The console's text without times.
    pub fn text(&self) -> String {
        self.lines
            .iter()
            .flat_map(|line| [line.text.as_str(), "\n"])
            .collect()
    }

    /// When a line that contains these words came first.
    pub fn time_of(&self, words: &str) -> Option<f64> {
        self.lines
            .iter()
            .find(|line| line.text.contains(words))
            .map(|line| line.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_blocks_are_found_among_kernel_lines() {
        let text = "10.5 @@exec\n12.25 @@up\n12.5 [ 1.0] nvme: hello@@value serial NV 0001\n\
                    13.0 @@begin pci\n13.1 one\n13.2 two\n13.3 @@end pci\nbroken\n";
        let transcript = Transcript::parse(text);
        assert_eq!(transcript.values["serial"], "NV 0001");
        assert_eq!(transcript.blocks["pci"], "one\ntwo\n");
        assert_eq!(transcript.time_of(UP), Some(12.25));
        assert_eq!(transcript.lines.len(), 7);
    }

    #[test]
    fn a_block_cut_short_is_no_block() {
        assert!(Transcript::parse("1 @@begin a\n2 text\n").blocks.is_empty());
        let restarted = "1 @@begin a\n2 text\n3 @@up\n4 @@begin b\n5 more\n6 @@end b\n7 @@end a\n";
        let blocks = Transcript::parse(restarted).blocks;
        assert_eq!(blocks, BTreeMap::from([("b".into(), "more\n".into())]));
    }
}
