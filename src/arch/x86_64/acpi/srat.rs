//! The system resource affinity table: which node of the guest's has which processors and memory, and where memory can
//! come. §5.2.16.
//!
//! There is one where there are nodes, and one where RAM can come. A guest that begins with RAM below 4 GiB alone decides
//! by the latter whether devices that reach no more will need buffers of its kernel's there: Linux, `max_possible_pfn`.
//! Without nodes all of it is of one, with the processors, for a table without them is none to Linux.

use std::ops::Range;

use acpi_tables::sdt::Sdt;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use crate::acpi::{Cpu, Hardware, Numa, OEM_ID, OEM_REVISION, OEM_TABLE_ID, PluggableMemory};

const REVISION: u8 = 3;
/// Header and what is reserved behind it.
const FIXED_SIZE: u32 = 48;

// Structure types, table 5.51.
const LOCAL_APIC: u8 = 0;
const MEMORY: u8 = 1;
const LOCAL_X2APIC: u8 = 2;

/// The IDs from here on do not fit a local APIC structure.
const FIRST_X2APIC: u32 = 0xff;

/// Flags of each kind of structure.
const ENABLED: u32 = 1 << 0;
/// Of memory.
const HOT_PLUGGABLE: u32 = 1 << 1;

/// The table, where there is anything to be told.
pub(crate) fn srat(hardware: &Hardware) -> Option<Sdt> {
    let (cpus, pluggable) = (&hardware.cpus, hardware.pluggable.as_ref());
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
    match (&hardware.numa, pluggable) {
        (None, None) => return None,
        (None, Some(PluggableMemory { ram, .. })) => {
            for cpu in cpus {
                srat.append_slice(X2Processor::new(cpu, 0).as_bytes());
            }
            for range in ram {
                srat.append_slice(Memory::new(0, range, ENABLED).as_bytes());
            }
        }
        (Some(numa), _) => append_nodes(&mut srat, cpus, numa),
    }
    for (node, range) in pluggable.into_iter().flat_map(|memory| &memory.pieces) {
        let flags = ENABLED | HOT_PLUGGABLE;
        srat.append_slice(Memory::new(*node, range, flags).as_bytes());
    }
    Some(srat)
}

fn append_nodes(srat: &mut Sdt, cpus: &[Cpu], numa: &Numa) {
    for (cpu, node) in cpus.iter().zip(&numa.cpus) {
        match cpu.apic_id < FIRST_X2APIC {
            true => srat.append_slice(Processor::new(cpu, *node).as_bytes()),
            false => srat.append_slice(X2Processor::new(cpu, *node).as_bytes()),
        }
    }
    for (node, range) in &numa.ram {
        srat.append_slice(Memory::new(*node, range, ENABLED).as_bytes());
    }
}

/// A processor by the ID of its local APIC, of a byte. §5.2.16.1.
#[derive(Immutable, IntoBytes)]
#[repr(C)]
struct Processor {
    kind: u8,
    length: u8,
    node_low: u8,
    apic_id: u8,
    flags: U32,
    sapic_eid: u8,
    node_high: [u8; 3],
    clock_domain: U32,
}

impl Processor {
    fn new(cpu: &Cpu, node: u32) -> Self {
        let [node_low, node_high @ ..] = node.to_le_bytes();
        Self {
            kind: LOCAL_APIC,
            length: size_of::<Self>() as u8,
            node_low,
            apic_id: cpu.apic_id as u8,
            flags: ENABLED.into(),
            sapic_eid: 0,
            node_high,
            clock_domain: U32::ZERO,
        }
    }
}

/// A processor by the ID of its local APIC, of whatever width. §5.2.16.3.
#[derive(Immutable, IntoBytes)]
#[repr(C)]
struct X2Processor {
    kind: u8,
    length: u8,
    reserved: U16,
    node: U32,
    apic_id: U32,
    flags: U32,
    clock_domain: U32,
    reserved2: U32,
}

