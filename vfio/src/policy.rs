//! What a guest sees of a device's configuration space: the table.
//!
//! Three lists: the header's registers, the capabilities, the extended capabilities. What no rule
//! names is the device's own, read and written, for VFIO guards the host below this: it virtualises
//! the BARs, keeps MPS and phantom functions to itself and drops writes to read-only registers
//! (Linux, drivers/vfio/pci/vfio_pci_config.c). The rules say where the guest's view has to differ
//! from that. Sections are PCIe 6.0's.

use busway_pci::spec;

/// Who answers for a bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// The device, read and written.
    Pass,
    /// The device, read; writes go nowhere.
    ReadOnly,
    /// Busway holds it, and the guest can change it.
    Emulate,
    /// Busway holds it, and the guest cannot change it: zero unless something is put there.
    Hide,
}

/// What holds for some bits of a doubleword.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    /// The doubleword, from the start of configuration space or of the capability.
    pub(crate) offset: u16,
    /// Which of its bits.
    pub(crate) mask: u32,
    pub(crate) action: Action,
    /// For people: the table is documentation as well.
    #[cfg_attr(not(test), expect(dead_code, reason = "read by people and tests"))]
    pub(crate) why: &'static str,
}

const fn rule(offset: u16, mask: u32, action: Action, why: &'static str) -> Rule {
    Rule {
        offset,
        mask,
        action,
        why,
    }
}

const ALL: u32 = u32::MAX;

use Action::{Emulate, Hide, Pass, ReadOnly};

/// The type 0 header. §7.5.1.1, §7.5.1.2
pub(crate) const HEADER: &[Rule] = &[
    rule(
        0x00,
        ALL,
        ReadOnly,
        "identity §7.5.1.1.1; for a VF, whose own registers read ones (§9.3.4.1.1), VFIO fills it in",
    ),
    rule(
        0x04,
        (spec::COMMAND_IO | spec::COMMAND_MEMORY) as u32,
        Emulate,
        "decoding §7.5.1.1.3 is in the guest's address space; the device's own stays on, so that a \
         mapped BAR never faults",
    ),
    rule(
        0x04,
        spec::COMMAND_INTX_DISABLE as u32,
        Emulate,
        "the pin is not connected; the device's own stays disabled",
    ),
    rule(
        0x04,
        !(spec::COMMAND_IO | spec::COMMAND_MEMORY | spec::COMMAND_INTX_DISABLE) as u32,
        Pass,
        "bus master, parity and SERR# enables §7.5.1.1.3",
    ),
    rule(
        0x04,
        (spec::STATUS_INTERRUPT as u32) << 16,
        Hide,
        "interrupt status §7.5.1.1.4 of a pin that is not connected",
    ),
    rule(
        0x04,
        (spec::STATUS_CAPABILITIES as u32) << 16,
        Hide,
        "says whether the relinked list has anything §7.5.1.1.4",
    ),
    rule(
        0x04,
        !((spec::STATUS_INTERRUPT | spec::STATUS_CAPABILITIES) as u32) << 16,
        ReadOnly,
        "status §7.5.1.1.4; VFIO keeps the clearing of errors to the host",
    ),
    rule(
        0x08,
        ALL,
        ReadOnly,
        "revision and class §7.5.1.1.5, §7.5.1.1.6",
    ),
    rule(
        0x0c,
        0x0000_ffff,
        Pass,
        "cache line size and latency timer §7.5.1.1.7, §7.5.1.1.8",
    ),
    rule(
        0x0c,
        0x0080_0000,
        Hide,
        "multi-function §7.5.1.1.9 is a matter of where the guest has it",
    ),
    rule(0x0c, 0x007f_0000, ReadOnly, "header layout §7.5.1.1.9"),
    rule(
        0x0c,
        0xff00_0000,
        Hide,
        "BIST §7.5.1.1.10 would take the device away for up to two seconds",
    ),
    rule(0x10, ALL, Emulate, "BAR 0 §7.5.1.2.1"),
    rule(0x14, ALL, Emulate, "BAR 1"),
    rule(0x18, ALL, Emulate, "BAR 2"),
    rule(0x1c, ALL, Emulate, "BAR 3"),
    rule(0x20, ALL, Emulate, "BAR 4"),
    rule(0x24, ALL, Emulate, "BAR 5"),
    rule(0x28, ALL, ReadOnly, "CardBus CIS pointer §7.5.1.2.2"),
    rule(0x2c, ALL, ReadOnly, "subsystem identity §7.5.1.2.3"),
    rule(0x30, ALL, Hide, "expansion ROM §7.5.1.2.4: not given yet"),
    rule(0x34, 0xff, Hide, "start of the relinked list §7.5.1.1.11"),
    rule(0x34, !0xff, ReadOnly, "reserved"),
    rule(0x38, ALL, ReadOnly, "reserved"),
    rule(
        0x3c,
        0xff,
        Emulate,
        "interrupt line §7.5.1.1.12: the guest's notes",
    ),
    rule(
        0x3c,
        0xff00,
        Hide,
        "interrupt pin §7.5.1.1.13: not connected yet, so the guest uses MSI or MSI-X",
    ),
    rule(
        0x3c,
        0xffff_0000,
        ReadOnly,
        "Min_Gnt and Max_Lat §7.5.1.2.5",
    ),
];

