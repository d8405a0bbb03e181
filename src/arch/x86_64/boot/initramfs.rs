//! Where the initramfs goes: in RAM, above the kernel, and where the kernel finds it.

use std::ops::Range;

use super::e820::E820;
use super::error::BootError;
use super::input::Input;
use crate::arch::layout::{HIGH_RAM_START, MMIO32_START};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Where a kernel can have its initramfs.
#[derive(Clone, Debug)]
pub(super) struct Reach {
    /// Where the kernel ends, and with it all that may be overwritten.
    pub(super) floor: u64,
    /// The end of the addresses that any version of the kernel takes: used where it fits.
    pub(super) preferred: u64,
    /// The end of the addresses that this kernel takes; `u64::MAX` where it takes every one.
    pub(super) limit: u64,
    /// A form of this kernel that takes every address, in words.
    pub(super) other_kernel: Option<&'static str>,
}

/// The address for `file`, a multiple of 4 KiB: as high as it can be, below the preferred end where it
/// fits there, else in the RAM below 4 GiB, else above.
///
/// # Errors
/// [`BootError::InitramfsTooBig`], which says whether more memory helps, and how much.
pub(super) fn place(file: &Input, map: &E820, reach: &Reach) -> Result<u64, BootError> {
    place_bytes(file.size, map, reach).map_err(|TooBig { room, remedy }| {
        BootError::InitramfsTooBig {
            path: file.path.clone(),
            size: file.size,
            room,
            floor: reach.floor,
            remedy,
        }
    })
}

/// Why an initramfs finds no place.
#[derive(Debug, PartialEq, Eq)]
struct TooBig {
    /// Bytes of the largest piece of RAM that it could have.
    room: u64,
    remedy: String,
}

fn place_bytes(size: u64, map: &E820, reach: &Reach) -> Result<u64, TooBig> {
    let pieces = |end: u64| {
        let end = end.min(reach.limit);
        let within = move |ram: &Range<u64>| ram.start.max(reach.floor)..ram.end.min(end);
        map.ram()
            .rev()
            .map(within)
            .filter(|piece| !piece.is_empty())
    };
    let fitting = |piece: Range<u64>| {
        let address = piece.end.checked_sub(size)? / PAGE * PAGE;
        (address >= piece.start).then_some(address)
    };
    [reach.preferred, HIGH_RAM_START, u64::MAX]
        .into_iter()
        .find_map(|end| pieces(end).find_map(fitting))
        .ok_or_else(|| TooBig {
            room: pieces(u64::MAX)
                .map(|piece| piece.end - piece.start)
                .max()
                .unwrap_or(0),
            remedy: remedy(size, map, reach),
        })
}

