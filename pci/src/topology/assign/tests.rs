use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::fake::{FakeFunction, FakeMapper, FakeRoutes, MEMORY_32, MEMORY_64, PREFETCHABLE_64};
use crate::link::Link;
use crate::root_port::RootPort;
use crate::slot::SlotListener;
use crate::topology::Place;
use crate::topology::tests::{bdf, device, port, read32, write16};

const GIB: u64 = 1 << 30;

fn windows() -> Windows {
    let (memory32, memory64) = (0xc000_0000..0xe000_0000, 64 * GIB..512 * GIB);
    Windows {
        io: 0xc000..0x1_0000,
        memory32: vec![memory32],
        memory64: vec![memory64],
    }
}

type BarSpec = (BarIndex, BarKind, u64);

/// Ports from 00:01.0 on, each with a function of these BARs behind it.
fn behind_ports(functions: &[&[BarSpec]]) -> (Arc<FakeMapper>, Topology) {
    let mapper = FakeMapper::new(true);
    let topology = Topology::new(mapper.clone());
    for (slot, bars) in (1..).zip(functions) {
        let port = topology.add(Place::root(device(slot)), port(slot.into()));
        let place = Place::behind(port.unwrap());
        topology.add(place, FakeFunction::new(bars)).unwrap();
    }
    (mapper, topology)
}

fn addresses(topology: &Topology) -> Vec<(BarIndex, u64)> {
    let functions = topology.functions().into_iter();
    functions
        .flat_map(|(_, function)| function.bars())
        .map(|region| (region.index, region.address))
        .collect()
}

#[test]
fn each_bar_lies_in_the_window_for_its_kind() {
    let (_, topology) = behind_ports(&[&[
        (BarIndex::Bar(0), MEMORY_64, 0x4000),
        (BarIndex::Bar(2), PREFETCHABLE_64, 16 * GIB),
        (BarIndex::Bar(4), BarKind::Io, 0x20),
        (BarIndex::Rom, MEMORY_32, 0x1_0000),
    ]]);
    let beside = FakeFunction::new(&[(BarIndex::Bar(0), MEMORY_64, 0x8000)]);
    topology.add(Place::root(device(9)), beside).unwrap();
    topology.assign(Segment(0), &windows()).unwrap();
    assert_eq!(
        addresses(&topology),
        [
            (BarIndex::Bar(0), 0xc001_0000),
            (BarIndex::Bar(2), 64 * GIB),
            (BarIndex::Bar(4), 0xc000),
            (BarIndex::Rom, 0xc000_0000),
            (BarIndex::Bar(0), 80 * GIB),
        ]
    );
    let port = bdf("00:01.0");
    let register = |offset| read32(&topology, port, offset);
    assert_eq!(register(spec::PRIMARY_BUS), 0x0001_0100);
    assert_eq!(register(spec::IO_BASE) & 0xffff, 0xc0c0);
    assert_eq!(register(spec::MEMORY_BASE), 0xc000_c000);
    assert_eq!(register(spec::PREFETCHABLE_BASE), 0xfff1_0001);
    assert_eq!(register(spec::PREFETCHABLE_BASE_UPPER), 0x10);
    assert_eq!(register(spec::PREFETCHABLE_LIMIT_UPPER), 0x13);
    assert_eq!(register(spec::COMMAND) & 0xffff, 7, "the port is open");
    assert_eq!(read32(&topology, bdf("01:00.0"), spec::COMMAND) & 7, 0);
}

#[test]
fn windows_of_ports_with_nothing_in_them_are_closed() {
    let (_, topology) = behind_ports(&[&[], &[(BarIndex::Bar(0), MEMORY_32, 0x1000)]]);
    topology.assign(Segment(0), &windows()).unwrap();
    let register = |offset| read32(&topology, bdf("00:01.0"), offset);
    assert_eq!(register(spec::IO_BASE) & 0xffff, 0x00f0);
    assert_eq!(register(spec::MEMORY_BASE), 0x0000_fff0);
    assert_eq!(register(spec::PREFETCHABLE_BASE), 0x0001_fff1);
    assert_eq!(register(spec::PREFETCHABLE_LIMIT_UPPER), 0);
    assert_eq!(
        read32(&topology, bdf("00:02.0"), spec::PRIMARY_BUS),
        0x0002_0200
    );
}

