//! Who may DMA where: the IOMMU mappings of a VM, over the kernel's two interfaces for them.
//!
//! A [`Space`] is one set of mappings from I/O virtual addresses to this process's memory. It is a
//! VFIO Type1 container ([`Container`]) or an iommufd I/O address space ([`Ioas`]), and belongs to the
//! VM: it outlives the devices that are attached to it, and a device that comes after the last one
//! left finds everything mapped. [`DmaSpace`] is what the memory code sees of it.
//!
//! The crate opens groups ([`Group`]), for attaching one is what starts a container, but not devices:
//! those are `busway-vfio`'s. `unsafe` stands in [`info`] and the private module `sys`.

mod advice;
mod command;
mod device_folder;
mod dma;
mod error;
mod group;
mod holders;
pub mod info;
pub mod ioctl;
mod iommufd;
mod ledger;
mod mediated;
mod memlock;
mod obstacle;
mod ranges;
mod remapping;
mod reserved;
mod root;
mod space;
mod stats;
mod sys;
mod text;
mod tracker;
mod type1;
mod way;

pub use advice::{IommuAdvice, ParameterChange};
pub use command::{Command, Output, Program, Word};
pub use device_folder::DeviceFolder;
pub use dma::{Access, DmaSpace, HostVa, Iova, OpenDmaBuf};
pub use error::{MapError, OpenError};
pub use group::{Group, is_of_chipset, is_vfio_driver, keeps_group, not_viable};
pub use holders::{holder, holders, remember_holders};
pub use iommufd::Ioas;
pub use mediated::{PCI_API, ParseUuidError, Uuid};
pub use memlock::MemlockError;
pub use obstacle::{FIRMWARE_REMEDY, Node, Obstacle};
pub use ranges::{IovaRange, keep_clear};
pub use remapping::Remapping;
pub use reserved::reserved_ranges;
pub use root::{SysRoot, link_name};
pub use space::{IommufdMode, Space, SpaceKind};
pub use stats::Stats;
pub use sys::effective_user;
pub use text::{one_line, printable, process_name};
pub use tracker::{Backing, DmaMapping, Tracker};
pub use type1::Container;
pub use way::Way;
