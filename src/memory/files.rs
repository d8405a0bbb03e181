//! Files that are memory of the guest's beside its RAM, and that come and go while it runs.
//!
//! What the guest reaches as memory, its devices reach: assigned ones by DMA, Busway's own, and those that other
//! processes serve, as far as these can map it.

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::{Arc, PoisonError};

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryRegion, GuestRegionMmap};

use super::area::{Area, Place};
use super::{Amount, GuestRam, Region, Regions, RegionsError};

/// What a file has to be that is pinned while it can be written. Linux 6.5 and later refuse others (mm/gup.c,
/// `writable_file_mapping_allowed`), for what a device writes behind a file system's back is lost to that.
const PINNED: &str = "what an assigned device reaches is pinned, and Linux pins no file that can be written and lies on \
    a disk's file system: put it on tmpfs or hugetlbfs, or let the VM have changes of its own (discard_writes=on)";

/// A file cannot be memory of the guest's.
#[derive(Debug, thiserror::Error)]
pub enum FileMemoryError {
    /// there is no room for it among the guest's addresses, which have {free} left for such memory
    #[error(
        "there is no room for it among the guest's addresses, which have {} left for such memory: give the VM what it \
         needs when it starts, or remove others",
        Amount(*.free)
    )]
    NoRoom {
        /// Bytes that are free together.
        free: u64,
    },
    /// it cannot be mapped: {0}
    #[error("it cannot be mapped: {0}")]
    Map(String),
    /// it cannot be kept open: {0}
    #[error("it cannot be kept open: {0}")]
    Keep(#[source] io::Error),
    /// Somebody who has to know of it does not take it.
    #[error(transparent)]
    Regions(#[from] RegionsError),
}

/// Where files become memory of one VM.
#[derive(Clone, Debug)]
pub struct Slots {
    ram: GuestRam,
    regions: Arc<Regions>,
    area: Arc<Area>,
}

impl Slots {
    /// For a guest with `ram` and `regions`, whose addresses in `area` are kept for this.
    #[must_use]
    pub fn new(ram: &GuestRam, regions: &Arc<Regions>, area: Arc<Area>) -> Self {
        Self {
            ram: ram.clone(),
            regions: Arc::clone(regions),
            area,
        }
    }

    /// Makes the first `size` bytes of `file` memory of the guest's, called `name`, at a multiple of `alignment`. With
    /// `private`, what is written is this VM's alone, and the file need not be writable.
    ///
    /// Where devices are assigned, the file is read first: it is pinned, and whoever pins it holds others up.
    ///
    /// # Errors
    /// [`FileMemoryError`]; nothing has changed then.
    pub fn plug(
        &self,
        name: &str,
        file: &File,
        size: u64,
        alignment: u64,
        private: bool,
    ) -> Result<FileMemory, FileMemoryError> {
        let map_error = |error: &dyn fmt::Display| FileMemoryError::Map(error.to_string());
        let place = self.area.take(size, alignment);
        let place = place.ok_or_else(|| FileMemoryError::NoRoom {
            free: self.area.largest(),
        })?;
        let kept = file.try_clone().map_err(FileMemoryError::Keep)?;
        let length = usize::try_from(size).map_err(|error| map_error(&error))?;
        let flags = match private {
            true => libc::MAP_PRIVATE | libc::MAP_NORESERVE,
            false => libc::MAP_SHARED | libc::MAP_NORESERVE,
        };
        let mapping = MmapRegionBuilder::new(length)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags)
            .with_file_offset(FileOffset::new(kept, 0))
            .build()
            .map_err(|error| map_error(&error))?;
        let mapping = GuestRegionMmap::new(mapping, GuestAddress(place.start()));
        let mapping =
            mapping.ok_or_else(|| map_error(&"its addresses end beyond what there is"))?;
        let mapping = Arc::new(mapping);
        if self.regions.discards().is_inhibited() {
            read(file, size).map_err(|error| map_error(&error))?;
        }
        let region = Region::ram(name, Arc::clone(&mapping)).with_remedy(PINNED);
        let region = Arc::new(region);
        self.regions.add(Arc::clone(&region))?;
        let plugged = FileMemory {
            slots: self.clone(),
            region,
            mapping,
            _place: place,
        };
        plugged.show().map_err(|error| map_error(&error))?;
        Ok(plugged)
    }
}

