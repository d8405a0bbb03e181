//! Guests that do as they please with a whole board: [`board`] takes any bytes as accesses to I/O ports and to addresses
//! that are no memory, and as what happens outside meanwhile, and panics where something does not hold that always has
//! to. The board is a machine's of two PCI segments, or of one where firmware begins, with each device that Busway has of its own and no image, backend or host device; KVM
//! is not needed, for interrupts lead nowhere.
//!
//! The tests at the end of this file play random bytes; `tests/fuzz` what reaches new code.

use std::ops::Range;
use std::sync::Arc;

use busway_pci::Windows;
use busway_vfio::EventFd;

use super::address_plan::SegmentAddresses;
use super::assembly::add_board_devices;
use super::events::{Event, Events};
use super::pci::Pci;
use super::resize::{ProcessorCount, Seats, Wish};
use super::segments::{add_empty_ports, open_slots};
use super::virtio::VirtioDevices;
use crate::arch::board::Board;
use crate::arch::layout;
use crate::config::{
    BalloonConfig, ConsoleConfig, CpusConfig, MemoryConfig, PciPlace, PlatformConfig, VmConfig,
};
use crate::devices::console::Endpoint;
use crate::devices::hostile::{Story, width_of};
use crate::devices::watchdog::Watchdog;
use crate::kvm::{AddressMap, Buses, Doorbells, IrqRouter, KvmError, VcpuEvent};
use crate::memory::{Area, Ram, Regions, Slots};
use crate::virtio::console::Console;
use crate::virtio::rng::Rng;
use crate::virtio::{MemoryTable, VirtioPci};

/// Steps of a story; what is behind them is not played.
const STEPS: usize = 400;
/// What can wait to be decided at a time: each thing waits once.
const MOST_EVENTS: usize = 600;
/// The guest's RAM.
const RAM: u64 = 2 << 20;
/// Where the windows of each segment begin, and end: below 4 GiB, and above.
const LOW: [Range<u64>; 2] = [0xc000_0000..0xd000_0000, 0xd000_0000..0xe000_0000];
const HIGH: [Range<u64>; 2] = [64 << 30..65 << 30, 65 << 30..66 << 30];
/// The highest bus of each: a bus behind each port.
const LAST_BUSES: [u8; 2] = [2, 1];
/// The segments' numbers.
const SEGMENTS: [u16; 2] = [0, 1];
/// Buses whose configuration space is tried.
const BUSES: u64 = 8;

/// Where each device has its ports.
const PORTS: [u16; 12] = [
    0x20, 0x40, 0x60, 0x70, 0x80, 0xb2, 0x3f8, 0x402, 0x510, 0x600, 0xcf8, 0x1000,
];

/// Plays one story. Its first byte says whether firmware begins it.
///
/// # Panics
/// A device panics, more waits to be decided than there are things, the two ways to configuration space lead to different
/// functions, or one of them from one segment into another, or a board that has been started anew is not as at the first start.
pub fn board(story: &[u8]) {
    let mut story = Story(story);
    let mut whole = Whole::new(story.byte() % 4 == 3);
    let first = whole.fingerprint();
    for _ in 0..STEPS {
        if story.0.is_empty() {
            break;
        }
        whole.step(&mut story);
        assert!(whole.events.count() <= MOST_EVENTS, "events pile up");
    }
    whole.restart();
    assert_eq!(whole.fingerprint(), first, "a start is not like the first");
}

/// vCPUs that come and go as they are asked to.
struct Vcpus(Arc<Events>);

impl Seats for Vcpus {
    fn bring(&mut self, _: u8) -> Result<(), KvmError> {
        Ok(())
    }

    fn put_aside(&self, cpu: u8) {
        self.0.push(Event::Vcpu(VcpuEvent::Parked { id: cpu }));
    }

    fn take_out(&self, _: u8) {}
}

