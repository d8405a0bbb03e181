//! The memory map that the guest is told.

use std::ops::Range;

use super::low_memory::{EBDA_START, HIGH_MEMORY, LOW_HOLE_START};
use crate::arch::acpi;
use crate::arch::layout::{ECAM_SIZE, ECAM_START, HIGH_RAM_START};

/// What a region is for. ACPI 6.5 §15, table 15.2; the numbers are PVH's too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    /// AddressRangeMemory
    Ram = 1,
    /// AddressRangeReserved
    Reserved = 2,
}

/// One region of the map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct E820Region {
    /// Guest-physical addresses.
    pub range: Range<u64>,
    /// What it is for.
    pub kind: E820Kind,
}

/// The map: in ascending order, without overlaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct E820 {
    regions: Vec<E820Region>,
}

impl E820 {
    /// The map of a machine with RAM at `ram` (ascending, as
    /// [`ram_ranges`](crate::arch::layout::ram_ranges) gives it).
    ///
    /// Reserved are the EBDA, the area of ACPI's and SMBIOS' tables below 1 MiB, and ECAM: Linux uses ECAM only where
    /// the firmware keeps it from other use.
    #[must_use]
    pub fn new(ram: &[Range<u64>]) -> Self {
        let reserved = [
            EBDA_START..LOW_HOLE_START,
            acpi::TABLES.start..HIGH_MEMORY,
            ECAM_START..ECAM_START + ECAM_SIZE,
        ];
        // What is no RAM to the guest although RAM lies behind it.
        let holes = [EBDA_START..HIGH_MEMORY, ECAM_START..ECAM_START + ECAM_SIZE];
        let mut regions: Vec<E820Region> = reserved
            .into_iter()
            .map(|range| E820Region {
                range,
                kind: E820Kind::Reserved,
            })
            .collect();
        for range in ram {
            let mut start = range.start;
            for hole in &holes {
                if hole.start < range.end && hole.end > start {
                    push_ram(&mut regions, start..hole.start);
                    start = hole.end;
                }
            }
            push_ram(&mut regions, start..range.end);
        }
        regions.sort_by_key(|region| region.range.start);
        Self { regions }
    }

    /// The same where `ranges`, in which there is no RAM, are reserved as well: configuration space of further PCI segments.
    #[must_use]
    pub fn reserving(mut self, ranges: impl IntoIterator<Item = Range<u64>>) -> Self {
        let kind = E820Kind::Reserved;
        let more = ranges.into_iter();
        self.regions
            .extend(more.map(|range| E820Region { range, kind }));
        self.regions.sort_by_key(|region| region.range.start);
        self
    }

    /// The regions, ascending.
    #[must_use]
    pub fn regions(&self) -> &[E820Region] {
        &self.regions
    }

    /// Where the RAM below 4 GiB ends.
    #[must_use]
    pub fn low_ram_end(&self) -> u64 {
        self.ram()
            .map(|range| range.end)
            .filter(|&end| end <= HIGH_RAM_START)
            .max()
            .unwrap_or(0)
    }

    /// Whether all of `range` is RAM.
    #[must_use]
    pub fn is_ram(&self, range: &Range<u64>) -> bool {
        self.ram()
            .any(|ram| ram.start <= range.start && range.end <= ram.end)
    }

    /// The RAM, ascending.
    pub(super) fn ram(&self) -> impl DoubleEndedIterator<Item = &Range<u64>> {
        self.regions
            .iter()
            .filter(|region| region.kind == E820Kind::Ram)
            .map(|region| &region.range)
    }
}

fn push_ram(regions: &mut Vec<E820Region>, range: Range<u64>) {
    if !range.is_empty() {
        regions.push(E820Region {
            range,
            kind: E820Kind::Ram,
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::arch::layout::{MMIO32_START, MMIO32_STARTS, ram_ranges};

    #[test]
    fn a_guest_with_ram_on_both_sides_of_the_hole_sees_what_a_pc_shows() {
        let map = E820::new(&ram_ranges(6 << 30, MMIO32_START, &[]));
        let seen: Vec<_> = map
            .regions()
            .iter()
            .map(|region| (region.range.start, region.range.end, region.kind))
            .collect();
        assert_eq!(
            seen,
            [
                (0, 0x9fc00, E820Kind::Ram),
                (0x9fc00, 0xa0000, E820Kind::Reserved),
                (0xe0000, 0x10_0000, E820Kind::Reserved),
                (0x10_0000, 0xc000_0000, E820Kind::Ram),
                (0xe000_0000, 0xf000_0000, E820Kind::Reserved),
                (0x1_0000_0000, 0x1_c000_0000, E820Kind::Ram),
            ]
        );
        assert_eq!(map.low_ram_end(), 0xc000_0000);
    }

    proptest! {
        #[test]
        fn regions_ascend_without_overlap_and_all_ram_but_the_low_hole_is_there(
            size in 1_u64 << 20..1 << 40,
            low_end in prop::sample::select(&MMIO32_STARTS[..]),
        ) {
            let ram = ram_ranges(size, low_end, &[]);
            let map = E820::new(&ram);
            for pair in map.regions().windows(2) {
                prop_assert!(pair[0].range.end <= pair[1].range.start);
            }
            let total: u64 = map.ram().map(|range| range.end - range.start).sum();
            prop_assert_eq!(total, size - (HIGH_MEMORY - EBDA_START));
            prop_assert_eq!(map.low_ram_end(), size.min(low_end));
            for range in map.ram() {
                prop_assert!(!range.is_empty());
                prop_assert!(ram.iter().any(|r| r.start <= range.start && range.end <= r.end));
            }
        }
    }
}
