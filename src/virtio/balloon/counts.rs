//! What a balloon is seen to do: its sizes, what has been reported, and what the guest says of its memory.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use super::space::BalloonSpace;
use crate::memory::{Ballooned, Discards};
use crate::monitor::{self, Source};
use crate::virtio::spec::balloon;

/// The names of the statistics that a guest can give, by their tags. Virtio 1.3 §5.5.6.4; the last one is Linux's,
/// linux/virtio_balloon.h.
const STATS: [&str; 11] = [
    "swapped_in_bytes",
    "swapped_out_bytes",
    "major_faults",
    "minor_faults",
    "free_bytes",
    "total_bytes",
    "available_bytes",
    "disk_caches_bytes",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kills",
];

/// A value that no guest has given, which none can mean.
const UNKNOWN: u64 = u64::MAX;

/// What is counted elsewhere.
#[derive(Debug)]
struct Sources {
    space: Arc<BalloonSpace>,
    discards: Arc<Discards>,
    ballooned: Option<Arc<Ballooned>>,
}

/// Where a balloon counts.
#[derive(Debug)]
pub(crate) struct BalloonCounts {
    source: OnceLock<Sources>,
    reported: AtomicU64,
    wanted: AtomicU64,
    told: AtomicBool,
    stats: [AtomicU64; STATS.len()],
}

impl Default for BalloonCounts {
    fn default() -> Self {
        Self {
            source: OnceLock::new(),
            reported: AtomicU64::new(0),
            wanted: AtomicU64::new(0),
            told: AtomicBool::new(false),
            stats: [const { AtomicU64::new(UNKNOWN) }; STATS.len()],
        }
    }
}

impl BalloonCounts {
    pub(super) fn set_source(
        &self,
        space: &Arc<BalloonSpace>,
        discards: &Arc<Discards>,
        ballooned: Option<&Arc<Ballooned>>,
    ) {
        let _once = self.source.set(Sources {
            space: Arc::clone(space),
            discards: Arc::clone(discards),
            ballooned: ballooned.cloned(),
        });
    }

    /// So much free memory went back to the host.
    pub(super) fn reported(&self, bytes: u64) {
        self.reported.fetch_add(bytes, Relaxed);
    }

    /// The guest took so much out of the balloon though that is no larger than it was to be.
    pub(super) fn taken_for_want(&self, name: &str, bytes: u64) {
        self.wanted.fetch_add(bytes, Relaxed);
        if !self.told.swap(true, Relaxed) {
            log::warn!(
                "{name}: the guest is short of memory and takes pages out of its balloon; a smaller balloon is the \
                 remedy (busway ctl resize --balloon)"
            );
            monitor::tell(Source::VirtioDevice, "balloon-deflated", &[("id", name)]);
        }
    }

    /// What the guest says of itself; nothing where the tag is none that is known.
    pub(super) fn stat(&self, tag: u16, value: u64) {
        if let Some(stat) = self.stats.get(usize::from(tag)) {
            stat.store(value, Relaxed);
        }
    }

    pub(crate) fn totals(&self) -> BalloonTotals {
        let Some(Sources {
            space,
            discards,
            ballooned,
        }) = self.source.get()
        else {
            return BalloonTotals::default();
        };
        let mut stats = [None; STATS.len()];
        for (shown, stat) in stats.iter_mut().zip(&self.stats) {
            *shown = Some(stat.load(Relaxed)).filter(|value| *value != UNKNOWN);
        }
        BalloonTotals {
            target: u64::from(space.target()) * balloon::PAGE,
            actual: u64::from(space.actual()) * balloon::PAGE,
            given: discards.given(),
            taken_back: discards.taken_back(),
            unmapped: discards.unmapped(),
            failures: ballooned.as_ref().map_or(0, |it| it.failures()),
            inhibited: discards.is_inhibited() && ballooned.is_none(),
            reported: self.reported.load(Relaxed),
            wanted: self.wanted.load(Relaxed),
            stats,
        }
    }
}

/// What a balloon has done, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonTotals {
    /// What it is to have.
    pub target: u64,
    /// What it has, as the guest says.
    pub actual: u64,
    /// What of that the host has back.
    pub given: u64,
    /// What the host had back until a device's DMA mapping populated it again.
    pub taken_back: u64,
    /// What of that devices do not reach: whole blocks (`vfio=remap`).
    pub unmapped: u64,
    /// How often a block could not be unmapped, given back, or mapped again.
    pub failures: u64,
    /// Nothing goes back to the host, for devices reach memory by DMA.
    pub inhibited: bool,
    /// Free memory that went back to the host, all together.
    pub reported: u64,
    /// What the guest took out of want of memory, all together.
    pub wanted: u64,
    stats: [Option<u64>; STATS.len()],
}

impl BalloonTotals {
    /// What the guest has said of its memory, by names.
    pub fn stats(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let all = STATS.into_iter().zip(self.stats);
        all.filter_map(|(name, value)| Some((name, value?)))
    }
}