/// The board.
struct Whole {
    buses: Buses,
    pci: Pci,
    virtio: VirtioDevices,
    board: Board,
    watchdog: Option<Arc<Watchdog>>,
    processors: ProcessorCount,
    events: Arc<Events>,
    firmware: bool,
    ecams: Vec<Range<u64>>,
    _ram: Ram,
}

impl Whole {
    fn new(firmware: bool) -> Self {
        let config = VmConfig {
            cpus: CpusConfig {
                boot: 2,
                max: Some(4),
                ..CpusConfig::default()
            },
            balloon: Some(BalloonConfig::default()),
            watchdog: true,
            pvpanic: true,
            platform: PlatformConfig {
                hotplug_slots: Some(2),
                num_pci_segments: Some(if firmware { 1 } else { 2 }),
                segment_hotplug_slots: Some(1),
                ..PlatformConfig::default()
            },
            ..VmConfig::default()
        };
        let memory = MemoryConfig {
            size: RAM,
            ..MemoryConfig::default()
        };
        let ram = Ram::new(&memory, false).expect("memory");
        let regions = Arc::new(Regions::default());
        let router = IrqRouter::loose().expect("a table");
        let (buses, events) = (Buses::default(), Events::new().expect("an eventfd"));
        let mut ecams = layout::ecams(&LAST_BUSES).expect("room");
        ecams.truncate(config.platform.segments().into());
        let segments = SEGMENTS.into_iter().zip(LOW).zip(HIGH).zip(&ecams);
        let segments = segments.map(|(((segment, low), high), ecam)| SegmentAddresses {
            windows: Windows {
                io: if segment == 0 { layout::PCI_IO } else { 0..0 },
                memory32: vec![low],
                memory64: vec![high],
            },
            ecam: ecam.clone(),
        });
        let mut pci = Pci::new(
            segments.collect(),
            &buses,
            regions.clone(),
            Doorbells::loose(),
            router.shared_lines(),
            firmware,
        )
        .expect("a host bridge");
        let quit = EventFd::new().expect("an eventfd");
        let null = || Endpoint::open(&ConsoleConfig::Null, &quit).expect("nothing is opened");
        let board = Board::new(
            null(),
            &buses,
            &router,
            pci.topology(),
            events.clone(),
            firmware,
        )
        .expect("a board");
        let routes = Arc::new(router.clone());
        let table = Arc::<MemoryTable>::default();
        let slots = Slots::new(ram.guest(), &regions, Area::new(0..0));
        let mut virtio = VirtioDevices::new(
            ram.guest(),
            &table,
            slots,
            routes.clone(),
            pci.seats(),
            &events,
        );
        let console = null().map(|endpoint| Console::new("console", endpoint));
        let rng = Rng::new("rng", &config.rng).expect("randomness");
        virtio
            .add_fixed(Box::new(console.expect("a console")), &mut pci)
            .and_then(|()| virtio.add_fixed(Box::new(rng), &mut pci))
            .and_then(|()| match &config.balloon {
                Some(balloon) => virtio.add_balloon(balloon, regions.discards(), None, &mut pci),
                None => Ok(()),
            })
            .expect("three devices");
        if !firmware {
            let rng = Box::new(Rng::new("second", &config.rng).expect("randomness"));
            let function = VirtioPci::new(rng, ram.guest().clone(), routes);
            let place = PciPlace {
                segment: 1,
                device: Some(3),
            };
            let added = pci.add_virtio(&function.expect("a function"), place);
            added.expect("a slot");
        }
        let watchdog = add_board_devices(&config, &mut pci).expect("two devices");
        add_empty_ports(&mut pci, &config, &router, &events).expect("two ports");
        open_slots(&pci, &buses, &router, &events).expect("registers");
        let processors =
            ProcessorCount::new(&config.cpus, &buses, &router, &events).expect("registers");
        let whole = Self {
            buses,
            pci,
            virtio,
            board,
            watchdog,
            processors,
            events,
            firmware,
            ecams,
            _ram: ram,
        };
        whole.assign();
        whole
    }

