//! An add that fails, at each step that it has: each call of the host's and of KVM's is made to fail in turn.
//!
//! The calls are not listed anywhere. An add is played once for each that it makes, with that one failing, until one
//! makes fewer: a call that is new is among them.

mod bus_0;

use std::collections::BTreeSet;
use std::io;
use std::process::Command;
use std::thread::JoinHandle;

use busway_iommu::IommufdMode;
use busway_pci::{Bdf, InterruptLevel, Reserve, Segment, Windows};

use super::fake::{FakeHost, FaultyWires, LARGE};
use super::*;
use crate::arch::layout;
use crate::config::{Choice, MemoryConfig, OnError, PlatformConfig};
use crate::devices::pci_hotplug::{EJECT, PciHotplug, WANTED};
use crate::kvm::{BusDevice, Buses};
use crate::machine::address_plan::SegmentAddresses;
use crate::machine::handed::Files;
use crate::machine::removal::Removal;
use crate::machine::requests::{Control, Request, Requests};
use crate::memory::Ram;

/// An interrupt line that leads nowhere.
#[derive(Debug)]
struct Line;

impl InterruptLevel for Line {
    fn set(&self, _asserted: bool) {}
}

/// A machine of two empty slots behind ports, and somebody who asks. A guest that is played by the test is told of
/// bus 0 by the registers.
struct Machine {
    passthrough: Passthrough,
    pci: Pci,
    host: FakeHost,
    router: IrqRouter,
    registers: Arc<PciHotplug>,
    events: Arc<Events>,
    requests: Requests,
    control: Control,
    memory: Arc<Regions>,
    _ram: Ram,
    _vm: Vm,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.memory.clear();
    }
}

/// All that an add could leave behind.
#[derive(Debug, PartialEq, Eq)]
struct Digest {
    /// What the host has given out.
    held: [usize; 4],
    /// Descriptors of this process, sorted.
    descriptors: Vec<String>,
    /// Interrupts that are connected to the guest.
    vectors: usize,
    /// All functions of the guest's, by address.
    functions: Vec<String>,
    /// What each slot says.
    slots: String,
    /// What the registers of bus 0 hold.
    registers: crate::devices::pci_hotplug::Slots,
    empty_slots: usize,
    ids: Vec<String>,
    on_their_way: usize,
    waiting: usize,
    /// Guest addresses that are memory.
    memory: String,
}

/// What a batch of one device ends with.
type Asking = JoinHandle<Result<Answer, RequestError>>;

const LIMIT: Duration = Duration::from_secs(30);

impl Machine {
    /// Nothing, said on standard error, where there is no KVM. Each slot has room for BARs of `room` bytes.
    fn new(room: u64) -> Option<Self> {
        Self::made(room, true, 16 << 30, &[])
    }

    /// One whose devices are to sit on bus 0, where `room` bytes are for 64-bit BARs.
    fn with_root_bus(room: u64) -> Option<Self> {
        Self::made(1 << 20, false, room, &[])
    }

