//! Lines that a thread of their own writes, so that nobody who has something to say waits for whoever
//! reads it: a guest must not stand still because a pipe is full.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::devices::console::write_all;

/// Most lines that wait to be written; what comes then is lost, until half of them are.
const MOST: usize = 1024;
/// How long [`Aside::flush`] waits for the reader to take one more line.
const PATIENCE: Duration = Duration::from_secs(1);
/// It calls nothing deep.
const STACK_SIZE: usize = 64 << 10;

/// Where a line goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sink {
    /// To the log, which is standard error where it has no file.
    Log,
    /// To standard error.
    Stderr,
}

/// The lines that wait for the thread that writes them.
#[derive(Debug)]
pub(super) struct Aside {
    state: Mutex<State>,
    /// There is something to write.
    more: Condvar,
    /// Something has been written.
    done: Condvar,
    /// What a warning begins with.
    warning: String,
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<(Sink, String)>,
    /// The thread has a line in hand.
    writing: bool,
    /// Lines ever written.
    written: u64,
    /// Lines lost since the last one that was taken.
    lost: u64,
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
    pub(super) fn start(log: Option<File>, stderr: File, warning: String) -> io::Result<Arc<Self>> {
        let aside = Arc::new(Self {
            state: Mutex::default(),
            more: Condvar::new(),
            done: Condvar::new(),
            warning,
        });
        let shared = Arc::clone(&aside);
        thread::Builder::new()
            .name("log".to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                loop {
                    let (sink, line) = shared.next();
                    let file = match (sink, &log) {
                        (Sink::Log, Some(log)) => log,
                        _ => &stderr,
                    };
                    // One write for a line, so that lines of several processes stay whole.
                    let _unread = write_all(file, line.as_bytes());
                    shared.written();
                }
            })?;
        Ok(aside)
    }

    /// Has a line written, unless too many wait; at any rate where it is the `last`.
    pub(super) fn say(&self, sink: Sink, line: String, last: bool) {
        let mut state = self.state();
        let room = if state.lost > 0 { MOST / 2 } else { MOST };
        if state.lines.len() >= room && !last {
            state.lost += 1;
            return;
        }
        // In the place of those that are missing.
        let missing = self.missing(&mut state);
        state.lines.extend(missing);
        state.lines.push_back((sink, line));
        self.more.notify_one();
    }

    /// Waits until all has been written, as long as somebody reads: a second for one line at most.
    pub(super) fn flush(&self) {
        let mut state = self.state();
        while state.writing || state.lost > 0 || !state.lines.is_empty() {
            let before = state.written;
            let waited = self.done.wait_timeout(state, PATIENCE);
            let (now, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() && now.written == before {
                return;
            }
            state = now;
        }
    }

    /// Waits for something to write.
    fn next(&self) -> (Sink, String) {
        let mut state = self.state();
        loop {
            let line = state.lines.pop_front();
            if let Some(line) = line.or_else(|| self.missing(&mut state)) {
                state.writing = true;
                return line;
            }
            let waited = self.more.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn written(&self) {
        let mut state = self.state();
        state.writing = false;
        state.written += 1;
        self.done.notify_all();
    }

    /// The line in the place of those that were lost, where some were.
    fn missing(&self, state: &mut State) -> Option<(Sink, String)> {
        let line = match std::mem::take(&mut state.lost) {
            0 => return None,
            1 => format!(
                "{}a line is missing here: nobody read the log\n",
                self.warning
            ),
            lost => format!(
                "{}{lost} lines are missing here: nobody read the log\n",
                self.warning
            ),
        };
        Some((Sink::Log, line))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, PipeReader, Read as _};
    use std::os::fd::{AsRawFd as _, OwnedFd};
    use std::os::unix::fs::OpenOptionsExt as _;
    use std::time::Instant;

    use super::*;

    fn over_pipe() -> (Arc<Aside>, PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        (over(OwnedFd::from(writer).into()), reader)
    }

    fn over(stderr: File) -> Arc<Aside> {
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
            if let Some(told) = line.strip_prefix("warning: ") {
                let count: usize = told.split(' ').next().unwrap().parse().unwrap();
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
