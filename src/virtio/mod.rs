//! Virtio 1.x devices over PCI: disk, network card, console, entropy source, sockets and persistent memory.
//!
//! [`VirtioPci`] is the transport: a [`PciFunction`](busway_pci::PciFunction) that negotiates, keeps
//! the registers, and starts and stops the device. A [`VirtioDevice`] is what sits behind it. Each has
//! its own threads; no request is served on a vCPU's. [`life`] says what a start and a stop are.
//!
//! A guest's rings and requests are hostile: what breaks a queue's rules ends the worker and sets
//! `DEVICE_NEEDS_RESET`, what merely asks for too much is answered with an error.

mod activation;
pub mod balloon;
pub mod blk;
mod chain;
mod config_space;
pub mod console;
mod counts;
mod device;
mod error;
#[cfg(any(test, feature = "hostile"))]
pub mod hostile;
mod interrupts;
pub mod life;
mod limiter;
pub mod net;
mod pci;
pub mod pmem;
mod queue;
mod retired;
pub mod rng;
mod segments;
pub mod spec;
#[cfg(test)]
pub(crate) mod testing;
mod vhost;
pub mod vhost_user;
pub mod vsock;
mod worker;

pub use self::vhost::{KernelError, MemoryTable, VhostError};
pub use activation::Activation;
pub use config_space::{ChangeListener, ConfigSpace};
pub use counts::{
    Counts, DiskTotals, DriverState, NetTotals, ServedBy, Sight, Totals, TransferTotals, VirtioSeen,
};
pub use device::VirtioDevice;
pub use error::{QueueError, StartError};
pub use pci::{QueueRegisters, Registers, StateError, VirtioPci, VirtioPciError, VirtioPciState};
pub use queue::{Call, QueueSetup};
