//! What a space has done, for whoever looks without waiting: its lock is held while the kernel pins memory.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What a space has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Mapping calls made to the kernel for memory.
    pub map_calls: u64,
    /// Mapping calls made to the kernel for parts of devices.
    pub device_map_calls: u64,
    /// Bytes of memory that are mapped now.
    pub bytes: u64,
    /// Mappings that there are now, of memory and of devices.
    pub mappings: u64,
}

/// The same, written with the space's lock held, and read without it.
#[derive(Debug, Default)]
pub(crate) struct Shown {
    map_calls: AtomicU64,
    device_map_calls: AtomicU64,
    bytes: AtomicU64,
    mappings: AtomicU64,
}

impl Shown {
    pub(crate) fn show(&self, stats: Stats) {
        self.map_calls.store(stats.map_calls, Relaxed);
        self.device_map_calls.store(stats.device_map_calls, Relaxed);
        self.bytes.store(stats.bytes, Relaxed);
        self.mappings.store(stats.mappings, Relaxed);
    }

    pub(crate) fn seen(&self) -> Stats {
        Stats {
            map_calls: self.map_calls.load(Relaxed),
            device_map_calls: self.device_map_calls.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            mappings: self.mappings.load(Relaxed),
        }
    }
}
