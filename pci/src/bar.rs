//! What a BAR is: which, of what kind, and where it decodes.

use std::fmt;

/// Which of a function's address decoders: a BAR or the expansion ROM.
///
/// PCIe 6.0 §7.5.1.2.1 and §7.5.1.2.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BarIndex {
    /// BAR 0 to 5, by the register that holds the low half.
    Bar(u8),
    /// The expansion ROM.
    Rom,
}

impl fmt::Display for BarIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bar(number) => write!(f, "BAR {number}"),
            Self::Rom => f.write_str("the expansion ROM"),
        }
    }
}

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32 {
        /// The prefetchable flag.
        prefetchable: bool,
    },
    /// Memory anywhere; takes two registers.
    Memory64 {
        /// The prefetchable flag.
        prefetchable: bool,
    },
}

/// A BAR that decodes now, at this place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarRegion {
    /// Which BAR.
    pub index: BarIndex,
    /// Ports or memory.
    pub kind: BarKind,
    /// First guest-physical address or port.
    pub address: u64,
    /// Bytes; a power of two.
    pub size: u64,
}

/// Bytes of a page of memory, the least that a guest can be given of a BAR. Busway runs on x86-64
/// only.
pub const PAGE_SIZE: u64 = 4096;
