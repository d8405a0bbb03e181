//! What uses a device: file systems and swap on its disks, the network behind its interfaces, its
//! virtual functions, and processes that have it open.

pub(super) mod block;
mod exports;
mod interface;
mod mounts;
mod network;
mod nodes;
mod process;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use busway_iommu::Command;
use busway_pci::Bdf;

use super::device::{self, HostDevice};
use super::root::{self, SysRoot};

pub(super) use block::claimed_disk;
pub(super) use network::represents;
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
    /// Something stands on one of its disks (LVM, RAID, encryption, a ZFS pool), though nothing of it is
    /// mounted.
    Held {
        /// From the disk or partition to the topmost holder.
        chain: Vec<String>,
        /// The command that takes that holder down, where one does.
        release: Option<Command>,
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
    /// The session of whoever asks goes through its network interface: they came by SSH.
    SshRoute {
        /// From its interface to the one that has the route.
        chain: Vec<String>,
        /// Where they are.
        client: IpAddr,
    },
    /// It has a network interface.
    Interface {
        /// The interface, and what it is part of (bond, bridge, VLAN), one above the other.
        chain: Vec<String>,
        /// The addresses of all these.
        addresses: Vec<InterfaceAddress>,
        /// The command that takes the interface out of what it is part of, where it is and one does.
        leave: Option<Command>,
    },
    /// It has interfaces that stand for functions behind its switch (representors), and are used as the
    /// switch's ports.
    Representors {
        /// The interfaces; never empty.
        names: Vec<String>,
        /// What all these are part of, one above the other; empty where they are part of nothing.
        part_of: Vec<String>,
        /// The addresses of the interfaces themselves.
        addresses: Vec<InterfaceAddress>,
    },
    /// The host has storage from another machine through its network interface.
    NetworkStorage {
        /// From its interface to the one that has the route.
        chain: Vec<String>,
        /// The other machine.
        server: StorageServer,
        /// By what: a file system's type (`nfs4`), or `iSCSI`, `NVMe over tcp`.
        protocol: String,
        /// Where that is mounted, the shortest path first.
        at: Vec<PathBuf>,
        /// The disks that it is seen as, where it is by these.
        disks: Vec<String>,
    },
    /// Routes that somebody set lead through its network interface.
    StaticRoutes {
        /// From its interface to the one that has the routes.
        chain: Vec<String>,
        /// The network that one of them leads to, with its prefix's length.
        first: String,
        /// How many there are, from 1.
        count: usize,
    },
    /// Its network interface is in another network namespace than this process, as a container's is.
    OtherNamespace,
    /// It is the display that the firmware chose, and where the kernel's messages appear.
    BootDisplay,
    /// It has virtual functions, which end with its driver.
    VirtualFunctions {
        /// Their addresses.
        functions: Vec<Bdf>,
    },
    /// A process holds it, or its IOMMU group, by VFIO.
    Process(Process),
    /// A process has nodes of it open that its driver made: a disk, a card, a serial port.
    Opened {
        /// The process.
        process: Process,
        /// The nodes, as paths below `/dev`; never empty.
        nodes: Vec<PathBuf>,
    },
}

/// The machine that the host has storage from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StorageServer {
    /// The one at this address.
    Address(IpAddr),
    /// One on the network of this interface, without an address of IP: ATA or Fibre Channel over Ethernet.
    OnLink(String),
    /// One that nothing tells of: every interface by which the host reaches others may be the way there.
    Unseen,
}

/// Where the storage comes from, as it stands behind its protocol: ` from 10.0.0.1`.
impl fmt::Display for StorageServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, " from {address}"),
            Self::OnLink(_) => Ok(()),
            Self::Unseen => f.write_str(", from which machine is not seen"),
        }
    }
}

/// An address of a network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// The interface.
    pub interface: String,
    /// Its address.
    pub address: IpAddr,
}

