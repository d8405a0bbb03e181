//! The host's side of passing a device through: which PCI devices there are, what uses them, and
//! moving them between the host's own drivers and VFIO.
//!
//! Everything is read below a [`SysRoot`], and every change goes through [`Kernel`], so that a
//! made-up host serves as well as the real one. Opening a device for a guest is not done here.

mod bind;
mod check;
mod device;
mod error;
mod iommu;
mod kernel;
mod modules;
mod permit;
mod root;
mod steps;
mod unbind;
mod usage;

use std::collections::BTreeMap;

use busway_pci::Bdf;

pub use bind::{Bound, VFIO_PCI, bind};
pub use check::{GroupBlocker, Refusal, check_bind, check_unbind};
pub use device::{HostDevice, Link, LinkState, Resource, Sriov, is_vfio_driver};
pub use error::{BindError, HostError, RefusedError, Stranded, UnbindError};
pub use iommu::IommuAdvice;
pub use kernel::{Kernel, LinuxKernel};
pub use modules::{Aliases, Availability, availability};
pub use permit::{Permit, Permits};
pub use root::SysRoot;
pub use steps::{Step, StepError};
pub use unbind::{Unbound, unbind};
pub use usage::{InterfaceAddress, Process, Usage};

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
        let devices = device::read_all(root)?;
        let usage = usage::read_all(root, &devices);
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

    /// What uses the device at `address`.
    #[must_use]
    pub fn usage(&self, address: Bdf) -> &[Usage] {
        self.usage.get(&address).map_or(&[], Vec::as_slice)
    }

    /// The members of an IOMMU group, by address.
    pub fn group(&self, group: u32) -> impl Iterator<Item = &HostDevice> {
        self.devices().filter(move |d| d.group == Some(group))
    }
}
