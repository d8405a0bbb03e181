//! The guest's address map, as `docs/design.md` draws it.
//!
//! Constants and arithmetic only; nothing is mapped here.

use std::ops::Range;

/// Where RAM below 4 GiB ends and the 32-bit MMIO window starts, unless devices need a larger one.
pub const MMIO32_START: u64 = 0xc000_0000;
/// Where the 32-bit MMIO window can start: the first that leaves room for what the devices need.
pub const MMIO32_STARTS: [u64; 3] = [MMIO32_START, 0x8000_0000, 0x4000_0000];
/// End of the 32-bit MMIO window; ECAM starts here.
pub const MMIO32_END: u64 = 0xe000_0000;
/// Where the 32-bit MMIO window can start in a machine with firmware: OVMF of 2022 puts configuration space at
/// 0xb000_0000, below which RAM has to end.
pub const FIRMWARE_MMIO32_STARTS: [u64; 2] = [0x8000_0000, 0x4000_0000];
/// End of the addresses below 4 GiB where firmware may put BARs or configuration space; the board's own
/// devices are behind it.
pub const FIRMWARE_MMIO32_END: u64 = 0xfc00_0000;
/// The enhanced configuration access of segment 0: 256 buses of 1 MiB.
pub const ECAM_START: u64 = 0xe000_0000;
/// Bytes of ECAM.
pub const ECAM_SIZE: u64 = 256 << 20;
/// End of the addresses behind it where other segments' are.
pub const ECAMS_END: u64 = FIRMWARE_MMIO32_END;
/// The registers by which devices come to bus 0 and leave it: those of all segments have one page.
pub const PCI_HOTPLUG_START: u64 = 0xfec8_0000;
/// Bytes from one segment's to the next's.
const PCI_HOTPLUG_STRIDE: u64 = 0x20;
/// The registers by which processors come and leave, of one page.
pub const CPU_HOTPLUG_START: u64 = 0xfec8_1000;
/// The registers by which RAM comes, of one page.
pub const MEMORY_HOTPLUG_START: u64 = 0xfec8_2000;
/// The IOAPIC.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// The registers of the TPM, of one page: locality 0. TCG PC Client Platform TPM Profile 1.05, §6.5.1
pub const TPM_START: u64 = 0xfed4_0000;
/// The local APIC; the megabyte from here is where MSIs are written, and is never mapped for DMA.
pub const LAPIC_START: u64 = 0xfee0_0000;
/// KVM's identity map page, one page; below the BIOS area and outside of RAM and windows. KVM API
/// §4.60 (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// KVM's three TSS pages, behind the identity map. KVM API §4.36 (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: u64 = 0xfeff_d000;
/// Where flash ends, as a processor begins below it: at 0xffff_fff0. Intel SDM vol. 3A §10.1.4.
pub const FLASH_END: u64 = 1 << 32;
/// The most bytes of firmware, code and variables: what lies below is the local APICs' and KVM's.
pub const FLASH_SIZE: u64 = 16 << 20;
/// The bytes of configuration space that a bus has: 32 devices of 8 functions. PCIe 6.0 §7.2.2.
const ECAM_BUS: u64 = 1 << 20;
/// Where RAM goes on above the hole.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// The serial port COM1, as on any PC.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The firmware configuration device. QEMU docs/specs/fw_cfg.rst, "Register Locations".
pub const FW_CFG_PORT: u16 = 0x510;

/// I/O ports that PCI devices may be given; the ports below are the board's.
pub const PCI_IO: Range<u64> = 0x1000..0x1_0000;

/// What the 64-bit window is aligned to, so that a BAR of a GiB or more can be mapped with huge
/// pages.
const MMIO64_ALIGNMENT: u64 = 1 << 30;

/// What RAM that is plugged while the guest runs is aligned to: the largest piece in which Linux adds memory on x86_64.
/// Linux, arch/x86/mm/init_64.c, `probe_memory_block_size`.
const PLUGGABLE_ALIGNMENT: u64 = 2 << 30;

/// RAM below is where kernels and their tables go: it stays, whatever the host's IOMMU reserves.
const KERNEL_END: u64 = 16 << 20;

