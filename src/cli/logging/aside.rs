//! Lines that a thread of their own writes, so that nobody who logs waits for whoever reads the log.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::outflow::{Backlog, Bound, Outflow, write_all};
use crate::sandbox::Kind;

/// Most lines that wait to be written; what comes then is lost, until half of them are.
const MOST: usize = 1024;

/// Where a line goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sink {
    /// To the log, which is standard error where it has no file.
    Log,
    /// To standard error.
    Stderr,
}

/// The lines that wait for the thread that writes them.
#[derive(Clone, Debug)]
pub(super) struct Aside(Arc<Outflow<Lines>>);

#[derive(Debug)]
struct Lines {
    lines: VecDeque<(Sink, String)>,
    /// What a warning begins with.
    warning: String,
}

impl Backlog for Lines {
    type Batch = (Sink, String);

    fn size(&self) -> usize {
        self.lines.len()
    }

    fn take(&mut self) -> Option<(Sink, String)> {
        self.lines.pop_front()
    }

    fn add_notice(&mut self, lost: u64) {
        let warning = &self.warning;
        let line = match lost {
            1 => format!("{warning}a line is missing here: nobody read the log\n"),
            lost => format!("{warning}{lost} lines are missing here: nobody read the log\n"),
        };
        self.lines.push_back((Sink::Log, line));
    }
}

impl Aside {
    /// Starts the thread, which keeps the signals that the calling thread keeps blocked.
    ///
    /// `log` is the log's file, and `stderr` standard error: not Rust's, whose lock would be held while
    /// nobody reads.
    ///
    /// # Errors
    ///
    /// There is no thread to be had.
    pub(super) fn start(log: Option<File>, stderr: File, warning: String) -> io::Result<Self> {
        let bound = Bound {
            most: MOST,
            again: MOST / 2,
            wait: Duration::ZERO,
        };
        let lines = Lines {
            lines: VecDeque::new(),
            warning,
        };
        let write = move |(sink, line): (Sink, String)| {
            let file = match (sink, &log) {
                (Sink::Log, Some(log)) => log,
                _ => &stderr,
            };
            // One write for a line, so that lines of several processes stay whole. What could not be
            // written is nobody's business any more.
            let _unread = write_all(file, line.as_bytes());
            Ok(())
        };
        Outflow::start(Kind::Log, "log", lines, bound, write).map(Self)
    }

    /// Has a line written, unless too many wait; at any rate where it is the `last`.
    pub(super) fn say(&self, sink: Sink, line: String, last: bool) {
        self.0
            .push(1, last, |lines| lines.lines.push_back((sink, line)));
    }

    /// Waits until all has been written, as long as somebody reads: a second for one line at most.
    pub(super) fn flush(&self) {
        self.0.drain(None);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, PipeReader, Read as _};
    use std::os::fd::{AsRawFd as _, OwnedFd};
    use std::os::unix::fs::OpenOptionsExt as _;
    use std::time::Instant;

    use super::*;
    use crate::outflow::PATIENCE;

    fn over_pipe() -> (Aside, PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        (over(OwnedFd::from(writer).into()), reader)
    }

    fn over(stderr: File) -> Aside {
        Aside::start(None, stderr, "warning: ".to_owned()).unwrap()
    }

    /// More than any pipe's room and `MOST` lines together.
    const FLOOD: usize = 5000;

    /// Says more than fits while nobody reads, and waits until the thread stands before a full pipe.
    fn flood(aside: &Aside) {
        for number in 0..FLOOD {
            aside.say(Sink::Log, format!("{number:>99}\n"), false);
        }
        aside.flush();
        for number in FLOOD..2 * FLOOD {
            aside.say(Sink::Log, format!("{number:>99}\n"), false);
        }
    }

    #[test]
    fn nobody_waits_for_a_full_pipe_and_what_is_lost_is_counted_in_its_place() {
        let (aside, reader) = over_pipe();
        every_line_is_there_or_counted(&aside, reader);
    }

    #[test]
    fn a_full_pipe_that_somebody_made_non_blocking_loses_no_more() {
        let (reader, writer) = io::pipe().unwrap();
        let stderr = File::options()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(format!("/proc/self/fd/{}", writer.as_raw_fd()))
            .unwrap();
        every_line_is_there_or_counted(&over(stderr), reader);
    }

    #[track_caller]
    fn every_line_is_there_or_counted(aside: &Aside, reader: PipeReader) {
        flood(aside);
        aside.say(Sink::Stderr, "the end\n".to_owned(), true);
        let mut expected = 0;
        let mut lost = 0;
        for line in BufReader::new(reader).lines() {
            let line = line.unwrap();
            if line == "the end" {
                break;
            }
            if let Some(reported) = line.strip_prefix("warning: ") {
                let count: usize = match reported.split(' ').next().unwrap() {
                    // A single one.
                    "a" => 1,
                    count => count.parse().unwrap(),
                };
                expected += count;
                lost += count;
                continue;
            }
            assert_eq!(line.trim().parse(), Ok(expected));
            expected += 1;
        }
        assert_eq!(expected, 2 * FLOOD, "all are there, or counted");
        assert!(lost > FLOOD, "{lost}");
    }

    #[test]
    fn the_end_waits_no_longer_than_somebody_reads() {
        let (aside, mut reader) = over_pipe();
        aside.say(Sink::Log, "one\n".to_owned(), false);
        aside.flush();
        let mut line = [0; 4];
        reader.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"one\n");
        flood(&aside);
        let start = Instant::now();
        aside.flush();
        assert!(start.elapsed() >= PATIENCE);
        assert!(start.elapsed() < 20 * PATIENCE);
    }
}
