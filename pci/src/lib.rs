//! What PCI is, to a guest: addresses, configuration space, BARs, interrupts, bridges and the ways
//! a guest reaches them (ECAM and the CF8/CFC ports).
//!
//! The crate is pure state: it opens no file and maps no memory. What has to happen outside is asked
//! for through the traits it owns: [`BarMapper`] makes a BAR reachable, [`InterruptRoutes`] carries a
//! message to the guest. Everything that a guest writes is hostile input here; nothing panics on it.

#![forbid(unsafe_code)]

mod access;
mod activity;
mod address;
mod atomics;
mod bar;
mod bars;
mod capability;
mod complaints;
mod config;
mod connection;
#[cfg(test)]
mod fake;
mod function;
mod host_bridge;
mod interrupt;
mod intx;
mod link;
mod msi;
mod msix;
pub mod pace;
mod pin;
mod root_port;
mod slot;
pub mod spec;
mod topology;
mod windows;

pub use access::{Cf8Cfc, Ecam};
pub use activity::{Access, Activity, InterruptMode, Seen};
pub use address::{Bdf, Bus, Device, Function, ParseBdfError, RootSlot, Segment};
pub use atomics::AtomicOps;
pub use bar::{BarIndex, BarKind, BarRegion, PAGE_SIZE};
pub use bars::{BarError, Bars};
pub use capability::{
    Capability, ConfigRead, ExtendedCapability, capabilities, extended_capabilities,
};
pub use complaints::Complaints;
pub use config::{ConfigSpace, Identity, Register};
pub use function::{BarMapper, BarPart, Bridge, HostAddress, HotPlug, PciFunction};
pub use host_bridge::HostBridge;
pub use interrupt::{
    InterruptLevel, InterruptLine, InterruptLines, InterruptRoute, InterruptRoutes, MsiMessage,
    PinOwner, RouteError, VectorOwner,
};
pub use intx::{Intx, IntxState, IntxStateError, PinError};
pub use link::{Link, LinkSpeed};
pub use msi::{Msi, MsiFeatures};
pub use msix::{Msix, MsixLocation, MsixState, MsixStateError, VectorState};
pub use pin::InterruptPin;
pub use root_port::RootPort;
pub use slot::SlotListener;
pub use topology::{
    AssignError, Behind, FunctionId, Needs, NoRoom, Parent, Place, PlaceError, Topology,
    end_of_room, find_room,
};
pub use windows::{Reserve, WindowKind, Windows};
