//! The SMBIOS tables of the board, which firmware hands on to the operating system. References are to DMTF
//! DSP0134, SMBIOS 3.0; of what is not known here, such as the firmware's version, firmware has a table itself.

/// A structure's type. §7.
const SYSTEM: u8 = 1;
const ENCLOSURE: u8 = 3;
const PROCESSOR: u8 = 4;
const MEMORY_ARRAY: u8 = 16;
const MEMORY_DEVICE: u8 = 17;
const MEMORY_ADDRESS: u8 = 19;
const BOOT_STATUS: u8 = 32;
const END: u8 = 127;

/// The handle of a structure: its type, and which of them it is.
fn handle(kind: u8, index: u8) -> u16 {
    u16::from_be_bytes([kind, index])
}

/// No other structure, and "not provided".
const NONE: u16 = 0xfffe;
const UNKNOWN: u8 = 2;

/// The structure table and the entry point that says where it is: `etc/smbios/smbios-tables` and
/// `etc/smbios/smbios-anchor`.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) anchor: Vec<u8>,
    pub(super) tables: Vec<u8>,
}

/// The tables of a machine with `cpus` processors and `memory` bytes of RAM.
pub(super) fn tables(cpus: u16, memory: u64) -> Tables {
    let mut table = Table::default();
    // §7.2: no UUID, woken by the power switch.
    let mut system = vec![1, 2, 3, 0];
    system.extend([0; 16]);
    system.extend([6, 0, 0]);
    table.add(
        SYSTEM,
        0,
        &system,
        &["Busway", "Busway VM", env!("CARGO_PKG_VERSION")],
    );
    // §7.4: "other", in a safe state, no security, no power cords, no contained elements.
    let mut enclosure = vec![1, 1, 2, 0, 0, 3, 3, 3, 2];
    enclosure.extend([0; 4]);
    enclosure.extend([0; 4]);
    enclosure.push(0);
    table.add(
        ENCLOSURE,
        0,
        &enclosure,
        &["Busway", env!("CARGO_PKG_VERSION")],
    );
    table.add(PROCESSOR, 0, &processor(cpus), &["CPU 0", "Busway"]);
    memory_structures(&mut table, memory);
    // §7.33: no error.
    table.add(BOOT_STATUS, 0, &[0; 7], &[]);
    table.add(END, 0, &[], &[]);
    let anchor = entry_point(table.bytes.len() as u32);
    Tables {
        anchor,
        tables: table.bytes,
    }
}

/// §7.5: one socket with all cores.
fn processor(cpus: u16) -> Vec<u8> {
    let mut body = vec![1, 3, 1, 2];
    body.extend([0; 8]);
    // Version, voltage, clocks, enabled, upgrade: unknown; caches: none.
    body.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x41, UNKNOWN]);
    body.extend([u8::MAX; 6]);
    body.extend([0, 0, 0]);
    let few = u8::try_from(cpus).unwrap_or(u8::MAX);
    body.extend([few; 3]);
    // 64-bit capable, multi-core.
    body.extend(0b1100_u16.to_le_bytes());
    body.extend(1_u16.to_le_bytes());
    for _ in 0..3 {
        body.extend(cpus.to_le_bytes());
    }
    body
}

