//! The guest's RAM: where it lies, where it comes from, and who hears when it changes.
//!
//! This module knows nothing of KVM or VFIO. They listen to the list of regions.

mod area;
mod backing;
mod ballooned;
mod blocks;
mod discard;
mod error;
mod files;
mod host;
mod huge_blocks;
mod huge_pages;
mod mapped;
mod pieces;
mod pluggable;
mod prefault;
mod ram;
mod regions;

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

pub use area::{Area, Place};
pub use ballooned::{Ballooned, ReturnError};
pub use blocks::{Blocks, Plugged};
pub use discard::{Discarded, Discards};
pub(crate) use error::Amount;
pub use error::RamError;
pub use files::{FileMemory, FileMemoryError, Slots};
pub(crate) use huge_pages::default_huge_page;
pub(crate) use mapped::unmap_unused;
pub use pluggable::{PlugError, Pluggable};
pub use prefault::PrefaultError;
pub use ram::Ram;
pub use regions::{Peer, Region, RegionError, RegionKind, RegionListener, Regions, RegionsError};

/// One state of the guest's RAM: the regions and where they are mapped in this process.
pub type RamMap = GuestMemoryMmap<()>;

/// A handle to the guest's RAM, cheap to clone; `memory()` gives the present [`RamMap`].
pub type GuestRam = GuestMemoryAtomic<RamMap>;
