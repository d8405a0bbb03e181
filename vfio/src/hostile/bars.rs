//! A guest that moves BARs and bridges' windows about, through the topology, before a machine that
//! refuses what overlaps.

use std::io;
use std::sync::{Arc, Mutex};

use busway_pci::pace::StoppedClock;
use busway_pci::{
    BarKind, BarMapper, BarRegion, Bdf, Bus, Device, Function, FunctionId, Link, PciFunction,
    Place, RootPort, Segment, Topology, Windows, spec,
};

use super::configuration::check_decoding;
use super::world::{Routes, Story, assign, device};

/// What is reachable, and what was refused, each by its function.
#[derive(Debug, Default)]
struct Machine {
    mapped: Mutex<Vec<(usize, BarRegion)>>,
    refused: Mutex<Vec<(usize, BarRegion)>>,
}

fn key(function: &Arc<dyn PciFunction>) -> usize {
    Arc::as_ptr(function).cast::<()>().addr()
}

fn overlap(one: &BarRegion, other: &BarRegion) -> bool {
    let last = |region: &BarRegion| region.address.saturating_add(region.size - 1);
    (one.kind == BarKind::Io) == (other.kind == BarKind::Io)
        && one.address <= last(other)
        && other.address <= last(one)
}

impl BarMapper for Machine {
    fn map(
        &self,
        _: Segment,
        function: &Arc<dyn PciFunction>,
        region: &BarRegion,
    ) -> io::Result<()> {
        let mut mapped = self.mapped.lock().unwrap();
        let own = |(other, known): &&(usize, BarRegion)| {
            *other == key(function) && known.index == region.index
        };
        assert!(
            !mapped.iter().any(|each| own(&each)),
            "{region:?} is mapped twice"
        );
        // Where RAM is, and where a machine has no more addresses.
        let low = region.kind != BarKind::Io && region.address < 0x8000_0000;
        let high = region
            .address
            .checked_add(region.size - 1)
            .is_none_or(|last| last >> 46 != 0);
        let mut refused = self.refused.lock().unwrap();
        refused.retain(|each| !own(&each));
        if low || high || mapped.iter().any(|(_, other)| overlap(other, region)) {
            refused.push((key(function), *region));
            return Err(io::ErrorKind::AddrInUse.into());
        }
        mapped.push((key(function), *region));
        Ok(())
    }

    fn unmap(&self, function: &Arc<dyn PciFunction>, region: &BarRegion) {
        let mut mapped = self.mapped.lock().unwrap();
        let before = mapped.len();
        mapped.retain(|each| *each != (key(function), *region));
        assert_eq!(
            mapped.len() + 1,
            before,
            "{region:?} is unmapped, and was not mapped"
        );
    }
}

/// The story's players: two devices behind a root port each, one on bus 0.
struct Cast {
    topology: Topology,
    machine: Arc<Machine>,
    /// Each device with the port that it is behind.
    devices: Vec<(FunctionId, Option<Arc<RootPort>>)>,
}

fn slot(number: u8) -> Device {
    Device::new(number).expect("a small number")
}

impl Cast {
    fn new(story: &mut Story<'_>) -> Self {
        let machine = Arc::new(Machine::default());
        let topology = Topology::with_clock(machine.clone(), Arc::<StoppedClock>::default());
        let routes = Routes::new();
        let mut devices = Vec::new();
        for number in 1..=3 {
            let Some(function) = assign(&Arc::new(device(story)), &routes) else {
                continue;
            };
            if number == 3 {
                let id = topology.add(Place::root(slot(3)), function);
                devices.extend(id.map(|id| (id, None)));
                continue;
            }
            let port = Arc::new(RootPort::new(
                number.into(),
                Link::default(),
                routes.clone(),
            ));
            let above = topology.add(Place::root(slot(number)), port.clone());
            let id = above.and_then(|above| topology.add(Place::behind(above), function));
            devices.extend(id.map(|id| (id, Some(port))));
        }
        Self {
            topology,
            machine,
            devices,
        }
    }

    /// What the machine has reachable is what the registers say, but for what it refused.
    fn check(&self) {
        let mapped = self.machine.mapped.lock().unwrap();
        let refused = self.machine.refused.lock().unwrap();
        for (at, (_, one)) in mapped.iter().enumerate() {
            assert!(
                !mapped
                    .iter()
                    .skip(at + 1)
                    .any(|(_, other)| overlap(one, other))
            );
        }
        let mut expected = 0;
        for (id, port) in &self.devices {
            let Some(function) = self.topology.function(*id) else {
                continue;
            };
            check_decoding(&*function);
            let open = |region: &BarRegion| {
                let bridge = port.as_ref().and_then(|port| port.bridge());
                bridge.is_none_or(|bridge| !bridge.in_reset() && bridge.forwards(region))
            };
            for region in function.decoded().iter().filter(|region| open(region)) {
                let entry = (key(&function), *region);
                let here = mapped.contains(&entry);
                expected += usize::from(here);
                assert!(here || refused.contains(&entry), "{region:?} is not mapped");
            }
        }
        assert_eq!(
            mapped.len(),
            expected,
            "something is mapped that does not decode"
        );
    }
}

/// Plays one story of BARs that move.
pub fn bars(bytes: &[u8]) {
    let mut story = Story::new(bytes);
    let mut cast = Cast::new(&mut story);
    let topology = &cast.topology;
    if story.byte() & 1 == 0 {
        // As firmware does it; where there is no room, the guest begins with nothing.
        let (memory32, memory64) = (0xc000_0000..0xe000_0000, 1 << 36..1 << 40);
        let _ = topology.assign(
            Segment(0),
            &Windows {
                io: 0xc000..0x1_0000,
                memory32: vec![memory32],
                memory64: vec![memory64],
            },
        );
        cast.check();
    }
    while !story.is_over() {
        let bdf = Bdf {
            segment: Segment(0),
            bus: Bus(story.byte() % 3),
            device: slot(story.byte() % 4),
            function: Function::default(),
        };
        let put = |offset, data: &[u8]| cast.topology.config_write(bdf, offset, data);
        match story.byte() % 12 {
            0..3 => put(spec::COMMAND, &story.word().to_le_bytes()),
            3..6 => {
                let register = spec::BAR0 + u16::from(story.byte() % 6) * 4;
                put(register, &story.dword().to_le_bytes());
            }
            // Where neighbours meet.
            6 => {
                let register = spec::BAR0 + u16::from(story.byte() % 6) * 4;
                put(
                    register,
                    &(0xc000_0000 | u32::from(story.byte()) << 12).to_le_bytes(),
                );
            }
            7 => put(spec::PRIMARY_BUS, &story.dword().to_le_bytes()),
            8 => put(spec::MEMORY_BASE, &story.dword().to_le_bytes()),
            9 => put(
                story.word(),
                &story.quadword().to_le_bytes()[..story.width()],
            ),
            10 => put(spec::BRIDGE_CONTROL, &story.word().to_le_bytes()),
            _ => match story.byte() {
                0 => {
                    if let Some((id, _)) = cast.devices.pop() {
                        cast.topology.remove(id);
                    }
                }
                1..16 => cast.topology.reset(),
                _ => {
                    let mut data = [0; 8];
                    let width = story.width();
                    cast.topology
                        .config_read(bdf, story.word(), &mut data[..width]);
                }
            },
        }
        cast.check();
    }
    for (id, _) in std::mem::take(&mut cast.devices) {
        cast.topology.remove(id);
    }
    assert!(
        cast.machine.mapped.lock().unwrap().is_empty(),
        "a BAR outlives its function"
    );
}
