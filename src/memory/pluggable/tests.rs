//! Blocks that come and go before listeners that follow, refuse and count, and what the host has of them.

use std::collections::BTreeSet;

use super::*;
use crate::config::{HotplugMethod, MemoryConfig};
use crate::memory::{Ram, RegionError, RegionListener};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;

/// Follows blocks as a DMA space does: each is mapped by itself.
#[derive(Default)]
struct Mapped {
    /// The mapped blocks, by their first byte in the region.
    blocks: Mutex<BTreeSet<u64>>,
    /// Blocks that it does not map, and does not unmap.
    refused: Mutex<BTreeSet<u64>>,
    log: Mutex<Vec<String>>,
    /// The region's memory, of which a byte is looked at when a block goes.
    present: AtomicU64,
}

impl Mapped {
    fn refuse(&self, blocks: &[u64]) {
        *self.refused.lock().unwrap() = blocks.iter().map(|block| block * BLOCK).collect();
    }

    fn bytes(&self) -> u64 {
        self.blocks.lock().unwrap().len() as u64 * BLOCK
    }

    fn refuses(&self, bytes: &Range<u64>) -> bool {
        let refused = self.refused.lock().unwrap();
        refused.range(bytes.clone()).next().is_some()
    }

    fn note(&self, what: &str, bytes: &Range<u64>) {
        let (first, end) = (bytes.start / BLOCK, bytes.end / BLOCK);
        self.log
            .lock()
            .unwrap()
            .push(format!("{what}{first}..{end}"));
    }

