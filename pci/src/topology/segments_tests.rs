use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use proptest::collection::vec;
use proptest::prelude::*;

use super::tests::device;
use super::*;
use crate::address::{Bus, Device, Segment};
use crate::bar::{BarIndex, BarRegion};
use crate::fake::{FakeFunction, FakeRoutes, MEMORY_32, PREFETCHABLE_64, key};
use crate::host_bridge::HostBridge;
use crate::link::Link;
use crate::root_port::RootPort;
use crate::windows::Windows;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

const BARS: &[(BarIndex, crate::bar::BarKind, u64)] = &[
    (BarIndex::Bar(0), MEMORY_32, MIB),
    (BarIndex::Bar(2), PREFETCHABLE_64, GIB),
];

/// What is mapped: by function and BAR, with the segment that the topology said.
#[derive(Default)]
struct Mapper(Mutex<BTreeMap<(usize, BarIndex), (Segment, BarRegion)>>);

impl BarMapper for Mapper {
    fn map(
        &self,
        segment: Segment,
        function: &Arc<dyn PciFunction>,
        region: &BarRegion,
    ) -> io::Result<()> {
        let mut mapped = lock(&self.0);
        let before = mapped.insert((key(function), region.index), (segment, *region));
        assert_eq!(before, None, "mapped twice");
        Ok(())
    }

    fn unmap(&self, function: &Arc<dyn PciFunction>, region: &BarRegion) {
        let before = lock(&self.0).remove(&(key(function), region.index));
        assert_eq!(before.map(|(_, region)| region), Some(*region));
    }
}

/// Each segment's own windows.
fn windows(segment: Segment) -> Windows {
    let number = u64::from(segment.0);
    let stretch = |start: u64, size: u64| -> Vec<Range<u64>> {
        let start = start + number * size;
        std::iter::once(start..start + size).collect()
    };
    Windows {
        io: 0..0,
        memory32: stretch(0xc000_0000, 64 * MIB),
        memory64: stretch(8 * GIB, 8 * GIB),
    }
}

struct Fixture {
    topology: Topology,
    mapper: Arc<Mapper>,
    /// The functions with BARs, each with its segment.
    functions: Vec<(FunctionId, Segment)>,
}

const SEGMENTS: [Segment; 2] = [Segment(0), Segment(1)];

/// Two segments that are alike: a host bridge, a function in slot 2 of bus 0 and another behind the port in slot 16.
fn fixture() -> Fixture {
    let mapper = Arc::<Mapper>::default();
    let topology = Topology::new(mapper.clone());
    let mut functions = Vec::new();
    for segment in SEGMENTS {
        let at = |number| Place::root(device(number)).in_segment(segment);
        topology.add(at(0), Arc::new(HostBridge::new())).unwrap();
        let beside = topology.add(at(2), FakeFunction::new(BARS)).unwrap();
        let routes = Arc::new(FakeRoutes::default());
        let port = RootPort::new(16, Link::default(), routes);
        let port = topology.add(at(16), Arc::new(port)).unwrap();
        let place = Place::behind(port);
        let behind = topology.add(place, FakeFunction::new(BARS)).unwrap();
        functions.extend([(beside, segment), (behind, segment)]);
    }
    let fixture = Fixture {
        topology,
        mapper,
        functions,
    };
    fixture.assign();
    fixture
}

impl Fixture {
    fn assign(&self) {
        for segment in SEGMENTS {
            self.topology.assign(segment, &windows(segment)).unwrap();
        }
    }

    /// Each function's address, and those of its BARs.
    fn places(&self) -> Vec<(Bdf, Vec<u64>)> {
        let functions = self.topology.functions().into_iter();
        functions
            .map(|(id, function)| {
                let bars = function.bars().into_iter().map(|bar| bar.address);
                (self.topology.bdf(id).unwrap(), bars.collect())
            })
            .collect()
    }
}

fn vendor(topology: &Topology, bdf: Bdf) -> u16 {
    let mut data = [0; 2];
    topology.config_read(bdf, 0, &mut data);
    u16::from_le_bytes(data)
}

