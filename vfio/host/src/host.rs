//! The model of a host: its devices, and what uses each.

use std::collections::BTreeMap;
use std::thread;

use busway_iommu::Uuid;
use busway_pci::Bdf;

use super::asker::Asker;
use super::device::{self, HostDevice, HostError};
use super::finding::Finding;
use super::mediated::{self, MediatedDevice, MediatedType};
use super::root::{self, SysRoot};
use super::usage::{self, Usage};
use super::{framebuffer, surroundings};

/// The PCI devices of a host and what uses each, as they were when read.
#[derive(Clone, Debug)]
pub struct Host {
    pub(super) root: SysRoot,
    devices: BTreeMap<Bdf, HostDevice>,
    usage: BTreeMap<Bdf, Vec<Usage>>,
    mediated: Vec<MediatedDevice>,
    mediated_types: Vec<MediatedType>,
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
            mediated: mediated::devices(root),
            mediated_types: mediated::types(root),
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

    /// The mediated devices, by name.
    #[must_use]
    pub fn mediated_devices(&self) -> &[MediatedDevice] {
        &self.mediated
    }

    /// The mediated device called `uuid`.
    #[must_use]
    pub fn mediated_device(&self, uuid: Uuid) -> Option<&MediatedDevice> {
        self.mediated.iter().find(|device| device.uuid == uuid)
    }

    /// The kinds of mediated devices that the host's devices offer, by device and by kind.
    #[must_use]
    pub fn mediated_types(&self) -> &[MediatedType] {
        &self.mediated_types
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

    /// What taking the device at `address` from its driver would break.
    pub(super) fn breaks(&self, address: Bdf) -> Vec<Usage> {
        let uses = self.usage(address).iter().filter(|u| u.prevents_bind());
        let mut uses: Vec<_> = uses.cloned().collect();
        // A route that goes by an interface says more than what the interface is part of.
        let routes = uses.iter().filter_map(Usage::route);
        let routes: Vec<_> = routes.map(<[String]>::to_vec).collect();
        uses.retain(|usage| match usage {
            // A route of the interface's own says nothing of what stands on it.
            Usage::Interface { chain, .. } => !routes
                .iter()
                .any(|route| route.len() > 1 && Usage::leads_by(route, chain)),
            _ => true,
        });
        let shows = |usage: &Usage| matches!(usage, Usage::BootDisplay);
        if !uses.iter().any(shows) && framebuffer::holder(&self.root, address).is_some() {
            uses.push(Usage::BootDisplay);
        }
        // A program that has a node open need not be who has the disk for themselves.
        let explains = |usage: &Usage| !matches!(usage, Usage::Opened { .. });
        if !uses.iter().any(explains) {
            let offspring = self.devices().map(|device| device.address);
            let offspring = offspring.filter(|other| self.makers(*other).contains(&address));
            let all = offspring.chain([address]);
            uses.extend(all.filter_map(|one| usage::claimed_disk(&self.root, one)));
        }
        // Virtual functions are removed only once nothing uses them.
        uses.sort_by_key(|usage| {
            matches!(
                usage,
                Usage::VirtualFunctions { .. } | Usage::Representors { .. }
            )
        });
        uses
    }

    /// What of the uses the caller may not see, where that is so.
    #[must_use]
    pub fn unseen(&self) -> Option<Finding> {
        surroundings::processes(&Asker::read(&self.root))
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
