//! The SMBIOS tables of the board: firmware hands them on to the operating system, and a kernel that begins without
//! firmware finds them in memory. References are to DMTF DSP0134, SMBIOS 3.0.

use busway_iommu::Uuid;

use crate::config::PlatformConfig;

/// A structure's type. §7.
const BIOS: u8 = 0;
const SYSTEM: u8 = 1;
const ENCLOSURE: u8 = 3;
const PROCESSOR: u8 = 4;
const OEM_STRINGS: u8 = 11;
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

const MAKER: &str = "Busway";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What tells one machine from another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The system's serial number.
    pub serial_number: Option<String>,
    /// Its UUID.
    pub uuid: Option<Uuid>,
    /// Strings for whoever looks for them.
    pub oem_strings: Vec<String>,
}

impl Identity {
    /// What a valid configuration says.
    #[must_use]
    pub fn of(platform: &PlatformConfig) -> Self {
        Self {
            serial_number: platform.serial_number.clone(),
            uuid: platform.uuid.as_ref().and_then(|uuid| uuid.parse().ok()),
            oem_strings: platform.oem_strings.clone(),
        }
    }

    /// Whether there is nothing to tell.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What the tables are about.
#[derive(Clone, Debug)]
pub struct Board {
    /// Processors.
    pub cpus: u16,
    /// Bytes of RAM.
    pub memory: u64,
    /// Which machine it is.
    pub identity: Identity,
}

/// Who tells of the firmware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirmwareTable {
    /// Firmware itself, which has a structure of its own for that.
    Firmwares,
    /// These tables, for there is no firmware: that it is a virtual machine's. No date is given, for Linux
    /// takes a firmware's age from it, and decides by that how ports are put to sleep.
    Ours,
}

/// The structure table. What says where it is depends on the address: [`Tables::entry_point`].
#[derive(Debug)]
pub struct Tables {
    /// The structures.
    pub bytes: Vec<u8>,
}

/// The tables of a machine.
#[must_use]
pub fn tables(board: &Board, firmware: FirmwareTable) -> Tables {
    let mut table = Table::default();
    if firmware == FirmwareTable::Ours {
        table.add(BIOS, 0, &bios(), &[MAKER, VERSION]);
    }
    system(&mut table, &board.identity);
    // §7.4: "other", in a safe state, no security, no power cords, no contained elements.
    let mut enclosure = vec![1, 1, 2, 0, 0, 3, 3, 3, 2];
    enclosure.extend([0; 4]);
    enclosure.extend([0; 4]);
    enclosure.push(0);
    table.add(ENCLOSURE, 0, &enclosure, &[MAKER, VERSION]);
    table.add(PROCESSOR, 0, &processor(board.cpus), &["CPU 0", MAKER]);
    oem_strings(&mut table, &board.identity.oem_strings);
    memory_structures(&mut table, board.memory);
    // §7.33: no error.
    table.add(BOOT_STATUS, 0, &[0; 7], &[]);
    table.add(END, 0, &[], &[]);
    Tables { bytes: table.bytes }
}

/// §7.1: maker and version; no segment, no date and no ROM; characteristics are not told of, but that it is a
/// virtual machine's (byte 2, bit 4); no release of this or of a controller.
fn bios() -> Vec<u8> {
    let mut body = vec![1, 2, 0, 0, 0, 0];
    body.extend((1_u64 << 3).to_le_bytes());
    body.extend([0, 1 << 4]);
    body.extend([u8::MAX; 4]);
    body
}

/// §7.2: woken by the power switch.
fn system(table: &mut Table, identity: &Identity) {
    let mut strings = vec![MAKER, "Busway VM", VERSION];
    let serial = identity.serial_number.as_deref().map_or(0, |serial| {
        strings.push(serial);
        strings.len() as u8
    });
    let mut body = vec![1, 2, 3, serial];
    // All zeros is no UUID.
    body.extend(identity.uuid.map_or([0; 16], wire));
    body.extend([6, 0, 0]);
    table.add(SYSTEM, 0, &body, &strings);
}

/// §7.2.1: the first three fields have their lowest byte first.
fn wire(uuid: Uuid) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *uuid.bytes();
    [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
}

