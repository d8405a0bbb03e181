//! Lanes: how many trials run at once.

use std::fs;
use std::thread;

/// How many trials run at once: with two processors three, for a host waits for a third of its time. The largest takes
/// 8 GiB, few take more than two.
pub(crate) fn number() -> usize {
    const MOST: usize = 4;
    const KIB: u64 = 7 << 20;
    let available = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    });
    let memory = usize::try_from(available.unwrap_or_default() / KIB).unwrap_or(MOST);
    let processors = thread::available_parallelism().map_or(1, usize::from);
    memory.min(processors * 3 / 2).clamp(1, MOST)
}