#[test]
fn segments_have_the_same_bus_numbers_and_windows_of_their_own() {
    let f = fixture();
    for (id, segment) in &f.functions {
        let bdf = f.topology.bdf(*id).unwrap();
        assert_eq!(bdf.segment, *segment);
        assert_eq!(vendor(&f.topology, bdf), 0x1234, "{bdf}");
        f.topology.config_write(bdf, spec::COMMAND, &[2, 0]);
    }
    let texts = f.functions.iter().map(|(id, _)| f.topology.bdf(*id));
    let texts: Vec<_> = texts.map(|bdf| bdf.unwrap().to_string()).collect();
    assert_eq!(
        texts,
        [
            "0000:00:02.0",
            "0000:01:00.0",
            "0001:00:02.0",
            "0001:01:00.0"
        ]
    );
    let mapped = lock(&f.mapper.0);
    assert_eq!(mapped.len(), 8);
    for (segment, region) in mapped.values() {
        let windows = windows(*segment);
        let mut within = windows.memory32.iter().chain(&windows.memory64);
        assert!(within.any(|window| window.contains(&region.address)));
    }
    let none = Bdf::new(0, 2, 0).unwrap().in_segment(Segment(2));
    assert_eq!(vendor(&f.topology, none), 0xffff);
}

#[test]
fn a_segments_buses_lead_to_no_other_segment() {
    let f = fixture();
    let port = Bdf::new(0, 16, 0).unwrap();
    let behind = |segment, bus| Bdf {
        bus: Bus(bus),
        ..Bdf::new(0, 0, 0).unwrap().in_segment(segment)
    };
    f.topology
        .config_write(port.in_segment(SEGMENTS[1]), spec::SECONDARY_BUS, &[7, 7]);
    assert_eq!(vendor(&f.topology, behind(SEGMENTS[1], 7)), 0x1234);
    assert_eq!(vendor(&f.topology, behind(SEGMENTS[1], 1)), 0xffff);
    assert_eq!(vendor(&f.topology, behind(SEGMENTS[0], 1)), 0x1234);
    assert_eq!(vendor(&f.topology, behind(SEGMENTS[0], 7)), 0xffff);
}

#[test]
fn room_is_a_segments_own() {
    let f = fixture();
    let large = FakeFunction::new(&[(BarIndex::Bar(2), PREFETCHABLE_64, 4 * GIB)]);
    let small = windows(SEGMENTS[0]);
    let large_window = Windows {
        memory64: std::iter::once(16 * GIB..32 * GIB).collect(),
        ..windows(SEGMENTS[1])
    };
    let full = FakeFunction::new(&[(BarIndex::Bar(2), PREFETCHABLE_64, 8 * GIB)]);
    f.topology.has_room(SEGMENTS[0], &small, &*large).unwrap();
    f.topology
        .has_room(SEGMENTS[0], &small, &*full)
        .unwrap_err();
    f.topology
        .has_room(SEGMENTS[1], &large_window, &*full)
        .unwrap();
}

proptest! {
    #[test]
    fn whatever_a_guest_writes_anywhere_a_start_is_like_the_first(
        writes in vec((0..3_u32, 0..3_u8, 0..32_u8, 0..0x110_u16, vec(any::<u8>(), 1..5)), 0..60),
    ) {
        let f = fixture();
        let before = f.places();
        for (segment, bus, slot, register, data) in writes {
            let bdf = Bdf {
                segment: Segment(segment),
                bus: Bus(bus),
                device: Device::new(slot).unwrap(),
                function: Function::default(),
            };
            f.topology.config_write(bdf, register, &data);
            let mut data = data;
            f.topology.config_read(bdf, register, &mut data);
            for (id, segment) in &f.functions {
                prop_assert_eq!(f.topology.bdf(*id).unwrap().segment, *segment);
            }
        }
        let owners: BTreeMap<_, _> = f.functions.iter().map(|(id, segment)| {
            (key(&f.topology.function(*id).unwrap()), *segment)
        }).collect();
        for ((function, _), (segment, _)) in &*lock(&f.mapper.0) {
            prop_assert_eq!(owners.get(function), Some(segment));
        }
        f.topology.reset();
        prop_assert!(lock(&f.mapper.0).is_empty());
        f.assign();
        prop_assert_eq!(f.places(), before);
    }
}
