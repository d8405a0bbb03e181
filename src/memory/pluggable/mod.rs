//! Guest memory that comes and goes by blocks while the guest runs: what a plug and an unplug are to those who follow
//! the list of regions, and to the host.
//!
//! A block is mapped for devices before the guest hears that it has it, and unmapped after the guest has left it; only
//! then does its memory go back to the host. No mapping reaches beyond one block, so that each can go by itself. A step
//! that fails leaves all as it was.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use super::discard::give_back;
use super::huge_blocks::{HugeBlocks, HugeBlocksError};
use super::prefault::populate_range;
use super::regions::refused;
use super::{Amount, Blocks, Plugged, Region, Regions, RegionsError};

/// Bytes that are plugged or unplugged with the list's lock held: what others who change it, such as a vCPU whose guest
/// places a BAR anew, wait for.
const STEP: u64 = 128 << 20;

/// Blocks could not be plugged, or not unplugged. All is as before.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// Somebody cannot have them mapped, or not unmapped.
    #[error(transparent)]
    Refused(#[from] RegionsError),
    /// populating {bytes} bytes of guest RAM failed: {source}
    #[error("populating {bytes} bytes of guest RAM failed: {source}")]
    Populate {
        /// Bytes.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// giving {bytes} bytes of guest RAM back to the host failed: {source}
    #[error("giving {bytes} bytes of guest RAM back to the host failed: {source}")]
    Discard {
        /// Bytes.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// {bytes} of guest RAM need more huge pages of {page} than are free
    #[error(
        "{} of guest RAM need more huge pages of {} than are free: have the host reserve more (`busway hugepages`), in \
         {}/hugepages/hugepages-{}kB/nr_hugepages",
        Amount(*bytes), Amount(*page), pools(*node), page >> 10
    )]
    HugePages {
        /// Bytes.
        bytes: u64,
        /// Bytes of a page.
        page: u64,
        /// The host's node that they are of; any where absent.
        node: Option<u32>,
    },
    /// it was stopped
    #[error("it was stopped")]
    Stopped,
}

/// The folder of the pools of huge pages, of all nodes or of one.
fn pools(node: Option<u32>) -> String {
    match node {
        Some(node) => format!("/sys/devices/system/node/node{node}"),
        None => "/sys/kernel/mm".to_owned(),
    }
}

/// What blocks are made of.
#[derive(Clone, Debug)]
pub(super) enum Pages {
    /// Ordinary pages, which the host gives when they are touched.
    Ordinary,
    /// Ordinary pages, which the host has to give when a block is plugged.
    Populated,
    /// Huge pages.
    Huge(Arc<HugeBlocks>),
}

/// A region of RAM whose blocks are plugged and unplugged.
#[derive(Debug)]
pub struct Pluggable {
    regions: Arc<Regions>,
    region: Arc<Region>,
    memory: Arc<GuestRegionMmap>,
    pages: Pages,
    /// Bytes that are plugged, for who looks.
    plugged: AtomicU64,
    /// One change at a time.
    changing: Mutex<()>,
}

impl Pluggable {
    /// Of a `region` that is on the list, with its `memory`, made of such `pages`.
    pub(super) fn new(
        regions: &Arc<Regions>,
        region: &Arc<Region>,
        memory: &Arc<GuestRegionMmap>,
        pages: Pages,
    ) -> Self {
        Self {
            regions: Arc::clone(regions),
            region: Arc::clone(region),
            memory: Arc::clone(memory),
            pages,
            plugged: AtomicU64::new(0),
            changing: Mutex::default(),
        }
    }

