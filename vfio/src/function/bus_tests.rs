//! Two devices of one host bus in a guest, each behind a port of its own: what becomes of their BARs
//! when the bus is reset.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use busway_pci::pace::StoppedClock;
use busway_pci::{
    BarMapper, BarPart, BarRegion, Bdf, Device, FunctionId, Link, PciFunction, Place, RootPort,
    Segment, Topology, Windows, spec,
};

use super::tests::nvme;
use crate::fake::{FakeDevice, FakeLines, FakeRoutes};
use crate::{
    Affected, AssignOptions, AssignedFunction, FunctionReset, IrqIndex, Placement, Resets, Wiring,
};

/// Which BARs are mapped, by address; a dma-buf is asked for with each, as for peer-to-peer DMA.
#[derive(Debug, Default)]
struct Mapper(Mutex<Vec<u64>>);

impl BarMapper for Mapper {
    fn map(
        &self,
        _: Segment,
        function: &Arc<dyn PciFunction>,
        region: &BarRegion,
    ) -> io::Result<()> {
        for part in function.parts(region.index) {
            if let BarPart::Memory { offset, size, .. } = part {
                function.dma_buf(region.index, offset, size).unwrap()?;
            }
        }
        self.0.lock().unwrap().push(region.address);
        Ok(())
    }

    fn unmap(&self, _function: &Arc<dyn PciFunction>, region: &BarRegion) {
        self.0.lock().unwrap().retain(|&at| at != region.address);
    }
}

const NAMES: [&str; 2] = ["0000:02:01.0", "0000:02:02.0"];
const PORTS: [&str; 2] = ["00:10.0", "00:11.0"];

struct Vm {
    mapper: Arc<Mapper>,
    topology: Topology,
    functions: Vec<FunctionId>,
    fakes: Vec<Arc<FakeDevice>>,
    /// How many BARs were mapped at each reset of the bus.
    mapped_at_reset: Arc<Mutex<Vec<usize>>>,
}

impl Vm {
    fn new() -> Self {
        Self::with(None)
    }

    /// The first has this reset of its own.
    fn with(first: Option<FunctionReset>) -> Self {
        let mapper = Arc::new(Mapper::default());
        let topology = Topology::new(mapper.clone());
        let resets = Arc::<Resets>::default();
        let mapped_at_reset = Arc::<Mutex<Vec<usize>>>::default();
        let on_the_bus = NAMES.map(|name| Affected {
            address: name.parse().unwrap(),
            owned: true,
            driver: Some("vfio-pci".to_owned()),
        });
        let fakes = NAMES.map(|name| {
            let mut fake = nvme();
            fake.function_reset = first.filter(|_| name == NAMES[0]);
            *fake.reach.lock().unwrap() = on_the_bus.to_vec();
            let (mapper, seen) = (mapper.clone(), mapped_at_reset.clone());
            *fake.on_reset.0.lock().unwrap() = Some(Box::new(move || {
                // A test that fails drops its devices while it unwinds.
                if let (Ok(mapped), Ok(mut seen)) = (mapper.0.lock(), seen.lock()) {
                    seen.push(mapped.len());
                }
            }));
            Arc::new(fake)
        });
        for (name, fake) in NAMES.into_iter().zip(&fakes) {
            resets.add(name, fake.clone());
        }
        resets.begin();
        let functions = (0..).zip(NAMES.into_iter().zip(&fakes));
        let functions = functions.map(|(number, (name, fake))| {
            let routes = Arc::new(FakeRoutes::default());
            let wiring = Wiring {
                routes: routes.clone(),
                lines: Arc::new(FakeLines::default()),
                resets: resets.clone(),
                clock: Arc::new(StoppedClock::default()),
                placement: Placement::default(),
            };
            let options = AssignOptions::default();
            let function = AssignedFunction::new(name, fake.clone(), wiring, &options).unwrap();
            let place = Place::root(Device::new(16 + number).unwrap());
            let port = RootPort::new(number.into(), Link::default(), routes);
            let port = topology.add(place, Arc::new(port)).unwrap();
            topology.add(Place::behind(port), function).unwrap()
        });
        let functions = functions.collect();
        let vm = Self {
            mapper,
            topology,
            functions,
            fakes: fakes.to_vec(),
            mapped_at_reset,
        };
        vm.start();
        vm
    }

    /// What firmware and the guest's drivers do.
    fn start(&self) {
        let (memory32, memory64) = (0xc000_0000..0xd000_0000, 1 << 40..2 << 40);
        let windows = Windows {
            io: 0xc000..0xd000,
            memory32: vec![memory32],
            memory64: vec![memory64],
        };
        self.topology.assign(Segment(0), &windows).unwrap();
        (0..2).for_each(|which| self.decode(which));
    }

    fn at(&self, which: usize) -> Bdf {
        self.topology.bdf(self.functions[which]).unwrap()
    }

    fn decode(&self, which: usize) {
        let command = spec::COMMAND_MEMORY.to_le_bytes();
        self.topology
            .config_write(self.at(which), spec::COMMAND, &command);
    }