/// Brings a file into the host's memory, as far as that has room.
fn read(file: &File, size: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;

    let mut piece = vec![0; 1 << 20];
    let mut at = 0;
    while at < size {
        match file.read_at(&mut piece, at) {
            Ok(0) => break,
            Ok(count) => at = at.saturating_add(count as u64),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A file that is memory of the guest's, for as long as this is kept.
pub struct FileMemory {
    slots: Slots,
    region: Arc<Region>,
    mapping: Arc<GuestRegionMmap>,
    /// Free again when nothing of the guest's is there any more.
    _place: Place,
}

impl fmt::Debug for FileMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FileMemory").field(&self.region).finish()
    }
}

impl FileMemory {
    /// Its first guest-physical address.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.region.guest()
    }

    /// Lets this VM's own devices reach it.
    fn show(&self) -> Result<(), vm_memory::GuestRegionCollectionError> {
        let ram = &self.slots.ram;
        let guard = ram.lock().unwrap_or_else(PoisonError::into_inner);
        let map = ram.memory().insert_region(Arc::clone(&self.mapping))?;
        guard.replace(map);
        Ok(())
    }
}

impl Drop for FileMemory {
    fn drop(&mut self) {
        {
            let ram = &self.slots.ram;
            let guard = ram.lock().unwrap_or_else(PoisonError::into_inner);
            let (start, size) = (self.mapping.start_addr(), self.mapping.len());
            // It is not there where it was never shown.
            if let Ok((map, _)) = ram.memory().remove_region(start, size) {
                guard.replace(map);
            }
        }
        self.slots.regions.remove(&self.region);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{RamMap, RegionError, RegionListener};
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    use std::sync::Mutex;
    use vm_memory::{Bytes, GuestMemoryBackend};

    const SIZE: u64 = 2 << 20;
    const GIB: u64 = 1 << 30;

    #[derive(Default)]
    struct Witness {
        refuses: bool,
        there: Mutex<Vec<u64>>,
    }

    impl RegionListener for Witness {
        fn name(&self) -> &str {
            "witness"
        }

        fn added(&self, region: &Arc<Region>) -> Result<(), RegionError> {
            if self.refuses {
                return Err("it is full".into());
            }
            self.there.lock().unwrap().push(region.guest());
            Ok(())
        }

        fn removed(&self, region: &Arc<Region>) {
            self.there
                .lock()
                .unwrap()
                .retain(|at| *at != region.guest());
        }
    }

    fn slots(witness: &Arc<Witness>) -> Slots {
        let ram = RamMap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let regions = Arc::<Regions>::default();
        regions.listen(witness.clone()).unwrap();
        Slots::new(
            &GuestRam::new(ram),
            &regions,
            Area::new(GIB..GIB + 2 * SIZE),
        )
    }

    fn file() -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; SIZE as usize]).unwrap();
        file
    }

    #[test]
    fn what_the_guest_writes_is_in_the_file_or_its_own_and_is_gone_when_it_is_unplugged() {
        for private in [false, true] {
            let witness = Arc::<Witness>::default();
            let (slots, file) = (slots(&witness), file());
            let plugged = slots.plug("pmem", &file, SIZE, SIZE, private).unwrap();
            assert_eq!(*witness.there.lock().unwrap(), [GIB]);
            assert_eq!(plugged.region.file().is_some(), !private);
            let memory = slots.ram.memory();
            let at = GuestAddress(GIB + 100);
            assert_eq!(memory.read_obj::<u8>(at).unwrap(), 7);
            memory.write_obj(9_u8, at).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, 100).unwrap();
            assert_eq!(byte, [if private { 7 } else { 9 }]);
            // A second one has another place, and a third none.
            let second = slots.plug("pmem", &file, SIZE, SIZE, true).unwrap();
            assert_eq!(second.start(), GIB + SIZE);
            let error = slots.plug("pmem", &file, SIZE, SIZE, true).unwrap_err();
            assert!(error.to_string().contains("no room"), "{error}");
            drop((plugged, second));
            assert!(witness.there.lock().unwrap().is_empty());
            assert!(slots.ram.memory().read_obj::<u8>(at).is_err());
            // Whoever still has the memory in hand has it until that is given back.
            assert_eq!(memory.read_obj::<u8>(at).unwrap(), 9);
        }
    }

    #[test]
    fn what_somebody_does_not_take_leaves_nothing_behind() {
        let witness = Arc::new(Witness {
            refuses: true,
            ..Witness::default()
        });
        let (slots, file) = (slots(&witness), file());
        let error = slots.plug("pmem", &file, SIZE, SIZE, false).unwrap_err();
        assert!(error.to_string().contains("it is full"), "{error}");
        assert_eq!(slots.area.largest(), 2 * SIZE);
        assert_eq!(slots.ram.memory().num_regions(), 1);
    }
}
