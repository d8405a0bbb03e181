//! The host's side of passing a device through: which PCI devices there are, what uses them, and
//! moving them between the host's own drivers and VFIO.
//!
//! Everything is read below a [`SysRoot`], and every change goes through [`Kernel`], so that a
//! made-up host serves as well as the real one. Opening a device for a guest is not done here: that is
//! `busway-vfio`'s.
//!
//! `unsafe` stands in the private module `sys` (the kernel's calls).

mod acs;
mod asker;
mod at_boot;
mod bind;
mod boot;
mod called;
mod check;
mod device;
mod doctor;
pub mod files;
mod finding;
mod framebuffer;
mod host;
mod hugepages;
mod identity;
mod interrupt;
mod journal;
mod kernel;
mod lines;
mod lock;
mod mac;
mod mediated;
mod mediated_check;
mod modules;
mod netlink;
mod numa;
mod partly_served;
mod permit;
mod persist;
mod put_back;
mod ready;
mod refusal;
mod restore;
mod root;
mod session;
mod steps;
mod surroundings;
mod sys;
mod together;
mod unbind;
mod usage;
mod user;
mod variant;
mod vfs;

pub use at_boot::{AtBoot, AtBootError, NotBound, bind_persisted};
pub use bind::{BindError, BindOptions, Bound, bind};
pub use busway_iommu::{Command, IommuAdvice, Output, Program, Uuid, Word, is_vfio_driver};
pub use called::{Called, CalledError};
pub use check::{check_bind, check_unbind};
pub use device::{HostDevice, HostError, Link, LinkState, Resource, Sriov, resources_in};
pub use doctor::examine;
pub use finding::{Finding, Level, Remedy, worst};
pub use host::Host;
pub use hugepages::{
    HugePages, HugePagesError, HugePagesRefusal, Reserved, huge_pages, reserve_huge_pages,
};
pub use interrupt::{interrupted, note_interrupts};
pub use journal::JournalError;
pub use kernel::{Kernel, LinuxKernel, Readers, Standing};
pub use lock::LockError;
pub use mac::{Mac, ParseMacError};
pub use mediated::{MediatedDevice, MediatedParent, MediatedType};
pub use mediated_check::MediatedCheck;
pub use modules::{Aliases, Availability, availability};
pub use netlink::{VfSetting, VfState};
pub use numa::{NumaNode, cpu_list, numa_nodes};
pub use permit::{Permit, Permits};
pub use persist::{Persist, PersistError};
pub use put_back::Stranded;
pub use ready::{Check, DeviceCheck};
pub use refusal::{Refusal, RefusedError};
pub use restore::{Outcome, RestoreError, Restored, restore};
pub use root::{SysRoot, one_line};
pub use session::Session;
pub use steps::{Step, StepError};
pub use surroundings::{Opens, open_node};
pub use together::{GroupBlocker, Together};
pub use unbind::{UnbindError, Unbound, unbind};
pub use usage::{InterfaceAddress, Process, StorageServer, Usage};
pub use user::{NoUser, user_id};
pub use variant::VFIO_PCI;
pub use vfs::{Function, Functions, VfsError, VfsOptions, VfsRefusal, vfs};
