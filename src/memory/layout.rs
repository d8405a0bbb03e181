//! The guest's address map (x86_64), as `docs/design.md` draws it.
//!
//! Constants and arithmetic only; nothing is mapped here.

use std::ops::Range;

/// Where RAM below 4 GiB ends and the 32-bit MMIO window starts.
pub const MMIO32_START: u64 = 0xc000_0000;
/// End of the 32-bit MMIO window; ECAM starts here.
pub const MMIO32_END: u64 = 0xe000_0000;
/// The enhanced configuration access of segment 0: 256 buses of 1 MiB.
pub const ECAM_START: u64 = 0xe000_0000;
/// Bytes of ECAM.
pub const ECAM_SIZE: u64 = 256 << 20;
/// The IOAPIC.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// The local APIC; the megabyte from here is where MSIs are written, and is never mapped for DMA.
pub const LAPIC_START: u64 = 0xfee0_0000;
/// KVM's identity map page, one page; below the BIOS area and outside of RAM and windows. KVM API
/// §4.60 (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// KVM's three TSS pages, behind the identity map. KVM API §4.36 (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: u64 = 0xfeff_d000;
/// Where RAM goes on above the hole.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// I/O ports that PCI devices may be given; the ports below are the platform's.
pub const PCI_IO: Range<u64> = 0x1000..0x1_0000;

/// What the 64-bit window is aligned to, so that a BAR of a GiB or more can be mapped with huge
/// pages.
const MMIO64_ALIGNMENT: u64 = 1 << 30;

/// The guest-physical ranges of `size` bytes of RAM, in ascending order: one below the hole and,
/// where that is not enough, one from 4 GiB.
#[must_use]
pub fn ram_ranges(size: u64) -> Vec<Range<u64>> {
    let low = size.min(MMIO32_START);
    let high = HIGH_RAM_START..HIGH_RAM_START.saturating_add(size - low);
    [0..low, high]
        .into_iter()
        .filter(|range| !range.is_empty())
        .collect()
}

/// The window for 64-bit BARs: from the first GiB boundary above RAM up to what `address_bits` of
/// guest-physical address reach. Empty where nothing is left.
#[must_use]
pub fn mmio64(ram_size: u64, address_bits: u8) -> Range<u64> {
    let top_of_ram = ram_ranges(ram_size)
        .last()
        .map_or(0, |range| range.end)
        .max(HIGH_RAM_START);
    let end = 1_u64.checked_shl(address_bits.into()).unwrap_or(u64::MAX);
    let start = top_of_ram
        .checked_next_multiple_of(MMIO64_ALIGNMENT)
        .unwrap_or(end);
    start.min(end)..end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_keeps_clear_of_the_hole_and_loses_no_byte() {
        for whole_below in [256 << 20, 3 << 30] {
            let range = 0..whole_below;
            assert_eq!(ram_ranges(whole_below), [range]);
        }
        assert_eq!(ram_ranges(6 << 30), [0..3 << 30, 4 << 30..7 << 30]);
    }

    #[test]
    fn the_64_bit_window_lies_above_ram_and_ends_with_the_address_width() {
        assert_eq!(mmio64(256 << 20, 40), 4 << 30..1 << 40);
        assert_eq!(mmio64((6 << 30) + 4096, 40), 8 << 30..1 << 40);
        assert!(mmio64(1 << 36, 36).is_empty());
    }
}
