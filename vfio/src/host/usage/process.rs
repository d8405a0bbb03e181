//! Processes that have devices open: by VFIO, or by the nodes of graphics and sound cards.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use busway_pci::Bdf;

use super::{Usage, nodes};
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
    Card(Bdf, PathBuf),
    Group(u32),
    Node(String),
    Device(Bdf),
}

/// Which process has which device open, as far as the caller may see other processes' files.
///
/// A process that holds a group holds each of its members that VFIO has.
pub(super) fn read(root: &SysRoot, devices: &BTreeMap<Bdf, HostDevice>) -> Vec<(Bdf, Usage)> {
    let cards = nodes::read(root);
    // Looking through every process's files takes longer than all the rest.
    if cards.is_empty() && !devices.values().any(HostDevice::is_with_vfio) {
        return Vec::new();
    }
    let mut by_vfio = BTreeSet::new();
    let mut by_node: BTreeMap<_, BTreeSet<PathBuf>> = BTreeMap::new();
    for pid in root::names(&root.proc) {
        let Ok(pid) = pid.parse::<u32>() else {
            continue;
        };
        let folder = root.proc.join(pid.to_string());
        let mut process = None;
        for fd in root::names(&folder.join("fd")) {
            let Some(held) = held(root, &cards, &folder, &fd) else {
                continue;
            };
            let process = process.get_or_insert_with(|| Process {
                pid,
                command: root::text(&folder.join("comm"))
                    .map_or_else(|| "?".to_owned(), |name| root::one_line(&name)),
            });
            if let Held::Card(address, node) = held {
                let nodes = by_node.entry((address, process.clone())).or_default();
                nodes.insert(node);
                continue;
            }
            let holds = |device: &&HostDevice| match &held {
                Held::Group(group) => device.group == Some(*group) && device.is_with_vfio(),
                Held::Node(node) => device.vfio_cdev.as_ref() == Some(node),
                Held::Device(address) => device.address == *address,
                Held::Card(..) => false,
            };
            let devices = devices.values().filter(holds);
            by_vfio.extend(devices.map(|device| (device.address, process.clone())));
        }
    }
    let by_vfio = by_vfio.into_iter();
    let by_node = by_node.into_iter().map(|((address, process), nodes)| {
        let nodes = nodes.into_iter().collect();
        (address, Usage::Opened { process, nodes })
    });
    by_vfio
        .map(|(address, process)| (address, Usage::Process(process)))
        .chain(by_node)
        .collect()
}

/// What an open file of a process is of a device, where it is something.
fn held(root: &SysRoot, cards: &BTreeMap<PathBuf, Bdf>, process: &Path, fd: &str) -> Option<Held> {
    let target = fs::read_link(process.join("fd").join(fd)).ok()?;
    if let Ok(node) = target.strip_prefix(&root.dev)
        && let Some(owner) = cards.get(node)
    {
        return Some(Held::Card(*owner, node.to_owned()));
    }
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