    /// One whose empty slots have `room` bytes each for BARs below 4 GiB. There are `above` bytes above RAM. It starts with
    /// the `first` devices, each planned to be on bus 0 or not.
    fn made(room: u64, root_ports: bool, above: u64, first: &[(&str, bool)]) -> Option<Self> {
        let vm = Vm::new()
            .inspect_err(|error| eprintln!("skipped: {error}"))
            .ok()?;
        let config = VmConfig {
            memory: MemoryConfig {
                size: 16 << 20,
                ..MemoryConfig::default()
            },
            platform: PlatformConfig {
                iommufd: Choice::Off,
                root_ports: Some(root_ports),
                ..PlatformConfig::default()
            },
            ..VmConfig::default()
        };
        let ram = Ram::new(&config.memory, false).unwrap();
        let memory = Arc::<Regions>::default();
        for region in ram.regions() {
            memory.add(region).unwrap();
        }
        let high = 64 << 30..(64 << 30) + above;
        let windows = Windows {
            io: layout::PCI_IO,
            memory32: vec![layout::mmio32(layout::MMIO32_START, &[]).remove(0)],
            memory64: vec![high],
        };
        let router = vm.irq_router().unwrap();
        let lines = router.shared_lines();
        let buses = Buses::default();
        let mut pci = Pci::new(
            vec![SegmentAddresses {
                windows,
                ecam: layout::ECAM_START..layout::ECAM_START + layout::ECAM_SIZE,
            }],
            &buses,
            memory.clone(),
            vm.doorbells(),
            lines,
            false,
        )
        .unwrap();
        let events = Events::new().unwrap();
        let reserve = Reserve {
            memory32: room,
            memory64: 1 << 20,
        };
        let (routes, slots) = (Arc::new(router.clone()), events.clone());
        pci.add_empty_ports(0, 2, reserve, &(routes as _), &(slots as _))
            .unwrap();
        let host = FakeHost::new();
        let wires = Arc::new(FaultyWires {
            router: router.clone(),
            faults: host.faults.clone(),
        });
        let spaces = Box::new(host.clone());
        let open = OpenDevices::default();
        let mut passthrough =
            Passthrough::opening(&config, spaces, wires, &memory, &router, &events, open).unwrap();
        let opened = passthrough.open(found(&host, first), &Report::start());
        if let Some(opened) = opened.unwrap() {
            passthrough.map(&opened).unwrap();
            passthrough.attach_first(opened, &mut pci).unwrap();
        }
        pci.assign().unwrap();
        let segment = Segment(0);
        let free = pci.free_slots(segment);
        let registers = pci.seats().open(segment, free, Arc::new(Line), &events);
        let requests = Requests::new().unwrap();
        Some(Self {
            passthrough,
            pci,
            host,
            router,
            registers,
            events,
            control: requests.control(),
            requests,
            memory,
            _ram: ram,
            _vm: vm,
        })
    }

    fn asker(&self) -> (Asker, Asking) {
        let control = self.control.clone();
        let asking = std::thread::spawn(move || control.ask(Request::Pause));
        loop {
            if let Some((_, asker)) = self.requests.take() {
                return (asker, asking);
            }
            std::thread::yield_now();
        }
    }

    /// Adds a device, and gives what was answered when it has come, or is closed where it has not.
    fn add(&mut self, id: &str, path: &str) -> Result<Answer, RequestError> {
        let mut config = DeviceConfig::new(path).unwrap();
        config.id = Some(id.to_owned());
        self.add_all(vec![config])
    }

    fn add_all(&mut self, configs: Vec<DeviceConfig>) -> Result<Answer, RequestError> {
        let (asker, asking) = self.asker();
        self.passthrough
            .attach(configs, Files::default(), &self.pci, asker);
        while !asking.is_finished() {
            self.passthrough.on_attached();
            self.passthrough.on_time(&mut self.pci, Instant::now());
            std::thread::yield_now();
        }
        self.passthrough.attached.settle();
        asking.join().unwrap()
    }

    /// Asks for a removal, and gives who waits for what comes of it.
    fn remove(&mut self, id: &str, force: bool, held: bool) -> Asking {
        let (asker, asking) = self.asker();
        let removal = Removal::new(asker, true, force, LIMIT);
        let seats = self.pci.seats();
        self.passthrough.remove(id, removal, seats, held);
        // A device is asked for when the loop has dealt with what waits.
        self.passthrough.on_time(&mut self.pci, Instant::now());
        asking
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.registers.write(offset, &value.to_le_bytes());
    }

    /// The guest releases what is in these slots of bus 0, and the event loop hears of it.
    fn eject(&mut self, slots: u32) {
        self.write(EJECT, slots);
        self.passthrough.attached.on_ejected(self.pci.seats());
        self.passthrough.attached.settle();
    }