#[test]
fn buses_behind_buses_nest() {
    let (_, topology) = behind_ports(&[&[]]);
    let (upper, _) = topology.functions()[0];
    let place = Place {
        parent: Parent::Bridge(upper),
        device: device(3),
        function: crate::Function::default(),
    };
    let lower = topology.add(place, port(9)).unwrap();
    let leaf = FakeFunction::new(&[(BarIndex::Bar(0), MEMORY_32, 1 << 21)]);
    let leaf = topology.add(Place::behind(lower), leaf).unwrap();
    topology.assign(Segment(0), &windows()).unwrap();
    assert_eq!(
        read32(&topology, bdf("00:01.0"), spec::PRIMARY_BUS),
        0x0002_0100
    );
    assert_eq!(
        read32(&topology, bdf("01:03.0"), spec::PRIMARY_BUS),
        0x0002_0201
    );
    assert_eq!(
        read32(&topology, bdf("01:03.0"), spec::MEMORY_BASE),
        0xc010_c000
    );
    assert_eq!(topology.bdf(leaf), Some(bdf("02:00.0")));
}

#[test]
fn a_bar_without_room_is_named() {
    let (_, topology) = behind_ports(&[
        &[(BarIndex::Bar(0), MEMORY_32, 0x1000)],
        &[
            (BarIndex::Bar(0), MEMORY_32, 0x1000),
            (BarIndex::Bar(2), MEMORY_64, GIB),
        ],
    ]);
    assert_eq!(
        topology
            .assign(Segment(0), &windows())
            .unwrap_err()
            .to_string(),
        "a device: BAR 2 of 1073741824 bytes finds no room in the guest's memory below 4 GiB \
         beside the other devices: give the VM fewer devices"
    );
}

#[test]
fn whether_one_more_would_find_room_is_what_assigning_with_it_says() {
    let (_, topology) = behind_ports(&[&[(BarIndex::Bar(0), PREFETCHABLE_64, 256 * GIB)]]);
    topology.assign(Segment(0), &windows()).unwrap();
    let before = addresses(&topology);
    // The window has 448 GiB, of which 64 lie before the first multiple of 128 that is free.
    for (size, fits) in [(64 * GIB, true), (128 * GIB, true), (256 * GIB, false)] {
        let one = FakeFunction::new(&[(BarIndex::Bar(2), MEMORY_64, size)]);
        let found = topology.has_room(Segment(0), &windows(), &*one);
        assert_eq!(found.is_ok(), fits, "{size:#x}: {found:?}");
        assert_eq!(addresses(&topology), before, "nothing was touched");
        let id = topology.add(Place::root(device(9)), one).unwrap();
        assert_eq!(
            topology.assign(Segment(0), &windows()).is_ok(),
            fits,
            "{size:#x}"
        );
        topology.remove(id);
        topology.assign(Segment(0), &windows()).unwrap();
    }
}

#[test]
fn the_largest_possible_bars_find_no_room_without_overflow() {
    let largest: &[_] = &[(BarIndex::Bar(0), PREFETCHABLE_64, 1 << 63)];
    let (_, topology) = behind_ports(&[largest, largest, largest]);
    assert!(topology.assign(Segment(0), &windows()).is_err());
}

#[test]
fn io_bars_beyond_the_ports_there_are_stay_unassigned() {
    let io: &[_] = &[
        (BarIndex::Bar(0), MEMORY_32, 0x1000),
        (BarIndex::Bar(1), BarKind::Io, 0x20),
    ];
    let (_, topology) = behind_ports(&[io; 6]);
    topology.assign(Segment(0), &windows()).unwrap();
    let addresses = addresses(&topology);
    let ports: Vec<_> = addresses.iter().skip(1).step_by(2).collect();
    let ports: Vec<_> = ports.into_iter().map(|(_, address)| *address).collect();
    assert_eq!(ports, [0xc000, 0xd000, 0xe000, 0xf000, 0, 0]);
}

