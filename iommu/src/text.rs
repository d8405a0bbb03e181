//! Names and other text that somebody else chose, made safe to show on a terminal and in a log.

use std::path::Path;

/// The text with every character replaced that would steer a terminal or turn the direction of
/// writing; line ends and tabs stay.
#[must_use]
pub fn printable(text: &str) -> String {
    let steers = |c: char| {
        (c.is_control() && !matches!(c, '\n' | '\t'))
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    match text.contains(steers) {
        true => text.replace(steers, "\u{fffd}"),
        false => text.to_owned(),
    }
}

/// The same on one line.
#[must_use]
pub fn one_line(text: &str) -> String {
    printable(text).replace(['\n', '\t'], "\u{fffd}")
}

/// The name of a process as the kernel has it, on one line; `None` where there is no such process any
/// more. A process can give itself any 15 bytes. prctl(2), `PR_SET_NAME`
#[must_use]
pub fn process_name(proc: &Path, pid: u32) -> Option<String> {
    let name = std::fs::read(proc.join(pid.to_string()).join("comm")).ok()?;
    Some(one_line(String::from_utf8_lossy(&name).trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_cannot_steer_a_terminal_by_its_name() {
        let proc = tempfile::tempdir().unwrap();
        std::fs::create_dir(proc.path().join("7")).unwrap();
        for (name, shown) in [
            (&b"qemu\n"[..], "qemu"),
            (b"a\x1b[2Jb\n", "a\u{fffd}[2Jb"),
            (b"a\nroot: ok\n", "a\u{fffd}root: ok"),
            (b"a\tb\r\x07\n", "a\u{fffd}b\u{fffd}\u{fffd}"),
            (b"a\xe2\x80\xaeb\n", "a\u{fffd}b"),
            (b"\xff\n", "\u{fffd}"),
        ] {
            std::fs::write(proc.path().join("7/comm"), name).unwrap();
            let said = process_name(proc.path(), 7).unwrap();
            // What is at the ends is white space, and left off.
            assert_eq!(
                said.trim_end_matches('\u{fffd}'),
                shown.trim_end_matches('\u{fffd}')
            );
            assert!(!said.contains(char::is_control), "{said:?}");
        }
        assert_eq!(process_name(proc.path(), 8), None);
    }
}
