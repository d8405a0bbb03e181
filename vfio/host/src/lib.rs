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
mod bind;
mod boot;
mod called;
mod check;
mod device;
mod doctor;
pub mod files;
mod finding;
mod framebuffer;
mod hugepages;
mod interrupt;
mod journal;
mod kernel;
mod lines;
mod lock;
mod mac;
mod modules;
mod netlink;
mod partly_served;
mod permit;
mod persist;
mod put_back;
mod ready;
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

use std::collections::BTreeMap;
use std::thread;

use busway_pci::Bdf;

pub use bind::{BindError, BindOptions, Bound, VFIO_PCI, bind};
pub use busway_iommu::is_vfio_driver;
pub use busway_iommu::{Command, IommuAdvice, Output, Program, Word};
pub use called::{Called, CalledError};
pub use check::{GroupBlocker, Refusal, RefusedError, check_bind, check_unbind};
pub use device::{HostDevice, HostError, Link, LinkState, Resource, Sriov, resources_in};
pub use doctor::examine;
pub use finding::{Finding, Level, Remedy, worst};
pub use hugepages::{
    HugePages, HugePagesError, HugePagesRefusal, Reserved, huge_pages, reserve_huge_pages,
};
pub use interrupt::{interrupted, note_interrupts};
pub use journal::JournalError;
pub use kernel::{Kernel, LinuxKernel, Readers, Standing};
pub use lock::LockError;
pub use mac::{Mac, ParseMacError};
pub use modules::{Aliases, Availability, availability};
pub use netlink::{VfSetting, VfState};
pub use permit::{Permit, Permits};
pub use persist::{Persist, PersistError};
pub use put_back::Stranded;
pub use ready::{Check, DeviceCheck};
pub use restore::{Outcome, RestoreError, Restored, restore};
pub use root::{SysRoot, one_line};
pub use session::Session;
pub use steps::{Step, StepError};
pub use surroundings::{Opens, open_node};
pub use together::Together;
pub use unbind::{UnbindError, Unbound, unbind};
pub use usage::{InterfaceAddress, Process, Usage};
pub use user::{NoUser, user_id};
pub use vfs::{Function, Functions, VfsError, VfsOptions, VfsRefusal, vfs};

/// The PCI devices of a host and what uses each, as they were when read.
#[derive(Clone, Debug)]
pub struct Host {
    root: SysRoot,
    devices: BTreeMap<Bdf, HostDevice>,
    usage: BTreeMap<Bdf, Vec<Usage>>,
}

impl Host {
    /// Reads the host. A device that vanishes meanwhile is left out.
    ///
    /// What the caller may not see (another user's open files) is missing from the uses.
    ///
    /// # Errors
    ///
    /// Where sysfs has no PCI bus, or it cannot be read.
    pub fn read(root: &SysRoot) -> Result<Self, HostError> {
        // Disks and interfaces say themselves whose they are: they need not wait for the devices.
        let (devices, found) = thread::scope(|scope| {
            let found = scope.spawn(|| usage::find(root));
            (device::read_all(root), found.join().unwrap_or_default())
        });
        let devices = devices?;
        let usage = usage::of_devices(root, &devices, found);
        Ok(Self {
            root: root.clone(),
            devices,
            usage,
        })
    }

    /// Where it was read.
    #[must_use]
    pub fn root(&self) -> &SysRoot {
        &self.root
    }

    /// Every device, by address.
    pub fn devices(&self) -> impl Iterator<Item = &HostDevice> {
        self.devices.values()
    }

    /// The device at `address`.
    #[must_use]
    pub fn device(&self, address: Bdf) -> Option<&HostDevice> {
        self.devices.get(&address)
    }

    /// The module that a driver is of, which often has another name: `xhci_pci` for `xhci_hcd`.
    #[must_use]
    pub fn module_of(&self, driver: &str) -> Option<String> {
        root::link_name(&self.root.driver(driver).join("module"))
    }

    /// What uses the device at `address`.
    #[must_use]
    pub fn usage(&self, address: Bdf) -> &[Usage] {
        self.usage.get(&address).map_or(&[], Vec::as_slice)
    }

    /// What of the uses the caller may not see, where that is so.
    #[must_use]
    pub fn unseen(&self) -> Option<Finding> {
        surroundings::processes(&asker::Asker::read(&self.root))
    }

    /// The bridges above a device, from its root bus down.
    #[must_use]
    pub fn above(&self, device: &HostDevice) -> Vec<&HostDevice> {
        let mut bridges: Vec<&HostDevice> = Vec::new();
        let mut next = device.parent;
        while let Some(bridge) = next.and_then(|address| self.device(address)) {
            // PCI is a tree; what is read need not be one.
            if bridges.iter().any(|known| known.address == bridge.address) {
                break;
            }
            bridges.push(bridge);
            next = bridge.parent;
        }
        bridges.reverse();
        bridges
    }

    /// The devices whose drivers brought this one forth, the nearest first: the physical function of a
    /// virtual one, and what made its PCI domain. It ends when one of them loses its driver.
    #[must_use]
    pub fn makers(&self, address: Bdf) -> Vec<Bdf> {
        device::makers(&self.devices, address)
    }

    /// The IOMMU groups of several devices, in the order of their first one.
    #[must_use]
    pub fn shared_groups(&self) -> Vec<u32> {
        let mut counts = BTreeMap::new();
        for group in self.devices().filter_map(|device| device.group) {
            *counts.entry(group).or_insert(0_usize) += 1;
        }
        let mut shared = Vec::new();
        for group in self.devices().filter_map(|device| device.group) {
            if counts.get(&group).is_some_and(|count| *count > 1) && !shared.contains(&group) {
                shared.push(group);
            }
        }
        shared
    }

    /// The members of an IOMMU group, by address.
    pub fn group(&self, group: u32) -> impl Iterator<Item = &HostDevice> {
        self.devices().filter(move |d| d.group == Some(group))
    }
}
