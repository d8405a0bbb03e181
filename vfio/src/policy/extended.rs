//! The extended capabilities. PCIe 6.0 §7.6.3
//!
//! VFIO has no writes for most of those that stay, and those are read-only here as well, so that the
//! table says what happens. Some that the table hides VFIO unlinks, and others it does not, as kernels go.
//!
//! What is of no capability that stays cannot be written: it may be one that VFIO unlinked, whose bytes
//! it passes on as they are.

use busway_pci::spec;

use super::{ALL, CapabilityRule, Clear, ReadOnly, Rule, Shadow, hidden, kept, read_only, rule};

// Extended capabilities that `spec` has no name for. PCI Code and ID Assignment 1.15 §3
const NULL: u16 = 0x0000;
const VIRTUAL_CHANNEL: u16 = 0x0002;
pub(crate) const EXT_CAP_POWER_BUDGETING: u16 = 0x0004;
const ROOT_COMPLEX_LINKS: u16 = 0x0005;
const ROOT_COMPLEX_LINK_CONTROL: u16 = 0x0006;
const ROOT_COMPLEX_COLLECTOR: u16 = 0x0007;
const MULTI_FUNCTION_VIRTUAL_CHANNEL: u16 = 0x0008;
const VIRTUAL_CHANNEL_WITH_MFVC: u16 = 0x0009;
const ROOT_COMPLEX_HEADER: u16 = 0x000a;
const ACCESS_CORRELATION: u16 = 0x000c;
const MRIOV: u16 = 0x0011;
const MULTICAST: u16 = 0x0012;
const POWER_ALLOCATION: u16 = 0x0016;
const TPH: u16 = 0x0017;
const SECONDARY_EXPRESS: u16 = 0x0019;
const PROTOCOL_MULTIPLEXING: u16 = 0x001a;
const LN_REQUESTER: u16 = 0x001c;
const DPC: u16 = 0x001d;
const L1_SUBSTATES: u16 = 0x001e;
const PTM: u16 = 0x001f;
const M_PCIE: u16 = 0x0020;
const FRS_QUEUEING: u16 = 0x0021;
const READINESS_TIME: u16 = 0x0022;
pub(crate) const EXT_CAP_DESIGNATED_VENDOR: u16 = 0x0023;
const DATA_LINK_FEATURE: u16 = 0x0025;
const PHYSICAL_LAYER_16: u16 = 0x0026;
const LANE_MARGINING: u16 = 0x0027;
const HIERARCHY_ID: u16 = 0x0028;
const ENCLOSURE: u16 = 0x0029;
const PHYSICAL_LAYER_32: u16 = 0x002a;
const ALTERNATE_PROTOCOL: u16 = 0x002b;
const SYSTEM_FIRMWARE_INTERMEDIARY: u16 = 0x002c;
const SHADOW_FUNCTIONS: u16 = 0x002d;
const DATA_OBJECT_EXCHANGE: u16 = 0x002e;
const DEVICE_3: u16 = 0x002f;
const IDE: u16 = 0x0030;
const PHYSICAL_LAYER_64: u16 = 0x0031;
const FLIT_LOGGING: u16 = 0x0032;
const FLIT_PERFORMANCE: u16 = 0x0033;
const FLIT_ERROR_INJECTION: u16 = 0x0034;

/// Those that tell of a link, or of the way above it: an integrated endpoint on bus 0 has none.
pub(crate) const OF_A_LINK: &[u16] = &[
    spec::EXT_CAP_LTR,
    SECONDARY_EXPRESS,
    DATA_LINK_FEATURE,
    PHYSICAL_LAYER_16,
    PHYSICAL_LAYER_32,
    PHYSICAL_LAYER_64,
];