/// The guest-physical ranges of `size` bytes of RAM, in ascending order: below `low_end`, where the
/// 32-bit MMIO window starts, and, where that is not enough, from 4 GiB. RAM goes round the `holes`,
/// which are ascending.
#[must_use]
pub fn ram_ranges(size: u64, low_end: u64, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut ranges = Vec::new();
    let mut left = size;
    for place in [0..low_end, HIGH_RAM_START..u64::MAX] {
        for clear in around(place, holes) {
            let length = (clear.end - clear.start).min(left);
            if length > 0 {
                ranges.push(clear.start..clear.start + length);
                left -= length;
            }
        }
    }
    ranges
}

/// The parts of RAM at `ranges` (ascending) that zones of `sizes` are at, which follow one another: each with its zone's
/// place among them.
#[must_use]
pub fn split(
    ranges: &[Range<u64>],
    sizes: impl IntoIterator<Item = u64>,
) -> Vec<(usize, Range<u64>)> {
    let mut parts = Vec::new();
    let mut ranges = ranges.iter().cloned();
    let mut room = 0..0;
    for (zone, size) in sizes.into_iter().enumerate() {
        let mut left = size;
        while left > 0 {
            if room.is_empty() {
                match ranges.next() {
                    Some(next) => room = next,
                    None => return parts,
                }
            }
            let taken = left.min(room.end - room.start);
            let end = room.start + taken;
            if taken > 0 {
                parts.push((zone, room.start..end));
            }
            room.start = end;
            left -= taken;
        }
    }
    parts
}

/// The guest-physical addresses of `size` bytes of RAM that can be plugged: one stretch above 4 GiB and all other RAM, which
/// ends at `top_of_ram`, between the `holes`, which are ascending.
fn pluggable_range(size: u64, top_of_ram: u64, holes: &[Range<u64>]) -> Range<u64> {
    let aligned = |address: u64| {
        let aligned = address.checked_next_multiple_of(PLUGGABLE_ALIGNMENT);
        aligned.unwrap_or(u64::MAX)
    };
    let mut start = aligned(top_of_ram.max(HIGH_RAM_START));
    for hole in holes {
        if hole.start < start.saturating_add(size) && hole.end > start {
            start = aligned(hole.end);
        }
    }
    start..start.saturating_add(size)
}

/// The same for pieces of `sizes`, each behind the last one: in ascending order.
#[must_use]
pub fn pluggable_ranges(
    sizes: impl IntoIterator<Item = u64>,
    top_of_ram: u64,
    holes: &[Range<u64>],
) -> Vec<Range<u64>> {
    let mut top = top_of_ram;
    let place = |size| {
        let range = pluggable_range(size, top, holes);
        top = range.end;
        range
    };
    sizes.into_iter().map(place).collect()
}

/// What of `place` lies in none of the `holes`, which are ascending.
fn around(place: Range<u64>, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut clear = Vec::new();
    let mut start = place.start;
    for hole in holes.iter().filter(|hole| hole.end > place.start) {
        if start < hole.start.min(place.end) {
            clear.push(start..hole.start.min(place.end));
        }
        start = start.max(hole.end);
    }
    if start < place.end {
        clear.push(start..place.end);
    }
    clear
}

/// The holes that RAM and windows go round where devices let no memory be in `reserved` (first and last
/// addresses, ascending): with their ends at multiples of `step`, the page that RAM is made of.
#[must_use]
pub fn holes(reserved: impl IntoIterator<Item = (u64, u64)>, step: u64) -> Vec<Range<u64>> {
    let mut holes: Vec<Range<u64>> = Vec::new();
    for (first, last) in reserved {
        let start = first - first % step;
        let end = last
            .checked_add(1)
            .and_then(|end| end.checked_next_multiple_of(step))
            .unwrap_or(u64::MAX);
        match holes.last_mut() {
            _ if start < KERNEL_END => {}
            Some(before) if before.end >= start => before.end = before.end.max(end),
            _ => holes.push(start..end),
        }
    }
    holes
}

/// The window for BARs below 4 GiB: from `start`, one of [`MMIO32_STARTS`], round the `holes`.
#[must_use]
pub fn mmio32(start: u64, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    around(start..MMIO32_END, holes)
}

/// The same of a machine with firmware, which may put configuration space anywhere in it.
#[must_use]
pub fn firmware_mmio32(start: u64, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    around(start..FIRMWARE_MMIO32_END, holes)
}

