//! A PCIe root port: the bridge between bus 0 and the one device on its link.
//!
//! The port says what it lets through; the topology acts on it. Its slot takes hot-plug operations
//! where it is told to; what has no power there is in reset.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::atomics::AtomicOps;
use crate::config::{ConfigSpace, Identity};
use crate::function::{BarIndex, BarKind, BarRegion, Bridge, HotPlug, PciFunction};
use crate::interrupt::{InterruptLevel, InterruptRoutes};
use crate::intx::InterruptPin;
use crate::link::Link;
use crate::msi::{Msi, MsiFeatures};
use crate::slot::{Change, Slot, SlotListener};
use crate::spec;
use crate::topology::{Reserve, Windows};

/// A root port with one slot.
#[derive(Debug)]
pub struct RootPort {
    state: Mutex<State>,
    listener: Option<Arc<dyn SlotListener>>,
}

#[derive(Debug)]
struct State {
    space: ConfigSpace,
    msi: Msi,
    msi_offset: u16,
    /// Where the PCI Express capability is.
    express: u16,
    slot_number: u16,
    /// A slot that takes hot-plug operations.
    slot: Option<Slot>,
    /// It has a window for I/O ports.
    io: bool,
    reserve: Reserve,
    /// Where its interrupt pin leads to.
    pin: Option<Arc<dyn InterruptLevel>>,
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
        let express = add_express(&mut space, slot, link);
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
                express,
                slot_number: slot,
                slot: None,
                io: true,
                reserve: Reserve::SMALL,
                pin: None,
            }),
            listener: None,
        }
    }

    /// Lets devices come and go at run time; the slot is empty until a function is added behind the
    /// port. `listener` hears what the guest does with the slot.
    #[must_use]
    pub fn hot_plug(mut self, listener: Arc<dyn SlotListener>) -> Self {
        self.listener = Some(listener);
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.slot = Some(Slot::new(state.slot_number));
        state.show_link();
        self
    }

    /// The pin of a port that has one. What is plugged in mostly has INTA, which comes out at the port's, and is not to share
    /// the line: a driver's probe runs on Linux's thread for the slot's interrupt, and waits for all threads of its own
    /// device's, itself among them, where that is the same (`synchronize_irq`). A function alone in its slot has INTA by
    /// the specification, which no driver looks at.
    pub const PIN: InterruptPin = InterruptPin::D;

    /// Has the interrupt pin [`PIN`](Self::PIN), for guests that use no messages. PCIe 6.0 §6.7.3.4
    #[must_use]
    pub fn wired(mut self, pin: Arc<dyn InterruptLevel>) -> Self {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let register = Self::PIN.register();
        state.space.define(spec::INTERRUPT_PIN, register, 0);
        state.pin = Some(pin);
        self
    }

    /// Has at least this room for what is plugged in, instead of [`Reserve::SMALL`].
    #[must_use]
    pub fn reserving(mut self, reserve: Reserve) -> Self {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.reserve = reserve;
        self
    }

    /// Says to firmware what to reserve for the slot, so that a device that is plugged in later finds room: by
    /// QEMU's resource reservation capability, which OVMF and SeaBIOS know. To be called after what is
    /// reserved was set. QEMU docs/pcie_pci_bridge.txt, "Bus, IO and MEM resource reservation".
    #[must_use]
    pub fn hinting(mut self) -> Self {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let body = reservation(state.reserve, state.io);
        state.space.add_capability(spec::CAP_VENDOR, &body, &[]);
        self
    }

    /// Has no window for I/O ports, as is right where nothing behind it has any: an operating system
    /// that reserves room for what may be plugged in would run out of ports, of which there are 16
    /// windows' worth in all.
    #[must_use]
    pub fn without_io(mut self) -> Self {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.space.define(spec::IO_BASE, 0u8, 0);
        state.space.define(spec::IO_LIMIT, 0u8, 0);
        state.io = false;
        self
    }

    /// Says that it carries out these AtomicOps for what is behind it, for as long as that is there. What
    /// carries them out is the host's root port, which the device's requests go to.
    #[must_use]
    pub fn completing(mut self, atomics: AtomicOps) -> Self {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.complete(atomics);
        self
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Changes the slot, where there is one, and interrupts the guest where it has to hear of that.
    fn change(&mut self, change: impl FnOnce(&mut Slot) -> Change) -> Change {
        let Some(slot) = &mut self.slot else {
            return Change::default();
        };
        let change = change(slot);
        self.show_link();
        if change.interrupt {
            self.msi.trigger(0);
        }
        self.settle_pin();
        change
    }

    /// Holds the pin up while the guest has something to hear of, and takes no messages.
    fn settle_pin(&mut self) {
        let Some(pin) = &self.pin else {
            return;
        };
        let owed = self.slot.as_ref().is_some_and(Slot::owed) && !self.msi.enabled();
        let status: u16 = self.space.get(spec::STATUS);
        let status = match owed {
            true => status | spec::STATUS_INTERRUPT,
            false => status & !spec::STATUS_INTERRUPT,
        };
        self.space.set(spec::STATUS, status);
        pin.set(owed && self.space.command() & spec::COMMAND_INTX_DISABLE == 0);
    }

    /// Has the link status say whether there is anybody at the other end.
    fn show_link(&mut self) {
        let Some(slot) = &self.slot else {
            return;
        };
        let at = self.express.saturating_add(spec::EXP_LINK_STATUS);
        let status: u16 = self.space.get(at);
        let status = match slot.link_up() {
            true => status | spec::EXP_LINK_STATUS_ACTIVE,
            false => status & !spec::EXP_LINK_STATUS_ACTIVE,
        };
        self.space.set(at, status);
    }

    /// Has device capabilities 2 name the AtomicOps that are carried out.
    fn complete(&mut self, atomics: AtomicOps) {
        let at = self.express.saturating_add(spec::EXP_DEVICE_CAPABILITIES_2);
        self.space.define(at, atomics.register(), 0);
    }

    /// How far into the slot's registers an access begins; nothing where it is before them.
    fn in_slot(&self, offset: u16) -> Option<u16> {
        offset.checked_sub(self.express.saturating_add(spec::EXP_SLOT_CAPABILITIES))
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

/// The PCI Express capability, and where it is. No ASPM, no ARI forwarding: what is absent reads zero.
fn add_express(space: &mut ConfigSpace, slot: u16, link: Link) -> u16 {
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
fn reservation(reserve: Reserve, io: bool) -> Vec<u8> {
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

impl PciFunction for RootPort {
    fn name(&self) -> String {
        format!("the root port of slot {}", self.state().slot_number)
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let state = self.state();
        state.space.read(offset, data);
        if let Some(offset) = offset.checked_sub(state.msi_offset) {
            state.msi.read(offset, data);
        }
        if let (Some(slot), Some(within)) = (&state.slot, state.in_slot(offset)) {
            let registers = slot.registers();
            for (byte, register) in data
                .iter_mut()
                .zip(registers.iter().skip(usize::from(within)))
            {
                *byte = *register;
            }
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut state = self.state();
        state.space.write(offset, data);
        if let Some(offset) = offset.checked_sub(state.msi_offset) {
            state.msi.write(offset, data, &mut ());
        }
        let change = match state.in_slot(offset) {
            Some(within) => state.change(|slot| slot.write(within, data)),
            None => Change::default(),
        };
        // The write may have been to the command register, or to MSI's.
        state.settle_pin();
        let number = state.slot_number;
        drop(state);
        let Some(listener) = &self.listener else {
            return;
        };
        if let Some(on) = change.power {
            listener.power_switched(number, on);
        }
        if change.steadied {
            listener.steadied(number);
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
        let mut state = self.state();
        state.space.reset();
        state.msi.reset(&mut ());
        if let Some(slot) = &mut state.slot {
            slot.reset();
        }
        state.show_link();
        state.settle_pin();
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
        let state = self.state();
        let space = &state.space;
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
            BarKind::Io => state.io && within(io_window(space)),
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => {
                within(memory_window(space)) || within(prefetchable_window(space))
            }
        }
    }

    fn in_reset(&self) -> bool {
        let state = self.state();
        let control: u16 = state.space.get(spec::BRIDGE_CONTROL);
        let no_power = state.slot.as_ref().is_some_and(|slot| !slot.powered());
        control & spec::BRIDGE_CONTROL_RESET != 0 || no_power
    }

    fn hot_plug(&self) -> Option<&dyn HotPlug> {
        self.listener.as_ref().map(|_| self as &dyn HotPlug)
    }
}

impl HotPlug for RootPort {
    fn slot(&self) -> u16 {
        self.state().slot_number
    }

    fn reserve(&self) -> Reserve {
        self.state().reserve
    }

    fn has_io(&self) -> bool {
        self.state().io
    }

    fn windows(&self) -> Windows {
        let state = self.state();
        let range = |(base, limit): (u64, u64)| match limit.checked_add(1) {
            Some(end) if base < end => base..end,
            _ => 0..0,
        };
        Windows {
            io: match state.io {
                true => range(io_window(&state.space)),
                false => 0..0,
            },
            memory32: vec![range(memory_window(&state.space))],
            memory64: vec![range(prefetchable_window(&state.space))],
        }
    }

    fn complete(&self, atomics: AtomicOps) {
        self.state().complete(atomics);
    }

    fn furnish(&self, present: bool) {
        let mut state = self.state();
        if let Some(slot) = &mut state.slot {
            slot.furnish(present);
        }
        state.show_link();
        state.settle_pin();
    }

    fn set_present(&self, present: bool) {
        let mut state = self.state();
        if !present {
            state.complete(AtomicOps::NONE);
        }
        let _no_power_switched = state.change(|slot| slot.set_present(present));
    }

    fn powered(&self) -> bool {
        self.state().slot.as_ref().is_some_and(Slot::powered)
    }

    fn steady(&self) -> bool {
        self.state().slot.as_ref().is_none_or(Slot::steady)
    }

    fn attended(&self) -> bool {
        self.state().slot.as_ref().is_some_and(Slot::attended)
    }

    fn press_button(&self) -> bool {
        let mut state = self.state();
        let attended = state.slot.as_ref().is_some_and(Slot::attended);
        if attended {
            let _no_power_switched = state.change(Slot::press_button);
        }
        attended
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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::capability::{ConfigRead, capabilities};
    use crate::fake::{FakeRoutes, MEMORY_32, PREFETCHABLE_64};
    use crate::link::LinkSpeed;

    impl ConfigRead for RootPort {
        fn read_dword(&self, offset: u16) -> u32 {
            let mut data = [0; 4];
            self.config_read(offset, &mut data);
            u32::from_le_bytes(data)
        }
    }

    fn port() -> RootPort {
        let link = Link {
            speed: LinkSpeed::Gt16,
            width: 4,
        };
        RootPort::new(3, link, Arc::new(FakeRoutes::default()))
    }

    fn write(port: &RootPort, offset: u16, value: u32) {
        port.config_write(offset, &value.to_le_bytes());
    }

    fn region(kind: BarKind, address: u64, size: u64) -> BarRegion {
        BarRegion {
            index: BarIndex::Bar(0),
            kind,
            address,
            size,
        }
    }

    #[test]
    fn firmware_is_told_what_to_reserve_by_the_capability_that_it_knows() {
        let routes = Arc::new(FakeRoutes::default());
        let reserve = Reserve {
            memory32: 32 << 20,
            memory64: 4 << 30,
        };
        let port = RootPort::new(3, Link::default(), routes).reserving(reserve);
        assert!(
            capabilities(&port)
                .iter()
                .all(|capability| capability.id != spec::CAP_VENDOR)
        );
        let port = port.without_io().hinting();
        let found = capabilities(&port);
        let vendor = found
            .iter()
            .find(|capability| capability.id == spec::CAP_VENDOR);
        let at = vendor.expect("the capability").offset;
        let mut bytes = [0; 32];
        for (dword, offset) in bytes.chunks_mut(4).zip((at..).step_by(4)) {
            port.config_read(offset, dword);
        }
        let number = |from: usize, to: usize| {
            let mut value = [0; 8];
            value[..to - from].copy_from_slice(&bytes[from..to]);
            u64::from_le_bytes(value)
        };
        assert_eq!(bytes[2..4], [32, 1]);
        assert_eq!(number(4, 8), 0xffff_ffff, "buses are firmware's choice");
        assert_eq!((number(8, 16), number(16, 20)), (0, 32 << 20));
        assert_eq!((number(20, 24), number(24, 32)), (0xffff_ffff, 4 << 30));
    }

    #[test]
    fn the_link_is_up_at_the_speed_and_width_it_was_given() {
        let port = port();
        let express = capabilities(&port)[0];
        assert_eq!(express.id, spec::CAP_PCI_EXPRESS);
        let read = |register| port.read_dword(express.offset + register);
        assert_eq!(read(0) >> 16, 0x0142, "version 2, root port, slot");
        assert_eq!(read(spec::EXP_LINK_CAPABILITIES) & 0x3ff, 0x044);
        assert_eq!(read(spec::EXP_LINK_CONTROL) >> 16, 0x3044);
        assert_eq!(read(spec::EXP_LINK_CAPABILITIES_2), 0b11110);
        assert_eq!(read(spec::EXP_SLOT_CAPABILITIES) >> 19, 3);
        let capabilities = read(spec::EXP_LINK_CAPABILITIES);
        assert_eq!(Link::from_capabilities(capabilities).width, 4);
    }

    #[test]
    fn at_reset_nothing_is_let_through_even_with_decoding_on() {
        let port = port();
        let all = [
            region(MEMORY_32, 0, 0x1000),
            region(BarKind::Io, 0, 0x20),
            region(PREFETCHABLE_64, 1 << 36, 1 << 30),
        ];
        write(&port, spec::COMMAND, 7);
        assert!(all.iter().all(|region| !port.forwards(region)));
    }

    #[test]
    fn a_region_is_let_through_where_it_lies_wholly_in_a_window() {
        let port = port();
        write(&port, spec::COMMAND, 3);
        write(&port, spec::IO_BASE, 0xd0c0);
        write(&port, spec::MEMORY_BASE, 0xc010_c000);
        write(&port, spec::PREFETCHABLE_BASE, 0xfff0_0000);
        write(&port, spec::PREFETCHABLE_BASE_UPPER, 0x10);
        write(&port, spec::PREFETCHABLE_LIMIT_UPPER, 0xffff_ffff);
        for (kind, address, size, through) in [
            (BarKind::Io, 0xc000, 0x20, true),
            (BarKind::Io, 0xdfe0, 0x20, true),
            (BarKind::Io, 0xe000, 0x20, false),
            (MEMORY_32, 0xc000_0000, 1 << 21, true),
            (MEMORY_32, 0xc000_0000, 1 << 22, false),
            (MEMORY_32, 0xbfff_f000, 0x1000, false),
            (PREFETCHABLE_64, 0x10_0000_0000, 1 << 36, true),
            (PREFETCHABLE_64, 1 << 63, 1 << 63, true),
            (PREFETCHABLE_64, 0xf_0000_0000, 1 << 30, false),
        ] {
            let region = region(kind, address, size);
            assert_eq!(port.forwards(&region), through, "{region:x?}");
        }
        write(&port, spec::COMMAND, 1);
        assert!(!port.forwards(&region(MEMORY_32, 0xc000_0000, 0x1000)));
        assert!(port.forwards(&region(BarKind::Io, 0xc000, 4)));
    }

    #[test]
    fn its_interrupt_is_routed_when_the_guest_enables_msi() {
        let port = port();
        let msi = capabilities(&port)[1];
        assert_eq!(msi.id, spec::CAP_MSI);
        write(&port, msi.offset, 1 << 16);
        assert_eq!(port.state().msi.connected(), 1);
        assert_eq!(port.read_dword(msi.offset) >> 16 & 1, 1);
        port.reset();
        assert_eq!(port.state().msi.connected(), 0);
        assert_eq!(port.read_dword(msi.offset) >> 16 & 1, 0);
    }

    #[derive(Debug, Default)]
    struct Heard(Mutex<Vec<(u16, bool)>>, Mutex<Vec<u16>>);

    impl SlotListener for Heard {
        fn power_switched(&self, slot: u16, on: bool) {
            self.0.lock().unwrap().push((slot, on));
        }

        fn steadied(&self, slot: u16) {
            self.1.lock().unwrap().push(slot);
        }
    }

    /// A pin, and whether it is held up.
    #[derive(Debug, Default)]
    struct Pin(Mutex<bool>);

    impl InterruptLevel for Pin {
        fn set(&self, asserted: bool) {
            *self.0.lock().unwrap() = asserted;
        }
    }

    #[test]
    fn without_messages_its_pin_is_up_for_as_long_as_the_guest_has_something_to_hear_of() {
        let (routes, pin) = (Arc::new(FakeRoutes::default()), Arc::new(Pin::default()));
        let port = RootPort::new(16, Link::default(), routes.clone())
            .hot_plug(Arc::new(Heard::default()))
            .wired(pin.clone());
        let up = || *pin.0.lock().unwrap();
        let pending = |port: &RootPort| port.read_dword(spec::COMMAND) >> 19 & 1 == 1;
        let [express, msi] = capabilities(&port)[..] else {
            panic!("two capabilities");
        };
        assert_eq!(port.read_dword(spec::INTERRUPT_LINE) >> 8 & 0xff, 4);
        let slot = express.offset + spec::EXP_SLOT_CONTROL;
        let clear_all = 0xffff << 16;
        port.set_present(true);
        assert!(!up(), "nobody asked for it");
        write(&port, slot, 0x1729);
        assert!(up() && pending(&port), "what came before it was asked for");
        // The guest can hold it back, and it is there all the same.
        write(&port, spec::COMMAND, spec::COMMAND_INTX_DISABLE.into());
        assert!(!up() && pending(&port));
        write(&port, spec::COMMAND, 0);
        assert!(up());
        write(&port, slot, 0x1729 | clear_all);
        assert!(!up() && !pending(&port));
        assert!(routes.arrived().is_empty());
        // A message takes its place.
        assert!(port.press_button() && up());
        write(&port, msi.offset + 4, 0xfee0_0000);
        write(&port, msi.offset, 1 << 16);
        assert!(!up() && !pending(&port));
        write(&port, slot, 0x1729 | clear_all);
        assert!(port.press_button() && !up());
        assert_eq!(routes.arrived().len(), 1);
        write(&port, msi.offset, 0);
        assert!(up());
        port.reset();
        assert!(!up() && !pending(&port));
    }

    #[test]
    fn a_listener_hears_when_the_guest_is_done_with_a_slot() {
        let (routes, heard) = (Arc::new(FakeRoutes::default()), Arc::new(Heard::default()));
        let port = RootPort::new(16, Link::default(), routes).hot_plug(heard.clone());
        port.furnish(true);
        let slot = capabilities(&port)[0].offset + spec::EXP_SLOT_CONTROL;
        // On; blinks; without power; off; blinks with power; on.
        for (control, steady) in [
            (0x1129, true),
            (0x1229, false),
            (0x1629, false),
            (0x1729, true),
            (0x1229, false),
            (0x1129, true),
            // Power goes first, where the guest does not blink.
            (0x1529, false),
            (0x1729, true),
        ] {
            write(&port, slot, control);
            assert_eq!(port.steady(), steady, "{control:#x}");
        }
        assert_eq!(*heard.1.lock().unwrap(), [16, 16, 16]);
    }

    #[test]
    fn a_hot_plug_port_asks_by_its_msi_and_hears_when_power_goes() {
        let (routes, heard) = (Arc::new(FakeRoutes::default()), Arc::new(Heard::default()));
        let port = RootPort::new(16, Link::default(), routes.clone()).hot_plug(heard.clone());
        let [express, msi] = capabilities(&port)[..] else {
            panic!("two capabilities");
        };
        let read = |register| port.read_dword(express.offset + register);
        let link_up = |port: &RootPort| {
            port.read_dword(express.offset + spec::EXP_LINK_CONTROL) >> 29 & 1 == 1
        };
        assert!(!link_up(&port) && port.in_reset() && !port.press_button());
        port.furnish(true);
        assert!(link_up(&port) && !port.in_reset() && port.powered());
        assert_eq!(read(spec::EXP_SLOT_CAPABILITIES), 16 << 19 | 0x4_0073);
        assert_eq!(read(spec::EXP_SLOT_CONTROL), 0x0040_0100);
        assert!(!port.press_button(), "nobody listens");

        write(&port, msi.offset + 4, 0xfee0_0000);
        write(&port, msi.offset, 1 << 16);
        write(&port, express.offset + spec::EXP_SLOT_CONTROL, 0x1129);
        assert!(port.press_button());
        assert_eq!(routes.arrived().len(), 1);
        write(&port, express.offset + spec::EXP_SLOT_CONTROL, 0x0001_1729);
        assert_eq!(*heard.0.lock().unwrap(), [(16, false)]);
        assert!(!link_up(&port) && port.in_reset());
        port.set_present(false);
        port.reset();
        assert!(!port.powered());
        let listened = heard.0.lock().unwrap().len();
        assert_eq!(listened, 1, "a reset is no doing of the guest's");
    }

    #[test]
    fn a_port_without_io_lets_no_port_through() {
        let port = port().without_io();
        write(&port, spec::COMMAND, 3);
        write(&port, spec::IO_BASE, 0xf000);
        assert_eq!(port.read_dword(spec::IO_BASE) & 0xffff, 0);
        assert!(!port.forwards(&region(BarKind::Io, 0xc000, 4)));
        assert!(!port.forwards(&region(BarKind::Io, 0, 4)));
    }

    #[test]
    fn atomic_ops_are_completed_for_as_long_as_the_device_is_there() {
        let completed = |port: &RootPort| {
            let express = capabilities(port)[0].offset;
            port.read_dword(express + spec::EXP_DEVICE_CAPABILITIES_2)
        };
        let heard = Arc::new(Heard::default());
        assert_eq!(completed(&port().hot_plug(heard.clone())), 0);
        // Whatever else the register of the host's port says is not this one's.
        let atomics = AtomicOps::from_capabilities(0xffff_fdff);
        let port = port().completing(atomics).hot_plug(heard);
        port.furnish(true);
        assert_eq!(completed(&port), 0b011 << 7);
        write(
            &port,
            capabilities(&port)[0].offset + spec::EXP_DEVICE_CAPABILITIES_2,
            0,
        );
        port.reset();
        assert_eq!(completed(&port), 0b011 << 7);
        port.set_present(false);
        assert_eq!(completed(&port), 0);
    }

    proptest! {
        #[test]
        fn no_write_changes_who_it_is_or_panics(
            writes in vec((0..1024u16, any::<u32>(), 0..5usize), 0..80),
            address: u64,
            log2 in 0..64u32,
        ) {
            let port = port();
            let list = capabilities(&port);
            for (dword, value, width) in writes {
                port.config_write(dword % 64 * 4, &value.to_le_bytes()[..width]);
                port.config_write(dword * 4, &value.to_le_bytes()[..width]);
                port.forwards(&region(PREFETCHABLE_64, address, 1 << log2));
                prop_assert_eq!(port.read_dword(0), 0x000c_1b36);
                prop_assert_eq!(capabilities(&port), list.clone());
            }
        }
    }
}
