//! The system resource affinity table: where RAM is, and where it can come. §5.2.16.
//!
//! A guest that begins with RAM below 4 GiB alone decides by it whether devices that reach no more will need buffers of
//! its kernel's there: Linux, `max_possible_pfn`. All of it is of one node, with the processors, for a table without
//! them is none to Linux.

use std::ops::Range;

use acpi_tables::sdt::Sdt;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use crate::acpi::{Cpu, OEM_ID, OEM_REVISION, OEM_TABLE_ID};

const REVISION: u8 = 3;
/// Header and what is reserved behind it.
const FIXED_SIZE: u32 = 48;

// Structure types, table 5.51.
const MEMORY: u8 = 1;
const LOCAL_X2APIC: u8 = 2;

/// Flags of each kind of structure.
const ENABLED: u32 = 1 << 0;
/// Of memory.
const HOT_PLUGGABLE: u32 = 1 << 1;

/// The table of a guest with RAM at `ram`, and more to come within `pluggable`.
pub(crate) fn srat(cpus: &[Cpu], ram: &[Range<u64>], pluggable: &Range<u64>) -> Sdt {
    let mut srat = Sdt::new(
        *b"SRAT",
        FIXED_SIZE,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    // For compatibility. Table 5.50.
    srat.write_u32(36, 1);
    for cpu in cpus {
        srat.append_slice(Processor::new(cpu).as_bytes());
    }
    for range in ram {
        srat.append_slice(Memory::new(range, ENABLED).as_bytes());
    }
    let flags = ENABLED | HOT_PLUGGABLE;
    srat.append_slice(Memory::new(pluggable, flags).as_bytes());
    srat
}

/// A processor by the ID of its local APIC, of whatever width. §5.2.16.3.
#[derive(Immutable, IntoBytes)]
#[repr(C)]
struct Processor {
    kind: u8,
    length: u8,
    reserved: U16,
    node: U32,
    apic_id: U32,
    flags: U32,
    clock_domain: U32,
    reserved2: U32,
}

impl Processor {
    fn new(cpu: &Cpu) -> Self {
        Self {
            kind: LOCAL_X2APIC,
            length: size_of::<Self>() as u8,
            reserved: U16::ZERO,
            node: U32::ZERO,
            apic_id: cpu.apic_id.into(),
            flags: ENABLED.into(),
            clock_domain: U32::ZERO,
            reserved2: U32::ZERO,
        }
    }
}

/// A range of memory. §5.2.16.2.
#[derive(Immutable, IntoBytes)]
#[repr(C)]
struct Memory {
    kind: u8,
    length: u8,
    node: [u8; 4],
    reserved: U16,
    base: U64,
    size: U64,
    reserved2: U32,
    flags: U32,
    reserved3: U64,
}

impl Memory {
    fn new(range: &Range<u64>, flags: u32) -> Self {
        Self {
            kind: MEMORY,
            length: size_of::<Self>() as u8,
            node: [0; 4],
            reserved: U16::ZERO,
            base: range.start.into(),
            size: (range.end - range.start).into(),
            reserved2: U32::ZERO,
            flags: flags.into(),
            reserved3: U64::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use acpi_tables::Aml;

    use super::*;

    #[test]
    fn each_processor_and_each_piece_of_ram_is_of_node_0_and_what_can_come_is_said_to() {
        let cpu = |apic_id| Cpu {
            apic_id,
            enabled: true,
        };
        let (low, high) = (0..3_u64 << 30, 4 << 30..5_u64 << 30);
        let pluggable = 6 << 30..7_u64 << 30;
        let ram = [low.clone(), high.clone()];
        let mut bytes = Vec::new();
        srat(&[cpu(0), cpu(7)], &ram, &pluggable).to_aml_bytes(&mut bytes);
        assert_eq!(
            bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
        assert_eq!(bytes.len(), 48 + 2 * 24 + 3 * 40);
        let word = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().unwrap());
        let long = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap());
        for (at, apic_id) in [(48, 0), (72, 7)] {
            assert_eq!((bytes[at], bytes[at + 1]), (2, 24));
            assert_eq!((word(at + 4), word(at + 8), word(at + 12)), (0, apic_id, 1));
        }
        for (at, range, flags) in [(96, &low, 1), (136, &high, 1), (176, &pluggable, 3)] {
            assert_eq!((bytes[at], bytes[at + 1], word(at + 2)), (1, 40, 0));
            assert_eq!(
                (long(at + 8), long(at + 16)),
                (range.start, range.end - range.start)
            );
            assert_eq!(word(at + 28), flags);
        }
    }
}
