//! What a virtio device does, counted where it happens, for whoever looks from another thread.
//!
//! Each queue has its counters on cache lines of its own, which its worker alone writes, without a lock, a locked
//! instruction or a system call. A look takes no lock, for a function's is held while its device is stopped. Counts go
//! on over pauses and resets, and end with the device. Of a NIC that the host's kernel serves, the tap's own are read.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use busway_pci::{Activity, Seen};

use super::balloon::{BalloonCounts, BalloonTotals};
use super::mem::{MemTarget, MemTotals};
use super::spec::status;

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

/// What the kernel counts of a tap, from some time on.
#[derive(Debug)]
struct TapCounts {
    /// Its folder of numbers in sysfs.
    statistics: PathBuf,
    /// What they were then.
    before: NetTotals,
}

impl TapCounts {
    fn of(statistics: PathBuf) -> Option<Self> {
        let before = Self::read(&statistics)?;
        Some(Self { statistics, before })
    }

    /// What the interface sends, the guest receives. Linux, Documentation/ABI/testing/sysfs-class-net-statistics
    fn read(statistics: &Path) -> Option<NetTotals> {
        let number = |name: &str| -> Option<u64> {
            let text = fs::read_to_string(statistics.join(name)).ok()?;
            text.trim().parse().ok()
        };
        Some(NetTotals {
            rx_frames: number("tx_packets")?,
            rx_bytes: number("tx_bytes")?,
            rx_dropped: number("tx_dropped")?,
            tx_frames: number("rx_packets")?,
            tx_bytes: number("rx_bytes")?,
            tx_dropped: number("rx_dropped")?,
            tx_spoofed: 0,
        })
    }

    /// Nothing, where the interface is gone or has another name.
    fn totals(&self) -> Totals {
        let since = |now: u64, before: u64| now.saturating_sub(before);
        let Some(now) = Self::read(&self.statistics) else {
            return Totals::None;
        };
        let before = &self.before;
        Totals::Net(NetTotals {
            rx_frames: since(now.rx_frames, before.rx_frames),
            rx_bytes: since(now.rx_bytes, before.rx_bytes),
            rx_dropped: since(now.rx_dropped, before.rx_dropped),
            tx_frames: since(now.tx_frames, before.tx_frames),
            tx_bytes: since(now.tx_bytes, before.tx_bytes),
            tx_dropped: since(now.tx_dropped, before.tx_dropped),
            tx_spoofed: 0,
        })
    }
}

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

/// What a NIC's pair of queues counts.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct NetCounts {
    received: Count,
    received_bytes: Count,
    /// Packets for the guest that it had no room for.
    dropped: Count,
    sent: Count,
    sent_bytes: Count,
    /// Packets of the guest's that the host did not take.
    refused: Count,
    /// Those of them that were from another address than the card's.
    spoofed: Count,
}

impl NetCounts {
    /// The guest has a packet of so many bytes.
    pub(crate) fn received(&self, bytes: usize) {
        self.received.add(1);
        self.received_bytes.add(bytes as u64);
    }

    /// A packet for the guest is lost.
    pub(crate) fn dropped(&self) {
        self.dropped.add(1);
    }

    /// The host has a packet of so many bytes.
    pub(crate) fn sent(&self, bytes: usize) {
        self.sent.add(1);
        self.sent_bytes.add(bytes as u64);
    }

    /// A packet of the guest's is lost.
    pub(crate) fn refused(&self) {
        self.refused.add(1);
    }

    /// A packet of the guest's is lost, for it was from another address than the card's.
    pub(crate) fn spoofed(&self) {
        self.spoofed.add(1);
        self.refused();
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

/// What a NIC has done: all of its queues together. Bytes are those of packets, without virtio's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetTotals {
    /// Packets that the guest has.
    pub rx_frames: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Packets that the guest had no room for.
    pub rx_dropped: u64,
    /// Packets that the host has.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Packets that the host did not take.
    pub tx_dropped: u64,
    /// Those of them that were from another address than the NIC's (`spoofchk=on`).
    pub tx_spoofed: u64,
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
            Kind::Disk(queues) => {
                let mut all = DiskTotals::default();
                for queue in queues {
                    all.reads.add(&queue.reads);
                    all.writes.add(&queue.writes);
                    all.others = all.others.wrapping_add(queue.others.get());
                    all.errors = all.errors.wrapping_add(queue.errors.get());
                }
                Totals::Disk(all)
            }
            Kind::Net(pairs) => {
                let sum = |of: fn(&NetCounts) -> &Count| {
                    let counts = pairs.iter().map(|pair| of(pair).get());
                    counts.fold(0, u64::wrapping_add)
                };
                Totals::Net(NetTotals {
                    rx_frames: sum(|pair| &pair.received),
                    rx_bytes: sum(|pair| &pair.received_bytes),
                    rx_dropped: sum(|pair| &pair.dropped),
                    tx_frames: sum(|pair| &pair.sent),
                    tx_bytes: sum(|pair| &pair.sent_bytes),
                    tx_dropped: sum(|pair| &pair.refused),
                    tx_spoofed: sum(|pair| &pair.spoofed),
                })
            }
        }
    }
}

