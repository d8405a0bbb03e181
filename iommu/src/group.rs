//! An IOMMU group: the functions that the host's IOMMU cannot tell apart, given away as one.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{VFIO_GROUP_FLAGS_CONTAINER_SET, VFIO_GROUP_FLAGS_VIABLE};

use crate::{Container, Obstacle, OpenError, SysRoot, sys};

/// A group that is attached to a container. Dropping it takes it out: every descriptor of its
/// devices has to be closed by then, so devices hold their group.
#[derive(Debug)]
pub struct Group {
    file: File,
    number: u32,
    container: Arc<Container>,
}

impl Group {
    /// Opens the group numbered `number` and attaches it. The kernel lets a group be opened once.
    ///
    /// # Errors
    /// [`OpenError`]; [`OpenError::NotViable`] names the members in the way.
    pub fn open(
        paths: &SysRoot,
        number: u32,
        container: &Arc<Container>,
    ) -> Result<Self, OpenError> {
        let path = paths.group(number);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|error| OpenError::Node {
                obstacle: Obstacle::opening(paths, &path, error),
                path,
            })?;
        Self::from_file(paths, file, number, container)
    }

    /// Attaches the group numbered `number`, which is open already.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn from_file(
        paths: &SysRoot,
        file: File,
        number: u32,
        container: &Arc<Container>,
    ) -> Result<Self, OpenError> {
        let flags = sys::group_status(&file).map_err(|source| OpenError::Kernel {
            what: format!("VFIO_GROUP_GET_STATUS on IOMMU group {number}"),
            source,
        })?;
        check_status(paths, number, flags)?;
        container.attach(&file, number)?;
        Ok(Self {
            file,
            number,
            container: container.clone(),
        })
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Opens the device called `name`, a PCI address as sysfs writes it.
    ///
    /// # Errors
    /// The kernel's: EBUSY where the device is open already, ENODEV where it is gone or not bound to
    /// a VFIO driver.
    pub fn device(&self, name: &str) -> io::Result<OwnedFd> {
        sys::group_device(&self.file, name)
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.container.detach(&self.file, self.number);
    }
}

/// That a group with these flags (`VFIO_GROUP_GET_STATUS`) can be attached.
fn check_status(paths: &SysRoot, group: u32, flags: u32) -> Result<(), OpenError> {
    if flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
        return Err(OpenError::NotViable {
            group,
            blockers: blockers(paths, group)
                .unwrap_or_else(|| "the kernel does not say by whom; see `dmesg`".to_owned()),
        });
    }
    // Whoever opened a descriptor that was inherited may have gone on with it.
    if flags & VFIO_GROUP_FLAGS_CONTAINER_SET != 0 {
        return Err(OpenError::HasContainer { group });
    }
    Ok(())
}

/// The error that says who keeps a group from being given away; nothing where nobody does.
#[must_use]
pub fn not_viable(paths: &SysRoot, group: u32) -> Option<OpenError> {
    let blockers = blockers(paths, group)?;
    Some(OpenError::NotViable { group, blockers })
}

/// The members of a group that keep it from being given away, each with its driver, and the commands
/// that free them all.
fn blockers(paths: &SysRoot, group: u32) -> Option<String> {
    let (mut names, mut devices, mut commands) = (Vec::new(), Vec::new(), Vec::new());
    let mut chipset = Vec::new();
    for (address, folder) in paths.members(group) {
        let driver = paths.driver_of(&folder);
        let Some(driver) = driver.filter(|driver| keeps_group(driver)) else {
            continue;
        };
        names.push(format!("{address} is bound to {driver}"));
        match &*driver {
            // A bridge cannot be given away.
            "shpchp" => commands.push(format!(
                "`echo {address} > /sys/bus/pci/drivers/shpchp/unbind`"
            )),
            _ if is_on_root_bus(&folder) && is_of_chipset(class_of(&folder)) => {
                chipset.push(address)
            }
            _ => devices.push(address),
        }
    }
    if !chipset.is_empty() {
        return Some(format!(
            "{}: the host works by {} (functions of its chipset), so that nothing of this group can be \
             given away",
            names.join(", "),
            chipset.join(", ")
        ));
    }
    if !devices.is_empty() {
        commands.push(format!("`busway device bind {}`", devices.join(" ")));
    }
    (!names.is_empty()).then(|| format!("{}: {}", names.join(", "), commands.join(" and ")))
}

/// Whether a device of this class (its 24 bits), where it is on a root bus, is one by which the host itself
/// works: the bridge to the ISA bus, which carries the firmware's chip and the power management, the
/// SMBus, the firmware's flash memory, and the host bridge (PCI Code and ID Assignment 1.15 §1.7, §1.13).
#[must_use]
pub fn is_of_chipset(class: u32) -> bool {
    matches!(class >> 8, 0x0600 | 0x0601 | 0x0c05 | 0x0c80)
}

