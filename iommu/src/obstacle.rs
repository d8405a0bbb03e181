//! Why the kernel said no, and what to do about it.
//!
//! An errno is shared by causes that have nothing in common but the number. What tells them apart
//! stands in sysfs and procfs; this module looks there once something has failed, and only then.

use std::fmt;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::{IommuAdvice, IovaRange, SysRoot, holder, reserved};

/// What lets the kernel lend a device that firmware keeps.
pub const FIRMWARE_REMEDY: &str = "turn that use off in the firmware's set-up (HPE: shared memory of \
                                   the slot, by conrep; RAID controllers and BMCs: their health \
                                   reports)";

/// What stands in the way; its text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Obstacle {
    /// the kernel has no module …
    #[error(
        "the kernel module {module} is not loaded: run `modprobe {module}` \
         (a kernel that lacks it was built without {option})"
    )]
    Module {
        /// The module.
        module: &'static str,
        /// The option of the kernel's configuration that builds it.
        option: &'static str,
    },
    /// the kernel has made the node, and it is not here
    #[error(
        "the kernel has it, and there is no such node here: let the container or unit have it \
         (docker: --device {path}), or, where this is the host, see that udev runs"
    )]
    NotHere {
        /// The node.
        path: PathBuf,
    },
    /// the host's IOMMU is off
    #[error("the host has no IOMMU in use: {0}")]
    NoIommu(IommuAdvice),
    /// the node's owner and mode forbid it
    #[error(
        "permission denied: it belongs to {node}; run as root, or {}", way_in(path, *user)
    )]
    Permission {
        /// The node.
        path: PathBuf,
        /// Its owner and mode.
        node: Node,
        /// Who runs Busway.
        user: u32,
    },
    /// the device cgroup forbids it
    #[error(
        "the device cgroup forbids it although the file's mode ({node}) allows it: let the \
         container or unit use character device {major}:{minor} (systemd: DeviceAllow={path}; \
         docker: --device {path})"
    )]
    DeviceCgroup {
        /// The node.
        path: PathBuf,
        /// Its owner and mode.
        node: Node,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// somebody else has it
    #[error("it is in use by {holder}: end that first")]
    Busy {
        /// The process, as well as it can be told.
        holder: String,
    },
    /// the host does not remap interrupts
    #[error(
        "the host cannot isolate the device's interrupts (no interrupt remapping): turn it on in \
         the firmware's set-up and leave `intremap=off` and `nointremap` off the host's command \
         line; or, where every guest is trusted, `echo Y > {parameter}`"
    )]
    InterruptRemapping {
        /// The module parameter that waives it.
        parameter: PathBuf,
    },
    /// the firmware demands the device for itself
    #[error(
        "the firmware keeps {:#x} to {:#x} for a use of its own of {devices} (an RMRR or IVMD), and \
         the kernel does not lend such a one: {FIRMWARE_REMEDY}",
        range.start, range.last
    )]
    Firmware {
        /// What is kept.
        range: IovaRange,
        /// For which devices.
        devices: String,
    },
    /// another process has a part of the group
    #[error(
        "{holder} has {members}, of the same IOMMU group, which goes to one alone: end that first"
    )]
    GroupInUse {
        /// The process, as well as it can be told.
        holder: String,
        /// The members that it could have.
        members: String,
    },
    /// one of two, and nothing tells which
    #[error("either {0}; or {1}")]
    Either(Box<Self>, Box<Self>),
    /// anything else, with a hint
    #[error("{source}: {hint}")]
    Hinted {
        /// Why.
        source: io::Error,
        /// What helps.
        hint: &'static str,
    },
    /// anything else
    #[error("{0}")]
    Other(io::Error),
}

/// Who owns a device node and who may use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Owner's id.
    pub uid: u32,
    /// Group's id.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
}