/// The same `window` of a machine with a BIOS, which places BARs from the I/O APIC downwards. SeaBIOS, src/fw/pciinit.c,
/// `pci_bios_init_root_regions_mem`
#[must_use]
pub fn bios_mmio32(window: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut window = window.to_vec();
    match window.last_mut() {
        Some(last) if last.end == FIRMWARE_MMIO32_END => last.end = IOAPIC_START,
        _ => window.push(FIRMWARE_MMIO32_END..IOAPIC_START),
    }
    window
}

/// Where configuration space of each PCI segment is, whose highest bus numbers these are: all 256 buses of the first at
/// [`ECAM_START`], and of the others, behind it, as many buses as they have, rounded up to a power of two. Nothing where
/// there is no room for all.
#[must_use]
pub fn ecams(last_buses: &[u8]) -> Option<Vec<Range<u64>>> {
    let mut end = ECAM_START;
    let mut ecams = Vec::new();
    for last in last_buses {
        let buses = (u64::from(*last) + 1).next_power_of_two();
        let size = match ecams.is_empty() {
            true => ECAM_SIZE,
            false => buses * ECAM_BUS,
        };
        let start = end.next_multiple_of(size);
        end = start + size;
        ecams.push(start..end);
    }
    (end <= ECAMS_END).then_some(ecams)
}

/// First address of the registers by which devices come to bus 0 of a segment, one of fewer than 128, and leave it.
#[must_use]
pub const fn pci_hotplug(segment: u16) -> u64 {
    PCI_HOTPLUG_START + segment as u64 % 0x80 * PCI_HOTPLUG_STRIDE
}

/// What of the `window` is not `taken`.
#[must_use]
pub fn without(window: &[Range<u64>], taken: &Range<u64>) -> Vec<Range<u64>> {
    let left = |part: &Range<u64>| around(part.clone(), std::slice::from_ref(taken));
    window.iter().flat_map(left).collect()
}

/// The window for 64-bit BARs: from the first GiB boundary above RAM, which ends at `top_of_ram`, up
/// to what `address_bits` of guest-physical address reach, round the `holes`. Empty where nothing is
/// left.
#[must_use]
pub fn mmio64(top_of_ram: u64, address_bits: u8, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let top_of_ram = top_of_ram.max(HIGH_RAM_START);
    let end = 1_u64.checked_shl(address_bits.into()).unwrap_or(u64::MAX);
    let start = top_of_ram
        .checked_next_multiple_of(MMIO64_ALIGNMENT)
        .unwrap_or(end);
    around(start..end, holes)
}

