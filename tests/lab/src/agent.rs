//! The line to the emulated host's agent, on its second serial port. It carries only orders and
//! their ends; scripts and outputs go through the shared folder.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;

use crate::digest::last_lines;
use crate::inspector::Inspector;
use crate::qmp::Qmp;
use crate::suspect::Suspect;

/// What the agent has said so far.
#[derive(Debug, Default)]
struct State {
    ready: bool,
    /// What was plugged is in its place.
    settled: bool,
    gone: bool,
    /// It did not answer when it was last asked for the host's state.
    unresponsive: bool,
    jobs: BTreeMap<u64, Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    pid: Option<i32>,
    status: Option<i32>,
    /// Closed at the job's end, for who waits on descriptors.
    bell: Option<UnixStream>,
}

/// The line, as every job of one host shares it.
#[derive(Debug)]
pub(crate) struct Agent {
    line: Mutex<UnixStream>,
    state: Mutex<State>,
    changed: Condvar,
    /// What the host's console and QEMU itself have written, to explain a death.
    logs: [PathBuf; 2],
    /// What finds out why a wait ran out of time.
    inspector: OnceLock<Inspector>,
}

/// What a wait came to when it was not what it waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    Gone,
    TimedOut,
}

fn unpoisoned<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is a single assignment: what a panic left is whole.
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Agent {
    /// Takes the line, of which the other end is the emulated serial port.
    pub(crate) fn new(line: UnixStream, logs: [PathBuf; 2]) -> Result<Arc<Self>> {
        let reader = BufReader::new(line.try_clone()?);
        let agent = Arc::new(Self {
            line: Mutex::new(line),
            state: Mutex::default(),
            changed: Condvar::new(),
            logs,
            inspector: OnceLock::new(),
        });
        let listener = Arc::clone(&agent);
        thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                listener.hear(&line);
            }
            listener.change(|state| {
                state.gone = true;
                state.jobs.values_mut().for_each(|job| job.bell = None);
            });
        });
        Ok(agent)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut unpoisoned(&self.state));
        self.changed.notify_all();
    }

    fn hear(&self, line: &str) {
        let mut words = line.split_ascii_whitespace();
        let verb = words.next();
        let id = words.next().and_then(|word| word.parse::<u64>().ok());
        let number = words.next().and_then(|word| word.parse::<i32>().ok());
        match (verb, id, number) {
            (Some("READY"), ..) => self.change(|state| {
                state.ready = true;
                state.unresponsive = false;
            }),
            // A host that was started from a saved state was ready in its earlier life.
            (Some("SETTLED"), ..) => self.change(|state| {
                state.ready = true;
                state.settled = true;
            }),
            (Some("STARTED"), Some(id), pid) => {
                self.change(|state| state.jobs.entry(id).or_default().pid = pid);
            }
            (Some("DONE"), Some(id), status) => self.change(|state| {
                let job = state.jobs.entry(id).or_default();
                job.status = status;
                job.bell = None;
            }),
            _ => {}
        }
    }

    fn wait<T>(
        &self,
        deadline: Instant,
        mut found: impl FnMut(&State) -> Option<T>,
    ) -> Result<T, Failure> {
        let mut state = unpoisoned(&self.state);
        loop {
            if let Some(value) = found(&state) {
                return Ok(value);
            }
            if state.gone {
                return Err(Failure::Gone);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure::TimedOut);
            }
            state = match self.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Sets what finds out why a wait ran out of time.
    pub(crate) fn set_inspector(&self, inspector: Inspector) {
        // A host has one, which it is given once.
        let _ = self.inspector.set(inspector);
    }

    fn explain(&self, failure: Failure, doing: &str, limit: Duration) -> anyhow::Error {
        match failure {
            Failure::Gone => self.death(doing),
            Failure::TimedOut => self.timed_out(doing, limit, "", None),
        }
    }

    /// The error of a wait that ran out of time: what was waited for and how long, what the waiter knows of it, and
    /// what host and emulator were doing. Who holds QEMU's monitor passes it.
    pub(crate) fn timed_out(
        &self,
        doing: &str,
        limit: Duration,
        known: &str,
        monitor: Option<&mut Qmp>,
    ) -> anyhow::Error {
        // The report can have the host write on its console.
        let console = tail(&self.logs[0]);
        let report = self.inspector.get();
        let report = report.map_or_else(String::new, |each| each.report(self, monitor));
        let text = format!(
            "{doing} took longer than {limit:?}\n{known}\
             -- the emulated host's console ended\n{console}\n{report}"
        );
        Suspect(text).into()
    }

    /// Why the emulated host is gone, as far as its console and QEMU tell.
    pub(crate) fn death(&self, doing: &str) -> anyhow::Error {
        let [console, qemu] = &self.logs;
        let text = format!(
            "the emulated host died while {doing}; its console ends:\n{}\nQEMU said:\n{}",
            tail(console),
            tail(qemu)
        );
        Suspect(text).into()
    }

    pub(crate) fn is_gone(&self) -> bool {
        unpoisoned(&self.state).gone
    }

    pub(crate) fn wait_ready(&self, limit: Duration) -> Result<()> {
        self.wait(Instant::now() + limit, |state| state.ready.then_some(()))
            .map_err(|failure| self.explain(failure, "booting", limit))
    }

    /// Has the host take notice of these PCI functions, mount the outer machine's folders and set its clock, and waits
    /// until udev is done with all of it.
    pub(crate) fn settle(&self, functions: &[String], limit: Duration) -> Result<()> {
        let doing = "waiting for what was plugged";
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let order = format!("SETTLE {} {}", now.as_secs_f64(), functions.join(" "));
        self.order(&order).map_err(|_| self.death(doing))?;
        self.wait(Instant::now() + limit, |state| state.settled.then_some(()))
            .map_err(|failure| self.explain(failure, doing, limit))
    }

    /// Has the host restart, and waits until the agent answers anew.
    pub(crate) fn reboot(&self, limit: Duration) -> Result<()> {
        self.change(|state| state.ready = false);
        self.order("REBOOT").map_err(|_| self.death("restarting"))?;
        self.wait_ready(limit)
    }

    /// Has `crash` restart the host without a word to anybody, and waits until the agent answers anew. What runs there is
    /// killed by it.
    pub(crate) fn crash(&self, limit: Duration, crash: impl FnOnce() -> Result<()>) -> Result<()> {
        self.change(|state| state.ready = false);
        crash()?;
        self.change(|state| {
            for job in state.jobs.values_mut().filter(|job| job.status.is_none()) {
                job.status = Some(128 + libc::SIGKILL);
                job.bell = None;
            }
        });
        self.wait_ready(limit)
    }

    /// Waits until the host is gone; false if it still is there at the end of the limit.
    pub(crate) fn wait_gone(&self, limit: Duration) -> bool {
        let outcome = self.wait(Instant::now() + limit, |_| None::<()>);
        matches!(outcome, Err(Failure::Gone))
    }

    pub(crate) fn order(&self, order: &str) -> std::io::Result<()> {
        writeln!(unpoisoned(&self.line), "{order}")
    }

    /// Has the job's script run; returns the process that leads its session, and what is closed
    /// when the job ends.
    pub(crate) fn start(&self, id: u64, limit: Duration) -> Result<(i32, UnixStream)> {
        let (bell, end) = UnixStream::pair()?;
        self.change(|state| state.jobs.entry(id).or_default().bell = Some(bell));
        self.order(&format!("RUN {id}"))
            .map_err(|_| self.death("starting a job"))?;
        let pid = self
            .wait(Instant::now() + limit, |state| state.jobs[&id].pid)
            .map_err(|failure| self.explain(failure, "starting a job", limit))?;
        Ok((pid, end))
    }

    /// Waits for a job's end.
    pub(crate) fn wait_done(&self, id: u64, limit: Duration) -> Result<i32, Failure> {
        self.wait(Instant::now() + limit, |state| state.jobs[&id].status)
    }

    /// Has a job run, for who explains a wait that ran out of time; whether it ended before the deadline. If not, it is
    /// killed, and the agent counts as unresponsive.
    pub(crate) fn run_within(&self, id: u64, deadline: Instant) -> bool {
        let mut takes_orders = false;
        self.change(|state| {
            state.jobs.entry(id).or_default();
            takes_orders = state.ready && state.settled;
        });
        let ended = takes_orders
            && self.order(&format!("RUN {id}")).is_ok()
            && self.wait(deadline, |state| state.jobs[&id].status).is_ok();
        let mut leader = None;
        self.change(|state| {
            state.unresponsive = !ended;
            leader = state.jobs[&id].pid;
        });
        if let (false, Some(leader)) = (ended, leader) {
            // An error means that the host is gone.
            let _ = self.order(&format!("SIGNAL KILL {leader}"));
        }
        ended
    }

    /// Whether it did not answer when it was last asked for the host's state.
    pub(crate) fn is_unresponsive(&self) -> bool {
        unpoisoned(&self.state).unresponsive
    }

    pub(crate) fn status(&self, id: u64) -> Option<i32> {
        unpoisoned(&self.state).jobs[&id].status
    }
}

/// A log's last lines.
pub(crate) fn tail(log: &Path) -> String {
    const BYTES: u64 = 4096;
    const LINES: usize = 25;
    let read = |path: &Path| -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let start = fs::metadata(path)?.len().saturating_sub(BYTES);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    last_lines(&text, LINES)
}
