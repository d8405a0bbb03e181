use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::address::{Device, Segment};
use crate::bar::{BarIndex, BarKind, BarRegion};
use crate::fake::{FakeFunction, FakeMapper, FakeRoutes, MEMORY_32, PREFETCHABLE_64, key};
use crate::link::Link;
use crate::pace::StoppedClock;
use crate::root_port::RootPort;

pub(super) fn port(slot: u16) -> Arc<RootPort> {
    Arc::new(RootPort::new(
        slot,
        Link::default(),
        Arc::new(FakeRoutes::default()),
    ))
}

pub(super) fn device(number: u8) -> Device {
    Device::new(number).unwrap()
}

pub(super) fn bdf(text: &str) -> Bdf {
    text.parse().unwrap()
}

pub(super) fn write32(topology: &Topology, at: Bdf, offset: u16, value: u32) {
    topology.config_write(at, offset, &value.to_le_bytes());
}

pub(super) fn write16(topology: &Topology, at: Bdf, offset: u16, value: u16) {
    topology.config_write(at, offset, &value.to_le_bytes());
}

pub(super) fn read32(topology: &Topology, at: Bdf, offset: u16) -> u32 {
    let mut data = [0; 4];
    topology.config_read(at, offset, &mut data);
    u32::from_le_bytes(data)
}

/// Port 00:01.0 with a function behind it that has a 32-bit, a 64-bit and an I/O BAR; on bus 0
/// beside it one with a 32-bit BAR.
pub(super) struct Fixture {
    pub(super) mapper: Arc<FakeMapper>,
    pub(super) topology: Topology,
    pub(super) port: FunctionId,
    behind: Arc<FakeFunction>,
}

pub(super) const PORT: &str = "00:01.0";
pub(super) const BESIDE: &str = "00:02.0";
pub(super) const BEHIND: &str = "01:00.0";

impl Fixture {
    pub(super) fn new(exclusive: bool) -> Self {
        Self::with_clock(exclusive, Arc::new(SystemClock::default()))
    }

    fn with_clock(exclusive: bool, clock: Arc<dyn Clock>) -> Self {
        let mapper = FakeMapper::new(exclusive);
        let topology = Topology::with_clock(mapper.clone(), clock);
        let port = topology.add(Place::root(device(1)), port(1)).unwrap();
        let behind = FakeFunction::new(&[
            (BarIndex::Bar(0), MEMORY_32, 0x1000),
            (BarIndex::Bar(2), PREFETCHABLE_64, 1 << 20),
            (BarIndex::Bar(4), BarKind::Io, 0x20),
        ]);
        let beside = FakeFunction::new(&[(BarIndex::Bar(0), MEMORY_32, 0x1000)]);
        topology.add(Place::root(device(2)), beside).unwrap();
        topology.add(Place::behind(port), behind.clone()).unwrap();
        Self {
            mapper,
            topology,
            port,
            behind,
        }
    }

    /// Bus 1, a memory window at 0xC000_0000 of 2 MiB and everything on.
    pub(super) fn set_up(&self) {
        let port = bdf(PORT);
        write32(&self.topology, port, spec::PRIMARY_BUS, 0x0001_0100);
        write32(&self.topology, port, spec::MEMORY_BASE, 0xc010_c000);
        write16(&self.topology, port, spec::COMMAND, 7);
        write32(&self.topology, bdf(BEHIND), 0x10, 0xc000_0000);
        write16(&self.topology, bdf(BEHIND), spec::COMMAND, 2);
    }

    pub(super) fn mapped(&self) -> Vec<(BarIndex, u64)> {
        let mapped = self.mapper.mapped().into_values();
        mapped
            .map(|region| (region.index, region.address))
            .collect()
    }
}

