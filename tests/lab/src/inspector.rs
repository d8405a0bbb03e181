//! What host and emulator are doing when a wait has run out of time: the text that goes into the wait's error.
//!
//! It takes [`WHOLE`] at most, and every step may fail and then says so. Texts are boiled down in `digest`.

use std::fmt::Write;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::agent::Agent;
use crate::digest::{Processor, Task, first_lines, stacks};
use crate::qmp::Qmp;
use crate::watch::Watch;

/// How long a report may take.
const WHOLE: Duration = Duration::from_secs(40);
/// How long QEMU may take for one command.
const COMMAND: Duration = Duration::from_secs(3);
/// How long the host's agent may take for its part.
const AGENT: Duration = Duration::from_secs(5);
/// How long the host's kernel may take to begin to answer a key or an interrupt.
const KERNEL: Duration = Duration::from_secs(10);
/// How many lines the host's own part may have, and the stacks on its console.
const LINES: usize = 80;

/// The number of the first report's script: the host's jobs have lower ones.
const FIRST_JOB: u64 = 1 << 32;

/// What is needed to look at an emulated host from outside.
#[derive(Debug)]
pub(crate) struct Inspector {
    qmp: Arc<Mutex<Qmp>>,
    /// QEMU's process id.
    qemu: u32,
    /// The host's folder on the outer machine.
    folder: PathBuf,
    next_job: AtomicU64,
}

impl Inspector {
    pub(crate) fn new(qmp: Arc<Mutex<Qmp>>, qemu: u32, folder: PathBuf) -> Self {
        Self {
            qmp,
            qemu,
            folder,
            next_job: AtomicU64::new(FIRST_JOB),
        }
    }

    /// Looks at the emulated processors, QEMU's threads, and the host's processes. Who holds QEMU's monitor passes it.
    ///
    /// A host whose agent does not answer is made to write its stacks on its console, and one that does not take a key
    /// either, to panic.
    pub(crate) fn report(&self, agent: &Agent, monitor: Option<&mut Qmp>) -> String {
        let end = Instant::now() + WHOLE;
        let mut guard;
        let monitor = match monitor {
            Some(monitor) => Some(monitor),
            None => match self.qmp.try_lock() {
                Ok(locked) => {
                    guard = locked;
                    Some(&mut *guard)
                }
                Err(TryLockError::Poisoned(poisoned)) => {
                    guard = poisoned.into_inner();
                    Some(&mut *guard)
                }
                Err(TryLockError::WouldBlock) => None,
            },
        };
        let mut monitor = monitor.context("another thread uses QEMU's monitor");
        let began = Instant::now();
        let before = self.tasks();
        let processors = match &mut monitor {
            Ok(monitor) => processors(monitor),
            Err(error) => Err(anyhow::Error::msg(error.to_string())),
        };
        let host = self.host(agent, end).or_else(|error| {
            let from_outside = match &mut monitor {
                Ok(monitor) => self.kernel(monitor, end),
                Err(error) => format!("not asked for its stacks: {error}"),
            };
            anyhow::Ok(format!("{error:#}\n{from_outside}"))
        });
        let threads = threads(&before, &self.tasks(), began.elapsed());
        let section = |title: &str, text: Result<String>| {
            let text = text.unwrap_or_else(|error| format!("{error:#}"));
            format!("-- {title}\n{}\n", text.trim_end())
        };
        section("the emulated processors", processors)
            + &section("the emulator's threads", Ok(threads))
            + &section("the emulated host", host)
    }

    /// QEMU's threads as they are now; none if it is gone.
    fn tasks(&self) -> Vec<Task> {
        let folder = fs::read_dir(format!("/proc/{}/task", self.qemu));
        let stat = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("stat")).ok();
        folder
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(stat)
            .filter_map(|stat| Task::parse(&stat))
            .collect()
    }

    /// What the host's agent says of its processes.
    fn host(&self, agent: &Agent, end: Instant) -> Result<String> {
        let id = self.next_job.fetch_add(1, Ordering::Relaxed);
        let folder = self.folder.join("share/jobs").join(id.to_string());
        fs::create_dir(&folder)?;
        fs::write(folder.join("script"), include_str!("inspect.sh"))?;
        let whole = agent.run_within(id, end.min(Instant::now() + AGENT));
        let bytes = fs::read(folder.join("stdout")).unwrap_or_default();
        let text = first_lines(&String::from_utf8_lossy(&bytes), LINES);
        match whole {
            true => Ok(text),
            false if text.is_empty() => bail!("its agent does not answer"),
            false => bail!("{text}\nits agent got no further in {} s", AGENT.as_secs()),
        }
    }

    /// The stacks that the host's kernel writes on its console when SysRq asks it to, by the keyboard; or, if it does
    /// not take keys, when it panics of an interrupt that cannot be masked. `machine::arguments` allows it both.
    fn kernel(&self, monitor: &mut Qmp, end: Instant) -> String {
        let console = Console::new(&self.folder);
        let outcome = console.and_then(|mut console| {
            let error = match console.by_keys(monitor, end) {
                Ok(text) => return Ok(text),
                Err(error) => error,
            };
            let text = console.by_interrupt(monitor, end)?;
            Ok(format!("its kernel answers no key: {error:#}\n{text}"))
        });
        outcome.unwrap_or_else(|error| format!("its kernel does not answer: {error:#}"))
    }
}