impl X2Processor {
    fn new(cpu: &Cpu, node: u32) -> Self {
        Self {
            kind: LOCAL_X2APIC,
            length: size_of::<Self>() as u8,
            reserved: U16::ZERO,
            node: node.into(),
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
    fn new(node: u32, range: &Range<u64>, flags: u32) -> Self {
        Self {
            kind: MEMORY,
            length: size_of::<Self>() as u8,
            node: node.to_le_bytes(),
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
    use proptest::prelude::*;

    use super::*;
    use crate::arch::layout;

    fn hardware(ids: &[u32]) -> Hardware {
        let cpu = |apic_id: &u32| Cpu {
            apic_id: *apic_id,
            enabled: true,
        };
        Hardware {
            cpus: ids.iter().map(cpu).collect(),
            ..Hardware::bare()
        }
    }

    /// What the table says: of processors their IDs and nodes, of memory its node, place and flags.
    #[derive(Debug, Default, PartialEq, Eq)]
    struct Read {
        cpus: Vec<(u32, u32)>,
        memory: Vec<(u32, Range<u64>, u32)>,
    }

    fn read(hardware: &Hardware) -> Read {
        let mut bytes = Vec::new();
        srat(hardware).unwrap().to_aml_bytes(&mut bytes);
        assert_eq!(
            bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
        let word = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().unwrap());
        let long = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap());
        assert_eq!((word(36), word(4) as usize), (1, bytes.len()));
        let mut read = Read::default();
        let mut at = 48;
        while at < bytes.len() {
            match (bytes[at], bytes[at + 1]) {
                (0, 16) => {
                    assert_eq!(word(at + 4), 1);
                    let node = word(at + 8) >> 8 << 8 | u32::from(bytes[at + 2]);
                    read.cpus.push((bytes[at + 3].into(), node));
                }
                (2, 24) => {
                    assert_eq!(word(at + 12), 1);
                    read.cpus.push((word(at + 8), word(at + 4)));
                }
                (1, 40) => {
                    let start = long(at + 8);
                    let range = start..start + long(at + 16);
                    read.memory.push((word(at + 2), range, word(at + 28)));
                }
                other => panic!("{other:?}"),
            }
            at += usize::from(bytes[at + 1]);
        }
        read
    }

    #[test]
    fn each_processor_and_each_piece_of_ram_is_of_node_0_and_what_can_come_is_said_to() {
        let (low, high) = (0..3_u64 << 30, 4 << 30..5_u64 << 30);
        let range = 6 << 30..7_u64 << 30;
        let hardware = Hardware {
            pluggable: Some(PluggableMemory {
                ram: vec![low.clone(), high.clone()],
                pieces: vec![(0, range.clone())],
            }),
            ..hardware(&[0, 7])
        };
        let mut bytes = Vec::new();
        srat(&hardware).unwrap().to_aml_bytes(&mut bytes);
        assert_eq!(bytes.len(), 48 + 2 * 24 + 3 * 40);
        let expected = Read {
            cpus: vec![(0, 0), (7, 0)],
            memory: vec![(0, low, 1), (0, high, 1), (0, range, 3)],
        };
        assert_eq!(read(&hardware), expected);
    }

    #[test]
    fn there_is_none_where_there_is_nothing_to_be_told() {
        assert!(srat(&hardware(&[0, 1])).is_none());
    }

    #[test]
    fn processors_and_memory_are_of_their_nodes_and_wide_ids_have_wide_entries() {
        let ram = vec![(0, 0..1_u64 << 30), (300, 1 << 30..2_u64 << 30)];
        let hardware = Hardware {
            numa: Some(Numa {
                cpus: vec![0, 300, 300, 2],
                ram: ram.clone(),
                distances: Vec::new(),
            }),
            pluggable: Some(PluggableMemory {
                ram: std::iter::once(0..2 << 30).collect(),
                pieces: vec![(300, 4 << 30..5 << 30), (0, 6 << 30..7 << 30)],
            }),
            ..hardware(&[0, 1, 0xfe, 0xff])
        };
        let mut bytes = Vec::new();
        srat(&hardware).unwrap().to_aml_bytes(&mut bytes);
        assert_eq!(bytes.len(), 48 + 3 * 16 + 24 + 4 * 40);
        let mut memory: Vec<_> = ram
            .into_iter()
            .map(|(node, range)| (node, range, 1))
            .collect();
        // What can come to each node.
        memory.push((300, 4 << 30..5 << 30, 3));
        memory.push((0, 6 << 30..7 << 30, 3));
        let expected = Read {
            cpus: vec![(0, 0), (1, 300), (0xfe, 300), (0xff, 2)],
            memory,
        };
        assert_eq!(read(&hardware), expected);
    }

    proptest! {
        /// Whatever zones and nodes there are, each byte of RAM is in one entry, of its zone's node, and each processor in
        /// one of its own node.
        #[test]
        fn each_byte_of_ram_and_each_processor_is_in_one_entry(
            zones in prop::collection::vec((1_u64..1 << 14, 0_u32..64), 1..8),
            nodes in prop::collection::vec(0_u32..64, 1..256),
            start in prop::sample::select(&layout::MMIO32_STARTS[..]),
        ) {
            let sizes: Vec<u64> = zones.iter().map(|(mib, _)| mib << 20).collect();
            let ranges = layout::ram_ranges(sizes.iter().sum(), start, &[]);
            let parts = layout::split(&ranges, sizes.iter().copied());
            let ids: Vec<u32> = (0..nodes.len() as u32).collect();
            let hardware = Hardware {
                numa: Some(Numa {
                    cpus: nodes.clone(),
                    ram: parts.iter().map(|(zone, part)| (zones[*zone].1, part.clone())).collect(),
                    distances: Vec::new(),
                }),
                ..hardware(&ids)
            };
            let read = read(&hardware);
            prop_assert_eq!(read.cpus, ids.into_iter().zip(nodes).collect::<Vec<_>>());
            // Ascending and without overlap, and no byte more or less than there are.
            prop_assert!(read.memory.windows(2).all(|pair| pair[0].1.end <= pair[1].1.start));
            let inside = |range: &Range<u64>| {
                ranges.iter().any(|of| of.start <= range.start && range.end <= of.end)
            };
            prop_assert!(read.memory.iter().all(|(_, range, flags)| *flags == 1 && inside(range)));
            for node in 0..64 {
                let own = read.memory.iter().filter(|(of, ..)| *of == node);
                let bytes: u64 = own.map(|(_, range, _)| range.end - range.start).sum();
                let asked = zones.iter().filter(|(_, of)| *of == node);
                prop_assert_eq!(bytes, asked.map(|(mib, _)| mib << 20).sum::<u64>());
            }
        }
    }
}
