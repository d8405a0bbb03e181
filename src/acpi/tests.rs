use std::path::Path;
use std::process::Command;

use vm_memory::GuestMemoryMmap;

use super::*;
use crate::arch::layout;

fn hardware(cpus: u32) -> Hardware {
    Hardware {
        cpus: (0..cpus)
            .map(|apic_id| Cpu {
                apic_id,
                enabled: apic_id < 4,
            })
            .collect(),
        cpu_hotplug: false,
        roots: vec![root()],
        pluggable: None,
        memory_devices: false,
        numa: None,
        serial: true,
        tpm: false,
        native_hotplug: true,
    }
}

/// Segment 0.
fn root() -> Root {
    Root {
        segment: 0,
        node: None,
        last_bus: 7,
        io: layout::PCI_IO,
        mmio32: layout::mmio32(layout::MMIO32_START, &[]),
        mmio64: layout::mmio64(7 << 30, 40, &[]),
        slots: 0b1110,
        ecam: layout::ECAM_START..layout::ECAM_START + layout::ECAM_SIZE,
    }
}

/// So many segments, which share the windows of the first.
fn segments(count: u16) -> Vec<Root> {
    let last: Vec<_> = (0..count)
        .map(|segment| if segment == 0 { 9 } else { 1 })
        .collect();
    let ecams = layout::ecams(&last).unwrap();
    let of = |((segment, ecam), last_bus)| {
        let low = 0xc000_0000 + 0x100_0000 * u64::from(segment);
        let high = (8 + u64::from(segment)) << 30;
        Root {
            segment,
            node: (segment == 1).then_some(3),
            last_bus,
            io: match segment {
                0 => 0x1000..0xf000,
                1 => 0xf000..0x1_0000,
                _ => 0..0,
            },
            mmio32: std::iter::once(low..low + 0x100_0000).collect(),
            mmio64: std::iter::once(high..high + (1 << 30)).collect(),
            slots: 0xfffe,
            ecam,
        }
    };
    (0..count).zip(ecams).zip(last).map(of).collect()
}

/// The tables by signature, found as an operating system finds them: from the RSDP on.
fn tables(hardware: &Hardware) -> Vec<(String, Vec<u8>)> {
    let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let rsdp = install(&ram, hardware).unwrap();
    let read = |address: u64, length: usize| {
        let mut bytes = vec![0; length];
        ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    };
    let word = |address| u32::from_le_bytes(read(address, 4).try_into().unwrap());
    let quad = |address| u64::from_le_bytes(read(address, 8).try_into().unwrap());
    let table = |address: u64| {
        let bytes = read(address, word(address + 4) as usize);
        (String::from_utf8(bytes[..4].to_vec()).unwrap(), bytes)
    };
    assert_eq!(rsdp.0 % 16, 0);
    let root = read(rsdp.0, 36);
    assert_eq!(&root[..8], b"RSD PTR ");
    assert_eq!(sum(&root[..20]), 0);
    assert_eq!(sum(&root), 0);
    let xsdt = quad(rsdp.0 + 24);
    let mut found = vec![table(xsdt)];
    let entries = (u64::from(word(xsdt + 4)) - 36) / 8;
    for entry in 0..entries {
        found.push(table(quad(xsdt + 36 + entry * 8)));
    }
    let fadt = found.iter().find(|(name, _)| name == "FACP").unwrap();
    let field = |at: usize| u64::from(u32::from_le_bytes(fadt.1[at..at + 4].try_into().unwrap()));
    let (facs, dsdt) = (field(36), field(40));
    assert_eq!(facs % 64, 0);
    found.extend([table(dsdt), table(facs)]);
    found
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[test]
fn each_table_is_found_from_the_rsdp_and_its_checksum_holds() {
    let tables = tables(&hardware(4));
    let names: Vec<_> = tables.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["XSDT", "FACP", "APIC", "MCFG", "DSDT", "FACS"]);
    for (name, bytes) in &tables {
        // The FACS has no checksum.
        if name != "FACS" {
            assert_eq!(sum(bytes), 0, "{name}");
        }
    }
}

