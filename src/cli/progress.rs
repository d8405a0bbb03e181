//! A bar on the terminal while memory is being pinned, for those who would wonder.

use std::io::{self, IsTerminal as _};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::report::Report;
use crate::sandbox::{self, Kind};

/// How long a start takes before there is a bar.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often the bar is drawn.
const STEP: Duration = Duration::from_millis(100);

/// Shows the bar for this report's run, where somebody would see it: from a second after the first
/// byte until the last.
pub(super) fn show(report: &Report) {
    if io::stderr().is_terminal() {
        let pinning = Pinning::new(draw);
        report.on_pinning(Box::new(move |done, total| pinning.at(done, total)));
    }
}

/// Draws the bytes done of the bytes in all, as long as there are more.
type Drawer = fn(&AtomicU64, u64, &mut dyn FnMut() -> bool);

/// Pinning that is under way: hears of each step on whichever thread makes it, and draws on its own.
struct Pinning {
    done: Arc<AtomicU64>,
    /// There from the first byte to the last.
    drawing: Mutex<Option<Drawing>>,
    draw: Drawer,
}

/// The thread that draws, until its channel closes.
struct Drawing {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl Drawing {
    /// When this returns the terminal's line is free.
    fn stop(self) {
        drop(self.stop);
        let _panicked = self.thread.join();
    }
}

impl Pinning {
    fn new(draw: Drawer) -> Self {
        Self {
            done: Arc::default(),
            drawing: Mutex::default(),
            draw,
        }
    }

    fn at(&self, done: u64, total: u64) {
        // Threads report out of turn; the bar never goes back.
        self.done.fetch_max(done, Relaxed);
        let mut drawing = self.drawing.lock().unwrap_or_else(PoisonError::into_inner);
        if done >= total {
            if let Some(drawing) = drawing.take() {
                drawing.stop();
            }
            self.done.store(0, Relaxed);
        } else if drawing.is_none() {
            let (stop, stopped) = mpsc::channel::<()>();
            let counter = Arc::clone(&self.done);
            let draw = self.draw;
            let started = thread::Builder::new()
                .name("progress".to_owned())
                .spawn(move || {
                    sandbox::enter(Kind::Progress);
                    let more = |time| stopped.recv_timeout(time) == Err(RecvTimeoutError::Timeout);
                    if more(PATIENCE) {
                        draw(&counter, total, &mut || more(STEP));
                    }
                });
            // Without a thread for it there is no bar, and the VM runs all the same.
            *drawing = started.ok().map(|thread| Drawing { stop, thread });
        }
    }
}

const TEMPLATE: &str = "busway: pinning guest memory [{bar:20}] {binary_bytes} of \
                        {binary_total_bytes}, {eta} to go";

/// Draws until there is no more, and leaves the line as it was.
fn draw(done: &AtomicU64, total: u64, more: &mut dyn FnMut() -> bool) {
    let Ok(style) = ProgressStyle::with_template(TEMPLATE) else {
        return;
    };
    let bar = ProgressBar::new(total).with_style(style.progress_chars("=> "));
    while more() {
        bar.set_position(done.load(Relaxed));
        bar.tick();
    }
    bar.finish_and_clear();
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::devices::terminal::Pty;
    use crate::sandbox::{Apart, Bounds, Mode};

    #[test]
    fn the_bar_can_be_drawn() {
        assert!(ProgressStyle::with_template(TEMPLATE).is_ok());
    }

    /// The process that draws has the terminal as its standard error, and all walls.
    #[test]
    fn the_bar_is_seen_on_a_terminal_and_asks_for_nothing_that_its_filter_lacks() {
        const CHILD: &str = "BUSWAY_TEST_PROGRESS";
        if std::env::var_os(CHILD).is_some() {
            sandbox::confine(Mode::True, Bounds::Threads, &Apart::default()).unwrap();
            let pinning = Pinning::new(draw);
            pinning.at(1 << 20, 1 << 30);
            // Until the bar is there and has been drawn a few times.
            thread::sleep(PATIENCE + 5 * STEP);
            pinning.at(1 << 30, 1 << 30);
            std::process::exit(0);
        }
        let terminal = Pty::open().unwrap();
        let name = "the_bar_is_seen_on_a_terminal_and_asks_for_nothing_that_its_filter_lacks";
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("cli::progress::tests::{name}")])
            .arg("--nocapture")
            .env(CHILD, "1")
            .env("TERM", "xterm")
            .stdout(Stdio::null())
            .stderr(terminal.slave.try_clone().unwrap())
            .status()
            .unwrap();
        let mut text = [0; 16 << 10];
        let length = (&terminal.master).read(&mut text).unwrap();
        let seen = String::from_utf8_lossy(&text[..length]).into_owned();
        assert_eq!(status.code(), Some(0), "{seen}");
        assert!(seen.contains("pinning guest memory [>"), "{seen}");
    }

    #[test]
    fn quick_pinning_draws_nothing() {
        let pinning = Pinning::new(|_, _, _| panic!("drawn"));
        pinning.at(0, 100);
        pinning.at(50, 100);
        pinning.at(100, 100);
        assert!(pinning.drawing.lock().unwrap().is_none());
    }

    #[test]
    fn one_thread_draws_until_the_last_byte() {
        static DRAWN: AtomicU64 = AtomicU64::new(0);
        static LAST: AtomicU64 = AtomicU64::new(0);
        let pinning = Pinning::new(|done, total, more| {
            DRAWN.fetch_add(1, Relaxed);
            assert_eq!(total, 100);
            LAST.store(done.load(Relaxed), Relaxed);
            while more() {}
            DRAWN.fetch_add(10, Relaxed);
        });
        pinning.at(0, 100);
        pinning.at(60, 100);
        pinning.at(40, 100);
        while DRAWN.load(Relaxed) == 0 {
            thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(LAST.load(Relaxed), 60);
        pinning.at(100, 100);
        assert_eq!(DRAWN.load(Relaxed), 11);
    }
}
