//! Processes that have devices open, by whichever node.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fmt;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use busway_iommu::process_name;
use busway_pci::Bdf;

use super::Usage;
use super::nodes::Nodes;
use crate::device::{HostDevice, threads};
use crate::root::{self, SysRoot};
use crate::sys;

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

/// What a process has open of which device: nodes, or none where it has it by VFIO and no path.
type Open = BTreeMap<(Bdf, Process), BTreeSet<PathBuf>>;

/// The longest target of a link that is read. Every node's path is far shorter.
const LONGEST: usize = 512;

/// Which process has which device open, as far as the caller may see other processes' files.
///
/// A process that holds a group holds each of its members that VFIO has.
pub(super) fn read(root: &SysRoot, devices: &BTreeMap<Bdf, HostDevice>) -> Vec<(Bdf, Usage)> {
    let nodes = Nodes::read(root, devices);
    // Looking through every process's files takes longer than all the rest.
    if nodes.is_empty() && !devices.values().any(HostDevice::is_with_vfio) {
        return Vec::new();
    }
    let with_vfio = |address| devices.get(&address).is_some_and(HostDevice::is_with_vfio);
    let mut uses = Vec::new();
    let mut by_node = Vec::new();
    for ((address, process), open) in open_files(root, &nodes) {
        let (of_vfio, others): (Vec<_>, Vec<_>) =
            open.into_iter().partition(|node| node.starts_with("vfio"));
        // What another driver lends by VFIO, as a mediated device, is one of that driver's nodes.
        let (by_vfio, mut nodes) = match with_vfio(address) {
            true => (!of_vfio.is_empty(), others),
            false => (false, [of_vfio, others].concat()),
        };
        if by_vfio {
            uses.push((address, Usage::Process(process.clone())));
        }
        nodes.sort();
        if !nodes.is_empty() {
            by_node.push((address, Usage::Opened { process, nodes }));
        }
    }
    uses.append(&mut by_node);
    uses
}

/// Looks through the files of every process, several at once. Who is done takes the next few: the kernel's
/// own threads have no files, and some processes have a hundred thousand.
fn open_files(root: &SysRoot, nodes: &Nodes) -> Open {
    let processes: Vec<u32> = root::names(&root.proc)
        .iter()
        .filter_map(|name| name.parse().ok())
        .collect();
    let parts: Vec<_> = processes.chunks(AT_ONCE).collect();
    let next = AtomicUsize::new(0);
    let look = || {
        let mut open = Open::new();
        while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
            for &pid in *part {
                Files::of(root, nodes, pid).add_to(&mut open);
            }
        }
        open
    };
    let others = threads().min(processes.len() / FEW + 1) - 1;
    thread::scope(|scope| {
        let others: Vec<_> = (0..others).map(|_| scope.spawn(look)).collect();
        let mut open = look();
        for other in others {
            open.extend(other.join().unwrap_or_default());
        }
        open
    })
}

/// How the link of a device's file begins that VFIO has opened through its group.
const DEVICE_FILE: &[u8] = b"anon_inode:[vfio-device";

/// So few processes that a thread costs more than it brings.
const FEW: usize = 64;

/// How many processes a thread takes at once.
const AT_ONCE: usize = 16;

/// The open files of one process.
struct Files<'a> {
    root: &'a SysRoot,
    nodes: &'a Nodes,
    pid: u32,
    folder: PathBuf,
}

impl<'a> Files<'a> {
    fn of(root: &'a SysRoot, nodes: &'a Nodes, pid: u32) -> Self {
        Self {
            root,
            nodes,
            pid,
            folder: root.proc.join(pid.to_string()),
        }
    }

    /// Adds what they are of devices. One call for each file, which is most of what this costs.
    fn add_to(&self, open: &mut Open) {
        let fds = self.folder.join("fd");
        let (Ok(at), Ok(entries)) = (File::open(&fds), fs::read_dir(&fds)) else {
            return;
        };
        let mut process = None;
        let mut target = [0; LONGEST];
        for name in entries.flatten().map(|entry| entry.file_name()) {
            let Ok(name) = CString::new(name.into_vec()) else {
                continue;
            };
            let Ok(target) = sys::read_link_at(&at, &name, &mut target) else {
                continue;
            };
            let is_wanted = match target {
                [b'/', ..] => self.nodes.may_have(target, &self.root.dev),
                target => target.starts_with(DEVICE_FILE),
            };
            if is_wanted {
                let fd = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
                let target = Path::new(std::ffi::OsStr::from_bytes(target));
                for (address, node) in self.devices(fd, target) {
                    let process: &Process = process.get_or_insert_with(|| self.process());
                    let nodes = open.entry((address, process.clone())).or_default();
                    nodes.insert(node);
                }
            }
        }
    }

    fn process(&self) -> Process {
        Process {
            pid: self.pid,
            command: process_name(&self.root.proc, self.pid).unwrap_or_else(|| "?".to_owned()),
        }
    }

    /// The devices that an open file is of, and the node below `/dev`.
    fn devices(&self, fd: &Path, target: &Path) -> Vec<(Bdf, PathBuf)> {
        // A device opened by its group has no path; the kernel says which it is since Linux 6.18.
        let bytes = target.as_os_str().as_bytes();
        if bytes.starts_with(DEVICE_FILE) {
            let text = root::text(&self.folder.join("fdinfo").join(fd)).unwrap_or_default();
            let mut lines = text.lines();
            let path = lines.find_map(|line| line.strip_prefix("vfio-device-syspath:"));
            let address = path.and_then(|path| root::innermost_pci(Path::new(path.trim())));
            return address
                .map(|address| (address, PathBuf::from("vfio")))
                .into_iter()
                .collect();
        }
        let node = match target.strip_prefix(&self.root.dev) {
            Ok(node) => Some(node),
            Err(_) => {
                let file = self.folder.join("fd").join(fd);
                self.nodes.elsewhere(&file, target)
            }
        };
        let Some(node) = node else {
            return Vec::new();
        };
        let owners = self.nodes.owners(node).into_iter().flatten();
        owners.map(|owner| (*owner, node.to_owned())).collect()
    }
}
