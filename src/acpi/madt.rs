//! The multiple APIC description table: processors and interrupt controllers. §5.2.12.

use acpi_tables::sdt::Sdt;

use super::{Cpu, OEM_ID, OEM_REVISION, OEM_TABLE_ID, SCI};
use crate::memory::layout::{IOAPIC_START, LAPIC_START};

/// Revision of the table that knows "online capable".
const REVISION: u8 = 5;
/// Header, local APIC address and flags.
const FIXED_SIZE: u32 = 44;
/// `PCAT_COMPAT`: there is a pair of 8259s too.
const PCAT_COMPAT: u32 = 1 << 0;

// Structure types, table 5.21.
const LOCAL_APIC: u8 = 0;
const IO_APIC: u8 = 1;
const INTERRUPT_SOURCE_OVERRIDE: u8 = 2;
const LOCAL_APIC_NMI: u8 = 4;
const LOCAL_X2APIC: u8 = 9;
const LOCAL_X2APIC_NMI: u8 = 10;

/// Flags of a processor. Table 5.23.
const ENABLED: u32 = 1 << 0;
const ONLINE_CAPABLE: u32 = 1 << 1;

/// MPS INTI flags, table 5.26: what the bus has by default; active high, level-triggered.
const CONFORMS: u16 = 0;
const HIGH_LEVEL: u16 = 0b01 | 0b11 << 2;

const ISA: u8 = 0;
/// IRQ 0, the timer, is wired to the IOAPIC's pin 2, as on any PC.
const TIMER_GSI: u32 = 2;
/// The local interrupt pin that NMI is wired to.
const NMI_LINT: u8 = 1;
/// The IDs from here on do not fit a local APIC structure; 0xff means all processors.
const FIRST_X2APIC: u32 = 0xff;

/// The table. The position of a processor in `cpus` is its UID, as in the DSDT.
pub(super) fn madt(cpus: &[Cpu]) -> Sdt {
    let mut entries = Vec::new();
    let mut wide = false;
    for (uid, cpu) in (0_u32..).zip(cpus) {
        let flags = if cpu.enabled { ENABLED } else { ONLINE_CAPABLE };
        if uid < FIRST_X2APIC && cpu.apic_id < FIRST_X2APIC {
            entry(
                &mut entries,
                LOCAL_APIC,
                &[&[uid as u8, cpu.apic_id as u8], &flags.to_le_bytes()],
            );
        } else {
            wide = true;
            entry(
                &mut entries,
                LOCAL_X2APIC,
                &[
                    &[0; 2],
                    &cpu.apic_id.to_le_bytes(),
                    &flags.to_le_bytes(),
                    &uid.to_le_bytes(),
                ],
            );
        }
    }
    entry(
        &mut entries,
        IO_APIC,
        &[
            // The ID that KVM's IOAPIC has from the start.
            &[0, 0],
            &(IOAPIC_START as u32).to_le_bytes(),
            &0_u32.to_le_bytes(),
        ],
    );
    for (irq, gsi, flags) in [(0, TIMER_GSI, CONFORMS), (SCI as u8, SCI, HIGH_LEVEL)] {
        entry(
            &mut entries,
            INTERRUPT_SOURCE_OVERRIDE,
            &[&[ISA, irq], &gsi.to_le_bytes(), &flags.to_le_bytes()],
        );
    }
    entry(
        &mut entries,
        LOCAL_APIC_NMI,
        &[&[0xff], &CONFORMS.to_le_bytes(), &[NMI_LINT]],
    );
    if wide {
        entry(
            &mut entries,
            LOCAL_X2APIC_NMI,
            &[&CONFORMS.to_le_bytes(), &[0xff; 4], &[NMI_LINT, 0, 0, 0]],
        );
    }
    let mut madt = Sdt::new(
        *b"APIC",
        FIXED_SIZE,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    madt.write_u32(36, LAPIC_START as u32);
    madt.write_u32(40, PCAT_COMPAT);
    madt.append_slice(&entries);
    madt
}

/// Appends a structure: type, length, and its fields.
fn entry(entries: &mut Vec<u8>, kind: u8, fields: &[&[u8]]) {
    let length: usize = fields.iter().map(|field| field.len()).sum();
    entries.extend([kind, 2 + length as u8]);
    entries.extend(fields.concat());
}
