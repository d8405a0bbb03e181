//! The capabilities of the header's list. PCIe 6.0 §7.5.1.1.11

use busway_pci::spec;

use super::{
    ALL, CapabilityRule, Hide, Pass, ReadOnly, Rule, Shadow, hidden, kept, read_only, rule,
};

// Capabilities that `spec` has no name for. PCI Code and ID Assignment 1.15 §2
const CAP_AGP: u16 = 0x02;
const CAP_VITAL_PRODUCT_DATA: u16 = 0x03;
const CAP_SLOT_NUMBER: u16 = 0x04;
const CAP_COMPACT_PCI_HOT_SWAP: u16 = 0x06;
const CAP_PCIX: u16 = 0x07;
const CAP_HYPERTRANSPORT: u16 = 0x08;
const CAP_DEBUG_PORT: u16 = 0x0a;
const CAP_HOT_PLUG: u16 = 0x0c;
const CAP_SECURE_DEVICE: u16 = 0x0f;
const CAP_SATA: u16 = 0x12;
const CAP_ENHANCED_ALLOCATION: u16 = 0x14;
const CAP_FLATTENING_PORTAL_BRIDGE: u16 = 0x15;

/// What becomes of them. MSI and MSI-X (§7.7.1, §7.7.2) are state machines of their own and not in
/// here.
pub(crate) const CAPABILITIES: &[CapabilityRule] = &[
    kept(
        spec::CAP_POWER_MANAGEMENT as u16,
        POWER_MANAGEMENT,
        "the guest's to manage, by VFIO; wake-up events are not",
    ),
    read_only(
        CAP_AGP,
        0x0c,
        "rates are agreed upon with the host's bridge",
    ),
    kept(
        CAP_VITAL_PRODUCT_DATA,
        &[],
        "VFIO reads and writes the data for the guest §7.9.18: one transfer at a time, with a time \
         limit",
    ),
    hidden(CAP_SLOT_NUMBER, 0x04, "an expansion chassis is the host's"),
    kept(
        spec::CAP_VENDOR as u16,
        &[],
        "only its driver knows what it is §7.9.4",
    ),
    hidden(
        CAP_COMPACT_PCI_HOT_SWAP,
        0x04,
        "the handle and its lamp are the host's",
    ),
    kept(
        CAP_PCIX,
        &[],
        "how many reads of which size are under way is the driver's to choose",
    ),
    read_only(CAP_HYPERTRANSPORT, 0x04, "the link is the host's"),
    read_only(CAP_DEBUG_PORT, 0x04, "says where in a BAR it is"),
    hidden(CAP_HOT_PLUG, 0x08, "a bridge's"),
    hidden(
        spec::CAP_BRIDGE_SUBSYSTEM as u16,
        0x08,
        "a bridge's §7.9.23",
    ),
    hidden(CAP_SECURE_DEVICE, 0x18, "is the host's IOMMU"),
    kept(
        spec::CAP_PCI_EXPRESS as u16,
        EXPRESS,
        "the link is the host's, the reset is carried out by VFIO",
    ),
    read_only(CAP_SATA, 0x08, "says where in a BAR its index and data are"),
    kept(
        spec::CAP_ADVANCED_FEATURES as u16,
        &[rule(
            0x04,
            AF_CONTROL_FLR,
            Hide,
            "initiate FLR §7.9.21.4: carried out by VFIO, reads zero",
        )],
        "the reset is carried out by VFIO",
    ),
    hidden(
        CAP_ENHANCED_ALLOCATION,
        0x64,
        "fixed addresses are the host's §7.8.5",
    ),
    hidden(CAP_FLATTENING_PORTAL_BRIDGE, 0x24, "a bridge's §7.8.10"),
];

