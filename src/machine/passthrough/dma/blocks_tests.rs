//! RAM that comes and goes by blocks, in a DMA space that keeps the kernel's rules: no part of a mapping is unmapped, and
//! there is a limit of mappings.

use busway_iommu::{DmaMapping, IovaRange, MapError, OpenDmaBuf, Stats, Tracker};
use proptest::prelude::*;

use super::*;
use crate::config::{HotplugMethod, MemoryConfig, MemoryZoneConfig};
use crate::machine::pluggable::{PluggableError, check_reach};
use crate::memory::{Pluggable, Plugged, Ram, Regions};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
const COUNT: u64 = 64;

/// What the kernel would have mapped.
#[derive(Debug)]
struct Kernel {
    tracker: Mutex<Tracker>,
    most: usize,
    reach: u64,
}

impl Kernel {
    fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            tracker: Mutex::default(),
            most,
            reach: u64::MAX,
        })
    }

    fn bytes(&self) -> u64 {
        self.tracker.lock().unwrap().bytes()
    }

    fn count(&self) -> usize {
        self.tracker.lock().unwrap().count()
    }

    /// The addresses that are mapped, each block by itself.
    fn all(&self) -> Vec<(u64, u64)> {
        let tracker = self.tracker.lock().unwrap();
        tracker.iter().map(|one| (one.iova.0, one.size)).collect()
    }
}

impl DmaSpace for Kernel {
    fn add(&self, mapping: DmaMapping, _: &OpenDmaBuf<'_>) -> Result<(), MapError> {
        let mut tracker = self.tracker.lock().unwrap();
        if tracker.count() >= self.most {
            let (needed, left, made) = (1, 0, tracker.count() as u64);
            let owner = mapping.owner;
            return Err(MapError::TooMany {
                owner,
                needed,
                left,
                made,
            });
        }
        tracker.insert(mapping)
    }

    fn unmap(&self, iova: Iova, size: u64) -> Result<(), MapError> {
        self.tracker.lock().unwrap().remove(iova, size)
    }

    fn room(&self) -> Option<u64> {
        Some((self.most - self.count()) as u64)
    }

    fn usable_ranges(&self) -> Result<Vec<IovaRange>, MapError> {
        let last = self.reach;
        Ok(vec![IovaRange { start: 0, last }])
    }

    fn stats(&self) -> Stats {
        Stats::default()
    }
}

struct Guest {
    ram: Ram,
    regions: Arc<Regions>,
    pluggable: Pluggable,
}

impl Guest {
    fn new() -> Self {
        let config = MemoryConfig {
            size: 16 * MIB,
            thp: false,
            hotplug_size: Some(COUNT * BLOCK),
            hotplug_method: HotplugMethod::VirtioMem,
            ..MemoryConfig::default()
        };
        let ram = Ram::new(&config, false).unwrap();
        let regions = Arc::<Regions>::default();
        for region in ram.regions() {
            regions.add(region).unwrap();
        }
        let (_, pluggable) = ram.pluggable(&regions).next().unwrap();
        Self {
            ram,
            regions,
            pluggable,
        }
    }

    fn listen(&self, kernel: &Arc<Kernel>) -> Result<Arc<dyn RegionListener>, String> {
        let listener: Arc<dyn RegionListener> =
            Arc::new(DmaListener::new(kernel.clone(), Choice::Auto));
        let listening = self.regions.listen(listener.clone());
        listening.map_err(|error| error.to_string())?;
        Ok(listener)
    }

    fn plugged(&self) -> Vec<(u64, u64)> {
        let is_plugged = |block: &u64| self.pluggable.state(&(*block..*block + 1)) == Plugged::All;
        let at = |block| (self.pluggable.start() + block * BLOCK, BLOCK);
        (0..COUNT).filter(is_plugged).map(at).collect()
    }
}

