//! What a NIC's queues count, and what the kernel counts of a tap whose packets pass there.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Count, Totals};

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

impl NetTotals {
    pub(super) fn of(pairs: &[Arc<NetCounts>]) -> Self {
        let sum = |of: fn(&NetCounts) -> &Count| {
            let counts = pairs.iter().map(|pair| of(pair).get());
            counts.fold(0, u64::wrapping_add)
        };
        Self {
            rx_frames: sum(|pair| &pair.received),
            rx_bytes: sum(|pair| &pair.received_bytes),
            rx_dropped: sum(|pair| &pair.dropped),
            tx_frames: sum(|pair| &pair.sent),
            tx_bytes: sum(|pair| &pair.sent_bytes),
            tx_dropped: sum(|pair| &pair.refused),
            tx_spoofed: sum(|pair| &pair.spoofed),
        }
    }
}

/// What the kernel counts of a tap, from some time on.
#[derive(Debug)]
pub(super) struct TapCounts {
    /// Its folder of numbers in sysfs.
    statistics: PathBuf,
    /// What they were then.
    before: NetTotals,
}

impl TapCounts {
    pub(super) fn of(statistics: PathBuf) -> Option<Self> {
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
    pub(super) fn totals(&self) -> Totals {
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
