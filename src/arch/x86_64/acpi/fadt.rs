//! The fixed ACPI description table: which fixed hardware there is. §5.2.9.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use crate::acpi::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::arch::gsi::SCI;
use crate::arch::{power, rtc};

/// `LEGACY_DEVICES`: there are devices (COM1, RTC) at the ISA bus' addresses. §5.2.9.3.
const LEGACY_DEVICES: u16 = 1 << 0;
/// VGA is not there; probing for it is pointless.
const VGA_NOT_PRESENT: u16 = 1 << 2;

/// Latencies that say that there is no C2 and no C3. §5.2.9, `P_LVL2_LAT` and `P_LVL3_LAT`.
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

/// Where the table has addresses of others, and how many bytes each has: FIRMWARE_CTRL, DSDT and X_DSDT.
/// §5.2.9.
pub(crate) const POINTERS: [(usize, u8); 3] = [(36, 4), (40, 4), (140, 8)];

/// The table. There is no SMI command port: ACPI mode is always on (§4.8.2.5). Neither an 8042 nor VGA
/// is claimed; the CMOS clock is there.
pub(crate) fn fadt(facs: u64, dsdt: u64) -> FADT {
    let io = |size: u8, access, port: u16| {
        GAS::new(AddressSpace::SystemIo, size * 8, 0, access, port.into())
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // No sleep button, or not a fixed one.
        .flag(Flags::SlpButton)
        // The clock's wake-up alarm is not in the fixed registers.
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    // The tables lie below 1 MiB, so that 32 bits hold their addresses. The 64-bit field for the FACS
    // stays empty: with both, the FACS would count as two.
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = (SCI as u16).into();
    fadt.pm1a_evt_blk = u32::from(power::PM1_EVENT).into();
    fadt.x_pm1a_evt_blk = io(4, AccessSize::WordAccess, power::PM1_EVENT);
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(power::PM1_CONTROL).into();
    fadt.x_pm1a_cnt_blk = io(2, AccessSize::WordAccess, power::PM1_CONTROL);
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = u32::from(power::PM_TIMER).into();
    fadt.x_pm_tmr_blk = io(4, AccessSize::DwordAccess, power::PM_TIMER);
    fadt.pm_tmr_len = 4;
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = rtc::CENTURY;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT).into();
    fadt.reset_reg = io(1, AccessSize::ByteAccess, power::RESET_CONTROL);
    fadt.reset_value = power::RESET_VALUE;
    fadt.finalize()
}
