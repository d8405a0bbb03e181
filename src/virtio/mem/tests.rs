//! A memory device with the driver of the tests: its requests beside a model, and what comes of resets and pauses.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Mutex;

use super::*;
use crate::config::{HotplugMethod, MemoryConfig};
use crate::memory::{Ram, Region, RegionError, RegionListener, Regions};
use crate::virtio::testing::{Driver, Ring};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
const REGION: u64 = 128 * MIB;
const COUNT: u64 = REGION / BLOCK;
/// The guest's node that the memory is of.
const NODE: u16 = 0x102;

/// A DMA space that counts what is mapped, and can be full.
#[derive(Default)]
struct Space {
    mapped: Mutex<BTreeSet<u64>>,
    full: Mutex<bool>,
}

impl RegionListener for Space {
    fn name(&self) -> &str {
        "a DMA space"
    }

    fn added(&self, _region: &Arc<Region>) -> Result<(), RegionError> {
        Ok(())
    }

    fn removed(&self, _region: &Arc<Region>) {}

    fn plugged(&self, _region: &Arc<Region>, bytes: &Range<u64>) -> Result<(), RegionError> {
        if *self.full.lock().unwrap() {
            return Err("it is full".into());
        }
        let mut mapped = self.mapped.lock().unwrap();
        for at in bytes.clone().step_by(BLOCK as usize) {
            assert!(mapped.insert(at));
        }
        Ok(())
    }

    fn unplugged(&self, _region: &Arc<Region>, bytes: &Range<u64>) -> Result<(), RegionError> {
        let mut mapped = self.mapped.lock().unwrap();
        for at in bytes.clone().step_by(BLOCK as usize) {
            assert!(mapped.remove(&at));
        }
        Ok(())
    }

    fn pins(&self) -> bool {
        true
    }
}

struct Guest {
    driver: Driver,
    requests: Ring,
    target: MemTarget,
    space: Arc<Space>,
    start: u64,
    buffers: u64,
    _ram: Ram,
}

impl Guest {
    fn new(requested: u64) -> Self {
        let config = MemoryConfig {
            size: 16 * MIB,
            thp: false,
            hotplug_size: Some(REGION),
            hotplug_method: HotplugMethod::VirtioMem,
            ..MemoryConfig::default()
        };
        let ram = Ram::new(&config, false).unwrap();
        let regions = Arc::<Regions>::default();
        ram.regions()
            .for_each(|region| regions.add(region).unwrap());
        let space = Arc::<Space>::default();
        regions.listen(space.clone()).unwrap();
        let (_, pluggable) = ram.pluggable(&regions).next().unwrap();
        let start = pluggable.start();
        let device = Mem::new("memory", pluggable, requested, NODE).unwrap();
        let target = device.target();
        let mut driver = Driver::with_ram(device, ram.guest().clone());
        let features = driver.negotiate(!spec::feature::EVENT_IDX);
        assert!(features & mem::F_UNPLUGGED_INACCESSIBLE != 0);
        let requests = driver.queue(0, 16);
        let buffers = driver.alloc(4096);
        driver.ready();
        Self {
            driver,
            requests,
            target,
            space,
            start,
            buffers,
            _ram: ram,
        }
    }

    /// Makes a request of `len` bytes; gives the response and the state.
    fn ask_with(&mut self, kind: u16, address: u64, blocks: u16, len: u32) -> (u16, u16) {
        let mut bytes = [0; mem::REQUEST_SIZE];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
        self.driver.write(self.buffers, &bytes);
        let response = self.buffers + 64;
        self.driver.write(response, &[0xff; mem::RESPONSE_SIZE]);
        let chain = [(self.buffers, len, false), (response, 10, true)];
        let written = self.driver.run(&mut self.requests, &chain);
        assert_eq!(written, mem::RESPONSE_SIZE as u32);
        let answer = self.driver.read(response, mem::RESPONSE_SIZE);
        let number = |at: usize| u16::from_le_bytes([answer[at], answer[at + 1]]);
        (number(0), number(8))
    }

    fn ask(&mut self, kind: u16, block: u64, blocks: u16) -> u16 {
        let address = self.start + block * BLOCK;
        self.ask_with(kind, address, blocks, mem::REQUEST_SIZE as u32)
            .0
    }

    fn state(&mut self, block: u64, blocks: u16) -> (u16, u16) {
        let address = self.start + block * BLOCK;
        self.ask_with(mem::REQ_STATE, address, blocks, mem::REQUEST_SIZE as u32)
    }

    fn config(&self, offset: usize) -> u64 {
        let at = self.driver.device + offset as u64;
        u64::from_le_bytes(self.driver.bar_read(at))
    }

    fn plugged(&self) -> u64 {
        let plugged = self.config(mem::CONFIG_PLUGGED_SIZE);
        let mapped = self.space.mapped.lock().unwrap().len() as u64 * BLOCK;
        assert_eq!((plugged, mapped), (self.target.totals().plugged, plugged));
        plugged
    }
}

