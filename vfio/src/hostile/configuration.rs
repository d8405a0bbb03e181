//! A guest that reads and writes configuration space, and a device whose own changes under it.

use std::collections::BTreeSet;
use std::sync::Arc;

use busway_pci::{BarIndex, BarKind, BarPart, PAGE_SIZE, PciFunction, spec};

use super::world::{Routes, Story, assign, deface, device, seen, write};
use crate::AssignedFunction;
use crate::IrqIndex;
use crate::fake::FakeDevice;

/// Plays one story of configuration space.
pub fn configuration(bytes: &[u8]) {
    let mut story = Story::new(bytes);
    let fake = Arc::new(device(&mut story));
    let Some(function) = assign(&fake, &Routes::new()) else {
        return;
    };
    let lists = lists(&*function);
    check_parts(&function);
    let mut own = own_registers(&fake);
    while !story.is_over() {
        let offset = story.word() % spec::CONFIG_SPACE_SIZE;
        match story.byte() % 8 {
            0..4 => write(
                &*function,
                offset,
                &story.quadword().to_le_bytes()[..story.width()],
            ),
            // The registers that decide most.
            4 => write(&*function, spec::COMMAND, &story.word().to_le_bytes()),
            5 => {
                deface(&mut story, &fake);
                own = own_registers(&fake);
            }
            6 => function.reset(),
            _ => check_widths(&*function, offset),
        }
        check_decoding(&*function);
        check_vectors(&function, &fake);
        assert_eq!(self::lists(&*function), lists, "a list changed");
        assert_eq!(
            own_registers(&fake),
            own,
            "the guest moved the device's own BARs"
        );
    }
    drop(function);
    assert!(
        !fake.connected().contains(&true),
        "a vector outlives its function"
    );
}

/// The places in both lists, in their order. They end, and no place comes twice.
fn lists(function: &dyn PciFunction) -> [Vec<u16>; 2] {
    let walk = |first: u16, lowest: u16, next: &dyn Fn(u16) -> u16| {
        let (mut at, mut places) = (first, Vec::new());
        while at != 0 {
            assert!(
                at >= lowest && at.is_multiple_of(4),
                "a list leads to {at:#x}"
            );
            assert!(!places.contains(&at), "a list leads back to {at:#x}");
            places.push(at);
            at = next(at);
        }
        places
    };
    let byte = |offset: u16| (seen(function, offset & !3) >> (offset % 4 * 8)) as u8;
    let first = match seen(function, spec::COMMAND) >> 16 & u32::from(spec::STATUS_CAPABILITIES) {
        0 => 0,
        _ => byte(spec::CAPABILITIES_POINTER),
    };
    let standard = walk(first.into(), 0x40, &|at| byte(at + 1).into());
    // A list of nothing is a null capability.
    let start = spec::EXTENDED_CONFIG_START;
    let extended = walk(start, start, &|at| (seen(function, at) >> 20) as u16);
    [standard, extended]
}

/// What decodes is there at all, at the address that its register holds.
pub(super) fn check_decoding(function: &dyn PciFunction) {
    let bars = function.bars();
    for region in function.decoded() {
        assert!(bars.contains(&region), "{region:?} decodes, and is no BAR");
        assert!(region.size.is_power_of_two(), "{region:?}");
        assert!(region.address.is_multiple_of(region.size), "{region:?}");
    }
}

/// What the guest reaches without an exit is within its BAR, of whole pages, and disjoint.
fn check_parts(function: &AssignedFunction) {
    for region in function.bars() {
        let mut taken = BTreeSet::new();
        for part in function.parts(region.index) {
            let BarPart::Memory { offset, size, .. } = part else {
                continue;
            };
            assert!(region.kind != BarKind::Io, "ports are mapped");
            assert!(size > 0 && offset % PAGE_SIZE == 0 && size % PAGE_SIZE == 0);
            let end = offset.checked_add(size).expect("a part has an end");
            // A BAR of less than a page has all of its page.
            let room = region.size.max(PAGE_SIZE);
            assert!(end <= room, "{region:?} has a part to {end:#x}");
            taken.insert((offset, end));
        }
        let ends = taken.iter().map(|(_, end)| end);
        let starts = taken.iter().skip(1).map(|(start, _)| start);
        assert!(ends.zip(starts).all(|(end, start)| end <= start));
        assert!(region.index != BarIndex::Rom || taken.is_empty());
    }
}

/// Reading a doubleword and reading its bytes is the same.
fn check_widths(function: &dyn PciFunction, offset: u16) {
    let base = offset & !3;
    let whole = seen(function, base).to_le_bytes();
    for (at, expected) in (base..).zip(whole) {
        let mut byte = [0];
        function.config_read(at, &mut byte);
        assert_eq!(byte, [expected], "at {at:#x}");
    }
}

/// No vector has a way to the guest unless its kind of interrupt is on.
pub(super) fn check_vectors(function: &AssignedFunction, fake: &FakeDevice) {
    let on = lists(function)[0].iter().any(|&at| {
        let header = seen(function, at);
        match header as u8 {
            spec::CAP_MSI => header >> 16 & u32::from(spec::MSI_CONTROL_ENABLE) != 0,
            spec::CAP_MSIX => header >> 16 & u32::from(spec::MSIX_CONTROL_ENABLE) != 0,
            _ => false,
        }
    });
    let connected = messages(fake);
    assert!(on || connected == 0, "{connected} vectors, and all is off");
    assert!(on || function.summary().vectors_connected == 0);
}

/// How many of the device's messages have a way to the guest. Its pin is none.
pub(super) fn messages(fake: &FakeDevice) -> usize {
    match fake.kind() {
        None | Some(IrqIndex::Intx | IrqIndex::Error | IrqIndex::Request) => 0,
        Some(IrqIndex::Msi | IrqIndex::Msix) => {
            fake.connected().iter().filter(|&&each| each).count()
        }
    }
}

/// The device's own BARs and ROM register.
fn own_registers(fake: &FakeDevice) -> ([u8; 24], [u8; 4]) {
    (fake.config_at(0x10), fake.config_at(0x30))
}
