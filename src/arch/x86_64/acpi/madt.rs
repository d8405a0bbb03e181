//! The multiple APIC description table: processors and interrupt controllers. §5.2.12.

use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes};

use crate::acpi::{Cpu, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::arch::gsi::SCI;
use crate::arch::layout::{IOAPIC_START, LAPIC_START};

/// Revision of the table that knows "online capable".
const REVISION: u8 = 5;
/// Header, local APIC address and flags.
const FIXED_SIZE: u32 = 44;
/// `PCAT_COMPAT`: there is a pair of 8259s too.
const PCAT_COMPAT: u32 = 1 << 0;

// Structure types, table 5.21, beside those of acpi_tables.
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
pub(crate) fn madt(cpus: &[Cpu]) -> Sdt {
    let mut entries = Vec::new();
    let mut wide = false;
    for (uid, cpu) in (0_u32..).zip(cpus) {
        wide |= !is_narrow(uid, *cpu);
        entries.extend(madt_processor(uid, *cpu));
    }
    // The ID that KVM's IOAPIC has from the start.
    entries.extend(IoApic::new(0, IOAPIC_START as u32, 0).as_bytes());
    for (irq, gsi, flags) in [(0, TIMER_GSI, CONFORMS), (SCI as u8, SCI, HIGH_LEVEL)] {
        entries.extend(SourceOverride::new(irq, gsi, flags).as_bytes());
    }
    entries.extend(LocalApicNmi::of_all().as_bytes());
    if wide {
        entries.extend(LocalX2ApicNmi::of_all().as_bytes());
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

/// The entry of a processor, which its `_MAT` gives as well. §6.2.11.
pub(crate) fn madt_processor(uid: u32, cpu: Cpu) -> Vec<u8> {
    if !is_narrow(uid, cpu) {
        return LocalX2Apic::new(uid, &cpu).as_bytes().to_vec();
    }
    let status = match cpu.enabled {
        true => EnabledStatus::Enabled,
        false => EnabledStatus::DisabledOnlineCapable,
    };
    let entry = ProcessorLocalApic::new(uid as u8, cpu.apic_id as u8, status);
    entry.as_bytes().to_vec()
}

/// Whether a processor's numbers fit a local APIC structure.
fn is_narrow(uid: u32, cpu: Cpu) -> bool {
    uid < FIRST_X2APIC && cpu.apic_id < FIRST_X2APIC
}

// The structures that acpi_tables has not.

/// A processor whose ID takes more than a byte. §5.2.12.12.
#[derive(Immutable, IntoBytes)]
#[repr(C)]
struct LocalX2Apic {
    kind: u8,
    length: u8,
    reserved: [u8; 2],
    apic_id: U32,
    flags: U32,
    uid: U32,
}

impl LocalX2Apic {
    fn new(uid: u32, cpu: &Cpu) -> Self {
        let flags = if cpu.enabled { ENABLED } else { ONLINE_CAPABLE };
        Self {
            kind: LOCAL_X2APIC,
            length: size_of::<Self>() as u8,
            reserved: [0; 2],
            apic_id: cpu.apic_id.into(),
            flags: flags.into(),
            uid: uid.into(),
        }
    }
}

/// An ISA interrupt that is wired to another pin, or otherwise, than ISA has it. §5.2.12.5.
#[derive(Immutable, IntoBytes)]
#[repr(C)]
struct SourceOverride {
    kind: u8,
    length: u8,
    bus: u8,
    irq: u8,
    gsi: U32,
    flags: U16,
}

impl SourceOverride {
    fn new(irq: u8, gsi: u32, flags: u16) -> Self {
        Self {
            kind: INTERRUPT_SOURCE_OVERRIDE,
            length: size_of::<Self>() as u8,
            bus: ISA,
            irq,
            gsi: gsi.into(),
            flags: flags.into(),
        }
    }
}

/// The local pin of processors that NMI is wired to. §5.2.12.7.
#[derive(Immutable, IntoBytes)]
#[repr(C)]
struct LocalApicNmi {
    kind: u8,
    length: u8,
    uid: u8,
    flags: U16,
    lint: u8,
}

impl LocalApicNmi {
    fn of_all() -> Self {
        Self {
            kind: LOCAL_APIC_NMI,
            length: size_of::<Self>() as u8,
            uid: u8::MAX,
            flags: CONFORMS.into(),
            lint: NMI_LINT,
        }
    }
}

/// The same for processors whose IDs take more than a byte. §5.2.12.13.
#[derive(Immutable, IntoBytes)]
#[repr(C)]
struct LocalX2ApicNmi {
    kind: u8,
    length: u8,
    flags: U16,
    uid: U32,
    lint: u8,
    reserved: [u8; 3],
}

impl LocalX2ApicNmi {
    fn of_all() -> Self {
        Self {
            kind: LOCAL_X2APIC_NMI,
            length: size_of::<Self>() as u8,
            flags: CONFORMS.into(),
            uid: u32::MAX.into(),
            lint: NMI_LINT,
            reserved: [0; 3],
        }
    }
}
