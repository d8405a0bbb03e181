//! Pages that come and go before a listener that pins blocks, refuses and counts, and what the host has of them.

use std::collections::BTreeSet;

use super::*;
use crate::config::MemoryConfig;
use crate::memory::{Ram, RegionError, RegionListener};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
const COUNT: u64 = 8;
/// Pages of a block.
const PAGES: u64 = BLOCK / PAGE;

/// As a DMA space: each block is mapped by itself.
#[derive(Default)]
struct Dma {
    mapped: Mutex<BTreeSet<u64>>,
    refused: Mutex<BTreeSet<u64>>,
    log: Mutex<Vec<String>>,
}

impl Dma {
    fn refuse(&self, blocks: &[u64]) {
        *self.refused.lock().unwrap() = blocks.iter().copied().collect();
    }

    fn step(&self, what: &str, bytes: &Range<u64>) -> Result<u64, RegionError> {
        let block = bytes.start / BLOCK;
        assert_eq!(*bytes, block * BLOCK..(block + 1) * BLOCK, "one block");
        let refuses = self.refused.lock().unwrap().contains(&block);
        let mut log = self.log.lock().unwrap();
        log.push(format!("{}{what}{block}", if refuses { "!" } else { "" }));
        if refuses {
            return Err("no more".into());
        }
        Ok(block)
    }

    fn taken(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    fn all(&self) -> BTreeSet<u64> {
        self.mapped.lock().unwrap().clone()
    }
}

impl RegionListener for Dma {
    fn name(&self) -> &str {
        "DMA space"
    }

    fn added(&self, region: &Arc<Region>) -> Result<(), RegionError> {
        let blocks = region.blocks().expect("in blocks");
        let mapped = (0..blocks.count()).filter(|block| blocks.is_plugged(*block));
        *self.mapped.lock().unwrap() = mapped.collect();
        Ok(())
    }

    fn removed(&self, _: &Arc<Region>) {
        self.mapped.lock().unwrap().clear();
    }

    fn plugged(&self, _: &Arc<Region>, bytes: &Range<u64>) -> Result<(), RegionError> {
        let block = self.step("+", bytes)?;
        assert!(self.mapped.lock().unwrap().insert(block), "mapped twice");
        Ok(())
    }

    fn unplugged(&self, _: &Arc<Region>, bytes: &Range<u64>) -> Result<(), RegionError> {
        let block = self.step("-", bytes)?;
        assert!(self.mapped.lock().unwrap().remove(&block), "was not mapped");
        Ok(())
    }

    fn pins(&self) -> bool {
        true
    }
}

struct Guest {
    ram: Ram,
    regions: Arc<Regions>,
    ballooned: Ballooned,
    dma: Arc<Dma>,
}

impl Guest {
    fn new(shared: bool) -> Self {
        let config = MemoryConfig {
            size: COUNT * BLOCK + 3 * PAGE,
            shared,
            thp: false,
            ..MemoryConfig::default()
        };
        let mut ram = Ram::new(&config, false).unwrap();
        ram.split(BLOCK);
        let regions = Arc::<Regions>::default();
        for region in ram.regions() {
            regions.add(region).unwrap();
        }
        let dma = Arc::<Dma>::default();
        regions.listen(dma.clone()).unwrap();
        Self {
            ballooned: ram.ballooned(&regions).unwrap(),
            ram,
            regions,
            dma,
        }
    }

    fn take(&self, pages: Range<u64>) {
        self.ballooned.taken(&bytes(&pages), || true);
    }

    fn give(&self, pages: Range<u64>) -> Result<(), ReturnError> {
        self.ballooned.returned(&bytes(&pages), || true)
    }

    fn write(&self, address: u64, byte: u8) {
        let memory = self.ram.guest().memory();
        memory.write_obj(byte, GuestAddress(address)).unwrap();
    }

