//! What is mapped, by whom: pure bookkeeping, asked before the kernel is.
//!
//! The kernel says EEXIST to an overlap and EINVAL to the unmapping of half a mapping, and names
//! nobody. The tracker knows both sides. It holds as well what a Type1 container has to map again
//! when a device comes after the last one left.

use std::collections::BTreeMap;

use crate::{Access, HostVa, Iova, IovaRange, MapError};

/// What is behind a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Memory of the host's, which is pinned.
    Memory,
    /// Such memory that goes by itself: it is one mapping, whatever lies beside it, for the kernel takes no part of a
    /// mapping back.
    Block,
    /// A part of a device's BAR.
    Device,
}

impl Backing {
    /// Whether it is memory of the host's.
    #[must_use]
    pub const fn is_memory(self) -> bool {
        matches!(self, Self::Memory | Self::Block)
    }
}

/// One stretch of mapped memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DmaMapping {
    /// First I/O virtual address.
    pub iova: Iova,
    /// Where the memory is in this process.
    pub host: HostVa,
    /// Bytes.
    pub size: u64,
    /// What devices may do with it.
    pub access: Access,
    /// What is behind it.
    pub backing: Backing,
    /// Whose it is.
    pub owner: String,
}

impl DmaMapping {
    /// Its addresses; nothing where size and place do not fit the address space.
    #[must_use]
    pub fn range(&self) -> Option<IovaRange> {
        IovaRange::sized(self.iova.0, self.size)
    }

    /// Whether `next` goes on where this ends, in both address spaces, for the same owner. Blocks and parts of
    /// devices never do: each comes and goes by itself.
    fn continues_into(&self, next: &Self) -> bool {
        self.backing == Backing::Memory
            && next.backing == Backing::Memory
            && self.owner == next.owner
            && self.access == next.access
            && self.iova.0.checked_add(self.size) == Some(next.iova.0)
            && u64::try_from(self.host.0)
                .ok()
                .and_then(|host| host.checked_add(self.size))
                == u64::try_from(next.host.0).ok()
    }
}

/// Every mapping of a space, disjoint, with neighbours of one owner merged.
#[derive(Debug, Default)]
pub struct Tracker {
    by_iova: BTreeMap<u64, DmaMapping>,
    /// Bytes of memory in them.
    bytes: u64,
}

impl Tracker {
    /// Whether `mapping` could be inserted.
    ///
    /// # Errors
    /// [`MapError::Malformed`], or [`MapError::Overlap`] naming both owners.
    pub fn check(&self, mapping: &DmaMapping) -> Result<IovaRange, MapError> {
        let malformed = |why| MapError::Malformed {
            owner: mapping.owner.clone(),
            iova: mapping.iova,
            size: mapping.size,
            why,
        };
        let range = mapping.range().ok_or_else(|| {
            malformed("the range is empty or passes the end of the address space")
        })?;
        if usize::try_from(mapping.size)
            .ok()
            .and_then(|size| mapping.host.0.checked_add(size))
            .is_none()
        {
            return Err(malformed("the memory passes the end of the address space"));
        }
        if let Some(other) = self.overlapping(range).next()
            && let Some(other_range) = other.range()
        {
            return Err(MapError::Overlap {
                owner: mapping.owner.clone(),
                range,
                other: other.owner.clone(),
                other_range,
            });
        }
        Ok(range)
    }

