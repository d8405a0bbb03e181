//! Colour: on a terminal, unless somebody said otherwise.

use super::busway;

/// Whether what is printed into a pipe has colours.
fn is_coloured(words: &[&str], no_color: Option<&str>) -> bool {
    let mut command = busway().args(words).env("TERM", "xterm-256color");
    if let Some(value) = no_color {
        command = command.env("NO_COLOR", value);
    }
    let output = command.output().expect("busway runs");
    let text = [output.stdout, output.stderr].concat();
    assert!(!text.is_empty());
    text.contains(&b'\x1b')
}

#[test]
fn a_pipe_has_colours_only_where_they_are_asked_for() {
    for words in [&["doctor"][..], &["device", "list", "77:00.0"]] {
        let with = |choice| [words, &["--color", choice]].concat();
        assert!(!is_coloured(words, None));
        assert!(!is_coloured(&with("auto"), None));
        assert!(!is_coloured(&with("never"), None));
        assert!(is_coloured(&with("always"), None));
        // What is said on the command line is said later, and more loudly, than the environment.
        assert!(is_coloured(&with("always"), Some("1")));
        assert!(!is_coloured(&with("auto"), Some("1")));
    }
}

#[test]
fn json_is_never_coloured() {
    assert!(!is_coloured(
        &["doctor", "--json", "--color", "always"],
        None
    ));
}