#[test]
fn each_block_is_a_mapping_of_its_own_and_nothing_else_of_the_region_is_mapped() {
    let guest = Guest::new();
    let kernel = Kernel::new(1000);
    let listener = guest.listen(&kernel).unwrap();
    let before = kernel.all();
    assert_eq!(kernel.bytes(), 16 * MIB);
    guest.pluggable.plug(&(1..4), || true).unwrap();
    assert_eq!(kernel.bytes(), 16 * MIB + 3 * BLOCK);
    assert_eq!(kernel.count(), before.len() + 3);
    guest.pluggable.unplug(&(2..3), || true).unwrap();
    assert_eq!(kernel.all()[before.len()..], guest.plugged());
    // Another device's space has the same, and loses it without any effect on this one.
    let other = Kernel::new(1000);
    let late = guest.listen(&other).unwrap();
    assert_eq!(other.all(), kernel.all());
    guest.regions.forget(&late);
    assert_eq!((other.count(), kernel.bytes()), (0, 16 * MIB + 2 * BLOCK));
    guest.pluggable.unplug_all(|| true).unwrap();
    assert_eq!(kernel.all(), before);
    guest.regions.forget(&listener);
    assert_eq!(kernel.count(), 0);
}

#[test]
fn a_space_without_room_for_all_blocks_is_refused_with_its_figures_and_one_in_reach_is_not() {
    let guest = Guest::new();
    let pieces = guest.regions.pluggable();
    let range = guest.ram.pluggable_ranges().remove(0);
    assert_eq!(
        pieces.iter().map(|(range, _)| range).collect::<Vec<_>>(),
        [&range]
    );
    let check = |kernel: &Kernel| check_reach(&pieces, kernel);
    assert_eq!(check(&Kernel::new(COUNT as usize + 256)), Ok(()));
    let few = check(&Kernel::new(COUNT as usize + 255)).unwrap_err();
    let expected = PluggableError::Mappings {
        needed: COUNT,
        left: COUNT + 255,
        block: BLOCK,
    };
    assert_eq!(few, expected);
    assert!(few.to_string().contains("dma_entry_limit"), "{few}");
    let short = Kernel {
        tracker: Mutex::default(),
        most: 1000,
        reach: range.start + BLOCK - 1,
    };
    let gap = range.start + BLOCK;
    assert_eq!(check(&short), Err(PluggableError::Reach { range, gap }));
}

#[test]
fn blocks_of_all_zones_together_have_room_and_each_of_them_is_in_reach() {
    const MORE: u64 = 128 * MIB;
    let zone = |id: &str| MemoryZoneConfig {
        hotplug_size: Some(MORE),
        ..MemoryZoneConfig::new(id, 16 * MIB)
    };
    let config = MemoryConfig {
        size: 32 * MIB,
        thp: false,
        hotplug_method: HotplugMethod::VirtioMem,
        ..MemoryConfig::default()
    };
    let ram = Ram::around(&config, &[zone("a"), zone("b")], false, 3 << 30, &[]).unwrap();
    let regions = Arc::<Regions>::default();
    for region in ram.regions() {
        regions.add(region).unwrap();
    }
    let (blocks, ranges) = (2 * MORE / BLOCK, ram.pluggable_ranges());
    let pieces = || regions.pluggable();
    let check = |kernel: &Kernel| check_reach(&pieces(), kernel);
    assert_eq!(check(&Kernel::new(blocks as usize + 256)), Ok(()));
    let few = check(&Kernel::new(blocks as usize + 255)).unwrap_err();
    assert!(
        matches!(few, PluggableError::Mappings { needed, .. } if needed == blocks),
        "{few}"
    );
    let short = Kernel {
        tracker: Mutex::default(),
        most: 1000,
        reach: ranges[1].start - 1,
    };
    let (range, gap) = (ranges[1].clone(), ranges[1].start);
    assert_eq!(check(&short), Err(PluggableError::Reach { range, gap }));
    // What is plugged is mapped by now, each block by itself.
    let kernel = Kernel::new(1000);
    let listener: Arc<dyn RegionListener> =
        Arc::new(DmaListener::new(kernel.clone(), Choice::Auto));
    regions.listen(listener).unwrap();
    let before = kernel.count();
    for (zone, pluggable) in ram.pluggable(&regions) {
        pluggable.plug(&(0..8), || true).unwrap();
        assert_eq!(pluggable.plugged(), 8 * BLOCK, "{zone:?}");
    }
    assert_eq!(kernel.count(), before + 16);
    assert_eq!(kernel.bytes(), 32 * MIB + 16 * BLOCK);
    assert_eq!(check(&Kernel::new(blocks as usize + 240)), Ok(()));
}

