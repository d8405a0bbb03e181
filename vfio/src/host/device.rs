//! One PCI device as sysfs shows it.

use std::collections::BTreeMap;
use std::path::Path;

use busway_pci::Bdf;

use super::error::HostError;
use super::root::{self, SysRoot};

/// A PCI function of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostDevice {
    /// Where it sits.
    pub address: Bdf,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem device id.
    pub subsystem_device: u16,
    /// Base class, subclass and programming interface: `0x010802` for NVMe.
    pub class: u32,
    /// The driver it is bound to.
    pub driver: Option<String>,
    /// The driver that alone may take it, where one was set.
    pub driver_override: Option<String>,
    /// IOMMU group; none where no IOMMU translates for it.
    pub group: Option<u32>,
    /// NUMA node, where the firmware says one.
    pub numa_node: Option<u32>,
    /// BARs 0 to 5 and the expansion ROM, those that there are.
    pub resources: Vec<Resource>,
    /// Where it can make virtual functions.
    pub sriov: Option<Sriov>,
    /// Where it is a virtual function: what made it.
    pub physical_function: Option<Bdf>,
    /// Its node in `/dev/vfio/devices`, where VFIO has it and the kernel makes such nodes.
    pub vfio_cdev: Option<String>,
}

/// A range of addresses that a device decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resource {
    /// 0 to 5 for a BAR, 6 for the expansion ROM.
    pub index: u8,
    /// Bytes.
    pub size: u64,
    /// The kernel's `IORESOURCE_*` flags (linux/ioport.h).
    pub flags: u64,
}

/// Single-root I/O virtualisation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sriov {
    /// Virtual functions that it can make.
    pub total: u16,
    /// Virtual functions that there are.
    pub functions: Vec<Bdf>,
}

impl HostDevice {
    /// Whether it is a bridge to another bus, which no guest can be given.
    ///
    /// PCI Code and ID Assignment 1.15 §1.7: PCI-to-PCI, CardBus and semi-transparent bridges, those
    /// whose header is not of type 0.
    #[must_use]
    pub fn is_bridge(&self) -> bool {
        matches!(self.class >> 8, 0x0604 | 0x0607 | 0x0609)
    }

    /// Whether a VFIO driver has it.
    #[must_use]
    pub fn is_with_vfio(&self) -> bool {
        self.driver.as_deref().is_some_and(is_vfio_driver)
    }
}

/// Whether a driver is `vfio-pci` or one of the variants made on it, such as `mlx5_vfio_pci`.
#[must_use]
pub fn is_vfio_driver(name: &str) -> bool {
    name.replace('_', "-").ends_with("vfio-pci")
}

/// Every device of the host.
pub(super) fn read_all(root: &SysRoot) -> Result<BTreeMap<Bdf, HostDevice>, HostError> {
    let folder = root.bus().join("devices");
    let names =
        root::try_names(&folder).map_err(|source| HostError::NoPciBus { folder, source })?;
    let addresses = names.iter().filter_map(|name| root::full_address(name));
    Ok(addresses
        .filter_map(|address| Some((address, read(root, address)?)))
        .collect())
}

/// One device; none where it is not there, or has just vanished.
fn read(root: &SysRoot, address: Bdf) -> Option<HostDevice> {
    let folder = root.device(address);
    let id = |name: &str| Some(root::hex(&folder.join(name))? as u16);
    Some(HostDevice {
        address,
        vendor: id("vendor")?,
        device: id("device")?,
        subsystem_vendor: id("subsystem_vendor").unwrap_or(0),
        subsystem_device: id("subsystem_device").unwrap_or(0),
        class: root::hex(&folder.join("class"))?,
        driver: root.driver_of(address),
        driver_override: root.override_of(address),
        group: root::link_name(&folder.join("iommu_group")).and_then(|name| name.parse().ok()),
        // -1 where the firmware says nothing.
        numa_node: root::number(&folder.join("numa_node")),
        resources: root::text(&folder.join("resource"))
            .map_or_else(Vec::new, |text| resources(&text)),
        sriov: sriov(&folder),
        physical_function: link_address(&folder.join("physfn")),
        vfio_cdev: root::names(&folder.join("vfio-dev")).into_iter().next(),
    })
}

fn link_address(path: &Path) -> Option<Bdf> {
    root::link_name(path)?.parse().ok()
}

fn sriov(folder: &Path) -> Option<Sriov> {
    Some(Sriov {
        total: root::number(&folder.join("sriov_totalvfs"))?,
        functions: root::names(folder)
            .iter()
            .filter(|name| name.starts_with("virtfn"))
            .filter_map(|name| link_address(&folder.join(name)))
            .collect(),
    })
}

/// The sysfs attribute `resource`: a line `START END FLAGS` for each, all zero where absent.
fn resources(text: &str) -> Vec<Resource> {
    let number = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    (0..7u8)
        .zip(text.lines())
        .filter_map(|(index, line)| {
            let mut words = line.split_whitespace().map(number);
            let (start, end, flags) = (words.next()??, words.next()??, words.next()??);
            (end > start).then(|| Resource {
                index,
                size: (end - start).saturating_add(1),
                flags,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_are_those_that_the_device_decodes() {
        let text = "0x00000000fe000000 0x00000000fe003fff 0x0000000000140204\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    nonsense\n\
                    0x0000000000000000 0xffffffffffffffff 0x0000000000040200\n";
        let sizes: Vec<_> = resources(text).iter().map(|r| (r.index, r.size)).collect();
        assert_eq!(sizes, [(0, 0x4000), (3, u64::MAX)]);
    }

    #[test]
    fn variants_of_vfio_pci_count_as_vfio() {
        for name in ["vfio-pci", "mlx5_vfio_pci", "hisi-acc-vfio-pci"] {
            assert!(is_vfio_driver(name), "{name}");
        }
        for name in ["nvme", "pci-stub", "vfio-platform"] {
            assert!(!is_vfio_driver(name), "{name}");
        }
    }
}