#[test]
fn a_tpm_is_in_a_table_of_its_own_and_in_the_namespace_and_only_where_there_is_one() {
    let with = Hardware {
        tpm: true,
        ..hardware(4)
    };
    let found = tables(&with);
    let table = |name: &str| &found.iter().find(|(one, _)| one == name).unwrap().1;
    let tpm2 = table("TPM2");
    assert_eq!((tpm2.len(), tpm2[8], sum(tpm2)), (76, 4, 0));
    // The control area, and that commands are started by its registers. TCG ACPI Specification 1.4, table 7
    assert_eq!(tpm2[40..48], 0xfed4_0040_u64.to_le_bytes());
    assert_eq!(tpm2[48..52], 7_u32.to_le_bytes());
    let dsdt = table("DSDT");
    let has = |bytes: &[u8], wanted: &[u8]| bytes.windows(wanted.len()).any(|at| at == wanted);
    // Name (_HID, "MSFT0101"), and a page of registers that can be written.
    assert!(has(dsdt, b"_HID\x0dMSFT0101\0"));
    let mut registers = vec![0x86, 9, 0, 1];
    registers.extend(0xfed4_0000_u32.to_le_bytes());
    registers.extend(0x1000_u32.to_le_bytes());
    assert!(has(dsdt, &registers));
    let without = tables(&hardware(4));
    assert!(
        without
            .iter()
            .all(|(name, bytes)| name != "TPM2" && !has(bytes, b"MSFT0101"))
    );
}

#[test]
fn the_madt_lists_each_processor_once_by_the_entry_its_id_needs() {
    let (_, madt) = tables(&hardware(300)).swap_remove(2);
    let (mut local, mut x2, mut io, mut overrides, mut nmis) = (0, 0, 0, Vec::new(), 0);
    let mut at = 44;
    while at < madt.len() {
        let entry = &madt[at..at + usize::from(madt[at + 1])];
        match entry[0] {
            0 => {
                assert_eq!(entry[2], entry[3], "UID and ID");
                assert_eq!(u32::from(entry[3]), local);
                assert_eq!(entry[4], if local < 4 { 1 } else { 2 });
                local += 1;
            }
            9 => {
                assert_eq!(entry[4..8], entry[12..16], "UID and ID");
                x2 += 1;
            }
            1 => io += 1,
            2 => overrides.push((entry[3], entry[4], entry[8])),
            4 | 10 => nmis += 1,
            other => panic!("unexpected entry {other}"),
        }
        at += entry.len();
    }
    assert_eq!((local, x2, io, nmis), (255, 45, 1, 2));
    assert_eq!(overrides, [(0, 2, 0), (9, 9, 0b1101)]);
}

#[test]
fn the_madt_of_a_small_machine_to_the_byte() {
    let (_, madt) = tables(&hardware(1)).swap_remove(2);
    let expected: [&[u8]; 6] = [
        // The local APIC's address, and that there are 8259s.
        &[0, 0, 0xe0, 0xfe, 1, 0, 0, 0],
        &[0, 8, 0, 0, 1, 0, 0, 0],
        &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
        &[2, 10, 0, 0, 2, 0, 0, 0, 0, 0],
        &[2, 10, 0, 9, 9, 0, 0, 0, 0b1101, 0],
        &[4, 6, 0xff, 0, 0, 1],
    ];
    assert_eq!(madt[36..], expected.concat());
    let (_, madt) = tables(&hardware(256)).swap_remove(2);
    let x2 = [9, 16, 0, 0, 0xff, 0, 0, 0, 2, 0, 0, 0, 0xff, 0, 0, 0];
    assert!(madt.windows(16).any(|entry| entry == x2));
    let nmi = [10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0];
    assert!(madt.ends_with(&nmi));
}

