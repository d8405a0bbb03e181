//! The tables for firmware, which puts them where it wants: with a script that says what of them depends on
//! where they are. QEMU hw/acpi/bios-linker-loader.c; OvmfPkg/AcpiHardwareDxe/QemuLoader.h.

use super::{Hardware, Image};

/// Names of the files in fw_cfg.
const TABLES: &str = "etc/acpi/tables";
const RSDP: &str = "etc/acpi/rsdp";

/// Bytes of a command, and of a name in it.
const COMMAND: usize = 128;
const NAME: usize = 56;

// Commands.
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;

/// Where a file is to be: anywhere, or where a BIOS keeps the RSDP.
const HIGH: u8 = 1;
const LOW: u8 = 2;

/// The FACS's alignment. §5.2.10.
const ALIGNMENT: u32 = 64;
/// A table's checksum. §5.2.6.
const CHECKSUM: usize = 9;
/// Offset and bytes of a table's length.
const LENGTH: std::ops::Range<usize> = 4..8;

// The RSDP. §5.2.5.3.
const RSDP_CHECKSUM: usize = 8;
const RSDP_OLD_LENGTH: usize = 20;
const RSDP_XSDT: usize = 24;
const RSDP_EXTENDED_CHECKSUM: usize = 32;

/// The tables as firmware reads them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loader {
    /// `etc/acpi/tables`: all but the RSDP, with addresses from the file's start.
    pub tables: Vec<u8>,
    /// `etc/acpi/rsdp`
    pub rsdp: Vec<u8>,
    /// `etc/table-loader`
    pub script: Vec<u8>,
}

impl Loader {
    /// The tables of `hardware`.
    #[must_use]
    pub fn new(hardware: &Hardware) -> Self {
        let image = Image::at(hardware, 0);
        let mut tables = image.bytes;
        let mut rsdp = image.rsdp;
        let mut script = Vec::new();
        allocate(&mut script, RSDP, 16, LOW);
        allocate(&mut script, TABLES, ALIGNMENT, HIGH);
        for (offset, size) in image.pointers {
            add_pointer(&mut script, TABLES, offset, size);
        }
        for start in image.summed {
            let Some(length) = length_of(&tables, start) else {
                continue;
            };
            clear(&mut tables, start + CHECKSUM);
            add_checksum(&mut script, TABLES, start + CHECKSUM, start, length);
        }
        add_pointer(&mut script, RSDP, RSDP_XSDT, 8);
        clear(&mut rsdp, RSDP_CHECKSUM);
        add_checksum(&mut script, RSDP, RSDP_CHECKSUM, 0, RSDP_OLD_LENGTH);
        clear(&mut rsdp, RSDP_EXTENDED_CHECKSUM);
        add_checksum(&mut script, RSDP, RSDP_EXTENDED_CHECKSUM, 0, rsdp.len());
        Self {
            tables,
            rsdp,
            script,
        }
    }
}

fn clear(bytes: &mut [u8], at: usize) {
    if let Some(byte) = bytes.get_mut(at) {
        *byte = 0;
    }
}

fn length_of(tables: &[u8], start: usize) -> Option<usize> {
    let length = tables.get(start..)?.get(LENGTH)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(length)).ok()
}

fn allocate(script: &mut Vec<u8>, file: &str, alignment: u32, zone: u8) {
    let mut body = name(file);
    body.extend(alignment.to_le_bytes());
    body.push(zone);
    command(script, ALLOCATE, body);
}

/// Adds where the tables are to the address of `size` bytes at `offset` in `file`.
fn add_pointer(script: &mut Vec<u8>, file: &str, offset: usize, size: u8) {
    let mut body = name(file);
    body.extend(name(TABLES));
    body.extend((offset as u32).to_le_bytes());
    body.push(size);
    command(script, ADD_POINTER, body);
}

fn add_checksum(script: &mut Vec<u8>, file: &str, at: usize, start: usize, length: usize) {
    let mut body = name(file);
    for number in [at, start, length] {
        body.extend((number as u32).to_le_bytes());
    }
    command(script, ADD_CHECKSUM, body);
}

fn name(file: &str) -> Vec<u8> {
    let mut bytes = file.as_bytes().to_vec();
    bytes.resize(NAME, 0);
    bytes
}

