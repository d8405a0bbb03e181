//! Global system interrupts: which of the interrupt controllers' inputs each device of the board is wired to.

use busway_pci::{Device, InterruptPin};

/// The serial port COM1. ISA, edge-triggered.
pub const SERIAL: u32 = 4;
/// The CMOS clock. ISA, edge-triggered.
pub const RTC: u32 = 8;
/// ACPI's system control interrupt. Level-triggered, active high.
pub const SCI: u32 = 9;
/// What tells of devices that come to bus 0 and leave it: one of ISA's that no device of the board has.
/// Level-triggered, active high.
pub const PCI_HOTPLUG: u32 = 10;

/// What tells of processors that come and leave: another of ISA's. Level-triggered, active high.
pub const CPU_HOTPLUG: u32 = 11;
/// What tells of RAM that comes: a third of ISA's. Level-triggered, active high.
pub const MEMORY_HOTPLUG: u32 = 5;

/// The first of those that PCI's INTx lines are wired to.
const INTX_FIRST: u32 = 16;
/// How many there are.
const INTX_COUNT: u32 = 8;

/// What `pin` of the device in `slot` on bus 0 is wired to. The DSDT's `_PRT` says the same. A pin behind a
/// bridge comes out at one of the bridge's: [`InterruptPin::swizzle`].
#[must_use]
pub fn intx(slot: Device, pin: InterruptPin) -> u32 {
    let pin = u32::from(pin.register()) - 1;
    INTX_FIRST + (u32::from(slot.number()) + pin) % INTX_COUNT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intx_lines_of_neighbours_differ_and_stay_among_the_gsis() {
        let slots: Vec<_> = (0..Device::COUNT).filter_map(Device::new).collect();
        let lines = |slot: Device| InterruptPin::ALL.map(|pin| intx(slot, pin));
        for slot in &slots {
            let lines = lines(*slot);
            assert!(lines.iter().all(|gsi| (16..24).contains(gsi)));
            assert!(lines.windows(2).all(|pair| pair[0] != pair[1]));
        }
        for pair in slots.windows(2) {
            assert_ne!(lines(pair[0])[0], lines(pair[1])[0]);
        }
    }
}
