//! The ACPI tables: what the firmware of a board like this one would tell.
//!
//! Full ACPI hardware (not hardware-reduced): the machine has a PIC, a PIT and a CMOS clock, and its
//! power button is the fixed one. The registers the tables speak of are
//! [`arch::power`](crate::arch::power)'s; the addresses are [`layout`](crate::arch::layout)'s. References are to ACPI
//! 6.5 and to the PCI Firmware Specification 3.3.

mod dsdt;
mod fadt;
mod hotplug;
mod loader;
mod madt;

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use busway_pci::{Device, InterruptPin};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};

pub use loader::Loader;

/// Where the tables lie: the area that a kernel without boot parameters searches for the RSDP
/// (§5.2.5.1). The memory map reserves it.
pub const TABLES: Range<u64> = 0xe_0000..0x10_0000;

/// The global system interrupt of the system control interrupt. Level-triggered, active high.
pub const SCI: u32 = 9;

/// The first of the global system interrupts that PCI's INTx lines are wired to.
const INTX_GSI_BASE: u32 = 16;
/// How many there are.
const INTX_GSIS: u32 = 8;

const OEM_ID: [u8; 6] = *b"BUSWAY";
const OEM_TABLE_ID: [u8; 8] = *b"BUSWAYVM";
const OEM_REVISION: u32 = 1;

/// What the tables describe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// Processors, the boot processor first. The position in the list is the ACPI processor UID.
    pub cpus: Vec<Cpu>,
    /// The highest bus number there is. The guest is told of no bus beyond it, not even where ECAM would
    /// reach one: Linux reads all of a told bus's 32 slots to find out that nothing is there, which
    /// for 255 empty buses is 16,000 exits at each boot.
    pub last_bus: u8,
    /// The window for BARs below 4 GiB, in ascending parts.
    pub mmio32: Vec<Range<u64>>,
    /// The window for 64-bit BARs, in ascending parts; there may be none.
    pub mmio64: Vec<Range<u64>>,
    /// There is a serial port COM1.
    pub serial: bool,
    /// Root ports have hot-plug slots that the guest's own driver handles.
    pub native_hotplug: bool,
    /// Bit n: the device in slot n of bus 0 can come and leave. Without any there is nothing that would tell
    /// of it.
    pub bus0_slots: u32,
    /// First address of configuration space in memory, below 4 GiB.
    pub ecam: u64,
}

/// A processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// The ID of its local APIC.
    pub apic_id: u32,
    /// It is there from the start; one that is not can come later.
    pub enabled: bool,
}

/// The global system interrupt that `pin` of the device in `slot` on bus 0 is wired to. The DSDT's
/// `_PRT` says the same. A pin behind a bridge comes out at one of the bridge's:
/// [`InterruptPin::swizzle`].
#[must_use]
pub fn intx_gsi(slot: Device, pin: InterruptPin) -> u32 {
    let pin = u32::from(pin.register()) - 1;
    INTX_GSI_BASE + (u32::from(slot.number()) + pin) % INTX_GSIS
}

/// Why there are no tables.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// the ACPI tables need {size} bytes, but there is room for {room}
    #[error("the ACPI tables need {size} bytes, but there is room for {room}")]
    TooBig {
        /// Bytes of the tables.
        size: u64,
        /// Bytes between 0xE0000 and 1 MiB.
        room: u64,
    },
    /// cannot write the ACPI tables to guest memory: {0}
    #[error("cannot write the ACPI tables to guest memory: {0}")]
    Memory(GuestMemoryError),
}

/// Writes the tables to guest memory, and says where the RSDP is.
///
/// # Errors
/// [`AcpiError`]
pub fn install(ram: &impl GuestMemory, platform: &Platform) -> Result<GuestAddress, AcpiError> {
    let rsdp = Rsdp::len().next_multiple_of(64);
    let image = Image::at(platform, TABLES.start + rsdp as u64);
    let mut bytes = image.rsdp;
    bytes.resize(rsdp, 0);
    bytes.extend(image.bytes);
    let (size, room) = (bytes.len() as u64, TABLES.end - TABLES.start);
    if size > room {
        return Err(AcpiError::TooBig { size, room });
    }
    let start = GuestAddress(TABLES.start);
    ram.write_slice(&bytes, start).map_err(AcpiError::Memory)?;
    Ok(start)
}

/// All tables but the RSDP, as they lie from `base` on, and the RSDP that names them.
struct Image {
    base: u64,
    bytes: Vec<u8>,
    rsdp: Vec<u8>,
    /// Where addresses of tables are in `bytes`, and how many bytes each has.
    pointers: Vec<(usize, u8)>,
    /// Where the tables begin that have addresses in them, and so another checksum at another base.
    summed: Vec<usize>,
}

impl Image {
    fn at(platform: &Platform, base: u64) -> Self {
        let mut image = Self {
            base,
            bytes: Vec::new(),
            rsdp: Vec::with_capacity(Rsdp::len()),
            pointers: Vec::new(),
            summed: Vec::new(),
        };
        let facs = image.append(&FACS::new());
        let dsdt = image.append(&dsdt::dsdt(platform));
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        let fadt = image.append(&fadt::fadt(facs, dsdt));
        image.points(fadt, fadt::POINTERS);
        xsdt.add_entry(fadt);
        xsdt.add_entry(image.append(&madt::madt(&platform.cpus)));
        xsdt.add_entry(image.append(&mcfg(platform)));
        let xsdt = image.append(&xsdt);
        // An address for each table, behind the header. §5.2.8.
        let entries = (image.offset(xsdt) + 36..image.bytes.len()).step_by(8);
        let entries: Vec<_> = entries.map(|at| (at, 8)).collect();
        image.pointers.extend(entries);
        image.summed.push(image.offset(xsdt));
        Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut image.rsdp);
        image
    }

    /// Notes the addresses, each with its bytes, that are in the table at `table`.
    fn points(&mut self, table: u64, pointers: impl IntoIterator<Item = (usize, u8)>) {
        let start = self.offset(table);
        let pointers = pointers.into_iter().map(|(at, size)| (start + at, size));
        self.pointers.extend(pointers);
        self.summed.push(start);
    }

    fn offset(&self, address: u64) -> usize {
        usize::try_from(address - self.base).unwrap_or(usize::MAX)
    }

    /// Appends a table and says its guest-physical address. 64 bytes is the FACS' alignment (§5.2.10).
    fn append(&mut self, table: &dyn Aml) -> u64 {
        let start = self.bytes.len().next_multiple_of(64);
        self.bytes.resize(start, 0);
        table.to_aml_bytes(&mut self.bytes);
        self.base + start as u64
    }
}

/// Where ECAM is. PCI Firmware 3.3 §4.1.2.
fn mcfg(platform: &Platform) -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(platform.ecam, 0, 0, platform.last_bus);
    mcfg
}

#[cfg(test)]
mod tests;