    fn read(&self, address: u64) -> u8 {
        let memory = self.ram.guest().memory();
        memory.read_obj(GuestAddress(address)).unwrap()
    }
}

fn bytes(pages: &Range<u64>) -> Range<u64> {
    pages.start * PAGE..pages.end * PAGE
}

#[test]
fn a_block_goes_when_all_of_it_is_in_the_balloon_and_comes_back_before_its_first_page_is_used() {
    for shared in [false, true] {
        let guest = Guest::new(shared);
        let at = 3 * BLOCK;
        for offset in [0, PAGE, BLOCK - 1, BLOCK] {
            guest.write(at + offset, 7);
        }
        guest.take(3 * PAGES..4 * PAGES - 1);
        assert_eq!(guest.dma.taken(), [""; 0], "one page is missing");
        assert_eq!(guest.read(at), 7);
        guest.take(4 * PAGES - 1..4 * PAGES);
        assert_eq!(guest.dma.taken(), ["-3"]);
        assert_eq!(guest.ballooned.unmapped(), BLOCK);
        assert_eq!(guest.regions.discards().given(), BLOCK);
        for offset in [0, PAGE, BLOCK - 1] {
            assert_eq!(guest.read(at + offset), 0, "the host has had it: {shared}");
        }
        assert_eq!(guest.read(at + BLOCK), 7);
        // The same pages again are nothing new.
        guest.take(3 * PAGES..4 * PAGES);
        assert_eq!(guest.dma.taken(), [""; 0]);
        guest.give(3 * PAGES + 5..3 * PAGES + 6).unwrap();
        assert_eq!(guest.dma.taken(), ["+3"]);
        assert_eq!(guest.ballooned.unmapped(), 0);
        guest.give(3 * PAGES..4 * PAGES).unwrap();
        assert_eq!(guest.dma.taken(), [""; 0]);
        assert_eq!(guest.ballooned.failures(), 0);
    }
}

#[test]
fn a_block_that_cannot_be_unmapped_stays_with_what_is_in_it_and_is_counted() {
    let guest = Guest::new(false);
    guest.write(BLOCK, 7);
    guest.dma.refuse(&[1]);
    guest.take(PAGES..3 * PAGES);
    assert_eq!(guest.dma.taken(), ["!-1", "-2"]);
    assert_eq!((guest.read(BLOCK), guest.ballooned.failures()), (7, 1));
    assert_eq!(guest.ballooned.unmapped(), BLOCK);
    // Its pages are the guest's at once, and it goes when they are taken again.
    guest.give(PAGES..PAGES + 1).unwrap();
    guest.dma.refuse(&[]);
    guest.take(PAGES..PAGES + 1);
    assert_eq!(guest.dma.taken(), ["-1"]);
    assert_eq!(guest.read(BLOCK), 0);
}

#[test]
fn pages_wait_while_their_block_cannot_be_mapped_and_come_when_it_can() {
    let guest = Guest::new(false);
    guest.take(0..3 * PAGES);
    guest.dma.refuse(&[1]);
    guest.dma.taken();
    let waits = guest.give(PAGES - 1..2 * PAGES + 1);
    assert!(matches!(waits, Err(ReturnError::Map(_))), "{waits:?}");
    assert_eq!(guest.dma.taken(), ["+0", "!+1"]);
    assert_eq!(guest.ballooned.failures(), 1);
    let stopped = guest
        .ballooned
        .returned(&bytes(&(PAGES..PAGES + 1)), || false);
    assert!(matches!(stopped, Err(ReturnError::Stopped)), "{stopped:?}");
    assert_eq!(guest.dma.taken(), [""; 0]);
    guest.dma.refuse(&[]);
    guest.give(PAGES - 1..2 * PAGES + 1).unwrap();
    assert_eq!(guest.dma.taken(), ["+1", "+2"]);
    assert_eq!(guest.ballooned.unmapped(), 0);
}

#[test]
fn who_begins_anew_has_all_blocks_and_those_that_cannot_be_mapped_are_said() {
    let guest = Guest::new(false);
    guest.take(0..4 * PAGES + 7);
    guest.dma.refuse(&[2]);
    assert!(guest.ballooned.all_returned().is_err());
    assert_eq!(guest.ballooned.unmapped(), BLOCK);
    guest.dma.refuse(&[]);
    guest.ballooned.all_returned().unwrap();
    assert_eq!(guest.dma.all(), (0..COUNT).collect());
    assert_eq!(guest.ballooned.unmapped(), 0);
    // Nothing of it is in the balloon any more.
    guest.dma.taken();
    guest.take(4 * PAGES + 7..5 * PAGES);
    assert_eq!(guest.dma.taken(), [""; 0]);
}

#[test]
fn a_device_that_comes_later_reaches_all_but_the_blocks_that_are_gone() {
    let guest = Guest::new(false);
    let listener: Arc<dyn RegionListener> = guest.dma.clone();
    guest.regions.forget(&listener);
    guest.take(PAGES..3 * PAGES);
    assert_eq!(guest.ballooned.unmapped(), 2 * BLOCK);
    let later = Arc::<Dma>::default();
    guest.regions.listen(later.clone()).unwrap();
    assert_eq!(
        later.all(),
        (0..COUNT).filter(|it| *it != 1 && *it != 2).collect()
    );
    assert_eq!(guest.regions.discards().given(), 2 * BLOCK);
    guest.give(PAGES..PAGES + 1).unwrap();
    assert_eq!(later.taken(), ["+1"]);
}

#[test]
fn what_lies_behind_the_last_whole_block_stays() {
    let guest = Guest::new(false);
    guest.write(COUNT * BLOCK, 7);
    guest.take(COUNT * PAGES..COUNT * PAGES + 3);
    guest.take(1 << 40..(1 << 40) + 5);
    guest.ballooned.taken(&(u64::MAX - 5..u64::MAX), || true);
    let (first, end) = (9, 3);
    guest.ballooned.taken(&(first..end), || true);
    guest.give(COUNT * PAGES..1 << 40).unwrap();
    assert_eq!(guest.dma.taken(), [""; 0]);
    assert_eq!(guest.read(COUNT * BLOCK), 7);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Against a flag for each page: no block is out of devices' reach of which a page is the guest's.
    #[test]
    fn devices_reach_each_page_that_is_the_guests(
        steps in prop::collection::vec(
            (any::<bool>(), 0_u64..COUNT * PAGES, 0_u64..2 * PAGES, prop::collection::vec(0_u64..COUNT, 0..3)),
            1..40,
        ),
    ) {
        let guest = Guest::new(false);
        let mut model = vec![false; (COUNT * PAGES) as usize];
        for (takes, first, count, refused) in steps {
            guest.dma.refuse(&refused);
            let end = (first + count).min(COUNT * PAGES);
            let span = first as usize..end as usize;
            if takes {
                guest.take(first..end);
                model[span].fill(true);
            } else {
                match guest.give(first..end) {
                    Ok(()) => model[span].fill(false),
                    // Those before the block that could not be mapped are the guest's, which has not heard of it.
                    Err(_) => {
                        let mapped = guest.dma.all();
                        let stuck = (first / PAGES..COUNT).find(|block| !mapped.contains(block));
                        let until = (stuck.unwrap() * PAGES).max(first) as usize;
                        model[span.start..until.min(span.end)].fill(false);
                    }
                }
            }
            let mapped = guest.dma.all();
            for (block, pages) in (0..).zip(model.chunks(PAGES as usize)) {
                if pages.contains(&false) {
                    prop_assert!(mapped.contains(&block), "{block}");
                }
            }
            let unmapped = (COUNT - mapped.len() as u64) * BLOCK;
            prop_assert_eq!(guest.ballooned.unmapped(), unmapped);
        }
        guest.dma.refuse(&[]);
        guest.ballooned.all_returned().unwrap();
        prop_assert_eq!(guest.dma.all(), (0..COUNT).collect());
    }
}