#[test]
fn a_space_that_fills_up_in_the_middle_of_a_plug_has_what_it_had() {
    let guest = Guest::new();
    let kernel = Kernel::new(10);
    let _listener = guest.listen(&kernel).unwrap();
    guest.pluggable.plug(&(0..4), || true).unwrap();
    let before = kernel.all();
    guest.pluggable.plug(&(4..20), || true).unwrap_err();
    assert_eq!((kernel.all(), guest.plugged().len()), (before, 4));
    // A device that comes then finds that there is no room for it, and leaves nothing.
    let small = Kernel::new(3);
    assert!(guest.listen(&small).is_err());
    assert_eq!(small.count(), 0);
}

#[test]
fn ram_in_blocks_is_mapped_by_blocks_with_its_rest_and_each_goes_and_comes_by_itself() {
    let config = MemoryConfig {
        size: 8 * BLOCK + 0x3000,
        thp: false,
        ..MemoryConfig::default()
    };
    let mut ram = Ram::new(&config, false).unwrap();
    ram.split(BLOCK);
    let regions = Arc::<Regions>::default();
    for region in ram.regions() {
        regions.add(region).unwrap();
    }
    let ballooned = ram.ballooned(&regions).unwrap();
    assert!(regions.pluggable().is_empty(), "none of it comes later");
    let kernel = Kernel::new(1000);
    let listen = |kernel: &Arc<Kernel>| {
        let listener: Arc<dyn RegionListener> =
            Arc::new(DmaListener::new(kernel.clone(), Choice::Auto));
        regions.listen(listener.clone()).map(|()| listener)
    };
    let listener = listen(&kernel).unwrap();
    let all = kernel.all();
    assert_eq!((kernel.count(), kernel.bytes()), (9, 8 * BLOCK + 0x3000));
    ballooned.taken(&(BLOCK..3 * BLOCK), || true);
    let without: Vec<_> = [&all[..1], &all[3..]].concat();
    assert_eq!(kernel.all(), without);
    let other = Kernel::new(1000);
    let late = listen(&other).unwrap();
    assert_eq!(other.all(), without);
    regions.forget(&late);
    assert_eq!(other.count(), 0);
    ballooned.returned(&(BLOCK..BLOCK + 1), || true).unwrap();
    assert_eq!(kernel.all(), without, "no whole page");
    ballooned
        .returned(&(BLOCK..BLOCK + 0x1000), || true)
        .unwrap();
    assert_eq!(kernel.bytes(), 7 * BLOCK + 0x3000);
    ballooned.all_returned().unwrap();
    assert_eq!(kernel.all(), all);
    // Nothing but the rest is mapped.
    ballooned.taken(&(0..8 * BLOCK), || true);
    assert_eq!(kernel.all(), [(8 * BLOCK, 0x3000)]);
    regions.forget(&listener);
    assert_eq!(kernel.count(), 0);
    // A space without room for the rest keeps nothing.
    ballooned.all_returned().unwrap();
    let small = Kernel::new(8);
    assert!(listen(&small).is_err());
    assert_eq!(small.count(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Bytes that are mapped are bytes that are plugged, and each block has a mapping, whatever comes.
    #[test]
    fn mapped_is_what_is_plugged_after_any_requests(
        most in 2_usize..80,
        steps in prop::collection::vec((any::<bool>(), 0_u64..COUNT, 1_u64..COUNT), 1..30),
    ) {
        let guest = Guest::new();
        let kernel = Kernel::new(most);
        let Ok(_listener) = guest.listen(&kernel) else {
            return Ok(());
        };
        let ram = kernel.all();
        for (plug, at, count) in steps {
            let address = guest.pluggable.start() + at * BLOCK;
            let Some(range) = guest.pluggable.range(address, count) else { continue };
            let full = kernel.count() + count as usize > most;
            let done = match (plug, guest.pluggable.state(&range)) {
                (true, Plugged::None) => {
                    let done = guest.pluggable.plug(&range, || true);
                    prop_assert_eq!(done.is_err(), full);
                    done
                }
                (false, Plugged::All) => guest.pluggable.unplug(&range, || true),
                _ => continue,
            };
            prop_assert!(done.is_ok() || plug);
            let plugged = guest.plugged();
            prop_assert_eq!(&kernel.all()[ram.len()..], &plugged[..]);
            prop_assert_eq!(kernel.bytes(), 16 * MIB + guest.pluggable.plugged());
        }
    }
}
