//! A PCIe root port: the bridge between bus 0 and the one device on its link.
//!
//! The port says what it lets through; the topology acts on it. Its slot takes hot-plug operations
//! where it is told to; what has no power there is in reset.

mod registers;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::atomics::AtomicOps;
use crate::bar::{BarKind, BarRegion};
use crate::config::{ConfigSpace, Identity};
use crate::function::{Bridge, HotPlug, PciFunction};
use crate::interrupt::{InterruptLevel, InterruptRoutes};
use crate::link::Link;
use crate::msi::{Msi, MsiFeatures};
use crate::pin::InterruptPin;
use crate::slot::{Change, Slot, SlotListener};
use crate::spec;
use crate::windows::{Reserve, Windows};

use registers::{
    add_express, define_bridge, io_window, memory_window, prefetchable_window, reservation,
};

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
        self.update_pin();
        change
    }

    /// Holds the pin up while the guest has something to hear of, and takes no messages.
    fn update_pin(&mut self) {
        let Some(pin) = &self.pin else {
            return;
        };
        let pending = self.slot.as_ref().is_some_and(Slot::pending) && !self.msi.enabled();
        let status: u16 = self.space.get(spec::STATUS);
        let status = match pending {
            true => status | spec::STATUS_INTERRUPT,
            false => status & !spec::STATUS_INTERRUPT,
        };
        self.space.set(spec::STATUS, status);
        pin.set(pending && self.space.command() & spec::COMMAND_INTX_DISABLE == 0);
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
        state.update_pin();
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

    fn reset(&self) {
        let mut state = self.state();
        state.space.reset();
        state.msi.reset(&mut ());
        if let Some(slot) = &mut state.slot {
            slot.reset();
        }
        state.show_link();
        state.update_pin();
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

    fn prepare(&self, present: bool) {
        let mut state = self.state();
        if let Some(slot) = &mut state.slot {
            slot.prepare(present);
        }
        state.show_link();
        state.update_pin();
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

#[cfg(test)]
mod tests;
