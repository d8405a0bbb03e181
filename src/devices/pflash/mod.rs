//! Flash chips that firmware lies in: one with its code, and one with its variables.
//!
//! A chip's array is memory that the guest reads and executes without an exit, a region of ROM. Writes are
//! commands and come here; while a command has the chip show something else, such as its status, the region
//! is off the list and reads come here as well. What is programmed goes to the variables' file at once.

mod cfi;

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use crate::kvm::BusDevice;
use crate::memory::{Region, Regions, RegionsError};
use busway_host::files::no_room;
use busway_pci::Complaints;
use cfi::{Array, Cfi};

/// Failures to write the file that are warnings; the guest can have any number.
const LOUD_COMPLAINTS: u32 = 4;

/// Where what is programmed is kept.
pub trait Backing: Send + Sync + fmt::Debug {
    /// Writes `data` at `offset`, to be there after this process was killed.
    ///
    /// # Errors
    /// The file cannot be written.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// What was written is to be there after a power failure too; is not waited for.
    fn sync(&self);
}

/// Memory at `address` that holds `image`.
///
/// # Errors
/// The kernel has no memory.
pub fn rom(address: u64, image: &[u8]) -> io::Result<Arc<GuestRegionMmap>> {
    let protection = (ProtFlags::READ | ProtFlags::WRITE).bits();
    let flags = (MapFlags::PRIVATE | MapFlags::NORESERVE).bits();
    let mapping = MmapRegionBuilder::new(image.len())
        .with_mmap_prot(protection as i32)
        .with_mmap_flags(flags as i32 | libc::MAP_ANONYMOUS)
        .build()
        .map_err(|error| io::Error::other(error.to_string()))?;
    let memory =
        GuestRegionMmap::new(mapping, GuestAddress(address)).ok_or(io::ErrorKind::InvalidInput)?;
    memory
        .write_slice(image, MemoryRegionAddress(0))
        .map_err(|error| io::Error::other(error.to_string()))?;
    Ok(Arc::new(memory))
}

/// A chip whose array can be programmed. Belongs at the address of its memory.
pub struct Pflash {
    regions: Arc<Regions>,
    region: Arc<Region>,
    state: Mutex<State>,
    complaints: Complaints,
}

struct State {
    cfi: Cfi,
    cells: Cells,
    /// The region is on the list.
    listed: bool,
}

impl fmt::Debug for Pflash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pflash")
            .field("region", &self.region)
            .field("cfi", &self.lock().cfi)
            .finish_non_exhaustive()
    }
}

impl Pflash {
    /// A chip whose array is `memory`, on the list of `regions` from now on. What is programmed is kept in
    /// `backing`, where there is one.
    ///
    /// # Errors
    /// [`RegionsError`]
    pub fn new(
        memory: Arc<GuestRegionMmap>,
        backing: Option<Arc<dyn Backing>>,
        regions: Arc<Regions>,
    ) -> Result<Self, RegionsError> {
        let region = Arc::new(Region::rom("the firmware's variables", memory.clone()));
        regions.add(region.clone())?;
        Ok(Self {
            regions,
            region,
            state: Mutex::new(State {
                cfi: Cfi::default(),
                cells: Cells {
                    memory,
                    backing,
                    failed: None,
                },
                listed: true,
            }),
            complaints: Complaints::first(LOUD_COMPLAINTS),
        })
    }

    /// First guest-physical address, and bytes.
    #[must_use]
    pub fn place(&self) -> (u64, u64) {
        (self.region.guest(), self.region.size())
    }