/// Power management. §7.5.2
const POWER_MANAGEMENT: &[Rule] = &[
    rule(
        0x00,
        0xf800_0000,
        Hide,
        "PME support §7.5.2.1: the host's kernel handles wake-up events",
    ),
    rule(
        0x00,
        0x07ff_0000,
        ReadOnly,
        "which states there are §7.5.2.1",
    ),
    rule(
        0x04,
        PM_STATE as u32,
        ReadOnly,
        "the state §7.5.2.2: changed by VFIO, which saves and restores a device that forgets, and \
         not before its BARs are unmapped",
    ),
    rule(
        0x04,
        1 << 8 | 1 << 15,
        Hide,
        "PME enable and status §7.5.2.2: the host's kernel handles wake-up events",
    ),
    rule(
        0x04,
        0xf << 9,
        Pass,
        "what the data register shows §7.5.2.2",
    ),
    rule(
        0x04,
        0xffff_60fc,
        ReadOnly,
        "No_Soft_Reset, data scale, data §7.5.2.2, §7.5.2.3",
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
    rule(0x04, ALL, ReadOnly, "device capabilities §7.5.3.3"),
    rule(
        0x08,
        EXP_DEVICE_CONTROL_FLR,
        Hide,
        "initiate FLR §7.5.3.4: carried out by VFIO, reads zero",
    ),
    rule(
        0x08,
        0x000f,
        Shadow,
        "which errors are reported §7.5.3.4: the host decides, and hears of them",
    ),
    rule(
        0x08,
        0x7ff0,
        Pass,
        "device control §7.5.3.4: VFIO keeps the payload's size and phantom functions to the host",
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
    rule(0x24, !(1 << 5), ReadOnly, "device capabilities 2 §7.5.3.15"),
    rule(
        0x28,
        1 << 5,
        Hide,
        "ARI forwarding enable §7.5.3.16: a port's",
    ),
    rule(
        0x28,
        1 << 10 | 1 << 12 | 0b11 << 13,
        ReadOnly,
        "LTR, 10-bit tags and OBFF §7.5.3.16 work only as far as the host's bridges take part",
    ),
    rule(
        0x28,
        0x8bdf,
        Pass,
        "device control 2 §7.5.3.16: completion timeouts, atomic operations, ordering",
    ),
    rule(0x28, 0xffff_0000, ReadOnly, "device status 2 §7.5.3.17"),
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

/// The PCI Express capability's doublewords that tell of a link; an integrated endpoint has none. §7.5.3.6 to
/// §7.5.3.8, §7.5.3.18 to §7.5.3.20
pub(crate) const EXP_LINK: &[u16] = &[
    spec::EXP_LINK_CAPABILITIES,
    spec::EXP_LINK_CONTROL,
    spec::EXP_LINK_CAPABILITIES_2,
    spec::EXP_LINK_CONTROL_2,
];

/// Device/port type, in the first doubleword of the PCI Express capability. §7.5.3.2
pub(crate) const EXP_TYPE: u32 = 0xf << 20;
pub(crate) const EXP_TYPE_ENDPOINT: u32 = 0b0000 << 20;
pub(crate) const EXP_TYPE_LEGACY_ENDPOINT: u32 = 0b0001 << 20;
pub(crate) const EXP_TYPE_INTEGRATED_ENDPOINT: u32 = 0b1001 << 20;

/// Power management's control and status register. §7.5.2.2
pub(crate) const PM_CONTROL: u16 = 4;
/// In it: the state, D0 to D3hot.
pub(crate) const PM_STATE: u8 = 0b11;

/// Device control: initiate function level reset. §7.5.3.4
pub(crate) const EXP_DEVICE_CONTROL_FLR: u32 = 1 << 15;
/// Device capabilities: function level reset is there. §7.5.3.3
pub(crate) const EXP_DEVICE_CAPABILITIES_FLR: u32 = 1 << 28;
/// AF control, in the doubleword that it begins: initiate FLR. §7.9.21.4
pub(crate) const AF_CONTROL_FLR: u32 = 1 << 0;
/// AF capabilities, in the doubleword of the header: FLR is there. §7.9.21.3
pub(crate) const AF_CAPABILITIES_FLR: u32 = 1 << 25;
