//! The one list of what the guest reaches as memory, and those who follow it.
//!
//! KVM's memory slots, DMA spaces and vhost tables are listeners. They hear of a region in the
//! order in which they were added, and of its going in reverse, so that nothing can reach memory
//! that the next one has not got or has lost.

use std::error::Error;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Discards;
use vm_memory::{FileOffset, GuestMemoryRegion, GuestRegionMmap};

/// What a region is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    /// The guest's RAM.
    Ram,
    /// Memory that the guest reads and executes, and whose writes go where there is no memory: to the
    /// device at that address, if one is there. Firmware's flash is such.
    Rom,
    /// A device's own memory: a BAR of a host device, mapped into this process.
    Device,
}

/// Something to be held and never looked at.
trait Owner: Send + Sync {}

impl<T: Send + Sync> Owner for T {}

/// How other devices can reach a device's memory.
pub struct Peer {
    /// The device's name.
    pub device: String,
    /// Opens the region as a dma-buf.
    pub dma_buf: Box<dyn Fn() -> io::Result<OwnedFd> + Send + Sync>,
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Peer").field(&self.device).finish()
    }
}

/// A guest-physical range and the memory of this process that is behind it.
pub struct Region {
    name: String,
    kind: RegionKind,
    guest: u64,
    size: u64,
    host: usize,
    file: Option<FileOffset>,
    peer: Option<Peer>,
    remedy: Option<&'static str>,
    /// Keeps the mapping at `host`.
    _owner: Box<dyn Owner>,
}

impl Region {
    /// A region of RAM, which it keeps mapped.
    #[must_use]
    pub fn ram(name: &str, memory: Arc<GuestRegionMmap>) -> Self {
        Self::mapped(name, RegionKind::Ram, memory)
    }

    /// A region of ROM, which it keeps mapped.
    #[must_use]
    pub fn rom(name: &str, memory: Arc<GuestRegionMmap>) -> Self {
        Self::mapped(name, RegionKind::Rom, memory)
    }

    fn mapped(name: &str, kind: RegionKind, memory: Arc<GuestRegionMmap>) -> Self {
        let shared = memory.flags() & libc::MAP_SHARED != 0;
        Self {
            name: name.to_owned(),
            kind,
            guest: memory.start_addr().0,
            size: memory.len(),
            host: memory.as_ptr() as usize,
            file: memory.file_offset().filter(|_| shared).cloned(),
            peer: None,
            remedy: None,
            _owner: Box::new(memory),
        }
    }

