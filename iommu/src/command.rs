//! Commands for a person to paste into a shell, as root: the one place that writes them.
//!
//! A command is made of typed pieces, and never of a text with names put into it. What comes from the
//! host (paths, names of volumes, pools and interfaces) is quoted by the rules of the POSIX shell
//! (IEEE 1003.1-2024, XCU 2.2), so that the shell gives the exact bytes back and none of them begins
//! another command; what could be taken for an option stands behind `--` where the program has it.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// One or more programs to be run one after the other, each only where the one before succeeded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    steps: Vec<Program>,
}

/// One program with its arguments, and where its output goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The program and its arguments.
    pub words: Vec<Word>,
    /// The file that the output goes to.
    pub output: Option<Output>,
}

/// One argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// These bytes.
    Exact(OsString),
    /// The number of the shell's own process.
    ShellProcess,
    /// What another program prints.
    Printed(Command),
}

/// A file that a program's output goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The file.
    pub path: OsString,
    /// Whether what the file has stays in front of the output.
    pub append: bool,
}

impl Command {
    /// A program with arguments that are always the same, one a word: `["ip", "link"]`.
    #[must_use]
    pub fn new<const N: usize>(words: [&'static str; N]) -> Self {
        let words = words.map(|word| Word::Exact(word.into())).into();
        Self {
            steps: vec![Program {
                words,
                output: None,
            }],
        }
    }

    /// Writes a line into a file: `echo LINE > PATH`.
    ///
    /// A line that begins with a dash or has a backslash is printed by `printf`: what `echo` makes of
    /// those differs from shell to shell.
    #[must_use]
    pub fn write(line: impl AsRef<OsStr>, path: impl AsRef<Path>) -> Self {
        Self::print(line.as_ref()).into(path.as_ref(), false)
    }

    /// Puts a line at the end of a file: `echo LINE >> PATH`.
    #[must_use]
    pub fn append(line: impl AsRef<OsStr>, path: impl AsRef<Path>) -> Self {
        Self::print(line.as_ref()).into(path.as_ref(), true)
    }

    /// Writes several lines into a file.
    #[must_use]
    pub fn write_lines<const N: usize>(lines: [&'static str; N], path: impl AsRef<Path>) -> Self {
        let mut command = Self::new(["printf", r"%s\n"]);
        for line in lines {
            command = command.operand(line);
        }
        command.into(path.as_ref(), false)
    }

    fn print(line: &OsStr) -> Self {
        let bytes = line.as_bytes();
        if bytes.starts_with(b"-") || bytes.contains(&b'\\') {
            Self::new(["printf", r"%s\n"]).operand(line)
        } else if bytes.is_empty() {
            Self::new(["echo"])
        } else {
            Self::new(["echo"]).operand(line)
        }
    }

    /// The same with what it prints written to a file.
    #[must_use]
    pub fn output_to(self, path: impl AsRef<Path>) -> Self {
        self.into(path.as_ref(), false)
    }

    fn into(self, path: &Path, append: bool) -> Self {
        let path = path.as_os_str().to_owned();
        self.with(|step| step.output = Some(Output { path, append }))
    }

    fn with(mut self, change: impl FnOnce(&mut Program)) -> Self {
        if let Some(step) = self.steps.last_mut() {
            change(step);
        }
        self
    }

    fn word(self, word: Word) -> Self {
        self.with(|step| step.words.push(word))
    }

    /// Another argument, whose bytes come from wherever.
    ///
    /// It may begin with a dash only behind [`end_of_options`](Self::end_of_options), or where the
    /// program takes whatever stands there for a name.
    #[must_use]
    pub fn operand(self, operand: impl AsRef<OsStr>) -> Self {
        let operand = operand.as_ref().to_owned();
        self.word(Word::Exact(operand))
    }

    /// Several other arguments.
    #[must_use]
    pub fn operands<T: AsRef<OsStr>>(self, operands: impl IntoIterator<Item = T>) -> Self {
        operands.into_iter().fold(self, Self::operand)
    }

    /// An argument that is a name's setting: `--args=VALUE`, `nested=1`. `name` has the sign of equality.
    #[must_use]
    pub fn setting(self, name: &'static str, value: impl AsRef<OsStr>) -> Self {
        let mut word = OsString::from(name);
        word.push(value);
        self.word(Word::Exact(word))
    }

    /// `--`: what follows are operands, even where they begin with a dash (XBD 12.2, guideline 10).
    #[must_use]
    pub fn end_of_options(self) -> Self {
        self.operand("--")
    }

    /// The process number of the shell that this is pasted into, as an argument.
    #[must_use]
    pub fn shell_process(self) -> Self {
        self.word(Word::ShellProcess)
    }

    /// What another command prints, as one argument.
    #[must_use]
    pub fn printed(self, by: Self) -> Self {
        self.word(Word::Printed(by))
    }

    /// Another command, run where this one succeeded.
    #[must_use]
    pub fn then(mut self, next: Self) -> Self {
        self.steps.extend(next.steps);
        self
    }

    /// What is run, one after the other; never empty.
    #[must_use]
    pub fn steps(&self) -> &[Program] {
        &self.steps
    }

    /// Whether it can be written on one line for a POSIX shell. No shell's word holds a zero byte, and none
    /// that a line can hold ends with a line end.
    #[must_use]
    pub fn can_be_written(&self) -> bool {
        self.steps.iter().all(|step| {
            let words = step.words.iter().all(|word| match word {
                Word::Exact(bytes) => can_be_quoted(bytes),
                Word::ShellProcess => true,
                Word::Printed(command) => command.can_be_written(),
            });
            let mut output = step.output.iter();
            words && output.all(|output| can_be_quoted(&output.path))
        })
    }
}

fn can_be_quoted(word: &OsStr) -> bool {
    let bytes = word.as_bytes();
    !bytes.contains(&0) && !bytes.ends_with(b"\n")
}

/// The command as a line for a POSIX shell.
impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, step) in self.steps.iter().enumerate() {
            if index > 0 {
                f.write_str(" && ")?;
            }
            for (index, word) in step.words.iter().enumerate() {
                if index > 0 {
                    f.write_str(" ")?;
                }
                match word {
                    Word::Exact(bytes) => write!(f, "{}", Quoted(bytes))?,
                    Word::ShellProcess => f.write_str("$$")?,
                    Word::Printed(command) => write!(f, "\"$({command})\"")?,
                }
            }
            if let Some(Output { path, append }) = &step.output {
                let sign = if *append { ">>" } else { ">" };
                write!(f, " {sign} {}", Quoted(path))?;
            }
        }
        Ok(())
    }
}