/// What helps a guest whose initramfs of `size` bytes finds no place.
fn remedy(size: u64, map: &E820, reach: &Reach) -> String {
    let total: u64 = map.ram().map(|ram| ram.end - ram.start).sum();
    // It begins and ends with a page.
    let pages = |bytes: u64| bytes.div_ceil(PAGE).saturating_mul(PAGE);
    let size = pages(size);
    let below = pages(reach.floor).saturating_add(size);
    let below = (below <= reach.limit.min(MMIO32_START)).then_some(below);
    // RAM that is added comes at the end, in one piece from 4 GiB up.
    let above = (reach.limit == u64::MAX).then(|| match MMIO32_START.saturating_add(size) {
        least if least > total => least,
        // What there is lies in pieces.
        _ => total.saturating_add(size),
    });
    let needed = below.filter(|&needed| needed > total).or(above);
    match (needed, reach.other_kernel) {
        (Some(needed), _) => format!(
            "give the guest at least {} MiB of memory, or a smaller initramfs",
            // Of the memory asked for, the first MiB is not all RAM to the guest.
            needed.div_ceil(MIB)
        ),
        (None, Some(other)) => format!(
            "more memory does not help, because this kernel takes none beyond {:#x}: give {other}, or a \
             smaller initramfs",
            reach.limit.min(MMIO32_START)
        ),
        (None, None) => format!(
            "more memory does not help, because this kernel takes none beyond {:#x}: give a smaller \
             initramfs, put what it holds on a disk, or give a newer kernel (Linux 3.9 and later take \
             it at any address, with CONFIG_RELOCATABLE)",
            reach.limit.min(MMIO32_START)
        ),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::arch::layout::{MMIO32_START, holes, ram_ranges};

    const GIB: u64 = 1 << 30;

    fn map(size: u64) -> E820 {
        E820::new(&ram_ranges(size, MMIO32_START, &[]))
    }

    fn reach(limit: u64) -> Reach {
        Reach {
            floor: 0x200_0000,
            preferred: 2 * GIB,
            limit,
            other_kernel: None,
        }
    }

    #[test]
    fn an_initramfs_is_below_2_gib_where_it_fits_then_below_4_gib_then_anywhere() {
        let (map, anywhere) = (map(16 * GIB), reach(u64::MAX));
        let place = |size| place_bytes(size, &map, &anywhere);
        assert_eq!(place(GIB), Ok(GIB));
        assert_eq!(place(2 * GIB), Ok(GIB), "up to the end of low RAM");
        assert_eq!(place(2 * GIB + 1), Ok(GIB - PAGE));
        assert_eq!(place(3 * GIB), Ok(14 * GIB), "above 4 GiB");
        assert_eq!(place(13 * GIB), Ok(4 * GIB), "all there is above 4 GiB");
        let limited = reach(4 * GIB);
        assert_eq!(place_bytes(2 * GIB + 1, &map, &limited), Ok(GIB - PAGE));
        assert!(place_bytes(3 * GIB, &map, &limited).is_err());
    }

    #[test]
    fn what_does_not_fit_is_told_what_helps() {
        let remedy = |size, memory, reach: &Reach| {
            place_bytes(size, &map(memory), reach).unwrap_err().remedy
        };
        let more =
            |mib| format!("give the guest at least {mib} MiB of memory, or a smaller initramfs");
        let anywhere = reach(u64::MAX);
        // 32 MiB below the kernel's end, 2560 MiB of initramfs.
        assert_eq!(remedy(2560 * MIB, GIB, &anywhere), more(2592));
        // It cannot be below 4 GiB, where 3 GiB of RAM are.
        assert_eq!(remedy(3 * GIB, 5 * GIB, &anywhere), more(6144));
        let limited = reach(2 * GIB);
        assert_eq!(remedy(GIB, GIB, &limited), more(1056));
        for memory in [GIB, 3 * GIB, 64 * GIB] {
            let reported = remedy(2 * GIB, memory, &limited);
            assert!(
                reported.starts_with("more memory does not help"),
                "{reported}"
            );
            assert!(reported.contains("beyond 0x80000000"), "{reported}");
        }
        let pvh = Reach {
            other_kernel: Some("its bzImage"),
            ..reach(4 * GIB)
        };
        let reported = remedy(3 * GIB, 64 * GIB, &pvh);
        assert!(
            reported.contains("beyond 0xc0000000: give its bzImage"),
            "{reported}"
        );
    }

    proptest! {
        #[test]
        fn it_is_in_ram_above_the_kernel_and_within_reach_and_the_memory_advised_is_enough(
            size in 0_u64..8 * GIB,
            memory in 64 * MIB..16 * GIB,
            floor in 16 * MIB..3 * GIB,
            limit in prop_oneof![Just(u64::MAX), Just(4 * GIB), Just(2 * GIB)],
            hole in proptest::option::of((64 * MIB..4 * GIB, 0_u64..GIB)),
        ) {
            let holes = holes(hole.map(|(start, size)| (start, start + size)), 2 << 20);
            let reach = Reach { floor, ..reach(limit) };
            let map = E820::new(&ram_ranges(memory, MMIO32_START, &holes));
            match place_bytes(size, &map, &reach) {
                Ok(address) => {
                    prop_assert!(address >= floor && address + size <= limit);
                    prop_assert!(map.is_ram(&(address..address + size)));
                    prop_assert_eq!(address % PAGE, 0);
                }
                Err(TooBig { room, remedy }) => {
                    // A page may be lost at each end of a piece.
                    prop_assert!(room < size + 2 * PAGE);
                    let words = remedy.strip_prefix("give the guest at least ");
                    let enough = words.and_then(|words| words.split(' ').next()?.parse::<u64>().ok());
                    if let (Some(enough), true) = (enough, holes.is_empty()) {
                        let enough = E820::new(&ram_ranges(enough * MIB, MMIO32_START, &holes));
                        prop_assert!(place_bytes(size, &enough, &reach).is_ok(), "{remedy}");
                    }
                }
            }
        }
    }
}