/// The addresses for `size` bytes of memory that comes and goes while the guest runs: the first together from a GiB
/// boundary above RAM on, which ends at `top_of_ram`, that lie in none of the `holes` and within `address_bits`. Empty
/// where nothing is asked for, or there is no room.
#[must_use]
pub fn plugged(top_of_ram: u64, size: u64, address_bits: u8, holes: &[Range<u64>]) -> Range<u64> {
    let clear = mmio64(top_of_ram, address_bits, holes).into_iter();
    let mut aligned = clear.filter_map(|range| {
        let start = range.start.checked_next_multiple_of(MMIO64_ALIGNMENT)?;
        let end = start.checked_add(size)?;
        (end <= range.end).then_some(start..end)
    });
    aligned.next().filter(|_| size > 0).unwrap_or(0..0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ram_keeps_clear_of_the_hole_and_loses_no_byte() {
        for whole_below in [256 << 20, 3 << 30] {
            let range = 0..whole_below;
            assert_eq!(ram_ranges(whole_below, MMIO32_START, &[]), [range]);
        }
        assert_eq!(
            ram_ranges(6 << 30, MMIO32_START, &[]),
            [0..3 << 30, 4 << 30..7 << 30]
        );
    }

    #[test]
    fn zones_follow_one_another_and_go_round_the_hole() {
        let ranges = ram_ranges(6 << 30, MMIO32_START, &[]);
        assert_eq!(
            split(&ranges, [1 << 30, 4 << 30, 1 << 30]),
            [
                (0, 0..1 << 30),
                (1, 1 << 30..3 << 30),
                (1, 4 << 30..6 << 30),
                (2, 6 << 30..7 << 30)
            ]
        );
        assert_eq!(
            split(&ranges, [3 << 30, 3 << 30]),
            [(0, 0..3 << 30), (1, 4 << 30..7 << 30)]
        );
        assert!(split(&[], [1]).is_empty());
    }

    #[test]
    fn ram_goes_round_what_the_iommu_reserves() {
        // The doorbell of MSIs, and what AMD's IOMMUs keep below 1 TiB for HyperTransport.
        let reserved = [(0xfee0_0000, 0xfeef_ffff), (0xfd_0000_0000, 0xff_ffff_ffff)];
        let holes = holes(reserved, 2 << 20);
        assert_eq!(
            ram_ranges(6 << 30, MMIO32_START, &holes),
            [0..3 << 30, 4 << 30..7 << 30]
        );
        let around = ram_ranges(1 << 40, MMIO32_START, &holes);
        // 12 GiB are reserved, and the PCI hole is 1 GiB.
        let past = (1 << 40) + (13 << 30);
        assert_eq!(around, [0..3 << 30, 4 << 30..0xfd_0000_0000, 1 << 40..past]);
    }

    #[test]
    fn pluggable_ram_lies_above_all_other_in_one_piece_that_is_in_no_hole() {
        let gib = |from: u64, to: u64| from << 30..to << 30;
        assert_eq!(pluggable_range(1 << 30, 512 << 20, &[]), gib(4, 5));
        assert_eq!(pluggable_range(1 << 30, (5 << 30) + 4096, &[]), gib(6, 7));
        let hole = [gib(1012, 1024)];
        assert_eq!(pluggable_range(8 << 30, 7 << 30, &hole), gib(8, 16));
        assert_eq!(pluggable_range(1 << 40, 7 << 30, &hole), gib(1024, 2048));
        assert_eq!(pluggable_range(1 << 30, 1011 << 30, &hole), gib(1024, 1025));
        let end = pluggable_range(u64::MAX, u64::MAX, &[]);
        assert!(end.is_empty());
        // Several pieces follow one another, each from its own boundary on.
        let pieces = pluggable_ranges([1 << 30, 3 << 30, 1 << 30], 5 << 30, &[gib(8, 11)]);
        assert_eq!(pieces, [gib(6, 7), gib(12, 15), gib(16, 17)]);
        assert!(pluggable_ranges([u64::MAX; 2], 0, &[])[1].is_empty());
    }

    #[test]
    fn a_hole_ends_with_a_page_and_leaves_the_kernels_place_alone() {
        let reserved = [
            (0, 0xfff),
            (0xbd80_1000, 0xbd80_1fff),
            (0xbd9f_0000, 0xbda0_0000),
        ];
        let found = holes(reserved, 2 << 20);
        let expected = 0xbd80_0000..0xbdc0_0000;
        assert_eq!(found, std::slice::from_ref(&expected));
        assert_eq!(
            ram_ranges(3 << 30, MMIO32_START, &found),
            [
                0..0xbd80_0000,
                0xbdc0_0000..3 << 30,
                4 << 30..(4 << 30) + (4 << 20)
            ]
        );
        let to_the_end = 1 << 40..u64::MAX;
        assert_eq!(
            holes([(1 << 40, u64::MAX)], 4096),
            std::slice::from_ref(&to_the_end)
        );
    }

    #[test]
    fn ram_makes_room_below_4_gib_and_loses_no_byte() {
        for (start, ranges) in [
            (2 << 30, [0..2 << 30, 4 << 30..8 << 30]),
            (1 << 30, [0..1 << 30, 4 << 30..9 << 30]),
        ] {
            assert!(MMIO32_STARTS.contains(&start));
            assert_eq!(ram_ranges(6 << 30, start, &[]), ranges);
            let window = start..MMIO32_END;
            assert_eq!(mmio32(start, &[]), std::slice::from_ref(&window));
        }
    }

    #[test]
    fn a_bios_may_place_bars_up_to_the_io_apic_and_the_boards_registers_are_behind_that() {
        let whole = 0x8000_0000..IOAPIC_START;
        let window = bios_mmio32(&firmware_mmio32(0x8000_0000, &[]));
        assert_eq!(window, std::slice::from_ref(&whole));
        let reserved = holes([(0xfb00_0000, 0xfbff_ffff)], 2 << 20);
        let parts = [0x8000_0000..0xfb00_0000, FIRMWARE_MMIO32_END..IOAPIC_START];
        assert_eq!(bios_mmio32(&firmware_mmio32(0x8000_0000, &reserved)), parts);
        for registers in [
            PCI_HOTPLUG_START,
            CPU_HOTPLUG_START,
            MEMORY_HOTPLUG_START,
            TPM_START,
        ] {
            assert!((IOAPIC_START..LAPIC_START).contains(&registers));
        }
    }

    #[test]
    fn segments_have_configuration_spaces_of_their_own_below_the_boards_devices() {
        let first = ECAM_START..ECAM_START + ECAM_SIZE;
        assert_eq!(ecams(&[255]), Some(vec![first.clone()]));
        assert_eq!(ecams(&[3]), Some(vec![first.clone()]));
        // 2 buses, 6, none but bus 0.
        let some = [
            first,
            0xf000_0000..0xf020_0000,
            0xf080_0000..0xf100_0000,
            0xf100_0000..0xf110_0000,
        ];
        assert_eq!(ecams(&[40, 1, 5, 0]), Some(some.to_vec()));
        assert_eq!(ecams(&[1; 16]).unwrap().last().unwrap().end, 0xf1e0_0000);
        // Six of all that can be behind 31 ports, and no more.
        assert!(ecams(&[31; 7]).is_some());
        assert_eq!(ecams(&[31; 8]), None);
    }

    #[test]
    fn registers_of_all_segments_have_one_page() {
        let starts: Vec<_> = (0..0x80).map(pci_hotplug).collect();
        assert_eq!(starts[0], PCI_HOTPLUG_START);
        assert!(
            starts
                .windows(2)
                .all(|pair| pair[1] - pair[0] >= crate::devices::pci_hotplug::SIZE)
        );
        assert!(starts[0x7f] + PCI_HOTPLUG_STRIDE <= CPU_HOTPLUG_START);
    }

    #[test]
    fn the_64_bit_window_lies_above_ram_and_ends_with_the_address_width() {
        let window = 4 << 30..1 << 40;
        assert_eq!(mmio64(256 << 20, 40, &[]), std::slice::from_ref(&window));
        let window = 8 << 30..1 << 40;
        assert_eq!(
            mmio64((7 << 30) + 4096, 40, &[]),
            std::slice::from_ref(&window)
        );
        assert!(mmio64(1 << 36, 36, &[]).is_empty());
    }

    #[test]
    fn the_windows_go_round_what_the_iommu_reserves() {
        let reserved = [
            (0xd000_0000, 0xd00f_ffff),
            (0xfee0_0000, 0xfeef_ffff),
            (0xfd_0000_0000, 0xff_ffff_ffff),
        ];
        let holes = holes(reserved, 2 << 20);
        assert_eq!(
            mmio32(MMIO32_START, &holes),
            [0xc000_0000..0xd000_0000, 0xd020_0000..0xe000_0000]
        );
        assert_eq!(
            mmio64(513 << 30, 48, &holes),
            [513 << 30..1012 << 30, 1 << 40..1 << 48]
        );
        // RAM that ends in front of the hole, or goes round it.
        let behind = 1 << 40..1 << 48;
        assert_eq!(
            mmio64(1012 << 30, 48, &holes),
            std::slice::from_ref(&behind)
        );
        let behind = 1027 << 30..1 << 48;
        assert_eq!(
            mmio64(1027 << 30, 48, &holes),
            std::slice::from_ref(&behind)
        );
        assert!(mmio64(1012 << 30, 40, &holes).is_empty());
    }

    #[test]
    fn memory_that_comes_has_addresses_between_ram_and_the_64_bit_window() {
        assert_eq!(plugged(256 << 20, 64 << 30, 40, &[]), 4 << 30..68 << 30);
        assert_eq!(
            plugged((7 << 30) + 4096, 1 << 30, 40, &[]),
            8 << 30..9 << 30
        );
        for (size, bits) in [(0, 40), (64 << 30, 36), (u64::MAX, 52)] {
            assert!(plugged(256 << 20, size, bits, &[]).is_empty());
        }
        // Before what AMD's IOMMUs reserve where it fits there, and behind it else.
        let holes = holes([(0xfd_0000_0000, 0xff_ffff_ffff)], 2 << 20);
        let before = plugged(1000 << 30, 12 << 30, 48, &holes);
        assert_eq!(before, 1000 << 30..1012 << 30);
        let behind = plugged(1000 << 30, 13 << 30, 48, &holes);
        assert_eq!(behind, 1 << 40..(1 << 40) + (13 << 30));
    }

    proptest! {
        #[test]
        fn memory_that_comes_is_in_no_hole_in_no_ram_and_in_no_window(
            ram in 1_u64..1 << 36,
            size in 1_u64..1 << 37,
            bits in 36_u8..48,
            reserved in prop::collection::vec((0_u64..1 << 37, 0_u64..1 << 32), 0..4),
        ) {
            let mut reserved: Vec<_> =
                reserved.into_iter().map(|(start, size)| (start, start + size)).collect();
            reserved.sort_unstable();
            let holes = holes(reserved, 2 << 20);
            let top = ram_ranges(ram, MMIO32_START, &holes).last().map_or(0, |range| range.end);
            let area = plugged(top, size, bits, &holes);
            prop_assume!(!area.is_empty());
            prop_assert_eq!(area.end - area.start, size);
            prop_assert!(area.start >= top.max(HIGH_RAM_START) && area.end <= 1 << bits);
            let clear = |hole: &Range<u64>| area.end <= hole.start || hole.end <= area.start;
            prop_assert!(holes.iter().all(clear));
            let window = mmio64(top.max(area.end), bits, &holes);
            prop_assert!(window.iter().all(|part| part.start >= area.end));
        }

        #[test]
        fn each_byte_of_ram_is_in_one_zone_and_zones_are_as_large_as_they_were_asked_for(
            sizes in prop::collection::vec(0_u64..1 << 34, 1..8),
            start in prop::sample::select(&MMIO32_STARTS[..]),
            reserved in prop::collection::vec((0_u64..1 << 37, 0_u64..1 << 32), 0..4),
        ) {
            let mut reserved: Vec<_> =
                reserved.into_iter().map(|(start, size)| (start, start + size)).collect();
            reserved.sort_unstable();
            let holes = holes(reserved, 2 << 20);
            let ranges = ram_ranges(sizes.iter().sum(), start, &holes);
            let parts = split(&ranges, sizes.iter().copied());
            for (zone, size) in sizes.iter().enumerate() {
                let own = parts.iter().filter(|(of, _)| *of == zone);
                prop_assert_eq!(own.map(|(_, part)| part.end - part.start).sum::<u64>(), *size);
            }
            prop_assert!(parts.windows(2).all(|pair| pair[0].0 <= pair[1].0));
            let mut joined: Vec<Range<u64>> = Vec::new();
            for (_, part) in parts {
                match joined.last_mut() {
                    Some(last) if last.end == part.start && !ranges.iter().any(|range| range.start == part.start) => {
                        last.end = part.end;
                    }
                    _ => joined.push(part),
                }
            }
            prop_assert_eq!(joined, ranges);
        }

        #[test]
        fn no_byte_is_lost_or_in_a_hole_and_windows_are_in_neither(
            size in 1_u64..1 << 36,
            start in prop::sample::select(&MMIO32_STARTS[..]),
            reserved in prop::collection::vec((0_u64..1 << 37, 0_u64..1 << 32), 0..4),
        ) {
            let mut reserved: Vec<_> =
                reserved.into_iter().map(|(start, size)| (start, start + size)).collect();
            reserved.sort_unstable();
            let holes = holes(reserved, 2 << 20);
            let ranges = ram_ranges(size, start, &holes);
            prop_assert_eq!(ranges.iter().map(|range| range.end - range.start).sum::<u64>(), size);
            let top = ranges.last().map_or(0, |range| range.end);
            let windows = [mmio32(start, &holes), mmio64(top, 40, &holes)].concat();
            prop_assert!(windows.iter().all(|window| !window.is_empty()));
            let mut all = [&ranges[..], &windows].concat();
            all.sort_by_key(|range| range.start);
            prop_assert!(all.windows(2).all(|pair| pair[0].end <= pair[1].start));
            for range in &all {
                let clear = |hole: &Range<u64>| range.end <= hole.start || hole.end <= range.start;
                prop_assert!(holes.iter().all(clear));
            }
        }
    }
}
