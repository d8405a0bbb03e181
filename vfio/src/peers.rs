//! Whether devices can reach each other's memory in a space: tried before there is anything in it.

use std::io;

use busway_iommu::{DmaSpace, HostVa, Iova, IovaRange, MapError};
use busway_pci::PAGE_SIZE;

use crate::{Area, DeviceIo, RegionIndex};

/// Maps a page of each BAR of the device behind `io` that can be mapped, for a moment: by its dma-buf,
/// which is all that an iommufd takes. Nothing of a mediated device. `name` is what errors call the device.
/// Nothing else is mapped yet.
///
/// # Errors
/// [`MapError`] of the first that cannot be mapped for others.
pub fn try_peers(name: &str, io: &dyn DeviceIo, space: &dyn DmaSpace) -> Result<(), MapError> {
    if io.is_mediated() {
        return Ok(());
    }
    let ranges = space.usable_ranges()?;
    let Some(place) = ranges.iter().find_map(|range| page_of(*range)) else {
        return Ok(());
    };
    for index in (0..=5).filter_map(RegionIndex::bar) {
        let region = io.region(index);
        let whole = |area: &&Area| {
            let end = area.offset.checked_add(PAGE_SIZE);
            area.size >= PAGE_SIZE && end.is_some_and(|end| end <= region.size)
        };
        let Some(area) = region.areas.iter().find(whole) else {
            continue;
        };
        let page = Area {
            offset: area.offset,
            size: PAGE_SIZE,
        };
        let owner = format!("BAR {} of {name}", index.number());
        let dma_buf = || -> io::Result<_> { io.dma_buf(index, page) };
        space.map_device(place, HostVa::default(), PAGE_SIZE, &dma_buf, &owner)?;
        space.unmap(place, PAGE_SIZE)?;
    }
    Ok(())
}

/// The first whole page of a range.
fn page_of(range: IovaRange) -> Option<Iova> {
    let start = range.start.checked_next_multiple_of(PAGE_SIZE)?;
    let last = start.checked_add(PAGE_SIZE - 1)?;
    (last <= range.last).then_some(Iova(start))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::Ordering;

    use busway_iommu::{DmaMapping, OpenDmaBuf, Stats};

    use super::*;
    use crate::fake::FakeDevice;

    /// A space that opens the dma-buf of what it maps, and has one mapping at most.
    #[derive(Debug)]
    struct Space {
        ranges: Vec<IovaRange>,
        refuses: Option<&'static str>,
        mapped: Mutex<Option<(Iova, u64)>>,
        places: Mutex<Vec<(Iova, String)>>,
    }

    impl Space {
        fn new(ranges: &[(u64, u64)], refuses: Option<&'static str>) -> Self {
            let ranges = ranges.iter();
            Self {
                ranges: ranges
                    .map(|&(start, last)| IovaRange { start, last })
                    .collect(),
                refuses,
                mapped: Mutex::default(),
                places: Mutex::default(),
            }
        }
    }

    impl DmaSpace for Space {
        fn add(&self, mapping: DmaMapping, dma_buf: &OpenDmaBuf<'_>) -> Result<(), MapError> {
            dma_buf().unwrap();
            let DmaMapping {
                iova, size, owner, ..
            } = mapping;
            if self.refuses.is_some_and(|name| owner.contains(name)) {
                return Err(MapError::Malformed {
                    owner,
                    iova,
                    size,
                    why: "no dma-buf",
                });
            }
            let before = self.mapped.lock().unwrap().replace((iova, size));
            assert_eq!(before, None);
            self.places.lock().unwrap().push((iova, owner));
            Ok(())
        }

        fn unmap(&self, iova: Iova, size: u64) -> Result<(), MapError> {
            assert_eq!(self.mapped.lock().unwrap().take(), Some((iova, size)));
            Ok(())
        }

        fn usable_ranges(&self) -> Result<Vec<IovaRange>, MapError> {
            Ok(self.ranges.clone())
        }

        fn stats(&self) -> Stats {
            Stats::default()
        }
    }

    /// A BAR of memory, one whose first page cannot be mapped, a small one, and ports.
    fn device() -> FakeDevice {
        let mut fake = FakeDevice::default();
        fake.set_bar(0, 0x4000);
        fake.set_bar(2, 0x4000);
        fake.bars[2].areas[0] = Area {
            offset: 0x1000,
            size: 0x3000,
        };
        fake.set_bar(4, 0x100);
        fake.set_bar(5, 0x4000);
        fake.bars[5].areas.clear();
        fake
    }

    #[test]
    fn a_page_of_each_bar_is_tried_where_a_page_is_free_and_none_stays() {
        let space = Space::new(&[(0x1001, 0x2ffe), (0x10_0000, 0x10_0fff)], None);
        let fake = device();
        try_peers("0000:01:00.0", &fake, &space).unwrap();
        let at = Iova(0x10_0000);
        let tried = |bar| (at, format!("BAR {bar} of 0000:01:00.0"));
        assert_eq!(*space.places.lock().unwrap(), [tried(0), tried(2)]);
        assert_eq!(*space.mapped.lock().unwrap(), None);
        assert_eq!(fake.dma_bufs.load(Ordering::Relaxed), 2);
        // Where nothing can be mapped at all, that is said when RAM is.
        try_peers("none", &device(), &Space::new(&[(5, 0x1003)], None)).unwrap();
    }

    #[test]
    fn the_memory_of_a_mediated_device_is_nobody_elses() {
        let fake = FakeDevice {
            mediated: true,
            ..device()
        };
        let space = Space::new(&[(0, u64::MAX)], Some("BAR"));
        try_peers("bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3", &fake, &space).unwrap();
        assert_eq!(fake.dma_bufs.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn the_bar_that_cannot_be_mapped_for_others_is_named() {
        let space = Space::new(&[(0, u64::MAX)], Some("BAR 2"));
        let error = try_peers("0000:01:00.0", &device(), &space).unwrap_err();
        assert!(
            error.to_string().contains("BAR 2 of 0000:01:00.0"),
            "{error}"
        );
    }
}
