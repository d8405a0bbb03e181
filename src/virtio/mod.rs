//! Virtio 1.x devices over PCI: disk, network card, console and entropy source.
//!
//! [`VirtioPci`] is the transport: a [`PciFunction`](busway_pci::PciFunction) that negotiates, keeps
//! the registers and runs the device's workers. A [`VirtioDevice`] is what sits behind it. Each has
//! its own threads; no request is served on a vCPU's.
//!
//! A guest's rings and requests are hostile: what breaks a queue's rules ends the worker and sets
//! `DEVICE_NEEDS_RESET`, what merely asks for too much is answered with an error.

pub mod blk;
pub mod console;
mod device;
mod interrupts;
pub mod net;
mod pci;
mod queue;
pub mod rng;
mod segments;
pub mod spec;
#[cfg(test)]
mod testing;
mod worker;

pub use device::{Activation, DeviceConfig, VirtioDevice, Worker};
pub use interrupts::Interrupts;
pub use pci::{QueueRegisters, Registers, VirtioPci, VirtioPciError};
pub use queue::{QueueError, Virtqueue};
