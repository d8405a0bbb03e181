//! Access control services: what keeps devices apart that are behind one bridge or in one slot.
//!
//! PCIe 6.0 §7.7.11. A port without them may pass a request of one device straight to another, past the
//! IOMMU; the kernel then puts all that could reach each other into one group.

use std::fs;

use busway_pci::Bdf;

use super::device::HostDevice;
use super::host::Host;
use super::root::SysRoot;

/// What a port or a function of several has of ACS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Acs {
    /// It has the capability, and it is on.
    On,
    /// It has the capability, and it is off.
    Off,
    /// It does not have the capability.
    None,
    /// Its configuration space could not be read that far: only root may.
    Unknown,
}

/// The extended capability's id (PCIe 6.0 §7.7.11.1).
const ACS: u16 = 0x000d;
/// Source validation, request redirect, completion redirect and upstream forwarding: what the kernel
/// asks of a port (drivers/pci/pci.c, REQ_ACS_FLAGS, and source validation with it).
const WANTED: u16 = 0x001c;

impl Acs {
    pub(super) fn read(root: &SysRoot, address: Bdf) -> Self {
        let config = fs::read(root.device(address).join("config")).unwrap_or_default();
        if config.len() < 0x104 {
            return Self::Unknown;
        }
        let word = |at: usize| {
            let bytes = config.get(at..at + 2)?;
            Some(u16::from_le_bytes(bytes.try_into().ok()?))
        };
        // PCIe 6.0 §7.6.3: id, then version and the next one's offset. A ring ends by its length.
        let mut at = 0x100;
        for _ in 0..(config.len() / 4) {
            match word(at) {
                Some(ACS) => {
                    let control = word(at + 6).unwrap_or(0);
                    return if control & WANTED == WANTED {
                        Self::On
                    } else {
                        Self::Off
                    };
                }
                None | Some(0xffff) => break,
                Some(_) => {}
            }
            at = usize::from(word(at + 2).unwrap_or(0) >> 4) & !3;
            if at < 0x100 {
                break;
            }
        }
        Self::None
    }
}

/// The members of a device's group that fail to keep it apart from the others: the ports above it that
/// are in the group with it, or the device itself where its functions share it.
pub(super) fn leaks(host: &Host, device: &HostDevice) -> Vec<(Bdf, Acs)> {
    let Some(group) = device.group else {
        return Vec::new();
    };
    let same_slot = |other: &HostDevice| {
        let (one, two) = (other.address.to_string(), device.address.to_string());
        one.rsplit_once('.').map(|(slot, _)| slot) == two.rsplit_once('.').map(|(slot, _)| slot)
    };
    let mut others = host
        .group(group)
        .filter(|other| other.address != device.address);
    if others.by_ref().all(same_slot) {
        return Vec::new();
    }
    let bridges = host.above(device).into_iter();
    bridges
        .filter(|bridge| bridge.group == Some(group))
        .map(|bridge| (bridge.address, Acs::read(host.root(), bridge.address)))
        .filter(|(_, acs)| *acs != Acs::On)
        .collect()
}