/// The processors' registers, twice, as close to each other as the monitor answers.
fn processors(monitor: &mut Qmp) -> Result<String> {
    const COMMAND_LINE: &str = "info registers -a";
    let first = monitor.monitor_within(COMMAND_LINE, COMMAND)?;
    let between = Instant::now();
    let second = monitor.monitor_within(COMMAND_LINE, COMMAND)?;
    let between = between.elapsed();
    let later = Processor::parse_all(&second);
    let mut text = String::new();
    for processor in Processor::parse_all(&first) {
        let then = later.iter().find(|each| each.number == processor.number);
        let moves = match then {
            Some(then) if then.rip == processor.rip => "the same".to_owned(),
            Some(then) => format!("RIP {}", then.rip),
            None => "unknown".to_owned(),
        };
        let _ = writeln!(text, "{processor}; {between:.1?} later {moves}");
    }
    if text.is_empty() {
        bail!("QEMU shows no registers: {first}");
    }
    Ok(text)
}

/// QEMU's threads that run or have run: how long since the first look, and altogether.
fn threads(before: &[Task], after: &[Task], between: Duration) -> String {
    let seconds = |ticks: u64| ticks as f64 / 100.0;
    let mut text = String::new();
    for task in after {
        let earlier = before.iter().find(|each| each.id == task.id);
        let ran = task.ticks - earlier.map_or(0, |task| task.ticks).min(task.ticks);
        if task.state == 'S' && ran == 0 && !task.name.starts_with("CPU ") {
            continue;
        }
        let _ = writeln!(
            text,
            "{} {}: ran {:.2} s of the last {:.2} s, {:.2} s altogether",
            task.state,
            task.name,
            seconds(ran),
            between.as_secs_f64(),
            seconds(task.ticks)
        );
    }
    if after.is_empty() {
        text.push_str("QEMU is gone");
    }
    text
}

/// The host's console from one moment on.
struct Console {
    log: PathBuf,
    start: usize,
    watch: Watch,
    /// A bell that does not ring: only the log's growth and the time end a wait.
    bell: [UnixStream; 2],
}

impl Console {
    fn new(folder: &std::path::Path) -> Result<Self> {
        let log = folder.join("console.log");
        let (one, other) = UnixStream::pair()?;
        Ok(Self {
            start: fs::read(&log)?.len(),
            log,
            watch: Watch::new(folder)?,
            bell: [one, other],
        })
    }

    fn text(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(bytes.get(self.start..).unwrap_or_default()).into_owned()
    }

    fn wait_for(&self, words: &str, deadline: Instant) -> Result<()> {
        while !self.text().contains(words) {
            self.watch
                .wait(&self.bell[0], deadline)
                .with_context(|| format!("no {words:?} on its console"))?;
        }
        Ok(())
    }

    /// Has SysRq show the stacks of all processors and processes: linux/Documentation/admin-guide/sysrq.rst.
    fn by_keys(&mut self, monitor: &mut Qmp, end: Instant) -> Result<String> {
        // The messages are shown only at a higher level than `quiet` sets, which is set again afterwards. Each key is
        // pressed when the kernel has taken the one before, for a keyboard holds no more than two such, and a second time
        // where it has not.
        const KEYS: [(&str, &str); 4] = [
            ("9", "Loglevel set to 9"),
            ("l", "Show backtrace of all active CPUs"),
            ("t", "Show State"),
            ("4", "Loglevel set to 4"),
        ];
        let mut unfinished = String::new();
        for (number, (key, answer)) in KEYS.into_iter().enumerate() {
            let code = |data| json!({ "type": "qcode", "data": data });
            let keys = ["alt", "sysrq", key].map(code);
            let arguments = json!({ "keys": keys, "hold-time": 10 });
            let mut press = || {
                monitor.execute_within("send-key", arguments.clone(), COMMAND)?;
                self.wait_for(answer, end.min(Instant::now() + KERNEL / 2))
            };
            // What the kernel writes can stay with it until it writes more.
            match press().or_else(|_| press()) {
                Err(error) if number == 0 => return Err(error),
                Err(error) => unfinished = format!("unfinished: {error:#}\n"),
                Ok(()) => {}
            }
        }
        let stacks = stacks(&self.text()).join("\n");
        Ok(format!(
            "{unfinished}its kernel's stacks, by SysRq:\n{}",
            first_lines(&stacks, LINES)
        ))
    }

    /// Has the kernel panic, which shows at least the stack of the processor that takes the interrupt.
    fn by_interrupt(&mut self, monitor: &mut Qmp, end: Instant) -> Result<String> {
        self.start = fs::read(&self.log)?.len();
        monitor.execute_within("inject-nmi", json!({}), COMMAND)?;
        // The last line of a panic's, before the host restarts, which ends it.
        let outcome = self.wait_for("Kernel Offset", end.min(Instant::now() + KERNEL));
        let stacks = stacks(&self.text());
        if let (true, Err(error)) = (stacks.is_empty(), outcome) {
            bail!("nor does it take an NMI: {error:#}");
        }
        Ok(format!(
            "its kernel's stack, by an NMI that made it panic:\n{}",
            stacks.join("\n")
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_sleep_are_left_out_unless_they_are_processors() {
        let task = |id, name: &str, state, ticks| Task {
            id,
            name: name.to_owned(),
            state,
            ticks,
        };
        let before = [task(1, "CPU 0/TCG", 'R', 100), task(2, "worker", 'S', 5)];
        let after = [
            task(1, "CPU 0/TCG", 'S', 150),
            task(2, "worker", 'S', 5),
            task(3, "main", 'S', 7),
        ];
        assert_eq!(
            threads(&before, &after, Duration::from_secs(2)),
            "S CPU 0/TCG: ran 0.50 s of the last 2.00 s, 1.50 s altogether\n\
             S main: ran 0.07 s of the last 2.00 s, 0.07 s altogether\n"
        );
        assert_eq!(threads(&before, &[], Duration::ZERO), "QEMU is gone");
    }
}