fn command(script: &mut Vec<u8>, kind: u32, mut body: Vec<u8>) {
    script.extend(kind.to_le_bytes());
    body.resize(COMMAND - 4, 0);
    script.extend(body);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::{Cpu, Root};
    use crate::arch::layout;

    /// Somewhere above 4 GiB, and near its end.
    const PLACES: [u64; 2] = [0x7e00_0000, 0x1_2345_6000];

    fn valid_checksum(bytes: &[u8]) -> bool {
        bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)) == 0
    }

    fn hardware() -> Hardware {
        let cpu = |apic_id| Cpu {
            apic_id,
            enabled: true,
        };
        Hardware {
            cpus: vec![cpu(0), cpu(1)],
            cpu_hotplug: true,
            roots: vec![Root {
                segment: 0,
                node: None,
                last_bus: 3,
                io: layout::PCI_IO,
                mmio32: layout::mmio32(0x8000_0000, &[]),
                mmio64: layout::mmio64(1 << 32, 40, &[]),
                slots: 0,
                ecam: layout::ECAM_START..layout::ECAM_START + layout::ECAM_SIZE,
            }],
            pluggable: None,
            memory_devices: false,
            numa: None,
            serial: true,
            tpm: false,
            native_hotplug: true,
        }
    }

    fn number(bytes: &[u8], at: usize, size: usize) -> u64 {
        let mut value = [0; 8];
        value[..size].copy_from_slice(&bytes[at..at + size]);
        u64::from_le_bytes(value)
    }

    /// Does what firmware does, with the tables at `at`.
    fn load(loader: &Loader, at: u64) -> (Vec<u8>, Vec<u8>) {
        let (mut tables, mut rsdp) = (loader.tables.clone(), loader.rsdp.clone());
        for command in loader.script.chunks(COMMAND) {
            let (kind, body) = (number(command, 0, 4) as u32, &command[4..]);
            let file = match body.starts_with(RSDP.as_bytes()) {
                true => &mut rsdp,
                false => &mut tables,
            };
            match kind {
                ALLOCATE => {}
                ADD_POINTER => {
                    assert!(body[NAME..].starts_with(TABLES.as_bytes()));
                    let offset = number(body, 2 * NAME, 4) as usize;
                    let size = usize::from(body[2 * NAME + 4]);
                    let value = number(file, offset, size) + at;
                    file[offset..offset + size].copy_from_slice(&value.to_le_bytes()[..size]);
                }
                ADD_CHECKSUM => {
                    let [to, start, length] =
                        [0, 4, 8].map(|at| number(body, NAME + at, 4) as usize);
                    let sum = file[start..start + length].iter();
                    let sum = sum.fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
                    file[to] = sum.wrapping_neg();
                }
                other => panic!("command {other}"),
            }
        }
        (tables, rsdp)
    }

    #[test]
    fn loaded_anywhere_each_table_is_found_and_its_checksum_is_right() {
        let loader = Loader::new(&hardware());
        for at in PLACES {
            let (tables, rsdp) = load(&loader, at);
            assert!(rsdp.starts_with(b"RSD PTR "));
            assert!(valid_checksum(&rsdp[..RSDP_OLD_LENGTH]) && valid_checksum(&rsdp));
            let table = |address: u64| {
                let start = usize::try_from(address - at).unwrap();
                &tables[start..start + number(&tables, start + 4, 4) as usize]
            };
            let xsdt = table(number(&rsdp, RSDP_XSDT, 8));
            assert!(xsdt.starts_with(b"XSDT") && valid_checksum(xsdt));
            let entries: Vec<_> = xsdt[36..]
                .chunks(8)
                .map(|entry| table(number(entry, 0, 8)))
                .collect();
            let names: Vec<_> = entries.iter().map(|table| &table[..4]).collect();
            assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
            assert!(entries.iter().all(|table| valid_checksum(table)));
            let dsdt = table(number(entries[0], 140, 8));
            assert!(dsdt.starts_with(b"DSDT") && valid_checksum(dsdt));
            if at < 1 << 32 {
                let facs = table(number(entries[0], 36, 4));
                assert!(facs.starts_with(b"FACS"));
                assert_eq!(number(entries[0], 40, 4), number(entries[0], 140, 8));
            }
        }
    }

    #[test]
    fn configuration_space_is_where_the_hardware_says() {
        let mut moved = hardware();
        for root in &mut moved.roots {
            root.ecam = 0xb000_0000..0xc000_0000;
        }
        let tables = Loader::new(&moved).tables;
        let mcfg = tables.windows(4).position(|name| name == b"MCFG").unwrap();
        assert_eq!(number(&tables, mcfg + 44, 8), 0xb000_0000);
    }
}
