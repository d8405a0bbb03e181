//! What stands against moving a device to VFIO or back.

use std::collections::BTreeSet;
use std::fmt;

use busway_iommu::{Command, IommuAdvice, keeps_group};
use busway_pci::Bdf;

use super::Host;
use super::device::HostDevice;
use super::finding::Remedy;
use super::framebuffer;
use super::lines::Lines;
use super::modules::module_parameter;
use super::permit::{Permit, Permits, is_system};
use super::together::Together;
use super::usage::{self, Process, Usage};

/// A reason not to touch a device, with what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is no such device.
    NotThere {
        /// The address asked for.
        address: Bdf,
    },
    /// It is a bridge.
    Bridge {
        /// The bridge.
        address: Bdf,
    },
    /// No IOMMU translates for it.
    NoGroup {
        /// The device.
        address: Bdf,
        /// What to do.
        advice: IommuAdvice,
    },
    /// The host uses it.
    InUse {
        /// The device.
        address: Bdf,
        /// The uses; never empty.
        uses: Vec<Usage>,
    },
    /// Others in its IOMMU group would stay with drivers of the host.
    GroupNotViable {
        /// The group.
        group: u32,
        /// Those of its members that were asked for.
        asked: Vec<Bdf>,
        /// Those in the way; never empty.
        blockers: Vec<GroupBlocker>,
        /// What makes them go too.
        together: Together,
    },
    /// It is gone as soon as another of those asked for is taken from its driver.
    EndsWith {
        /// The device.
        address: Bdf,
        /// The other, whose driver brought it forth.
        maker: Bdf,
    },
    /// Its VFIO driver turns its kind away.
    Denied {
        /// The device.
        address: Bdf,
    },
    /// A process has it open by VFIO.
    HeldOpen {
        /// The device.
        address: Bdf,
        /// The processes; never empty.
        processes: Vec<Process>,
    },
}

/// A member of an IOMMU group that keeps the group from being given to a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupBlocker {
    /// The member.
    pub address: Bdf,
    /// The driver that it is bound to.
    pub driver: String,
    /// Whether it is a bridge, which cannot be given away with the rest.
    pub is_bridge: bool,
    /// What uses it.
    pub uses: Vec<Usage>,
}

impl Refusal {
    /// Whether what was asked for does not make sense, rather than that the host cannot do it.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::NotThere { .. } | Self::Bridge { .. })
    }
}

/// Every reason why nothing was done, one below the other.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", Lines(.0))]
pub struct RefusedError(pub Vec<Refusal>);

/// An error of all that stands against it, if anything does.
pub(super) fn refuse_if(refusals: Vec<Refusal>) -> Result<(), RefusedError> {
    match refusals.is_empty() {
        true => Ok(()),
        false => Err(RefusedError(refusals)),
    }
}

/// All that stands against giving these devices to VFIO together, but for what `permits` allows.
#[must_use]
pub fn check_bind(host: &Host, addresses: &BTreeSet<Bdf>, permits: &Permits) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let mut groups = BTreeSet::new();
    for &address in addresses {
        let Some(device) = host.device(address) else {
            refusals.push(Refusal::NotThere { address });
            continue;
        };
        if device.is_bridge() {
            refusals.push(Refusal::Bridge { address });
            continue;
        }
        if let Some(maker) = ends_with(host, device, addresses) {
            refusals.push(Refusal::EndsWith { address, maker });
            continue;
        }
        match device.group {
            Some(group) if !device.without_iommu => {
                groups.insert(group);
            }
            _ => refusals.push(Refusal::NoGroup {
                address,
                advice: IommuAdvice::read(&host.root),
            }),
        }
        // What VFIO has already is not taken from anybody.
        if !device.is_with_vfio() {
            if Denial::of(host, device) == Some(Denial::Stands) {
                refusals.push(Refusal::Denied { address });
            }
            let mut uses = uses(host, address);
            uses.retain(|usage| Permit::of(usage).is_none_or(|permit| !permits.contains(&permit)));
            if !uses.is_empty() {
                refusals.push(Refusal::InUse { address, uses });
            }
        }
    }
    if permits.contains(&Permit::Group) {
        return refusals;
    }
    for group in groups {
        let blockers = group_blockers(host, group, addresses);
        if !blockers.is_empty() {
            let member = |device: &HostDevice| device.group == Some(group) && !device.is_bridge();
            let asked: Vec<_> = addresses
                .iter()
                .filter_map(|&address| host.device(address))
                .filter(|device| member(device))
                .collect();
            let Some(first) = asked.first() else {
                continue;
            };
            refusals.push(Refusal::GroupNotViable {
                group,
                together: Together::of(host, first, addresses),
                asked: asked.iter().map(|device| device.address).collect(),
                blockers,
            });
        }
    }
    refusals
}

