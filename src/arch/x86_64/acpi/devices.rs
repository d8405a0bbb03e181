//! What the DSDT says of the devices at I/O ports.

use acpi_tables::aml::{AddressSpace, Device, EISAName, IO, Interrupt, Name, ResourceTemplate};

use crate::acpi::{in_system_bus, path};
use crate::arch::{gsi, layout, power, rtc};
use crate::devices::serial;

/// The ports by which configuration space of the first PCI host bridge is reached, and those that it passes on, up to `last`.
pub(crate) fn host_bridge_ports(last: u16) -> (IO, [AddressSpace<u16>; 2]) {
    let (first, size) = (power::CONFIG_PORTS, power::CONFIG_PORTS_SIZE);
    let configuration = IO::new(first, first, 1, size as u8);
    let below = AddressSpace::new_io(0_u16, first - 1, None);
    let above = AddressSpace::new_io(first + size, last, None);
    (configuration, [below, above])
}

/// The ports of the board that no device of the table has: power management.
pub(crate) fn board_ports() -> IO {
    IO::new(power::PM_BASE, power::PM_BASE, 1, power::PM_SIZE as u8)
}

/// The value of SLP_TYP for soft off. §7.4.2.6.
pub(crate) fn soft_off() -> u8 {
    power::SLEEP_TYPE_S5
}

/// Appends the devices at ISA addresses: the clock and, with `serial`, COM1.
pub(crate) fn append_devices(serial: bool, aml: &mut Vec<u8>) {
    let hid = Name::new(path("_HID"), &EISAName::new("PNP0B00"));
    let ports = IO::new(rtc::BASE, rtc::BASE, 1, rtc::SIZE as u8);
    let irq = Interrupt::new(true, true, false, false, gsi::RTC);
    let crs = Name::new(path("_CRS"), &ResourceTemplate::new(vec![&ports, &irq]));
    in_system_bus(&Device::new(path("RTC_"), vec![&hid, &crs]), aml);
    if serial {
        let hid = Name::new(path("_HID"), &EISAName::new("PNP0501"));
        let uid = Name::new(path("_UID"), &1_u8);
        let (first, size) = (layout::SERIAL_PORT, serial::SIZE as u8);
        let ports = IO::new(first, first, 1, size);
        let irq = Interrupt::new(true, true, false, false, gsi::SERIAL);
        let crs = Name::new(path("_CRS"), &ResourceTemplate::new(vec![&ports, &irq]));
        in_system_bus(&Device::new(path("COM1"), vec![&hid, &uid, &crs]), aml);
    }
}