/// What becomes of a capability.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Keep {
    /// It stays in the list, with these rules.
    Yes(&'static [Rule]),
    /// It leaves the list, and its bytes, this many at most, read zero.
    No(u16),
}

/// What holds for a capability.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CapabilityRule {
    pub(crate) id: u16,
    pub(crate) keep: Keep,
    /// For people.
    #[cfg_attr(not(test), expect(dead_code, reason = "read by people and tests"))]
    pub(crate) why: &'static str,
}

const fn hidden(id: u16, size: u16, why: &'static str) -> CapabilityRule {
    CapabilityRule {
        id,
        keep: Keep::No(size),
        why,
    }
}

/// Enhanced allocation. §7.8.5
const CAP_ENHANCED_ALLOCATION: u16 = 0x14;

/// The capabilities of the header's list. §7.5.1.1.11
///
/// MSI and MSI-X (§7.7.1, §7.7.2) are state machines of their own and not in here.
pub(crate) const CAPABILITIES: &[CapabilityRule] = &[
    CapabilityRule {
        id: spec::CAP_PCI_EXPRESS as u16,
        keep: Keep::Yes(EXPRESS),
        why: "the link is the host's, the reset is carried out by VFIO",
    },
    CapabilityRule {
        id: spec::CAP_ADVANCED_FEATURES as u16,
        keep: Keep::Yes(&[rule(
            0x04,
            AF_CONTROL_FLR,
            Hide,
            "initiate FLR §7.9.21.4: carried out by VFIO, reads zero",
        )]),
        why: "the reset is carried out by VFIO",
    },
    hidden(
        CAP_ENHANCED_ALLOCATION,
        0x64,
        "fixed addresses are the host's §7.8.5",
    ),
];

/// The PCI Express capability. §7.5.3
const EXPRESS: &[Rule] = &[
    rule(
        0x00,
        (spec::EXP_SLOT_IMPLEMENTED as u32) << 16,
        Hide,
        "slot implemented §7.5.3.2: not of an endpoint",
    ),
    rule(
        0x08,
        EXP_DEVICE_CONTROL_FLR,
        Hide,
        "initiate FLR §7.5.3.4: carried out by VFIO, reads zero",
    ),
    rule(0x08, 0xffff_0000, ReadOnly, "device status §7.5.3.5"),
    rule(0x0c, ALL, ReadOnly, "link capabilities §7.5.3.6"),
    rule(
        0x10,
        ALL,
        ReadOnly,
        "link control and status §7.5.3.7: the link is shared with the host's port",
    ),
    rule(0x14, ALL, Hide, "slot capabilities §7.5.3.9: a port's"),
    rule(
        0x18,
        ALL,
        Hide,
        "slot control and status §7.5.3.10: a port's",
    ),
    rule(
        0x1c,
        ALL,
        Hide,
        "root control and capabilities §7.5.3.12: a port's",
    ),
    rule(0x20, ALL, Hide, "root status §7.5.3.14: a port's"),
    rule(0x24, 1 << 5, Hide, "ARI forwarding §7.5.3.15: a port's"),
    rule(
        0x28,
        1 << 5,
        Hide,
        "ARI forwarding enable §7.5.3.16: a port's",
    ),
    rule(0x2c, ALL, ReadOnly, "link capabilities 2 §7.5.3.18"),
    rule(0x30, ALL, ReadOnly, "link control and status 2 §7.5.3.19"),
    rule(0x34, ALL, Hide, "slot capabilities 2 §7.5.3.21: a port's"),
    rule(
        0x38,
        ALL,
        Hide,
        "slot control and status 2 §7.5.3.22: a port's",
    ),
];