/// §7.12; none where there are no strings. A valid configuration has no more than can be counted.
fn oem_strings(table: &mut Table, strings: &[String]) {
    if !strings.is_empty() {
        let strings: Vec<_> = strings.iter().map(String::as_str).collect();
        let count = u8::try_from(strings.len()).unwrap_or(u8::MAX);
        table.add(OEM_STRINGS, 0, &[count], &strings);
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

impl Tables {
    /// §5.2.2, the 64-bit entry point for a table that lies at `address`. Firmware, which is given zero, puts the
    /// address in, and the checksum right.
    #[must_use]
    pub fn entry_point(&self, address: u64) -> Vec<u8> {
        const LENGTH: u8 = 24;
        let size = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        let mut bytes = b"_SM3_".to_vec();
        // Checksum, length, version 3.0.0, revision.
        bytes.extend([0, LENGTH, 3, 0, 0, 1, 0]);
        bytes.extend(size.to_le_bytes());
        bytes.extend(address.to_le_bytes());
        let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        if let Some(checksum) = bytes.get_mut(5) {
            *checksum = sum.wrapping_neg();
        }
        bytes
    }
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

    fn board(memory: u64) -> Board {
        Board {
            cpus: 2,
            memory,
            identity: Identity::default(),
        }
    }

    fn identity() -> Identity {
        Identity {
            serial_number: Some("bw-0001".into()),
            uuid: Some("3c1f7a52-9b0e-4d6a-8e43-5f2b7d90c611".parse().unwrap()),
            oem_strings: vec!["busway".into(), "two words, é".into()],
        }
    }

    #[test]
    fn each_structure_has_the_length_of_its_version_and_the_last_is_the_end() {
        let lengths = |board: &Board, firmware| -> Vec<_> {
            let found = structures(&tables(board, firmware).bytes);
            let found = found.iter();
            found.map(|(kind, body, _)| (*kind, body.len())).collect()
        };
        let usual = [
            (1, 0x1b),
            (3, 0x16),
            (4, 0x30),
            (16, 0x17),
            (17, 0x28),
            (19, 0x1f),
            (32, 0x0b),
            (127, 4),
        ];
        let mut board = board(4 << 30);
        assert_eq!(lengths(&board, FirmwareTable::Firmwares), usual);
        board.identity = identity();
        let mut more = usual.to_vec();
        more.insert(3, (11, 5));
        more.insert(0, (0, 0x18));
        assert_eq!(lengths(&board, FirmwareTable::Ours), more);
    }

    #[test]
    fn the_entry_point_says_where_the_table_is_and_adds_up_to_zero() {
        let tables = tables(&board(1 << 30), FirmwareTable::Firmwares);
        for address in [0, 0xf_0020] {
            let entry = tables.entry_point(address);
            let sum = entry.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!((sum, entry.len()), (0, 24));
            let size = u32::from_le_bytes(entry[12..16].try_into().unwrap());
            assert_eq!(size as usize, tables.bytes.len());
            assert_eq!(entry[16..], address.to_le_bytes());
        }
    }

    #[test]
    fn serial_number_uuid_and_strings_are_where_they_are_read() {
        let mut board = board(1 << 30);
        let unnamed = structures(&tables(&board, FirmwareTable::Firmwares).bytes);
        assert_eq!(unnamed[0].2[..2], ["Busway", "Busway VM"]);
        assert_eq!(unnamed[0].1[7..24], [0; 17]);
        board.identity = identity();
        let found = structures(&tables(&board, FirmwareTable::Firmwares).bytes);
        let (_, system, strings) = &found[0];
        assert_eq!(strings[usize::from(system[7]) - 1], "bw-0001");
        // As `dmidecode` of a real machine's has it: 3c1f7a52-9b0e-4d6a-8e43-…
        let uuid = [
            0x52, 0x7a, 0x1f, 0x3c, 0x0e, 0x9b, 0x6a, 0x4d, 0x8e, 0x43, 0x5f, 0x2b, 0x7d, 0x90,
            0xc6, 0x11,
        ];
        assert_eq!(system[8..24], uuid);
        assert_eq!((found[3].1[4], &found[3].2), (2, &identity().oem_strings));
    }

    #[test]
    fn memory_of_any_size_is_told() {
        for (size, short, long) in [
            (1_u64 << 30, 1024_u16, 0_u32),
            (32 << 30, 0x7fff, 32 << 10),
            (1 << 42, 0x7fff, 1 << 22),
        ] {
            let found = structures(&tables(&board(size), FirmwareTable::Firmwares).bytes);
            let device = &found[4].1;
            assert_eq!(
                u16::from_le_bytes(device[12..14].try_into().unwrap()),
                short
            );
            assert_eq!(u32::from_le_bytes(device[28..32].try_into().unwrap()), long);
        }
    }
}