/// What becomes of them.
pub(crate) const EXTENDED: &[CapabilityRule] = &[
    hidden(
        NULL,
        4,
        "the null capability: a place-holder of VFIO's §7.9.28",
    ),
    kept(
        spec::EXT_CAP_AER,
        ERRORS,
        "the guest's driver reads and clears what the device found; what the host is told of it is \
         the host's choice",
    ),
    read_only(
        VIRTUAL_CHANNEL,
        0x1c,
        "arbitration is agreed upon with the host's port §7.9.1",
    ),
    read_only(spec::EXT_CAP_SERIAL_NUMBER, 0x0c, "identity §7.9.3"),
    kept(
        EXT_CAP_POWER_BUDGETING,
        &[],
        "selecting what is read changes nothing §7.8.1",
    ),
    hidden(ROOT_COMPLEX_LINKS, 0x20, "a root complex's §7.9.8"),
    hidden(ROOT_COMPLEX_LINK_CONTROL, 0x0c, "a root complex's §7.9.9"),
    hidden(ROOT_COMPLEX_COLLECTOR, 0x0c, "a root complex's §7.9.10"),
    read_only(
        MULTI_FUNCTION_VIRTUAL_CHANNEL,
        0x1c,
        "arbitration is between functions that other guests may have §7.9.2",
    ),
    read_only(
        VIRTUAL_CHANNEL_WITH_MFVC,
        0x1c,
        "arbitration is agreed upon with the host's port §7.9.1",
    ),
    hidden(ROOT_COMPLEX_HEADER, 0x14, "a root complex's §7.9.7"),
    kept(
        spec::EXT_CAP_VENDOR,
        &[],
        "only its driver knows what it is §7.9.5",
    ),
    hidden(
        ACCESS_CORRELATION,
        0x08,
        "trusted configuration accesses are the host's",
    ),
    read_only(
        spec::EXT_CAP_ACS,
        0x08,
        "which functions the host keeps apart is the host's choice §7.7.11",
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
    hidden(MRIOV, 0x40, "the fabric is the host's"),
    hidden(MULTICAST, 0x30, "addresses are the host's §7.9.11"),
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
    read_only(
        POWER_ALLOCATION,
        0x10,
        "how much the slot supplies is the host's to know §7.9.12",
    ),
    hidden(
        TPH,
        0x0c,
        "steering tags name the host's processors §7.9.13",
    ),
    kept(
        spec::EXT_CAP_LTR,
        &[rule(
            0x04,
            ALL,
            Shadow,
            "the latencies that firmware allows §7.8.2.2, §7.8.2.3: the guest's notes; the device \
             keeps the host's",
        )],
        "the device reports to the host's ports",
    ),
    read_only(
        SECONDARY_EXPRESS,
        0x0e,
        "the link is shared with the host's port §7.7.3",
    ),
    hidden(
        PROTOCOL_MULTIPLEXING,
        0x40,
        "is agreed upon with the host's port",
    ),
    hidden(
        spec::EXT_CAP_PASID,
        0x08,
        "needs an IOMMU that the guest can see §7.8.9",
    ),
    hidden(LN_REQUESTER, 0x08, "registers lines of the host's memory"),
    hidden(
        DPC,
        0x44,
        "containment is between the device and the host's port §7.9.14",
    ),
    hidden(
        L1_SUBSTATES,
        0x14,
        "is agreed upon with the host's port §7.8.3",
    ),
    hidden(PTM, 0x0c, "is agreed upon with the host's port §7.9.15"),
    hidden(M_PCIE, 0x1c, "the link is the host's"),
    hidden(FRS_QUEUEING, 0x10, "a root port's §7.8.12"),
    read_only(
        READINESS_TIME,
        0x0c,
        "how long to wait after a reset §7.9.16",
    ),
    kept(
        EXT_CAP_DESIGNATED_VENDOR,
        &[],
        "only its driver knows what it is §7.9.6",
    ),
    hidden(
        spec::EXT_CAP_VF_RESIZABLE_BAR,
        0x34,
        "belongs to SR-IOV §7.8.7",
    ),
    read_only(
        DATA_LINK_FEATURE,
        0x0c,
        "the link is shared with the host's port §7.7.4",
    ),
    read_only(
        PHYSICAL_LAYER_16,
        0x20,
        "the link is shared with the host's port §7.7.5",
    ),
    hidden(
        LANE_MARGINING,
        0x88,
        "measures at the host's port, while the link is in use §7.7.8",
    ),
    hidden(HIERARCHY_ID, 0x20, "names the host §7.9.17"),
    hidden(ENCLOSURE, 0x10, "the lamps are on the host §7.9.19"),
    read_only(
        PHYSICAL_LAYER_32,
        0x20,
        "the link is shared with the host's port §7.7.6",
    ),
    hidden(
        ALTERNATE_PROTOCOL,
        0x14,
        "is agreed upon with the host's port §7.9.20",
    ),
    hidden(SYSTEM_FIRMWARE_INTERMEDIARY, 0x14, "a port's §7.9.22"),
    hidden(
        SHADOW_FUNCTIONS,
        0x1c,
        "names other functions of the host's device §7.9.25",
    ),
    hidden(
        DATA_OBJECT_EXCHANGE,
        0x18,
        "the mailbox serves one asker, and the host's kernel is that §7.9.24",
    ),
    read_only(DEVICE_3, 0x10, "14-bit tags are the host's path's §7.7.9"),
    hidden(
        IDE,
        0x80,
        "keys are between the device and the host's port §7.9.26",
    ),
    read_only(
        PHYSICAL_LAYER_64,
        0x10,
        "the link is shared with the host's port §7.7.7",
    ),
    hidden(FLIT_LOGGING, 0x40, "the link is the host's §7.8.13"),
    hidden(FLIT_PERFORMANCE, 0x40, "the link is the host's §7.8.14"),
    hidden(
        FLIT_ERROR_INJECTION,
        0x40,
        "would break the host's link §7.8.15",
    ),
];

/// Advanced error reporting. §7.8.4
const ERRORS: &[Rule] = &[
    rule(
        0x04,
        ALL,
        Clear,
        "uncorrectable errors found §7.8.4.2: cleared by writing ones",
    ),
    rule(
        0x08,
        ALL,
        Shadow,
        "which of them are reported §7.8.4.3: the host decides",
    ),
    rule(
        0x0c,
        ALL,
        Shadow,
        "which of them are fatal §7.8.4.4: the host would reset its link for one",
    ),
    rule(
        0x10,
        ALL,
        Clear,
        "correctable errors found §7.8.4.5: cleared by writing ones",
    ),
    rule(
        0x14,
        ALL,
        Shadow,
        "which of them are reported §7.8.4.6: the host decides",
    ),
    rule(
        0x18,
        ALL,
        ReadOnly,
        "capabilities and control §7.8.4.7: ECRC has to agree with the host's port",
    ),
    rule(0x1c, ALL, ReadOnly, "header log §7.8.4.8"),
    rule(0x20, ALL, ReadOnly, "header log"),
    rule(0x24, ALL, ReadOnly, "header log"),
    rule(0x28, ALL, ReadOnly, "header log"),
];
