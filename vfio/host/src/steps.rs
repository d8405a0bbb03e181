//! The single changes that a host is put through, and how each says itself when it fails.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use busway_iommu::Command;
use busway_pci::Bdf;

use super::kernel::Readers;
use super::netlink::VfSetting;
use super::persist::PersistError;
use super::root::{self, SysRoot};

/// One change to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Load a kernel module.
    Load {
        /// Its name, or a device's `modalias`.
        module: String,
    },
    /// Say which driver alone may take a device; none: any that matches.
    Override {
        /// The device.
        address: Bdf,
        /// The driver.
        driver: Option<String>,
    },
    /// Take a device from its driver. The kernel waits for whoever has it open by VFIO.
    Detach {
        /// The device.
        address: Bdf,
        /// The driver.
        driver: String,
    },
    /// Give a device to a driver.
    Attach {
        /// The device.
        address: Bdf,
        /// The driver.
        driver: String,
    },
    /// Let the kernel offer a device to the drivers that match it.
    Probe {
        /// The device.
        address: Bdf,
    },
    /// Give a node of VFIO's to a user.
    Own {
        /// The node.
        node: PathBuf,
        /// The user's id.
        user: u32,
    },
    /// Have a device make this many virtual functions.
    Functions {
        /// The device.
        address: Bdf,
        /// How many; 0 removes all.
        count: u16,
    },
    /// Say whether drivers of the host may take new virtual functions.
    Autoprobe {
        /// The device that makes them.
        address: Bdf,
        /// Whether they may.
        on: bool,
    },
    /// Set a virtual function.
    SetFunction {
        /// The physical function's network interface.
        interface: String,
        /// The function's number.
        vf: u32,
        /// What to set.
        setting: VfSetting,
    },
    /// Reserve huge pages.
    HugePages {
        /// The NUMA node; none: all.
        node: Option<u32>,
        /// The size of one, in bytes.
        size: u64,
        /// How many there are to be.
        count: u64,
    },
    /// Bring free memory together.
    Compact,
    /// Write a file that outlives this process, or remove it.
    File {
        /// The file.
        path: PathBuf,
        /// What is in it; none: it is removed.
        text: Option<Box<str>>,
        /// Who may read it.
        readers: Readers,
    },
}

