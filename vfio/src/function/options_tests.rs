//! What the person who gives a device away chose about it, and what single devices need.

use std::sync::Arc;

use busway_pci::{BarIndex, PciFunction, capabilities, spec};

use super::AssignedFunction;
use super::tests::{assign_with, nvme, read, write};
use crate::fake::{FakeDevice, FakeRoutes};
use crate::{AssignOptions, IrqInfo, RomChoice, RomImage, SurveyError};

fn assigned(
    fake: &Arc<FakeDevice>,
    options: &AssignOptions,
) -> Result<Arc<AssignedFunction>, SurveyError> {
    let routes = Arc::new(FakeRoutes::default());
    assign_with("0000:01:00.0", fake.clone(), routes, options)
}

fn with_rom(size: usize) -> FakeDevice {
    let mut fake = nvme();
    fake.rom = (0..size).map(|at| at as u8 ^ 0x55).collect();
    fake.rom[1] = 0xaa;
    fake
}

fn rom(choice: RomChoice) -> AssignOptions {
    AssignOptions {
        rom: choice,
        ..AssignOptions::default()
    }
}

fn read_rom(function: &AssignedFunction, offset: u64) -> [u8; 4] {
    let mut data = [0; 4];
    function.bar_read(BarIndex::Rom, offset, &mut data);
    data
}

#[test]
fn the_rom_is_sized_enabled_and_read_once_from_the_device() {
    let fake = Arc::new(with_rom(0x1_0000));
    let function = assigned(&fake, &AssignOptions::default()).unwrap();
    assert_eq!(read(&function, 0x30), 0);
    write(&function, 0x30, 0xffff_f800);
    assert_eq!(read(&function, 0x30), 0xffff_0000);
    write(&function, 0x30, 0xe001_0001);
    assert!(function.decoded().is_empty(), "memory decoding is off");
    function.config_write(4, &[2]);
    let decoded = function.decoded();
    assert_eq!(decoded.len(), 2);
    assert_eq!(decoded[1].index, BarIndex::Rom);
    assert_eq!(
        (decoded[1].address, decoded[1].size),
        (0xe001_0000, 0x1_0000)
    );
    write(&function, 0x30, 0xe001_0000);
    assert_eq!(function.decoded().len(), 1);
    assert_eq!(*fake.rom_reads.lock().unwrap(), 0, "nobody asked yet");
    assert_eq!(read_rom(&function, 0), [0x55, 0xaa, 0x57, 0x56]);
    assert_eq!(read_rom(&function, 0xfffe), [0xab, 0xaa, 0xff, 0xff]);
    assert_eq!(read_rom(&function, u64::MAX), [0xff; 4]);
    function.bar_write(BarIndex::Rom, 0, &[0; 4]);
    assert_eq!(read_rom(&function, 0), [0x55, 0xaa, 0x57, 0x56]);
    assert_eq!(*fake.rom_reads.lock().unwrap(), 1);
    function.reset();
    assert_eq!(read(&function, 0x30), 0);
}

#[test]
fn the_rom_can_be_left_out_or_come_from_a_file_and_an_impossible_one_is_hidden() {
    let sizes = |fake: FakeDevice, choice: RomChoice| {
        let function = assigned(&Arc::new(fake), &rom(choice)).unwrap();
        write(&function, 0x30, 0xffff_f800);
        (read(&function, 0x30), read_rom(&function, 0))
    };
    let none = (0, [0xff; 4]);
    assert_eq!(sizes(with_rom(0x1000), RomChoice::None), none);
    assert_eq!(sizes(nvme(), RomChoice::Auto), none);
    assert_eq!(sizes(nvme(), RomChoice::Device), none);
    assert_eq!(sizes(with_rom(0x1800), RomChoice::Auto), none);
    assert_eq!(sizes(with_rom(0x400), RomChoice::Auto), none);
    let path = std::env::temp_dir().join(format!("busway-options-{}", std::process::id()));
    std::fs::write(&path, [0x55, 0xaa, 1, 2, 3]).unwrap();
    let image = RomImage::load(&path);
    std::fs::remove_file(&path).unwrap();
    let image = RomChoice::Image(image.unwrap());
    for fake in [nvme(), with_rom(0x1_0000)] {
        assert_eq!(
            sizes(fake, image.clone()),
            (0xffff_f800, [0x55, 0xaa, 1, 2])
        );
    }
}

#[test]
fn a_rom_known_to_do_harm_is_given_only_if_it_is_asked_for() {
    let size = |choice| {
        let fake = with_rom(0x1000);
        fake.set_config(0, &0x168e_14e4_u32.to_le_bytes());
        let function = assigned(&Arc::new(fake), &rom(choice)).unwrap();
        function.bars().last().map(|bar| bar.index)
    };
    assert_eq!(size(RomChoice::Auto), Some(BarIndex::Bar(0)));
    assert_eq!(size(RomChoice::Device), Some(BarIndex::Rom));
}

