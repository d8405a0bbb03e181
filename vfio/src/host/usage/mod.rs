//! What uses a device: file systems and swap on its disks, the network behind its interfaces, its
//! virtual functions, and processes that hold it by VFIO.

mod block;
mod mounts;
mod network;
mod process;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use busway_pci::Bdf;

use super::device::HostDevice;
use super::root::SysRoot;

pub(super) use block::claimed_disk;
pub use process::Process;

/// One use of a device.
///
/// A `chain` runs from what the device itself offers to what is used: `["sda2", "md0", "vg-home"]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Usage {
    /// A file system on one of its disks is mounted.
    Mounted {
        /// From the disk or partition to the file system's device.
        chain: Vec<String>,
        /// Where it is mounted, the shortest path first; never empty.
        at: Vec<PathBuf>,
    },
    /// One of its disks is swapped to.
    Swap {
        /// From the disk or partition to the swap device.
        chain: Vec<String>,
        /// The swap device's node.
        device: PathBuf,
    },
    /// Something stands on one of its disks (LVM, RAID, encryption), though nothing of it is mounted.
    Held {
        /// From the disk or partition to the topmost holder.
        chain: Vec<String>,
        /// The command that takes that holder down.
        release: String,
    },
    /// One of its disks is open for one user only, who is not otherwise known: a mount in another
    /// namespace, ZFS, or a program.
    Claimed {
        /// The disk.
        disk: String,
    },
    /// The default route goes through its network interface.
    DefaultRoute {
        /// From its interface to the one that has the route: `["eth0", "bond0", "br0"]`.
        chain: Vec<String>,
    },
    /// It has a network interface.
    Interface {
        /// The interface.
        name: String,
    },
    /// It has virtual functions, which end with its driver.
    VirtualFunctions {
        /// Their addresses.
        functions: Vec<Bdf>,
    },
    /// A process holds it, or its IOMMU group, by VFIO.
    Process(Process),
}

impl Usage {
    /// Whether taking the device from its driver would break the use.
    #[must_use]
    pub fn prevents_bind(&self) -> bool {
        !matches!(self, Self::Interface { .. })
    }
}

/// The use in a few words: `/home (sda2 > md0)`.
impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { chain, at } => {
                if let Some(first) = at.first() {
                    write!(f, "{}", first.display())?;
                }
                if at.len() > 1 {
                    write!(f, " +{}", at.len() - 1)?;
                }
                write!(f, " ({})", chain.join(" > "))
            }
            Self::Swap { chain, .. } => write!(f, "swap ({})", chain.join(" > ")),
            Self::Held { chain, .. } => f.write_str(&chain.join(" > ")),
            Self::Claimed { disk } => write!(f, "{disk}, opened exclusively"),
            Self::DefaultRoute { chain } => write!(f, "default route ({})", chain.join(" > ")),
            Self::Interface { name } => f.write_str(name),
            Self::VirtualFunctions { functions } => match functions.len() {
                1 => f.write_str("1 VF"),
                count => write!(f, "{count} VFs"),
            },
            Self::Process(process) => write!(f, "{process}"),
        }
    }
}

/// The uses of every device that has some.
pub(super) fn read_all(
    root: &SysRoot,
    devices: &BTreeMap<Bdf, HostDevice>,
) -> BTreeMap<Bdf, Vec<Usage>> {
    let mut all: BTreeMap<Bdf, Vec<Usage>> = BTreeMap::new();
    for (address, usage) in block::read(root).into_iter().chain(network::read(root)) {
        all.entry(address).or_default().push(usage);
    }
    for device in devices.values() {
        if let Some(sriov) = device.sriov.as_ref().filter(|s| !s.functions.is_empty()) {
            let functions = sriov.functions.clone();
            let usage = Usage::VirtualFunctions { functions };
            all.entry(device.address).or_default().push(usage);
        }
    }
    for (address, process) in process::read(root, devices) {
        let usage = Usage::Process(process);
        all.entry(address).or_default().push(usage);
    }
    all
}