    /// Firmware gives addresses by itself.
    fn assign(&self) {
        if !self.firmware {
            self.pci.assign().expect("room");
        }
    }

    /// What a machine does between two lives of its guest.
    fn restart(&mut self) {
        self.pci.seats().restart();
        self.virtio.on_restart();
        self.processors.on_restart(&Vcpus(self.events.clone()));
        self.events.clear();
        self.pci.topology().reset_while(|_| true);
        self.board.reset();
        self.assign();
    }

    fn step(&mut self, story: &mut Story<'_>) {
        match story.byte() % 16 {
            0..4 => {
                let at = port(story);
                access(&self.buses.ports, at, story, 4);
            }
            4..7 => {
                let segment = usize::from(story.byte() % 2);
                // Of a board with one segment there is nothing in the second's place.
                let ecams = self.ecams.get(segment).or(self.ecams.first());
                let start = ecams.map_or(0, |ecam| ecam.start);
                access(&self.buses.mmio, start + place(story), story, 8);
            }
            7 => self.configure(story),
            8 => {
                let segment = u16::from(story.byte() % 3);
                let at = layout::pci_hotplug(segment) + u64::from(story.byte() % 0x20);
                access(&self.buses.mmio, at, story, 8);
            }
            9 => {
                let at = layout::CPU_HOTPLUG_START + u64::from(story.byte() % 0x20);
                access(&self.buses.mmio, at, story, 8);
            }
            10 | 11 => {
                let at = address(story);
                access(&self.buses.mmio, at, story, 8);
            }
            12 => self.happens(story),
            13 => self.resize(story),
            14 => self.decide(),
            _ => self.restart(),
        }
    }

    /// A register of a function's, by the ports, and read back by memory where that is open.
    fn configure(&self, story: &mut Story<'_>) {
        let at = place(story) & !3;
        let value = story.dword();
        let before = self.in_segment_1(at);
        self.through_ports(at, Some(value));
        assert_eq!(self.in_segment_1(at), before, "at {at:#x} of segment 1");
        if !self.firmware && at & 0xfff < 0x100 {
            let mut data = [0; 4];
            self.buses.mmio.read(layout::ECAM_START + at, &mut data);
            let memory = u32::from_le_bytes(data);
            assert_eq!(self.through_ports(at, None), memory, "at {at:#x}");
        }
    }

    /// What tells a function of segment 1 by memory, where there is that: identity and header, which no access changes.
    fn in_segment_1(&self, at: u64) -> Option<[u32; 2]> {
        let ecam = self.ecams.get(1)?;
        let function = at & !0xfff;
        let read = |register| {
            let mut data = [0; 4];
            let at = ecam.start + function + register;
            if ecam.contains(&at) {
                self.buses.mmio.read(at, &mut data);
            }
            u32::from_le_bytes(data)
        };
        Some([0, 0x10].map(read))
    }

    /// Reads, or writes before that, a register of the first 256 bytes by the configuration ports.
    fn through_ports(&self, at: u64, value: Option<u32>) -> u32 {
        let ports = &self.buses.ports;
        let place = (at >> 12) << 8 | at & 0xfc;
        let address = 1 << 31 | u32::try_from(place).unwrap_or(0);
        ports.write(0xcf8, &address.to_le_bytes());
        if let Some(value) = value {
            ports.write(0xcfc, &value.to_le_bytes());
        }
        let mut data = [0; 4];
        ports.read(0xcfc, &mut data);
        u32::from_le_bytes(data)
    }

    /// What is no guest's doing.
    fn happens(&self, story: &mut Story<'_>) {
        match story.byte() % 4 {
            0 => self.board.power.press_button(),
            1 => self.board.rtc.on_timer(),
            2 => {
                if let Some(watchdog) = &self.watchdog {
                    let _expired = watchdog.on_timer();
                }
            }
            _ => {
                if let Some(balloon) = self.virtio.balloon() {
                    // What is more than the guest's memory is refused.
                    let _wish = balloon.set(u64::from(story.word()) << 12, u64::MAX);
                }
            }
        }
    }

