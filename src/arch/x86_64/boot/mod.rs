//! Puts a kernel, its initramfs and its command line into the guest's RAM, and says in what state the
//! boot processor enters it.
//!
//! Two protocols: a bzImage by Linux's 64-bit boot protocol, and an ELF by the PVH entry of its Xen
//! note. Files are read straight into guest RAM; [`load`] may be called again after a guest's reset.
//! The ACPI tables are [`acpi`](crate::acpi)'s; this module only hands their address on.

mod bzimage;
mod e820;
mod elf;
mod entry;
mod error;
mod identify;
mod initramfs;
mod input;
mod low_memory;
mod source;

pub use e820::{E820, E820Kind, E820Region};
pub use entry::{BootProtocol, Entry};
pub use error::BootError;
pub use source::{BootSource, default_cmdline};

use vm_memory::{Bytes, GuestAddress, GuestMemory};

use crate::smbios::Tables;

/// Where the SMBIOS tables are, from their entry point on.
const SMBIOS_TABLES: usize = 32;

/// Loads `source` into `ram`, which `map` describes; `rsdp` is where the guest finds ACPI.
///
/// All that the boot needs is written anew at each call, so that a guest's reset can call it again.
///
/// # Errors
/// [`BootError`], each with what to do about it.
pub fn load(
    ram: &impl GuestMemory,
    source: &BootSource,
    map: &E820,
    rsdp: GuestAddress,
) -> Result<Entry, BootError> {
    write_bios_data_area(ram)?;
    let inputs = source.inputs();
    let entry = match source.format() {
        source::Format::BzImage(header) => bzimage::load(ram, inputs, header, map, rsdp)?,
        source::Format::Elf(elf) => elf::load(ram, inputs, elf, map, rsdp)?,
    };
    entry.write_tables(ram)?;
    Ok(entry)
}

/// Puts `tables` where a kernel that was not started by firmware finds them.
///
/// # Errors
/// [`BootError::Memory`]
pub fn tell_identity(ram: &impl GuestMemory, tables: &Tables) -> Result<(), BootError> {
    let start = low_memory::SMBIOS;
    // The entry point has 24 bytes, and a kernel looks at each 16.
    let mut bytes = tables.entry_point(start + SMBIOS_TABLES as u64);
    bytes.resize(SMBIOS_TABLES, 0);
    bytes.extend(&tables.bytes);
    let written = ram.write_slice(&bytes, GuestAddress(start));
    written.map_err(|source| BootError::Memory {
        what: "the SMBIOS tables",
        address: start,
        source,
    })
}

/// The two words of the BIOS data area that say where low memory ends, which a kernel reads to find
/// the EBDA and to keep clear of it.
fn write_bios_data_area(ram: &impl GuestMemory) -> Result<(), BootError> {
    let write = |what, address, value: u16| {
        ram.write_slice(&value.to_le_bytes(), GuestAddress(address))
            .map_err(|source| BootError::Memory {
                what,
                address,
                source,
            })
    };
    write(
        "the EBDA's segment",
        low_memory::BDA_EBDA_SEGMENT,
        (low_memory::EBDA_START >> 4) as u16,
    )?;
    write(
        "the size of base memory",
        low_memory::BDA_BASE_MEMORY_KIB,
        (low_memory::EBDA_START >> 10) as u16,
    )
}

#[cfg(test)]
mod tests;