    /// Remembers `mapping`, merged with its neighbours where it goes on from or into them.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn insert(&mut self, mut mapping: DmaMapping) -> Result<(), MapError> {
        self.check(&mapping)?;
        if mapping.backing.is_memory() {
            self.bytes = self.bytes.saturating_add(mapping.size);
        }
        if let Some((&key, before)) = self.by_iova.range(..mapping.iova.0).next_back()
            && before.continues_into(&mapping)
            && let Some(before) = self.by_iova.remove(&key)
        {
            mapping = DmaMapping {
                size: before.size.saturating_add(mapping.size),
                ..before
            };
        }
        if let Some(end) = mapping.iova.0.checked_add(mapping.size)
            && self
                .by_iova
                .get(&end)
                .is_some_and(|after| mapping.continues_into(after))
            && let Some(after) = self.by_iova.remove(&end)
        {
            mapping.size = mapping.size.saturating_add(after.size);
        }
        self.by_iova.insert(mapping.iova.0, mapping);
        Ok(())
    }

    /// Whether the mappings within `size` bytes from `iova` could be removed: there is one, and none
    /// reaches out of the range.
    ///
    /// # Errors
    /// [`MapError::NotMapped`] or [`MapError::Splits`]
    pub fn check_removal(&self, iova: Iova, size: u64) -> Result<IovaRange, MapError> {
        let range = IovaRange::sized(iova.0, size).ok_or(MapError::NotMapped { iova, size })?;
        let mut any = false;
        for mapping in self.overlapping(range) {
            any = true;
            if let Some(mapped) = mapping.range().filter(|mapped| !range.contains(mapped)) {
                return Err(MapError::Splits {
                    owner: mapping.owner.clone(),
                    range: mapped,
                    asked: range,
                });
            }
        }
        if any {
            Ok(range)
        } else {
            Err(MapError::NotMapped { iova, size })
        }
    }

    /// Forgets the mappings within `size` bytes from `iova`.
    ///
    /// # Errors
    /// As [`check_removal`](Self::check_removal).
    pub fn remove(&mut self, iova: Iova, size: u64) -> Result<(), MapError> {
        let range = self.check_removal(iova, size)?;
        let within = self.by_iova.range(range.start..=range.last);
        let gone: Vec<_> = within.map(|(iova, _)| *iova).collect();
        for iova in gone {
            let mapping = self.by_iova.remove(&iova);
            if let Some(mapping) = mapping.filter(|mapping| mapping.backing.is_memory()) {
                self.bytes = self.bytes.saturating_sub(mapping.size);
            }
        }
        Ok(())
    }

    /// Every mapping, by ascending address.
    pub fn iter(&self) -> impl Iterator<Item = &DmaMapping> {
        self.by_iova.values()
    }

    /// How many mappings there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.by_iova.len()
    }

    /// Bytes of memory mapped.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn overlapping(&self, range: IovaRange) -> impl Iterator<Item = &DmaMapping> {
        self.by_iova
            .range(..=range.last)
            .rev()
            .map(|(_, mapping)| mapping)
            .take_while(move |mapping| {
                mapping
                    .range()
                    .is_some_and(|mapped| mapped.overlaps(&range))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ram(iova: u64, host: usize, size: u64, owner: &str) -> DmaMapping {
        DmaMapping {
            iova: Iova(iova),
            host: HostVa(host),
            size,
            access: Access::ReadWrite,
            backing: Backing::Memory,
            owner: owner.to_owned(),
        }
    }

    #[test]
    fn an_overlap_names_both_owners_and_both_ranges() {
        let mut tracker = Tracker::default();
        tracker
            .insert(ram(0x1000, 0x9000, 0x3000, "guest RAM"))
            .unwrap();
        let error = tracker
            .insert(ram(0x3000, 0x5000, 0x1000, "BAR 0 of 0000:01:00.0"))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "BAR 0 of 0000:01:00.0 at 0x3000..=0x3fff overlaps guest RAM at 0x1000..=0x3fff, \
             which devices reach already"
        );
    }

    #[test]
    fn pieces_that_go_on_from_each_other_become_one_in_any_order() {
        for order in [[0_u64, 1, 2], [2, 1, 0], [0, 2, 1]] {
            let mut tracker = Tracker::default();
            for piece in order {
                let iova = piece * 0x1000;
                tracker
                    .insert(ram(iova, 0x10_0000 + iova as usize, 0x1000, "RAM"))
                    .unwrap();
            }
            let all: Vec<_> = tracker.iter().cloned().collect();
            assert_eq!(all, [ram(0, 0x10_0000, 0x3000, "RAM")]);
        }
    }

    #[test]
    fn neighbours_stay_apart_where_owner_host_or_access_differ() {
        let mut tracker = Tracker::default();
        tracker.insert(ram(0, 0x10_0000, 0x1000, "RAM")).unwrap();
        tracker
            .insert(ram(0x1000, 0x20_0000, 0x1000, "RAM"))
            .unwrap();
        tracker
            .insert(ram(0x2000, 0x20_1000, 0x1000, "other"))
            .unwrap();
        tracker
            .insert(DmaMapping {
                access: Access::Read,
                ..ram(0x3000, 0x20_2000, 0x1000, "other")
            })
            .unwrap();
        assert_eq!(tracker.iter().count(), 4);
    }

    #[test]
    fn neighbouring_bars_stay_apart_so_that_each_can_go_alone() {
        let mut tracker = Tracker::default();
        let bar = |iova, host| DmaMapping {
            backing: Backing::Device,
            ..ram(iova, host, 0x1000, "BAR 0")
        };
        tracker.insert(bar(0, 0x10_0000)).unwrap();
        tracker.insert(bar(0x1000, 0x10_1000)).unwrap();
        tracker.remove(Iova(0), 0x1000).unwrap();
        assert_eq!((tracker.iter().count(), tracker.bytes()), (1, 0));
    }

    #[test]
    fn neighbouring_blocks_stay_apart_from_each_other_and_from_memory_and_count_as_memory() {
        let mut tracker = Tracker::default();
        let block = |iova: u64| DmaMapping {
            backing: Backing::Block,
            ..ram(iova, 0x10_0000 + iova as usize, 0x1000, "RAM")
        };
        tracker.insert(ram(0, 0x10_0000, 0x1000, "RAM")).unwrap();
        for iova in [0x1000, 0x3000, 0x2000] {
            tracker.insert(block(iova)).unwrap();
        }
        assert_eq!((tracker.count(), tracker.bytes()), (4, 0x4000));
        tracker.remove(Iova(0x2000), 0x1000).unwrap();
        assert_eq!((tracker.count(), tracker.bytes()), (3, 0x3000));
        // Several at once, and none of them in part.
        tracker.remove(Iova(0x1000), 0x3000).unwrap();
        assert_eq!((tracker.count(), tracker.bytes()), (1, 0x1000));
    }

    #[test]
    fn half_a_mapping_cannot_be_removed_and_several_can_at_once() {
        let mut tracker = Tracker::default();
        tracker.insert(ram(0, 0x10_0000, 0x2000, "low")).unwrap();
        tracker
            .insert(ram(0x4000, 0x20_0000, 0x2000, "high"))
            .unwrap();
        assert!(matches!(
            tracker.remove(Iova(0x1000), 0x1000),
            Err(MapError::Splits { .. })
        ));
        assert!(matches!(
            tracker.remove(Iova(0x2000), 0x2000),
            Err(MapError::NotMapped { .. })
        ));
        tracker.remove(Iova(0), 0x6000).unwrap();
        assert_eq!(tracker.bytes(), 0);
    }

    #[test]
    fn the_end_of_the_address_space_is_an_error_and_no_overflow() {
        let mut tracker = Tracker::default();
        for (iova, host, size) in [
            (u64::MAX, 0, 2),
            (0, usize::MAX, 0x1000),
            (0, 0, u64::MAX),
            (0, 0, 0),
        ] {
            let result = tracker.insert(ram(iova, host, size, "bad"));
            if size == u64::MAX {
                tracker.remove(Iova(0), u64::MAX).unwrap();
            } else {
                assert!(matches!(result, Err(MapError::Malformed { .. })));
            }
        }
        tracker
            .insert(ram(u64::MAX - 0xfff, 0, 0x1000, "last"))
            .unwrap();
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u8, u8, u8),
        Remove(u8, u8),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        prop::collection::vec(
            prop_oneof![
                (0_u8..32, 1_u8..8, 0_u8..2)
                    .prop_map(|(at, size, who)| Step::Insert(at, size, who)),
                (0_u8..32, 1_u8..32).prop_map(|(at, size)| Step::Remove(at, size)),
            ],
            0..40,
        )
    }

    proptest! {
        /// Against a model with one cell a byte: an insertion succeeds exactly where all is free,
        /// what is there stays as it was put, and neighbours never could have been one.
        #[test]
        fn it_agrees_with_a_map_of_single_bytes(steps in steps()) {
            let mut tracker = Tracker::default();
            let mut cells = [None::<(u8, usize)>; 64];
            for step in steps {
                match step {
                    Step::Insert(at, size, who) => {
                        let host = 0x1000 * (usize::from(who) + 1) + usize::from(at);
                        let span = usize::from(at)..usize::from(at + size);
                        let free = cells[span.clone()].iter().all(Option::is_none);
                        let owner = ["a", "b"][usize::from(who)];
                        let result = tracker.insert(ram(at.into(), host, size.into(), owner));
                        prop_assert_eq!(result.is_ok(), free);
                        if free {
                            for cell in span {
                                cells[cell] = Some((who, host - usize::from(at) + cell));
                            }
                        }
                    }
                    Step::Remove(at, size) => {
                        let removed = tracker.remove(Iova(at.into()), size.into()).is_ok();
                        let span = usize::from(at)..(usize::from(at) + usize::from(size));
                        if removed {
                            cells[span].fill(None);
                        }
                    }
                }
                let bytes = cells.iter().flatten().count() as u64;
                prop_assert_eq!(tracker.bytes(), bytes);
                let mut seen = [None::<(u8, usize)>; 64];
                let mut end = None;
                for mapping in tracker.iter() {
                    for byte in 0..mapping.size {
                        let cell = (mapping.iova.0 + byte) as usize;
                        prop_assert!(seen[cell].is_none());
                        seen[cell] = Some((
                            u8::from(mapping.owner == "b"),
                            mapping.host.0 + byte as usize,
                        ));
                    }
                    if let Some((end, owner)) = end.replace((
                        mapping.iova.0 + mapping.size,
                        mapping.owner.clone(),
                    )) {
                        prop_assert!(end < mapping.iova.0 || owner != mapping.owner);
                    }
                }
                prop_assert_eq!(seen, cells);
            }
        }
    }
}
