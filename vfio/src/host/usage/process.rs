//! Processes that hold devices by VFIO.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::Path;

use busway_pci::Bdf;

use crate::host::device::HostDevice;
use crate::host::root::{self, SysRoot};

/// A running process.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its name, as the kernel has it (at most 15 bytes).
    pub command: String,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.command, self.pid)
    }
}

/// What an open file stands for.
enum Held {
    Group(u32),
    Node(String),
    Device(Bdf),
}

/// Which process holds which device, as far as the caller may see other processes' files.
///
/// A process that holds a group holds each of its members that VFIO has.
pub(super) fn read(
    root: &SysRoot,
    devices: &BTreeMap<Bdf, HostDevice>,
) -> BTreeSet<(Bdf, Process)> {
    let mut found = BTreeSet::new();
    // Looking through every process's files takes longer than all the rest.
    if !devices.values().any(HostDevice::is_with_vfio) {
        return found;
    }
    for pid in root::names(&root.proc) {
        let Ok(pid) = pid.parse::<u32>() else {
            continue;
        };
        let folder = root.proc.join(pid.to_string());
        let mut process = None;
        for fd in root::names(&folder.join("fd")) {
            let Some(held) = held(root, &folder, &fd) else {
                continue;
            };
            let process = process.get_or_insert_with(|| Process {
                pid,
                command: root::text(&folder.join("comm")).unwrap_or_else(|| "?".to_owned()),
            });
            let holds = |device: &&HostDevice| match &held {
                Held::Group(group) => device.group == Some(*group) && device.is_with_vfio(),
                Held::Node(node) => device.vfio_cdev.as_ref() == Some(node),
                Held::Device(address) => device.address == *address,
            };
            let devices = devices.values().filter(holds);
            found.extend(devices.map(|device| (device.address, process.clone())));
        }
    }
    found
}

/// What an open file of a process is to VFIO, where it is something.
fn held(root: &SysRoot, process: &Path, fd: &str) -> Option<Held> {
    let target = fs::read_link(process.join("fd").join(fd)).ok()?;
    if let Ok(node) = target.strip_prefix(root.dev.join("vfio")) {
        if let Ok(node) = node.strip_prefix("devices") {
            return Some(Held::Node(node.to_str()?.to_owned()));
        }
        return Some(Held::Group(node.to_str()?.parse().ok()?));
    }
    // A device opened by its group has no path; the kernel says which it is since Linux 6.18.
    if target.to_str()?.starts_with("anon_inode:[vfio-device") {
        let text = root::text(&process.join("fdinfo").join(fd))?;
        let mut lines = text.lines();
        let path = lines.find_map(|line| line.strip_prefix("vfio-device-syspath:"))?;
        return Some(Held::Device(root::innermost_pci(Path::new(path.trim()))?));
    }
    None
}