/// The class of the device in a folder of sysfs; 0 where it does not say.
fn class_of(folder: &Path) -> u32 {
    let text = fs::read_to_string(folder.join("class")).unwrap_or_default();
    let digits = text.trim().trim_start_matches("0x");
    u32::from_str_radix(digits, 16).unwrap_or(0)
}

/// Whether no bridge is above the device: its folder is in a host bridge's, `pci0000:00`.
fn is_on_root_bus(folder: &Path) -> bool {
    let real = folder.canonicalize().ok();
    let above = real
        .as_deref()
        .and_then(Path::parent)
        .and_then(Path::file_name);
    above.is_some_and(|name| name.as_encoded_bytes().starts_with(b"pci"))
}

/// Whether a device with this driver keeps its IOMMU group from being given away.
///
/// The kernel lends a group to user space while each member's driver leaves DMA alone: none, those
/// that set `driver_managed_dma` (VFIO's, `pci-stub` and the PCIe ports' own), but not the hot-plug
/// driver of a conventional bridge (`shpchp`). drivers/pci/pci-driver.c, pci_dma_configure.
#[must_use]
pub fn keeps_group(driver: &str) -> bool {
    !is_vfio_driver(driver) && !matches!(driver, "pci-stub" | "pcieport")
}

/// Whether a driver is `vfio-pci` or one of the variants made on it, such as `mlx5_vfio_pci`.
#[must_use]
pub fn is_vfio_driver(name: &str) -> bool {
    name.replace('_', "-").ends_with("vfio-pci")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn who_blocks_a_group_is_named_with_the_way_out() {
        let root = tempfile::tempdir().unwrap();
        let paths = SysRoot {
            sys: root.path().join("sys"),
            ..SysRoot::default()
        };
        for (address, driver) in [
            ("0000:00:1f.0", Some("lpc_ich")),
            ("0000:00:1c.0", Some("pcieport")),
            ("0000:00:1e.0", Some("shpchp")),
            ("0000:00:1f.2", Some("vfio-pci")),
            ("0000:00:1f.3", None),
        ] {
            let folder = root
                .path()
                .join("sys/kernel/iommu_groups/9/devices")
                .join(address);
            fs::create_dir_all(&folder).unwrap();
            if let Some(driver) = driver {
                symlink(
                    format!("../../bus/pci/drivers/{driver}"),
                    folder.join("driver"),
                )
                .unwrap();
            }
        }
        assert_eq!(
            not_viable(&paths, 9).unwrap().to_string(),
            "IOMMU group 9 cannot be given away while others use parts of it: 0000:00:1e.0 is bound \
             to shpchp, 0000:00:1f.0 is bound to lpc_ich: `echo 0000:00:1e.0 > \
             /sys/bus/pci/drivers/shpchp/unbind` and `busway device bind 0000:00:1f.0`"
        );
        assert!(not_viable(&paths, 8).is_none());
    }

    #[test]
    fn a_group_with_a_function_of_the_chipset_has_no_way_out() {
        let root = tempfile::tempdir().unwrap();
        let paths = SysRoot::under(root.path());
        let group = root.path().join("sys/kernel/iommu_groups/9/devices");
        fs::create_dir_all(&group).unwrap();
        for (address, driver, class) in [
            ("0000:00:1f.0", "lpc_ich", "0x060100"),
            ("0000:00:1f.2", "ahci", "0x010601"),
        ] {
            let folder = root.path().join("sys/devices/pci0000:00").join(address);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("class"), format!("{class}\n")).unwrap();
            let to = format!("../../../bus/pci/drivers/{driver}");
            symlink(to, folder.join("driver")).unwrap();
            symlink(&folder, group.join(address)).unwrap();
        }
        assert_eq!(
            not_viable(&paths, 9).unwrap().to_string(),
            "IOMMU group 9 cannot be given away while others use parts of it: 0000:00:1f.0 is bound \
             to lpc_ich, 0000:00:1f.2 is bound to ahci: the host works by 0000:00:1f.0 (functions of \
             its chipset), so that nothing of this group can be given away"
        );
    }

    #[test]
    fn a_group_that_is_in_a_container_is_not_attached_to_another() {
        let reported =
            |flags| check_status(&SysRoot::default(), 7, flags).map_err(|e| e.to_string());
        assert_eq!(reported(VFIO_GROUP_FLAGS_VIABLE), Ok(()));
        let text = reported(VFIO_GROUP_FLAGS_VIABLE | VFIO_GROUP_FLAGS_CONTAINER_SET).unwrap_err();
        assert!(
            text.starts_with("IOMMU group 7 is in somebody's container"),
            "{text}"
        );
        assert!(reported(0).unwrap_err().contains("cannot be given away"));
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
