//! What the ACPI tables say of a PC alone: its processors and interrupt controllers, its fixed hardware and its
//! devices at I/O ports. References are to ACPI 6.5.

mod devices;
mod fadt;
mod madt;
mod srat;
mod tpm;

use std::ops::Range;

pub(crate) use devices::{append_devices, board_ports, host_bridge_ports, soft_off};
pub(crate) use fadt::{POINTERS as FADT_POINTERS, fadt};
pub(crate) use madt::{madt, madt_processor};
pub(crate) use srat::srat;
pub(crate) use tpm::{append_tpm, tpm2};

/// Where the tables lie: in the area that a kernel without boot parameters searches for the RSDP
/// (§5.2.5.1), below SMBIOS. The memory map reserves it.
pub const TABLES: Range<u64> = 0xe_0000..0xf_0000;