#[test]
fn the_fadt_claims_the_hardware_that_is_there() {
    let (_, fadt) = tables(&hardware(1)).swap_remove(1);
    let word = |at: usize| u32::from_le_bytes(fadt[at..at + 4].try_into().unwrap());
    assert_eq!(u16::from_le_bytes([fadt[46], fadt[47]]), 9, "SCI");
    assert_eq!(word(48), 0, "no SMI port: ACPI mode is always on");
    assert_eq!((word(56), word(64), word(76)), (0x600, 0x604, 0x608));
    assert_eq!(fadt[108], 0x32, "century");
    let boot = u16::from_le_bytes([fadt[109], fadt[110]]);
    assert_eq!(boot & 0b10_0010, 0, "no 8042, and the CMOS clock is there");
    let flags = word(112);
    assert_eq!(flags >> 20 & 1, 0, "not hardware-reduced");
    assert_eq!(flags >> 4 & 1, 0, "a fixed power button");
    assert_eq!(flags >> 10 & 1, 1, "a reset register");
    assert_eq!(
        &fadt[116..129],
        [1, 8, 0, 1, 0xf9, 0xc, 0, 0, 0, 0, 0, 0, 6]
    );
}

/// The memory windows of the host bridge, as its `_CRS` has them. ACPI 6.5 §6.4.3.5.
fn memory_windows(dsdt: &[u8]) -> Vec<(u64, u64)> {
    let number = |bytes: &[u8]| {
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(wide)
    };
    // Tag, length of what follows, and memory as the kind of resource.
    let found = |head: [u8; 4], width: usize| {
        let starts = dsdt.windows(4).enumerate();
        let starts = starts.filter(move |(_, bytes)| *bytes == head);
        starts.map(move |(at, _)| {
            let field = |index: usize| number(&dsdt[at + 6 + index * width..][..width]);
            (field(1), field(2))
        })
    };
    let narrow = found([0x87, 23, 0, 0], 4);
    narrow.chain(found([0x8a, 43, 0, 0], 8)).collect()
}

#[test]
fn the_host_bridge_has_each_part_of_its_windows_and_nothing_between_them() {
    let windows = |hardware: &Hardware| {
        let tables = tables(hardware);
        let (_, dsdt) = tables.iter().find(|(name, _)| name == "DSDT").unwrap();
        memory_windows(dsdt)
    };
    let whole = [(0xc000_0000, 0xdfff_ffff), (7 << 30, (1 << 40) - 1)];
    assert_eq!(windows(&hardware(1)), whole);
    let low = 0x8000_0000..0xe000_0000;
    let with = |root| Hardware {
        roots: vec![root],
        ..hardware(1)
    };
    let around = with(Root {
        mmio32: vec![low],
        mmio64: vec![7 << 30..0xfd_0000_0000, 1 << 40..1 << 48],
        ..root()
    });
    let parts = [
        (0x8000_0000, 0xdfff_ffff),
        (7 << 30, 0xfc_ffff_ffff),
        (1 << 40, (1 << 48) - 1),
    ];
    assert_eq!(windows(&around), parts);
    let none = with(Root {
        mmio64: Vec::new(),
        ..root()
    });
    assert_eq!(windows(&none), whole[..1]);
}

#[test]
fn each_segment_has_an_entry_for_configuration_space_and_a_root_of_its_own() {
    let hardware = Hardware {
        roots: segments(3),
        ..hardware(2)
    };
    let found = tables(&hardware);
    let table = |name: &str| &found.iter().find(|(one, _)| one == name).unwrap().1;
    // Base address, segment, first and last bus. PCI Firmware 3.3 §4.1.2, table 4-3
    let entries = table("MCFG")[44..].chunks(16).map(|entry| {
        let base = u64::from_le_bytes(entry[..8].try_into().unwrap());
        (
            base,
            u16::from_le_bytes([entry[8], entry[9]]),
            entry[10],
            entry[11],
        )
    });
    assert_eq!(
        entries.collect::<Vec<_>>(),
        [
            (0xe000_0000, 0, 0, 9),
            (0xf000_0000, 1, 0, 1),
            (0xf020_0000, 2, 0, 1)
        ]
    );
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("dsdt.aml"), table("DSDT")).unwrap();
    let Some(_said) = iasl(folder.path(), &["-d", "dsdt.aml"]) else {
        return;
    };
    let text = std::fs::read_to_string(folder.path().join("dsdt.dsl")).unwrap();
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in [
        "Device (PCI0)",
        "Device (PC01)",
        "Name (_SEG, One)",
        "Name (_PXM, 0x03)",
        "Name (_SEG, 0x02)",
        "Name (_UID, 0x02)",
        "Return (\\_SB.PCI0._PRT)",
        // Ports of segment 1, and what segment 0 has below them.
        "0xF000, // Range Minimum 0xFFFF, // Range Maximum",
        "0x0D00, // Range Minimum 0xEFFF, // Range Maximum",
        "0xC1000000, // Range Minimum 0xC1FFFFFF, // Range Maximum",
        "Memory32Fixed (ReadWrite, 0xF0200000, // Address Base 0x00200000, // Address Length )",
        "OperationRegion (HPRG, SystemMemory, 0xFEC80020, 0x14)",
        "Scope (\\_SB.PC02)",
        "If ((\\_SB.PH02.PRES & 0x02)) { Return (0x0F) }",
        "Name (_SUN, 0x41)",
        "\\_SB.PCI0.PCNT () \\_SB.PC01.PCNT () \\_SB.PC02.PCNT ()",
    ] {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
    assert_eq!(text.matches("Name (_PXM").count(), 1);
}

