//! What a virtio device does, counted where it happens, for whoever looks from another thread.
//!
//! Each queue has its counters on cache lines of its own, which its worker alone writes, without a lock, a locked
//! instruction or a system call. A look takes no lock, for a function's is held while its device is stopped. Counts go
//! on over pauses and resets, and end with the device. Of a NIC that the host's kernel serves, the tap's own are read.

mod disk;
mod net;
mod sight;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::balloon::{BalloonCounts, BalloonTotals};
use super::mem::{MemTarget, MemTotals};
pub(crate) use disk::{DiskCounts, DiskWork};
pub use disk::{DiskTotals, TransferTotals};
pub(crate) use net::NetCounts;
pub use net::NetTotals;
use net::TapCounts;
pub(super) use sight::Shown;
pub use sight::{DriverState, ServedBy, Sight, VirtioSeen};

/// A number that one thread writes, and any reads.
#[derive(Debug, Default)]
struct Count(AtomicU64);

impl Count {
    fn add(&self, more: u64) {
        // There is one writer, so this needs no locked instruction.
        self.0.store(self.get().wrapping_add(more), Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Where a device's queues count what they do.
#[derive(Clone, Debug, Default)]
pub struct Counts(Kind);

#[derive(Clone, Debug, Default)]
enum Kind {
    /// Nothing.
    #[default]
    None,
    /// A disk's, by queue.
    Disk(Vec<Arc<DiskCounts>>),
    /// A NIC's, by pair of queues.
    Net(Vec<Arc<NetCounts>>),
    /// A NIC's that the host's kernel serves.
    Tap(Arc<TapCounts>),
    /// A balloon's.
    Balloon(Arc<BalloonCounts>),
    /// A memory device's.
    Mem(MemTarget),
}

/// What a device's queues have counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Totals {
    /// It counts nothing.
    #[default]
    None,
    /// A disk's.
    Disk(DiskTotals),
    /// A NIC's.
    Net(NetTotals),
    /// A balloon's.
    Balloon(BalloonTotals),
    /// A memory device's.
    Mem(MemTotals),
}

impl Counts {
    /// Those of `count` queues of a disk.
    pub(crate) fn of_disk(count: u16) -> Self {
        Self(Kind::Disk((0..count).map(|_| Arc::default()).collect()))
    }

    /// Those of `count` pairs of queues of a NIC.
    pub(crate) fn of_net(count: u16) -> Self {
        Self(Kind::Net((0..count).map(|_| Arc::default()).collect()))
    }

    /// Those that the kernel has of the tap `name` in this network namespace, from now on; of nothing, where it
    /// does not say.
    pub(crate) fn of_tap(name: &str) -> Self {
        let statistics = Path::new("/sys/class/net").join(name).join("statistics");
        let counts = TapCounts::of(statistics);
        counts.map_or_else(Self::default, |counts| Self(Kind::Tap(Arc::new(counts))))
    }

    /// Those of a balloon.
    pub(crate) fn of_balloon(counts: Arc<BalloonCounts>) -> Self {
        Self(Kind::Balloon(counts))
    }

    /// Those of a memory device.
    pub(crate) fn of_mem(target: MemTarget) -> Self {
        Self(Kind::Mem(target))
    }

    /// Those of a disk's queue.
    pub(crate) fn disk_queue(&self, index: u16) -> Arc<DiskCounts> {
        match &self.0 {
            Kind::Disk(queues) => queues.get(usize::from(index)).cloned().unwrap_or_default(),
            _ => Arc::default(),
        }
    }

    /// Those of a NIC's pair of queues.
    pub(crate) fn net_pair(&self, index: u16) -> Arc<NetCounts> {
        match &self.0 {
            Kind::Net(pairs) => pairs.get(usize::from(index)).cloned().unwrap_or_default(),
            _ => Arc::default(),
        }
    }

    fn totals(&self) -> Totals {
        match &self.0 {
            Kind::None => Totals::None,
            Kind::Tap(tap) => tap.totals(),
            Kind::Balloon(balloon) => Totals::Balloon(balloon.totals()),
            Kind::Mem(target) => Totals::Mem(target.totals()),
            Kind::Disk(queues) => Totals::Disk(DiskTotals::of(queues)),
            Kind::Net(pairs) => Totals::Net(NetTotals::of(pairs)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_disk_counts_by_queue_what_went_well_and_all_of_it_is_seen() {
        let counts = Counts::of_disk(2);
        let micros = Duration::from_micros;
        let (first, second) = (counts.disk_queue(0), counts.disk_queue(1));
        first.answered(DiskWork::Read, 4096, micros(10), true);
        second.answered(DiskWork::Read, 512, micros(30), true);
        second.answered(DiskWork::Write, 1024, micros(5), true);
        first.answered(DiskWork::Other, 0, micros(1), true);
        first.answered(DiskWork::Write, 4096, micros(1), false);
        let expected = DiskTotals {
            reads: TransferTotals {
                ops: 2,
                bytes: 4608,
                micros: 40,
                longest_micros: 30,
                shortest_micros: 10,
            },
            writes: TransferTotals {
                ops: 1,
                bytes: 1024,
                micros: 5,
                longest_micros: 5,
                shortest_micros: 5,
            },
            others: 1,
            errors: 1,
        };
        assert_eq!(counts.totals(), Totals::Disk(expected));
    }

    #[test]
    fn a_nic_counts_both_directions_and_what_is_lost() {
        let counts = Counts::of_net(2);
        counts.net_pair(0).received(60);
        counts.net_pair(1).received(1500);
        counts.net_pair(1).sent(90);
        counts.net_pair(0).dropped();
        counts.net_pair(0).refused();
        counts.net_pair(1).spoofed();
        let expected = NetTotals {
            rx_frames: 2,
            rx_bytes: 1560,
            rx_dropped: 1,
            tx_frames: 1,
            tx_bytes: 90,
            tx_dropped: 2,
            tx_spoofed: 1,
        };
        assert_eq!(counts.totals(), Totals::Net(expected));
    }

    #[test]
    fn a_nic_of_the_kernels_counts_what_its_tap_does_from_then_on() {
        let folder = tempfile::tempdir().unwrap();
        let write = |numbers: [u64; 6]| {
            let names = [
                "tx_packets",
                "tx_bytes",
                "tx_dropped",
                "rx_packets",
                "rx_bytes",
                "rx_dropped",
            ];
            for (name, number) in names.into_iter().zip(numbers) {
                fs::write(folder.path().join(name), format!("{number}\n")).unwrap();
            }
        };
        assert!(TapCounts::of(folder.path().into()).is_none());
        write([10, 1000, 1, 20, 2000, 2]);
        let tap = Arc::new(TapCounts::of(folder.path().into()).unwrap());
        let counts = Counts(Kind::Tap(tap));
        assert_eq!(counts.totals(), Totals::Net(NetTotals::default()));
        write([13, 1300, 2, 27, 2700, 2]);
        let expected = NetTotals {
            rx_frames: 3,
            rx_bytes: 300,
            rx_dropped: 1,
            tx_frames: 7,
            tx_bytes: 700,
            tx_dropped: 0,
            tx_spoofed: 0,
        };
        assert_eq!(counts.totals(), Totals::Net(expected));
        drop(folder);
        assert_eq!(counts.totals(), Totals::None);
    }
}
