use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use busway_iommu::{DmaMapping, IovaRange, MapError, OpenDmaBuf, Stats};
use busway_pci::{BarIndex, BarKind, HostAddress};

use super::*;
use crate::memory::Peer;

/// A space that maps below an address, and keeps what it was asked for.
#[derive(Debug, Default)]
struct Space {
    reach: u64,
    mapped: Mutex<Vec<(u64, u64)>>,
    asked: Mutex<Vec<(u64, u64)>>,
    most: AtomicUsize,
}

impl DmaSpace for Space {
    fn add(&self, mapping: DmaMapping, _dma_buf: &OpenDmaBuf<'_>) -> Result<(), MapError> {
        let DmaMapping {
            iova, size, owner, ..
        } = mapping;
        self.asked.lock().unwrap().push((iova.0, size));
        if iova.0 + size > self.reach {
            return Err(MapError::Malformed {
                owner,
                iova,
                size,
                why: "it is too far",
            });
        }
        let mut mapped = self.mapped.lock().unwrap();
        mapped.push((iova.0, size));
        self.most.fetch_max(mapped.len(), Ordering::Relaxed);
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

fn listener(reach: u64, choice: Choice) -> (Arc<Space>, DmaListener) {
    let space = Arc::new(Space {
        reach,
        ..Space::default()
    });
    (space.clone(), DmaListener::new(space, choice))
}

#[test]
fn device_memory_is_mapped_where_its_bar_is_and_goes_with_it() {
    let (space, listener) = listener(u64::MAX, Choice::Auto);
    let old = bar("a", 0x1000);
    listener.added(&old).unwrap();
    listener.removed(&old);
    listener.added(&bar("a", 0x5000)).unwrap();
    assert_eq!(*space.mapped.lock().unwrap(), [(0x5000, 0x1000)]);
}

#[test]
fn off_maps_no_device_and_a_page_of_busways_own_is_nobodys_peer() {
    let (space, off) = listener(u64::MAX, Choice::Off);
    off.added(&bar("a", 0x1000)).unwrap();
    assert!(space.mapped.lock().unwrap().is_empty());
    off.removed(&bar("a", 0x1000));
    // SAFETY: as above.
    let own = Arc::new(unsafe { Region::device("own", 0x2000, 0x1000, 0, ()) });
    let (space, auto) = listener(u64::MAX, Choice::Auto);
    auto.added(&own).unwrap();
    assert!(space.mapped.lock().unwrap().is_empty());
    auto.removed(&own);
}

#[test]
fn rom_is_out_of_devices_reach() {
    use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};
    let memory = GuestRegionMmap::new(MmapRegion::new(0x1000).unwrap(), GuestAddress(0x3000));
    let rom = Arc::new(Region::rom("firmware", Arc::new(memory.unwrap())));
    let (space, listener) = listener(u64::MAX, Choice::On);
    listener.added(&rom).unwrap();
    assert!(space.asked.lock().unwrap().is_empty());
    listener.removed(&rom);
}

/// A device with 16 KiB of memory in BAR 0, of which the guest reaches what is behind its first
/// page.
#[derive(Debug)]
struct Device(&'static str, u64);

const BAR_SIZE: u64 = 0x4000;

impl PciFunction for Device {
    fn name(&self) -> String {
        self.0.to_owned()
    }

    fn config_read(&self, _offset: u16, _data: &mut [u8]) {}

    fn config_write(&self, _offset: u16, _data: &[u8]) {}

    fn bars(&self) -> Vec<BarRegion> {
        let region = |index, size| BarRegion {
            index,
            kind: BarKind::Memory64 { prefetchable: true },
            address: self.1,
            size,
        };
        vec![
            region(BarIndex::Bar(0), BAR_SIZE),
            region(BarIndex::Bar(2), 0x100),
            region(BarIndex::Rom, 0x800),
        ]
    }

    fn decoded(&self) -> Vec<BarRegion> {
        Vec::new()
    }

    fn parts(&self, bar: BarIndex) -> Vec<BarPart> {
        let part = |offset, size| BarPart::Memory {
            offset,
            size,
            host: HostAddress(0x1000_0000),
        };
        match bar {
            BarIndex::Bar(0) => vec![part(0x1000, 0x3000)],
            BarIndex::Bar(2) => vec![part(0, 0x1000)],
            _ => Vec::new(),
        }
    }

    fn is_peer(&self) -> bool {
        self.0 != "mediated"
    }

    fn bar_read(&self, _bar: BarIndex, _offset: u64, _data: &mut [u8]) {}

    fn bar_write(&self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}

    fn reset(&self) {}
}

fn devices(addresses: &[u64]) -> Vec<Arc<dyn PciFunction>> {
    let names = ["a", "b", "c", "d"].into_iter().zip(addresses);
    names
        .map(|(name, &address)| Arc::new(Device(name, address)) as Arc<dyn PciFunction>)
        .collect()
}

#[test]
fn on_maps_all_of_each_bar_where_it_is_at_once_and_leaves_nothing_mapped() {
    let (space, listener) = listener(u64::MAX, Choice::On);
    listener.survey(&devices(&[0x10_0000, 0x20_0000])).unwrap();
    let asked = [(0x10_1000, 0x3000), (0x20_1000, 0x3000)];
    assert_eq!(*space.asked.lock().unwrap(), asked);
    assert_eq!(space.most.load(Ordering::Relaxed), 2);
    assert!(space.mapped.lock().unwrap().is_empty());
}

#[test]
fn on_asks_nothing_of_the_memory_of_mediated_devices() {
    let (space, listener) = listener(0x20_0000, Choice::On);
    let mut all = devices(&[0x10_0000]);
    all.push(Arc::new(Device("mediated", 0x30_0000)));
    listener.survey(&all).unwrap();
    assert_eq!(*space.asked.lock().unwrap(), [(0x10_1000, 0x3000)]);
}

#[test]
fn on_refuses_with_the_bars_that_are_out_of_reach_and_those_that_are_not() {
    let (space, listener) = listener(0x40_0000, Choice::On);
    let addresses = [0x10_0000, 0x20_0000, 0x30_0000, 0x40_0000];
    let error = listener.survey(&devices(&addresses)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "--platform p2p=on: out of reach of the other devices is BAR 0 of d (it is too far); \
         in reach are BAR 0 of a, BAR 0 of b and BAR 0 of c; --platform p2p=auto starts the \
         guest nevertheless"
    );
    assert!(space.mapped.lock().unwrap().is_empty());
    // The end of a BAR is a part of it.
    let across = devices(&[0x40_0000 - BAR_SIZE + 0x1000]);
    let text = listener.survey(&across).unwrap_err().to_string();
    assert!(
        text.contains("is BAR 0 of a (it is too far); in reach is no BAR;"),
        "{text}"
    );
}

#[test]
fn auto_tries_the_ends_of_each_bar_and_says_of_each_once_that_it_is_out_of_reach() {
    let (space, auto) = listener(0x40_0000, Choice::Auto);
    auto.survey(&devices(&[0x10_0000, 0x40_0000])).unwrap();
    assert_eq!(
        *space.asked.lock().unwrap(),
        [
            (0x10_1000, SAMPLE),
            (0x10_3000, SAMPLE),
            (0x40_1000, SAMPLE),
            (0x40_3000, SAMPLE)
        ]
    );
    assert!(space.mapped.lock().unwrap().is_empty());
    let said = |listener: &DmaListener| listener.peers().said.clone();
    assert_eq!(said(&auto), ["BAR 0 of b".to_owned()].into());
    // A single device has nobody to reach.
    let (space, alone) = listener(0, Choice::Auto);
    alone.survey(&devices(&[0x10_0000])).unwrap();
    assert!(space.asked.lock().unwrap().is_empty());
    let (space, off) = listener(0, Choice::Off);
    off.survey(&devices(&[0x10_0000, 0x20_0000])).unwrap();
    assert!(space.asked.lock().unwrap().is_empty() && said(&off).is_empty());
}

#[test]
fn bars_that_are_missed_for_one_reason_are_named_together() {
    let missed = [
        ("BAR 0 of a", "no"),
        ("BAR 0 of b", "far"),
        ("BAR 2 of a", "no"),
    ];
    let survey = Survey {
        missed: missed
            .map(|(name, reason)| (name.to_owned(), reason.to_owned()))
            .into(),
        reached: vec!["BAR 4 of a".to_owned()],
        ..Survey::default()
    };
    assert_eq!(
        survey.to_string(),
        "out of reach of the other devices are BAR 0 of a and BAR 2 of a (no); and BAR 0 of b \
         (far); in reach is BAR 4 of a"
    );
}

#[test]
fn a_bar_that_the_guest_places_out_of_reach_is_said_once_and_only_where_there_are_two_devices() {
    let (_, listener) = listener(0, Choice::Auto);
    listener.added(&bar("a", 0x1000)).unwrap();
    assert!(listener.peers().said.is_empty());
    let second = bar("b", 0x2000);
    listener.added(&second).unwrap();
    assert_eq!(listener.peers().said.len(), 1);
    listener.removed(&second);
}