#[test]
fn the_configuration_says_where_memory_can_be_and_how_much_is_wanted() {
    let guest = Guest::new(4 * BLOCK);
    let config = [
        (mem::CONFIG_BLOCK_SIZE, BLOCK),
        (mem::CONFIG_ADDR, guest.start),
        (mem::CONFIG_REGION_SIZE, REGION),
        (mem::CONFIG_USABLE_REGION_SIZE, REGION),
        (mem::CONFIG_PLUGGED_SIZE, 0),
        (mem::CONFIG_REQUESTED_SIZE, 4 * BLOCK),
    ];
    for (offset, value) in config {
        assert_eq!(guest.config(offset), value, "{offset}");
    }
    let node = guest.driver.device + mem::CONFIG_NODE_ID as u64;
    assert_eq!(u16::from_le_bytes(guest.driver.bar_read(node)), NODE);
    guest.target.set(REGION).unwrap();
    assert_eq!(guest.config(mem::CONFIG_REQUESTED_SIZE), REGION);
    let (asked, most) = (REGION + BLOCK, REGION);
    assert_eq!(
        guest.target.set(asked),
        Err(MemTargetError::TooLarge { asked, most })
    );
    let (asked, block) = (BLOCK + 4096, BLOCK);
    assert_eq!(
        guest.target.set(asked),
        Err(MemTargetError::Uneven { asked, block })
    );
    assert_eq!(guest.target.totals().requested, REGION);
}

#[test]
fn no_more_is_plugged_than_is_wanted_and_each_answer_is_the_specifications() {
    let mut guest = Guest::new(4 * BLOCK);
    assert_eq!(guest.ask(mem::REQ_PLUG, 0, 5), mem::RESP_NACK);
    assert_eq!(guest.ask(mem::REQ_PLUG, 10, 3), mem::RESP_ACK);
    assert_eq!(guest.plugged(), 3 * BLOCK);
    assert_eq!(guest.ask(mem::REQ_PLUG, 0, 2), mem::RESP_NACK);
    assert_eq!(
        guest.ask(mem::REQ_PLUG, 12, 1),
        mem::RESP_ERROR,
        "plugged already"
    );
    assert_eq!(guest.ask(mem::REQ_PLUG, 0, 1), mem::RESP_ACK);
    assert_eq!(guest.state(10, 3), (mem::RESP_ACK, mem::STATE_PLUGGED));
    assert_eq!(guest.state(1, 9), (mem::RESP_ACK, mem::STATE_UNPLUGGED));
    assert_eq!(guest.state(9, 2), (mem::RESP_ACK, mem::STATE_MIXED));
    assert_eq!(guest.ask(mem::REQ_UNPLUG, 9, 2), mem::RESP_ERROR);
    assert_eq!(guest.ask(mem::REQ_UNPLUG, 11, 1), mem::RESP_ACK);
    assert_eq!(guest.plugged(), 3 * BLOCK);
    // Less is wanted than there is: more than that stays until the driver unplugs it.
    guest.target.set(0).unwrap();
    assert_eq!(guest.ask(mem::REQ_PLUG, 20, 1), mem::RESP_NACK);
    assert_eq!(guest.plugged(), 3 * BLOCK);
    assert_eq!(guest.ask(mem::REQ_UNPLUG_ALL, 0, 0), mem::RESP_ACK);
    assert_eq!(guest.ask(mem::REQ_UNPLUG_ALL, 0, 0), mem::RESP_ACK);
    assert_eq!(guest.plugged(), 0);
}

#[test]
fn requests_for_what_is_not_there_are_errors_and_change_nothing() {
    let mut guest = Guest::new(REGION);
    let start = guest.start;
    let whole = mem::REQUEST_SIZE as u32;
    for kind in [mem::REQ_PLUG, mem::REQ_UNPLUG, mem::REQ_STATE] {
        for (address, blocks) in [
            (start + 1, 1),
            (start + 4096, 1),
            (start - BLOCK, 1),
            (start, 0),
            (start, COUNT as u16 + 1),
            (start + REGION, 1),
            (start + REGION - BLOCK, 2),
            (0, 1),
            (u64::MAX, u16::MAX),
            (u64::MAX - BLOCK + 1, 1),
        ] {
            let (answer, _) = guest.ask_with(kind, address, blocks, whole);
            assert_eq!(answer, mem::RESP_ERROR, "{kind} {address:#x} {blocks}");
        }
    }
    let (answer, _) = guest.ask_with(77, start, 1, whole);
    assert_eq!(answer, mem::RESP_ERROR);
    let (answer, _) = guest.ask_with(mem::REQ_PLUG, start, 1, whole - 1);
    assert_eq!(answer, mem::RESP_ERROR, "a part of a request");
    assert_eq!(guest.plugged(), 0);
}

#[test]
fn what_the_host_cannot_do_now_is_busy_and_never_an_error() {
    let mut guest = Guest::new(REGION);
    *guest.space.full.lock().unwrap() = true;
    assert_eq!(guest.ask(mem::REQ_PLUG, 0, 8), mem::RESP_BUSY);
    assert_eq!(guest.plugged(), 0);
    *guest.space.full.lock().unwrap() = false;
    assert_eq!(guest.ask(mem::REQ_PLUG, 0, 8), mem::RESP_ACK);
    assert_eq!(guest.plugged(), 8 * BLOCK);
}