/// Bytes as one word of a POSIX shell.
struct Quoted<'a>(&'a OsStr);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0.as_bytes();
        match self.0.to_str() {
            Some(text) if !text.is_empty() && bytes.iter().all(|byte| is_plain(*byte)) => {
                f.write_str(text)
            }
            // In single quotes every character stands for itself, and none can be a single quote.
            Some(text) if !text.contains(is_unseen) => {
                write!(f, "'{}'", text.replace('\'', r"'\''"))
            }
            _ => {
                f.write_str("\"$(printf '")?;
                bytes.iter().enumerate().try_for_each(|(index, byte)| {
                    match byte {
                        b'%' => f.write_str("%%"),
                        // The format is no option, either.
                        b'-' if index == 0 => f.write_str(r"\055"),
                        byte if is_plain(*byte) || *byte == b' ' => {
                            write!(f, "{}", char::from(*byte))
                        }
                        byte => write!(f, r"\{byte:03o}"),
                    }
                })?;
                f.write_str("')\"")
            }
        }
    }
}

/// Characters that mean nothing to a shell wherever they stand in a word that is an argument.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_./:=@%+,-".contains(&byte)
}

/// Characters that a terminal does not show, or that change how it shows others.
fn is_unseen(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{feff}'
            | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e0fff}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStringExt as _;

    #[test]
    fn plain_words_stay_and_others_are_quoted() {
        let command = Command::new(["umount"]).operands([
            "/mnt/x",
            "/mnt/x --lazy /",
            "/mnt/`id`",
            "it's",
            "",
            "$(reboot)",
            "/media/磁盘",
            "a\nreboot",
            "a\u{202e}b",
        ]);
        assert_eq!(
            command.to_string(),
            r#"umount /mnt/x '/mnt/x --lazy /' '/mnt/`id`' 'it'\''s' '' '$(reboot)' /media/磁盘 "$(printf 'a\012reboot')" "$(printf 'a\342\200\256b')""#
                .replace("/media/磁盘", "'/media/磁盘'")
        );
        let write = Command::write("1", "/sys/a b").then(Command::append("-n", "/x"));
        assert_eq!(
            write.to_string(),
            r"echo 1 > '/sys/a b' && printf '%s\n' -n >> /x"
        );
        let shell = Command::new(["prlimit", "--pid"])
            .shell_process()
            .printed(Command::new(["uname", "-r"]));
        assert_eq!(shell.to_string(), "prlimit --pid $$ \"$(uname -r)\"");
        assert!(!Command::new(["x"]).operand("a\n").can_be_written());
        assert!(!Command::write("1", "a\0").can_be_written());
        assert!(command.can_be_written());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_shell_gives_every_byte_back(words in prop::collection::vec(prop::collection::vec(1_u8.., 0..24), 1..6)) {
            let words: Vec<_> = words.into_iter().map(OsString::from_vec).collect();
            let command = Command::new(["printf", r"%s\0", "--"]).operands(&words);
            prop_assume!(command.can_be_written());
            let line = command.to_string();
            prop_assert!(!line.contains(is_unseen));
            let output = std::process::Command::new("sh").arg("-c").arg(&line).output().unwrap();
            prop_assert!(output.status.success() && output.stderr.is_empty());
            let mut meant = b"--\0".to_vec();
            for word in &words {
                meant.extend(word.as_bytes());
                meant.push(0);
            }
            prop_assert_eq!(output.stdout, meant, "{}", line);
        }
    }
}
