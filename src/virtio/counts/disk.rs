//! What a disk's queues count: requests by what they asked for, their bytes, and how long they took.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::Count;

/// What the requests of a kind came to, in one direction.
#[derive(Debug, Default)]
struct Transfers {
    ops: Count,
    bytes: Count,
    /// Microseconds that they took: together, at most and at least.
    took: Count,
    longest: Count,
    shortest: Count,
}

/// What a disk's queue counts, when a request is answered.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct DiskCounts {
    reads: Transfers,
    writes: Transfers,
    /// Flushes, discards and writes of zeroes.
    others: Count,
    errors: Count,
}

/// What a disk was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DiskWork {
    Read,
    Write,
    Other,
}

impl DiskCounts {
    /// A request is answered that asked for so many bytes, and took so long.
    pub(crate) fn answered(&self, work: DiskWork, bytes: u64, took: Duration, well: bool) {
        if !well {
            return self.errors.add(1);
        }
        let transfers = match work {
            DiskWork::Read => &self.reads,
            DiskWork::Write => &self.writes,
            DiskWork::Other => return self.others.add(1),
        };
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        if took < transfers.shortest.get() || transfers.ops.get() == 0 {
            transfers.shortest.0.store(took, Relaxed);
        }
        transfers.ops.add(1);
        transfers.bytes.add(bytes);
        transfers.took.add(took);
        if took > transfers.longest.get() {
            transfers.longest.0.store(took, Relaxed);
        }
    }
}

/// What a disk has done: all of its queues together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskTotals {
    /// Reads that went well.
    pub reads: TransferTotals,
    /// Writes that went well.
    pub writes: TransferTotals,
    /// Flushes, discards and writes of zeroes that went well.
    pub others: u64,
    /// Requests that the host refused.
    pub errors: u64,
}

impl DiskTotals {
    pub(super) fn of(queues: &[Arc<DiskCounts>]) -> Self {
        let mut all = Self::default();
        for queue in queues {
            all.reads.add(&queue.reads);
            all.writes.add(&queue.writes);
            all.others = all.others.wrapping_add(queue.others.get());
            all.errors = all.errors.wrapping_add(queue.errors.get());
        }
        all
    }
}

/// What the requests of one direction came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransferTotals {
    /// How many there were.
    pub ops: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Microseconds from where each was taken from its ring to its answer, together.
    pub micros: u64,
    /// Microseconds that the longest took.
    pub longest_micros: u64,
    /// Microseconds that the shortest took; 0 where there was none.
    pub shortest_micros: u64,
}

impl TransferTotals {
    fn add(&mut self, more: &Transfers) {
        if more.ops.get() > 0 && (self.ops == 0 || more.shortest.get() < self.shortest_micros) {
            self.shortest_micros = more.shortest.get();
        }
        self.ops = self.ops.wrapping_add(more.ops.get());
        self.bytes = self.bytes.wrapping_add(more.bytes.get());
        self.micros = self.micros.wrapping_add(more.took.get());
        self.longest_micros = self.longest_micros.max(more.longest.get());
    }
}
