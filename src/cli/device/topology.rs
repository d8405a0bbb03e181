//! Which device is behind which, for those that draw it.

use std::collections::{BTreeMap, BTreeSet};

use busway_host::{Host, HostDevice, MediatedDevice};
use busway_pci::Bdf;

/// The devices of a host below its root buses.
#[derive(Debug)]
pub(super) struct Topology<'a> {
    pub(super) roots: Vec<Root<'a>>,
    /// What is made of no PCI function, by the name of what it is made of.
    pub(super) elsewhere: BTreeMap<&'a str, Vec<&'a MediatedDevice>>,
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

/// A device, what is behind it, and what is made of it.
#[derive(Debug)]
pub(super) struct Node<'a> {
    pub(super) device: &'a HostDevice,
    pub(super) behind: Vec<Self>,
    pub(super) mediated: Vec<&'a MediatedDevice>,
}

/// How deep a bridge may be behind another. PCI has 256 buses to a segment; real hosts are ten deep.
const DEEPEST: usize = 64;

impl<'a> Topology<'a> {
    /// The topology of the devices that are wanted, of what these mediated ones are made of, and of the bridges above.
    pub(super) fn of(
        host: &'a Host,
        wanted: &[&'a HostDevice],
        mediated: &[&'a MediatedDevice],
    ) -> Self {
        let mut shown = BTreeSet::new();
        let mut made_of: BTreeMap<Bdf, Vec<&MediatedDevice>> = BTreeMap::new();
        let mut elsewhere: BTreeMap<&str, Vec<&MediatedDevice>> = BTreeMap::new();
        for &device in mediated {
            let parent = device.parent.as_ref();
            let function = parent.and_then(|parent| host.device(parent.address?));
            let of = match function {
                Some(function) => made_of.entry(function.address).or_default(),
                None => elsewhere
                    .entry(parent.map_or("?", |parent| &parent.name))
                    .or_default(),
            };
            of.push(device);
        }
        let parents = made_of.keys().filter_map(|parent| host.device(*parent));
        for device in wanted.iter().copied().chain(parents) {
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
                .map(|device| Node::of(device, &behind, &made_of, 0))
                .collect(),
        });
        Self {
            roots: roots.collect(),
            elsewhere,
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
        made_of: &BTreeMap<Bdf, Vec<&'a MediatedDevice>>,
        depth: usize,
    ) -> Self {
        let children = behind.get(&device.address).filter(|_| depth < DEEPEST);
        Self {
            device,
            behind: children
                .into_iter()
                .flatten()
                .map(|child| Self::of(child, behind, made_of, depth + 1))
                .collect(),
            mediated: made_of.get(&device.address).cloned().unwrap_or_default(),
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
