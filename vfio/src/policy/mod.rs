//! What a guest sees of a device's configuration space: the table.
//!
//! Three lists: the header's registers, the capabilities, the extended capabilities. What no rule
//! names is the device's own, read and, below 0x100, written, for VFIO guards the host below this: it
//! virtualises the BARs, keeps MPS and phantom functions to itself and drops writes to read-only
//! registers (Linux, drivers/vfio/pci/vfio_pci_config.c). Devices have registers of their own between the
//! capabilities there, which drivers need; in the extended space such cannot be told from capabilities
//! that VFIO unlinked, and are read-only. The rules say where the guest's view has to differ
//! from that. Sections are PCIe 6.0's.
//!
//! What a row names as [`Action::Pass`] is more than what none names: it is put back to what it held
//! at power-on when the guest resets the device, for the kernel's reset restores what the guest
//! wrote.

mod extended;
mod standard;

use busway_pci::spec;

/// Who answers for a bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// The device, read and written.
    Pass,
    /// The device, read; writing ones clears it.
    Clear,
    /// The device, read; writes go nowhere.
    ReadOnly,
    /// Busway holds it, and the guest can change it. For the header, whose registers are a type 0
    /// header's.
    Emulate,
    /// Busway holds a copy of what the device had at power-on, and the guest can change the copy. The
    /// device keeps what the host gave it. For a capability.
    Shadow,
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

use Action::{Clear, Emulate, Hide, Pass, ReadOnly, Shadow};
pub(crate) use extended::{
    EXT_CAP_DESIGNATED_VENDOR, EXT_CAP_POWER_BUDGETING, EXTENDED, OF_A_LINK,
};
pub(crate) use standard::{
    AF_CAPABILITIES_FLR, AF_CONTROL_FLR, CAPABILITIES, EXP_DEVICE_CAPABILITIES_FLR,
    EXP_DEVICE_CONTROL_FLR, EXP_LINK, EXP_TYPE, EXP_TYPE_ENDPOINT, EXP_TYPE_INTEGRATED_ENDPOINT,
    EXP_TYPE_LEGACY_ENDPOINT, PM_CONTROL, PM_STATE,
};

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
        "interrupt disable §7.5.1.1.3 is told to VFIO while the pin is connected; else the device's \
         own stays disabled",
    ),
    rule(
        0x04,
        spec::COMMAND_SERR as u32,
        Emulate,
        "SERR# enable §7.5.1.1.3: whether the host is told of errors is the host's choice",
    ),
    rule(
        0x04,
        !(spec::COMMAND_IO | spec::COMMAND_MEMORY | spec::COMMAND_SERR | spec::COMMAND_INTX_DISABLE)
            as u32,
        Pass,
        "bus master and parity enables §7.5.1.1.3",
    ),
    rule(
        0x04,
        (spec::STATUS_INTERRUPT as u32) << 16,
        ReadOnly,
        "interrupt status §7.5.1.1.4; hidden where there is no pin",
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
    rule(0x30, ALL, Emulate, "expansion ROM §7.5.1.2.4"),
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
        "interrupt pin §7.5.1.1.13: the device's, where the host can use it",
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
    /// It stays in the list, and of its bytes, this many at most, none can be written.
    ReadOnly(u16),
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

const fn kept(id: u16, rules: &'static [Rule], why: &'static str) -> CapabilityRule {
    CapabilityRule {
        id,
        keep: Keep::Yes(rules),
        why,
    }
}

const fn read_only(id: u16, size: u16, why: &'static str) -> CapabilityRule {
    CapabilityRule {
        id,
        keep: Keep::ReadOnly(size),
        why,
    }
}

const fn hidden(id: u16, size: u16, why: &'static str) -> CapabilityRule {
    CapabilityRule {
        id,
        keep: Keep::No(size),
        why,
    }
}

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
            Keep::ReadOnly(_) | Keep::No(_) => None,
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
    fn no_capability_is_named_twice() {
        for table in [CAPABILITIES, EXTENDED] {
            for (i, one) in table.iter().enumerate() {
                assert!(
                    table[i + 1..].iter().all(|other| other.id != one.id),
                    "{one:?}"
                );
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
