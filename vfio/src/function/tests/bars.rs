//! BARs: decoding, what is mapped, and what is reached by exits.

use busway_pci::{BarIndex, BarPart, HostAddress, PciFunction, capabilities, spec};

use super::{function, nvme, read, write};
use crate::fake::FakeDevice;
use crate::{IrqIndex, RegionIndex};

#[test]
fn decoding_is_the_guests_and_stays_on_in_the_device() {
    let (fake, _, function) = function(nvme());
    let command = || u16::from_le_bytes(fake.config_at(4));
    let held = spec::COMMAND_MEMORY;
    assert_eq!(command(), held);
    assert_eq!(read(&function, 4) as u16, 0);
    write(&function, 0x10, 0xffff_ffff);
    write(&function, 0x14, 0xffff_ffff);
    assert_eq!(
        [read(&function, 0x10), read(&function, 0x14)],
        [0xffff_c004, 0xffff_ffff]
    );
    write(&function, 0x10, 0xe000_0000);
    write(&function, 0x14, 1);
    assert_eq!(function.decoded(), []);
    function.config_write(4, &6_u16.to_le_bytes());
    assert_eq!(command(), held | spec::COMMAND_BUS_MASTER);
    assert_eq!(read(&function, 4) as u16, 6);
    let decoded = function.decoded();
    assert_eq!((decoded.len(), decoded[0].address), (1, 0x1_e000_0000));
    function.config_write(4, &[0]);
    assert_eq!(command(), held);
    assert_eq!(function.decoded(), []);
}

#[test]
fn everything_but_the_tables_and_pending_bits_pages_is_mapped() {
    let (_, _, function) = function(nvme());
    let parts = function.parts(BarIndex::Bar(0));
    let [BarPart::Memory { offset, size, host }] = parts[..] else {
        panic!("{parts:?}");
    };
    assert_eq!((offset, size), (0, 0x2000));
    assert_ne!(host, HostAddress(0));
    assert_eq!(function.summary().mapped, [(0, 0, 0x2000)]);
}

#[test]
fn registers_beside_the_table_are_reached_at_every_width_and_place() {
    let (fake, _, function) = function(nvme());
    let bar = BarIndex::Bar(0);
    let region = RegionIndex::bar(0).unwrap();
    // The table ends at 0x2410.
    for width in [1_usize, 2, 4, 8] {
        for offset in [0x2410_u64, 0x2413, 0x2ff7, 0x3010] {
            let mut data = [0; 8];
            function.bar_read(bar, offset, &mut data[..width]);
            assert_eq!(data[..width], [0x5a; 8][..width]);
            function.bar_write(bar, offset, &data[..width]);
            let written = fake.bar_writes.lock().unwrap().pop();
            assert_eq!(written, Some((region, offset, vec![0x5a; width])));
        }
    }
}

#[test]
fn an_access_that_is_half_a_register_and_half_of_the_table_is_both() {
    let (fake, _, function) = function(nvme());
    let bar = BarIndex::Bar(0);
    let region = RegionIndex::bar(0).unwrap();
    // Into the table's first address, out of its last mask, into and out of the pending bits.
    function.bar_write(bar, 0x1ffc, &[1, 1, 1, 1, 0x04, 0x10, 0xe0, 0xfe]);
    function.bar_write(bar, 0x240c, &[0, 0, 0, 0, 2, 2, 2, 2]);
    function.bar_write(bar, 0x2ffe, &[3; 4]);
    function.bar_write(bar, 0x300c, &[4; 8]);
    let writes = std::mem::take(&mut *fake.bar_writes.lock().unwrap());
    assert_eq!(
        writes,
        [
            (region, 0x1ffc, vec![1; 4]),
            (region, 0x2410, vec![2; 4]),
            (region, 0x2ffe, vec![3; 2]),
            (region, 0x3010, vec![4; 4]),
        ]
    );
    let mut data = [0; 8];
    function.bar_read(bar, 0x1ffc, &mut data);
    assert_eq!(data, [0x5a, 0x5a, 0x5a, 0x5a, 0x04, 0x10, 0xe0, 0xfe]);
    function.bar_read(bar, 0x240c, &mut data);
    assert_eq!(data, [0, 0, 0, 0, 0x5a, 0x5a, 0x5a, 0x5a]);
    function.bar_read(bar, 0x2ffd, &mut data);
    assert_eq!(data, [0x5a, 0x5a, 0x5a, 0, 0, 0, 0, 0]);
}

