//! What assigned devices reach by DMA: the guest's RAM, and each other's memory, in the VM's DMA
//! space.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_iommu::{Access, DmaSpace, HostVa, Iova};
use busway_pci::{BarPart, BarRegion, PciFunction};

use crate::config::Choice;
use crate::memory::{Region, RegionError, RegionKind, RegionListener};

/// Bytes at each end of a part of a BAR that stand for the whole where peer-to-peer DMA may fail: a
/// page.
const SAMPLE: u64 = busway_pci::PAGE_SIZE;

/// Keeps one DMA space in step with the list of regions: guest-physical addresses are its I/O virtual
/// ones.
///
/// The memory of devices is mapped beside RAM, so that each reaches every other (peer-to-peer DMA).
/// It comes and goes with the BARs: at their new place when they move, and not at all while decoding
/// is off. What is reached where firmware has put the BARs is known before the guest starts, by
/// [`survey`](Self::survey); a guest that moves them there later where they are out of reach runs as
/// well, so that this is a message and nothing more.
pub(super) struct DmaListener {
    space: Arc<dyn DmaSpace>,
    peer_to_peer: Choice,
    peers: Mutex<Peers>,
}

/// What is known of the devices' memory.
#[derive(Debug, Default)]
struct Peers {
    /// Where device memory is mapped: guest-physical addresses.
    mapped: BTreeSet<u64>,
    /// The devices that have had some.
    devices: BTreeSet<String>,
    /// The BARs, by their names, of which it was said that other devices do not reach them.
    said: BTreeSet<String>,
}

/// --platform p2p=on, and not every BAR is in reach.
#[derive(Debug, thiserror::Error)]
#[error("--platform p2p=on: {0}; --platform p2p=auto starts the guest nevertheless")]
pub struct PeerToPeerError(String);

/// Which BARs the devices of a guest reach.
#[derive(Debug, Default)]
struct Survey {
    devices: BTreeSet<String>,
    reached: Vec<String>,
    /// With the reason of each.
    missed: Vec<(String, String)>,
}

impl fmt::Display for Survey {
    /// BARs that are missed for one reason are named together.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut reasons: Vec<&str> = Vec::new();
        for (_, reason) in &self.missed {
            if !reasons.contains(&reason.as_str()) {
                reasons.push(reason);
            }
        }
        f.write_str("out of reach of the other devices ")?;
        f.write_str(if self.missed.len() == 1 {
            "is "
        } else {
            "are "
        })?;
        for (index, reason) in reasons.iter().enumerate() {
            let because = self.missed.iter().filter(|(_, why)| why == reason);
            let names: Vec<_> = because.map(|(name, _)| name.as_str()).collect();
            f.write_str(if index > 0 { "; and " } else { "" })?;
            write!(f, "{} ({reason})", list(&names))?;
        }
        let reached: Vec<_> = self.reached.iter().map(String::as_str).collect();
        match &reached[..] {
            [] => f.write_str("; in reach is no BAR"),
            [one] => write!(f, "; in reach is {one}"),
            all => write!(f, "; in reach are {}", list(all)),
        }
    }
}

/// `a, b and c`
fn list(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

impl fmt::Debug for DmaListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DmaListener").field(&self.space).finish()
    }
}

impl DmaListener {
    pub(super) fn new(space: Arc<dyn DmaSpace>, peer_to_peer: Choice) -> Self {
        Self {
            space,
            peer_to_peer,
            peers: Mutex::default(),
        }
    }

