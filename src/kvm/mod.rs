//! The kernel's side of the machine: VM, vCPUs, memory slots, interrupt routes and exit dispatch.

mod address_map;

pub use address_map::{AddressMap, BusDevice, Overlap};