impl InterfaceAddress {
    /// Whether it is one that every interface gives itself (RFC 4291 §2.5.6, RFC 3927).
    #[must_use]
    pub fn is_link_local(&self) -> bool {
        match self.address {
            IpAddr::V4(address) => address.is_link_local(),
            IpAddr::V6(address) => address.segments()[0] & 0xffc0 == 0xfe80,
        }
    }
}

/// Whether the host cannot do without what is mounted there.
pub(super) fn is_system(path: &Path) -> bool {
    ["/", "/usr", "/boot", "/var", "/nix", "/gnu"]
        .iter()
        .any(|system| path == Path::new(system))
}

impl Usage {
    /// Whether taking the device from its driver would break the use. An interface that is part of
    /// nothing else, and by which nothing is known to go that the host needs, may be taken.
    #[must_use]
    pub fn prevents_bind(&self) -> bool {
        match self {
            Self::Interface { chain, .. } => chain.len() > 1,
            Self::Representors { part_of, .. } => !part_of.is_empty(),
            Self::StaticRoutes { .. } => false,
            // Where the system itself comes from such a machine, a guess is enough.
            Self::NetworkStorage {
                server: StorageServer::Unseen,
                at,
                ..
            } => at.iter().any(|path| is_system(path)),
            _ => true,
        }
    }

    /// What ends with the device's driver though it does not keep the device from being taken, in words
    /// to warn of it; none where nothing does.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        let lost = match self {
            Self::Interface {
                chain, addresses, ..
            } if chain.len() == 1 => addresses,
            Self::Representors {
                part_of, addresses, ..
            } if part_of.is_empty() => addresses,
            Self::StaticRoutes { .. } => return Some(format!("the host loses its {self}")),
            Self::NetworkStorage { .. } if !self.prevents_bind() => {
                return Some(format!("the host may lose {self}"));
            }
            _ => return None,
        };
        let lost = lost.iter().filter(|address| !address.is_link_local());
        let lost: Vec<_> = lost
            .map(|a| format!("{} of {}", a.address, a.interface))
            .collect();
        let word = if lost.len() == 1 {
            "address"
        } else {
            "addresses"
        };
        (!lost.is_empty()).then(|| format!("the host loses its {word} {}", lost.join(", ")))
    }

    /// From the device's interface to the one that has the route, where this is one.
    #[must_use]
    pub fn route(&self) -> Option<&[String]> {
        match self {
            Self::DefaultRoute { chain } | Self::SshRoute { chain, .. } => Some(chain),
            _ => None,
        }
    }

    /// Whether a route goes by an interface, and there by the one of those that it is part of that `chain`
    /// has.
    #[must_use]
    pub fn leads_by(route: &[String], chain: &[String]) -> bool {
        let same = route
            .iter()
            .zip(chain)
            .take(2)
            .all(|(one, other)| one == other);
        same && !route.is_empty() && !chain.is_empty()
    }
}

/// The use in a few words: `/home (sda2 > md0)`.
impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { chain, at } => {
                if let Some(first) = at.first() {
                    f.write_str(&root::one_line(&first.to_string_lossy()))?;
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
            Self::SshRoute { chain, client } => {
                write!(f, "this SSH session, from {client} ({})", chain.join(" > "))
            }
            Self::Interface {
                chain, addresses, ..
            } => {
                f.write_str(&chain.join(" > "))?;
                for shown in addresses.iter().filter(|a| !a.is_link_local()) {
                    write!(f, " {}", shown.address)?;
                }
                Ok(())
            }
            Self::Representors { .. } | Self::NetworkStorage { .. } | Self::StaticRoutes { .. } => {
                self.network_words(f)
            }
            Self::OtherNamespace => {
                f.write_str("an interface in another network namespace (a container?)")
            }
            Self::BootDisplay => f.write_str("boot display"),
            Self::VirtualFunctions { functions } => match functions.len() {
                1 => f.write_str("1 VF"),
                count => write!(f, "{count} VFs"),
            },
            Self::Process(process) => write!(f, "{process}"),
            Self::Opened { process, nodes } => {
                write!(f, "{process}")?;
                if let Some(first) = nodes.first() {
                    write!(f, " by {}", root::one_line(&first.to_string_lossy()))?;
                }
                if nodes.len() > 1 {
                    write!(f, " +{}", nodes.len() - 1)?;
                }
                Ok(())
            }
        }
    }
}

