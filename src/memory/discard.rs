//! Guest memory that the guest does without for a time, given back to the host: what it puts into its balloon, and what
//! it reports as free.
//!
//! What devices reach by DMA is pinned, and their mappings stay when a page is given away: the device would go on
//! reaching the old page while the guest has a new one. So nothing is given away while memory is pinned.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{PoisonError, RwLock};

use rustix::mm::{Advice, madvise};
use vm_memory::{GuestMemoryBackend, GuestRegionMmap, VolatileSlice};

use super::RamMap;

const PAGE: usize = busway_pci::PAGE_SIZE as usize;

/// What became of memory that was to be given away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discarded {
    /// The host has it; the guest finds zeros in it when it uses it again.
    Given,
    /// It stays with the guest, for devices reach it by DMA.
    Kept,
}

/// Who gives guest memory back to the host, and who keeps it from that.
#[derive(Debug, Default)]
pub struct Discards {
    /// How many have all of memory pinned. It is held for reading while memory is given away.
    pinned: RwLock<u32>,
    /// Bytes that the guest does without until it asks for them.
    given: AtomicU64,
    /// Bytes that were given away, and that devices' mappings have populated again.
    taken_back: AtomicU64,
    /// Bytes of whole blocks that the host has and that devices' mappings do not reach: pinning leaves them alone.
    unmapped: AtomicU64,
}

impl Discards {
    /// From now on, until [`unpin`](Self::unpin), all of memory is pinned, or about to be: when this returns, nothing is
    /// given away. Gives the bytes that pinning populates again.
    pub(super) fn pin(&self) -> u64 {
        let mut pinned = self.pinned.write().unwrap_or_else(PoisonError::into_inner);
        *pinned = pinned.saturating_add(1);
        let given = self.given.swap(0, Relaxed);
        let back = given.saturating_sub(self.unmapped());
        self.taken_back.fetch_add(back, Relaxed);
        back
    }

    /// Somebody has it pinned no more.
    pub(super) fn unpin(&self) {
        let mut pinned = self.pinned.write().unwrap_or_else(PoisonError::into_inner);
        *pinned = pinned.saturating_sub(1);
    }

    /// Whether memory is pinned, so that nothing is given away.
    #[must_use]
    pub fn is_inhibited(&self) -> bool {
        *self.pinned.read().unwrap_or_else(PoisonError::into_inner) > 0
    }

    /// Bytes that the guest does without now, and that the host has for others.
    #[must_use]
    pub fn given(&self) -> u64 {
        self.given.load(Relaxed).max(self.unmapped())
    }

    /// Bytes of whole blocks that the host has and that no device reaches.
    #[must_use]
    pub fn unmapped(&self) -> u64 {
        self.unmapped.load(Relaxed)
    }

    /// No device reaches a block of so many bytes any more, and the host has it.
    pub(super) fn unmap(&self, bytes: u64) {
        self.unmapped.fetch_add(bytes, Relaxed);
    }

    /// Devices reach it again.
    pub(super) fn map(&self, bytes: u64) {
        let less = |unmapped: u64| Some(unmapped.saturating_sub(bytes));
        let _always = self.unmapped.fetch_update(Relaxed, Relaxed, less);
    }

    /// Bytes that were given away once and that a device's mapping has populated again.
    #[must_use]
    pub fn taken_back(&self) -> u64 {
        self.taken_back.load(Relaxed)
    }

    /// The guest uses so many bytes again.
    pub fn returned(&self, bytes: u64) {
        let less = |given: u64| Some(given.saturating_sub(bytes));
        let _always = self.given.fetch_update(Relaxed, Relaxed, less);
    }

    /// Gives `slice` of `memory` back to the host, as far as it is whole pages; with `lasting`, until the guest
    /// [returns](Self::returned) to it, else until it next touches it.
    ///
    /// # Errors
    /// madvise(2), `MADV_DONTNEED` or `MADV_REMOVE`; it may be given away in part.
    pub fn discard(
        &self,
        memory: &RamMap,
        slice: &VolatileSlice<'_>,
        lasting: bool,
    ) -> io::Result<Discarded> {
        let pinned = self.pinned.read().unwrap_or_else(PoisonError::into_inner);
        if *pinned > 0 {
            return Ok(Discarded::Kept);
        }
        let start = slice.ptr_guard().as_ptr() as usize;
        let end = start.saturating_add(slice.len()) / PAGE * PAGE;
        let first = start.next_multiple_of(PAGE);
        let Some(length) = end.checked_sub(first).filter(|length| *length > 0) else {
            return Ok(Discarded::Given);
        };
        let region = memory.iter().find(|region| {
            let (at, size) = (region.as_ptr() as usize, region.size());
            first >= at && end <= at.saturating_add(size)
        });
        let region = region.ok_or(io::ErrorKind::InvalidInput)?;
        give_back(region, first, length)?;
        if lasting {
            self.given.fetch_add(length as u64, Relaxed);
        }
        Ok(Discarded::Given)
    }
}