    /// As after power-on: the array is shown, and holds what it held.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.cfi = Cfi::default();
        self.show(&mut state);
    }

    /// Has the region be on the list while the array is shown.
    fn show(&self, state: &mut State) {
        let shown = state.cfi.shows_array();
        if shown == state.listed {
            return;
        }
        if !shown {
            self.regions.remove(&self.region);
            state.listed = false;
            return;
        }
        if let Some(backing) = &state.cells.backing {
            backing.sync();
        }
        match self.regions.add(self.region.clone()) {
            Ok(()) => state.listed = true,
            // Reads come here, and are answered from the array.
            Err(error) => log::log!(
                self.complaints.next(log::Level::Warn),
                "{error}; each read of it leaves the guest"
            ),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pflash {
    fn drop(&mut self) {
        self.regions.remove(&self.region);
        if let Some(backing) = &self.lock().cells.backing {
            backing.sync();
        }
    }
}

impl BusDevice for Pflash {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(u8::MAX);
        let state = self.lock();
        if state.cfi.shows_array() {
            let _beyond = state.cells.memory.read(data, MemoryRegionAddress(offset));
            return;
        }
        let size = state.cells.size();
        for (at, byte) in (offset..).zip(data) {
            *byte = state.cfi.read(at, size);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        let State { cfi, cells, .. } = &mut *state;
        cfi.write(cells, offset, data);
        if let Some(error) = cells.failed.take() {
            log::log!(
                self.complaints.next(log::Level::Error),
                "the firmware's variables cannot be written to their file: {error}{}; what the guest sets \
                 lasts until the VM's end only",
                no_room(&error)
            );
        }
        self.show(&mut state);
    }
}

/// The array and where it is kept.
struct Cells {
    memory: Arc<GuestRegionMmap>,
    backing: Option<Arc<dyn Backing>>,
    failed: Option<io::Error>,
}

impl Array for Cells {
    fn size(&self) -> u64 {
        self.memory.len()
    }

    fn program(&mut self, offset: u64, data: &[u8]) {
        let left = usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX);
        let data = data.get(..left.min(data.len())).unwrap_or_default();
        if data.is_empty() {
            return;
        }
        let _fits = self.memory.write_slice(data, MemoryRegionAddress(offset));
        if let Some(backing) = &self.backing
            && let Err(error) = backing.write(offset, data)
        {
            self.failed = Some(error);
        }
    }

    fn erase(&mut self, offset: u64, length: u64) {
        self.program(offset, &vec![u8::MAX; usize::try_from(length).unwrap_or(0)]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::{RegionError, RegionListener};

    const AT: u64 = 0xffc0_0000;

    /// A file that remembers.
    #[derive(Debug, Default)]
    struct Kept {
        bytes: Mutex<Vec<(u64, Vec<u8>)>>,
        syncs: Mutex<u32>,
        full: bool,
    }

    impl Backing for Kept {
        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            if self.full {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.bytes.lock().unwrap().push((offset, data.to_vec()));
            Ok(())
        }

        fn sync(&self) {
            *self.syncs.lock().unwrap() += 1;
        }
    }

    /// How many regions the guest reaches.
    #[derive(Default)]
    struct Reached(Mutex<u32>);

    impl RegionListener for Reached {
        fn name(&self) -> &str {
            "a guest"
        }

        fn added(&self, region: &Arc<Region>) -> Result<(), RegionError> {
            assert!(region.read_only());
            *self.0.lock().unwrap() += 1;
            Ok(())
        }

        fn removed(&self, _region: &Arc<Region>) {
            *self.0.lock().unwrap() -= 1;
        }
    }

    struct Board {
        flash: Pflash,
        kept: Arc<Kept>,
        reached: Arc<Reached>,
    }

    fn board(kept: Kept) -> Board {
        let (kept, reached) = (Arc::new(kept), Arc::new(Reached::default()));
        let regions = Arc::new(Regions::default());
        regions.listen(reached.clone()).unwrap();
        let memory = rom(AT, &[0x5a; 0x4000]).unwrap();
        let flash = Pflash::new(memory, Some(kept.clone()), regions).unwrap();
        Board {
            flash,
            kept,
            reached,
        }
    }

    fn byte(flash: &Pflash, offset: u64) -> u8 {
        let mut data = [0];
        flash.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn the_array_is_memory_but_while_a_command_shows_something_else() {
        let Board { flash, reached, .. } = board(Kept::default());
        let reached = || *reached.0.lock().unwrap();
        assert_eq!((flash.place(), reached()), ((AT, 0x4000), 1));
        assert_eq!(byte(&flash, 0x3fff), 0x5a);
        flash.write(0, &[0x70]);
        assert_eq!((reached(), byte(&flash, 5)), (0, 0x80));
        flash.write(0, &[0xff]);
        assert_eq!((reached(), byte(&flash, 5)), (1, 0x5a));
        flash.write(0, &[0x90]);
        flash.reset();
        assert_eq!((reached(), byte(&flash, 0)), (1, 0x5a));
    }

    #[test]
    fn what_is_programmed_is_in_the_file_before_the_write_returns() {
        let Board { flash, kept, .. } = board(Kept::default());
        flash.write(0x123, &[0x10]);
        assert!(kept.bytes.lock().unwrap().is_empty());
        flash.write(0x123, &[7]);
        assert_eq!(*kept.bytes.lock().unwrap(), [(0x123, vec![7])]);
        assert_eq!(*kept.syncs.lock().unwrap(), 0);
        flash.write(0x123, &[0xff]);
        assert_eq!(*kept.syncs.lock().unwrap(), 1);
        assert_eq!(byte(&flash, 0x123), 7);
        flash.reset();
        assert_eq!(byte(&flash, 0x123), 7, "a reset erases nothing");
    }

    #[test]
    fn a_file_that_is_full_does_not_keep_the_guest_from_its_variables() {
        let full = Kept {
            full: true,
            ..Kept::default()
        };
        let Board { flash, .. } = board(full);
        for round in 1..=2 {
            flash.write(1, &[0x40]);
            flash.write(1, &[9]);
            assert_eq!(flash.complaints.made(), round);
        }
        flash.write(1, &[0xff]);
        assert_eq!(byte(&flash, 1), 9);
    }

    proptest! {
        #[test]
        fn any_access_is_answered_and_the_file_gets_nothing_beyond_its_end(
            accesses in proptest::collection::vec(
                (0_u64..0x4010, proptest::collection::vec(any::<u8>(), 1..9)), 0..100
            )
        ) {
            let Board { flash, kept, .. } = board(Kept::default());
            for (offset, mut data) in accesses {
                flash.write(offset, &data);
                flash.read(offset, &mut data);
            }
            for (offset, data) in &*kept.bytes.lock().unwrap() {
                prop_assert!(offset + data.len() as u64 <= 0x4000);
            }
        }
    }
}
