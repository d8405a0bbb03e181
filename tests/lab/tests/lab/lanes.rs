//! Lanes: how many trials run at once, and the emulated host that each lane has.

use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use busway_lab::Lab;

/// How many trials run at once. A host has two processors and is idle for half of the time; the largest takes 8 GiB.
pub(crate) fn number() -> usize {
    const MOST: usize = 4;
    const KIB: u64 = 10 << 20;
    let available = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    });
    let memory = usize::try_from(available.unwrap_or_default() / KIB).unwrap_or(MOST);
    let processors = thread::available_parallelism().map_or(1, usize::from);
    memory.min(processors).clamp(1, MOST)
}

/// The lanes' labs, of which a trial takes one for itself, each with the chapter of the trial before.
pub(crate) struct Lanes {
    programs: Vec<PathBuf>,
    idle: Mutex<Vec<(usize, Lab)>>,
}

impl Lanes {
    /// Lanes whose hosts have these programs.
    pub(crate) fn new(programs: Vec<PathBuf>) -> Self {
        Self {
            programs,
            idle: Mutex::default(),
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<(usize, Lab)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A lab whose host, if it has one, only trials of this chapter have used: what those of another leave behind is
    /// nobody's business.
    pub(crate) fn take(&self, chapter: usize) -> Lab {
        let mut idle = self.idle();
        let own = idle.iter().position(|(last, _)| *last == chapter);
        if let Some(own) = own {
            return idle.swap_remove(own).1;
        }
        let other = idle.pop();
        drop(idle);
        other.map_or_else(
            || Lab::new(self.programs.clone()),
            |(_, mut lab)| {
                lab.stop();
                lab
            },
        )
    }

    /// Keeps a lab for the next trial of its chapter.
    pub(crate) fn put(&self, chapter: usize, lab: Lab) {
        self.idle().push((chapter, lab));
    }

    /// Stops all hosts.
    pub(crate) fn stop(&self) {
        self.idle().clear();
    }
}
