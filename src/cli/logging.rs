//! Log lines for people: `busway: warning: …` on standard error, or in the file of `--log-file`.

use std::fs::File;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::sync::OnceLock;

use log::{Level, LevelFilter, Log, Metadata, Record};

use super::failure::no_color;

/// Starts logging: warnings and errors; with `-v` what is done, with `-vv` how, with `-vvv` all.
///
/// # Errors
///
/// Those of opening the file.
pub(super) fn start(verbose: u8, file: Option<&Path>) -> io::Result<()> {
    let level = match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    let file = file
        .map(|path| File::options().create(true).append(true).open(path))
        .transpose()?;
    let logger = Logger {
        coloured: file.is_none() && io::stderr().is_terminal() && !no_color(),
        named: level >= LevelFilter::Debug,
        file,
    };
    // There is one command in a process, so there is no logger yet.
    if log::set_logger(LOGGER.get_or_init(|| logger)).is_ok() {
        log::set_max_level(level);
    }
    Ok(())
}

static LOGGER: OnceLock<Logger> = OnceLock::new();

#[derive(Debug)]
struct Logger {
    file: Option<File>,
    coloured: bool,
    /// Each line says which module it comes from.
    named: bool,
}

impl Logger {
    fn line(&self, record: &Record<'_>) -> String {
        let (label, colour) = match record.level() {
            Level::Error => ("error: ", "1;31"),
            Level::Warn => ("warning: ", "1;33"),
            Level::Info => ("", ""),
            Level::Debug => ("debug: ", "2"),
            Level::Trace => ("trace: ", "2"),
        };
        let label = if self.coloured && !colour.is_empty() {
            format!("\x1b[{colour}m{label}\x1b[0m")
        } else {
            label.to_owned()
        };
        let module = match record.module_path() {
            Some(module) if self.named => format!("[{module}] "),
            _ => String::new(),
        };
        format!("busway: {label}{module}{}\n", record.args())
    }
}

impl Log for Logger {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    /// One write for a line, so that lines of several threads stay whole.
    fn log(&self, record: &Record<'_>) {
        let line = self.line(record);
        let _unread = match &self.file {
            Some(file) => io::Write::write_all(&mut &*file, line.as_bytes()),
            None => io::stderr().lock().write_all(line.as_bytes()),
        };
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_who_and_how_bad() {
        let mut logger = Logger {
            file: None,
            coloured: false,
            named: false,
        };
        let mut record = Record::builder();
        record
            .module_path(Some("busway::machine"))
            .level(Level::Warn);
        let line = logger.line(&record.args(format_args!("one disk")).build());
        assert_eq!(line, "busway: warning: one disk\n");
        logger.named = true;
        logger.coloured = true;
        let line = logger.line(&record.level(Level::Info).args(format_args!("x")).build());
        assert_eq!(line, "busway: [busway::machine] x\n");
    }
}
