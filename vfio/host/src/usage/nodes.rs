//! The nodes below `/dev` by which programs reach a device: those of everything that its drivers made,
//! and VFIO's.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::linux::fs::MetadataExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use busway_pci::Bdf;

use super::block;
use crate::device::HostDevice;
use crate::root::{self, SysRoot};

/// The one class with a device for each port of every network card, none of which has a node.
const WITHOUT_NODES: &str = "net";

/// Every node that belongs to a PCI device.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    by_path: BTreeMap<PathBuf, BTreeSet<Bdf>>,
    by_number: HashMap<(u32, u32), PathBuf>,
    /// The last components of `by_path`.
    names: HashSet<Vec<u8>>,
}

impl Nodes {
    /// Reads what sysfs says of them.
    pub(super) fn read(root: &SysRoot, devices: &BTreeMap<Bdf, HostDevice>) -> Self {
        let mut nodes = Self::default();
        nodes.read_sysfs(root);
        nodes.read_vfio(root, devices);
        nodes.read_nvidia(root);
        let names = nodes.by_path.keys().filter_map(|path| path.file_name());
        nodes.names = names.map(|name| name.as_encoded_bytes().to_vec()).collect();
        nodes
    }

    /// Whether no device has any.
    pub(super) fn is_empty(&self) -> bool {
        self.by_path.is_empty()
    }

    /// Whether an open file can be of a device, by the text of its link alone, where `dev` is the folder of
    /// nodes. Most files are not, and a host has hundreds of thousands.
    pub(super) fn may_have(&self, target: &[u8], dev: &Path) -> bool {
        let name = target.rsplit(|byte| *byte == b'/').next();
        if name.is_some_and(|name| self.names.contains(name)) {
            return true;
        }
        let dev = dev.as_os_str().as_encoded_bytes();
        let below = target
            .strip_prefix(dev)
            .is_some_and(|rest| rest.starts_with(b"/"));
        !below && target.windows(5).any(|part| part == b"/dev/")
    }

    /// The devices that the node at a path below `/dev` belongs to.
    pub(super) fn owners(&self, node: &Path) -> Option<&BTreeSet<Bdf>> {
        self.by_path.get(node)
    }

    /// The node that an open file elsewhere is another name of, as in a container's or a chroot's own
    /// `/dev`. `file` is the kernel's link to it, `target` what that says.
    ///
    /// Only what is named like a device's node is looked at: a file system that does not answer, as NFS
    /// at times, would keep the caller waiting.
    pub(super) fn elsewhere(&self, file: &Path, target: &Path) -> Option<&Path> {
        let name = target.file_name()?.as_encoded_bytes();
        if !self.names.contains(name) && !target.iter().any(|part| part == "dev") {
            return None;
        }
        let meta = file.metadata().ok()?;
        let kind = meta.file_type();
        if !kind.is_char_device() && !kind.is_block_device() {
            return None;
        }
        let number = meta.st_rdev();
        let number = (libc::major(number), libc::minor(number));
        let node = self.by_number.get(&number)?;
        // A character and a block device may have the same number; their names then tell.
        (node.file_name()?.as_encoded_bytes() == name).then_some(node)
    }

    fn add(&mut self, node: impl Into<PathBuf>, owner: Bdf) {
        self.by_path.entry(node.into()).or_default().insert(owner);
    }

    /// Everything that has a node. Most is of a class; what is of a bus alone (USB, CXL, vDPA) the list of
    /// all numbers has too.
    fn read_sysfs(&mut self, root: &SysRoot) {
        let classes = root.sys.join("class");
        let names = root::names(&classes).into_iter();
        let folders = names
            .filter(|name| name != WITHOUT_NODES)
            .map(|name| classes.join(name))
            .chain(["char", "block"].map(|kind| root.sys.join("dev").join(kind)));
        let mut seen = HashSet::new();
        for folder in folders {
            let is_block = folder.ends_with("block");
            for name in root::names(&folder) {
                let Some(device) = root::target(root, &folder.join(name)) else {
                    continue;
                };
                let owners = block::owners(root, &device);
                if owners.is_empty() || seen.contains(&device) {
                    continue;
                }
                self.read_device(&device, is_block, &owners);
                seen.insert(device);
            }
        }
    }

    fn read_device(&mut self, device: &Path, is_block: bool, owners: &[Bdf]) {
        let text = root::attribute(&device.join("uevent")).unwrap_or_default();
        let value = |key: &str| {
            let mut lines = text.lines();
            lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        };
        let node = match (value("DEVNAME"), device.file_name()) {
            (Some(node), _) => PathBuf::from(node),
            (None, Some(name)) if is_block => name.to_string_lossy().replace('!', "/").into(),
            // A card's connectors and a sound card as a whole have no node.
            _ => return,
        };
        let number = |key| value(key)?.parse::<u32>().ok();
        if let (Some(major), Some(minor)) = (number("MAJOR"), number("MINOR")) {
            self.by_number.insert((major, minor), node.clone());
        }
        for &owner in owners {
            self.add(node.clone(), owner);
        }
    }

    /// VFIO's: of groups, with an IOMMU and without, and of devices (drivers/vfio/group.c,
    /// drivers/vfio/device_cdev.c), also of what another driver than vfio-pci lends. Who has a group has
    /// each of its members that VFIO has.
    fn read_vfio(&mut self, root: &SysRoot, devices: &BTreeMap<Bdf, HostDevice>) {
        for device in devices.values().filter(|device| device.driver.is_some()) {
            let folder = root.device(device.address).join("vfio-dev");
            let cdevs = root::names(&folder);
            if let Some(group) = device.group
                && (device.is_with_vfio() || !cdevs.is_empty())
            {
                self.add_group(&group.to_string(), device.address);
            }
            for cdev in cdevs {
                self.add(format!("vfio/devices/{cdev}"), device.address);
                self.add(format!("vfio/devices/noiommu-{cdev}"), device.address);
            }
        }
        // A mediated device is in a group of its own, and its parent is who serves it.
        let mediated = root.sys.join("bus/mdev/devices");
        for name in root::names(&mediated) {
            let folder = root::target(root, &mediated.join(name));
            let owner = folder.as_deref().and_then(root::innermost_pci);
            let group = folder.and_then(|folder| root::link_name(&folder.join("iommu_group")));
            if let (Some(owner), Some(group)) = (owner, group) {
                self.add_group(&group, owner);
            }
        }
    }

    fn add_group(&mut self, group: &str, owner: Bdf) {
        self.add(format!("vfio/{group}"), owner);
        self.add(format!("vfio/noiommu-{group}"), owner);
    }

    /// NVIDIA's own driver makes a node that is of no class, and says in its own folder which it is.
    fn read_nvidia(&mut self, root: &SysRoot) {
        let cards = root.proc.join("driver/nvidia/gpus");
        for name in root::names(&cards) {
            let text = root::text(&cards.join(&name).join("information")).unwrap_or_default();
            let mut lines = text.lines();
            let minor = lines.find_map(|line| line.strip_prefix("Device Minor:"));
            let minor = minor.and_then(|minor| minor.trim().parse::<u32>().ok());
            if let (Some(owner), Some(minor)) = (root::full_address(&name), minor) {
                self.add(format!("nvidia{minor}"), owner);
            }
        }
    }
}