/// How a user comes to the node at `path` that is not theirs.
fn way_in(path: &Path, user: u32) -> String {
    let lent = path.parent().and_then(Path::file_name);
    match lent.and_then(|folder| folder.to_str()) {
        // A group's or a device's, which udev makes anew with each binding.
        Some("vfio" | "devices") if !path.ends_with("vfio/vfio") => format!(
            "have it given to your user with the device: `busway device bind --user {user}` and the device's address, \
             as root; `chown {user} {}` does for as long as it is bound",
            path.display()
        ),
        _ => format!(
            "give it to your user: `chown {user} {}`, or to a group of theirs, as the package's udev rules give it to kvm",
            path.display()
        ),
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { uid, gid, mode } = self;
        write!(f, "user {uid}, group {gid}, mode {mode:04o}")
    }
}

/// A kernel module, and the option that builds it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Module(pub(crate) &'static str, pub(crate) &'static str);

pub(crate) const VFIO_PCI: Module = Module("vfio-pci", "CONFIG_VFIO_PCI");
pub(crate) const VFIO_TYPE1: Module = Module("vfio_iommu_type1", "CONFIG_VFIO_IOMMU_TYPE1");
pub(crate) const IOMMUFD: Module = Module("iommufd", "CONFIG_IOMMUFD");

impl Obstacle {
    /// Why the node at `path`, which `module` makes, could not be opened.
    #[must_use]
    pub fn opening(paths: &SysRoot, path: &Path, error: io::Error) -> Self {
        Self::opening_made_by(paths, path, VFIO_PCI, error)
    }

    pub(crate) fn opening_made_by(
        paths: &SysRoot,
        path: &Path,
        module: Module,
        error: io::Error,
    ) -> Self {
        let Module(module, option) = module;
        match error.raw_os_error() {
            Some(libc::ENOENT) if is_made(paths, path) => Self::NotHere {
                path: path.to_owned(),
            },
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                if !paths.has_iommu() {
                    return no_iommu(paths);
                }
                Self::Module { module, option }
            }
            Some(libc::EACCES | libc::EPERM) => {
                let user = crate::sys::effective_user();
                let Ok(meta) = std::fs::metadata(path) else {
                    return Self::Other(error);
                };
                let node = Node {
                    uid: meta.uid(),
                    gid: meta.gid(),
                    mode: meta.mode() & 0o7777,
                };
                // The device cgroup answers EPERM, and to root as well; the mode answers EACCES.
                if error.raw_os_error() == Some(libc::EPERM) && meta.file_type().is_char_device() {
                    let device = meta.rdev();
                    return Self::DeviceCgroup {
                        path: path.to_owned(),
                        node,
                        major: libc::major(device),
                        minor: libc::minor(device),
                    };
                }
                Self::Permission {
                    path: path.to_owned(),
                    node,
                    user,
                }
            }
            Some(libc::EBUSY) => Self::Busy {
                holder: holder(paths, &keepers(paths, path)),
            },
            _ => Self::Other(error),
        }
    }

    /// Why a device of `group` could not be attached to an address space, or not bound to an iommufd.
    /// `module` is the one whose `allow_unsafe_interrupts` waives interrupt remapping.
    #[must_use]
    pub fn attaching(paths: &SysRoot, module: &str, group: Option<u32>, error: io::Error) -> Self {
        let number = error.raw_os_error();
        // What firmware keeps is refused with EPERM before Linux 6.6 (intel_iommu_attach_device), with
        // EINVAL since (__iommu_device_set_domain).
        if matches!(number, Some(libc::EPERM | libc::EINVAL))
            && let Some(firmware) = group.and_then(|group| Self::firmware(paths, group))
        {
            return firmware;
        }
        match number {
            Some(libc::EPERM) => Self::InterruptRemapping {
                parameter: paths.allow_unsafe_interrupts(module),
            },
            Some(libc::EINVAL | libc::EADDRINUSE) => Self::Hinted {
                source: error,
                hint: "the IOMMU reserves addresses that are mapped already, or cannot serve this \
                       device beside the others; see `dmesg`",
            },
            Some(libc::ENODEV) if !paths.has_iommu() => no_iommu(paths),
            _ => Self::Other(error),
        }
    }

    /// That firmware keeps a device of `group` for itself, where it does.
    #[must_use]
    pub fn firmware(paths: &SysRoot, group: u32) -> Option<Self> {
        let reserved = reserved::for_firmware(paths, group)?;
        Some(Self::Firmware {
            range: reserved.range,
            devices: reserved.devices(),
        })
    }

    /// That the host's IOMMU is off, in the words of its processor.
    #[must_use]
    pub fn no_iommu(paths: &SysRoot) -> Self {
        no_iommu(paths)
    }
}

