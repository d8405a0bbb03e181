//! The guest's addresses that BARs can have: what there is, and what a slot keeps for devices to come.

use std::fmt;
use std::ops::Range;

use crate::bar::{BarKind, PAGE_SIZE};
use crate::spec;

/// The guest addresses and ports that PCI has. Ranges ascend and are disjoint; between them is what
/// BARs have to keep clear of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// I/O ports, such as 0xC000 up.
    pub io: Range<u64>,
    /// Memory below 4 GiB.
    pub memory32: Vec<Range<u64>>,
    /// Memory above 4 GiB.
    pub memory64: Vec<Range<u64>>,
}

impl Windows {
    /// Bytes of the largest range of a kind.
    #[must_use]
    pub fn largest(&self, kind: WindowKind) -> u64 {
        let sizes = self.ranges(kind).iter();
        let sizes = sizes.map(|range| range.end.saturating_sub(range.start));
        sizes.max().unwrap_or(0)
    }

    pub(crate) fn ranges(&self, kind: WindowKind) -> &[Range<u64>] {
        match kind {
            WindowKind::Io => std::slice::from_ref(&self.io),
            WindowKind::Memory32 => &self.memory32,
            WindowKind::Memory64 => &self.memory64,
        }
    }
}

/// The kinds of room, as bridges have windows for them. PCIe 6.0 §7.5.1.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowKind {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory above 4 GiB.
    Memory64,
}

impl fmt::Display for WindowKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Io => "I/O ports",
            Self::Memory32 => "memory below 4 GiB",
            Self::Memory64 => "memory above RAM",
        })
    }
}

impl WindowKind {
    /// Where a BAR of this kind goes, on bus 0 or behind a bridge.
    ///
    /// A bridge forwards addresses above 4 GiB by its prefetchable window only: the other's registers
    /// hold 32 bits (PCIe 6.0 §7.5.1.3.8). So a 64-bit BAR that is not prefetchable is below 4 GiB
    /// behind a bridge. PCIe 6.0 §7.5.1.2.1 ("Additional Guidance on the Prefetchable Bit in Memory
    /// Space BARs") lets a device's designer set the bit where reads have side effects, and nobody else:
    /// software goes by the bit. Linux takes such a BAR in a prefetchable window for firmware's mistake
    /// and places it anew (`pci_find_parent_resource` in drivers/pci/pci.c), and a guest may map what
    /// is prefetchable with write combining.
    #[must_use]
    pub const fn of(kind: BarKind, on_root_bus: bool) -> Self {
        match kind {
            BarKind::Io => Self::Io,
            BarKind::Memory64 { prefetchable } if prefetchable || on_root_bus => Self::Memory64,
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => Self::Memory32,
        }
    }

    pub(crate) const fn granule(self) -> u64 {
        match self {
            Self::Io => spec::IO_WINDOW_GRANULE,
            Self::Memory32 | Self::Memory64 => spec::MEMORY_WINDOW_GRANULE,
        }
    }

    /// What a BAR is aligned to, though it be smaller: memory comes in pages, and one that has a page
    /// to itself can be reached without an exit.
    pub(crate) const fn bar_alignment(self) -> u64 {
        match self {
            Self::Io => spec::BAR_IO_MIN,
            Self::Memory32 | Self::Memory64 => PAGE_SIZE,
        }
    }
}

/// The least that the memory windows of a bridge with a slot have, needed or not, for what may be plugged
/// in; bytes. Nothing for a bridge that has no slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reserve {
    /// Below 4 GiB.
    pub memory32: u64,
    /// Above RAM, prefetchable. The window is aligned for a BAR that fills it.
    pub memory64: u64,
}

impl Reserve {
    /// What Linux gives a bridge that it sets up itself (`pci=hpmmiosize=`): 2 MiB each.
    pub const SMALL: Self = Self {
        memory32: 2 << 20,
        memory64: 2 << 20,
    };

    pub(crate) fn bytes(self, window: WindowKind) -> u64 {
        match window {
            WindowKind::Io => 0,
            WindowKind::Memory32 => self.memory32,
            WindowKind::Memory64 => self.memory64,
        }
    }

    /// What the window is aligned to, so that one BAR can have most of it.
    pub(crate) fn alignment(self, window: WindowKind) -> u64 {
        match self.bytes(window) {
            small if small <= Self::SMALL.bytes(window) => 0,
            large => 1 << large.ilog2(),
        }
    }
}