    /// Somebody wants another number of processors.
    fn resize(&mut self, story: &mut Story<'_>) {
        let (answers, _) = std::sync::mpsc::sync_channel(1);
        let wish = Wish {
            count: u16::from(story.byte() % 6),
            wait: story.byte().is_multiple_of(2),
            asker: answers.into(),
            limit: std::time::Duration::from_secs(30),
        };
        let mut vcpus = Vcpus(self.events.clone());
        self.processors.resize(wish, true, &mut vcpus);
    }

    /// The machine's thread finds out what waits.
    fn decide(&mut self) {
        let vcpus = Vcpus(self.events.clone());
        while let Some(event) = self.events.take() {
            match event {
                Event::CpuEjected { cpu } => self.processors.on_ejected(cpu, &vcpus),
                Event::CpuRefused { cpu, status } => self.processors.on_refused(cpu, status),
                Event::Vcpu(VcpuEvent::Parked { id: cpu }) => self.processors.on_parked(cpu),
                _ => {}
            }
        }
    }

    /// The first registers of each function of bus 0 of each segment that a guest cannot change the size of by what it plugs.
    fn fingerprint(&self) -> Vec<u32> {
        let functions = (0..32_u64).map(|slot| slot << 15);
        let registers = functions.flat_map(|at| (0..16).map(move |register| at | register << 2));
        let first = registers.clone().map(|at| self.through_ports(at, None));
        let second = self.ecams.get(1).map(|ecam| {
            registers.map(|at| {
                let mut data = [0; 4];
                self.buses.mmio.read(ecam.start + at, &mut data);
                u32::from_le_bytes(data)
            })
        });
        first.chain(second.into_iter().flatten()).collect()
    }
}

/// A port: of a device, or any.
fn port(story: &mut Story<'_>) -> u64 {
    let (which, offset) = (story.byte(), story.byte());
    match PORTS.get(usize::from(which % 16)) {
        Some(base) => u64::from(base + u16::from(offset % 0x40)),
        None => story.word().into(),
    }
}

/// Where a register of configuration space is from its start.
fn place(story: &mut Story<'_>) -> u64 {
    let bus = match story.byte() {
        255 => u64::from(story.byte()),
        byte if byte % 2 == 0 => 0,
        byte => u64::from(byte) % BUSES,
    };
    let (slot, register) = (
        u64::from(story.byte() % 32),
        u64::from(story.word() % 0x1000),
    );
    let function = match story.byte() {
        255 => 7,
        _ => 0,
    };
    bus << 20 | slot << 15 | function << 12 | register
}

/// An address: in a window for BARs, near its end, or any.
fn address(story: &mut Story<'_>) -> u64 {
    match story.byte() % 8 {
        which @ 0..3 => LOW[usize::from(which) % 2].start + u64::from(story.word()) * 4,
        which @ 3..6 => HIGH[usize::from(which) % 2].start + u64::from(story.word()) * 4,
        6 => HIGH[1].end - u64::from(story.byte()),
        _ => story.quadword(),
    }
}

/// A read or a write of as many bytes as KVM tells of at once at most.
fn access(bus: &AddressMap, at: u64, story: &mut Story<'_>, most: usize) {
    let (kind, value) = (story.byte(), story.quadword());
    let mut data = value.to_le_bytes();
    let width = width_of(kind >> 1).min(most);
    let Some(data) = data.get_mut(..width) else {
        return;
    };
    match kind % 2 {
        0 => bus.write(at, data),
        _ => bus.read(at, data),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_guest_brings_a_board_out_of_order(
            story in proptest::collection::vec(any::<u8>(), 0..2000)
        ) {
            board(&story);
        }
    }
}
