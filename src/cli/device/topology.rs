//! Which device is behind which, for those that draw it.

use std::collections::{BTreeMap, BTreeSet};

use busway_host::{Host, HostDevice};
use busway_pci::Bdf;

/// The devices of a host below its root buses.
#[derive(Debug)]
pub(super) struct Topology<'a> {
    pub(super) roots: Vec<Root<'a>>,
    /// The groups that several of the host's devices are in, in the order in which they are met: what
    /// colours tell apart.
    pub(super) shared: Vec<u32>,
}

/// A host bridge, and what is on its bus.
#[derive(Debug)]
pub(super) struct Root<'a> {
    /// As sysfs names it: `pci0000:00`.
    pub(super) name: &'a str,
    /// The NUMA node, where all that is below says the same.
    pub(super) node: Option<u32>,
    pub(super) devices: Vec<Node<'a>>,
}

/// A device, and what is behind it.
#[derive(Debug)]
pub(super) struct Node<'a> {
    pub(super) device: &'a HostDevice,
    pub(super) behind: Vec<Self>,
}

/// How deep a bridge may be behind another. PCI has 256 buses to a segment; real hosts are ten deep.
const DEEPEST: usize = 64;

impl<'a> Topology<'a> {
    /// The topology of the devices that are wanted, and of the bridges above them.
    pub(super) fn of(host: &'a Host, wanted: &[&'a HostDevice]) -> Self {
        let mut shown = BTreeSet::new();
        for device in wanted {
            shown.insert(device.address);
            shown.extend(host.above(device).iter().map(|bridge| bridge.address));
        }
        let mut behind: BTreeMap<Bdf, Vec<&HostDevice>> = BTreeMap::new();
        let mut on_root: BTreeMap<&str, Vec<&HostDevice>> = BTreeMap::new();
        let devices = host.devices().filter(|d| shown.contains(&d.address));
        for device in devices {
            match device
                .parent
                .filter(|parent| host.device(*parent).is_some())
            {
                Some(parent) => behind.entry(parent).or_default().push(device),
                None => {
                    let root = device.root_bus.as_deref().unwrap_or("?");
                    on_root.entry(root).or_default().push(device);
                }
            }
        }
        let roots = on_root.into_iter().map(|(name, devices)| Root {
            name,
            node: common(devices.iter().map(|device| device.numa_node)),
            devices: devices
                .into_iter()
                .map(|device| Node::of(device, &behind, 0))
                .collect(),
        });
        Self {
            roots: roots.collect(),
            shared: host.shared_groups(),
        }
    }

    /// The place of a group among those that several devices are in.
    pub(super) fn colour_of(&self, group: Option<u32>) -> Option<usize> {
        self.shared.iter().position(|shared| Some(*shared) == group)
    }
}

impl<'a> Node<'a> {
    fn of(
        device: &'a HostDevice,
        behind: &BTreeMap<Bdf, Vec<&'a HostDevice>>,
        depth: usize,
    ) -> Self {
        let children = behind.get(&device.address).filter(|_| depth < DEEPEST);
        Self {
            device,
            behind: children
                .into_iter()
                .flatten()
                .map(|child| Self::of(child, behind, depth + 1))
                .collect(),
        }
    }
}

/// What all say, where all say the same.
fn common(mut all: impl Iterator<Item = Option<u32>>) -> Option<u32> {
    let first = all.next()?;
    if all.all(|other| other == first) {
        first
    } else {
        None
    }
}
