//! One host device, as a PCI function.
//!
//! [`Opener`] opens a device that is bound to a VFIO driver, by its group or as a character device,
//! and attaches it to the VM's DMA space. What comes out is a [`DeviceIo`]: regions, interrupts,
//! reset. [`AssignedFunction`] makes a PCI function of one for the guest: what of its configuration
//! space is the device's and what is Busway's, which parts of its BARs need no exit, and how its
//! interrupts get to the guest.
//!
//! Which devices a host has, what uses them, and moving them between the host's drivers and VFIO is
//! `busway-host`'s.
//!
//! `unsafe` stands in the private modules `sys` (the kernel's calls) and `mapping` (device memory).

mod access;
mod aer;
mod areas;
mod atomics;
mod attachment;
mod clique;
mod config;
mod device_io;
mod event_fd;
mod events;
#[cfg(any(test, feature = "hostile"))]
#[cfg_attr(not(test), allow(dead_code, reason = "the tests use more of it"))]
mod fake;
mod function;
mod held_up;
mod host_name;
#[cfg(any(test, feature = "hostile"))]
pub mod hostile;
mod hot_reset;
mod inherited;
mod kernel_device;
mod kvm;
mod lists;
mod mapping;
mod msix_layout;
mod open;
mod patience;
mod peers;
mod pin;
mod policy;
mod power;
mod quirks;
mod refusal;
mod reset;
mod resets;
mod rom;
mod survey;
mod sys;
mod unmask;
mod vectors;
mod vf_token;
mod wiring;

pub use aer::{ErrorCounts, ErrorStatus, Uncorrectable, is_silent};
pub use areas::Area;
pub use device_io::{DeviceIo, DeviceRegion, IrqError, IrqIndex, IrqInfo, RegionIndex};
pub use event_fd::EventFd;
pub use events::DeviceEvents;
pub use function::{AssignedFunction, AssignedSight, Summary};
pub use host_name::{HostName, ParseHostNameError};
pub use inherited::{Inherited, InheritedError, interface};
pub use kernel_device::KernelDevice;
pub use kvm::KvmFiles;
pub use mapping::Mapping;
pub use open::{Claimed, DeviceError, Joined, Opener};
pub use peers::try_peers;
pub use reset::{Affected, FunctionReset, ResetMethod};
pub use resets::Resets;
pub use rom::{RomChoice, RomError, RomImage};
pub use survey::SurveyError;
pub use sys::adopt;
pub use unmask::begin_threads_with;
pub use vf_token::{ParseVfTokenError, TokenUse, VfToken};
pub use wiring::{AssignOptions, Placement, Wiring};