#[test]
fn a_guest_that_switches_decoding_or_a_bus_over_and_over_is_paced() {
    let clock = Arc::<StoppedClock>::default();
    let f = Fixture::with_clock(false, clock.clone());
    f.set_up();
    let toggle = |at: &str, register, on: u16| {
        write16(&f.topology, bdf(at), register, 0);
        write16(&f.topology, bdf(at), register, on);
    };
    type Storm<'a> = (&'a dyn Fn(), Duration);
    let storms: [Storm<'_>; 3] = [
        // One BAR is unmapped and mapped.
        (&|| toggle(BEHIND, spec::COMMAND, 2), pace::MAPPING * 2),
        (&|| toggle(PORT, spec::COMMAND, 7), pace::MAPPING * 2),
        // No BAR decodes: only what hears of it is kept busy.
        (
            &|| toggle(PORT, spec::BRIDGE_CONTROL, spec::BRIDGE_CONTROL_RESET),
            pace::SWITCH * 2,
        ),
    ];
    for (number, (storm, price)) in storms.into_iter().enumerate() {
        let start = clock.now();
        // A driver's share is free.
        (0..100).for_each(|_| storm());
        assert_eq!(clock.now(), start, "storm {number}");
        while clock.now() == start {
            storm();
        }
        let start = clock.now();
        (0..100).for_each(|_| storm());
        assert_eq!(clock.now() - start, price * 100, "storm {number}");
        // Everything grows back.
        clock.sleep(Duration::from_secs(3600));
        write16(&f.topology, bdf(PORT), spec::BRIDGE_CONTROL, 0);
    }
}

#[test]
fn where_nothing_is_reads_are_ones_and_writes_are_lost() {
    let f = Fixture::new(false);
    for nowhere in ["00:00.0", "00:01.1", "01:00.0", "ff:1f.7", "0001:00:01.0"] {
        assert_eq!(read32(&f.topology, bdf(nowhere), 0), u32::MAX, "{nowhere}");
        write32(&f.topology, bdf(nowhere), 0x10, 0);
    }
    assert_eq!(read32(&f.topology, bdf(BESIDE), 0), 0x5678_1234);
}

#[test]
fn functions_are_found_by_the_bus_numbers_that_the_guest_set() {
    let f = Fixture::new(false);
    write32(&f.topology, bdf(PORT), spec::PRIMARY_BUS, 0x0007_0500);
    assert_eq!(read32(&f.topology, bdf("05:00.0"), 0), 0x5678_1234);
    assert_eq!(read32(&f.topology, bdf("06:00.0"), 0), u32::MAX);
    assert_eq!(read32(&f.topology, bdf("01:00.0"), 0), u32::MAX);
    let (behind, _) = f.topology.functions()[2];
    assert_eq!(f.topology.bdf(behind), Some(bdf("05:00.0")));
    write32(&f.topology, bdf(PORT), spec::PRIMARY_BUS, 0x0001_0500);
    assert_eq!(read32(&f.topology, bdf("05:00.0"), 0), u32::MAX);
}

#[test]
fn a_place_is_taken_once_and_only_bridges_have_a_bus() {
    let f = Fixture::new(false);
    let another = || FakeFunction::new(&[]);
    let taken = f.topology.add(Place::behind(f.port), another());
    assert!(matches!(taken, Err(PlaceError::Taken { .. })));
    let (beside, _) = f.topology.functions()[1];
    let no_bridge = f.topology.add(Place::behind(beside), another());
    assert_eq!(no_bridge, Err(PlaceError::NoBridge));
}

#[test]
fn a_device_shows_as_multi_function_while_it_is() {
    let f = Fixture::new(false);
    let header = |at| (read32(&f.topology, bdf(at), 0x0c) >> 16) as u8;
    assert_eq!((header(BESIDE), header(PORT)), (0, 1));
    let second = Place::root(device(2)).with_function(crate::Function::new(3).unwrap());
    let second = f.topology.add(second, FakeFunction::new(&[])).unwrap();
    assert_eq!((header(BESIDE), header("00:02.3")), (0x80, 0x80));
    let mut byte = [0];
    f.topology.config_read(bdf(BESIDE), 0x0e, &mut byte);
    assert_eq!(byte, [0x80]);
    f.topology.remove(second);
    assert_eq!(header(BESIDE), 0);
}

#[test]
fn a_bar_moves_when_decoding_is_turned_on_not_while_it_is_sized() {
    let f = Fixture::new(false);
    f.set_up();
    assert_eq!(f.mapped(), [(BarIndex::Bar(0), 0xc000_0000)]);
    write16(&f.topology, bdf(BEHIND), spec::COMMAND, 0);
    assert_eq!(f.mapped(), []);
    write32(&f.topology, bdf(BEHIND), 0x10, u32::MAX);
    assert_eq!(read32(&f.topology, bdf(BEHIND), 0x10), 0xffff_f000);
    write32(&f.topology, bdf(BEHIND), 0x10, 0xc010_0000);
    assert_eq!(f.mapped(), []);
    write16(&f.topology, bdf(BEHIND), spec::COMMAND, 2);
    assert_eq!(f.mapped(), [(BarIndex::Bar(0), 0xc010_0000)]);
}