/// Device control: initiate function level reset. §7.5.3.4
pub(crate) const EXP_DEVICE_CONTROL_FLR: u32 = 1 << 15;
/// Device capabilities: function level reset is there. §7.5.3.3
pub(crate) const EXP_DEVICE_CAPABILITIES_FLR: u32 = 1 << 28;
/// AF control, in the doubleword that it begins: initiate FLR. §7.9.21.4
pub(crate) const AF_CONTROL_FLR: u32 = 1 << 0;
/// AF capabilities, in the doubleword of the header: FLR is there. §7.9.21.3
pub(crate) const AF_CAPABILITIES_FLR: u32 = 1 << 25;

// Extended capabilities that `spec` has no name for. PCI Code and ID Assignment 1.15 §3
const EXT_CAP_MRIOV: u16 = 0x0011;
const EXT_CAP_MULTICAST: u16 = 0x0012;
const EXT_CAP_TPH: u16 = 0x0017;
const EXT_CAP_DPC: u16 = 0x001d;
const EXT_CAP_L1_SUBSTATES: u16 = 0x001e;
const EXT_CAP_PTM: u16 = 0x001f;

/// The extended capabilities. §7.6.3
pub(crate) const EXTENDED: &[CapabilityRule] = &[
    hidden(
        0,
        4,
        "the null capability: a place-holder of VFIO's §7.9.28",
    ),
    hidden(
        spec::EXT_CAP_ARI,
        0x08,
        "names the next function of the host's device §7.8.8",
    ),
    hidden(
        spec::EXT_CAP_ATS,
        0x08,
        "needs an IOMMU that the guest can see §10.5.1",
    ),
    hidden(
        spec::EXT_CAP_SRIOV,
        0x40,
        "virtual functions would appear on the host §9.3.3",
    ),
    hidden(EXT_CAP_MRIOV, 0x40, "the fabric is the host's"),
    hidden(EXT_CAP_MULTICAST, 0x30, "addresses are the host's §7.9.11"),
    hidden(
        spec::EXT_CAP_PRI,
        0x10,
        "needs an IOMMU that the guest can see §10.5.2",
    ),
    hidden(
        spec::EXT_CAP_RESIZABLE_BAR,
        0x34,
        "the size of a BAR is the host's to choose §7.8.6",
    ),
    hidden(
        EXT_CAP_TPH,
        0x0c,
        "steering tags name the host's processors §7.9.13",
    ),
    hidden(
        spec::EXT_CAP_PASID,
        0x08,
        "needs an IOMMU that the guest can see §7.8.9",
    ),
    hidden(
        EXT_CAP_DPC,
        0x44,
        "containment is between the device and the host's port §7.9.14",
    ),
    hidden(
        EXT_CAP_L1_SUBSTATES,
        0x14,
        "is agreed upon with the host's port §7.8.3",
    ),
    hidden(
        EXT_CAP_PTM,
        0x0c,
        "is agreed upon with the host's port §7.9.15",
    ),
    hidden(
        spec::EXT_CAP_VF_RESIZABLE_BAR,
        0x34,
        "belongs to SR-IOV §7.8.7",
    ),
];

/// The rule for a capability, where there is one.
pub(crate) fn find(rules: &'static [CapabilityRule], id: u16) -> Option<&'static CapabilityRule> {
    rules.iter().find(|rule| rule.id == id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_says_why_and_no_two_claim_a_bit() {
        let express = CAPABILITIES.iter().chain(EXTENDED);
        for rule in express.clone() {
            assert!(!rule.why.is_empty());
        }
        let lists = express.filter_map(|rule| match rule.keep {
            Keep::Yes(rules) => Some(rules),
            Keep::No(_) => None,
        });
        for rules in lists.chain([HEADER]) {
            for (i, one) in rules.iter().enumerate() {
                assert!(!one.why.is_empty() && one.offset % 4 == 0);
                for other in &rules[i + 1..] {
                    assert!(
                        one.offset != other.offset || one.mask & other.mask == 0,
                        "{one:?} {other:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_bit_of_the_header_has_its_rule() {
        for offset in (0..spec::HEADER_SIZE).step_by(4) {
            let covered = HEADER
                .iter()
                .filter(|rule| rule.offset == offset)
                .fold(0, |mask, rule| mask | rule.mask);
            assert_eq!(covered, ALL, "{offset:#x}");
        }
    }
}