    /// Its first guest-physical address.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.region.guest()
    }

    /// Bytes of the region, all of which can be plugged.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.region.size()
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_size(&self) -> u64 {
        self.blocks().block_size()
    }

    /// Bytes that are plugged.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        self.plugged.load(Relaxed)
    }

    /// The `count` blocks from guest-physical `address` on; nothing where there are no such blocks.
    #[must_use]
    pub fn range(&self, address: u64, count: u64) -> Option<Range<u64>> {
        let offset = address.checked_sub(self.start())?;
        self.blocks().range(offset, count)
    }

    /// What `blocks` are.
    #[must_use]
    pub fn state(&self, blocks: &Range<u64>) -> Plugged {
        self.blocks().state(blocks)
    }

    /// Plugs `blocks`, none of which is plugged, while `go_on` says so.
    ///
    /// # Errors
    /// [`PlugError`]; none of them is plugged then.
    pub fn plug(&self, blocks: &Range<u64>, go_on: impl Fn() -> bool) -> Result<(), PlugError> {
        let _changing = self.change();
        for part in self.steps(blocks) {
            let plugged = match go_on() {
                true => self.plug_step(&part),
                false => Err(PlugError::Stopped),
            };
            if let Err(error) = plugged {
                let before = blocks.start..part.start;
                for part in self.steps(&before) {
                    if let Err(error) = self.unplug_step(&part) {
                        log::error!("memory that was not plugged whole stays in part: {error}");
                    }
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Unplugs `blocks`, all of which are plugged, while `go_on` says so.
    ///
    /// # Errors
    /// [`PlugError`]; all of them are plugged then, but what was in them may be lost, as after an unplug.
    pub fn unplug(&self, blocks: &Range<u64>, go_on: impl Fn() -> bool) -> Result<(), PlugError> {
        let _changing = self.change();
        for part in self.steps(blocks) {
            let unplugged = match go_on() {
                true => self.unplug_step(&part),
                false => Err(PlugError::Stopped),
            };
            if let Err(error) = unplugged {
                let before = blocks.start..part.start;
                for part in self.steps(&before) {
                    if let Err(error) = self.plug_step(&part) {
                        log::error!("memory that was to stay plugged is gone in part: {error}");
                    }
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Unplugs all that is plugged, while `go_on` says so.
    ///
    /// # Errors
    /// [`PlugError`]; what was not reached is plugged then.
    pub fn unplug_all(&self, go_on: impl Fn() -> bool) -> Result<(), PlugError> {
        let _changing = self.change();
        let all = self.blocks();
        for part in all.runs().flat_map(|run| self.steps(&run)) {
            match go_on() {
                true => self.unplug_step(&part)?,
                false => return Err(PlugError::Stopped),
            }
        }
        Ok(())
    }

    fn plug_step(&self, part: &Range<u64>) -> Result<(), PlugError> {
        let bytes = self.blocks().bytes(part);
        self.take(&bytes)?;
        if let Err(error) = self.regions.plug(&self.region, part) {
            self.forget(&bytes);
            return Err(error.into());
        }
        self.count();
        Ok(())
    }

    fn unplug_step(&self, part: &Range<u64>) -> Result<(), PlugError> {
        self.regions.unplug(&self.region, part)?;
        let bytes = self.blocks().bytes(part);
        let given = self.give(&bytes);
        let given = given.or_else(|source| match self.regions.plug(&self.region, part) {
            Ok(()) => Err(PlugError::Discard {
                bytes: bytes.end - bytes.start,
                source,
            }),
            // No device reaches it any more, so that it cannot be the guest's.
            Err(error) => {
                log::error!("memory that the guest has left stays with Busway: {source}; {error}");
                Ok(())
            }
        });
        self.count();
        given
    }

    /// Has the host give what it has to give when a block is plugged.
    fn take(&self, bytes: &Range<u64>) -> Result<(), PlugError> {
        let size = bytes.end - bytes.start;
        match &self.pages {
            Pages::Ordinary => Ok(()),
            Pages::Populated => {
                let (at, length) = self.place(bytes);
                let populated = populate_range(self.region.guest(), at, length);
                populated.map_err(|source| {
                    self.forget(bytes);
                    let bytes = size;
                    PlugError::Populate { bytes, source }
                })
            }
            Pages::Huge(huge) => {
                let taken = huge.take(&self.memory, bytes.start, size);
                taken.map_err(|error| match error {
                    HugeBlocksError::TooFew => PlugError::HugePages {
                        bytes: size,
                        page: huge.page(),
                        node: huge.host_node(),
                    },
                    HugeBlocksError::System(source) => PlugError::Populate {
                        bytes: size,
                        source,
                    },
                })
            }
        }
    }

    /// Gives blocks that no device reaches any more back to the host.
    fn give(&self, bytes: &Range<u64>) -> io::Result<()> {
        match &self.pages {
            Pages::Ordinary | Pages::Populated => {
                let (at, size) = self.place(bytes);
                give_back(&self.memory, at, size)
            }
            Pages::Huge(huge) => huge.give(&self.memory, bytes.start, bytes.end - bytes.start),
        }
    }

    /// What a plug that failed was given goes back.
    fn forget(&self, bytes: &Range<u64>) {
        if let Err(error) = self.give(bytes) {
            log::debug!("memory that was not plugged: {error}");
        }
    }

    /// The parts of `blocks` that are done one after another.
    fn steps(&self, blocks: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let step = STEP.checked_div(self.block_size()).unwrap_or(1).max(1);
        let end = blocks.end;
        let mut next = blocks.start;
        std::iter::from_fn(move || {
            let start = next;
            next = start.saturating_add(step).min(end);
            (start < end).then_some(start..next)
        })
    }

    /// Where bytes of the region are in this process, and how many.
    fn place(&self, bytes: &Range<u64>) -> (usize, usize) {
        let size = usize::try_from(bytes.end - bytes.start).unwrap_or(0);
        let offset = usize::try_from(bytes.start).unwrap_or(usize::MAX);
        (self.region.host().saturating_add(offset), size)
    }

    fn blocks(&self) -> Blocks {
        // A region that is pluggable has blocks.
        let blocks = self.region.blocks();
        blocks.unwrap_or_else(|| Blocks::new(0, self.memory.len().max(1)))
    }

    fn count(&self) {
        self.plugged.store(self.blocks().plugged_bytes(), Relaxed);
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Regions {
    /// Where RAM on the list comes and goes by blocks, and which blocks are plugged now; nothing where none does.
    #[must_use]
    pub fn pluggable(&self) -> Vec<(Range<u64>, Blocks)> {
        let state = self.state();
        let regions = state.regions.iter().filter(|region| region.is_pluggable());
        let pieces = regions.filter_map(|region| {
            let range = region.guest()..region.guest().saturating_add(region.size());
            Some((range, region.blocks()?))
        });
        pieces.collect()
    }

    /// Tells every listener that blocks of `region` come, and then has them plugged.
    ///
    /// # Errors
    /// [`RegionsError::Refused`]; every listener is then as before.
    pub(super) fn plug(
        &self,
        region: &Arc<Region>,
        blocks: &Range<u64>,
    ) -> Result<(), RegionsError> {
        let state = self.state();
        let bytes = bytes_of(region, blocks);
        for (reported, listener) in state.listeners.iter().enumerate() {
            if let Err(source) = listener.plugged(region, &bytes) {
                for earlier in state.listeners.iter().take(reported).rev() {
                    if let Err(error) = earlier.unplugged(region, &bytes) {
                        log::error!("{}: {error}; devices may still reach it", earlier.name());
                    }
                }
                return Err(refused(region, listener.as_ref(), source));
            }
        }
        set(region, blocks, true);
        Ok(())
    }

    /// Tells every listener that blocks of `region` go, the last one added before the others; they are then not plugged.
    ///
    /// # Errors
    /// [`RegionsError::Refused`]; every listener is then as before.
    pub(super) fn unplug(
        &self,
        region: &Arc<Region>,
        blocks: &Range<u64>,
    ) -> Result<(), RegionsError> {
        let state = self.state();
        let bytes = bytes_of(region, blocks);
        for (at, listener) in state.listeners.iter().enumerate().rev() {
            if let Err(source) = listener.unplugged(region, &bytes) {
                for later in state.listeners.iter().skip(at + 1) {
                    if let Err(error) = later.plugged(region, &bytes) {
                        log::error!("{}: {error}; devices do not reach it", later.name());
                    }
                }
                return Err(refused(region, listener.as_ref(), source));
            }
        }
        set(region, blocks, false);
        Ok(())
    }
}

fn bytes_of(region: &Region, blocks: &Range<u64>) -> Range<u64> {
    let now = region.blocks_now();
    now.map_or(0..0, |now| now.bytes(blocks))
}

fn set(region: &Region, blocks: &Range<u64>, plugged: bool) {
    if let Some(mut now) = region.blocks_now() {
        now.set(blocks, plugged);
    }
}

#[cfg(test)]
mod tests;