#[test]
fn closing_a_bridges_window_unmaps_what_is_behind_it() {
    let f = Fixture::new(false);
    f.set_up();
    write32(&f.topology, bdf(PORT), spec::MEMORY_BASE, 0xd010_d000);
    assert_eq!(f.mapped(), []);
    write32(&f.topology, bdf(PORT), spec::MEMORY_BASE, 0xc000_c000);
    assert_eq!(f.mapped().len(), 1);
    write16(&f.topology, bdf(PORT), spec::COMMAND, 5);
    assert_eq!(f.mapped(), []);
}

#[test]
fn a_bar_that_found_its_place_taken_gets_it_when_the_other_leaves() {
    let f = Fixture::new(true);
    f.set_up();
    write32(&f.topology, bdf(BESIDE), 0x10, 0xc000_0000);
    write16(&f.topology, bdf(BESIDE), spec::COMMAND, 2);
    assert_eq!(f.mapped().len(), 1);
    write16(&f.topology, bdf(BEHIND), spec::COMMAND, 0);
    let mapped = f.mapper.mapped();
    let (_, beside) = f.topology.functions().swap_remove(1);
    assert!(mapped.contains_key(&(key(&beside), BarIndex::Bar(0))));
}

#[test]
fn a_secondary_bus_reset_resets_what_is_below_once() {
    let f = Fixture::new(false);
    f.set_up();
    let control = spec::BRIDGE_CONTROL;
    write16(&f.topology, bdf(PORT), control, spec::BRIDGE_CONTROL_RESET);
    assert_eq!(f.mapped(), []);
    assert_eq!(read32(&f.topology, bdf(BEHIND), 0), u32::MAX, "in reset");
    write16(&f.topology, bdf(PORT), control, spec::BRIDGE_CONTROL_RESET);
    write16(&f.topology, bdf(PORT), control, 0);
    assert_eq!(f.behind.resets.load(Ordering::Relaxed), 1);
    assert_eq!(read32(&f.topology, bdf(BEHIND), 0), 0x5678_1234);
    assert_eq!(read32(&f.topology, bdf(BEHIND), 0x10), 0, "as at power-on");
}

#[test]
fn removing_a_port_takes_what_is_behind_it_along() {
    let f = Fixture::new(false);
    f.set_up();
    assert_eq!(f.topology.remove(f.port).len(), 2);
    assert_eq!(f.mapped(), []);
    assert_eq!(read32(&f.topology, bdf(PORT), 0), u32::MAX);
    assert_eq!(f.topology.remove(f.port).len(), 0);
}

#[test]
fn a_machine_reset_leaves_nothing_mapped_or_numbered() {
    let f = Fixture::new(false);
    f.set_up();
    f.topology.reset();
    assert_eq!(f.mapped(), []);
    assert_eq!(read32(&f.topology, bdf(PORT), spec::PRIMARY_BUS), 0);
    assert_eq!(f.behind.resets.load(Ordering::Relaxed), 1);
}

#[test]
fn a_machine_reset_that_is_stopped_resets_no_more_and_leaves_nothing_mapped() {
    let f = Fixture::new(false);
    f.set_up();
    let asked = AtomicUsize::new(0);
    f.topology
        .reset_while(|_| asked.fetch_add(1, Ordering::Relaxed) < 2);
    assert_eq!(asked.load(Ordering::Relaxed), 3, "the port, the one beside");
    assert_eq!(f.behind.resets.load(Ordering::Relaxed), 0);
    assert_eq!(f.mapped(), []);
}

#[test]
fn accesses_of_every_width_and_offset_reach_functions_in_doublewords() {
    let f = Fixture::new(false);
    let mut data = [0; 16];
    f.topology.config_read(bdf(BESIDE), 0xffa, &mut data);
    assert_eq!(
        data,
        [
            0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255
        ]
    );
    let mut identity = [0; 3];
    f.topology.config_read(bdf(BESIDE), 1, &mut identity);
    assert_eq!(identity, [0x12, 0x78, 0x56]);
    // FakeFunction asserts that no access crosses a doubleword.
    f.topology.config_write(bdf(BESIDE), 0x0f, &[0xff; 9]);
    assert_eq!(read32(&f.topology, bdf(BESIDE), 0x10), 0xffff_f000);
    f.topology.config_write(bdf(BESIDE), u16::MAX, &[0; 4]);
}

