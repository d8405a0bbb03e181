use std::io::Write;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::*;
use crate::memory::RamMap;

const RAM: usize = 1 << 20;
const DESCRIPTOR: u64 = 0x1000;
const BUFFER: u64 = 0x2000;

const READ: u32 = 1 << 1;
const SKIP: u32 = 1 << 2;
const SELECT: u32 = 1 << 3;
const WRITE: u32 = 1 << 4;

fn ram() -> GuestRam {
    GuestRam::new(RamMap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap())
}

fn device() -> FwCfg {
    let mut items = Items::default();
    items.item(5, 3_u16);
    items
        .file("etc/second", Content::Bytes(b"second file".to_vec()))
        .unwrap();
    let made = Content::Made {
        size: 6,
        make: Box::new(|| b"made".to_vec()),
    };
    items.file("etc/first", made).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"0123456789").unwrap();
    let part = Content::File {
        file,
        offset: 2,
        size: 5,
    };
    items.item(0x11, part);
    FwCfg::new(items, ram())
}

fn read(device: &FwCfg, item: u16, length: usize) -> Vec<u8> {
    device.write(0, &item.to_le_bytes());
    let byte = |_| {
        let mut data = [0xaa];
        device.read(1, &mut data);
        data[0]
    };
    (0..length).map(byte).collect()
}

/// Has the device do a transfer, and gives the control word that it leaves.
fn transfer(device: &FwCfg, control: u32, length: u32, address: u64) -> u32 {
    let ram = device.ram.memory();
    let mut descriptor = control.to_be_bytes().to_vec();
    descriptor.extend(length.to_be_bytes());
    descriptor.extend(address.to_be_bytes());
    ram.write_slice(&descriptor, GuestAddress(DESCRIPTOR))
        .unwrap();
    device.write(4, &0_u32.to_be_bytes());
    device.write(8, &(DESCRIPTOR as u32).to_be_bytes());
    let mut control = [0; 4];
    ram.read_slice(&mut control, GuestAddress(DESCRIPTOR))
        .unwrap();
    u32::from_be_bytes(control)
}

fn memory(device: &FwCfg, address: u64, length: usize) -> Vec<u8> {
    let mut data = vec![0; length];
    let ram = device.ram.memory();
    ram.read_slice(&mut data, GuestAddress(address)).unwrap();
    data
}

#[test]
fn an_item_reads_from_its_start_when_selected_and_zeros_behind_its_end() {
    let device = device();
    assert_eq!(read(&device, 0, 6), *b"QEMU\0\0");
    assert_eq!(read(&device, 0, 4), *b"QEMU");
    assert_eq!(read(&device, 1, 4), [3, 0, 0, 0]);
    assert_eq!(read(&device, 5, 2), [3, 0]);
    assert_eq!(read(&device, 0x11, 7), *b"23456\0\0");
    assert_eq!(read(&device, 0x777, 2), [0, 0], "no such item");
    // Of the board's own items there is none, and a number for writing is the item's.
    assert_eq!(read(&device, 0x8000, 2), [0, 0]);
    assert_eq!(read(&device, 0x4000, 4), *b"QEMU");
    device.reset();
    let mut first = [0];
    device.read(1, &mut first);
    assert_eq!(first, [b'Q']);
}

#[test]
fn the_directory_lists_files_by_name_with_size_and_number() {
    let device = device();
    let directory = read(&device, 0x19, 4 + 2 * 64);
    assert_eq!(directory[..4], 2_u32.to_be_bytes());
    let entry = |at: usize| {
        let entry = &directory[4 + 64 * at..][..64];
        let size = u32::from_be_bytes(entry[..4].try_into().unwrap());
        let number = u16::from_be_bytes(entry[4..6].try_into().unwrap());
        let name = String::from_utf8_lossy(&entry[8..]).replace('\0', "");
        (size, number, name)
    };
    assert_eq!(entry(0), (6, 0x21, "etc/first".to_owned()));
    assert_eq!(entry(1), (11, 0x20, "etc/second".to_owned()));
    assert_eq!(read(&device, 0x21, 8), *b"made\0\0\0\0");
}

#[test]
fn a_name_that_the_directory_cannot_hold_is_refused() {
    let mut items = Items::default();
    let name = "n".repeat(55);
    items.file(&name, 1_u32).unwrap();
    let error = items.file(&"n".repeat(56), 1_u32).unwrap_err();
    assert!(error.to_string().contains("55 bytes at most"), "{error}");
}

#[test]
fn dma_selects_skips_and_reads_and_says_how_it_went() {
    let device = device();
    let mut signature = [0; 8];
    device.read(4, &mut signature);
    assert_eq!(&signature, b"QEMU CFG");
    assert_eq!(transfer(&device, 0x20 << 16 | SELECT | READ, 6, BUFFER), 0);
    assert_eq!(memory(&device, BUFFER, 6), *b"second");
    assert_eq!(transfer(&device, SKIP, 1, 0), 0);
    assert_eq!(transfer(&device, READ, 8, BUFFER), 0);
    assert_eq!(memory(&device, BUFFER, 8), *b"file\0\0\0\0");
    assert_eq!(transfer(&device, 0x11 << 16 | SELECT | READ, 5, BUFFER), 0);
    assert_eq!(memory(&device, BUFFER, 5), *b"23456");
    assert_eq!(transfer(&device, 0x20 << 16 | SELECT | WRITE, 4, BUFFER), 1);
}

#[test]
fn dma_to_what_is_no_ram_is_an_error_and_nothing_is_copied_without_bound() {
    let device = device();
    let select = 0x20 << 16 | SELECT | READ;
    assert_eq!(transfer(&device, select, 4, RAM as u64 - 2), 1);
    assert_eq!(transfer(&device, select, 4, u64::MAX - 1), 1);
    assert_eq!(transfer(&device, select, u32::MAX, BUFFER), 1);
    // A descriptor that is in no RAM.
    device.write(4, &u32::MAX.to_be_bytes());
    device.write(8, &u32::MAX.to_be_bytes());
}

proptest! {
    #[test]
    fn any_access_is_answered(
        accesses in proptest::collection::vec(
            (0_u64..16, proptest::collection::vec(any::<u8>(), 0..9)), 0..60
        ),
        descriptor in any::<[u8; 16]>(),
    ) {
        let device = device();
        let ram = device.ram.memory();
        ram.write_slice(&descriptor, GuestAddress(DESCRIPTOR)).unwrap();
        device.write(8, &(DESCRIPTOR as u32).to_be_bytes());
        for (offset, mut data) in accesses {
            device.write(offset, &data);
            device.read(offset, &mut data);
        }
    }

    #[test]
    fn ports_and_dma_read_the_same(item in 0_u16..0x30, length in 0_usize..300) {
        let device = device();
        let by_port = read(&device, item, length);
        let control = u32::from(item) << 16 | SELECT | READ;
        prop_assert_eq!(transfer(&device, control, length as u32, BUFFER), 0);
        prop_assert_eq!(by_port, memory(&device, BUFFER, length));
    }
}
