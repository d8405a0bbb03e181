//! An IOMMU group: the functions that the host's IOMMU cannot tell apart, given away as one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vfio_bindings::bindings::vfio::VFIO_GROUP_FLAGS_VIABLE;

use crate::{Container, HostPaths, Obstacle, OpenError, sys};

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
        paths: &HostPaths,
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
        let flags = sys::group_status(&file).map_err(|source| OpenError::Kernel {
            what: format!("VFIO_GROUP_GET_STATUS on IOMMU group {number}"),
            source,
        })?;
        if flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(OpenError::NotViable {
                group: number,
                blockers: blockers(paths, number)
                    .unwrap_or_else(|| "the kernel does not say by whom; see `dmesg`".to_owned()),
            });
        }
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

/// The error that says who keeps a group from being given away; nothing where nobody does.
#[must_use]
pub fn not_viable(paths: &HostPaths, group: u32) -> Option<OpenError> {
    let blockers = blockers(paths, group)?;
    Some(OpenError::NotViable { group, blockers })
}

/// The members of a group that keep it from being given away, each with its driver, and the command
/// that frees them all. Bridges are exempt, and so is what no driver is bound to.
fn blockers(paths: &HostPaths, group: u32) -> Option<String> {
    let (names, addresses): (Vec<String>, Vec<String>) = paths
        .members(group)
        .into_iter()
        .filter_map(|(address, folder)| {
            let driver = paths.driver_of(&folder)?;
            let exempt = driver.contains("vfio") || driver == "pci-stub" || is_bridge(&folder);
            (!exempt).then(|| (format!("{address} is bound to {driver}"), address))
        })
        .unzip();
    (!names.is_empty()).then(|| {
        format!(
            "{}: `busway device bind {}`",
            names.join(", "),
            addresses.join(" ")
        )
    })
}

/// Base class 06h: a bridge. PCI Code and ID Assignment Specification 1.15 §1.7
fn is_bridge(folder: &std::path::Path) -> bool {
    std::fs::read_to_string(folder.join("class"))
        .is_ok_and(|class| class.trim().trim_start_matches("0x").starts_with("0604"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn who_blocks_a_group_is_named_with_the_way_out_and_bridges_are_exempt() {
        let root = tempfile::tempdir().unwrap();
        let paths = HostPaths {
            sys: root.path().join("sys"),
            ..HostPaths::default()
        };
        for (address, class, driver) in [
            ("0000:00:1f.0", "0x060100", Some("lpc_ich")),
            ("0000:00:1c.0", "0x060400", Some("pcieport")),
            ("0000:00:1f.2", "0x010601", Some("vfio-pci")),
            ("0000:00:1f.3", "0x0c0500", None),
        ] {
            let folder = root
                .path()
                .join("sys/kernel/iommu_groups/9/devices")
                .join(address);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("class"), format!("{class}\n")).unwrap();
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
            "IOMMU group 9 cannot be given away while others use parts of it: 0000:00:1f.0 is bound \
             to lpc_ich: `busway device bind 0000:00:1f.0`"
        );
        assert!(not_viable(&paths, 8).is_none());
    }
}
