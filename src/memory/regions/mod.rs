//! The one list of what the guest reaches as memory, and those who follow it.
//!
//! KVM's memory slots, DMA spaces and vhost tables are listeners. They hear of a region in the
//! order in which they were added, and of its going in reverse, so that nothing can reach memory
//! that the next one has not got or has lost.

use std::error::Error;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Blocks, Discards};
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
    /// Of RAM that comes and goes by blocks: which are plugged. It changes under the lock of the list.
    blocks: Option<Mutex<Blocks>>,
    /// None of it was the guest's at first.
    pluggable: bool,
    /// Keeps the mapping at `host`.
    _owner: Box<dyn Owner>,
}

impl Region {
    /// A region of RAM, which it keeps mapped.
    #[must_use]
    pub fn ram(name: &str, memory: Arc<GuestRegionMmap>) -> Self {
        Self::mapped(name, RegionKind::Ram, memory)
    }

    /// A region of RAM that the guest has by blocks of `block` bytes: at first none. It is on the list whole, so that the
    /// guest and back ends reach all of it, and what pins memory hears of each block that is plugged and unplugged.
    #[must_use]
    pub fn pluggable(name: &str, memory: Arc<GuestRegionMmap>, block: u64) -> Self {
        let blocks = Blocks::new(memory.len(), block);
        Self {
            blocks: Some(Mutex::new(blocks)),
            pluggable: true,
            ..Self::ram(name, memory)
        }
    }

    /// A region of RAM that the guest has whole, in blocks of `block` bytes of which each can go and come back by itself:
    /// what pins memory has each pinned by itself, and what is left over behind the last whole block beside them.
    #[must_use]
    pub fn in_blocks(name: &str, memory: Arc<GuestRegionMmap>, block: u64) -> Self {
        let mut blocks = Blocks::new(memory.len(), block);
        blocks.set(&(0..blocks.count()), true);
        Self {
            blocks: Some(Mutex::new(blocks)),
            ..Self::ram(name, memory)
        }
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
            blocks: None,
            pluggable: false,
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
            blocks: None,
            pluggable: false,
            _owner: Box::new(owner),
        }
    }

    /// The region, which other devices can be let reach.
    #[must_use]
    pub fn for_peers(mut self, peer: Peer) -> Self {
        self.peer = Some(peer);
        self
    }

    /// Which of its blocks are plugged, where it comes and goes by blocks: a copy of how it is now.
    #[must_use]
    pub fn blocks(&self) -> Option<Blocks> {
        self.blocks_now().map(|blocks| blocks.clone())
    }

    pub(super) fn blocks_now(&self) -> Option<MutexGuard<'_, Blocks>> {
        let blocks = self.blocks.as_ref()?;
        Some(blocks.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether it is RAM of which the guest had none at first.
    #[must_use]
    pub fn is_pluggable(&self) -> bool {
        self.pluggable
    }

    /// Bytes behind the last whole block, where it is the guest's whole: they stay. Counted from its beginning.
    #[must_use]
    pub fn rest(&self) -> Range<u64> {
        let blocks = self.blocks_now().filter(|_| !self.pluggable);
        let whole = blocks.map(|blocks| blocks.count().saturating_mul(blocks.block_size()));
        whole.unwrap_or(self.size)..self.size
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

    /// Blocks of a region of RAM are about to be the guest's. `bytes` counts from the region's beginning, is a multiple of
    /// the block's size at both ends, and none of it is plugged. Who reaches all of the region anyhow has nothing to do.
    ///
    /// # Errors
    /// The blocks do not come at all: those told before are told that they have gone.
    fn plugged(&self, region: &Arc<Region>, bytes: &Range<u64>) -> Result<(), RegionError> {
        let _ = (region, bytes);
        Ok(())
    }

    /// Such blocks, all of which are plugged, are not the guest's any more, and their memory is about to go back to the
    /// host. Afterwards nothing of the listener's may have it pinned.
    ///
    /// # Errors
    /// It still has; the blocks then stay the guest's, and those told before are told that they have come.
    fn unplugged(&self, region: &Arc<Region>, bytes: &Range<u64>) -> Result<(), RegionError> {
        let _ = (region, bytes);
        Ok(())
    }

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
pub(super) struct State {
    pub(super) regions: Vec<Arc<Region>>,
    pub(super) listeners: Vec<Arc<dyn RegionListener>>,
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

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn refused(
    region: &Region,
    listener: &dyn RegionListener,
    source: RegionError,
) -> RegionsError {
    RegionsError::Refused {
        region: region.to_string(),
        listener: listener.name().to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
