//! Mediated devices, and the types of them that the host's devices offer.
//! Linux, Documentation/driver-api/vfio-mediated-device.rst

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use busway_iommu::{Uuid, process_name};
use busway_pci::Bdf;

use super::root::{self, SysRoot};
use super::usage::Process;

/// The device of the host's that mediated ones are made of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MediatedParent {
    /// Its name in sysfs: `0000:00:02.0`, `mtty`.
    pub name: String,
    /// Its address, where it is a PCI function.
    pub address: Option<Bdf>,
}

impl MediatedParent {
    /// That of the device whose folder in sysfs is `folder`.
    fn of(folder: &Path) -> Option<Self> {
        let name = folder.file_name()?.to_string_lossy();
        Some(Self {
            address: root::full_address(&name),
            name: root::one_line(&name),
        })
    }
}

/// A kind of mediated device that a device offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MediatedType {
    /// What they are made of.
    pub parent: MediatedParent,
    /// The kind's name in sysfs: `i915-GVTg_V5_4`, `mtty-2`.
    pub id: String,
    /// What its driver calls it, for a person.
    pub name: Option<String>,
    /// What its driver says of it.
    pub description: Option<String>,
    /// How many more can be made.
    pub available: Option<u32>,
    /// What it looks like to who opens it: `vfio-pci`, `vfio-ap`, `vfio-ccw`.
    pub api: Option<String>,
}

/// A mediated device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MediatedDevice {
    /// What it is called.
    pub uuid: Uuid,
    /// What it was made of.
    pub parent: Option<MediatedParent>,
    /// The kind that it is of, by its name in sysfs; nothing while it is being removed.
    pub kind: Option<String>,
    /// What its driver calls that kind.
    pub kind_name: Option<String>,
    /// What it looks like to who opens it.
    pub api: Option<String>,
    /// The driver that lends it.
    pub driver: Option<String>,
    /// The group that VFIO made for it.
    pub group: Option<u32>,
    /// Its node in `/dev/vfio/devices`, where the kernel makes such.
    pub vfio_cdev: Option<String>,
    /// Who has it open, as far as the caller may see.
    pub users: Vec<Process>,
}

/// Every mediated device, by its name. One that is being removed while somebody has it is not on its bus any
/// more, but still below what it was made of (drivers/base/core.c, device_del).
pub(super) fn devices(root: &SysRoot) -> Vec<MediatedDevice> {
    let bus = root.mediated_bus().join("devices");
    let parents = root::names(&class(root)).into_iter();
    let parents = parents.map(|name| class(root).join(name));
    let mut folders: BTreeMap<Uuid, PathBuf> = BTreeMap::new();
    for folder in parents.chain([bus]) {
        let names = root::names(&folder).into_iter();
        let uuids = names.filter_map(|name| Some((name.parse().ok()?, folder.join(name))));
        folders.extend(uuids);
    }
    let devices = folders.into_iter();
    let mut devices: Vec<_> = devices
        .filter_map(|(uuid, folder)| device(root, uuid, &folder))
        .collect();
    let mut users = users(root, &devices);
    for device in &mut devices {
        let of_this = users.remove(&device.uuid).unwrap_or_default();
        device.users = of_this.into_iter().collect();
    }
    devices
}

/// One; nothing where it has just vanished.
fn device(root: &SysRoot, uuid: Uuid, folder: &Path) -> Option<MediatedDevice> {
    let folder = fs::canonicalize(folder).ok()?;
    let kind = folder.join("mdev_type");
    let cdev = root.cdev_node(&folder);
    let cdev = cdev.as_deref().and_then(Path::file_name);
    Some(MediatedDevice {
        uuid,
        parent: folder.parent().and_then(MediatedParent::of),
        kind: root::link_name(&kind),
        kind_name: attribute(&kind, "name"),
        api: attribute(&kind, "device_api"),
        driver: root.driver_of(&folder),
        group: root.group_of(&folder),
        vfio_cdev: cdev.map(|name| root::one_line(&name.to_string_lossy())),
        users: Vec::new(),
    })
}

/// An attribute, which may be of several lines, on one.
fn attribute(folder: &Path, name: &str) -> Option<String> {
    let text = root::attribute(&folder.join(name))?;
    let lines: Vec<_> = text.lines().map(root::one_line).collect();
    Some(lines.join(", ")).filter(|text| !text.is_empty())
}

/// Where the devices are that mediated ones are made of.
fn class(root: &SysRoot) -> PathBuf {
    root.sys.join("class/mdev_bus")
}

/// The kinds of mediated devices that the host's devices offer, by device and by kind.
pub(super) fn types(root: &SysRoot) -> Vec<MediatedType> {
    let mut all = Vec::new();
    for name in root::names(&class(root)) {
        let Ok(folder) = fs::canonicalize(class(root).join(name)) else {
            continue;
        };
        let Some(parent) = MediatedParent::of(&folder) else {
            continue;
        };
        let types = folder.join("mdev_supported_types");
        all.extend(root::names(&types).into_iter().map(|id| {
            let folder = types.join(&id);
            MediatedType {
                parent: parent.clone(),
                name: attribute(&folder, "name"),
                description: attribute(&folder, "description"),
                available: root::number(&folder.join("available_instances")),
                api: attribute(&folder, "device_api"),
                id: root::one_line(&id),
            }
        }));
    }
    all
}

/// The nodes through which a mediated device is open to whoever has them.
pub(super) fn nodes(device: &MediatedDevice) -> Vec<PathBuf> {
    let group = device.group.map(|group| format!("vfio/{group}"));
    let cdev = device.vfio_cdev.as_ref();
    let cdev = cdev.map(|node| format!("vfio/devices/{node}"));
    cdev.into_iter().chain(group).map(PathBuf::from).collect()
}

/// Which processes have one of the devices' nodes open.
fn users(root: &SysRoot, devices: &[MediatedDevice]) -> BTreeMap<Uuid, BTreeSet<Process>> {
    let mut owners = BTreeMap::new();
    for device in devices {
        let nodes = nodes(device).into_iter();
        owners.extend(nodes.map(|node| (root.dev.join(node), device.uuid)));
    }
    let mut users: BTreeMap<Uuid, BTreeSet<Process>> = BTreeMap::new();
    // Looking through every process's files takes longer than all the rest.
    if owners.is_empty() {
        return users;
    }
    let names = root::names(&root.proc).into_iter();
    for pid in names.filter_map(|name| name.parse::<u32>().ok()) {
        let open = fs::read_dir(root.proc.join(pid.to_string()).join("fd"));
        let targets = open.into_iter().flatten().flatten();
        let targets = targets.filter_map(|fd| fs::read_link(fd.path()).ok());
        for uuid in targets.filter_map(|target| owners.get(&target)) {
            let command = process_name(&root.proc, pid).unwrap_or_else(|| "?".to_owned());
            users
                .entry(*uuid)
                .or_default()
                .insert(Process { pid, command });
        }
    }
    users
}
