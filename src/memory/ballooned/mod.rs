//! Guest memory in a balloon that goes back to the host beside devices that reach memory by DMA: by whole blocks, each
//! of which is unmapped from the devices first.
//!
//! RAM is then mapped for devices by blocks from the start ([`Region::in_blocks`]), for the kernel unmaps no part of a
//! mapping. A block goes when all of its pages are in the balloon, and comes back before the guest hears that it may use
//! the first of them. A step that fails leaves the block where it is: with the guest, or with the host.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_pci::Complaints;
use vm_memory::GuestRegionMmap;

use super::discard::give_back;
use super::{Blocks, PlugError, Region, Regions};

const PAGE: u64 = busway_pci::PAGE_SIZE;

/// Failures that are warnings in the log.
const LOUD: u32 = 4;

/// The pages of the guest's RAM that are in its balloon, and the blocks that are gone because all of theirs are.
pub struct Ballooned {
    regions: Arc<Regions>,
    parts: Mutex<Vec<Part>>,
    /// Blocks that could not be unmapped, given back, or mapped again.
    failures: AtomicU64,
    complaints: Complaints,
}

impl fmt::Debug for Ballooned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ballooned")
            .field("unmapped", &self.unmapped())
            .field("failures", &self.failures())
            .finish_non_exhaustive()
    }
}

/// A region of RAM in blocks.
struct Part {
    region: Arc<Region>,
    memory: Arc<GuestRegionMmap>,
    /// Which pages are in the balloon: as blocks of a page.
    pages: Blocks,
    /// How many of each block's are.
    taken: Vec<u64>,
    /// Bytes of a block.
    block: u64,
}

/// Pages that leave the balloon have to wait.
#[derive(Debug, thiserror::Error)]
pub enum ReturnError {
    /// Devices cannot have them mapped again.
    #[error(transparent)]
    Map(#[from] PlugError),
    /// it was stopped
    #[error("it was stopped")]
    Stopped,
}

impl Ballooned {
    /// Of RAM that is on the list in blocks: `parts` are its regions with their memory.
    pub(super) fn new(
        regions: &Arc<Regions>,
        parts: impl Iterator<Item = (Arc<GuestRegionMmap>, Arc<Region>)>,
    ) -> Self {
        let part = |(memory, region): (Arc<GuestRegionMmap>, Arc<Region>)| {
            let blocks = region.blocks()?;
            let count = usize::try_from(blocks.count()).ok()?;
            Some(Part {
                pages: Blocks::new(region.size(), PAGE),
                taken: vec![0; count],
                block: blocks.block_size(),
                region,
                memory,
            })
        };
        Self {
            regions: Arc::clone(regions),
            parts: Mutex::new(parts.filter_map(part).collect()),
            failures: AtomicU64::new(0),
            complaints: Complaints::first(LOUD),
        }
    }

    /// Bytes of blocks that no device reaches and that the host has.
    #[must_use]
    pub fn unmapped(&self) -> u64 {
        self.regions.discards().unmapped()
    }

    /// How often a block could not be unmapped, given back to the host, or mapped again.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures.load(Relaxed)
    }

    /// The guest does without the pages of `range`, addresses of its own, until it says otherwise. Blocks all of whose
    /// pages it does without are unmapped and go back to the host, while `go_on` says so.
    pub fn taken(&self, range: &Range<u64>, go_on: impl Fn() -> bool) {
        for part in &mut *self.parts() {
            for (block, pages) in part.blocks_of(range) {
                part.mark(block, &pages, true);
                if part.is_full(block) && part.is_mapped(block) && go_on() {
                    self.release(part, block);
                }
            }
        }
    }

    /// The guest is about to use the pages of `range` again: what of it no device reaches is mapped before this returns.
    ///
    /// # Errors
    /// [`ReturnError`]: something is not mapped, and the guest must not use it. It can be asked for again.
    pub fn returned(
        &self,
        range: &Range<u64>,
        go_on: impl Fn() -> bool,
    ) -> Result<(), ReturnError> {
        for part in &mut *self.parts() {
            for (block, pages) in part.blocks_of(range) {
                if !part.is_mapped(block) {
                    if !go_on() {
                        return Err(ReturnError::Stopped);
                    }
                    self.map(part, block)?;
                }
                part.mark(block, &pages, false);
            }
        }
        Ok(())
    }