#[test]
fn a_table_beyond_its_bar_hides_msix_and_the_rest_works() {
    let fake = nvme();
    fake.set_config(0x44, &0x3ff8_u32.to_le_bytes());
    let (_, _, function) = function(fake);
    let config = |offset| read(&function, offset);
    let ids: Vec<_> = capabilities(&config).iter().map(|c| c.id).collect();
    assert_eq!(ids, [0x01, 0x10]);
    assert_eq!(config(0x40), 0);
    assert_eq!(function.summary().mapped, [(0, 0, 0x4000)]);
}

/// Atheros' AR928X: MSI at 0x50 and an MSI-X whose table and pending bits are both at offset 0 of BAR 0,
/// where the card has its own registers.
fn ar928x() -> FakeDevice {
    let mut fake = FakeDevice::default();
    fake.set_bar(0, 0x1_0000);
    fake.intx.count = 1;
    for irq in [&mut fake.msi, &mut fake.msix] {
        irq.count = 1;
    }
    let put = |offset, value: u32| fake.set_config(offset, &value.to_le_bytes());
    put(0x00, 0x002a_168c);
    put(0x04, 0x0010_0006);
    put(0x08, 0x0280_0001);
    put(0x10, 0x0000_0004);
    put(0x34, 0x40);
    put(0x3c, 0x0000_0100);
    put(0x40, 0x0002_5001);
    put(0x50, 0x0000_6005);
    put(0x60, 0x0011_9010);
    put(0x90, 0x0000_0011);
    fake
}

#[test]
fn an_msix_over_the_devices_own_registers_is_hidden_and_these_are_the_devices() {
    let (fake, _, function) = function(ar928x());
    let config = |offset| read(&function, offset);
    let ids: Vec<_> = capabilities(&config).iter().map(|c| c.id).collect();
    assert_eq!(ids, [0x01, 0x05, 0x10]);
    assert_eq!([config(0x90), config(0x94), config(0x98)], [0; 3]);
    assert_eq!(function.summary().vectors, 1);
    // The guest reaches every register, those at the start included.
    assert_eq!(function.summary().mapped, [(0, 0, 0x1_0000)]);
    let bar = BarIndex::Bar(0);
    let mut data = [0; 4];
    function.bar_read(bar, 0, &mut data);
    assert_eq!(data, [0x5a; 4]);
    function.bar_write(bar, 8, &[4, 0, 0, 0]);
    let written = fake.bar_writes.lock().unwrap().pop();
    let region = RegionIndex::bar(0).unwrap();
    assert_eq!(written, Some((region, 8, vec![4, 0, 0, 0])));
    // MSI-X cannot be enabled where it is hidden.
    function.config_write(0x92, &0x8000_u16.to_le_bytes());
    assert_eq!((config(0x90), fake.kind()), (0, Some(IrqIndex::Intx)));
}

#[test]
fn pending_bits_in_the_tables_last_entry_take_no_vector_away() {
    let fake = nvme();
    // The last of 65 entries begins at 0x2400.
    fake.set_config(0x48, &0x2400_u32.to_le_bytes());
    let (_, _, function) = function(fake);
    assert_eq!(read(&function, 0x40) >> 16, 64);
    assert_eq!(read(&function, 0x48), 0x2400);
    let bar = BarIndex::Bar(0);
    function.bar_write(bar, 0x2408, &[0x31, 0, 0, 0]);
    let mut data = [0; 4];
    function.bar_read(bar, 0x2408, &mut data);
    assert_eq!(data, [0x31, 0, 0, 0]);
    function.config_write(0x42, &0x8000_u16.to_le_bytes());
    function.bar_write(bar, 0x240c, &[0; 4]);
    assert_eq!(function.summary().vectors_connected, 1);
}

#[test]
fn its_bars_sizes_are_known_while_it_is_being_reset() {
    let (_, _, function) = function(nvme());
    let expected: Vec<_> = function
        .bars()
        .iter()
        .map(|bar| (bar.index, bar.kind, bar.size))
        .collect();
    assert!(!expected.is_empty());
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        // Held as through a reset.
        let _state = function.lock();
        scope.spawn(|| tell.send(function.bar_sizes()));
        assert_eq!(
            told.recv_timeout(std::time::Duration::from_secs(10)),
            Ok(expected)
        );
    });
}
