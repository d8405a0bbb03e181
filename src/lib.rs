//! Busway: a virtual machine monitor that gives guests real PCI devices.

mod accepting;
pub mod acpi;
pub mod arch;
pub mod cli;
pub mod config;
pub mod control;
pub mod devices;
pub mod exit;
pub mod firmware;
pub mod kvm;
pub mod machine;
pub mod memory;
mod monitor;
mod notify;
mod outflow;
pub mod preflight;
mod provoked;
pub mod report;
pub mod sandbox;
mod shortage;
mod signals;
pub mod smbios;
mod unix_socket;
pub mod virtio;
