//! Why a device is not moved, in words, with what to do about it.

use std::collections::BTreeSet;
use std::fmt;

use busway_iommu::{Command, IommuAdvice};
use busway_pci::Bdf;

use super::finding::Remedy;
use super::lines::Lines;
use super::permit::Permit;
use super::together::{GroupBlocker, Together};
use super::usage::{Process, StorageServer, Usage, is_system};

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
                     or have the kernel ask it to release the device, and wait: {}",
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
        Usage::NetworkStorage {
            server: StorageServer::Unseen,
            ..
        } => Remedy::words(
            "the host runs from another machine, and this may be the way there: take it only where \
             it is not",
        ),
        Usage::NetworkStorage { at, .. } if at.iter().any(|path| is_system(path)) => {
            Remedy::words("the host runs from it, and will not survive it")
        }
        Usage::NetworkStorage { server, .. } => Remedy::words(format!(
            "the host has storage{server} by it: unmount that and log out of it first, or give the \
             host another way there"
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
pub(super) fn release(bridge: &GroupBlocker) -> Command {
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
        write!(
            f,
            "\n  take the bridge from its driver: {}",
            release(bridge)
        )?;
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
    let how = how_together(asked, all, blockers);
    write!(f, "\n  {how}: {}", bind(all))?;
    allow_group(f)
}

/// In words, what binding `all` is for who asked for `asked`, and what comes before it.
pub(super) fn how_together(
    asked: &[Bdf],
    all: &BTreeSet<Bdf>,
    blockers: &[GroupBlocker],
) -> String {
    let in_use = |blocker: &GroupBlocker| !blocker.is_bridge && !blocker.uses.is_empty();
    let free = match blockers.iter().any(in_use) {
        true => "free what is in use, then ",
        false => "",
    };
    let how = match asked.iter().all(|address| all.contains(address)) {
        true => "bind them together",
        false => "bind what it is part of, which gives the guest all that is behind that",
    };
    format!("{free}{how}")
}

/// Why these keep their group from being given away.
pub(super) fn chipset(functions: &[Bdf]) -> String {
    let names: Vec<_> = functions.iter().map(Bdf::to_string).collect();
    format!(
        "the host works by {} (functions of its chipset): nothing of this group can be given away",
        names.join(", ")
    )
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