    /// The guest, or its driver, begins anew, and may use all of its RAM: all of it is mapped again.
    ///
    /// # Errors
    /// [`PlugError`], of the last block that could not be mapped. Devices do not reach it until this is called again.
    pub fn all_returned(&self) -> Result<(), PlugError> {
        let mut result = Ok(());
        for part in &mut *self.parts() {
            for (block, pages) in part.blocks_of(&(0..u64::MAX)) {
                if !part.is_mapped(block)
                    && let Err(error) = self.map(part, block)
                {
                    result = Err(error);
                    continue;
                }
                part.mark(block, &pages, false);
            }
        }
        result
    }

    /// Unmaps a block and gives it back to the host, or leaves it as it is.
    fn release(&self, part: &Part, block: u64) {
        if let Err(error) = self.regions.unplug(&part.region, &(block..block + 1)) {
            return self.failed(&error);
        }
        let (at, size) = part.place(block);
        if let Err(source) = give_back(&part.memory, at, size) {
            let bytes = part.block;
            self.failed(&PlugError::Discard { bytes, source });
            // Where devices do not get it back either it waits for the guest to return to it.
            if let Err(error) = self.regions.plug(&part.region, &(block..block + 1)) {
                self.failed(&error);
                self.regions.discards().unmap(part.block);
            }
            return;
        }
        self.regions.discards().unmap(part.block);
    }

    fn map(&self, part: &Part, block: u64) -> Result<(), PlugError> {
        let mapped = self.regions.plug(&part.region, &(block..block + 1));
        match mapped {
            Ok(()) => {
                self.regions.discards().map(part.block);
                Ok(())
            }
            Err(error) => {
                self.failed(&error);
                Err(error.into())
            }
        }
    }

    fn failed(&self, error: &dyn fmt::Display) {
        self.failures.fetch_add(1, Relaxed);
        log::log!(
            self.complaints.next(log::Level::Warn),
            "a block of the guest's balloon stays where it is: {error}"
        );
    }

    fn parts(&self) -> MutexGuard<'_, Vec<Part>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Part {
    /// The blocks that `range` of the guest's addresses reaches into, each with those of its pages that lie in it whole.
    fn blocks_of(&self, range: &Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> + use<> {
        let (start, block) = (self.region.guest(), self.block);
        let whole = block.saturating_mul(self.taken.len() as u64);
        let inside = |address: u64| address.saturating_sub(start).min(whole);
        let first = inside(range.start).next_multiple_of(PAGE);
        let end = inside(range.end) / PAGE * PAGE;
        let blocks = match first < end && block > 0 {
            true => first / block..end.div_ceil(block),
            false => 0..0,
        };
        blocks.map(move |number| {
            let bytes = number * block..(number + 1) * block;
            let part = bytes.start.max(first)..bytes.end.min(end);
            (number, part.start / PAGE..part.end / PAGE)
        })
    }

    fn mark(&mut self, block: u64, pages: &Range<u64>, taken: bool) {
        let before = self.pages.plugged_bytes();
        self.pages.set(pages, taken);
        let after = self.pages.plugged_bytes();
        if let Some(count) = usize::try_from(block)
            .ok()
            .and_then(|block| self.taken.get_mut(block))
        {
            *count = count
                .saturating_add(after / PAGE)
                .saturating_sub(before / PAGE);
        }
    }

    fn is_full(&self, block: u64) -> bool {
        let count = usize::try_from(block).ok();
        let count = count.and_then(|block| self.taken.get(block));
        count.is_some_and(|count| *count == self.block / PAGE)
    }

    fn is_mapped(&self, block: u64) -> bool {
        let now = self.region.blocks_now();
        now.is_some_and(|now| now.is_plugged(block))
    }

    /// Where a block is in this process, and its size.
    fn place(&self, block: u64) -> (usize, usize) {
        let offset = usize::try_from(block.saturating_mul(self.block)).unwrap_or(usize::MAX);
        let size = usize::try_from(self.block).unwrap_or(0);
        (self.region.host().saturating_add(offset), size)
    }
}

#[cfg(test)]
mod tests;