/// §7.17, §7.18 and §7.20: one array with one device, where all RAM is.
fn memory_structures(table: &mut Table, memory: u64) {
    let kib = memory >> 10;
    // System board, system memory, no error correction.
    let mut array = vec![3, 3, 3];
    array.extend(0x8000_0000_u32.to_le_bytes());
    array.extend(NONE.to_le_bytes());
    array.extend(1_u16.to_le_bytes());
    array.extend(memory.to_le_bytes());
    table.add(MEMORY_ARRAY, 0, &array, &[]);

    let mib = memory >> 20;
    let mut device = handle(MEMORY_ARRAY, 0).to_le_bytes().to_vec();
    device.extend(NONE.to_le_bytes());
    device.extend([u8::MAX; 4]);
    // A size of 32 GiB and more is in the extended field.
    let (short, long) = match u16::try_from(mib).ok().filter(|mib| *mib < 0x7fff) {
        Some(mib) => (mib, 0),
        None => (0x7fff, u32::try_from(mib).unwrap_or(0x7fff_ffff)),
    };
    device.extend(short.to_le_bytes());
    // DIMM, no set, location, no bank, RAM, "other".
    device.extend([9, 0, 1, 0, 7]);
    device.extend(UNKNOWN.to_le_bytes());
    device.push(0);
    device.extend(0_u16.to_le_bytes());
    device.extend([2, 0, 0, 0, 0]);
    device.extend(long.to_le_bytes());
    device.extend([0; 8]);
    table.add(MEMORY_DEVICE, 0, &device, &["DIMM 0", "Busway"]);

    let end = u32::try_from(kib.saturating_sub(1)).unwrap_or(u32::MAX);
    let mut mapped = Vec::new();
    for address in [0, end] {
        let shown = if end == u32::MAX { u32::MAX } else { address };
        mapped.extend(shown.to_le_bytes());
    }
    mapped.extend(handle(MEMORY_ARRAY, 0).to_le_bytes());
    mapped.push(1);
    let extended = if end == u32::MAX {
        memory.saturating_sub(1)
    } else {
        0
    };
    mapped.extend(0_u64.to_le_bytes());
    mapped.extend(extended.to_le_bytes());
    table.add(MEMORY_ADDRESS, 0, &mapped, &[]);
}

/// §5.2.2, the 64-bit entry point: firmware puts the table's address in, and the checksum right.
fn entry_point(size: u32) -> Vec<u8> {
    const LENGTH: u8 = 24;
    let mut bytes = b"_SM3_".to_vec();
    // Checksum, length, version 3.0.0, revision.
    bytes.extend([0, LENGTH, 3, 0, 0, 1, 0]);
    bytes.extend(size.to_le_bytes());
    bytes.extend([0; 8]);
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = bytes.get_mut(5) {
        *checksum = sum.wrapping_neg();
    }
    bytes
}

#[derive(Debug, Default)]
struct Table {
    bytes: Vec<u8>,
}

impl Table {
    /// Appends a structure. §6.1: header, body, then its strings, each with a zero behind it, and a zero.
    fn add(&mut self, kind: u8, index: u8, body: &[u8], strings: &[&str]) {
        self.bytes.extend([kind, 4 + body.len() as u8]);
        self.bytes.extend(handle(kind, index).to_le_bytes());
        self.bytes.extend(body);
        for string in strings {
            self.bytes.extend(string.as_bytes());
            self.bytes.push(0);
        }
        if strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The structures: type, body with its header, strings.
    fn structures(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let (body, rest) = bytes.split_at(bytes[1].into());
            let end = rest.windows(2).position(|pair| pair == [0, 0]).unwrap();
            let strings = rest[..end].split(|byte| *byte == 0);
            let strings = strings.map(|text| String::from_utf8_lossy(text).into_owned());
            found.push((body[0], body.to_vec(), strings.collect()));
            bytes = &rest[end + 2..];
        }
        found
    }

    #[test]
    fn each_structure_has_the_length_of_its_version_and_the_last_is_the_end() {
        let tables = tables(2, 4 << 30);
        let found = structures(&tables.tables);
        let lengths: Vec<_> = found
            .iter()
            .map(|(kind, body, _)| (*kind, body.len()))
            .collect();
        assert_eq!(
            lengths,
            [
                (1, 0x1b),
                (3, 0x16),
                (4, 0x30),
                (16, 0x17),
                (17, 0x28),
                (19, 0x1f),
                (32, 0x0b),
                (127, 4)
            ]
        );
        assert_eq!(found[0].2[..2], ["Busway", "Busway VM"]);
        let sum = tables
            .anchor
            .iter()
            .fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!((sum, tables.anchor.len()), (0, 24));
        let size = u32::from_le_bytes(tables.anchor[12..16].try_into().unwrap());
        assert_eq!(size as usize, tables.tables.len());
    }

    #[test]
    fn memory_of_any_size_is_told() {
        for (size, short, long) in [
            (1_u64 << 30, 1024_u16, 0_u32),
            (32 << 30, 0x7fff, 32 << 10),
            (1 << 42, 0x7fff, 1 << 22),
        ] {
            let tables = tables(1, size);
            let found = structures(&tables.tables);
            let device = &found[4].1;
            assert_eq!(
                u16::from_le_bytes(device[12..14].try_into().unwrap()),
                short
            );
            assert_eq!(u32::from_le_bytes(device[28..32].try_into().unwrap()), long);
        }
    }
}
