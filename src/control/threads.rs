//! What the process's threads and the process itself have used, by what the kernel counts. proc(5)

use std::fs;
use std::path::Path;

use rustix::time::{ClockId, clock_gettime};

/// Where the kernel tells a process of itself.
const SELF: &str = "/proc/self";
/// Microseconds of a clock tick: `USER_HZ` is 100.
const TICK: u64 = 10_000;
/// Bytes of what `statm` counts in.
const PAGE: u64 = busway_pci::PAGE_SIZE;

/// One thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Thread {
    /// Its number.
    pub(super) tid: u32,
    /// Its name: `vcpu0` and so on, or what the device is called whose queue it serves, behind `_`.
    pub(super) name: String,
    /// Microseconds on a processor.
    pub(super) cpu_us: u64,
    /// Page faults that were dealt with in memory.
    pub(super) minor_faults: u64,
    /// Page faults that waited for a disk.
    pub(super) major_faults: u64,
}

impl Thread {
    /// Whether it is there for as long as the guest runs: a vCPU's, or one that serves a device's queue.
    pub(super) fn lasts(&self) -> bool {
        self.name.starts_with("vcpu") || self.name.starts_with('_')
    }
}

/// All threads of this process, by their numbers. Those that end meanwhile are left out.
pub(super) fn all() -> Vec<Thread> {
    below(&Path::new(SELF).join("task"))
}

fn below(folder: &Path) -> Vec<Thread> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut all: Vec<_> = entries
        .filter_map(|entry| {
            let tid = entry.file_name().to_str()?.parse().ok()?;
            let folder = entry.path();
            let stat = fs::read_to_string(folder.join("stat")).ok()?;
            let run = fs::read_to_string(folder.join("schedstat")).ok();
            parse(tid, &stat, run.as_deref())
        })
        .collect();
    all.sort_by_key(|thread| thread.tid);
    all
}

/// What `stat` says and, where the kernel has it, `schedstat`, which is finer.
fn parse(tid: u32, stat: &str, run: Option<&str>) -> Option<Thread> {
    // A name may have spaces and parentheses in it.
    let (before, after) = stat.rsplit_once(')')?;
    let (_, name) = before.split_once('(')?;
    let fields: Vec<_> = after.split_ascii_whitespace().collect();
    // The state is field 3.
    let field = |number: usize| fields.get(number.checked_sub(3)?)?.parse::<u64>().ok();
    let nanoseconds = run
        .and_then(|run| run.split_ascii_whitespace().next())
        .and_then(|run| run.parse::<u64>().ok());
    let cpu_us = match nanoseconds {
        Some(run) => run / 1000,
        None => field(14)?.saturating_add(field(15)?).saturating_mul(TICK),
    };
    Some(Thread {
        tid,
        name: name.to_owned(),
        cpu_us,
        minor_faults: field(10)?,
        major_faults: field(12)?,
    })
}

/// Microseconds on a processor of all threads that there are and were.
pub(super) fn process_cpu_us() -> u64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000)
        .saturating_add(nanoseconds / 1000)
}

/// Bytes of memory that the process has in RAM, its guest's included.
pub(super) fn resident_bytes() -> Option<u64> {
    let statm = fs::read_to_string(Path::new(SELF).join("statm")).ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(pages.saturating_mul(PAGE))
}

/// How many descriptors the process has open.
pub(super) fn open_descriptors() -> Option<u64> {
    let entries = fs::read_dir(Path::new(SELF).join("fd")).ok()?;
    // The folder itself is open for this.
    Some((entries.count() as u64).saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_read_whatever_its_name_and_by_the_finer_clock_where_there_is_one() {
        let stat = "7 (a) (b) R 1 2 3 4 5 6 11 0 12 0 30 40 0 0 20 0 1 0 5";
        let thread = parse(7, stat, Some("5000999 17 3\n")).unwrap();
        assert_eq!(thread.name, "a) (b");
        assert_eq!(
            (thread.cpu_us, thread.minor_faults, thread.major_faults),
            (5000, 11, 12)
        );
        assert_eq!(parse(7, stat, None).unwrap().cpu_us, 700_000);
        for short in ["", "7 (a", "7 (a) R 1 2"] {
            assert_eq!(parse(7, short, None), None);
        }
    }

    #[test]
    fn this_process_and_its_threads_are_seen() {
        let named = std::thread::Builder::new().name("vcpu9".into());
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let (started, starts) = std::sync::mpsc::channel();
        let handle = named.spawn(move || {
            started.send(()).unwrap();
            receiver.recv().unwrap_err();
        });
        starts.recv().unwrap();
        let threads = all();
        let lasting: Vec<_> = threads.iter().filter(|thread| thread.lasts()).collect();
        assert!(lasting.iter().any(|thread| thread.name == "vcpu9"));
        drop(sender);
        handle.unwrap().join().unwrap();
        assert!(process_cpu_us() > 0);
        assert!(resident_bytes().unwrap() > 0 && open_descriptors().unwrap() > 0);
    }
}
