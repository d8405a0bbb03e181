//! The numbers of the PCI Express Base Specification 6.0 ("PCIe 6.0"), and nothing else.
//!
//! Offsets are bytes from the start of a function's configuration space, or from the start of the
//! capability where the name has one.

/// Bytes of a function's configuration space. §7.2.2.
pub const CONFIG_SPACE_SIZE: u16 = 0x1000;
/// Where the PCI-compatible part ends and the extended capabilities begin. §7.2.2, §7.6.1.
pub const EXTENDED_CONFIG_START: u16 = 0x100;
/// Where the header ends; capabilities lie above it. §7.5.1.
pub const HEADER_SIZE: u16 = 0x40;

// The common header. §7.5.1.1.

/// Vendor ID. §7.5.1.1.1.
pub const VENDOR_ID: u16 = 0x00;
/// Device ID. §7.5.1.1.2.
pub const DEVICE_ID: u16 = 0x02;
/// Command. §7.5.1.1.3.
pub const COMMAND: u16 = 0x04;
/// Status. §7.5.1.1.4.
pub const STATUS: u16 = 0x06;
/// Revision ID. §7.5.1.1.5.
pub const REVISION_ID: u16 = 0x08;
/// Class code: interface, sub-class and base class. §7.5.1.1.6.
pub const CLASS_CODE: u16 = 0x09;
/// Cache line size. §7.5.1.1.7.
pub const CACHE_LINE_SIZE: u16 = 0x0c;
/// Latency timer. §7.5.1.1.8.
pub const LATENCY_TIMER: u16 = 0x0d;
/// Header type. §7.5.1.1.9.
pub const HEADER_TYPE: u16 = 0x0e;
/// Capabilities pointer. §7.5.1.1.11.
pub const CAPABILITIES_POINTER: u16 = 0x34;
/// Interrupt line. §7.5.1.1.12.
pub const INTERRUPT_LINE: u16 = 0x3c;
/// Interrupt pin. §7.5.1.1.13.
pub const INTERRUPT_PIN: u16 = 0x3d;

/// Command: I/O space enable. §7.5.1.1.3.
pub const COMMAND_IO: u16 = 1 << 0;
/// Command: memory space enable. §7.5.1.1.3.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: bus master enable. §7.5.1.1.3.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command: parity error response. §7.5.1.1.3.
pub const COMMAND_PARITY: u16 = 1 << 6;
/// Command: SERR# enable. §7.5.1.1.3.
pub const COMMAND_SERR: u16 = 1 << 8;
/// Command: interrupt disable (INTx). §7.5.1.1.3.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;

/// Status: an INTx interrupt is pending. §7.5.1.1.4.
pub const STATUS_INTERRUPT: u16 = 1 << 3;
/// Status: there is a capabilities list. §7.5.1.1.4.
pub const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Status: the error bits, each cleared by writing one. §7.5.1.1.4.
pub const STATUS_ERRORS: u16 = 0xf900;

/// Header type: the layout's number, 0 or 1. §7.5.1.1.9.
pub const HEADER_TYPE_LAYOUT: u8 = 0x7f;
/// Header type: the device has more than one function. §7.5.1.1.9.
pub const HEADER_TYPE_MULTI_FUNCTION: u8 = 0x80;

// The type 0 header: endpoints. §7.5.1.2.

/// Base address register 0; the other five follow. §7.5.1.2.1.
pub const BAR0: u16 = 0x10;
/// Where the base address registers of a type 0 header end. §7.5.1.2.1.
pub const BARS_END: u16 = 0x28;
/// How many base address registers a type 0 header has. §7.5.1.2.1.
pub const BAR_COUNT: u8 = 6;
/// Subsystem vendor ID. §7.5.1.2.3.
pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
/// Subsystem ID. §7.5.1.2.3.
pub const SUBSYSTEM_ID: u16 = 0x2e;
/// Expansion ROM base address. §7.5.1.2.4.
pub const ROM_ADDRESS: u16 = 0x30;

