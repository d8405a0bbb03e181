//! Busway: a virtual machine monitor that gives guests real PCI devices.

pub mod cli;
pub mod config;
pub mod kvm;
pub mod memory;
pub mod report;