#[test]
fn as_many_segments_as_there_can_be_fit_beside_many_processors() {
    let hardware = Hardware {
        cpu_hotplug: true,
        memory_devices: true,
        roots: segments(crate::config::MAX_SEGMENTS),
        ..hardware(64)
    };
    assert!(!tables(&hardware).is_empty());
}

#[test]
fn what_does_not_fit_is_an_error() {
    let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let error = install(&ram, &hardware(4000)).unwrap_err();
    assert!(matches!(error, AcpiError::TooBig { .. }), "{error}");
    let small = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap();
    let error = install(&small, &hardware(1)).unwrap_err();
    assert!(matches!(error, AcpiError::Memory(_)), "{error}");
}

/// Runs iasl in `folder`; its output, or `None` where there is no iasl.
fn iasl(folder: &Path, arguments: &[&str]) -> Option<String> {
    let output = match Command::new("iasl")
        .args(arguments)
        .current_dir(folder)
        .output()
    {
        Ok(output) => output,
        Err(error) => {
            eprintln!("skipped: cannot run iasl (Debian package acpica-tools): {error}");
            return None;
        }
    };
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{arguments:?}: {text}");
    Some(text)
}

#[test]
fn iasl_reads_all_tables_and_compiles_them_back_without_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let hardware = Hardware {
        cpu_hotplug: true,
        pluggable: Some(PluggableMemory {
            ram: vec![0..3 << 30, 4 << 30..5 << 30],
            pieces: vec![(1, 6 << 30..7 << 30)],
        }),
        memory_devices: true,
        numa: Some(Numa {
            cpus: (0..64).map(|cpu| cpu % 2).collect(),
            ram: vec![(0, 0..3 << 30), (1, 4 << 30..5 << 30)],
            distances: vec![vec![10, 21], vec![21, 10]],
        }),
        tpm: true,
        roots: segments(2),
        ..hardware(64)
    };
    for (name, bytes) in tables(&hardware) {
        let file = format!("{name}.aml");
        std::fs::write(folder.path().join(&file), &bytes).unwrap();
        let Some(read) = iasl(folder.path(), &["-d", &file]) else {
            return;
        };
        assert!(!read.contains("rror"), "{name}: {read}");
        let source = format!("{name}.dsl");
        let back = iasl(folder.path(), &["-p", "back", &source]).unwrap();
        assert!(!back.contains("Error  "), "{name}: {back}");
        assert!(!back.contains("Warning  "), "{name}: {back}");
        assert!(folder.path().join("back.aml").exists(), "{name}: {back}");
    }
}