#[test]
fn pending_bits_that_a_known_device_misplaces_are_put_right() {
    let ids = |vendor: u32| {
        let fake = nvme();
        fake.set_config(0, &vendor.to_le_bytes());
        fake.set_config(0x48, &0x8000_u32.to_le_bytes());
        let function = assigned(&Arc::new(fake), &AssignOptions::default()).unwrap();
        let config = |offset| read(&function, offset);
        let has = capabilities(&config).iter().any(|c| c.id == spec::CAP_MSIX);
        (has, config(0x48))
    };
    assert_eq!(ids(0x5801_1425), (true, 0x1000));
    assert_eq!(ids(0x0010_1b36), (false, 0));
}

#[test]
fn registers_of_a_known_device_that_are_of_no_capability_are_the_guests_to_write() {
    for (id, expected) in [(0x2f21_8086_u32, [7, 0]), (0x0010_1b36, [0, 0])] {
        let fake = nvme();
        fake.set_config(0, &id.to_le_bytes());
        // AER is the last, and nothing is behind it.
        fake.set_config(0x140, &0x0002_0001_u32.to_le_bytes());
        fake.set_config(0x180, &[0; 0x20]);
        let fake = Arc::new(fake);
        let function = assigned(&fake, &AssignOptions::default()).unwrap();
        for at in [0x184, 0x188] {
            write(&function, at, 7);
        }
        let now = [0x184, 0x188].map(|at| u32::from_le_bytes(fake.config_at(at)));
        assert_eq!(now, expected);
    }
}

/// A GPU with capabilities at these places, the last of them MSI-X or one of the vendor's.
fn gpu(places: &[(u8, u8)]) -> FakeDevice {
    let mut fake = FakeDevice::default();
    fake.set_bar(0, 1 << 20);
    fake.msix = IrqInfo {
        count: 4,
        resizable: true,
    };
    fake.set_config(0, &0x1eb8_10de_u32.to_le_bytes());
    fake.set_config(6, &[0x10]);
    fake.set_config(8, &0x0302_00a1_u32.to_le_bytes());
    let mut link = 0x34;
    for &(id, at) in places {
        fake.set_config(link, &[at]);
        fake.set_config(at.into(), &[id, 0, 3]);
        if id == spec::CAP_MSIX {
            // The table is at the start of BAR 0, its pending bits behind it.
            fake.set_config(usize::from(at) + 8, &0x800_u32.to_le_bytes());
        }
        link = usize::from(at) + 1;
    }
    fake
}

fn clique(fake: FakeDevice, number: u8) -> Result<Vec<(u8, u16, [u32; 2])>, String> {
    let options = AssignOptions {
        nv_gpudirect_clique: Some(number),
        ..AssignOptions::default()
    };
    let function = assigned(&Arc::new(fake), &options).map_err(|error| error.to_string())?;
    for at in (0x40..0x100).step_by(4) {
        write(&function, at, u32::MAX);
    }
    let config = |offset| read(&function, offset);
    Ok(capabilities(&config)
        .iter()
        .map(|c| (c.id, c.offset, [config(c.offset), config(c.offset + 4)]))
        .collect())
}

#[test]
fn a_gpus_clique_is_a_capability_at_the_lists_end_and_cannot_be_written() {
    let seen = clique(gpu(&[(0x01, 0x60), (0x10, 0x78)]), 5).unwrap();
    let ids: Vec<_> = seen.iter().map(|(id, at, _)| (*id, *at)).collect();
    assert_eq!(ids, [(0x01, 0x60), (0x10, 0x78), (0x09, 0xc8)]);
    assert_eq!(seen[2].2, [0x5008_0009, 0x0028_5032]);
    // From Turing on MSI-X is there.
    let seen = clique(gpu(&[(0x10, 0x78), (0x11, 0xc8)]), 15).unwrap();
    let last = seen.last().unwrap();
    assert_eq!((last.1, last.2), (0xd4, [0x5008_0009, 0x0078_5032]));
    // A capability whose end nobody knows gives way.
    let seen = clique(gpu(&[(0x60, 0xb4)]), 0).unwrap();
    assert_eq!(seen.last().unwrap().1, 0xc8);
}

#[test]
fn a_clique_is_refused_where_it_cannot_be() {
    let error = clique(nvme(), 1).unwrap_err();
    assert_eq!(
        error,
        "0000:01:00.0 cannot have x_nv_gpudirect_clique=: it is no NVIDIA GPU"
    );
    let full = gpu(&[(0x11, 0xc8), (0x60, 0xd4)]);
    assert!(clique(full, 1).unwrap_err().contains("no room"));
    assert!(clique(gpu(&[]), 16).unwrap_err().contains("0 to 15"));
}