/// What a step is to the kernel.
pub(super) enum Action<'a> {
    /// A value written to a sysfs attribute.
    Write(PathBuf, String),
    /// A module loaded.
    Load(&'a str),
    /// A node's owner changed.
    Own(&'a Path, u32),
    /// A virtual function set by its interface.
    SetFunction(&'a str, u32, VfSetting),
    /// A file written.
    Save(&'a Path, &'a str, Readers),
    /// A file removed.
    Remove(&'a Path),
}

impl Step {
    pub(super) fn action(&self, root: &SysRoot) -> Action<'_> {
        match self {
            Self::Load { module } => Action::Load(module),
            // An empty line clears it (drivers/base/driver.c, driver_set_override).
            Self::Override { address, driver } => Action::Write(
                root.device(*address).join("driver_override"),
                format!("{}\n", driver.as_deref().unwrap_or_default()),
            ),
            Self::Detach { address, driver } => {
                Action::Write(root.driver(driver).join("unbind"), address.to_string())
            }
            Self::Attach { address, driver } => {
                Action::Write(root.driver(driver).join("bind"), address.to_string())
            }
            Self::Probe { address } => {
                Action::Write(root.bus().join("drivers_probe"), address.to_string())
            }
            Self::Own { node, user } => Action::Own(node, *user),
            Self::Functions { address, count } => Action::Write(
                root.device(*address).join("sriov_numvfs"),
                count.to_string(),
            ),
            Self::Autoprobe { address, on } => Action::Write(
                root.device(*address).join("sriov_drivers_autoprobe"),
                u8::from(*on).to_string(),
            ),
            Self::SetFunction {
                interface,
                vf,
                setting,
            } => Action::SetFunction(interface, *vf, *setting),
            Self::HugePages { node, size, count } => Action::Write(
                root::huge_page_pool(root, *node, *size).join("nr_hugepages"),
                count.to_string(),
            ),
            Self::Compact => Action::Write(root.proc.join("sys/vm/compact_memory"), "1".to_owned()),
            Self::File {
                path,
                text: Some(text),
                readers,
            } => Action::Save(path, text, *readers),
            Self::File {
                path, text: None, ..
            } => Action::Remove(path),
        }
    }

    /// The step as a command for the shell.
    #[must_use]
    pub fn command(&self, root: &SysRoot) -> String {
        match self.action(root) {
            Action::Write(attribute, value) => Command::write(value.trim(), attribute).to_string(),
            Action::Load(module) => Command::new(["modprobe"]).operand(module).to_string(),
            Action::Own(node, user) => Command::new(["chown"])
                .operand(user.to_string())
                .operand(node)
                .to_string(),
            Action::SetFunction(interface, vf, setting) => {
                let command = Command::new(["ip", "link", "set", "dev"]).operand(interface);
                let command = command.operand("vf").operand(vf.to_string());
                let setting = setting.to_string();
                command.operands(setting.split(' ')).to_string()
            }
            Action::Remove(path) => Command::new(["rm"]).operand(path).to_string(),
            Action::Save(path, text, _) => {
                let to = Command::new(["cat"]).output_to(path);
                format!("{to} <<'END'\n{text}END")
            }
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Load { module } => write!(f, "load the module {module}"),
            Self::Override {
                address,
                driver: Some(driver),
            } => write!(f, "reserve {address} for {driver}"),
            Self::Override {
                address,
                driver: None,
            } => write!(f, "open {address} to any driver"),
            Self::Detach { address, driver } => write!(f, "take {address} from {driver}"),
            Self::Attach { address, driver } => write!(f, "give {address} to {driver}"),
            Self::Probe { address } => write!(f, "offer {address} to the host's drivers"),
            Self::Own { node, user } => write!(f, "give {} to user {user}", node.display()),
            Self::Functions { address, count: 0 } => {
                write!(f, "remove the virtual functions of {address}")
            }
            Self::Functions { address, count } => {
                write!(f, "have {address} make {count} virtual functions")
            }
            Self::Autoprobe { address, on: true } => {
                write!(
                    f,
                    "let the host's drivers have new virtual functions of {address}"
                )
            }
            Self::Autoprobe { address, .. } => {
                write!(
                    f,
                    "keep new virtual functions of {address} from the host's drivers"
                )
            }
            Self::SetFunction {
                interface,
                vf,
                setting,
            } => write!(f, "set VF {vf} of {interface} to {setting}"),
            Self::HugePages { node, size, count } => {
                write!(f, "reserve {count} huge pages of {} KiB", size / 1024)?;
                match node {
                    Some(node) => write!(f, " on node {node}"),
                    None => Ok(()),
                }
            }
            Self::Compact => f.write_str("bring free memory together"),
            Self::File {
                path, text: None, ..
            } => write!(f, "remove {}", path.display()),
            Self::File { path, .. } => write!(f, "write {}", path.display()),
        }
    }
}

/// A step that could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// cannot {step}: writing to {attribute}: {source}. {remedy}
    #[error("cannot {step}: writing to {}: {source}\n  {}", attribute.display(), remedy(.step, .source))]
    Write {
        /// What was to be done.
        step: Step,
        /// The sysfs attribute.
        attribute: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// cannot {step}: {source}. {remedy}
    #[error("cannot {step}: {source}\n  {}", file_remedy(.source))]
    File {
        /// What was to be done.
        step: Step,
        /// Why not.
        source: io::Error,
    },
    /// cannot {step}: {source}. {remedy}
    #[error("cannot {step}: {source}\n  {}", interface_remedy(.source))]
    Interface {
        /// What was to be done.
        step: Step,
        /// The driver's answer.
        source: io::Error,
    },
    /// cannot {step}: {source}
    #[error("cannot {step}: {source}\n  {}", module_remedy(.source))]
    Load {
        /// What was to be done.
        step: Step,
        /// Why not.
        source: io::Error,
    },
    /// cannot {step}: the kernel took the request, but the device is with {now}
    #[error(
        "cannot {step}: the kernel took the request, but the device is with {}\n  \
         see what the driver says: dmesg | grep {address}",
        now.as_deref().unwrap_or("no driver")
    )]
    WithoutEffect {
        /// What was to be done.
        step: Step,
        /// The device.
        address: Bdf,
        /// The driver that it is bound to instead.
        now: Option<String>,
    },
    /// A device's rule for udev would hold what it must not.
    #[error(transparent)]
    Rule(#[from] Box<PersistError>),
    /// interrupted, before it could {step}
    #[error("interrupted, before it could {step}")]
    Interrupted {
        /// What was to be done next.
        step: Step,
    },
}

/// What to do about the kernel's refusal to take a value.
fn remedy(step: &Step, error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOMEM | libc::EIO) if matches!(step, Step::Functions { .. }) => {
            "the firmware left them no addresses: turn SR-IOV on in its set-up, or boot the kernel \
             with pci=realloc"
        }
        Some(libc::ENOENT) if matches!(step, Step::Functions { .. }) => {
            "its driver makes no virtual functions"
        }
        Some(libc::EPERM | libc::EACCES) => "only root may: run it with sudo",
        Some(libc::EROFS) => {
            "sysfs is mounted read-only here, as in a container: run it on the host itself"
        }
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            "the device or its driver has just gone away: see `busway device list`"
        }
        Some(libc::EBUSY) => {
            "somebody uses the device or its IOMMU group: see `busway device list`"
        }
        _ => "the kernel's log may say more: dmesg | tail",
    }
}

fn interface_remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => "only root may: run it with sudo",
        Some(libc::EOPNOTSUPP) => "the interface's driver cannot set that",
        Some(libc::EINVAL | libc::ERANGE) => "the interface's driver does not take that value",
        _ => "the kernel's log may say more: dmesg | tail",
    }
}

fn file_remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "only root may: run it with sudo",
        io::ErrorKind::ReadOnlyFilesystem => {
            "that file system is mounted read-only: run it where it can be written"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "there is no room left on that file system, or none for this user: see df, df -i and quota"
        }
        _ => "see whether it is there, and what its file system says: dmesg | tail",
    }
}

fn module_remedy(error: &io::Error) -> &'static str {
    let text = error.to_string();
    if error.kind() == io::ErrorKind::PermissionDenied
        || text.contains("Operation not permitted")
        || text.contains("Permission denied")
    {
        "only root may: run it with sudo"
    } else if text.contains("not found") {
        "this kernel has no such module: install the package with all of its modules, or a kernel \
         with CONFIG_VFIO_PCI"
    } else {
        "try it by hand, and see the kernel's log: dmesg | tail"
    }
}