/// BAR: it decodes I/O ports. §7.5.1.2.1.
pub const BAR_IO: u32 = 1 << 0;
/// BAR: a memory BAR of 64 bits. §7.5.1.2.1.
pub const BAR_MEMORY_64: u32 = 0b10 << 1;
/// BAR: the memory is prefetchable. §7.5.1.2.1.
pub const BAR_PREFETCHABLE: u32 = 1 << 3;
/// Smallest memory BAR: the lower four bits are not address. §7.5.1.2.1.
pub const BAR_MEMORY_MIN: u64 = 16;
/// Smallest I/O BAR: the lower two bits are not address. §7.5.1.2.1.
pub const BAR_IO_MIN: u64 = 4;
/// Expansion ROM: it decodes. §7.5.1.2.4.
pub const ROM_ENABLE: u32 = 1 << 0;
/// Smallest expansion ROM: address bits begin at 11. §7.5.1.2.4.
pub const ROM_MIN: u64 = 0x800;

// The type 1 header: bridges. §7.5.1.3.

/// Primary bus number. §7.5.1.3.2.
pub const PRIMARY_BUS: u16 = 0x18;
/// Secondary bus number. §7.5.1.3.3.
pub const SECONDARY_BUS: u16 = 0x19;
/// Subordinate bus number. §7.5.1.3.4.
pub const SUBORDINATE_BUS: u16 = 0x1a;
/// I/O base. §7.5.1.3.6.
pub const IO_BASE: u16 = 0x1c;
/// I/O limit. §7.5.1.3.6.
pub const IO_LIMIT: u16 = 0x1d;
/// Secondary status. §7.5.1.3.7.
pub const SECONDARY_STATUS: u16 = 0x1e;
/// Memory base. §7.5.1.3.8.
pub const MEMORY_BASE: u16 = 0x20;
/// Memory limit. §7.5.1.3.8.
pub const MEMORY_LIMIT: u16 = 0x22;
/// Prefetchable memory base. §7.5.1.3.9.
pub const PREFETCHABLE_BASE: u16 = 0x24;
/// Prefetchable memory limit. §7.5.1.3.9.
pub const PREFETCHABLE_LIMIT: u16 = 0x26;
/// Prefetchable base, upper 32 bits. §7.5.1.3.10.
pub const PREFETCHABLE_BASE_UPPER: u16 = 0x28;
/// Prefetchable limit, upper 32 bits. §7.5.1.3.10.
pub const PREFETCHABLE_LIMIT_UPPER: u16 = 0x2c;
/// Bridge control. §7.5.1.3.13.
pub const BRIDGE_CONTROL: u16 = 0x3e;

/// I/O base and limit: the address bits 15:12. §7.5.1.3.6.
pub const IO_WINDOW_ADDRESS: u8 = 0xf0;
/// Bytes that an I/O window is a multiple of. §7.5.1.3.6.
pub const IO_WINDOW_GRANULE: u64 = 0x1000;
/// Memory base and limit: the address bits 31:20. §7.5.1.3.8.
pub const MEMORY_WINDOW_ADDRESS: u16 = 0xfff0;
/// Bytes that a memory window is a multiple of. §7.5.1.3.8.
pub const MEMORY_WINDOW_GRANULE: u64 = 0x10_0000;
/// Prefetchable base and limit: the window has 64-bit addresses. §7.5.1.3.9.
pub const PREFETCHABLE_64: u16 = 0x0001;
/// Bridge control: parity error response enable. §7.5.1.3.13.
pub const BRIDGE_CONTROL_PARITY: u16 = 1 << 0;
/// Bridge control: SERR# enable. §7.5.1.3.13.
pub const BRIDGE_CONTROL_SERR: u16 = 1 << 1;
/// Bridge control: secondary bus reset. §7.5.1.3.13.
pub const BRIDGE_CONTROL_RESET: u16 = 1 << 6;

// Capability identifiers. PCI Code and ID Assignment Specification 1.14 §2.