/// Gives `size` bytes at `start` in this process, whole pages of `region`, back to the host. Nothing may have them pinned.
///
/// # Errors
/// madvise(2), `MADV_DONTNEED` or `MADV_REMOVE`; a range outside of the region.
pub(super) fn give_back(region: &GuestRegionMmap, start: usize, size: usize) -> io::Result<()> {
    let offset = start.checked_sub(region.as_ptr() as usize);
    let inside = |offset: &usize| {
        let end = offset.checked_add(size);
        end.is_some_and(|end| end <= region.size())
    };
    let offset = offset.filter(inside).ok_or(io::ErrorKind::InvalidInput)?;
    // What other processes map as well is the file's, and goes with the file's page alone.
    let advice = match region.flags() & libc::MAP_SHARED {
        0 => Advice::LinuxDontNeed,
        _ => Advice::LinuxRemove,
    };
    let at = region.as_ptr().wrapping_add(offset);
    // SAFETY: the range lies in the region's mapping, which the region keeps. It is the guest's RAM, which nobody here has
    // a reference to, and whose contents may become others at any time.
    unsafe { madvise(at.cast(), size, advice) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemoryConfig;
    use crate::memory::Ram;
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    const MIB: usize = 1 << 20;

    fn ram(shared: bool) -> Ram {
        let config = MemoryConfig {
            size: 8 << 20,
            shared,
            thp: false,
            ..MemoryConfig::default()
        };
        Ram::new(&config, false).unwrap()
    }

    /// Pages of a range of this process that are in memory. mincore(2)
    fn resident(address: usize, length: usize) -> usize {
        let mut pages = vec![0_u8; length / PAGE];
        // SAFETY: the range is mapped, and there is a byte for each of its pages.
        let result = unsafe { libc::mincore(address as *mut _, length, pages.as_mut_ptr()) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        pages.iter().filter(|page| **page & 1 != 0).count()
    }

    #[test]
    fn what_is_given_away_leaves_the_host_in_private_and_in_shared_memory() {
        for shared in [false, true] {
            let ram = ram(shared);
            let memory = ram.guest().memory();
            let bytes = vec![7; 4 * MIB];
            memory.write_slice(&bytes, GuestAddress(0)).unwrap();
            let start = ram.host_ranges()[0].start;
            assert_eq!(resident(start, 4 * MIB), 4 * MIB / PAGE);
            let discards = Discards::default();
            // From the middle of a page to the middle of another.
            let slice = memory.get_slice(GuestAddress(100), 2 * MIB).unwrap();
            let given = discards.discard(&memory, &slice, true).unwrap();
            assert_eq!(given, Discarded::Given);
            assert_eq!(discards.given(), (2 * MIB - PAGE) as u64);
            assert_eq!(resident(start, 4 * MIB), 2 * MIB / PAGE + 1, "{shared}");
            let around: [u8; 2] =
                [0, 2 * MIB as u64].map(|at| memory.read_obj(GuestAddress(at)).unwrap());
            assert_eq!(around, [7, 7]);
            assert_eq!(memory.read_obj::<u64>(GuestAddress(0x2000)).unwrap(), 0);
        }
    }

    #[test]
    fn nothing_is_given_away_while_memory_is_pinned() {
        let ram = ram(false);
        let memory = ram.guest().memory();
        memory.write_obj(9_u64, GuestAddress(0x1000)).unwrap();
        let slice = |at| memory.get_slice(GuestAddress(at), PAGE).unwrap();
        let discards = Discards::default();
        discards.discard(&memory, &slice(0x4000), true).unwrap();
        assert_eq!(discards.pin(), PAGE as u64);
        assert_eq!((discards.given(), discards.taken_back()), (0, PAGE as u64));
        let kept = discards.discard(&memory, &slice(0x1000), true).unwrap();
        assert_eq!((kept, discards.is_inhibited()), (Discarded::Kept, true));
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 9);
        discards.unpin();
        discards.discard(&memory, &slice(0x1000), false).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 0);
        assert_eq!(discards.given(), 0);
    }

    #[test]
    fn less_than_a_page_stays() {
        let ram = ram(false);
        let memory = ram.guest().memory();
        memory.write_obj(9_u64, GuestAddress(0x1000)).unwrap();
        let discards = Discards::default();
        let slice = memory.get_slice(GuestAddress(0x1000), PAGE - 1).unwrap();
        discards.discard(&memory, &slice, true).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 9);
        assert_eq!(discards.given(), 0);
    }
}