    /// `size` bytes of a device's memory, mapped at `host`, for the guest at `guest`.
    ///
    /// # Safety
    /// The memory has to stay mapped at `host`, readable and writable and used by nothing that
    /// assumes it unchanging, for as long as `owner` lives.
    pub unsafe fn device(
        name: &str,
        guest: u64,
        size: u64,
        host: usize,
        owner: impl Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.to_owned(),
            kind: RegionKind::Device,
            guest,
            size,
            host,
            file: None,
            peer: None,
            remedy: None,
            _owner: Box::new(owner),
        }
    }

    /// The region, which other devices can be let reach.
    #[must_use]
    pub fn for_peers(mut self, peer: Peer) -> Self {
        self.peer = Some(peer);
        self
    }

    /// How other devices can reach it, if they can: only host devices have such memory.
    #[must_use]
    pub fn peer(&self) -> Option<&Peer> {
        self.peer.as_ref()
    }

    /// The region, with what helps where it cannot be pinned for DMA.
    #[must_use]
    pub fn with_remedy(mut self, remedy: &'static str) -> Self {
        self.remedy = Some(remedy);
        self
    }

    /// What helps where it cannot be pinned for DMA, for a person.
    #[must_use]
    pub fn remedy(&self) -> Option<&'static str> {
        self.remedy
    }

    /// The file that is its memory, and where in that it starts; `None` where no other process could
    /// map it: anonymous memory, and private copies of a file. `size` bytes of the file from there on
    /// are the region.
    #[must_use]
    pub fn file(&self) -> Option<&FileOffset> {
        self.file.as_ref()
    }

    /// Whether the guest can only read it.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.kind == RegionKind::Rom
    }

    /// Whose it is, for a person.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is made of.
    #[must_use]
    pub fn kind(&self) -> RegionKind {
        self.kind
    }

    /// First guest-physical address.
    #[must_use]
    pub fn guest(&self) -> u64 {
        self.guest
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where it is mapped in this process.
    #[must_use]
    pub fn host(&self) -> usize {
        self.host
    }

    /// Last guest-physical address.
    fn last(&self) -> u64 {
        self.guest.saturating_add(self.size.saturating_sub(1))
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:#x}..={:#x}", self.name, self.guest, self.last())
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {self} (mapped at {:#x})", self.kind, self.host)
    }
}

/// What a listener says when it cannot follow.
pub type RegionError = Box<dyn Error + Send + Sync>;

/// One who follows the list.
pub trait RegionListener: Send + Sync {
    /// What it is, for a person.
    fn name(&self) -> &str;

    /// A region has come. A listener takes note of the kinds it serves and ignores the others.
    ///
    /// # Errors
    /// The region then does not come at all: those told before are told that it has gone.
    fn added(&self, region: &Arc<Region>) -> Result<(), RegionError>;

    /// A region is going. Afterwards nothing of the listener's may reach it.
    fn removed(&self, region: &Arc<Region>);

    /// Whether it has RAM pinned for as long as it is on the list, so that none of it can be given back to the host.
    fn pins(&self) -> bool {
        false
    }
}

/// A region could not be added.
#[derive(Debug, thiserror::Error)]
pub enum RegionsError {
    /// {new} overlaps {present}
    #[error("{new} overlaps {present}")]
    Overlap {
        /// What was to come.
        new: String,
        /// What is there.
        present: String,
    },
    /// {region} was refused by the {listener}: {source}
    #[error("{region} was refused by the {listener}: {source}")]
    Refused {
        /// What was to come.
        region: String,
        /// Who refused.
        listener: String,
        /// Why.
        source: RegionError,
    },
}

/// The list.
#[derive(Default)]
pub struct Regions {
    state: Mutex<State>,
    discards: Arc<Discards>,
}

#[derive(Default)]
struct State {
    regions: Vec<Arc<Region>>,
    listeners: Vec<Arc<dyn RegionListener>>,
}

impl fmt::Debug for Regions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.state().regions).finish()
    }
}

impl Regions {
    /// Who gives RAM back to the host, unless a listener has it pinned.
    #[must_use]
    pub fn discards(&self) -> &Arc<Discards> {
        &self.discards
    }

    /// Adds a listener behind the others, and tells it of what is there.
    ///
    /// # Errors
    /// [`RegionsError::Refused`]; the listener is then not added and keeps nothing.
    pub fn listen(&self, listener: Arc<dyn RegionListener>) -> Result<(), RegionsError> {
        let mut state = self.state();
        let back = if listener.pins() {
            self.discards.pin()
        } else {
            0
        };
        for (reported, region) in state.regions.iter().enumerate() {
            if let Err(source) = listener.added(region) {
                for region in state.regions.iter().take(reported).rev() {
                    listener.removed(region);
                }
                if listener.pins() {
                    self.discards.unpin();
                }
                return Err(refused(region, listener.as_ref(), source));
            }
        }
        if back > 0 {
            log::warn!(
                "{back} bytes of the guest's balloon are populated again, for the {} needs all of RAM",
                listener.name()
            );
        }
        state.listeners.push(listener);
        Ok(())
    }

    /// Tells a listener of all that is there that it goes, the last one first, and of nothing more.
    pub fn forget(&self, listener: &Arc<dyn RegionListener>) {
        let mut state = self.state();
        let Some(at) = state
            .listeners
            .iter()
            .position(|other| Arc::ptr_eq(other, listener))
        else {
            return;
        };
        let listener = state.listeners.remove(at);
        for region in state.regions.iter().rev() {
            listener.removed(region);
        }
        if listener.pins() {
            self.discards.unpin();
        }
    }

