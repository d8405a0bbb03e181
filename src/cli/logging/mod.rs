//! Log lines for people: `busway: warning: …` on standard error, or in the file of `--log-file`.
//!
//! While a guest runs, a thread of their own writes them.

mod aside;

use std::fs::File;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::OnceLock;

use log::{Level, LevelFilter, Log, Metadata, Record};

use aside::{Aside, Sink};
use busway_host::files::{Existing, OutputError, open_output};
use busway_iommu::printable;

use super::style::no_color;

/// Starts logging: warnings and errors; with `-v` what is done, with `-vv` how, with `-vvv` all.
///
/// # Errors
///
/// As [`open_output`]: the log is appended to a file of the user's own.
pub(super) fn start(verbose: u8, file: Option<&Path>) -> Result<(), OutputError> {
    let level = match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    let file = file
        .map(|path| open_output(path, Existing::Append))
        .transpose()?
        .map(|output| output.file);
    let logger = Logger {
        coloured: file.is_none() && io::stderr().is_terminal() && !no_color(),
        named: level >= LevelFilter::Debug,
        file,
        aside: OnceLock::new(),
    };
    // There is one command in a process, so there is no logger yet.
    if log::set_logger(LOGGER.get_or_init(|| logger)).is_ok() {
        log::set_max_level(level);
    }
    Ok(())
}

/// From now on nobody who logs waits for whoever reads it. Call it when the signals that the machine
/// reads are blocked, and where the log has been started.
pub(super) fn step_aside() {
    let Some(logger) = LOGGER.get() else {
        return;
    };
    let aside = || {
        let file = logger.file.as_ref().map(File::try_clone).transpose()?;
        let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        Aside::start(file, stderr, logger.prefix(Level::Warn))
    };
    match aside() {
        // There is one command in a process.
        Ok(aside) => drop(logger.aside.set(aside)),
        Err(error) => log::warn!("a log that nobody reads will hold the guest: {error}"),
    }
}

/// Writes to standard error what is no log line, after those that came before it.
pub(super) fn say(text: &str) {
    write(text, false);
}

/// Writes to standard error what this process ends with, after all log lines. Waits for whoever reads
/// it, but not for ever where a guest has run.
pub(super) fn last_words(text: &str) {
    write(text, true);
    log::logger().flush();
}

fn write(text: &str, last: bool) {
    match LOGGER.get().and_then(|logger| logger.aside.get()) {
        Some(aside) => aside.say(Sink::Stderr, text.to_owned(), last),
        None => {
            // Where nobody reads it, the status still says it.
            let _unread = io::stderr().lock().write_all(text.as_bytes());
        }
    }
}

static LOGGER: OnceLock<Logger> = OnceLock::new();

#[derive(Debug)]
struct Logger {
    file: Option<File>,
    coloured: bool,
    /// Each line says which module it comes from.
    named: bool,
    /// Who writes the lines, where not the one who has them.
    aside: OnceLock<Aside>,
}

impl Logger {
    /// What a line of this level begins with.
    fn prefix(&self, level: Level) -> String {
        let (label, colour) = match level {
            Level::Error => ("error: ", "1;31"),
            Level::Warn => ("warning: ", "1;33"),
            Level::Info => ("", ""),
            Level::Debug => ("debug: ", "2"),
            Level::Trace => ("trace: ", "2"),
        };
        if self.coloured && !colour.is_empty() {
            format!("busway: \x1b[{colour}m{label}\x1b[0m")
        } else {
            format!("busway: {label}")
        }
    }

    fn line(&self, record: &Record<'_>) -> String {
        let prefix = self.prefix(record.level());
        let module = match record.module_path() {
            Some(module) if self.named => format!("[{module}] "),
            _ => String::new(),
        };
        // Names of files and the like stand in it as somebody chose them.
        let said = printable(&record.args().to_string());
        format!("{prefix}{module}{said}\n")
    }
}

impl Log for Logger {
    /// What other crates say is for finding faults: what of it a person has to know, Busway says itself,
    /// and what a guest can have them say, it can repeat for ever (`virtio_queue` of a ring outside of
    /// RAM).
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.named || metadata.target().starts_with("busway")
    }

    /// One write for a line, so that lines of several threads stay whole.
    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = self.line(record);
        let _unread = match (self.aside.get(), &self.file) {
            (Some(aside), _) => {
                aside.say(Sink::Log, line, false);
                Ok(())
            }
            (None, Some(file)) => io::Write::write_all(&mut &*file, line.as_bytes()),
            (None, None) => io::stderr().lock().write_all(line.as_bytes()),
        };
    }

    /// Waits until the lines are written, while somebody reads them.
    fn flush(&self) {
        if let Some(aside) = self.aside.get() {
            aside.flush();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_other_crates_say_is_for_finding_faults() {
        let mut logger = Logger {
            file: None,
            coloured: false,
            named: false,
            aside: OnceLock::new(),
        };
        let of = |target| {
            Metadata::builder()
                .level(Level::Error)
                .target(target)
                .build()
        };
        assert!(logger.enabled(&of("busway::machine")) && logger.enabled(&of("busway_vfio::rom")));
        // It says so each time that a guest sets up a queue that is not in RAM.
        assert!(!logger.enabled(&of("virtio_queue::queue")));
        logger.named = true;
        assert!(logger.enabled(&of("virtio_queue::queue")));
    }

    #[test]
    fn a_line_says_who_and_how_bad() {
        let mut logger = Logger {
            file: None,
            coloured: false,
            named: false,
            aside: OnceLock::new(),
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
        let line = logger.line(&record.args(format_args!("disk \u{1b}[2J\r.raw")).build());
        assert_eq!(
            line,
            "busway: [busway::machine] disk \u{fffd}[2J\u{fffd}.raw\n"
        );
    }
}