#[test]
fn a_driver_that_resets_the_device_keeps_its_memory_and_a_guest_that_starts_anew_has_none() {
    let mut guest = Guest::new(REGION);
    assert_eq!(guest.ask(mem::REQ_PLUG, 2, 6), mem::RESP_ACK);
    guest.driver.function.pause();
    guest.driver.function.resume();
    assert_eq!(guest.plugged(), 6 * BLOCK);
    guest.driver.negotiate(0);
    assert_eq!(guest.plugged(), 6 * BLOCK);
    guest.requests = guest.driver.queue(0, 16);
    guest.driver.ready();
    assert_eq!(guest.state(2, 6), (mem::RESP_ACK, mem::STATE_PLUGGED));
    guest.driver.negotiate(0);
    guest.target.on_restart().unwrap();
    assert_eq!(guest.plugged(), 0);
    assert_eq!(guest.config(mem::CONFIG_REQUESTED_SIZE), REGION);
    guest.requests = guest.driver.queue(0, 16);
    guest.driver.ready();
    assert_eq!(guest.ask(mem::REQ_PLUG, 0, 1), mem::RESP_ACK);
    assert_eq!(guest.plugged(), BLOCK);
}

#[test]
fn a_queue_in_memory_that_can_be_plugged_is_served_as_any() {
    let mut guest = Guest::new(REGION);
    assert_eq!(guest.ask(mem::REQ_PLUG, 0, 1), mem::RESP_ACK);
    guest.buffers = guest.start + 0x1000;
    assert_eq!(guest.ask(mem::REQ_PLUG, 1, 1), mem::RESP_ACK);
    // A driver that keeps its request in what it gives away is answered there all the same, and nothing else comes of it.
    assert_eq!(guest.ask(mem::REQ_UNPLUG, 0, 1), mem::RESP_ACK);
    assert_eq!(guest.state(0, 2), (mem::RESP_ACK, mem::STATE_MIXED));
    assert_eq!(guest.plugged(), BLOCK);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Random requests beside a model of the bitmap that follows the specification.
    #[test]
    fn answers_and_mappings_are_a_models_after_any_requests(
        steps in prop::collection::vec(
            (0_u16..6, 0_u64..COUNT + 4, 0_u16..COUNT as u16 + 2, 0_u64..COUNT + 1, any::<bool>()),
            1..40,
        ),
    ) {
        let mut guest = Guest::new(0);
        let mut model = vec![false; COUNT as usize];
        let mut wanted = 0;
        for (kind, block, blocks, target, full) in steps {
            if kind == 5 {
                wanted = target * BLOCK;
                guest.target.set(wanted).unwrap();
                *guest.space.full.lock().unwrap() = full && target % 4 == 0;
                continue;
            }
            let is_full = *guest.space.full.lock().unwrap();
            let address = guest.start + block * BLOCK;
            let (answer, state) =
                guest.ask_with(kind, address, blocks, mem::REQUEST_SIZE as u32);
            let count = |model: &[bool]| model.iter().filter(|flag| **flag).count() as u64;
            let end = block + u64::from(blocks);
            let span = (blocks > 0 && end <= COUNT).then_some(block as usize..end as usize);
            let expected = match (kind, span) {
                (mem::REQ_UNPLUG_ALL, _) => {
                    model.fill(false);
                    mem::RESP_ACK
                }
                (mem::REQ_PLUG, Some(span)) if !model[span.clone()].contains(&true) => {
                    if (count(&model) + u64::from(blocks)) * BLOCK > wanted {
                        mem::RESP_NACK
                    } else if is_full {
                        mem::RESP_BUSY
                    } else {
                        model[span].fill(true);
                        mem::RESP_ACK
                    }
                }
                (mem::REQ_UNPLUG, Some(span)) if !model[span.clone()].contains(&false) => {
                    model[span].fill(false);
                    mem::RESP_ACK
                }
                (mem::REQ_STATE, Some(span)) => {
                    let expected = match count(&model[span.clone()]) {
                        0 => mem::STATE_UNPLUGGED,
                        all if all == span.len() as u64 => mem::STATE_PLUGGED,
                        _ => mem::STATE_MIXED,
                    };
                    prop_assert_eq!(state, expected);
                    mem::RESP_ACK
                }
                _ => mem::RESP_ERROR,
            };
            prop_assert_eq!(answer, expected, "{} {} {}", kind, block, blocks);
            prop_assert_eq!(guest.plugged(), count(&model) * BLOCK);
            let mapped: Vec<_> = guest.space.mapped.lock().unwrap().iter().copied().collect();
            let plugged: Vec<_> = (0..COUNT).filter(|block| model[*block as usize]).map(|block| block * BLOCK).collect();
            prop_assert_eq!(mapped, plugged);
        }
    }
}
