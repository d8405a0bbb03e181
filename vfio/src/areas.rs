//! Which parts of a BAR can be mapped: what the kernel offers, less the pages that have to be
//! trapped. Pure arithmetic on ranges.

use busway_pci::PAGE_SIZE;

/// A part of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Area {
    /// Bytes from the region's start.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

impl Area {
    /// The first offset behind it; nothing where that does not fit.
    fn end(self) -> Option<u64> {
        self.offset.checked_add(self.size)
    }

    /// The area between two offsets, where there is any.
    fn between(start: u64, end: u64) -> Option<Self> {
        let size = end.checked_sub(start).filter(|&size| size > 0)?;
        Some(Self {
            offset: start,
            size,
        })
    }

    /// Whether the `size` bytes at `offset` touch it.
    pub(crate) fn touches(self, offset: u64, size: u64) -> bool {
        let behind = self.end().is_none_or(|end| offset < end);
        behind && offset.checked_add(size).is_none_or(|end| self.offset < end)
    }
}

/// Whole pages of `offered` that lie within the first `size` bytes and touch none of `trapped`,
/// ascending and disjoint.
///
/// A region smaller than a page is offered whole where it has its page to itself on the host
/// (`vfio_pci_probe_mmaps` in Linux, drivers/vfio/pci/vfio_pci_core.c): then it is that page.
pub(crate) fn mappable(offered: &[Area], size: u64, trapped: &[Area]) -> Vec<Area> {
    let all = Area { offset: 0, size };
    let page = Area {
        offset: 0,
        size: PAGE_SIZE,
    };
    if (1..PAGE_SIZE).contains(&size) && offered.contains(&all) {
        let free = trapped
            .iter()
            .all(|area| area.size == 0 || !page.touches(area.offset, area.size));
        return if free { vec![page] } else { Vec::new() };
    }
    let mut pieces: Vec<(u64, u64)> = offered
        .iter()
        .filter_map(|area| {
            let start = area.offset.checked_next_multiple_of(PAGE_SIZE)?;
            let end = area.end().unwrap_or(u64::MAX).min(size);
            Some((start, end - end % PAGE_SIZE)).filter(|(start, end)| start < end)
        })
        .collect();
    pieces.sort_unstable();
    // Offers that overlap would be mapped twice.
    let mut reached = 0;
    for (start, end) in &mut pieces {
        *start = (*start).max(reached);
        reached = reached.max(*end);
    }
    for hole in trapped.iter().filter(|hole| hole.size > 0) {
        let from = hole.offset - hole.offset % PAGE_SIZE;
        let to = hole
            .end()
            .and_then(|end| end.checked_next_multiple_of(PAGE_SIZE))
            .unwrap_or(u64::MAX);
        pieces = pieces
            .into_iter()
            .flat_map(|(start, end)| [(start, end.min(from)), (start.max(to), end)])
            .filter(|(start, end)| start < end)
            .collect();
    }
    pieces
        .into_iter()
        .filter_map(|(start, end)| Area::between(start, end))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn area(offset: u64, size: u64) -> Area {
        Area { offset, size }
    }

    #[test]
    fn a_table_in_the_middle_of_a_bar_costs_its_own_pages_only() {
        // QEMU's NVMe drive: registers and doorbells, the table at 0x2000, the PBA behind it.
        let parts = mappable(
            &[area(0, 0x4000)],
            0x4000,
            &[area(0x2000, 0x410), area(0x2c00, 0x10)],
        );
        assert_eq!(parts, [area(0, 0x2000), area(0x3000, 0x1000)]);
    }

    #[test]
    fn an_unaligned_table_takes_every_page_it_touches() {
        let parts = mappable(&[area(0, 0x8000)], 0x8000, &[area(0x1ff0, 0x20)]);
        assert_eq!(parts, [area(0, 0x1000), area(0x3000, 0x5000)]);
    }

    #[test]
    fn a_bar_of_less_than_a_page_is_the_page_where_it_has_that_to_itself() {
        assert_eq!(mappable(&[area(0, 256)], 256, &[]), [area(0, 0x1000)]);
        assert_eq!(mappable(&[area(0, 128)], 256, &[]), []);
        assert_eq!(mappable(&[], 256, &[]), []);
        assert_eq!(mappable(&[area(0, 256)], 256, &[area(128, 16)]), []);
    }

    #[test]
    fn a_bar_with_the_table_alone_has_nothing_to_map() {
        assert_eq!(mappable(&[area(0, 0x1000)], 0x1000, &[area(0, 16)]), []);
    }

    #[test]
    fn absurd_ranges_overflow_nothing() {
        let huge = area(u64::MAX - 10, u64::MAX);
        assert_eq!(mappable(&[huge], u64::MAX, &[huge]), []);
        let all = mappable(&[area(0, u64::MAX)], 1 << 63, &[huge]);
        assert_eq!(all, [area(0, 1 << 63)]);
        assert!(huge.touches(u64::MAX, u64::MAX) && !huge.touches(0, 5));
    }

    fn ranges() -> impl Strategy<Value = Vec<Area>> {
        let one = (0_u64..32, 0_u64..16, 0_u64..0x1000, 0_u64..0x1000).prop_map(
            |(page, pages, start, more)| area(page * 0x1000 + start, pages * 0x1000 + more),
        );
        prop::collection::vec(one, 0..4)
    }

    proptest! {
        /// A page is mapped exactly where all of it is offered by one area, within the BAR, and none
        /// of it is trapped.
        #[test]
        fn a_page_is_mapped_exactly_if_it_may_be(
            offered in ranges(),
            pages in 0_u64..48,
            odd in 0_u64..0x1000,
            trapped in ranges(),
        ) {
            let size = pages * PAGE_SIZE + odd;
            prop_assume!(size >= PAGE_SIZE || size == 0);
            let parts = mappable(&offered, size, &trapped);
            prop_assert!(parts.windows(2).all(|pair| pair[0].offset + pair[0].size <= pair[1].offset));
            for part in &parts {
                prop_assert!(part.size > 0);
                prop_assert_eq!((part.offset % PAGE_SIZE, part.size % PAGE_SIZE), (0, 0));
            }
            for page in (0..64).map(|page| page * PAGE_SIZE) {
                let mapped = parts.iter().any(|part| part.touches(page, PAGE_SIZE));
                let allowed = page + PAGE_SIZE <= size
                    && offered.iter().any(|a| a.offset <= page && page + PAGE_SIZE <= a.offset + a.size)
                    && !trapped.iter().any(|a| a.size > 0 && a.touches(page, PAGE_SIZE));
                prop_assert_eq!(mapped, allowed);
            }
        }
    }
}
