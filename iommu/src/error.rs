//! What can go wrong, said so that a person can act on it.

use std::io;
use std::path::PathBuf;

use crate::{Iova, IovaRange, MemlockError, Obstacle};

/// An address space, a group or the way between them could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// cannot open {path}: {obstacle}
    #[error("cannot open {path}: {obstacle}")]
    Node {
        /// The device node.
        path: PathBuf,
        /// Why.
        obstacle: Obstacle,
    },
    /// {path} speaks VFIO API version {version}, Busway version 0: the kernel is too new or not Linux
    #[error(
        "{path} speaks VFIO API version {version}, Busway version 0: use a kernel that speaks it"
    )]
    Version {
        /// The container device.
        path: PathBuf,
        /// What it said.
        version: i32,
    },
    /// the container has no Type1 v2 IOMMU
    #[error("{path} offers no Type1 v2 IOMMU: {obstacle}")]
    NoType1 {
        /// The container device.
        path: PathBuf,
        /// Why.
        obstacle: Obstacle,
    },
    /// {what} failed: {source}
    #[error("{what} failed: {source}")]
    Kernel {
        /// The ioctl, and on what.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// IOMMU group {group} is not viable
    #[error("IOMMU group {group} cannot be given away while others use parts of it: {blockers}")]
    NotViable {
        /// The group.
        group: u32,
        /// Each member in the way, its driver, and the command that frees it.
        blockers: String,
    },
    /// IOMMU group {group} is in a container already
    #[error(
        "IOMMU group {group} is in somebody's container already: pass a descriptor that was only \
         opened, and end whoever uses it"
    )]
    HasContainer {
        /// The group.
        group: u32,
    },
    /// cannot attach {what} to the VM's address space: {obstacle}
    #[error("cannot attach {what} to the VM's address space: {obstacle}")]
    Attach {
        /// The group or device.
        what: String,
        /// Why.
        obstacle: Obstacle,
    },
    /// {device} cannot be used over iommufd: {why}
    #[error("{device} cannot be used over iommufd: {why}")]
    NoCdev {
        /// The device.
        device: String,
        /// Why, and what to do.
        why: String,
    },
    /// memory that is mapped could not be mapped for the new device
    #[error(transparent)]
    Map(#[from] MapError),
}

impl MapError {
    /// Why, without whose memory it is and where: for a sentence that says so already.
    #[must_use]
    pub fn reason(&self) -> String {
        match self {
            Self::Malformed { why, .. } => (*why).to_owned(),
            Self::Unusable { why, .. } | Self::NoPeerToPeer { why, .. } => why.clone(),
            Self::Kernel { what, source, .. } => format!("{what}: {source}"),
            Self::Memlock { source, .. } => source.to_string(),
            Self::Overlap { .. }
            | Self::NotMapped { .. }
            | Self::Splits { .. }
            | Self::TooMany { .. }
            | Self::OutOfMemory { .. } => self.to_string(),
        }
    }
}

/// Memory could not be mapped for devices, or not unmapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// {owner} at {iova} ({size:#x} bytes) cannot be mapped for devices: {why}
    #[error("{owner} at {iova} ({size:#x} bytes) cannot be mapped for devices: {why}")]
    Malformed {
        /// Whose memory.
        owner: String,
        /// Where.
        iova: Iova,
        /// Bytes.
        size: u64,
        /// Why.
        why: &'static str,
    },
    /// {owner} at {range} overlaps {other} at {other_range}, which devices reach already
    #[error("{owner} at {range} overlaps {other} at {other_range}, which devices reach already")]
    Overlap {
        /// Who asked.
        owner: String,
        /// For what.
        range: IovaRange,
        /// Who is there.
        other: String,
        /// Where.
        other_range: IovaRange,
    },
    /// the IOMMU cannot map a part of it
    #[error(
        "{owner} at {range} cannot be mapped for devices: {why}; give the guest less memory, or \
         leave out the device that stands in the way"
    )]
    Unusable {
        /// Whose memory.
        owner: String,
        /// Where.
        range: IovaRange,
        /// The first part that cannot be mapped.
        gap: IovaRange,
        /// Who reserves it, or how far the IOMMU reaches.
        why: String,
    },
    /// nothing is mapped within {size:#x} bytes from {iova}
    #[error("nothing is mapped for devices within {size:#x} bytes from {iova}")]
    NotMapped {
        /// Where.
        iova: Iova,
        /// Bytes.
        size: u64,
    },
    /// a part of a mapping cannot be unmapped
    #[error("{asked} is only a part of {owner} at {range}, which is mapped as one: unmap it whole")]
    Splits {
        /// Whose mapping.
        owner: String,
        /// The mapping.
        range: IovaRange,
        /// What was asked.
        asked: IovaRange,
    },
    /// the kernel's limit of mappings is reached
    #[error(
        "{owner} cannot be mapped for devices: {needed} more mappings are needed and the VFIO \
         container takes {left} more beside the {made} it has; raise its limit before Busway \
         starts: `echo {} > /sys/module/vfio_iommu_type1/parameters/dma_entry_limit`",
        made.saturating_add(*needed).saturating_mul(2).max(65_535)
    )]
    TooMany {
        /// Whose memory.
        owner: String,
        /// How many more there have to be.
        needed: u64,
        /// How many more there can be.
        left: u64,
        /// How many there are.
        made: u64,
    },
    /// the host's kernel cannot map a device for others
    #[error("{owner} at {range} cannot be reached by other devices: {why}")]
    NoPeerToPeer {
        /// Whose memory.
        owner: String,
        /// Where.
        range: IovaRange,
        /// Why, and what helps.
        why: String,
    },
    /// the limit of locked memory
    #[error("{owner} at {range} cannot be pinned for devices: {source}")]
    Memlock {
        /// Whose memory.
        owner: String,
        /// Where.
        range: IovaRange,
        /// Which limit, and what to set.
        source: MemlockError,
    },
    /// the host's memory is used up
    #[error(
        "{owner} at {range} cannot be pinned for devices: the host has not enough free memory; \
         give the guest less, or free some"
    )]
    OutOfMemory {
        /// Whose memory.
        owner: String,
        /// Where.
        range: IovaRange,
    },
    /// {what} failed for {owner} at {range}: {source}
    #[error("{what} failed for {owner} at {range}: {source}")]
    Kernel {
        /// The ioctl.
        what: &'static str,
        /// Whose memory.
        owner: String,
        /// Where.
        range: IovaRange,
        /// Why.
        source: io::Error,
    },
}