    /// Adds a region and tells every listener.
    ///
    /// # Errors
    /// [`RegionsError`]; the list and every listener are then as before.
    pub fn add(&self, region: Arc<Region>) -> Result<(), RegionsError> {
        let mut state = self.state();
        let overlaps =
            |other: &&Arc<Region>| other.guest <= region.last() && region.guest <= other.last();
        if let Some(present) = state.regions.iter().find(overlaps) {
            return Err(RegionsError::Overlap {
                new: region.to_string(),
                present: present.to_string(),
            });
        }
        for (reported, listener) in state.listeners.iter().enumerate() {
            if let Err(source) = listener.added(&region) {
                for listener in state.listeners.iter().take(reported).rev() {
                    listener.removed(&region);
                }
                return Err(refused(&region, listener.as_ref(), source));
            }
        }
        state.regions.push(region);
        Ok(())
    }

    /// Takes a region away, telling every listener first, the last one added before the others.
    pub fn remove(&self, region: &Arc<Region>) {
        let mut state = self.state();
        let Some(at) = state.regions.iter().position(|r| Arc::ptr_eq(r, region)) else {
            return;
        };
        for listener in state.listeners.iter().rev() {
            listener.removed(region);
        }
        state.regions.remove(at);
    }

    /// Takes everything away, the last one first.
    pub fn clear(&self) {
        let mut state = self.state();
        while let Some(region) = state.regions.pop() {
            for listener in state.listeners.iter().rev() {
                listener.removed(&region);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refused(region: &Region, listener: &dyn RegionListener, source: RegionError) -> RegionsError {
    RegionsError::Refused {
        region: region.to_string(),
        listener: listener.name().to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;
    use vm_memory::GuestAddress;
    use vm_memory::mmap::MmapRegionBuilder;

    type Log = Arc<Mutex<Vec<String>>>;

    struct Witness {
        name: &'static str,
        refuses: Option<&'static str>,
        log: Log,
    }

    impl RegionListener for Witness {
        fn name(&self) -> &str {
            self.name
        }

        fn added(&self, region: &Arc<Region>) -> Result<(), RegionError> {
            if self.refuses == Some(region.name()) {
                return Err("it is full".into());
            }
            let line = format!("{} +{}", self.name, region.name());
            self.log.lock().unwrap().push(line);
            Ok(())
        }

        fn removed(&self, region: &Arc<Region>) {
            let line = format!("{} -{}", self.name, region.name());
            self.log.lock().unwrap().push(line);
        }
    }

    fn region(name: &str, guest: u64, size: u64) -> Arc<Region> {
        // SAFETY: the listeners of these tests never touch the memory.
        Arc::new(unsafe { Region::device(name, guest, size, 0, ()) })
    }

    fn witness(name: &'static str, refuses: Option<&'static str>, log: &Log) -> Arc<Witness> {
        Arc::new(Witness {
            name,
            refuses,
            log: log.clone(),
        })
    }

    fn mapping(file: Option<&File>, flags: i32) -> Arc<GuestRegionMmap> {
        let mut builder = MmapRegionBuilder::new(0x1000)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags);
        if let Some(file) = file {
            builder = builder.with_file_offset(FileOffset::new(file.try_clone().unwrap(), 0x1000));
        }
        let region = builder.build().unwrap();
        Arc::new(GuestRegionMmap::new(region, GuestAddress(0x8000)).unwrap())
    }

    #[test]
    fn a_region_says_which_part_of_a_file_it_is_where_others_can_map_that() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x2000).unwrap();
        let shared = Region::ram("ram", mapping(Some(&file), libc::MAP_SHARED));
        let at = shared.file().expect("a file");
        assert_eq!(at.start(), 0x1000);
        let numbers = |file: &File| {
            let metadata = file.metadata().unwrap();
            (metadata.dev(), metadata.ino())
        };
        assert_eq!(numbers(at.file()), numbers(&file));
        assert_eq!((shared.guest(), shared.size()), (0x8000, 0x1000));
        let copy = Region::rom("rom", mapping(Some(&file), libc::MAP_PRIVATE));
        assert!(copy.file().is_none());
        let anonymous = mapping(None, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        assert!(Region::ram("ram", anonymous).file().is_none());
        assert!(region("bar", 0, 0x1000).file().is_none());
    }

    #[test]
    fn rom_alone_is_read_only() {
        let anonymous = || mapping(None, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let rom = Region::rom("rom", anonymous());
        assert_eq!((rom.kind(), rom.read_only()), (RegionKind::Rom, true));
        assert!(!Region::ram("ram", anonymous()).read_only());
        assert!(!region("bar", 0, 0x1000).read_only());
    }

    fn taken(log: &Log) -> Vec<String> {
        std::mem::take(&mut log.lock().unwrap())
    }

    #[test]
    fn listeners_hear_of_a_region_in_order_and_of_its_going_in_reverse() {
        let (log, regions) = (Log::default(), Regions::default());
        let ram = region("ram", 0, 0x1000);
        regions.listen(witness("kvm", None, &log)).unwrap();
        regions.add(ram.clone()).unwrap();
        regions.listen(witness("dma", None, &log)).unwrap();
        assert_eq!(taken(&log), ["kvm +ram", "dma +ram"]);
        regions.remove(&ram);
        regions.remove(&ram);
        assert_eq!(taken(&log), ["dma -ram", "kvm -ram"]);
    }

    #[test]
    fn a_refusal_leaves_everyone_as_before() {
        let (log, regions) = (Log::default(), Regions::default());
        regions.listen(witness("kvm", None, &log)).unwrap();
        regions.listen(witness("dma", Some("bar"), &log)).unwrap();
        let error = regions.add(region("bar", 0, 0x1000)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "bar at 0x0..=0xfff was refused by the dma: it is full"
        );
        assert_eq!(taken(&log), ["kvm +bar", "kvm -bar"]);
        regions.add(region("ram", 0, 0x1000)).unwrap();
    }

    #[test]
    fn a_listener_that_cannot_take_what_is_there_keeps_nothing() {
        let (log, regions) = (Log::default(), Regions::default());
        regions.add(region("low", 0, 0x1000)).unwrap();
        regions.add(region("high", 0x1000, 0x1000)).unwrap();
        let error = regions.listen(witness("dma", Some("high"), &log));
        assert!(error.is_err());
        assert_eq!(taken(&log), ["dma +low", "dma -low"]);
        regions.clear();
        assert_eq!(taken(&log), [""; 0]);
    }

    #[test]
    fn an_overlap_names_both() {
        let regions = Regions::default();
        regions.add(region("ram", 0x1000, 0x1000)).unwrap();
        let error = regions.add(region("bar", 0x1fff, 1)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "bar at 0x1fff..=0x1fff overlaps ram at 0x1000..=0x1fff"
        );
        regions.add(region("bar", 0x2000, 1)).unwrap();
    }

    #[test]
    fn a_listener_that_is_forgotten_hears_that_all_goes_and_nothing_more() {
        let log = Log::default();
        let regions = Regions::default();
        let stays = witness("stays", None, &log);
        let leaves: Arc<dyn RegionListener> = witness("leaves", None, &log);
        regions.listen(stays).unwrap();
        regions.listen(leaves.clone()).unwrap();
        for (name, at) in [("a", 0), ("b", 0x1000)] {
            regions.add(region(name, at, 0x1000)).unwrap();
        }
        log.lock().unwrap().clear();
        regions.forget(&leaves);
        regions.forget(&leaves);
        regions.add(region("c", 0x2000, 0x1000)).unwrap();
        assert_eq!(*log.lock().unwrap(), ["leaves -b", "leaves -a", "stays +c"]);
    }
}