    fn taken(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

impl RegionListener for Mapped {
    fn name(&self) -> &str {
        "DMA space"
    }

    fn added(&self, region: &Arc<Region>) -> Result<(), RegionError> {
        if let Some(blocks) = region.blocks() {
            for run in blocks.runs() {
                self.plugged(region, &blocks.bytes(&run))?;
            }
        }
        Ok(())
    }

    fn removed(&self, region: &Arc<Region>) {
        if region.blocks().is_some() {
            self.blocks.lock().unwrap().clear();
        }
    }

    fn plugged(&self, region: &Arc<Region>, bytes: &Range<u64>) -> Result<(), RegionError> {
        assert!(bytes.end <= region.size());
        if self.refuses(bytes) {
            self.note("!+", bytes);
            return Err("no more".into());
        }
        self.note("+", bytes);
        for at in bytes.clone().step_by(BLOCK as usize) {
            assert!(self.blocks.lock().unwrap().insert(at), "mapped twice");
        }
        Ok(())
    }

    fn unplugged(&self, _: &Arc<Region>, bytes: &Range<u64>) -> Result<(), RegionError> {
        if self.refuses(bytes) {
            self.note("!-", bytes);
            return Err("busy".into());
        }
        self.note("-", bytes);
        for at in bytes.clone().step_by(BLOCK as usize) {
            assert!(self.blocks.lock().unwrap().remove(&at), "was not mapped");
        }
        Ok(())
    }

    fn pins(&self) -> bool {
        self.present.load(Relaxed) == 0
    }
}

struct Memory {
    ram: Ram,
    regions: Arc<Regions>,
    pluggable: Pluggable,
    listener: Arc<Mapped>,
}

impl Memory {
    fn new(size: u64, shared: bool) -> Self {
        let config = MemoryConfig {
            size: 16 * MIB,
            shared,
            thp: false,
            hotplug_size: Some(size),
            hotplug_method: HotplugMethod::VirtioMem,
            ..MemoryConfig::default()
        };
        let ram = Ram::new(&config, false).unwrap();
        let regions = Arc::<Regions>::default();
        for region in ram.regions() {
            regions.add(region).unwrap();
        }
        let listener = Arc::<Mapped>::default();
        regions.listen(listener.clone()).unwrap();
        let (_, pluggable) = ram.pluggable(&regions).next().unwrap();
        Self {
            ram,
            regions,
            pluggable,
            listener,
        }
    }

    fn plug(&self, blocks: Range<u64>) -> Result<(), PlugError> {
        self.pluggable.plug(&blocks, || true)
    }

    fn unplug(&self, blocks: Range<u64>) -> Result<(), PlugError> {
        self.pluggable.unplug(&blocks, || true)
    }

    fn write(&self, block: u64, byte: u8) {
        let at = GuestAddress(self.pluggable.start() + block * BLOCK);
        self.ram.guest().memory().write_obj(byte, at).unwrap();
    }

    fn read(&self, block: u64) -> u8 {
        let at = GuestAddress(self.pluggable.start() + block * BLOCK);
        self.ram.guest().memory().read_obj(at).unwrap()
    }

    /// Bytes of the region that the host has given. mincore(2)
    fn resident(&self) -> u64 {
        let range = self.ram.host_ranges().last().unwrap().clone();
        let mut pages = vec![0_u8; range.len() / 4096];
        // SAFETY: the range is mapped, and there is a byte for each of its pages.
        let result =
            unsafe { libc::mincore(range.start as *mut _, range.len(), pages.as_mut_ptr()) };
        assert_eq!(result, 0);
        pages.iter().filter(|page| **page & 1 != 0).count() as u64 * 4096
    }
}

#[test]
fn what_can_be_plugged_is_ram_to_devices_of_busways_and_none_to_the_guests_map() {
    let memory = Memory::new(128 * MIB, false);
    let range = memory.ram.pluggable_ranges().remove(0);
    assert_eq!(
        (memory.ram.size(), range.end - range.start),
        (16 * MIB, 128 * MIB)
    );
    assert!(range.start >= 4 << 30 && range.start.is_multiple_of(2 << 30));
    assert!(
        memory
            .ram
            .guest_ranges()
            .iter()
            .all(|part| part.end <= range.start)
    );
    assert_eq!(
        (memory.pluggable.start(), memory.pluggable.size()),
        (range.start, 128 * MIB)
    );
    assert_eq!(memory.pluggable.block_size(), BLOCK);
    // Whatever is plugged, there is one region for back ends and the processors.
    assert_eq!(memory.ram.regions().count(), 2);
    assert_eq!(
        (memory.listener.bytes(), memory.pluggable.plugged()),
        (0, 0)
    );
}

#[test]
fn blocks_are_mapped_when_they_are_plugged_and_the_host_has_them_back_when_they_are_not() {
    for shared in [false, true] {
        let memory = Memory::new(128 * MIB, shared);
        memory.plug(3..7).unwrap();
        assert_eq!(memory.listener.bytes(), 4 * BLOCK);
        assert_eq!(memory.pluggable.plugged(), 4 * BLOCK);
        (3..7).for_each(|block| memory.write(block, 7));
        assert_eq!(memory.resident(), 4 * 4096, "{shared}");
        memory.unplug(4..6).unwrap();
        assert_eq!(memory.listener.bytes(), memory.pluggable.plugged());
        assert_eq!(memory.resident(), 2 * 4096, "{shared}");
        assert_eq!([3, 4, 6].map(|block| memory.read(block)), [7, 0, 7]);
        memory.pluggable.unplug_all(|| true).unwrap();
        assert_eq!(
            (memory.listener.bytes(), memory.pluggable.plugged()),
            (0, 0)
        );
        // The zero page that was read is no memory of the host's own, but counts as present.
        assert!(memory.resident() <= 4096, "{shared}");
        assert_eq!(memory.read(3), 0);
    }
}

#[test]
fn a_plug_that_is_refused_or_stopped_leaves_nothing_and_an_unplug_leaves_all() {
    // Steps are of 64 blocks.
    let memory = Memory::new(512 * MIB, false);
    memory.listener.refuse(&[130]);
    let refused = memory.plug(0..200).unwrap_err();
    assert!(refused.to_string().contains("no more"), "{refused}");
    let log = memory.listener.taken();
    assert_eq!(
        log,
        ["+0..64", "+64..128", "!+128..192", "-0..64", "-64..128"]
    );
    assert_eq!(
        (memory.listener.bytes(), memory.pluggable.plugged()),
        (0, 0)
    );
    memory.listener.refuse(&[]);
    let looks = AtomicU64::new(0);
    let twice = || looks.fetch_add(1, Relaxed) < 2;
    let stopped = memory.pluggable.plug(&(0..200), twice).unwrap_err();
    assert!(matches!(stopped, PlugError::Stopped));
    assert_eq!(
        (memory.listener.bytes(), memory.pluggable.plugged()),
        (0, 0)
    );
    memory.plug(0..200).unwrap();
    memory.listener.refuse(&[130]);
    memory.unplug(0..200).unwrap_err();
    assert_eq!(memory.listener.bytes(), 200 * BLOCK);
    assert_eq!(memory.pluggable.plugged(), 200 * BLOCK);
    // What can go goes, as a guest that asks again is better off with less.
    memory.pluggable.unplug_all(|| true).unwrap_err();
    assert_eq!(memory.listener.bytes(), memory.pluggable.plugged());
    assert_eq!(memory.pluggable.state(&(0..128)), Plugged::None);
    memory.listener.refuse(&[]);
    memory.pluggable.unplug_all(|| true).unwrap();
    assert_eq!(memory.listener.bytes(), 0);
}

#[test]
fn all_listeners_are_as_before_where_one_of_them_refuses() {
    let memory = Memory::new(128 * MIB, false);
    let other = Arc::<Mapped>::default();
    memory.regions.listen(other.clone()).unwrap();
    other.refuse(&[1]);
    memory.plug(0..2).unwrap_err();
    assert_eq!(memory.listener.taken(), ["+0..2", "-0..2"]);
    assert_eq!((memory.listener.bytes(), other.bytes()), (0, 0));
    other.refuse(&[]);
    memory.plug(0..2).unwrap();
    memory.listener.refuse(&[1]);
    other.taken();
    memory.unplug(0..2).unwrap_err();
    // The last one hears first, and of its return.
    assert_eq!(other.taken(), ["-0..2", "+0..2"]);
    assert_eq!(
        (memory.listener.bytes(), other.bytes()),
        (2 * BLOCK, 2 * BLOCK)
    );
}

#[test]
fn a_space_that_comes_later_has_what_is_plugged_then_and_one_that_leaves_has_nothing() {
    let memory = Memory::new(128 * MIB, false);
    memory.plug(5..9).unwrap();
    let late = Arc::<Mapped>::default();
    let listener: Arc<dyn RegionListener> = late.clone();
    memory.regions.listen(listener.clone()).unwrap();
    assert_eq!(late.bytes(), 4 * BLOCK);
    memory.unplug(5..6).unwrap();
    assert_eq!(late.bytes(), 3 * BLOCK);
    memory.regions.forget(&listener);
    assert_eq!(late.bytes(), 0);
    memory.plug(20..21).unwrap();
    assert_eq!((late.bytes(), memory.listener.bytes()), (0, 4 * BLOCK));
}

#[test]
fn memory_is_populated_when_it_is_plugged_where_that_was_asked_for() {
    let config = MemoryConfig {
        size: 16 * MIB,
        thp: false,
        prefault: Some(true),
        hotplug_size: Some(128 * MIB),
        hotplug_method: HotplugMethod::VirtioMem,
        ..MemoryConfig::default()
    };
    let ram = Ram::new(&config, false).unwrap();
    let regions = Arc::<Regions>::default();
    ram.regions()
        .for_each(|region| regions.add(region).unwrap());
    let (_, pluggable) = ram.pluggable(&regions).next().unwrap();
    let memory = Memory {
        pluggable,
        ram,
        regions,
        listener: Arc::default(),
    };
    memory.plug(1..3).unwrap();
    assert_eq!(memory.resident(), 2 * BLOCK);
    memory.unplug(1..3).unwrap();
    assert_eq!(memory.resident(), 0);
}

#[derive(Clone, Debug)]
enum Step {
    Plug(u64, u64),
    Unplug(u64, u64),
    UnplugAll,
    Refuse(Vec<u64>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0_u64..70, 1_u64..70);
    let step = prop_oneof![
        4 => range().prop_map(|(at, count)| Step::Plug(at, count)),
        3 => range().prop_map(|(at, count)| Step::Unplug(at, count)),
        1 => Just(Step::UnplugAll),
        1 => prop::collection::vec(0_u64..64, 0..2).prop_map(Step::Refuse),
    ];
    prop::collection::vec(step, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is asked for and refused, the bytes that are mapped are the bytes that are plugged, block by block, and
    /// what was written to a block is there for as long as it is plugged.
    #[test]
    fn mapped_bytes_are_plugged_bytes_after_any_sequence(steps in steps()) {
        let memory = Memory::new(128 * MIB, false);
        let mut model = [false; 64];
        for step in steps {
            match step {
                Step::Refuse(blocks) => memory.listener.refuse(&blocks),
                Step::UnplugAll => {
                    let refused = memory.listener.refused.lock().unwrap().clone();
                    let done = memory.pluggable.unplug_all(|| true);
                    let stays = refused.iter().any(|at| model[(at / BLOCK) as usize]);
                    prop_assert_eq!(done.is_err(), stays);
                    for (block, flag) in model.iter_mut().enumerate() {
                        *flag = memory.pluggable.state(&(block as u64..block as u64 + 1)) == Plugged::All && *flag;
                    }
                }
                Step::Plug(at, count) => {
                    let address = memory.pluggable.start() + at * BLOCK;
                    let range = memory.pluggable.range(address, count);
                    prop_assert_eq!(range.is_some(), at + count <= 64);
                    let Some(range) = range else { continue };
                    let span = range.start as usize..range.end as usize;
                    if memory.pluggable.state(&range) != Plugged::None {
                        prop_assert!(model[span].contains(&true));
                        continue;
                    }
                    if memory.plug(range.clone()).is_ok() {
                        model[span].fill(true);
                        range.for_each(|block| memory.write(block, block as u8 + 1));
                    }
                }
                Step::Unplug(at, count) => {
                    let address = memory.pluggable.start() + at * BLOCK;
                    let Some(range) = memory.pluggable.range(address, count) else { continue };
                    if memory.pluggable.state(&range) != Plugged::All {
                        continue;
                    }
                    if memory.unplug(range.clone()).is_ok() {
                        model[range.start as usize..range.end as usize].fill(false);
                    }
                }
            }
            let mapped: Vec<_> = memory.listener.blocks.lock().unwrap().iter().map(|at| at / BLOCK).collect();
            let plugged: Vec<_> = (0..64_u64).filter(|block| model[*block as usize]).collect();
            prop_assert_eq!(&mapped, &plugged);
            prop_assert_eq!(memory.pluggable.plugged(), plugged.len() as u64 * BLOCK);
            for block in 0..64 {
                let expected = if model[block as usize] { block as u8 + 1 } else { 0 };
                prop_assert_eq!(memory.read(block), expected);
            }
        }
    }
}
