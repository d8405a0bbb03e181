//! Why the kernel would not bind a device to the VM's iommufd (`VFIO_DEVICE_BIND_IOMMUFD`).
//!
//! The call claims the device's group, asks whether interrupts are isolated, and opens the device:
//! each of its errnos has causes in several of these (drivers/iommu/iommufd/device.c,
//! iommufd_device_bind; drivers/vfio/device_cdev.c, vfio_df_ioctl_bind_iommufd).

use std::io;
use std::path::PathBuf;
use std::slice;

use crate::{DeviceError, HostName};
use busway_iommu::{Obstacle, OpenError, Remapping, SysRoot, holder, holders, not_viable};

/// The module whose parameters rule iommufd.
pub(crate) const MODULE: &str = "iommufd";

/// A device that was to be bound.
#[derive(Debug)]
pub(crate) struct Binding<'a> {
    pub(crate) paths: &'a SysRoot,
    pub(crate) name: HostName,
    pub(crate) group: Option<u32>,
    /// Its character device.
    pub(crate) node: PathBuf,
    /// Its descriptor was inherited: whoever opened it may have it open still.
    pub(crate) inherited: bool,
}

impl Binding<'_> {
    /// What the kernel's answer means, but for EACCES, which is about VF tokens.
    pub(crate) fn refused(self, error: io::Error) -> DeviceError {
        let (paths, name) = (self.paths, self.name);
        let failed = |source| DeviceError::Open { name, source };
        let attach = |obstacle| {
            failed(OpenError::Attach {
                what: "it".to_owned(),
                obstacle,
            })
        };
        let number = error.raw_os_error();
        // EPERM: a driver of the host's has a part of the group; EBUSY: somebody has the group open.
        if matches!(number, Some(libc::EPERM | libc::EBUSY))
            && let Some(error) = self.group.and_then(|group| not_viable(paths, group))
        {
            return failed(error);
        }
        match (number, self.group) {
            (Some(libc::ETIMEDOUT), _) if name.is_mediated() => DeviceError::TimedOut { name },
            (Some(libc::EPERM), _) => attach(self.not_permitted(error)),
            (Some(libc::EBUSY), Some(group)) => DeviceError::Busy {
                name,
                holder: holder(paths, &[paths.group(group)]),
            },
            (Some(libc::EINVAL), group) => {
                let firmware = group.and_then(|group| Obstacle::firmware(paths, group));
                match firmware {
                    Some(firmware) => attach(firmware),
                    None if !self.inherited
                        && !holders(paths, slice::from_ref(&self.node)).is_empty() =>
                    {
                        DeviceError::Busy {
                            name,
                            holder: holder(paths, &[self.node]),
                        }
                    }
                    None => DeviceError::NotBound {
                        name,
                        path: self.node,
                    },
                }
            }
            _ => DeviceError::Kernel {
                name,
                what: "VFIO_DEVICE_BIND_IOMMUFD",
                source: error,
            },
        }
    }

    /// What EPERM means where all of the group is with VFIO: interrupts are not isolated, which is
    /// asked first, or another iommufd has claimed the group through another member.
    fn not_permitted(&self, error: io::Error) -> Obstacle {
        let obstacle = Obstacle::attaching(self.paths, MODULE, self.group, error);
        let members = self.other_members();
        if !matches!(obstacle, Obstacle::InterruptRemapping { .. }) || members.is_empty() {
            return obstacle;
        }
        let (names, folders): (Vec<_>, Vec<_>) = members.into_iter().unzip();
        let nodes = folders
            .iter()
            .filter_map(|folder| self.paths.cdev_node(folder));
        let in_use = Obstacle::GroupInUse {
            holder: holder(self.paths, &nodes.collect::<Vec<_>>()),
            members: names.join(" or "),
        };
        match Remapping::read(self.paths) {
            _ if Remapping::is_waived(self.paths, MODULE) => in_use,
            Remapping::On => in_use,
            Remapping::Off => obstacle,
            Remapping::Unknown => Obstacle::Either(Box::new(in_use), Box::new(obstacle)),
        }
    }

    /// The other members of its group that VFIO has: name, and folder in sysfs.
    fn other_members(&self) -> Vec<(String, PathBuf)> {
        let own = self.name.to_string();
        let members = self.group.map(|group| self.paths.members(group));
        let members = members.into_iter().flatten();
        let others =
            members.filter(|(name, folder)| *name != own && self.paths.is_with_vfio(folder));
        others.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    const REMAPPED: &str = " 24:  0  IR-PCI-MSI-0000:00:1f.2  0-edge  ahci\n";
    const NOT_REMAPPED: &str = " 24:  0  PCI-MSI-0000:00:1f.2  0-edge  ahci\n";

    /// A host with a device in group 7.
    struct Made {
        _root: tempfile::TempDir,
        paths: SysRoot,
    }

    impl Made {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let paths = SysRoot::under(root.path());
            fs::create_dir_all(&paths.proc).unwrap();
            let made = Self { _root: root, paths };
            made.member("0000:01:00.0", "vfio-pci");
            made
        }

        fn group(&self) -> PathBuf {
            self.paths.sys.join("kernel/iommu_groups/7")
        }

        fn member(&self, address: &str, driver: &str) {
            let folder = self.group().join("devices").join(address);
            fs::create_dir_all(&folder).unwrap();
            symlink(Path::new("/drivers").join(driver), folder.join("driver")).unwrap();
        }

        fn interrupts(&self, text: &str) {
            fs::write(self.paths.proc.join("interrupts"), text).unwrap();
        }

        fn binding(&self) -> Binding<'_> {
            Binding {
                paths: &self.paths,
                name: HostName::Pci("0000:01:00.0".parse().unwrap()),
                group: Some(7),
                node: self.paths.dev.join("vfio/devices/vfio3"),
                inherited: false,
            }
        }

        fn reported(&self, number: i32) -> String {
            let error = io::Error::from_raw_os_error(number);
            self.binding().refused(error).to_string()
        }
    }

    fn says(text: &str, words: &[&str]) {
        for word in words {
            assert!(text.contains(word), "no {word:?} in: {text}");
        }
    }

    #[test]
    fn a_device_that_may_not_be_bound_lacks_remapping_or_shares_its_group_with_another_vm() {
        const REMEDY: &str = "module/iommufd/parameters/allow_unsafe_interrupts";
        let made = Made::new();
        for interrupts in ["", REMAPPED, NOT_REMAPPED] {
            made.interrupts(interrupts);
            says(
                &made.reported(libc::EPERM),
                &["no interrupt remapping", REMEDY],
            );
        }
        made.member("0000:01:00.1", "vfio-pci");
        says(
            &made.reported(libc::EPERM),
            &["no interrupt remapping", REMEDY],
        );
        const OTHER: &str = "has 0000:01:00.1, of the same IOMMU group";
        made.interrupts(REMAPPED);
        let text = made.reported(libc::EPERM);
        says(&text, &[OTHER]);
        assert!(!text.contains("remapping"), "{text}");
        made.interrupts("");
        says(&made.reported(libc::EPERM), &["either ", OTHER, REMEDY]);
        made.interrupts(NOT_REMAPPED);
        let parameter = made.paths.allow_unsafe_interrupts(MODULE);
        fs::create_dir_all(parameter.parent().unwrap()).unwrap();
        fs::write(parameter, "Y\n").unwrap();
        says(&made.reported(libc::EPERM), &[OTHER]);
    }

    #[test]
    fn a_mediated_device_whose_driver_is_silent_is_told_of_by_what_that_waits_for() {
        let made = Made::new();
        let reported = |name: &str| {
            let mut binding = made.binding();
            binding.name = name.parse().unwrap();
            let error = io::Error::from_raw_os_error(libc::ETIMEDOUT);
            binding.refused(error).to_string()
        };
        let text = reported("bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3");
        says(&text, &["bd8d9d2b", "-uuid UUID", "nvidia-vgpu-mgr"]);
        says(
            &reported("0000:01:00.0"),
            &["VFIO_DEVICE_BIND_IOMMUFD failed"],
        );
    }

    #[test]
    fn a_device_whose_group_is_not_free_or_is_open_is_told_by_the_group() {
        let made = Made::new();
        says(
            &made.reported(libc::EBUSY),
            &["in use by another process", "/dev/vfio/7`"],
        );
        made.member("0000:01:00.1", "nvme");
        for number in [libc::EBUSY, libc::EPERM] {
            let words = ["0000:01:00.1 is bound to nvme", "busway device bind"];
            says(&made.reported(number), &words);
        }
    }

    #[test]
    fn an_invalid_binding_is_what_firmware_keeps_or_a_device_in_use_or_all_that_it_can_be() {
        let made = Made::new();
        let words = ["in use", "fuser -v", "devices/vfio3", "dmesg"];
        says(&made.reported(libc::EINVAL), &words);
        let process = made.paths.proc.join("4711");
        fs::create_dir_all(process.join("fd")).unwrap();
        symlink(made.binding().node, process.join("fd/3")).unwrap();
        let text = made.reported(libc::EINVAL);
        says(&text, &["is in use by process 4711"]);
        let mut inherited = made.binding();
        inherited.inherited = true;
        let error = io::Error::from_raw_os_error(libc::EINVAL);
        says(&inherited.refused(error).to_string(), &["dmesg"]);
        let regions = "0x00000000000e0000 0x00000000000e0fff direct\n";
        fs::write(made.group().join("reserved_regions"), regions).unwrap();
        says(&made.reported(libc::EINVAL), &["RMRR", "0xe0000", "conrep"]);
    }
}
