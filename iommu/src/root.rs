//! Where the host's files are: the kernel's file systems and what the host keeps, or a test's made-up host.

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{Uuid, is_vfio_driver, one_line};

/// The folders that everything about the host is read below: the real ones, or a made-up tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SysRoot {
    /// sysfs
    pub sys: PathBuf,
    /// procfs
    pub proc: PathBuf,
    /// Device nodes.
    pub dev: PathBuf,
    /// What is kept until the host is switched off.
    pub run: PathBuf,
    /// The host's configuration.
    pub etc: PathBuf,
    /// The kernels' modules, a folder for each release.
    pub modules: PathBuf,
}

impl Default for SysRoot {
    fn default() -> Self {
        Self::under(Path::new("/"))
    }
}

impl SysRoot {
    /// The usual names in one folder.
    #[must_use]
    pub fn under(folder: &Path) -> Self {
        Self {
            sys: folder.join("sys"),
            proc: folder.join("proc"),
            dev: folder.join("dev"),
            run: folder.join("run"),
            etc: folder.join("etc"),
            modules: folder.join("lib/modules"),
        }
    }

    /// The VFIO container device. linux/vfio.h
    #[must_use]
    pub fn container(&self) -> PathBuf {
        self.dev.join("vfio/vfio")
    }

    /// The device of the group numbered `group`.
    #[must_use]
    pub fn group(&self, group: u32) -> PathBuf {
        self.dev.join("vfio").join(group.to_string())
    }

    /// The nodes through which a group, or a device of it, is open to whoever has it.
    #[must_use]
    pub fn nodes_of_group(&self, group: u32) -> Vec<PathBuf> {
        let members = self.members(group).into_iter();
        let devices = members.filter_map(|(_, folder)| self.cdev_node(&folder));
        [self.group(group)].into_iter().chain(devices).collect()
    }

    /// The iommufd device. linux/iommufd.h
    #[must_use]
    pub fn iommufd(&self) -> PathBuf {
        self.dev.join("iommu")
    }

    /// The VFIO character device of the PCI function whose folder in sysfs is `device`: the node's
    /// path, where the kernel has made one (`CONFIG_VFIO_DEVICE_CDEV`, and a VFIO driver is bound) and
    /// it is here.
    #[must_use]
    pub fn cdev(&self, device: &Path) -> Option<PathBuf> {
        self.cdev_node(device).filter(|node| node.exists())
    }

    /// As [`cdev`](Self::cdev), whether or not the node can be seen from here.
    #[must_use]
    pub fn cdev_node(&self, device: &Path) -> Option<PathBuf> {
        let name = fs::read_dir(device.join("vfio-dev"))
            .ok()?
            .filter_map(Result::ok)
            .map(|entry| entry.file_name())
            .find(|name| name.as_encoded_bytes().starts_with(b"vfio"))?;
        Some(self.dev.join("vfio/devices").join(name))
    }

    /// The parameter of `module` by which devices are lent though their interrupts are not remapped.
    #[must_use]
    pub fn allow_unsafe_interrupts(&self, module: &str) -> PathBuf {
        let parameters = self.sys.join("module").join(module).join("parameters");
        parameters.join("allow_unsafe_interrupts")
    }

    /// The folder in sysfs of the PCI bus.
    #[must_use]
    pub fn bus(&self) -> PathBuf {
        self.sys.join("bus/pci")
    }

    /// The folder in sysfs of the PCI function at `address`, which has its domain: `0000:01:00.0`.
    #[must_use]
    pub fn device(&self, address: impl Display) -> PathBuf {
        self.bus().join("devices").join(address.to_string())
    }

    /// The folder in sysfs of a PCI driver.
    #[must_use]
    pub fn driver(&self, name: &str) -> PathBuf {
        self.bus().join("drivers").join(name)
    }

    /// Whether this process is in the initial user namespace, where alone its capabilities count for
    /// the whole host: root of a container has them in vain. There alone does `uid_map` map every id
    /// onto itself. A kernel without user namespaces has no such file: there is one space of ids.
    #[must_use]
    pub fn is_in_initial_user_namespace(&self) -> bool {
        match fs::read_to_string(self.proc.join("self/uid_map")) {
            Ok(map) => {
                let all = ["0", "0", &u32::MAX.to_string()];
                map.split_whitespace().eq(all)
            }
            Err(_) => true,
        }
    }

    /// Whether an IOMMU translates for any device of the host.
    #[must_use]
    pub fn has_iommu(&self) -> bool {
        fs::read_dir(self.sys.join("kernel/iommu_groups")).is_ok_and(|groups| {
            groups
                .flatten()
                .any(|group| !Self::is_without_iommu(&group.path()))
        })
    }

    /// Whether the IOMMU group whose folder in sysfs is `group` is one that VFIO made for a device
    /// that no IOMMU translates for (drivers/vfio/group.c, vfio_noiommu_group_alloc).
    #[must_use]
    pub fn is_without_iommu(group: &Path) -> bool {
        fs::read(group.join("name")).is_ok_and(|name| name.trim_ascii() == b"vfio-noiommu")
    }

    /// The IOMMU group of the PCI function whose folder in sysfs is `device`.
    #[must_use]
    pub fn group_of(&self, device: &Path) -> Option<u32> {
        link_name(&device.join("iommu_group"))?.parse().ok()
    }

    /// The name of the driver that the function at `device` is bound to.
    #[must_use]
    pub fn driver_of(&self, device: &Path) -> Option<String> {
        link_name(&device.join("driver"))
    }

    /// Whether VFIO has the device at `device`: its driver is one of VFIO's for PCI functions or, of a
    /// mediated device, any, for to lend it is what these are for.
    #[must_use]
    pub fn is_with_vfio(&self, device: &Path) -> bool {
        let driver = self.driver_of(device);
        driver.is_some_and(|driver| is_vfio_driver(&driver) || Uuid::of_device(device).is_some())
    }

    /// The functions of a group: the name (a PCI address) and the folder of each, in order.
    #[must_use]
    pub fn members(&self, group: u32) -> Vec<(String, PathBuf)> {
        let folder = self
            .sys
            .join("kernel/iommu_groups")
            .join(group.to_string())
            .join("devices");
        let mut members: Vec<_> = fs::read_dir(folder)
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
            .map(|entry| {
                (
                    entry.file_name().to_string_lossy().into_owned(),
                    entry.path(),
                )
            })
            .collect();
        members.sort();
        members
    }
}

/// The last component of what a link leads to, on one line; `None` where it is no link.
#[must_use]
pub fn link_name(link: &Path) -> Option<String> {
    let target = fs::read_link(link).ok()?;
    Some(one_line(&target.file_name()?.to_string_lossy()))
}
