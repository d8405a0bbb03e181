//! A root port's registers: what they are at reset, and what its windows let through.

use crate::config::ConfigSpace;
use crate::link::Link;
use crate::spec;
use crate::windows::Reserve;

/// The type 1 header's registers. Windows are closed at reset: their base is above their limit.
pub(super) fn define_bridge(space: &mut ConfigSpace) {
    for bus in [
        spec::PRIMARY_BUS,
        spec::SECONDARY_BUS,
        spec::SUBORDINATE_BUS,
    ] {
        space.define(bus, 0u8, u8::MAX);
    }
    let io = spec::IO_WINDOW_ADDRESS;
    space.define(spec::IO_BASE, io, io);
    space.define(spec::IO_LIMIT, 0, io);
    space.clear_by_one(spec::SECONDARY_STATUS, spec::STATUS_ERRORS);
    let memory = spec::MEMORY_WINDOW_ADDRESS;
    space.define(spec::MEMORY_BASE, memory, memory);
    space.define(spec::MEMORY_LIMIT, 0, memory);
    let wide = spec::PREFETCHABLE_64;
    space.define(spec::PREFETCHABLE_BASE, memory | wide, memory);
    space.define(spec::PREFETCHABLE_LIMIT, wide, memory);
    space.define(spec::PREFETCHABLE_BASE_UPPER, 0, u32::MAX);
    space.define(spec::PREFETCHABLE_LIMIT_UPPER, 0, u32::MAX);
    space.define(
        spec::BRIDGE_CONTROL,
        0,
        spec::BRIDGE_CONTROL_PARITY | spec::BRIDGE_CONTROL_SERR | spec::BRIDGE_CONTROL_RESET,
    );
}

/// The PCI Express capability, and where it is. No ASPM, no ARI forwarding: what is absent reads zero.
pub(super) fn add_express(space: &mut ConfigSpace, slot: u16, link: Link) -> u16 {
    let body = [0; spec::EXP_CAPABILITY_SIZE as usize - 2];
    let at = space.add_capability(spec::CAP_PCI_EXPRESS, &body, &[]);
    let capabilities = spec::EXP_VERSION_2 | spec::EXP_TYPE_ROOT_PORT | spec::EXP_SLOT_IMPLEMENTED;
    space.define(at + spec::EXP_CAPABILITIES, capabilities, 0);
    space.define(
        at + spec::EXP_DEVICE_CAPABILITIES,
        spec::EXP_DEVICE_PAYLOAD_256 | spec::EXP_DEVICE_ROLE_BASED_ERRORS,
        0,
    );
    space.define(
        at + spec::EXP_DEVICE_CONTROL,
        spec::EXP_DEVICE_CONTROL_READ_512,
        spec::EXP_DEVICE_CONTROL_WRITABLE,
    );
    space.clear_by_one(at + spec::EXP_DEVICE_STATUS, spec::EXP_DEVICE_STATUS_ERRORS);
    space.define(
        at + spec::EXP_LINK_CAPABILITIES,
        link.speed_and_width()
            | spec::EXP_LINK_ACTIVE_REPORTING
            | spec::EXP_LINK_ASPM_OPTIONALITY
            | u32::from(slot as u8) << spec::EXP_LINK_PORT_SHIFT,
        0,
    );
    space.define(
        at + spec::EXP_LINK_CONTROL,
        0,
        spec::EXP_LINK_CONTROL_WRITABLE,
    );
    space.define(
        at + spec::EXP_LINK_STATUS,
        link.speed_and_width() as u16
            | spec::EXP_LINK_STATUS_SLOT_CLOCK
            | spec::EXP_LINK_STATUS_ACTIVE,
        0,
    );
    space.define(
        at + spec::EXP_SLOT_CAPABILITIES,
        u32::from(slot & spec::EXP_SLOT_NUMBER_MAX) << spec::EXP_SLOT_NUMBER_SHIFT,
        0,
    );
    space.define(at + spec::EXP_SLOT_STATUS, spec::EXP_SLOT_STATUS_PRESENT, 0);
    space.define(
        at + spec::EXP_ROOT_CONTROL,
        0,
        spec::EXP_ROOT_CONTROL_WRITABLE,
    );
    space.clear_by_one(at + spec::EXP_ROOT_STATUS, spec::EXP_ROOT_STATUS_PME);
    space.define(
        at + spec::EXP_LINK_CAPABILITIES_2,
        link.supported_speeds(),
        0,
    );
    space.define(
        at + spec::EXP_LINK_CONTROL_2,
        link.speed.register(),
        spec::EXP_LINK_CONTROL_2_TARGET,
    );
    at
}

/// The body of the capability: its length, its type, then buses, ports, and memory of three kinds. Ones leave it
/// to firmware. QEMU include/hw/pci/pci_bridge.h, `PCIBridgeQemuCap`.
pub(super) fn reservation(reserve: Reserve, io: bool) -> Vec<u8> {
    const LENGTH: u8 = 32;
    const RESOURCE_RESERVE: u8 = 1;
    let memory32 = u32::try_from(reserve.memory32).unwrap_or(u32::MAX);
    let mut body = vec![LENGTH, RESOURCE_RESERVE];
    body.extend(u32::MAX.to_le_bytes());
    body.extend(if io { u64::MAX } else { 0 }.to_le_bytes());
    body.extend(memory32.to_le_bytes());
    // Prefetchable memory is above 4 GiB.
    body.extend(u32::MAX.to_le_bytes());
    body.extend(reserve.memory64.to_le_bytes());
    body
}

/// First and last port let through; nothing where the first is above the last.
pub(super) fn io_window(space: &ConfigSpace) -> (u64, u64) {
    let address = |register| {
        let bits: u8 = space.get(register);
        u64::from(bits & spec::IO_WINDOW_ADDRESS) << 8
    };
    (
        address(spec::IO_BASE),
        address(spec::IO_LIMIT) | (spec::IO_WINDOW_GRANULE - 1),
    )
}

/// First and last address of the window below 4 GiB.
pub(super) fn memory_window(space: &ConfigSpace) -> (u64, u64) {
    (
        memory_address(space, spec::MEMORY_BASE),
        memory_address(space, spec::MEMORY_LIMIT) | (spec::MEMORY_WINDOW_GRANULE - 1),
    )
}

/// First and last address of the prefetchable window.
pub(super) fn prefetchable_window(space: &ConfigSpace) -> (u64, u64) {
    let address = |low, high| {
        let upper: u32 = space.get(high);
        u64::from(upper) << 32 | memory_address(space, low)
    };
    (
        address(spec::PREFETCHABLE_BASE, spec::PREFETCHABLE_BASE_UPPER),
        address(spec::PREFETCHABLE_LIMIT, spec::PREFETCHABLE_LIMIT_UPPER)
            | (spec::MEMORY_WINDOW_GRANULE - 1),
    )
}

pub(super) fn memory_address(space: &ConfigSpace, register: u16) -> u64 {
    let bits: u16 = space.get(register);
    u64::from(bits & spec::MEMORY_WINDOW_ADDRESS) << 16
}