#[test]
fn slots_that_can_change_are_there_with_their_methods_and_only_where_there_are_some() {
    let folder = tempfile::tempdir().unwrap();
    let source = |slots| {
        let hardware = Hardware {
            roots: vec![Root { slots, ..root() }],
            ..hardware(1)
        };
        let tables = tables(&hardware);
        let (_, dsdt) = tables.iter().find(|(name, _)| name == "DSDT")?;
        std::fs::write(folder.path().join("dsdt.aml"), dsdt).unwrap();
        let _said = iasl(folder.path(), &["-d", "dsdt.aml"])?;
        Some(std::fs::read_to_string(folder.path().join("dsdt.dsl")).unwrap())
    };
    let (Some(none), Some(some)) = (source(0), source(1 << 3 | 1 << 12)) else {
        return;
    };
    for word in ["ACPI0013", "_EJ0", "PHPC", "PCNT"] {
        assert!(!none.contains(word), "{word}");
        assert!(some.contains(word), "{word}");
    }
    let (_, changing) = some.split_once("Device (PHPC)").unwrap();
    let plain = changing.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in [
        // A level-triggered interrupt, and registers of their own.
        "Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive, ,, ) { 0x0000000A, }",
        "OperationRegion (HPRG, SystemMemory, 0xFEC80000, 0x14)",
        "Field (HPRG, DWordAcc, NoLock, WriteAsZeros) { ADDS, 32, WANT, 32, EJCT, 32, PRES, 32, OUTC, 32 }",
        // What is unseen is taken first, and then told.
        "Local0 = \\_SB.PHPC.ADDS \\_SB.PHPC.ADDS = Local0 Local1 = \\_SB.PHPC.WANT",
        "If ((Local0 & 0x08)) { Notify (S003, One) // Device Check }",
        "If ((Local1 & 0x1000)) { Notify (S00C, 0x03) // Eject Request }",
        "Device (S00C) { Name (_ADR, 0x000C0000) // _ADR: Address Name (_SUN, 0x0C)",
        "If ((\\_SB.PHPC.PRES & 0x1000)) { Return (0x0F) }",
        "\\_SB.PHPC.EJCT = 0x1000",
        "If ((Arg0 == 0x0A)) { \\_SB.PCI0.PCNT () }",
    ] {
        assert!(plain.contains(part), "no `{part}` in: {plain}");
    }
    assert!(!some.contains("S004"));
}