/// What should be mapped, worked out from the registers alone.
fn expected(f: &Fixture) -> BTreeMap<(usize, BarIndex), BarRegion> {
    let functions = f.topology.functions();
    let register = |function: &Arc<dyn PciFunction>, offset: u16| {
        let mut data = [0; 4];
        function.config_read(offset, &mut data);
        u64::from(u32::from_le_bytes(data))
    };
    let (_, port) = &functions[0];
    let command = register(port, 4);
    let (io, memory) = (register(port, 0x1c), register(port, 0x20));
    let prefetchable = register(port, 0x24);
    let windows = [
        (command & 1 != 0, io << 8 & 0xf000, io & 0xf000 | 0xfff),
        (
            command & 2 != 0,
            memory << 16 & 0xfff0_0000,
            memory & 0xfff0_0000 | 0xf_ffff,
        ),
        (
            command & 2 != 0,
            register(port, 0x28) << 32 | prefetchable << 16 & 0xfff0_0000,
            register(port, 0x2c) << 32 | prefetchable & 0xfff0_0000 | 0xf_ffff,
        ),
    ];
    let in_reset = register(port, 0x3c) >> 16 & 0x40 != 0;
    let mut expected = BTreeMap::new();
    for (id, function) in &functions {
        let behind = f.topology.tree().get(*id).unwrap().place.parent != Parent::Root(Segment(0));
        let command = register(function, 4);
        for region in function.bars() {
            let is_io = region.kind == BarKind::Io;
            let decodes = command & if is_io { 1 } else { 2 } != 0;
            let windows = if is_io { &windows[..1] } else { &windows[1..] };
            let last = region.address + (region.size - 1);
            let through = windows
                .iter()
                .any(|&(on, base, limit)| on && base <= region.address && last <= limit);
            if decodes && (!behind || through && !in_reset) {
                expected.insert((key(function), region.index), region);
            }
        }
    }
    expected
}

/// Writes that matter, mostly.
fn writes() -> impl Strategy<Value = (usize, u16, u32)> {
    let registers = vec![
        (0, 0x04),
        (0, 0x1c),
        (0, 0x20),
        (0, 0x24),
        (0, 0x28),
        (0, 0x2c),
        (0, 0x3c),
        (1, 0x04),
        (1, 0x10),
        (2, 0x04),
        (2, 0x10),
        (2, 0x18),
        (2, 0x1c),
        (2, 0x20),
    ];
    let values = prop_oneof![
        4 => prop::sample::select(vec![
            0, 7, u32::MAX, 0xc000_0000, 0xc010_0000, 0xc010_c000, 0xfff0_c000, 0xffff_0000, 0xf0e0,
            1, 0x0040_0000, 0xe000, 0xd000,
        ]),
        1 => any::<u32>(),
    ];
    (prop::sample::select(registers), values)
        .prop_map(|((function, offset), value)| (function, offset, value))
}

proptest! {
    #[test]
    fn after_each_write_exactly_what_decodes_and_is_forwarded_is_mapped(
        writes in vec(writes(), 0..80),
    ) {
        let f = Fixture::new(false);
        let addresses = [PORT, BESIDE, BEHIND].map(bdf);
        for (function, offset, value) in writes {
            write32(&f.topology, bdf(PORT), spec::PRIMARY_BUS, 0x0001_0100);
            write32(&f.topology, addresses[function], offset, value);
            prop_assert_eq!(f.mapper.mapped(), expected(&f));
        }
    }
}

#[test]
fn writes_from_many_threads_lose_no_mapping() {
    let f = Fixture::new(false);
    f.set_up();
    thread::scope(|scope| {
        for number in 0..4u32 {
            let topology = &f.topology;
            scope.spawn(move || {
                for round in 0..400 {
                    let bits = round * 7 + number;
                    write16(topology, bdf(BEHIND), spec::COMMAND, bits as u16 & 2);
                    write32(topology, bdf(BEHIND), 0x10, 0xc000_0000 | (bits & 3) << 12);
                    write16(topology, bdf(PORT), spec::COMMAND, 5 | bits as u16 & 2);
                    write16(topology, bdf(BESIDE), spec::COMMAND, bits as u16 >> 1 & 2);
                    read32(topology, bdf(BEHIND), 0x10);
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..200 {
                let place = Place::behind(f.port).with_function(crate::Function::new(1).unwrap());
                let id = f.topology.add(place, FakeFunction::new(&[])).unwrap();
                assert_eq!(f.topology.remove(id).len(), 1);
            }
        });
    });
    assert_eq!(f.mapper.mapped(), expected(&f));
}
