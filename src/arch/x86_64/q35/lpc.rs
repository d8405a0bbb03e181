//! The LPC bridge at 00:1f.0, behind which are the devices at ISA addresses. Intel ICH9 datasheet, §13.

use std::sync::{Mutex, MutexGuard, PoisonError};

use busway_pci::{Bars, ConfigSpace, Identity, PciFunction};

use super::{SUBSYSTEM, SUBSYSTEM_VENDOR};
use crate::arch::{gsi, power};

/// Where the power management ports are. §13.1.13, PMBASE. They are where the ACPI tables say, so firmware
/// finds them set up and leaves them there.
const PMBASE: u16 = 0x40;
const PMBASE_IO: u32 = 1 << 0;
/// ACPI control: the ports are enabled, and the SCI is interrupt 9. §13.1.14, ACPI_CNTL.
const ACPI_CONTROL: u16 = 0x44;
const ACPI_ENABLE: u8 = 1 << 7;
const _: () = assert!(gsi::SCI == 9, "ACPI_CNTL's SCI_IRQ_SEL is 0");

/// Which interrupts of the PICs the pins A to D and E to H lead to; bit 7: to none. §13.1.16 and §13.1.18.
const PIRQS: [u16; 2] = [0x60, 0x68];
const PIRQ_DISABLED: u8 = 1 << 7;
const PIRQ_WRITABLE: u8 = 0x8f;

/// Base of the chip set's own registers, which firmware sets and nothing is at. §13.1.38, RCBA.
const RCBA: u16 = 0xf0;
const RCBA_WRITABLE: u32 = 0xffff_c001;

/// The bridge, whose registers do nothing: pins are wired as `_PRT` says.
#[derive(Debug)]
pub struct Lpc {
    space: Mutex<ConfigSpace>,
}

impl Lpc {
    /// The bridge.
    #[must_use]
    pub fn new() -> Self {
        let identity = Identity {
            vendor: 0x8086,
            device: 0x2918,
            revision: 2,
            class: 0x06_01_00,
            subsystem_vendor: SUBSYSTEM_VENDOR,
            subsystem: SUBSYSTEM,
        };
        let mut space = ConfigSpace::type0(&identity, Bars::new());
        space.define(PMBASE, u32::from(power::PM_BASE) | PMBASE_IO, 0);
        space.define(ACPI_CONTROL, ACPI_ENABLE, 0);
        for first in PIRQS {
            for pin in first..first + 4 {
                space.define(pin, PIRQ_DISABLED, PIRQ_WRITABLE);
            }
        }
        space.define(RCBA, 0, RCBA_WRITABLE);
        Self {
            space: Mutex::new(space),
        }
    }

    fn space(&self) -> MutexGuard<'_, ConfigSpace> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Lpc {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for Lpc {
    fn name(&self) -> String {
        "the LPC bridge".to_owned()
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.space().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.space().write(offset, data);
    }

    fn reset(&self) {
        self.space().reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lpc: &Lpc, offset: u16) -> u32 {
        let mut data = [0; 4];
        lpc.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn firmware_finds_power_management_set_up_and_cannot_move_it() {
        let lpc = Lpc::new();
        assert_eq!(read(&lpc, 0), 0x2918_8086);
        assert_eq!(read(&lpc, 8) >> 8, 0x06_01_00);
        lpc.config_write(PMBASE, &0x0b01_u32.to_le_bytes());
        lpc.config_write(ACPI_CONTROL, &[0]);
        assert_eq!(read(&lpc, PMBASE), 0x601);
        assert_eq!(read(&lpc, ACPI_CONTROL), 0x80);
    }

    #[test]
    fn the_interrupt_routes_are_kept_as_firmware_writes_them_until_a_reset() {
        let lpc = Lpc::new();
        lpc.config_write(0x60, &[0x0b, 0x0a, 0x7f, 0x80]);
        assert_eq!(read(&lpc, 0x60), 0x800f_0a0b);
        lpc.config_write(RCBA, &0xfed1_c001_u32.to_le_bytes());
        assert_eq!(read(&lpc, RCBA), 0xfed1_c001);
        lpc.reset();
        assert_eq!((read(&lpc, 0x60), read(&lpc, RCBA)), (0x8080_8080, 0));
    }
}
