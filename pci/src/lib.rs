//! What PCI is, to a guest: addresses, configuration space, BARs, interrupts, bridges and the ways
//! a guest reaches them (ECAM and the CF8/CFC ports).
//!
//! The crate is pure state: it opens no file and maps no memory. What has to happen outside is asked
//! for through the traits it owns: [`BarMapper`] makes a BAR reachable, [`InterruptRoutes`] carries a
//! message to the guest. Everything that a guest writes is hostile input here; nothing panics on it.

#![forbid(unsafe_code)]

mod address;
mod bars;
mod capability;
mod config;
mod function;
mod interrupt;
mod msi;
mod msix;
pub mod spec;

pub use address::{Bdf, Bus, Device, Function, ParseBdfError, Segment};
pub use bars::{BarError, Bars};
pub use capability::{
    Capability, ConfigRead, ExtendedCapability, capabilities, extended_capabilities,
};
pub use config::{ConfigSpace, Identity, Register};
pub use function::{
    BarIndex, BarKind, BarMapper, BarPart, BarRegion, Bridge, HostAddress, PciFunction,
};
pub use interrupt::{InterruptRoute, InterruptRoutes, MsiMessage, RouteError, VectorOwner};
pub use msi::{Msi, MsiFeatures};
pub use msix::{Msix, MsixLocation};