    /// Finds out which BARs of `functions` the devices reach where firmware has put them, by mapping
    /// them there; nothing stays mapped. No vCPU may run, and nothing may decode.
    ///
    /// Where that is demanded, all of each BAR is mapped, and all of them at once. Else it is the ends of
    /// each part, and nothing for a single device, which has nobody to reach; what is out of reach is a
    /// warning.
    ///
    /// # Errors
    /// [`PeerToPeerError`]: not every BAR is in reach, and that is demanded.
    pub(super) fn survey(&self, functions: &[Arc<dyn PciFunction>]) -> Result<(), PeerToPeerError> {
        let names: BTreeSet<_> = functions.iter().map(|function| function.name()).collect();
        match self.peer_to_peer {
            Choice::Off => return Ok(()),
            Choice::Auto if names.len() < 2 => return Ok(()),
            Choice::Auto | Choice::On => {}
        }
        let mut survey = Survey::default();
        let mut mapped = Vec::new();
        for function in functions.iter().filter(|function| function.is_peer()) {
            for region in function.bars() {
                self.try_out(&**function, &region, &mut survey, &mut mapped);
            }
        }
        for (at, size) in mapped {
            if let Err(error) = self.space.unmap(at, size) {
                log::error!("{error}; devices may still reach it");
            }
        }
        if survey.missed.is_empty() {
            return Ok(());
        }
        if self.peer_to_peer == Choice::On {
            return Err(PeerToPeerError(survey.to_string()));
        }
        if survey.devices.len() > 1 {
            log::warn!(
                "peer-to-peer DMA: {survey}; everything else works (--platform p2p=off says nothing)"
            );
            let missed = survey.missed.into_iter().map(|(name, _)| name);
            self.peers().said.extend(missed);
        }
        Ok(())
    }

    /// Maps a BAR, or the ends of each of its parts, and notes in `survey` whether that works and in
    /// `mapped` what is to be unmapped.
    fn try_out(
        &self,
        function: &dyn PciFunction,
        region: &BarRegion,
        survey: &mut Survey,
        mapped: &mut Vec<(Iova, u64)>,
    ) {
        let &BarRegion {
            index: bar,
            address,
            size: whole,
            ..
        } = region;
        let name = format!("{bar} of {}", function.name());
        let mut reason = None;
        let mut tried = false;
        for part in function.parts(bar) {
            let BarPart::Memory { offset, size, host } = part else {
                continue;
            };
            // A BAR of less than a page has a page around it, which is not all its own.
            if offset.checked_add(size).is_none_or(|end| end > whole) {
                continue;
            }
            for (skipped, size) in self.pieces(size) {
                let at = Iova(address.saturating_add(offset).saturating_add(skipped));
                let host = HostVa(host.0.saturating_add(skipped as usize));
                let dma_buf = || {
                    function
                        .dma_buf(bar, offset.saturating_add(skipped), size)
                        .unwrap_or_else(|| Err(std::io::ErrorKind::Unsupported.into()))
                };
                tried = true;
                match self.space.map_device(at, host, size, &dma_buf, &name) {
                    Ok(()) => mapped.push((at, size)),
                    Err(error) => {
                        log::debug!("{error}");
                        reason.get_or_insert_with(|| error.reason());
                    }
                }
            }
        }
        if tried {
            survey.devices.insert(function.name());
            match reason {
                Some(reason) => survey.missed.push((name, reason)),
                None => survey.reached.push(name),
            }
        }
    }

    /// What is mapped of a part of `size` bytes to try it out, by where it begins in it.
    fn pieces(&self, size: u64) -> Vec<(u64, u64)> {
        match size.checked_sub(SAMPLE) {
            Some(last) if self.peer_to_peer != Choice::On && last >= SAMPLE => {
                vec![(0, SAMPLE), (last, SAMPLE)]
            }
            _ => vec![(0, size)],
        }
    }

    fn add_device(&self, region: &Region) {
        let Some(peer) = region.peer().filter(|_| self.peer_to_peer != Choice::Off) else {
            return;
        };
        let result = self.space.map_device(
            Iova(region.guest()),
            HostVa(region.host()),
            region.size(),
            &peer.dma_buf,
            region.name(),
        );
        let mut peers = self.peers();
        peers.devices.insert(peer.device.clone());
        let Err(error) = result else {
            peers.mapped.insert(region.guest());
            return;
        };
        // The guest can place a BAR anew as often as it likes.
        let matters = self.peer_to_peer == Choice::On || peers.devices.len() > 1;
        if !matters || !peers.said.insert(region.name().to_owned()) {
            log::debug!("{error}");
            return;
        }
        log::warn!(
            "peer-to-peer DMA: the guest has placed {} where the other devices do not reach it: {}",
            region.name(),
            error.reason()
        );
    }

