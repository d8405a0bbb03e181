//! What must be given away together with a device, and what cannot be.

use std::collections::BTreeSet;

use busway_iommu::keeps_group;
use busway_pci::Bdf;

use super::device::HostDevice;
use super::host::Host;
use super::usage::Usage;

/// What has to be done for the rest of a device's IOMMU group to go with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Together {
    /// These are to be bound, in one command.
    Bind(BTreeSet<Bdf>),
    /// These of the group are functions of the chipset by which the host itself works; never empty.
    Chipset(Vec<Bdf>),
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

impl Together {
    /// For `device`, where those in `asked` are to go too.
    pub(super) fn of(host: &Host, device: &HostDevice, asked: &BTreeSet<Bdf>) -> Self {
        let members = device.group.into_iter().flat_map(|group| host.group(group));
        let members = members.filter(|member| !member.is_bridge());
        let members = members.map(|member| member.address);
        let mut all: BTreeSet<_> = members.filter(|member| asked.contains(member)).collect();
        all.insert(device.address);
        let blockers = device
            .group
            .map_or_else(Vec::new, |group| group_blockers(host, group, asked));
        let others = blockers.iter().filter(|blocker| !blocker.is_bridge);
        let others: Vec<_> = others.map(|blocker| blocker.address).collect();
        let of_chipset = |address: &Bdf| host.device(*address).is_some_and(is_of_chipset);
        let chipset: Vec<_> = others.iter().copied().filter(of_chipset).collect();
        if !chipset.is_empty() {
            return Self::Chipset(chipset);
        }
        all.extend(others);
        // What ends with another of them goes by that one.
        let ends = |address: &Bdf| host.makers(*address).iter().any(|m| all.contains(m));
        Self::Bind(all.iter().copied().filter(|a| !ends(a)).collect())
    }
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
            uses: host.breaks(device.address),
        })
    };
    host.group(group).filter_map(blocks).collect()
}

/// Whether the host itself works by this function, where the chipset has it.
fn is_of_chipset(device: &HostDevice) -> bool {
    let kind = busway_iommu::is_of_chipset(device.class);
    kind && device.parent.is_none() && device.made_by.is_none()
}
