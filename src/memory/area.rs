//! Guest-physical addresses that are kept for memory that comes and goes while the guest runs.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A range of the guest's addresses, of which parts are taken.
#[derive(Debug)]
pub struct Area {
    range: Range<u64>,
    /// Ascending.
    taken: Mutex<Vec<Range<u64>>>,
}

impl Area {
    /// An area of which nothing is taken.
    #[must_use]
    pub fn new(range: Range<u64>) -> Arc<Self> {
        Arc::new(Self {
            range,
            taken: Mutex::default(),
        })
    }

    /// The area.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Takes the first `size` bytes that are free and begin at a multiple of `alignment`, a power of two, until the
    /// place is dropped. `None` where there are none together.
    pub fn take(self: &Arc<Self>, size: u64, alignment: u64) -> Option<Place> {
        let mut taken = self.taken();
        let (mut start, mut at) = (self.range.start, 0);
        loop {
            let first = start.checked_next_multiple_of(alignment)?;
            let end = first.checked_add(size)?;
            let limit = taken.get(at).map_or(self.range.end, |next| next.start);
            if end <= limit {
                taken.insert(at, first..end);
                return Some(Place {
                    area: Arc::clone(self),
                    range: first..end,
                });
            }
            start = taken.get(at)?.end;
            at += 1;
        }
    }

    /// The most bytes that are free together.
    #[must_use]
    pub fn largest(&self) -> u64 {
        let taken = self.taken();
        let starts = std::iter::once(self.range.start).chain(taken.iter().map(|one| one.end));
        let ends = taken.iter().map(|one| one.start);
        let ends = ends.chain(std::iter::once(self.range.end));
        let gaps = starts.zip(ends);
        gaps.map(|(start, end)| end.saturating_sub(start))
            .max()
            .unwrap_or(0)
    }

    fn taken(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part of an area that is taken for as long as this is kept.
#[derive(Debug)]
pub struct Place {
    area: Arc<Area>,
    range: Range<u64>,
}

impl Place {
    /// Its first address.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.range.start
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.area.taken().retain(|range| *range != self.range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_place_is_free_again_when_it_is_dropped_and_an_area_of_nothing_has_none() {
        let area = Area::new(4 * MIB..12 * MIB);
        let first = area.take(4 * MIB, 2 * MIB).unwrap();
        let second = area.take(4 * MIB, 2 * MIB).unwrap();
        assert_eq!((first.start(), second.start()), (4 * MIB, 8 * MIB));
        assert!(area.take(2 * MIB, 2 * MIB).is_none());
        assert_eq!(area.largest(), 0);
        drop(first);
        assert_eq!(area.largest(), 4 * MIB);
        assert_eq!(area.take(2 * MIB, 2 * MIB).unwrap().start(), 4 * MIB);
        assert!(Area::new(0..0).take(2 * MIB, 2 * MIB).is_none());
        assert!(Area::new(1..u64::MAX).take(u64::MAX, 1 << 63).is_none());
    }

    proptest! {
        /// Whatever is taken and given back, places are aligned, lie in the area and never overlap; and what is
        /// refused does not fit.
        #[test]
        fn places_are_apart_and_within(
            start in 0_u64..1 << 20,
            length in 0_u64..1 << 16,
            steps in prop::collection::vec((1_u64..1 << 14, 0_u32..12, any::<prop::sample::Index>(), any::<bool>()), 0..60),
        ) {
            let area = Area::new(start..start + length);
            let mut places: Vec<Place> = Vec::new();
            for (size, shift, index, give_back) in steps {
                if give_back && !places.is_empty() {
                    places.swap_remove(index.index(places.len()));
                    continue;
                }
                let largest = area.largest();
                let Some(place) = area.take(size, 1 << shift) else {
                    prop_assert!(size + (1 << shift) > largest);
                    continue;
                };
                prop_assert_eq!(place.start() % (1 << shift), 0);
                let range = place.range.clone();
                prop_assert!(range.start >= start && range.end <= start + length);
                prop_assert_eq!(range.end - range.start, size);
                let apart = |other: &Place| other.range.end <= range.start || range.end <= other.range.start;
                prop_assert!(places.iter().all(apart));
                places.push(place);
            }
            drop(places);
            prop_assert_eq!(area.largest(), length);
        }
    }
}
