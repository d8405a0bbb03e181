//! The ACPI tables: what the firmware of a board like this one would tell. What they say of a PC alone is
//! [`arch::acpi`](crate::arch::acpi)'s.
//!
//! Full ACPI hardware (not hardware-reduced): the machine has a PIC, a PIT and a CMOS clock, and its
//! power button is the fixed one. The registers the tables speak of are
//! [`arch::power`](crate::arch::power)'s; the addresses are [`layout`](crate::arch::layout)'s. References are to ACPI
//! 6.5 and to the PCI Firmware Specification 3.3.

mod aml;
mod cpus;
mod dsdt;
mod hardware;
mod hotplug;
mod loader;
mod memory;
mod slit;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};

pub(crate) use aml::{in_system_bus, path};
pub use hardware::{Cpu, Hardware, Numa, PluggableMemory, Root};
pub(crate) use hardware::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
pub use loader::Loader;

use crate::arch::acpi::{self as arch, TABLES};

/// Why there are no tables.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// the ACPI tables need {size} bytes, but there is room for {room}
    #[error(
        "the ACPI tables need {size} bytes, but there is room for {room}: have fewer processors (--cpus max=) or PCI \
         segments (--platform num_pci_segments=)"
    )]
    TooBig {
        /// Bytes of the tables.
        size: u64,
        /// Bytes between 0xE0000 and 0xF0000.
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
pub fn install(ram: &impl GuestMemory, hardware: &Hardware) -> Result<GuestAddress, AcpiError> {
    let rsdp = Rsdp::len().next_multiple_of(64);
    let image = Image::at(hardware, TABLES.start + rsdp as u64);
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
    fn at(hardware: &Hardware, base: u64) -> Self {
        let mut image = Self {
            base,
            bytes: Vec::new(),
            rsdp: Vec::with_capacity(Rsdp::len()),
            pointers: Vec::new(),
            summed: Vec::new(),
        };
        let facs = image.append(&FACS::new());
        let dsdt = image.append(&dsdt::dsdt(hardware));
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        let fadt = image.append(&arch::fadt(facs, dsdt));
        image.points(fadt, arch::FADT_POINTERS);
        xsdt.add_entry(fadt);
        xsdt.add_entry(image.append(&arch::madt(&hardware.cpus)));
        xsdt.add_entry(image.append(&mcfg(hardware)));
        if let Some(srat) = arch::srat(hardware) {
            xsdt.add_entry(image.append(&srat));
        }
        if let Some(numa) = &hardware.numa {
            xsdt.add_entry(image.append(&slit::slit(&numa.distances)));
        }
        if hardware.tpm {
            xsdt.add_entry(image.append(&arch::tpm2()));
        }
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

/// Where ECAM of each segment is. PCI Firmware 3.3 §4.1.2.
fn mcfg(hardware: &Hardware) -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for root in &hardware.roots {
        mcfg.add_ecam(root.ecam.start, root.segment, 0, root.last_bus);
    }
    mcfg
}

#[cfg(test)]
mod tests;
