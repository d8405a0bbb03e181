//! Whatever stands in a file or after flags: [`settings`] takes any bytes as `vm.toml`, as flags of `busway run`, or as
//! those of Cloud Hypervisor's that the drop-in command line takes, and panics where something does not hold that always
//! has to.
//!
//! The tests at the end of this file play random text; `tests/fuzz` what reaches new code.

use std::fmt::Write as _;
use std::path::Path;

use clap::Parser;

use super::file;
use super::run::RunArgs;
use crate::config::{Accepted, VmConfig};

/// Flags whose text can stand in a file as it is, and whether there can be several of each.
const FLAGS: [(&str, bool); 14] = [
    ("cpus", false),
    ("memory", false),
    ("balloon", false),
    ("rng", false),
    ("platform", false),
    ("serial", false),
    ("console", false),
    ("firmware", false),
    ("vsock", false),
    ("disk", true),
    ("net", true),
    ("fs", true),
    ("device", true),
    ("numa", true),
];

/// The flags of `busway run`, alone.
#[derive(Debug, Parser)]
struct Alone {
    #[command(flatten)]
    run: RunArgs,
}

/// Plays one story. Its first byte says what the rest is.
///
/// # Panics
/// What is read twice is not the same twice, or what flags say is something else in a file.
pub fn settings(story: &[u8]) {
    let Some((&kind, text)) = story.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(text);
    match kind % 3 {
        0 => whole_file(&text),
        1 => same_in_a_file(&text),
        _ => drop_in(&text),
    }
}

fn read(text: &str) -> Option<VmConfig> {
    let mut config = VmConfig::default();
    match file::apply(&mut config, Path::new("vm.toml"), text) {
        Ok(()) => Some(config),
        Err(wrong) => {
            let said = wrong.to_string();
            assert!(said.contains("vm.toml"), "no place is named: {said}");
            None
        }
    }
}

fn whole_file(text: &str) {
    let Some(config) = read(text) else {
        return;
    };
    assert_eq!(read(text), Some(config.clone()));
    judge(&config);
}

/// What is wrong with a configuration can be said, and what is right with it be shown.
fn judge(config: &VmConfig) {
    match config.validate() {
        Ok(()) => assert!(serde_json::to_string(config).is_ok()),
        Err(invalid) => assert!(!invalid.to_string().is_empty()),
    }
}

/// Each line is a flag: its first byte says which.
fn lines(text: &str) -> Vec<(&'static str, &str)> {
    let mut said: Vec<(&str, &str)> = Vec::new();
    for line in text.lines().take(16) {
        let mut characters = line.chars();
        let which = characters.next().map_or(0, u32::from) as usize;
        let (flag, several) = FLAGS.get(which % FLAGS.len()).copied().unwrap_or(FLAGS[0]);
        if several || said.iter().all(|(other, _)| *other != flag) {
            said.push((flag, characters.as_str()));
        }
    }
    said
}

fn parse(said: &[(&str, &str)]) -> Option<RunArgs> {
    let words = said.iter().map(|(flag, text)| format!("--{flag}={text}"));
    let words = std::iter::once("busway".to_owned()).chain(words);
    Alone::try_parse_from(words).ok().map(|alone| alone.run)
}

fn same_in_a_file(text: &str) {
    let said = lines(text);
    // What clap refuses has no text of ours.
    let Some(arguments) = parse(&said) else {
        return;
    };
    let mut by_flags = VmConfig::default();
    let by_flags = arguments.apply(&mut by_flags).map(|()| by_flags);
    let mut file = String::new();
    for (flag, several) in FLAGS {
        let texts = said.iter().filter(|(other, _)| *other == flag);
        let texts: Vec<_> = texts.map(|(_, text)| quoted(text)).collect();
        if texts.is_empty() || file.contains(&format!("\n{flag} = ")) {
            continue;
        }
        let written = match several {
            true => write!(file, "\n{flag} = [{}]\n", texts.join(", ")),
            false => write!(file, "\n{flag} = {}\n", texts.join("")),
        };
        assert!(written.is_ok());
    }
    match (by_flags, read(&file)) {
        (Ok(flags), in_file) => {
            assert_eq!(Some(&flags), in_file.as_ref(), "{file}");
            judge(&flags);
        }
        (Err(wrong), in_file) => {
            assert!(
                wrong.to_string().contains("--"),
                "no flag is named: {wrong}"
            );
            assert_eq!(in_file, None, "{file}");
        }
    }
}

/// A string of TOML's. TOML 1.0, "String"
fn quoted(text: &str) -> String {
    let escaped = text.chars().map(|character| match character {
        '"' | '\\' => format!("\\{character}"),
        _ if character.is_control() => format!("\\U{:08x}", u32::from(character)),
        _ => character.to_string(),
    });
    format!("\"{}\"", escaped.collect::<String>())
}

fn drop_in(text: &str) {
    let Some(arguments) = parse(&lines(text)) else {
        return;
    };
    let mut accepted = Accepted::default();
    let Ok(arguments) = arguments.without_foreign(&mut accepted) else {
        return;
    };
    let mut config = VmConfig::default();
    if arguments.apply(&mut config).is_ok() {
        judge(&config);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What is more often than chance has it next to something that is read.
    fn word() -> impl Strategy<Value = String> {
        prop_oneof![
            "[a-z_]{1,12}=[a-zA-Z0-9_/.:@-]{0,12}",
            "(size|boot|path|socket|tap|mac|cpus|max|id)=[0-9a-f:KMG\\[\\]@,-]{0,12}",
            "[ -~]{0,16}",
            any::<String>(),
        ]
    }

    proptest! {
        #[test]
        fn no_text_is_read_otherwise_in_a_file_than_after_a_flag(
            kind in 0_u8..3,
            lines in proptest::collection::vec((0_u8..14, proptest::collection::vec(word(), 0..4)), 0..6)
        ) {
            let mut story = vec![kind];
            for (flag, words) in lines {
                story.push(flag);
                story.extend(words.join(",").replace('\n', "").bytes());
                story.push(b'\n');
            }
            settings(&story);
        }

        #[test]
        fn any_file_is_read_or_refused(text in any::<String>()) {
            settings(&[b"\0", text.as_bytes()].concat());
        }
    }
}