/// Power management. PCIe 6.0 §7.5.2.
pub const CAP_POWER_MANAGEMENT: u8 = 0x01;
/// Message signalled interrupts. §7.7.1.
pub const CAP_MSI: u8 = 0x05;
/// Vendor specific. §7.9.4.
pub const CAP_VENDOR: u8 = 0x09;
/// Subsystem identity of a bridge. §7.9.23.
pub const CAP_BRIDGE_SUBSYSTEM: u8 = 0x0d;
/// PCI Express. §7.5.3.
pub const CAP_PCI_EXPRESS: u8 = 0x10;
/// MSI-X. §7.7.2.
pub const CAP_MSIX: u8 = 0x11;
/// Advanced features. §7.9.21.
pub const CAP_ADVANCED_FEATURES: u8 = 0x13;

/// Advanced error reporting. §7.8.4.
pub const EXT_CAP_AER: u16 = 0x0001;
/// Device serial number. §7.9.3.
pub const EXT_CAP_SERIAL_NUMBER: u16 = 0x0003;
/// Vendor-specific extended capability. §7.9.5.
pub const EXT_CAP_VENDOR: u16 = 0x000b;
/// Access control services. §7.7.11.
pub const EXT_CAP_ACS: u16 = 0x000d;
/// Alternative routing-ID interpretation. §7.8.8.
pub const EXT_CAP_ARI: u16 = 0x000e;
/// Address translation services. §10.5.1.
pub const EXT_CAP_ATS: u16 = 0x000f;
/// Single-root I/O virtualisation. §9.3.3.
pub const EXT_CAP_SRIOV: u16 = 0x0010;
/// Page request interface. §10.5.2.
pub const EXT_CAP_PRI: u16 = 0x0013;
/// Resizable BAR. §7.8.6.
pub const EXT_CAP_RESIZABLE_BAR: u16 = 0x0015;
/// Latency tolerance reporting. §7.8.2.
pub const EXT_CAP_LTR: u16 = 0x0018;
/// Process address space ID. §7.8.9.
pub const EXT_CAP_PASID: u16 = 0x001b;
/// Resizable BARs of virtual functions. §7.8.7.
pub const EXT_CAP_VF_RESIZABLE_BAR: u16 = 0x0024;

// Advanced error reporting. §7.8.4.

/// AER: uncorrectable errors seen. §7.8.4.2.
pub const AER_UNCORRECTABLE_STATUS: u16 = 0x04;
/// AER: which uncorrectable errors are fatal. §7.8.4.4.
pub const AER_UNCORRECTABLE_SEVERITY: u16 = 0x0c;
/// AER: capabilities and control. §7.8.4.7.
pub const AER_CONTROL: u16 = 0x18;
/// AER capabilities and control: the bit of the error that came first. §7.8.4.7.
pub const AER_CONTROL_FIRST_ERROR: u32 = 0x1f;

// MSI. §7.7.1.

/// MSI: message control. §7.7.1.2.
pub const MSI_CONTROL: u16 = 0x02;
/// MSI: message address. §7.7.1.3.
pub const MSI_ADDRESS: u16 = 0x04;
/// MSI control: enable. §7.7.1.2.
pub const MSI_CONTROL_ENABLE: u16 = 1 << 0;
/// MSI control: vectors that the function asks for, as a power of two, from this bit. §7.7.1.2.
pub const MSI_CONTROL_CAPABLE_SHIFT: u16 = 1;
/// MSI control: vectors that software gave, as a power of two, from this bit. §7.7.1.2.
pub const MSI_CONTROL_ENABLED_SHIFT: u16 = 4;
/// MSI control: the three bits of vectors given. §7.7.1.2.
pub const MSI_CONTROL_ENABLED: u16 = 0b111 << MSI_CONTROL_ENABLED_SHIFT;
/// MSI control: 64-bit address. §7.7.1.2.
pub const MSI_CONTROL_64: u16 = 1 << 7;
/// MSI control: per-vector masking. §7.7.1.2.
pub const MSI_CONTROL_MASKING: u16 = 1 << 8;
/// Most vectors of MSI. §7.7.1.2.
pub const MSI_MAX_VECTORS: u8 = 32;

