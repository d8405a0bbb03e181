//! The kernel's side of the machine: VM, vCPUs, memory slots, interrupt routes and exit dispatch.

mod address_map;
mod cores;
mod doorbell;
mod error;
mod gate;
mod irq;
mod kick;
mod memslots;
mod pins;
mod places;
mod run;
mod shared_lines;
mod stats_fd;
mod vcpus;
mod vfio;
mod vm;
mod wires;

pub use address_map::{AddressMap, BusDevice, Overlap};
pub use cores::Cores;
pub use doorbell::{Doorbell, Doorbells};
pub use error::KvmError;
pub(crate) use irq::lend;
pub use irq::{IrqRouter, LevelLine, VectorCount};
pub use memslots::Memslots;
pub use pins::Pins;
pub use places::{given_processors, keep_from, keep_from_none};
pub use run::{Buses, ExitKind, VcpuEvent};
pub use shared_lines::{SharedLines, SharedPin};
pub use vcpus::{EventSink, VcpuSeen, Vcpus};
pub use vfio::KvmVfio;
pub use vm::Vm;