/// All that stands against giving these devices back to the host, but for what `permits` allows.
#[must_use]
pub fn check_unbind(host: &Host, addresses: &BTreeSet<Bdf>, permits: &Permits) -> Vec<Refusal> {
    let check = |&address: &Bdf| {
        let Some(device) = host.device(address) else {
            return Some(Refusal::NotThere { address });
        };
        if !device.is_with_vfio() || permits.contains(&Permit::Open) {
            return None;
        }
        // A driver of the host is turned away from a group that a process owns, even where the
        // process uses another member of it; and virtual functions end with their physical one.
        let same_group = |other: &HostDevice| other.group.is_some() && other.group == device.group;
        let members = host.devices().filter(|other| {
            other.address == address
                || same_group(other)
                || other.physical_function == Some(address)
        });
        let uses = members.flat_map(|other| host.usage(other.address));
        let processes: BTreeSet<_> = uses
            .filter_map(|usage| match usage {
                Usage::Process(process) => Some(process.clone()),
                _ => None,
            })
            .collect();
        (!processes.is_empty()).then(|| Refusal::HeldOpen {
            address,
            processes: processes.into_iter().collect(),
        })
    };
    addresses.iter().filter_map(check).collect()
}

/// The members of `group`, but for those in `taken`, whose drivers keep it from being given away.
#[must_use]
pub(super) fn group_blockers(host: &Host, group: u32, taken: &BTreeSet<Bdf>) -> Vec<GroupBlocker> {
    let blocks = |device: &HostDevice| {
        let driver = device.driver.clone()?;
        // What ends with one that is taken is not there any more.
        let goes = taken.contains(&device.address)
            || host
                .makers(device.address)
                .iter()
                .any(|m| taken.contains(m));
        (keeps_group(&driver) && !goes).then(|| GroupBlocker {
            address: device.address,
            driver,
            is_bridge: device.is_bridge(),
            uses: uses(host, device.address),
        })
    };
    host.group(group).filter_map(blocks).collect()
}

/// The one of `asked` with whose driver the PCI domain of `device` ends.
pub(super) fn ends_with(host: &Host, device: &HostDevice, asked: &BTreeSet<Bdf>) -> Option<Bdf> {
    let ends = |maker: &Bdf| asked.contains(maker);
    host.makers(device.address)
        .into_iter()
        .find(|maker| ends(maker) && Some(*maker) != device.physical_function)
}

/// What taking a device from its driver would break.
pub(super) fn uses(host: &Host, address: Bdf) -> Vec<Usage> {
    let uses = host.usage(address).iter().filter(|u| u.prevents_bind());
    let mut uses: Vec<_> = uses.cloned().collect();
    // A route that goes by an interface says more than what the interface is part of.
    let routed: Vec<_> = uses.iter().filter_map(Usage::route_from).collect();
    let routed: Vec<_> = routed.into_iter().map(str::to_owned).collect();
    uses.retain(|usage| match usage {
        Usage::Interface { chain, .. } => !chain.first().is_some_and(|c| routed.contains(c)),
        _ => true,
    });
    let shows = |usage: &Usage| matches!(usage, Usage::BootDisplay);
    if !uses.iter().any(shows) && framebuffer::holder(&host.root, address).is_some() {
        uses.push(Usage::BootDisplay);
    }
    // A program that has a node open need not be who has the disk for themselves.
    let explains = |usage: &Usage| !matches!(usage, Usage::Opened { .. });
    if !uses.iter().any(explains) {
        let offspring = host.devices().map(|device| device.address);
        let offspring = offspring.filter(|other| host.makers(*other).contains(&address));
        let all = offspring.chain([address]);
        uses.extend(all.filter_map(|one| usage::claimed_disk(&host.root, one)));
    }
    uses
}