/// Whether the kernel has made the device whose node is to be at `path`, as sysfs shows to containers
/// that have no such node (drivers/vfio/container.c, group.c and vfio_main.c, drivers/iommu/iommufd/main.c).
fn is_made(paths: &SysRoot, path: &Path) -> bool {
    let class = paths.sys.join("class");
    let Ok(node) = path.strip_prefix(&paths.dev) else {
        return false;
    };
    let Some(name) = node.file_name() else {
        return false;
    };
    let class = if path == paths.container() || path == paths.iommufd() {
        class.join("misc")
    } else if node.starts_with("vfio/devices") {
        class.join("vfio-dev")
    } else {
        class.join("vfio")
    };
    class.join(name).exists()
}

fn no_iommu(paths: &SysRoot) -> Obstacle {
    Obstacle::NoIommu(IommuAdvice::read(paths))
}

/// The nodes by any of which, where it is open, `path` is kept from others: a group's by its devices', too.
fn keepers(paths: &SysRoot, path: &Path) -> Vec<PathBuf> {
    let name = path.file_name().and_then(|name| name.to_str());
    let group = name.and_then(|name| name.parse().ok());
    match group.filter(|&group| paths.group(group) == path) {
        Some(group) => paths.nodes_of_group(group),
        None => vec![path.to_owned()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn made_up() -> (tempfile::TempDir, SysRoot) {
        let root = tempfile::tempdir().unwrap();
        let paths = SysRoot::under(root.path());
        fs::create_dir_all(paths.sys.join("kernel/iommu_groups")).unwrap();
        fs::create_dir_all(&paths.proc).unwrap();
        (root, paths)
    }

    fn errno(number: i32) -> io::Error {
        io::Error::from_raw_os_error(number)
    }

    #[test]
    fn a_missing_node_is_a_missing_module_or_a_missing_iommu() {
        let (_root, paths) = made_up();
        fs::write(paths.proc.join("cpuinfo"), "vendor_id : AuthenticAMD").unwrap();
        let node = paths.container();
        let text = Obstacle::opening(&paths, &node, errno(libc::ENOENT)).to_string();
        assert!(text.contains("AMD-Vi"), "{text}");
        fs::create_dir(paths.sys.join("kernel/iommu_groups/0")).unwrap();
        let text = Obstacle::opening(&paths, &node, errno(libc::ENOENT)).to_string();
        assert!(text.contains("modprobe vfio-pci"), "{text}");
    }

    #[test]
    fn a_node_that_a_container_was_not_given_is_told_from_one_that_the_kernel_has_not_made() {
        let (_root, paths) = made_up();
        fs::create_dir(paths.sys.join("kernel/iommu_groups/7")).unwrap();
        let cdev = paths.dev.join("vfio/devices/vfio3");
        let nodes = [paths.container(), paths.iommufd(), paths.group(7), cdev];
        let classes = ["misc/vfio", "misc/iommu", "vfio/7", "vfio-dev/vfio3"];
        for (node, class) in nodes.iter().zip(classes) {
            let reported = || Obstacle::opening(&paths, node, errno(libc::ENOENT)).to_string();
            assert!(reported().contains("not loaded"), "{}", reported());
            fs::create_dir_all(paths.sys.join("class").join(class)).unwrap();
            let option = format!("docker: --device {}", node.display());
            assert!(reported().contains(&option), "{}", reported());
        }
    }

    #[test]
    fn a_denial_is_told_by_its_number_and_names_owner_or_cgroup() {
        let (_root, paths) = made_up();
        let null = Path::new("/dev/null");
        let text = Obstacle::opening(&paths, null, errno(libc::EPERM)).to_string();
        assert!(
            text.contains("device cgroup") && text.contains("1:3"),
            "{text}"
        );
        let text = Obstacle::opening(&paths, null, errno(libc::EACCES)).to_string();
        assert!(
            text.contains("mode 0666") && text.contains("chown"),
            "{text}"
        );
    }

    #[test]
    fn who_may_not_open_a_node_is_told_what_gives_it_to_them() {
        let node = Node {
            uid: 0,
            gid: 0,
            mode: 0o600,
        };
        let text = |path: &str| {
            let path = path.into();
            Obstacle::Permission {
                path,
                node,
                user: 1000,
            }
            .to_string()
        };
        for path in ["/dev/vfio/7", "/dev/vfio/devices/vfio3"] {
            let text = text(path);
            assert!(text.contains("user 0, group 0, mode 0600"), "{text}");
            assert!(text.contains("busway device bind --user 1000"), "{text}");
            assert!(text.contains(&format!("chown 1000 {path}")), "{text}");
        }
        for path in ["/dev/iommu", "/dev/vfio/vfio"] {
            let text = text(path);
            assert!(!text.contains("device bind"), "{text}");
            assert!(text.contains(&format!("chown 1000 {path}")), "{text}");
            assert!(text.contains("kvm"), "{text}");
        }
    }

    #[test]
    fn a_refused_attachment_is_what_firmware_keeps_or_interrupts_that_are_not_remapped() {
        let (_root, paths) = made_up();
        let group = paths.sys.join("kernel/iommu_groups/7");
        fs::create_dir_all(group.join("devices/0000:01:00.0")).unwrap();
        let reserve = |text| fs::write(group.join("reserved_regions"), text).unwrap();
        let reported = |number| {
            let error = errno(number);
            Obstacle::attaching(&paths, "vfio_iommu_type1", Some(7), error).to_string()
        };
        reserve("0x00000000000e0000 0x00000000000e0fff direct-relaxable\n");
        let text = reported(libc::EPERM);
        assert!(
            text.contains("no interrupt remapping")
                && text.contains("module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"),
            "{text}"
        );
        assert!(reported(libc::EINVAL).contains("reserves addresses that are mapped"));
        reserve("0x00000000000e0000 0x00000000000e0fff direct\n");
        for number in [libc::EPERM, libc::EINVAL] {
            let text = reported(number);
            assert!(
                text.starts_with("the firmware keeps 0xe0000 to 0xe0fff")
                    && text.contains("0000:01:00.0")
                    && text.contains("conrep"),
                "{text}"
            );
        }
    }

    #[test]
    fn whoever_holds_a_node_is_named() {
        let (_root, paths) = made_up();
        let process = paths.proc.join("4711");
        fs::create_dir_all(process.join("fd")).unwrap();
        fs::write(process.join("comm"), "qemu\n").unwrap();
        std::os::unix::fs::symlink(paths.group(7), process.join("fd/3")).unwrap();
        let reported =
            || Obstacle::opening(&paths, &paths.group(7), errno(libc::EBUSY)).to_string();
        assert_eq!(
            reported(),
            "it is in use by process 4711 (qemu): end that first"
        );
        // By a device of it, which keeps the group from others too.
        fs::remove_file(process.join("fd/3")).unwrap();
        let device = paths.sys.join("kernel/iommu_groups/7/devices/0000:01:00.0");
        fs::create_dir_all(device.join("vfio-dev/vfio3")).unwrap();
        let cdev = paths.cdev_node(&device).unwrap();
        let command = format!("fuser -v {} {}", paths.group(7).display(), cdev.display());
        assert!(reported().contains(&command), "{}", reported());
        std::os::unix::fs::symlink(cdev, process.join("fd/3")).unwrap();
        assert!(reported().contains("process 4711 (qemu)"), "{}", reported());
    }
}
