//! Ranges of I/O virtual addresses.

use std::fmt;

/// A range of addresses, both ends included: so the last byte of the address space is in reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IovaRange {
    /// First address.
    pub start: u64,
    /// Last address.
    pub last: u64,
}

impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.start, self.last)
    }
}

impl IovaRange {
    /// Every address.
    pub const ALL: Self = Self {
        start: 0,
        last: u64::MAX,
    };

    /// The `size` bytes from `start`: nothing where that is empty or passes the end.
    #[must_use]
    pub const fn sized(start: u64, size: u64) -> Option<Self> {
        if size == 0 {
            return None;
        }
        match start.checked_add(size - 1) {
            Some(last) => Some(Self { start, last }),
            None => None,
        }
    }

    /// Whether the two share an address.
    #[must_use]
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }

    /// Whether every address of `other` is in this range.
    #[must_use]
    pub const fn contains(&self, other: &Self) -> bool {
        self.start <= other.start && other.last <= self.last
    }
}

/// The first part of `range` that lies in none of `usable` (ascending, disjoint).
pub(crate) fn first_gap(range: IovaRange, usable: &[IovaRange]) -> Option<IovaRange> {
    let mut start = range.start;
    for piece in usable.iter().filter(|piece| piece.overlaps(&range)) {
        if start < piece.start {
            return Some(IovaRange {
                start,
                last: piece.start - 1,
            });
        }
        match piece.last.checked_add(1) {
            Some(next) if piece.last < range.last => start = next,
            _ => return None,
        }
    }
    Some(IovaRange {
        start,
        last: range.last,
    })
}

/// What guests keep clear, ascending and disjoint: what is `reserved`, and what lies between the ranges
/// that are `usable` (ascending, disjoint). What an IOMMU does not reach below or above all of them is
/// no part of it.
#[must_use]
pub fn keep_clear(reserved: &[IovaRange], usable: &[IovaRange]) -> Vec<IovaRange> {
    let between = usable.windows(2).filter_map(|pair| match pair {
        [before, after] => Some(IovaRange {
            start: before.last.checked_add(1)?,
            last: after.start.checked_sub(1)?,
        }),
        _ => None,
    });
    normalise(reserved.iter().copied().chain(between).collect())
}

/// Ascending, disjoint ranges of whatever order and overlap; empty ones (a kernel that says
/// `start > last`) dropped.
pub(crate) fn normalise(mut ranges: Vec<IovaRange>) -> Vec<IovaRange> {
    ranges.retain(|range| range.start <= range.last);
    ranges.sort_unstable();
    let mut merged: Vec<IovaRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(before) if range.start <= before.last.saturating_add(1) => {
                before.last = before.last.max(range.last);
            }
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn range(start: u64, last: u64) -> IovaRange {
        IovaRange { start, last }
    }

    #[test]
    fn the_doorbell_in_the_middle_is_the_gap() {
        let usable = [range(0, 0xfedf_ffff), range(0xfef0_0000, 0xff_ffff_ffff)];
        assert_eq!(first_gap(range(0, 0xbfff_ffff), &usable), None);
        assert_eq!(
            first_gap(range(0, 0xffff_ffff), &usable),
            Some(range(0xfee0_0000, 0xfeef_ffff))
        );
        assert_eq!(
            first_gap(range(0xff_0000_0000, 0x100_0000_ffff), &usable),
            Some(range(0x100_0000_0000, 0x100_0000_ffff))
        );
        assert_eq!(first_gap(IovaRange::ALL, &[IovaRange::ALL]), None);
        assert_eq!(first_gap(range(3, 4), &[]), Some(range(3, 4)));
    }

    #[test]
    fn what_is_between_usable_ranges_is_kept_clear_and_what_is_beyond_them_is_not() {
        let usable = [
            range(0x1000, 0x1fff),
            range(0x3000, 0x3fff),
            range(0x4000, 0x5fff),
        ];
        let reserved = [range(0x9000, 0x9fff), range(0x2800, 0x30ff)];
        assert_eq!(
            keep_clear(&reserved, &usable),
            [range(0x2000, 0x30ff), range(0x9000, 0x9fff)]
        );
        assert_eq!(keep_clear(&[], &[IovaRange::ALL]), []);
        assert_eq!(keep_clear(&[], &[]), []);
    }

    proptest! {
        #[test]
        fn the_first_gap_is_the_first_address_that_no_range_holds(
            pieces in prop::collection::vec((0_u64..64, 0_u64..16), 0..6),
            start in 0_u64..64,
            size in 1_u64..32,
        ) {
            let usable = normalise(
                pieces.iter().map(|&(start, size)| range(start, start + size)).collect(),
            );
            prop_assert!(usable.windows(2).all(|pair| pair[0].last + 1 < pair[1].start));
            let asked = range(start, start + size - 1);
            let missing = (asked.start..=asked.last)
                .find(|at| !pieces.iter().any(|&(s, n)| (s..=s + n).contains(at)));
            prop_assert_eq!(first_gap(asked, &usable).map(|gap| gap.start), missing);
        }
    }
}