/// What the host loses with a device, though that does not keep it from being taken.
pub(super) fn warnings(host: &Host, address: Bdf) -> Vec<String> {
    match host.device(address).is_none_or(HostDevice::is_with_vfio) {
        true => Vec::new(),
        false => host
            .usage(address)
            .iter()
            .filter_map(Usage::warning)
            .collect(),
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotThere { address } => write!(
                f,
                "{address}: there is no such PCI device\n  see those there are: busway device list"
            ),
            Self::Bridge { address } => write!(
                f,
                "{address} is a bridge, which no guest can be given\n  \
                 name the devices behind it: busway device list"
            ),
            Self::NoGroup { address, advice } => {
                write!(f, "{address} is in no IOMMU group\n  {advice}")
            }
            Self::InUse { address, uses } => {
                write!(f, "{address} is in use")?;
                for usage in uses {
                    write!(f, "\n  {usage}\n    {}", remedy(*address, usage))?;
                    if let Some(permit) = Permit::of(usage) {
                        write!(f, "\n    or take it all the same: {permit}")?;
                    }
                }
                Ok(())
            }
            Self::GroupNotViable {
                group,
                asked,
                blockers,
                together,
            } => group_not_viable(f, *group, asked, blockers, together),
            Self::EndsWith { address, maker } => write!(
                f,
                "{address} is there by the driver of {maker}, and is gone when that is taken\n  \
                 name {maker} alone: the guest has {address} by it"
            ),
            Self::Denied { address } => {
                write!(
                    f,
                    "{address} is of a kind that vfio-pci turns away: {DENIAL}\n  {}",
                    allow_denied()
                )
            }
            Self::HeldOpen { address, processes } => {
                write!(f, "{address} is held by")?;
                for (index, process) in processes.iter().enumerate() {
                    write!(f, "{} {process}", if index > 0 { "," } else { "" })?;
                }
                write!(
                    f,
                    "\n  end it first: the kernel would wait for it\n  \
                     or have the kernel ask it to let go, and wait: {}",
                    Permit::Open
                )
            }
        }
    }
}

/// What ends a use of the device at `address`.
pub(super) fn remedy(address: Bdf, usage: &Usage) -> Remedy {
    match usage {
        Usage::Mounted { at, .. } => {
            if at.iter().any(|path| is_system(path)) {
                Remedy::words("the host runs from it, and will not survive it")
            } else {
                // What is mounted within another goes first.
                let command = Command::new(["umount"]).operands(at.iter().rev());
                Remedy::command("unmount it first", command)
            }
        }
        Usage::Swap { device, .. } => Remedy::command(
            "stop swapping to it first",
            Command::new(["swapoff"]).operand(device),
        ),
        Usage::Held { release, chain } => match release {
            Some(release) => Remedy::command("take it down first", release.clone()),
            None => {
                let last = chain.last().map_or("it", String::as_str);
                Remedy::words(format!("stop what made {last} first"))
            }
        },
        Usage::Claimed { disk } => Remedy::command(
            "end that use first; it may be ZFS, a mount in a container, or a program",
            Command::new(["fuser", "--verbose"])
                .operand(format!("/dev/{}", disk.replace('!', "/"))),
        ),
        Usage::DefaultRoute { .. } => Remedy::words(
            "the host reaches the network by it: give it another default route first, and remove \
             this (ip route, ip -6 route)",
        ),
        Usage::SshRoute { .. } => Remedy::words(
            "you would cut yourself off: come by another way, or from the host's own console",
        ),
        Usage::Interface { leave, .. } => {
            let what = "take it out of there first";
            match leave {
                Some(leave) => Remedy::command(what, leave.clone()),
                None => Remedy::words(what),
            }
        }
        Usage::Representors { .. } => Remedy::command(
            "they go with the functions that they stand for; remove these first",
            remove_functions(address),
        ),
        Usage::NetworkStorage { at, .. } if at.iter().any(|path| is_system(path)) => {
            Remedy::words("the host runs from it, and will not survive it")
        }
        Usage::NetworkStorage { server, .. } => Remedy::words(format!(
            "the host has storage from {server} by it: unmount that and log out of it first, or give \
             the host another way there"
        )),
        Usage::StaticRoutes { .. } => {
            Remedy::words("what the host reaches by it needs another way (ip route, ip -6 route)")
        }
        Usage::OtherNamespace => Remedy::command(
            "end what has it, or have it given back: these are the namespaces, each with a process in it",
            Command::new(["lsns", "--type", "net"]),
        ),
        Usage::BootDisplay => Remedy::words(
            "the host's console would go dark: use another display, or reach the host by network",
        ),
        Usage::VirtualFunctions { .. } => {
            Remedy::command("remove them first", remove_functions(address))
        }
        Usage::Process(process) => {
            Remedy::command(format!("end process {} first", process.pid), kill(process))
        }
        Usage::Opened { process, .. } => Remedy::command(
            format!(
                "have {} close it, or end it: until then taking the device hangs, or breaks what it does",
                process.command
            ),
            kill(process),
        ),
    }
}

fn kill(process: &Process) -> Command {
    Command::new(["kill"]).operand(process.pid.to_string())
}

/// The command that removes a physical function's virtual ones.
pub(super) fn remove_functions(address: Bdf) -> Command {
    Command::new(["busway", "device", "vfs"])
        .operand(address.to_string())
        .operand("0")
}