#[test]
fn processors_that_come_and_go_have_their_methods_and_all_that_there_can_be_fit() {
    let all = |count, cpu_hotplug| {
        let hardware = Hardware {
            cpu_hotplug,
            memory_devices: true,
            ..hardware(count)
        };
        let (_, dsdt) = tables(&hardware).swap_remove(4);
        dsdt
    };
    assert!(all(255, true).windows(4).any(|name| name == b"C0FE"));
    let folder = tempfile::tempdir().unwrap();
    let source = |cpu_hotplug| {
        std::fs::write(folder.path().join("dsdt.aml"), all(3, cpu_hotplug)).unwrap();
        let _said = iasl(folder.path(), &["-d", "dsdt.aml"])?;
        let text = std::fs::read_to_string(folder.path().join("dsdt.dsl")).unwrap();
        Some(text.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    let (Some(none), Some(some)) = (source(false), source(true)) else {
        return;
    };
    for word in ["GED1", "CPUC", "_MAT", "CSCN"] {
        assert!(!none.contains(word), "{word}");
        assert!(some.contains(word), "{word}");
    }
    for part in [
        "OperationRegion (CREG, SystemMemory, 0xFEC81000, 0x14)",
        "Field (CREG, DWordAcc, NoLock, WriteAsZeros) { EVNT, 32, EJCT, 32, SLCT, 32, PRES, 32, OUTC, 32 }",
        "If ((\\_SB.CPUC.PRES & One)) { Return (0x0F) }",
        "Return (\\_SB.CPUC.CSTA (0x02))",
        "\\_SB.CPUC.EJCT = 0x02",
        "\\_SB.CPUC.COST (0x02, Arg0, Arg1)",
        "If ((Arg0 == 0x02)) { Notify (C002, Arg1) }",
        "If ((Arg0 == 0x0B)) { \\_SB.CSCN () }",
    ] {
        assert!(some.contains(part), "no `{part}` in: {some}");
    }
    // The first processor stays.
    assert!(!some.contains("\\_SB.CPUC.EJCT = Zero"), "{some}");
}

#[test]
fn memory_devices_say_where_their_ram_is_and_are_there_only_where_ram_comes_by_them() {
    let folder = tempfile::tempdir().unwrap();
    let source = |memory_devices, numa| {
        let hardware = Hardware {
            memory_devices,
            pluggable: memory_devices.then(|| PluggableMemory {
                ram: std::iter::once(0..2 << 30).collect(),
                pieces: vec![(1, 4 << 30..5 << 30)],
            }),
            numa,
            ..hardware(2)
        };
        let (_, dsdt) = tables(&hardware)
            .into_iter()
            .find(|(name, _)| name == "DSDT")?;
        std::fs::write(folder.path().join("dsdt.aml"), dsdt).unwrap();
        let _said = iasl(folder.path(), &["-d", "dsdt.aml"])?;
        let text = std::fs::read_to_string(folder.path().join("dsdt.dsl")).unwrap();
        Some(text.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    let numa = Numa {
        cpus: vec![0, 1],
        ram: vec![(0, 0..1 << 30), (1, 1 << 30..2 << 30)],
        distances: vec![vec![10, 21], vec![21, 10]],
    };
    let (Some(none), Some(some)) = (source(false, None), source(true, None)) else {
        return;
    };
    let near = source(true, Some(numa)).unwrap();
    for word in ["GED2", "MEMC", "PNP0C80", "MSCN"] {
        assert!(!none.contains(word), "{word}");
        assert!(some.contains(word), "{word}");
    }
    for part in [
        "Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive, ,, ) { 0x00000005, }",
        "OperationRegion (MREG, SystemMemory, 0xFEC82000, 0x20)",
        "Field (MREG, DWordAcc, NoLock, WriteAsZeros) { ADDS, 32, PRES, 32, SLCT, 32, STRL, 32, STRH, 32, LENL, 32, LENH, 32, OUTC, 32 }",
        "CreateQWordField (TMPL, \\_SB.MEMC.MCRS._Y00._MIN, FRST)",
        "CreateQWordField (TMPL, \\_SB.MEMC.MCRS._Y00._MAX, LAST)",
        "CreateQWordField (TMPL, \\_SB.MEMC.MCRS._Y00._LEN, SIZE)",
        "If ((\\_SB.MEMC.PRES & 0x80000000)) { Return (0x0F) }",
        "Return (\\_SB.MEMC.MCRS (0x1F))",
        "\\_SB.MEMC.MOST (0x1F, Arg0, Arg1)",
        "Local0 = \\_SB.MEMC.ADDS \\_SB.MEMC.ADDS = Local0",
        "If ((Local0 & 0x80000000)) { Notify (M01F, One) // Device Check }",
        "If ((Arg0 == 0x05)) { \\_SB.MSCN () }",
    ] {
        assert!(some.contains(part), "no `{part}` in: {some}");
    }
    assert_eq!(some.matches("PNP0C80").count(), 32);
    let proximities = |text: &str| text.matches("Name (_PXM, One)").count();
    // Each memory device and a processor.
    assert_eq!((proximities(&some), proximities(&near)), (0, 33));
}

#[test]
fn nodes_are_told_by_tables_of_their_own_and_by_what_is_near_them() {
    let numa = Numa {
        cpus: vec![0, 1],
        ram: vec![(0, 0..1 << 30), (1, 1 << 30..2 << 30)],
        distances: vec![vec![10, 21], vec![21, 10]],
    };
    let near = || Root {
        node: Some(1),
        ..root()
    };
    let names = |hardware: &Hardware| {
        let tables = tables(hardware).into_iter();
        tables.map(|(name, _)| name).collect::<Vec<_>>()
    };
    let proximities = |hardware: &Hardware| {
        let tables = tables(hardware);
        let (_, dsdt) = tables.iter().find(|(name, _)| name == "DSDT").unwrap();
        dsdt.windows(4).filter(|name| name == b"_PXM").count()
    };
    let with = Hardware {
        numa: Some(numa.clone()),
        roots: vec![near()],
        ..hardware(2)
    };
    assert_eq!(
        names(&with),
        [
            "XSDT", "FACP", "APIC", "MCFG", "SRAT", "SLIT", "DSDT", "FACS"
        ]
    );
    // The root bridge and the two processors.
    assert_eq!(proximities(&with), 3);
    let nowhere = Hardware {
        numa: Some(numa),
        ..hardware(2)
    };
    assert_eq!(proximities(&nowhere), 2);
    assert_eq!(proximities(&hardware(2)), 0);
}
