//! Commands that a person is told to type, mostly as root: names that came from the host are one word
//! each, whatever is in them.

use std::ffi::OsStr;

use super::root;

/// A command that a POSIX shell takes as the program, its options and these operands, whatever is in
/// the operands. None where a name cannot be typed.
///
/// Programs that read their options by getopt take what follows `--` for operands (POSIX.1-2017, XBD
/// 12.2, guideline 10), which is written where one begins with a dash.
pub(super) fn command<S: AsRef<OsStr>>(
    program_and_options: &str,
    operands: impl IntoIterator<Item = S>,
) -> Option<String> {
    let operands = operands.into_iter().map(|operand| word(operand.as_ref()));
    let operands = operands.collect::<Option<Vec<_>>>()?;
    let mut command = program_and_options.to_owned();
    if operands.iter().any(|operand| operand.starts_with('-')) {
        command += " --";
    }
    for operand in operands {
        command.push(' ');
        command += &operand;
    }
    Some(command)
}

/// A word that a POSIX shell reads as this text (POSIX.1-2017, XCU 2.2.2). None where it cannot be typed:
/// it has characters that steer a terminal or turn the direction of writing, or what was not UTF-8.
pub(super) fn word(text: &OsStr) -> Option<String> {
    let text = text.to_str()?;
    if root::one_line(text) != text || text.contains(char::REPLACEMENT_CHARACTER) {
        return None;
    }
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+:@%,".contains(c);
    Some(match !text.is_empty() && text.chars().all(is_plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    /// The words that a shell takes a command for.
    fn read(command: &str) -> Vec<String> {
        let script = format!("show() {{ printf '%s\\n' \"$@\"; }}; PATH=/nowhere; {command}");
        let output = Command::new("/bin/sh")
            .args(["-c", &script])
            .output()
            .unwrap();
        assert!(output.stderr.is_empty(), "{command}: {output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_name_is_one_word_and_no_option() {
        let command = |names: &[&str]| command("show -x", names);
        assert_eq!(command(&["/mnt/a", "b.c"]).unwrap(), "show -x /mnt/a b.c");
        assert_eq!(command(&["-rf"]).unwrap(), "show -x -- -rf");
        assert_eq!(command(&["my pool"]).unwrap(), "show -x 'my pool'");
        for name in ["a\nb", "a\tb", "\u{1b}[2J", "a\u{202e}b", "a\u{fffd}"] {
            assert_eq!(command(&[name]), None, "{name:?}");
        }
        let names = [
            "/mnt/`id`",
            "x; reboot",
            "$(reboot)",
            "it's",
            "",
            "~",
            "a&b|c>d",
            "*",
            "磁盘",
        ];
        let command = command(&names).unwrap();
        assert_eq!(read(&command), [&["-x"], &names[..]].concat());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_shell_reads_each_name_back(names in proptest::collection::vec("[^\\pC\u{fffd}\u{2028}\u{2029}]{1,12}", 1..4)) {
            let names: Vec<_> = names.into_iter().map(|name| format!("/{name}")).collect();
            let command = command("show", &names).unwrap();
            prop_assert_eq!(read(&command), names);
        }
    }
}
