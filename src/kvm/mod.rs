//! The kernel's side of the machine: VM, vCPUs, memory slots, interrupt routes and exit dispatch.

mod address_map;
mod doorbell;
mod error;
mod irq;
mod memslots;
mod vfio;
mod vm;

pub use address_map::{AddressMap, BusDevice, Overlap};
pub use doorbell::{Doorbell, Doorbells};
pub use error::KvmError;
pub use irq::{IrqRouter, LevelLine, VectorCount};
pub use memslots::Memslots;
pub use vfio::KvmVfio;
pub use vm::Vm;
