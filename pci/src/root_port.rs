//! A PCIe root port: the bridge between bus 0 and the one device on its link.
//!
//! The port says what it lets through; the topology acts on it. Its slot is not hot-plug capable.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::config::{ConfigSpace, Identity};
use crate::function::{BarIndex, BarKind, BarRegion, Bridge, PciFunction};
use crate::interrupt::InterruptRoutes;
use crate::link::Link;
use crate::msi::{Msi, MsiFeatures};
use crate::spec;

/// A root port with one slot.
#[derive(Debug)]
pub struct RootPort {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    space: ConfigSpace,
    msi: Msi,
    msi_offset: u16,
}

impl RootPort {
    /// A root port whose slot has the number `slot` (13 bits, and unique in the machine), with this
    /// link. A link slower than the device's own makes Linux report a bottleneck.
    ///
    /// It says that it is QEMU's generic root port, 1b36:000c, which needs no driver but the bus's.
    #[must_use]
    pub fn new(slot: u16, link: Link, routes: Arc<dyn InterruptRoutes>) -> Self {
        let mut space = ConfigSpace::type1(&Identity {
            vendor: 0x1b36,
            device: 0x000c,
            class: 0x06_04_00,
            ..Identity::default()
        });
        define_bridge(&mut space);
        add_express(&mut space, slot, link);
        let features = MsiFeatures {
            vectors: 1,
            address_64: true,
            masking: true,
        };
        let msi = Msi::new(features, routes).named(format!("the root port of slot {slot}"));
        let msi_offset = space.add_capability(spec::CAP_MSI, &msi.capability_body(), &[]);
        Self {
            state: Mutex::new(State {
                space,
                msi,
                msi_offset,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The type 1 header's registers. Windows are closed at reset: their base is above their limit.
fn define_bridge(space: &mut ConfigSpace) {
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

/// The PCI Express capability. No ASPM, no ARI forwarding, no hot-plug: what is absent reads zero.
fn add_express(space: &mut ConfigSpace, slot: u16, link: Link) {
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
}

impl PciFunction for RootPort {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let state = self.state();
        state.space.read(offset, data);
        if let Some(offset) = offset.checked_sub(state.msi_offset) {
            state.msi.read(offset, data);
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let State {
            space,
            msi,
            msi_offset,
        } = &mut *self.state();
        space.write(offset, data);
        if let Some(offset) = offset.checked_sub(*msi_offset) {
            msi.write(offset, data, &mut ());
        }
    }

    fn bars(&self) -> Vec<BarRegion> {
        Vec::new()
    }

    fn decoded(&self) -> Vec<BarRegion> {
        Vec::new()
    }

    fn bar_read(&self, _bar: BarIndex, _offset: u64, data: &mut [u8]) {
        data.fill(u8::MAX);
    }

    fn bar_write(&self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}

    fn reset(&self) {
        let State { space, msi, .. } = &mut *self.state();
        space.reset();
        msi.reset(&mut ());
    }

    fn bridge(&self) -> Option<&dyn Bridge> {
        Some(self)
    }
}

impl Bridge for RootPort {
    fn bus_numbers(&self) -> (u8, u8) {
        let space = &self.state().space;
        (
            space.get(spec::SECONDARY_BUS),
            space.get(spec::SUBORDINATE_BUS),
        )
    }

    fn forwards(&self, region: &BarRegion) -> bool {
        let space = &self.state().space;
        let enable = match region.kind {
            BarKind::Io => spec::COMMAND_IO,
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => spec::COMMAND_MEMORY,
        };
        if space.command() & enable == 0 {
            return false;
        }
        let Some(last) = region.address.checked_add(region.size.saturating_sub(1)) else {
            return false;
        };
        let within = |(base, limit): (u64, u64)| base <= region.address && last <= limit;
        match region.kind {
            BarKind::Io => within(io_window(space)),
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => {
                within(memory_window(space)) || within(prefetchable_window(space))
            }
        }
    }

    fn in_reset(&self) -> bool {
        let control: u16 = self.state().space.get(spec::BRIDGE_CONTROL);
        control & spec::BRIDGE_CONTROL_RESET != 0
    }
}

/// First and last port let through; nothing where the first is above the last.
fn io_window(space: &ConfigSpace) -> (u64, u64) {
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
fn memory_window(space: &ConfigSpace) -> (u64, u64) {
    (
        memory_address(space, spec::MEMORY_BASE),
        memory_address(space, spec::MEMORY_LIMIT) | (spec::MEMORY_WINDOW_GRANULE - 1),
    )
}

/// First and last address of the prefetchable window.
fn prefetchable_window(space: &ConfigSpace) -> (u64, u64) {
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

fn memory_address(space: &ConfigSpace, register: u16) -> u64 {
    let bits: u16 = space.get(register);
    u64::from(bits & spec::MEMORY_WINDOW_ADDRESS) << 16
}
