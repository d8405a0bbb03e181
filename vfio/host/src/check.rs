//! What stands against moving a device to VFIO or back.

use std::collections::BTreeSet;

use busway_iommu::IommuAdvice;
use busway_pci::Bdf;

use super::device::HostDevice;
use super::host::Host;
use super::modules::module_parameter;
use super::permit::{Permit, Permits};
use super::refusal::Refusal;
use super::together::{Together, group_blockers};
use super::usage::Usage;

/// All that stands against giving these devices to VFIO together, but for what `permits` allows.
#[must_use]
pub fn check_bind(host: &Host, addresses: &BTreeSet<Bdf>, permits: &Permits) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let mut groups = BTreeSet::new();
    for &address in addresses {
        let Some(device) = host.device(address) else {
            refusals.push(Refusal::NotThere { address });
            continue;
        };
        if device.is_bridge() {
            refusals.push(Refusal::Bridge { address });
            continue;
        }
        if let Some(maker) = ends_with(host, device, addresses) {
            refusals.push(Refusal::EndsWith { address, maker });
            continue;
        }
        match device.group {
            Some(group) if !device.without_iommu => {
                groups.insert(group);
            }
            _ => refusals.push(Refusal::NoGroup {
                address,
                advice: IommuAdvice::read(&host.root),
            }),
        }
        // What VFIO has already is not taken from anybody.
        if !device.is_with_vfio() {
            if Denial::of(host, device) == Some(Denial::Stands) {
                refusals.push(Refusal::Denied { address });
            }
            let mut uses = host.breaks(address);
            uses.retain(|usage| Permit::of(usage).is_none_or(|permit| !permits.contains(&permit)));
            if !uses.is_empty() {
                refusals.push(Refusal::InUse { address, uses });
            }
        }
    }
    if permits.contains(&Permit::Group) {
        return refusals;
    }
    for group in groups {
        let blockers = group_blockers(host, group, addresses);
        if !blockers.is_empty() {
            let member = |device: &HostDevice| device.group == Some(group) && !device.is_bridge();
            let asked: Vec<_> = addresses
                .iter()
                .filter_map(|&address| host.device(address))
                .filter(|device| member(device))
                .collect();
            let Some(first) = asked.first() else {
                continue;
            };
            refusals.push(Refusal::GroupNotViable {
                group,
                together: Together::of(host, first, addresses),
                asked: asked.iter().map(|device| device.address).collect(),
                blockers,
            });
        }
    }
    refusals
}

/// All that stands against giving these devices back to the host, but for what `permits` allows.
#[must_use]
pub fn check_unbind(host: &Host, addresses: &BTreeSet<Bdf>, permits: &Permits) -> Vec<Refusal> {
    let check = |&address: &Bdf| {
        let Some(device) = host.device(address) else {
            return Some(Refusal::NotThere { address });
        };
        if !device.is_with_vfio() || permits.contains(&Permit::Open) {
            return None;
        }
        // A driver of the host is turned away from a group that a process owns, even where the
        // process uses another member of it; and virtual functions end with their physical one.
        let same_group = |other: &HostDevice| other.group.is_some() && other.group == device.group;
        let members = host.devices().filter(|other| {
            other.address == address
                || same_group(other)
                || other.physical_function == Some(address)
        });
        let uses = members.flat_map(|other| host.usage(other.address));
        let processes: BTreeSet<_> = uses
            .filter_map(|usage| match usage {
                Usage::Process(process) => Some(process.clone()),
                _ => None,
            })
            .collect();
        (!processes.is_empty()).then(|| Refusal::HeldOpen {
            address,
            processes: processes.into_iter().collect(),
        })
    };
    addresses.iter().filter_map(check).collect()
}

/// The one of `asked` with whose driver the PCI domain of `device` ends.
pub(super) fn ends_with(host: &Host, device: &HostDevice, asked: &BTreeSet<Bdf>) -> Option<Bdf> {
    let ends = |maker: &Bdf| asked.contains(maker);
    host.makers(device.address)
        .into_iter()
        .find(|maker| ends(maker) && Some(*maker) != device.physical_function)
}

/// What the host loses with a device, though that does not keep it from being taken.
pub(super) fn warnings(host: &Host, address: Bdf) -> Vec<String> {
    match host.device(address).is_none_or(HostDevice::is_with_vfio) {
        true => Vec::new(),
        false => host
            .usage(address)
            .iter()
            .filter_map(Usage::warning)
            .collect(),
    }
}

/// Devices that vfio-pci turns away: Intel's QuickAssist, DSA and IAX (drivers/vfio/pci/vfio_pci.c,
/// vfio_pci_dev_in_denylist).
const DENIED: [u16; 8] = [
    0x0435, 0x0443, 0x0b25, 0x0cfe, 0x19e2, 0x19e3, 0x37c8, 0x37c9,
];

/// What vfio-pci makes of a device with known faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Denial {
    /// vfio-pci refuses the device.
    Stands,
    /// A parameter of vfio-pci has it take the device all the same.
    Waived,
}

impl Denial {
    /// None for a device that it has nothing against.
    pub(super) fn of(host: &Host, device: &HostDevice) -> Option<Self> {
        if device.vendor != 0x8086 || !DENIED.contains(&device.device) {
            return None;
        }
        let parameter = module_parameter(&host.root, "vfio_pci", "disable_denylist");
        Some(match parameter.as_deref() {
            Some("Y" | "y" | "1" | "on") => Self::Waived,
            _ => Self::Stands,
        })
    }
}