    /// The guest resets the bus behind a port.
    fn reset_bus(&self, which: usize) {
        let port: Bdf = PORTS[which].parse().unwrap();
        let control = |value: u16| {
            self.topology
                .config_write(port, spec::BRIDGE_CONTROL, &value.to_le_bytes());
        };
        control(spec::BRIDGE_CONTROL_RESET);
        control(0);
    }

    fn mapped(&self) -> usize {
        self.mapper.0.lock().unwrap().len()
    }

    fn hot_resets(&self) -> usize {
        let counts = self.fakes.iter();
        counts
            .map(|fake| fake.hot_resets.lock().unwrap().len())
            .sum()
    }

    fn dma_bufs(&self) -> Vec<usize> {
        let counts = self.fakes.iter();
        counts
            .map(|fake| fake.dma_bufs.load(Ordering::Relaxed))
            .collect()
    }
}

#[test]
fn a_reset_of_the_bus_finds_no_bar_mapped_and_each_is_mapped_anew_from_a_new_dma_buf() {
    let vm = Vm::new();
    assert_eq!((vm.mapped(), vm.hot_resets()), (2, 1));
    assert_eq!(vm.dma_bufs(), [1, 1]);
    // The other one is in use, and keeps what is mapped of it.
    vm.reset_bus(0);
    assert_eq!((vm.mapped(), vm.hot_resets()), (1, 1));
    vm.reset_bus(1);
    assert_eq!((vm.mapped(), vm.hot_resets()), (0, 2));
    vm.start();
    assert_eq!((vm.mapped(), vm.dma_bufs()), (2, vec![2, 2]));
    // The machine restarts, with everything mapped.
    vm.topology.reset();
    assert_eq!((vm.mapped(), vm.hot_resets()), (0, 3));
    vm.start();
    assert_eq!((vm.mapped(), vm.dma_bufs()), (2, vec![3, 3]));
    assert_eq!(*vm.mapped_at_reset.lock().unwrap(), [0, 0, 0]);
}

#[test]
fn a_device_that_is_used_again_before_the_others_are_reset_keeps_its_bar_and_its_dma_buf() {
    let vm = Vm::new();
    let mut bar = [0; 8];
    vm.topology.config_read(vm.at(0), 0x10, &mut bar);
    vm.reset_bus(0);
    vm.topology.config_write(vm.at(0), 0x10, &bar);
    vm.decode(0);
    assert_eq!((vm.mapped(), vm.dma_bufs()), (2, vec![2, 1]));
    vm.reset_bus(1);
    assert_eq!((vm.mapped(), vm.hot_resets()), (1, 1));
    vm.decode(1);
    assert_eq!(vm.dma_bufs()[0], 2);
    assert_eq!(*vm.mapped_at_reset.lock().unwrap(), [0]);
}

#[test]
fn no_pin_is_connected_while_the_bus_is_reset_and_each_is_when_its_guest_goes_on() {
    for first in [None, Some(FunctionReset::Flr)] {
        let vm = Vm::with(first);
        let connected = Arc::<Mutex<Vec<usize>>>::default();
        for fake in vm.fakes.iter().filter(|fake| fake.function_reset.is_none()) {
            let (all, seen) = (vm.fakes.clone(), connected.clone());
            *fake.on_reset.0.lock().unwrap() = Some(Box::new(move || {
                let pins = all.iter().filter(|fake| fake.kind().is_some()).count();
                seen.lock().unwrap().push(pins);
            }));
        }
        vm.topology.reset();
        vm.start();
        vm.reset_bus(0);
        vm.reset_bus(1);
        assert_eq!(vm.hot_resets(), 3);
        assert_eq!(*connected.lock().unwrap(), [0, 0], "{first:?}");
        vm.start();
        for fake in &vm.fakes {
            assert_eq!(fake.kind(), Some(IrqIndex::Intx));
            *fake.on_reset.0.lock().unwrap() = None;
        }
    }
}

#[test]
fn one_that_fell_silent_comes_back_with_its_bus_and_as_at_power_on() {
    let vm = Vm::new();
    let gone = &vm.fakes[0];
    gone.silent.store(true, Ordering::Relaxed);
    let (back, mapper) = (gone.clone(), vm.mapper.clone());
    *gone.on_reset.0.lock().unwrap() = Some(Box::new(move || {
        assert!(mapper.0.lock().unwrap().is_empty());
        back.silent.store(false, Ordering::Relaxed);
        // The kernel puts back what it had read before: here the cache line size.
        back.set_config(0x0c, &[u8::MAX]);
    }));
    let mut bar = [0; 8];
    vm.topology.config_read(vm.at(0), 0x10, &mut bar);
    vm.reset_bus(0);
    // Its driver goes on all the same.
    vm.topology.config_write(vm.at(0), 0x10, &bar);
    vm.decode(0);
    assert_eq!(vm.mapped(), 1);
    vm.reset_bus(1);
    assert_eq!((vm.hot_resets(), vm.mapped()), (2, 0));
    vm.start();
    assert_eq!((gone.config_at(0x0c), vm.mapped()), ([0], 2));
    *gone.on_reset.0.lock().unwrap() = None;
}