// MSI-X. §7.7.2.

/// MSI-X: message control. §7.7.2.2.
pub const MSIX_CONTROL: u16 = 0x02;
/// MSI-X: table offset and BAR. §7.7.2.3.
pub const MSIX_TABLE: u16 = 0x04;
/// MSI-X: PBA offset and BAR. §7.7.2.4.
pub const MSIX_PBA: u16 = 0x08;
/// Bytes of the MSI-X capability. §7.7.2.
pub const MSIX_CAPABILITY_SIZE: u16 = 0x0c;
/// MSI-X control: table size minus one. §7.7.2.2.
pub const MSIX_CONTROL_SIZE: u16 = 0x07ff;
/// MSI-X control: function mask. §7.7.2.2.
pub const MSIX_CONTROL_MASK: u16 = 1 << 14;
/// MSI-X control: enable. §7.7.2.2.
pub const MSIX_CONTROL_ENABLE: u16 = 1 << 15;
/// MSI-X table and PBA registers: which BAR. §7.7.2.3.
pub const MSIX_BIR: u32 = 0b111;
/// Most vectors of MSI-X. §7.7.2.
pub const MSIX_MAX_VECTORS: u16 = 2048;
/// Bytes of an MSI-X table entry. §7.7.2.
pub const MSIX_ENTRY_SIZE: u64 = 16;
/// MSI-X vector control: mask. §7.7.2.8.
pub const MSIX_VECTOR_MASK: u32 = 1 << 0;

// The PCI Express capability. §7.5.3.

/// PCI Express capabilities register. §7.5.3.2.
pub const EXP_CAPABILITIES: u16 = 0x02;
/// Device capabilities. §7.5.3.3.
pub const EXP_DEVICE_CAPABILITIES: u16 = 0x04;
/// Device control. §7.5.3.4.
pub const EXP_DEVICE_CONTROL: u16 = 0x08;
/// Device status. §7.5.3.5.
pub const EXP_DEVICE_STATUS: u16 = 0x0a;
/// Link capabilities. §7.5.3.6.
pub const EXP_LINK_CAPABILITIES: u16 = 0x0c;
/// Link control. §7.5.3.7.
pub const EXP_LINK_CONTROL: u16 = 0x10;
/// Link status. §7.5.3.8.
pub const EXP_LINK_STATUS: u16 = 0x12;
/// Slot capabilities. §7.5.3.9.
pub const EXP_SLOT_CAPABILITIES: u16 = 0x14;
/// Slot control. §7.5.3.10.
pub const EXP_SLOT_CONTROL: u16 = 0x18;
/// Slot status. §7.5.3.11.
pub const EXP_SLOT_STATUS: u16 = 0x1a;
/// Root control. §7.5.3.12.
pub const EXP_ROOT_CONTROL: u16 = 0x1c;
/// Root status. §7.5.3.14.
pub const EXP_ROOT_STATUS: u16 = 0x20;
/// Device capabilities 2. §7.5.3.15.
pub const EXP_DEVICE_CAPABILITIES_2: u16 = 0x24;
/// Device control 2. §7.5.3.16.
pub const EXP_DEVICE_CONTROL_2: u16 = 0x28;
/// Link capabilities 2. §7.5.3.18.
pub const EXP_LINK_CAPABILITIES_2: u16 = 0x2c;
/// Link control 2. §7.5.3.19.
pub const EXP_LINK_CONTROL_2: u16 = 0x30;
/// Bytes of the capability, version 2. §7.5.3.
pub const EXP_CAPABILITY_SIZE: u16 = 0x3c;