impl Usage {
    fn network_words(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Representors {
                names,
                part_of,
                addresses,
            } => {
                match names.as_slice() {
                    [name] => write!(f, "1 representor ({name})")?,
                    names => write!(f, "{} representors", names.len())?,
                }
                for above in part_of {
                    write!(f, " > {above}")?;
                }
                for shown in addresses.iter().filter(|a| !a.is_link_local()) {
                    write!(f, " {}", shown.address)?;
                }
                Ok(())
            }
            Self::NetworkStorage {
                chain,
                server,
                protocol,
                at,
                disks,
            } => {
                let at = at
                    .iter()
                    .map(|path| root::one_line(&path.to_string_lossy()));
                let what: Vec<_> = at.chain(disks.iter().cloned()).collect();
                if let Some(first) = what.first() {
                    write!(f, "{first} ")?;
                }
                if what.len() > 1 {
                    write!(f, "+{} ", what.len() - 1)?;
                }
                write!(f, "by {protocol}{server} ({})", chain.join(" > "))
            }
            Self::StaticRoutes {
                chain,
                first,
                count,
            } => {
                let chain = chain.join(" > ");
                match count {
                    1 => write!(f, "route to {first} ({chain})"),
                    count => write!(f, "routes to {first} +{} ({chain})", count - 1),
                }
            }
            _ => Ok(()),
        }
    }
}

/// What uses disks and interfaces, each with the device that these are of.
pub(super) fn find(root: &SysRoot) -> Vec<(Bdf, Usage)> {
    let mut found = block::read(root);
    found.extend(network::read(root));
    found
}

/// The uses of every device that has some: those that were found, and those that the device itself says.
pub(super) fn of_devices(
    root: &SysRoot,
    devices: &BTreeMap<Bdf, HostDevice>,
    found: Vec<(Bdf, Usage)>,
) -> BTreeMap<Bdf, Vec<Usage>> {
    let mut all: BTreeMap<Bdf, Vec<Usage>> = BTreeMap::new();
    for (address, usage) in found {
        all.entry(address).or_default().push(usage);
    }
    for device in devices.values() {
        if device.boot_display && !device.is_with_vfio() {
            let uses = all.entry(device.address).or_default();
            uses.push(Usage::BootDisplay);
        }
        if network::is_elsewhere(root, device) {
            let uses = all.entry(device.address).or_default();
            uses.push(Usage::OtherNamespace);
        }
        if let Some(sriov) = device.sriov.as_ref().filter(|s| !s.functions.is_empty()) {
            let functions = sriov.functions.clone();
            let usage = Usage::VirtualFunctions { functions };
            all.entry(device.address).or_default().push(usage);
        }
    }
    for (address, usage) in process::read(root, devices) {
        all.entry(address).or_default().push(usage);
    }
    add_those_of_offspring(devices, &mut all);
    all
}

/// What a driver brings forth ends with it, and so does every use of that: the file systems on a drive
/// behind a volume management device are that device's too. A VFIO driver lends the device alone.
fn add_those_of_offspring(
    devices: &BTreeMap<Bdf, HostDevice>,
    all: &mut BTreeMap<Bdf, Vec<Usage>>,
) {
    let mut inherited: BTreeMap<Bdf, Vec<Usage>> = BTreeMap::new();
    for (&address, uses) in all.iter() {
        let makers = device::makers(devices, address).into_iter();
        let lends = |maker: &Bdf| {
            devices
                .get(maker)
                .is_some_and(|maker| !maker.is_with_vfio())
        };
        for maker in makers.filter(lends) {
            let uses = uses.iter().filter(|usage| usage.prevents_bind());
            inherited.entry(maker).or_default().extend(uses.cloned());
        }
    }
    for (maker, uses) in inherited {
        let own = all.entry(maker).or_default();
        for usage in uses {
            if !own.contains(&usage) {
                own.push(usage);
            }
        }
    }
}