    /// A doubleword of the function in a slot of bus 0.
    fn in_slot(&self, slot: u8, offset: u16) -> u32 {
        let mut data = [0; 4];
        let bdf = Bdf::new(0, slot, 0).unwrap();
        self.pci.topology().config_read(bdf, offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Pulls a device out of a guest that does not run. One on bus 0 it finds gone when it goes on, and releases.
    fn pull_out(&mut self, id: &str) {
        self.pull_out_only(id);
        self.eject(self.read(WANTED));
    }

    fn pull_out_only(&mut self, id: &str) {
        let (asker, asking) = self.asker();
        let removal = Removal::new(asker, true, true, LIMIT);
        let seats = self.pci.seats();
        self.passthrough.remove(id, removal, seats, true);
        let answer = asking.join().unwrap();
        assert_eq!(answer, Ok(Answer::Done));
        self.passthrough.attached.settle();
    }

    fn digest(&self) -> Digest {
        let folder = std::fs::read_dir("/proc/self/fd").unwrap();
        let link = |entry: io::Result<std::fs::DirEntry>| {
            let target = std::fs::read_link(entry.unwrap().path()).ok()?;
            let text = target.display().to_string();
            // Numbers of inodes are new each time.
            Some(
                text.split_once(":[")
                    .map_or(text.clone(), |(kind, _)| kind.to_owned()),
            )
        };
        let mut descriptors: Vec<_> = folder.filter_map(link).collect();
        descriptors.sort();
        let topology = self.pci.topology();
        let functions = topology.functions().into_iter();
        let addresses = functions.map(|(id, _)| format!("{:?}", topology.bdf(id)));
        let slots = self.pci.empty_ports(&[]).map(|(port, _)| {
            topology.with_slot(port, |slot| {
                (slot.slot(), slot.powered(), slot.steady(), slot.windows())
            })
        });
        Digest {
            held: self.host.held(),
            descriptors,
            vectors: self.router.vectors().now,
            functions: addresses.collect(),
            slots: format!("{:?}", slots.collect::<Vec<_>>()),
            registers: self.registers.slots(),
            empty_slots: self.passthrough.empty_slots(&self.pci),
            ids: self.passthrough.attached.ids().into_values().collect(),
            on_their_way: self.passthrough.on_their_way.len(),
            waiting: self.passthrough.waiting.len(),
            memory: format!("{:?}", self.memory),
        }
    }
}

/// What a machine is to start with.
fn found(host: &FakeHost, first: &[(&str, bool)]) -> Found {
    let requests = first.iter().map(|&(path, on_root_bus)| {
        let config = DeviceConfig::new(path).unwrap();
        find::Request {
            options: options(&config).unwrap(),
            identity: HostIdentity::in_folder(&config.path),
            config,
            inherited: None,
            on_root_bus,
        }
    });
    Found {
        paths: host.paths().clone(),
        requests: requests.collect(),
        asked: IommufdMode::Off,
        mode: IommufdMode::Off,
        iommufd: None,
    }
}

/// That this process has no other test beside this one, whose descriptors would be counted.
const ALONE: &str = "BUSWAY_TEST_ALONE";

/// Runs the test `name` in a process of its own, where that is not done yet.
fn alone(name: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let own = std::env::current_exe().unwrap();
    let run = Command::new(own)
        .args(["--exact", "--nocapture", name])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    let errors = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{said}\n{errors}");
    assert!(said.contains("1 passed"), "{said}");
    eprintln!("{errors}");
    false
}

const FIRST: &str = "0000:fe:01.0";
const SECOND: &str = "0000:fe:02.0";

#[test]
fn an_add_that_fails_at_any_step_leaves_the_machine_as_it_was() {
    if !alone(concat!(
        "machine::passthrough::tests::",
        "an_add_that_fails_at_any_step_leaves_the_machine_as_it_was"
    )) {
        return;
    }
    // As the first device, for which a space is made, and beside another.
    for (beside, on_bus_0) in [(false, false), (true, false), (false, true), (true, true)] {
        let machine = match on_bus_0 {
            false => Machine::new(1 << 20),
            true => Machine::with_root_bus(16 << 30),
        };
        let Some(mut machine) = machine else {
            return;
        };
        if beside {
            machine.add("first", FIRST).unwrap();
        }
        let before = machine.digest();
        let (mut fatal, mut borne) = (BTreeSet::new(), BTreeSet::new());
        for number in 1.. {
            machine.host.faults.arm(Some(number));
            let answer = machine.add("drive", SECOND);
            let failed = machine.host.faults.failed();
            machine.host.faults.arm(None);
            match &answer {
                Ok(_) => {
                    borne.extend(failed);
                    assert_ne!(machine.digest(), before, "nothing was added");
                    machine.pull_out("drive");
                }
                Err(why) => {
                    let what = failed.unwrap_or_else(|| panic!("not asked to fail: {why}"));
                    fatal.insert(what);
                }
            }
            let what = format!("call {number}, {failed:?}, {answer:?}");
            assert_eq!(machine.digest(), before, "{what}");
            if failed.is_none() {
                break;
            }
        }
        eprintln!(
            "beside another: {beside}; on bus 0: {on_bus_0}; fail: {fatal:?}; are borne: {borne:?}"
        );
        let mut expected = vec!["open"];
        if !beside {
            expected.extend(["make a space", "join", "map memory"]);
        }
        for what in expected {
            assert!(
                fatal.contains(what),
                "{what} is no step that fails: {fatal:?}"
            );
        }
        let all: BTreeSet<_> = fatal.union(&borne).copied().collect();
        for what in [
            "reset",
            "read a register",
            "set interrupts up",
            "connect a pin",
        ] {
            assert!(all.contains(what), "{what} is no step: {all:?}");
        }
    }
}

#[test]
fn an_add_that_finds_no_room_or_no_slot_leaves_the_machine_as_it_was() {
    if !alone(concat!(
        "machine::passthrough::tests::",
        "an_add_that_finds_no_room_or_no_slot_leaves_the_machine_as_it_was"
    )) {
        return;
    }
    let Some(mut machine) = Machine::new(1 << 20) else {
        return;
    };
    machine.add("first", FIRST).unwrap();
    let before = machine.digest();
    for (id, path, words) in [
        ("first", SECOND, "the VM has"),
        ("again", FIRST, "the VM has"),
        ("large", LARGE, "64 MiB"),
    ] {
        let why = machine.add(id, path).unwrap_err().to_string();
        assert!(why.contains(words), "{why}");
        assert_eq!(machine.digest(), before);
    }
    machine.add("second", SECOND).unwrap();
    let full = machine.digest();
    let why = machine
        .add("third", "0000:fe:04.0")
        .unwrap_err()
        .to_string();
    assert!(why.contains("each of the VM's 2 slots"), "{why}");
    assert_eq!(machine.digest(), full);
    machine.pull_out("second");
    assert_eq!(machine.digest(), before);
}

#[test]
fn a_guest_that_restarts_is_held_for_a_device_no_more() {
    let Some(mut machine) = Machine::new(1 << 20) else {
        return;
    };
    let mut config = DeviceConfig::new(FIRST).unwrap();
    config.on_error = OnError::Pause;
    machine.add_all(vec![config]).unwrap();
    let state = |machine: &Machine| {
        let seen = machine.passthrough.observed(machine.pci.seats(), true);
        seen[0].state
    };
    assert_ne!(state(&machine), DeviceState::Held);
    machine.host.fail_all();
    let seats = machine.pci.seats();
    let verdict = machine.passthrough.attached.on_ready(seats, false);
    assert_eq!(verdict.unwrap(), Verdict::Hold);
    assert_eq!(state(&machine), DeviceState::Held);
    machine.passthrough.attached.on_restart(seats);
    // It is held later, for another.
    assert_ne!(state(&machine), DeviceState::Held);
}