    /// Maps each block of `bytes` of a region by itself, for that is how it is unmapped: the kernel takes no part of a
    /// mapping back. Either all of them are mapped, or none is.
    fn map_blocks(&self, region: &Region, bytes: &Range<u64>) -> Result<(), RegionError> {
        let block = region.blocks().map_or(0, |blocks| blocks.block_size());
        let mut next = bytes.start;
        while block > 0 && next < bytes.end {
            let mapped = self.space.map_block(
                Iova(region.guest().saturating_add(next)),
                HostVa(region.host().saturating_add(usize::try_from(next)?)),
                block,
                Access::ReadWrite,
                region.name(),
            );
            if let Err(error) = mapped {
                self.unmap_blocks(region, &(bytes.start..next));
                return Err(error.into());
            }
            next = next.saturating_add(block);
        }
        Ok(())
    }

    /// Maps what lies behind the last whole block of RAM that was the guest's from the start.
    fn map_rest(&self, region: &Region) -> Result<(), RegionError> {
        let rest = region.rest();
        if rest.is_empty() {
            return Ok(());
        }
        let mapped = self.space.map_block(
            Iova(region.guest().saturating_add(rest.start)),
            HostVa(region.host().saturating_add(usize::try_from(rest.start)?)),
            rest.end - rest.start,
            Access::ReadWrite,
            region.name(),
        );
        Ok(mapped?)
    }

    /// Unmaps mapped blocks, where there are any.
    fn unmap_blocks(&self, region: &Region, bytes: &Range<u64>) {
        let at = Iova(region.guest().saturating_add(bytes.start));
        if !bytes.is_empty()
            && let Err(error) = self.space.unmap(at, bytes.end - bytes.start)
        {
            log::error!("{error}; devices may still reach it");
        }
    }

    fn peers(&self) -> MutexGuard<'_, Peers> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RegionListener for DmaListener {
    fn name(&self) -> &str {
        "DMA space of the assigned devices"
    }

    /// What is mapped for DMA is pinned: a page that the guest had anew would be another than the devices reach.
    fn pins(&self) -> bool {
        true
    }

    fn added(&self, region: &Arc<Region>) -> Result<(), RegionError> {
        match (region.kind(), region.blocks()) {
            (RegionKind::Ram, Some(blocks)) => {
                for run in blocks.runs() {
                    if let Err(error) = self.map_blocks(region, &blocks.bytes(&run)) {
                        let before = blocks.runs().take_while(|one| one.start < run.start);
                        before.for_each(|run| self.unmap_blocks(region, &blocks.bytes(&run)));
                        return Err(error);
                    }
                }
                let rest = self.map_rest(region);
                if rest.is_err() {
                    let runs = blocks.runs();
                    runs.for_each(|run| self.unmap_blocks(region, &blocks.bytes(&run)));
                }
                rest
            }
            (RegionKind::Ram, None) => {
                let mapped = self.space.map(
                    Iova(region.guest()),
                    HostVa(region.host()),
                    region.size(),
                    Access::ReadWrite,
                    region.name(),
                );
                mapped.map_err(|error| match region.remedy() {
                    Some(remedy) => format!("{error}; {remedy}").into(),
                    None => error.into(),
                })
            }
            (RegionKind::Device, _) => {
                self.add_device(region);
                Ok(())
            }
            // No board lets devices reach its flash.
            (RegionKind::Rom, _) => Ok(()),
        }
    }

    fn removed(&self, region: &Arc<Region>) {
        let mapped = match region.kind() {
            // One call takes all blocks, where there are any.
            RegionKind::Ram
                if region.rest().is_empty()
                    && region
                        .blocks()
                        .is_some_and(|blocks| blocks.plugged_bytes() == 0) =>
            {
                false
            }
            RegionKind::Ram => true,
            RegionKind::Device => self.peers().mapped.remove(&region.guest()),
            RegionKind::Rom => false,
        };
        if mapped && let Err(error) = self.space.unmap(Iova(region.guest()), region.size()) {
            log::error!("{error}; devices may still reach it");
        }
    }

    fn plugged(&self, region: &Arc<Region>, bytes: &Range<u64>) -> Result<(), RegionError> {
        self.map_blocks(region, bytes)
    }

    fn unplugged(&self, region: &Arc<Region>, bytes: &Range<u64>) -> Result<(), RegionError> {
        let at = Iova(region.guest().saturating_add(bytes.start));
        Ok(self.space.unmap(at, bytes.end - bytes.start)?)
    }
}

#[cfg(test)]
mod blocks_tests;
#[cfg(test)]
mod tests;
