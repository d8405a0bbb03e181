//! What assigned devices reach by DMA: the guest's RAM, and each other's memory, in the VM's DMA
//! space.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_iommu::{Access, DmaSpace, HostVa, Iova, MapError};
use busway_pci::{BarPart, BarRegion, PciFunction};

use crate::config::Choice;
use crate::memory::{Region, RegionError, RegionKind, RegionListener};

/// Bytes of the piece that stands for a whole BAR when peer-to-peer DMA is tried out: a page.
const SAMPLE: u64 = busway_pci::PAGE_SIZE;

/// Keeps one DMA space in step with the list of regions: guest-physical addresses are its I/O virtual
/// ones.
///
/// The memory of devices is mapped beside RAM, so that each reaches every other (peer-to-peer DMA).
/// It comes and goes with the BARs: at their new place when they move, and not at all while decoding
/// is off. A guest runs as well without it, so that its failure is a message and nothing more.
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
    /// Why other devices do not reach a piece of it; the first time.
    failure: Option<String>,
    /// That has been said.
    said: bool,
    /// The pieces of which it was said that others do not reach them although they have to.
    told: BTreeSet<String>,
}

impl Peers {
    /// What to say about a failure, once, and not while there is a single device, which has nobody to
    /// reach.
    fn warning(&mut self) -> Option<String> {
        if self.said || self.devices.len() < 2 {
            return None;
        }
        let failure = self.failure.as_ref()?;
        self.said = true;
        Some(format!(
            "the guest's devices will not reach each other's memory (peer-to-peer DMA), and \
             everything else works: {failure} (--platform p2p=off says nothing)"
        ))
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

    /// That the host can map a device's memory for others, where that is demanded: a page of each
    /// BAR is, at an address that nothing else has yet.
    ///
    /// # Errors
    /// [`MapError`] of the first that could not be mapped.
    pub(super) fn try_out(&self, function: &dyn PciFunction, address: u64) -> Result<(), MapError> {
        if self.peer_to_peer != Choice::On {
            return Ok(());
        }
        for BarRegion {
            index: bar,
            size: whole,
            ..
        } in function.bars()
        {
            for part in function.parts(bar) {
                let BarPart::Memory { offset, size, host } = part else {
                    continue;
                };
                // A BAR of less than a page has a page around it, which is not all its own.
                if offset.saturating_add(size) > whole {
                    continue;
                }
                let dma_buf = || {
                    function
                        .dma_buf(bar, offset, SAMPLE)
                        .unwrap_or_else(|| Err(std::io::ErrorKind::Unsupported.into()))
                };
                let owner = format!("{bar} of {}", function.name());
                let (at, host) = (Iova(address), HostVa(host.0));
                self.space.map_device(at, host, SAMPLE, &dma_buf, &owner)?;
                self.space.unmap(at, SAMPLE)?;
            }
        }
        Ok(())
    }

    fn add_device(&self, region: &Region) {
        let Some(peer) = region.peer().filter(|_| self.peer_to_peer != Choice::Off) else {
            return;
        };
        let mut peers = self.peers();
        peers.devices.insert(peer.device.clone());
        let result = self.space.map_device(
            Iova(region.guest()),
            HostVa(region.host()),
            region.size(),
            &peer.dma_buf,
            region.name(),
        );
        match result {
            Ok(()) => {
                peers.mapped.insert(region.guest());
            }
            // The guest can place a BAR anew as often as it likes.
            Err(error) if self.peer_to_peer == Choice::On => {
                let level = match peers.told.insert(region.name().to_owned()) {
                    true => log::Level::Error,
                    false => log::Level::Debug,
                };
                log::log!(level, "--platform p2p=on: {error}");
            }
            Err(error) => {
                log::debug!("{error}");
                peers.failure.get_or_insert_with(|| error.to_string());
            }
        }
        if let Some(warning) = peers.warning() {
            log::warn!("{warning}");
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

    fn added(&self, region: &Arc<Region>) -> Result<(), RegionError> {
        match region.kind() {
            RegionKind::Ram => Ok(self.space.map(
                Iova(region.guest()),
                HostVa(region.host()),
                region.size(),
                Access::ReadWrite,
                region.name(),
            )?),
            RegionKind::Device => {
                self.add_device(region);
                Ok(())
            }
        }
    }

    fn removed(&self, region: &Arc<Region>) {
        let mapped = match region.kind() {
            RegionKind::Ram => true,
            RegionKind::Device => self.peers().mapped.remove(&region.guest()),
        };
        if mapped && let Err(error) = self.space.unmap(Iova(region.guest()), region.size()) {
            log::error!("{error}; devices may still reach it");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use busway_iommu::{IovaRange, Mapping, OpenDmaBuf, Stats};

    use super::*;
    use crate::memory::Peer;

    /// A space that has no dma-bufs to map, or takes everything.
    #[derive(Debug, Default)]
    struct Space {
        refuses: bool,
        mapped: Mutex<Vec<(u64, u64)>>,
    }

    impl DmaSpace for Space {
        fn add(&self, mapping: Mapping, _dma_buf: &OpenDmaBuf<'_>) -> Result<(), MapError> {
            let Mapping {
                iova, size, owner, ..
            } = mapping;
            if self.refuses {
                return Err(MapError::Malformed {
                    owner,
                    iova,
                    size,
                    why: "no dma-buf",
                });
            }
            self.mapped.lock().unwrap().push((iova.0, size));
            Ok(())
        }

        fn unmap(&self, iova: Iova, size: u64) -> Result<(), MapError> {
            let mut mapped = self.mapped.lock().unwrap();
            let at = mapped.iter().position(|&one| one == (iova.0, size));
            mapped.remove(at.expect("nothing is mapped there"));
            Ok(())
        }

        fn usable_ranges(&self) -> Result<Vec<IovaRange>, MapError> {
            Ok(vec![IovaRange::ALL])
        }

        fn stats(&self) -> Stats {
            Stats::default()
        }
    }

    fn bar(device: &str, guest: u64) -> Arc<Region> {
        let peer = Peer {
            device: device.to_owned(),
            dma_buf: Box::new(|| Err(io::ErrorKind::Unsupported.into())),
        };
        // SAFETY: the space of these tests never touches the memory.
        let region = unsafe { Region::device("BAR 0", guest, 0x1000, 0, ()) };
        Arc::new(region.for_peers(peer))
    }

    fn listener(refuses: bool, choice: Choice) -> (Arc<Space>, DmaListener) {
        let space = Arc::new(Space {
            refuses,
            ..Space::default()
        });
        (space.clone(), DmaListener::new(space, choice))
    }

    #[test]
    fn device_memory_is_mapped_where_its_bar_is_and_goes_with_it() {
        let (space, listener) = listener(false, Choice::Auto);
        let old = bar("a", 0x1000);
        listener.added(&old).unwrap();
        listener.removed(&old);
        listener.added(&bar("a", 0x5000)).unwrap();
        assert_eq!(*space.mapped.lock().unwrap(), [(0x5000, 0x1000)]);
    }

    #[test]
    fn off_maps_no_device_and_a_page_of_busways_own_is_nobodys_peer() {
        let (space, off) = listener(false, Choice::Off);
        off.added(&bar("a", 0x1000)).unwrap();
        assert!(space.mapped.lock().unwrap().is_empty());
        off.removed(&bar("a", 0x1000));
        // SAFETY: as above.
        let own = Arc::new(unsafe { Region::device("own", 0x2000, 0x1000, 0, ()) });
        let (space, auto) = listener(false, Choice::Auto);
        auto.added(&own).unwrap();
        assert!(space.mapped.lock().unwrap().is_empty());
        auto.removed(&own);
    }

    #[test]
    fn what_fails_under_auto_is_said_once_and_only_where_there_are_two_devices() {
        let (_, listener) = listener(true, Choice::Auto);
        listener.added(&bar("a", 0x1000)).unwrap();
        assert!(!listener.peers().said);
        let second = bar("b", 0x2000);
        listener.added(&second).unwrap();
        assert!(listener.peers().said);
        assert_eq!(listener.peers().warning(), None);
        listener.removed(&second);
    }
}