/// The command that takes a bridge from its driver.
pub(super) fn let_go(bridge: &GroupBlocker) -> Command {
    let driver = format!("/sys/bus/pci/drivers/{}/unbind", bridge.driver);
    Command::write(bridge.address.to_string(), driver)
}

/// The command that gives devices to VFIO together.
pub(super) fn bind<'a>(addresses: impl IntoIterator<Item = &'a Bdf>) -> Command {
    let addresses = addresses.into_iter().map(Bdf::to_string);
    Command::new(["busway", "device", "bind"]).operands(addresses)
}

fn group_not_viable(
    f: &mut fmt::Formatter<'_>,
    group: u32,
    asked: &[Bdf],
    blockers: &[GroupBlocker],
    together: &Together,
) -> fmt::Result {
    let join = |addresses: &mut dyn Iterator<Item = &Bdf>| {
        addresses.map(Bdf::to_string).collect::<Vec<_>>().join(" ")
    };
    write!(
        f,
        "{} cannot go alone: IOMMU group {group} goes to a guest as a whole, and of it",
        join(&mut asked.iter())
    )?;
    for blocker in blockers {
        write!(f, "\n  {} is with {}", blocker.address, blocker.driver)?;
        if blocker.is_bridge {
            f.write_str(", a bridge")?;
        }
        for (index, usage) in blocker.uses.iter().enumerate() {
            write!(f, "{} {usage}", if index > 0 { "," } else { ", in use:" })?;
        }
    }
    for bridge in blockers.iter().filter(|b| b.is_bridge) {
        write!(f, "\n  take the bridge from its driver: {}", let_go(bridge))?;
    }
    let others: Vec<_> = blockers.iter().filter(|b| !b.is_bridge).collect();
    if others.is_empty() {
        return allow_group(f);
    }
    let all = match together {
        Together::Bind(all) => all,
        Together::Chipset(functions) => {
            return write!(f, "\n  {}", chipset(functions));
        }
    };
    let free = if others.iter().any(|b| !b.uses.is_empty()) {
        "free what is in use, then "
    } else {
        ""
    };
    let how = how_together(asked, all);
    write!(f, "\n  {free}{how}: {}", bind(all))?;
    allow_group(f)
}

/// In words, what binding `all` is for who asked for `asked`.
pub(super) fn how_together(asked: &[Bdf], all: &BTreeSet<Bdf>) -> &'static str {
    match asked.iter().all(|address| all.contains(address)) {
        true => "bind them together",
        false => "bind what it is part of, which gives the guest all that is behind that",
    }
}

/// Why these keep their group from being given away.
pub(super) fn chipset(functions: &[Bdf]) -> String {
    let names: Vec<_> = functions.iter().map(Bdf::to_string).collect();
    format!(
        "the host works by {} (functions of its chipset): nothing of this group can be given away",
        names.join(", ")
    )
}

/// Devices that vfio-pci turns away: Intel's QuickAssist, DSA and IAX (drivers/vfio/pci/vfio_pci.c,
/// vfio_pci_dev_in_denylist).
const DENIED: [u16; 8] = [
    0x0435, 0x0443, 0x0b25, 0x0cfe, 0x19e2, 0x19e3, 0x37c8, 0x37c9,
];

/// What vfio-pci makes of a device with known faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Denial {
    /// It turns it away.
    Stands,
    /// It was told to take it all the same.
    Waived,
}

impl Denial {
    /// None for a device that it has nothing against.
    pub(super) fn of(host: &Host, device: &HostDevice) -> Option<Self> {
        if device.vendor != 0x8086 || !DENIED.contains(&device.device) {
            return None;
        }
        let parameter = module_parameter(&host.root, "vfio_pci", "disable_denylist");
        Some(match parameter.as_deref() {
            Some("Y" | "y" | "1" | "on") => Self::Waived,
            _ => Self::Stands,
        })
    }
}

/// Why vfio-pci turns devices away (drivers/vfio/pci/vfio_pci.c, vfio_pci_dev_in_denylist).
pub(super) const DENIAL: &str = "by known faults a guest could harm the host";

/// What has vfio-pci take such a device all the same.
pub(super) fn allow_denied() -> Remedy {
    Remedy::command(
        "where the guest is trusted",
        Command::new(["modprobe", "-r", "vfio-pci"]).then(Command::new([
            "modprobe",
            "vfio-pci",
            "disable_denylist=1",
        ])),
    )
}

fn allow_group(f: &mut fmt::Formatter<'_>) -> fmt::Result {
    write!(
        f,
        "\n  or bind without them, though no guest can have it before they go too: {}",
        Permit::Group
    )
}