/// PCI Express capabilities: version 2, that of every function since PCIe 2.0. §7.5.3.2.
pub const EXP_VERSION_2: u16 = 2;
/// PCI Express capabilities: device/port type, from this bit, four bits. §7.5.3.2.
pub const EXP_TYPE_SHIFT: u16 = 4;
/// PCI Express capabilities: the port is a root port. §7.5.3.2.
pub const EXP_TYPE_ROOT_PORT: u16 = 0b0100 << 4;
/// PCI Express capabilities: the link leads to a slot. §7.5.3.2.
pub const EXP_SLOT_IMPLEMENTED: u16 = 1 << 8;
/// Device capabilities: payloads up to 256 bytes. §7.5.3.3.
pub const EXP_DEVICE_PAYLOAD_256: u32 = 0b001;
/// Device capabilities: role-based error reporting, required since PCIe 1.1. §7.5.3.3.
pub const EXP_DEVICE_ROLE_BASED_ERRORS: u32 = 1 << 15;
/// Device control: the error enables, payload and read request size. §7.5.3.4.
pub const EXP_DEVICE_CONTROL_WRITABLE: u16 = 0x70ef;
/// Device control after reset: read requests up to 512 bytes. §7.5.3.4.
pub const EXP_DEVICE_CONTROL_READ_512: u16 = 0b010 << 12;
/// Device status: the errors seen, each cleared by writing one. §7.5.3.5.
pub const EXP_DEVICE_STATUS_ERRORS: u16 = 0x000f;
/// Link capabilities: the link's state can be read. §7.5.3.6.
pub const EXP_LINK_ACTIVE_REPORTING: u32 = 1 << 20;
/// Link capabilities and status: speed. §7.5.3.6, §7.5.3.8.
pub const EXP_LINK_SPEED: u32 = 0xf;
/// Link capabilities and status: width, from this bit. §7.5.3.6, §7.5.3.8.
pub const EXP_LINK_WIDTH_SHIFT: u32 = 4;
/// Link capabilities: it keeps to the rules by which ASPM is optional; set in all since PCIe 3.0.
/// §7.5.3.6.
pub const EXP_LINK_ASPM_OPTIONALITY: u32 = 1 << 22;
/// Link capabilities: port number, from this bit. §7.5.3.6.
pub const EXP_LINK_PORT_SHIFT: u32 = 24;
/// Link control: common clock and extended synch. §7.5.3.7.
pub const EXP_LINK_CONTROL_WRITABLE: u16 = 0x00c0;
/// Link status: both ends use the same clock. §7.5.3.8.
pub const EXP_LINK_STATUS_SLOT_CLOCK: u16 = 1 << 12;
/// Link status: the data link layer is up. §7.5.3.8.
pub const EXP_LINK_STATUS_ACTIVE: u16 = 1 << 13;
/// Slot capabilities: there is an attention button. §7.5.3.9.
pub const EXP_SLOT_ATTENTION_BUTTON: u32 = 1 << 0;
/// Slot capabilities: software switches the slot's power. §7.5.3.9.
pub const EXP_SLOT_POWER_CONTROLLER: u32 = 1 << 1;
/// Slot capabilities: there is a power indicator. §7.5.3.9.
pub const EXP_SLOT_POWER_INDICATOR: u32 = 1 << 4;
/// Slot capabilities: what is in the slot may leave without notice. §7.5.3.9.
pub const EXP_SLOT_SURPRISE: u32 = 1 << 5;
/// Slot capabilities: it takes hot-plug operations. §7.5.3.9.
pub const EXP_SLOT_HOT_PLUG: u32 = 1 << 6;
/// Slot capabilities: commands take effect at once, and their completion is not told. §7.5.3.9.
pub const EXP_SLOT_NO_COMMAND_COMPLETED: u32 = 1 << 18;
/// Slot capabilities: physical slot number, from this bit, 13 bits. §7.5.3.9.
pub const EXP_SLOT_NUMBER_SHIFT: u32 = 19;
/// The greatest physical slot number. §7.5.3.9.
pub const EXP_SLOT_NUMBER_MAX: u16 = 0x1fff;
/// Slot control: tell of the attention button. §7.5.3.10.
pub const EXP_SLOT_CONTROL_BUTTON: u16 = 1 << 0;
/// Slot control: tell of power faults. §7.5.3.10.
pub const EXP_SLOT_CONTROL_POWER_FAULT: u16 = 1 << 1;
/// Slot control: tell when something came or left. §7.5.3.10.
pub const EXP_SLOT_CONTROL_PRESENCE: u16 = 1 << 3;
/// Slot control: tell by an interrupt. §7.5.3.10.
pub const EXP_SLOT_CONTROL_INTERRUPT: u16 = 1 << 5;
/// Slot control: what the power indicator shows, two bits. §7.5.3.10.
pub const EXP_SLOT_CONTROL_INDICATOR: u16 = 0b11 << 8;
/// Slot control: the power indicator is on. §7.5.3.10.
pub const EXP_SLOT_CONTROL_INDICATOR_ON: u16 = 0b01 << 8;
/// Slot control: the power indicator blinks. §7.5.3.10.
pub const EXP_SLOT_CONTROL_INDICATOR_BLINK: u16 = 0b10 << 8;
/// Slot control: the power indicator is off. §7.5.3.10.
pub const EXP_SLOT_CONTROL_INDICATOR_OFF: u16 = 0b11 << 8;
/// Slot control: power is off. §7.5.3.10.
pub const EXP_SLOT_CONTROL_POWER_OFF: u16 = 1 << 10;
/// Slot control: tell when the link comes up or goes down. §7.5.3.10.
pub const EXP_SLOT_CONTROL_LINK: u16 = 1 << 12;
/// Slot status: the attention button was pressed; cleared by writing one. §7.5.3.11.
pub const EXP_SLOT_STATUS_BUTTON: u16 = 1 << 0;
/// Slot status: something came or left; cleared by writing one. §7.5.3.11.
pub const EXP_SLOT_STATUS_PRESENCE: u16 = 1 << 3;
/// Slot status: the link came up or went down; cleared by writing one. §7.5.3.11.
pub const EXP_SLOT_STATUS_LINK: u16 = 1 << 8;
/// Slot status: something is in the slot. §7.5.3.11.
pub const EXP_SLOT_STATUS_PRESENT: u16 = 1 << 6;
/// Root control: system error enables and the PME interrupt enable. §7.5.3.12.
pub const EXP_ROOT_CONTROL_WRITABLE: u16 = 0x000f;
/// Root status: a PME came; cleared by writing one. §7.5.3.14.
pub const EXP_ROOT_STATUS_PME: u32 = 1 << 16;
/// Device capabilities 2: the port routes AtomicOps. §7.5.3.15.
pub const EXP_ATOMIC_ROUTING: u32 = 1 << 6;
/// Device capabilities 2: a completer of AtomicOps of 32 bits. §7.5.3.15.
pub const EXP_ATOMIC_COMPLETER_32: u32 = 1 << 7;
/// Device capabilities 2: a completer of AtomicOps of 64 bits. §7.5.3.15.
pub const EXP_ATOMIC_COMPLETER_64: u32 = 1 << 8;
/// Device capabilities 2: a completer of compare and swap of 128 bits. §7.5.3.15.
pub const EXP_ATOMIC_COMPLETER_128: u32 = 1 << 9;
/// Device capabilities 2: a completer of AtomicOps of any size. §7.5.3.15.
pub const EXP_ATOMIC_COMPLETER: u32 =
    EXP_ATOMIC_COMPLETER_32 | EXP_ATOMIC_COMPLETER_64 | EXP_ATOMIC_COMPLETER_128;
/// Device control 2: the port lets no AtomicOp out. §7.5.3.16.
pub const EXP_ATOMIC_EGRESS_BLOCKING: u16 = 1 << 7;
/// Link control 2: target link speed. §7.5.3.19.
pub const EXP_LINK_CONTROL_2_TARGET: u16 = 0x000f;

// Ways to configuration space.

/// CONFIG_ADDRESS: accesses to CONFIG_DATA reach configuration space. PCI Local Bus
/// Specification 3.0 §3.2.2.3.2.
pub const CONFIG_ADDRESS_ENABLE: u32 = 1 << 31;
/// Bytes of configuration space by memory, for 256 buses. PCIe 6.0 §7.2.2.
pub const ECAM_SIZE: u64 = 256 << 20;