#[test]
fn assigning_again_after_a_reset_gives_the_same() {
    let (_, topology) = behind_ports(&[&[
        (BarIndex::Bar(0), MEMORY_32, 0x1000),
        (BarIndex::Bar(2), PREFETCHABLE_64, GIB),
    ]]);
    topology.assign(Segment(0), &windows()).unwrap();
    let before = addresses(&topology);
    topology.reset();
    topology.assign(Segment(0), &windows()).unwrap();
    assert_eq!(addresses(&topology), before);
}

#[derive(Debug)]
struct Deaf;

impl SlotListener for Deaf {
    fn power_switched(&self, _slot: u16, _on: bool) {}

    fn steadied(&self, _slot: u16) {}
}

#[test]
fn a_hot_plug_port_has_room_in_its_memory_windows_and_none_of_the_few_ports() {
    let topology = Topology::new(FakeMapper::new(true));
    for number in 1..32 {
        let routes = Arc::new(FakeRoutes::default());
        let port = RootPort::new(number, Link::default(), routes).hot_plug(Arc::new(Deaf));
        topology
            .add(Place::root(device(number as u8)), Arc::new(port))
            .unwrap();
    }
    topology.assign(Segment(0), &windows()).unwrap();
    for number in 1..32 {
        let at = bdf(&format!("00:{number:02x}.0"));
        let window = |register| {
            let bits = read32(&topology, at, register);
            (bits & 0xfff0, bits >> 16 & 0xfff0)
        };
        let (base, limit) = window(spec::MEMORY_BASE);
        assert_eq!(limit - base, 0x10, "2 MiB: {base:#x}..{limit:#x}");
        let (base, limit) = window(spec::PREFETCHABLE_BASE);
        assert_eq!(limit.wrapping_sub(base) & 0xfff0, 0x10);
        let io = read32(&topology, at, spec::IO_BASE);
        assert!(io & 0xf0 > io >> 8 & 0xf0, "closed: {io:#x}");
    }
}

fn bars() -> impl Strategy<Value = Vec<BarSpec>> {
    let bar = |number| {
        (0..5u8, 4..26u32).prop_map(move |(kind, log2)| {
            let index = BarIndex::Bar(number);
            match kind {
                0 => (index, MEMORY_32, 0),
                1 => (index, MEMORY_32, 1 << log2),
                2 => (index, BarKind::Io, 1 << (log2 % 9).max(2)),
                3 => (index, MEMORY_64, 1 << log2),
                _ => (index, PREFETCHABLE_64, 1 << (log2 + 9)),
            }
        })
    };
    (bar(0), bar(2), bar(4)).prop_map(|(a, b, c)| vec![a, b, c])
}

proptest! {
    /// The mapper refuses what overlaps, and only what a bridge forwards comes to it.
    #[test]
    fn whatever_is_assigned_can_all_be_mapped_at_once(
        behind in vec(bars(), 0..4),
        beside in vec(bars(), 0..4),
    ) {
        let slices: Vec<_> = behind.iter().map(Vec::as_slice).collect();
        let (mapper, topology) = behind_ports(&slices);
        for (number, bars) in (0x10..).zip(&beside) {
            topology.add(Place::root(device(number)), FakeFunction::new(bars)).unwrap();
        }
        if topology.assign(Segment(0), &windows()).is_ok() {
            let mut count = 0;
            for (id, function) in topology.functions() {
                write16(&topology, topology.bdf(id).unwrap(), spec::COMMAND, 7);
                for region in function.bars() {
                    let last = region.address + (region.size - 1);
                    let on_root = topology.bdf(id).unwrap().bus.0 == 0;
                    let all = windows();
                    let window = match WindowKind::of(region.kind, on_root) {
                        WindowKind::Io => &all.io,
                        WindowKind::Memory32 => &all.memory32[0],
                        WindowKind::Memory64 => &all.memory64[0],
                    };
                    let unassigned = region.kind == BarKind::Io && region.address == 0;
                    prop_assert!(unassigned || window.contains(&region.address) && window.contains(&last));
                    count += usize::from(!unassigned);
                }
            }
            let mapped = mapper.mapped();
            prop_assert_eq!(mapped.values().filter(|region| region.address != 0).count(), count);
        }
    }
}