/// Who serves a device's queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServedBy {
    /// Busway's own threads.
    #[default]
    Busway,
    /// The host's kernel: what passes there, and how often it interrupts, is not known here.
    Kernel,
    /// Another process (vhost-user), of which the same holds.
    BackEnd,
}

impl ServedBy {
    /// Its word in answers.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Busway => "busway",
            Self::Kernel => "kernel",
            Self::BackEnd => "back-end",
        }
    }
}

/// How far a guest's driver is with a device, by the status that it has written. Virtio 1.3 §2.1
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DriverState {
    /// No driver has it.
    #[default]
    None,
    /// A driver sets it up.
    Starting,
    /// A driver uses it.
    Ready,
    /// A driver has given it up.
    Failed,
    /// It waits for its driver to reset it.
    NeedsReset,
}

impl DriverState {
    /// Its word in answers and tables.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Failed => "failed",
            Self::NeedsReset => "needs-reset",
        }
    }

    const fn of(written: u8, broken: bool) -> Self {
        match written {
            0 => Self::None,
            _ if broken => Self::NeedsReset,
            written if written & status::FAILED != 0 => Self::Failed,
            written if written & status::DRIVER_OK != 0 => Self::Ready,
            written if written & status::DRIVER != 0 => Self::Starting,
            _ => Self::None,
        }
    }
}

/// How often one queue has interrupted its guest. Written by what serves the queue.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Sent(AtomicU64);

/// What is seen of a virtio device, shared by what makes it and whoever looks.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) activity: Activity,
    pub(super) status: AtomicU8,
    pub(super) needs_reset: AtomicBool,
    /// By queue, and one more for the configuration.
    sent: Box<[Sent]>,
    vectors: u16,
}

impl Shown {
    pub(super) fn new(queues: u16, vectors: u16) -> Self {
        Self {
            activity: Activity::default(),
            status: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            sent: (0..=queues).map(|_| Sent::default()).collect(),
            vectors,
        }
    }

    /// A queue interrupts; the configuration does where there is no queue of that number.
    pub(super) fn interrupted(&self, queue: u16) {
        let sent = self.sent.get(usize::from(queue)).or(self.sent.last());
        if let Some(sent) = sent {
            sent.0.fetch_add(1, Relaxed);
        }
    }
}

/// A way to look at a virtio device without waiting for it, for as long as anybody likes.
#[derive(Clone, Debug)]
pub struct Sight {
    pub(super) shown: Arc<Shown>,
    pub(super) counts: Counts,
    pub(super) served_by: ServedBy,
}

/// What a look at a virtio device shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VirtioSeen {
    /// Its accesses that left the guest, and how it interrupts.
    pub function: Seen,
    /// The vectors that the guest can have.
    pub vectors: u16,
    /// Who serves its queues.
    pub served_by: ServedBy,
    /// How often this process has interrupted the guest for it.
    pub interrupts: u64,
    /// How far its driver is.
    pub driver: DriverState,
    /// What its queues have counted.
    pub totals: Totals,
}

impl Sight {
    /// What there is now.
    #[must_use]
    pub fn seen(&self) -> VirtioSeen {
        let Shown {
            activity,
            status,
            needs_reset,
            sent,
            vectors,
        } = &*self.shown;
        let sent = sent.iter().map(|sent| sent.0.load(Relaxed));
        VirtioSeen {
            function: activity.seen(),
            vectors: *vectors,
            served_by: self.served_by,
            interrupts: sent.fold(0, u64::wrapping_add),
            driver: DriverState::of(status.load(Relaxed), needs_reset.load(Relaxed)),
            totals: self.counts.totals(),
        }
    }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn a_drivers_state_follows_from_the_status_that_it_wrote() {
        let of = |written| DriverState::of(written, false);
        assert_eq!(of(0), DriverState::None);
        assert_eq!(of(status::ACKNOWLEDGE), DriverState::None);
        let driver = status::ACKNOWLEDGE | status::DRIVER;
        assert_eq!(of(driver), DriverState::Starting);
        let ready = driver | status::FEATURES_OK | status::DRIVER_OK;
        assert_eq!(of(ready), DriverState::Ready);
        assert_eq!(of(ready | status::FAILED), DriverState::Failed);
        assert_eq!(DriverState::of(ready, true), DriverState::NeedsReset);
    }

    #[test]
    fn interrupts_are_counted_whoever_sends_them() {
        let sight = Sight {
            shown: Arc::new(Shown::new(2, 3)),
            counts: Counts::default(),
            served_by: ServedBy::Busway,
        };
        sight.shown.interrupted(0);
        sight.shown.interrupted(1);
        sight.shown.interrupted(u16::MAX);
        let seen = sight.seen();
        assert_eq!((seen.interrupts, seen.vectors), (3, 3));
    }
}
