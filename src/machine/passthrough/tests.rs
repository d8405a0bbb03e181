//! An add that fails, at each step that it has: each call of the host's and of KVM's is made to fail in turn.
//!
//! The calls are not listed anywhere. An add is played once for each that it makes, with that one failing, until one
//! makes fewer: a call that is new is among them.

use std::collections::BTreeSet;
use std::io;
use std::process::Command;
use std::thread::JoinHandle;

use busway_iommu::IommufdMode;
use busway_pci::{Bdf, Device, InterruptLevel, Reserve, Segment, Windows};

use super::fake::{FakeHost, FaultyWires, LARGE};
use super::*;
use crate::arch::layout;
use crate::config::{Choice, MemoryConfig, OnError, PlatformConfig};
use crate::devices::pci_hotplug::{
    ADDED, EJECT, EJECT_REQUEST, OUTCOME, PRESENT, PciHotplug, WANTED,
};
use crate::kvm::{BusDevice, Buses};
use crate::machine::address_plan::SegmentAddresses;
use crate::machine::events::Event;
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

/// The first slot for devices on bus 0 of segment 0.
const FIRST_SLOT: RootSlot = RootSlot {
    segment: Segment(0),
    device: Device::new(1).unwrap(),
};

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
const THIRD: &str = "0000:fe:04.0";

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

/// Vendor and device of the fake drive, and where nothing answers.
const DRIVE: u32 = 0x0010_1b36;
const NOTHING: u32 = u32::MAX;

fn added(id: &str, address: &str) -> Result<Answer, RequestError> {
    let (id, address) = (id.to_owned(), address.to_owned());
    Ok(Answer::Added(Added::one(id, address)))
}

#[test]
fn a_device_comes_to_bus_0_as_an_integrated_endpoint_and_leaves_when_the_guest_lets_go_of_it() {
    let Some(mut machine) = Machine::with_root_bus(16 << 30) else {
        return;
    };
    let (held, slots) = (machine.host.held(), machine.registers.slots());
    let empty = machine.passthrough.empty_slots(&machine.pci);
    assert_eq!(empty, 15 + 2, "on bus 0, and behind ports");
    for unasked in [false, true] {
        assert_eq!(machine.add("drive", FIRST), added("drive", "0000:00:01.0"));
        let told = [ADDED, PRESENT].map(|at| machine.read(at));
        assert_eq!(told, [1 << 1; 2]);
        assert_eq!(machine.in_slot(1, 0), DRIVE);
        // Device/port type, and no link.
        assert_eq!(machine.in_slot(1, 0x80) >> 20 & 0xf, 0b1001);
        assert_eq!(machine.in_slot(1, 0x8c), 0);
        assert_eq!(machine.passthrough.empty_slots(&machine.pci), empty - 1);
        let seen = machine.passthrough.observed(machine.pci.seats(), false);
        assert_eq!(seen[0].guest.as_deref(), Some("0000:00:01.0"));
        assert_eq!(seen[0].state, DeviceState::Present);
        if unasked {
            machine.eject(1 << 1);
        } else {
            let asking = machine.remove("drive", false, false);
            assert_eq!(machine.read(WANTED), 1 << 1);
            let seen = machine.passthrough.observed(machine.pci.seats(), false);
            assert_eq!(seen[0].state, DeviceState::Going);
            assert_eq!(machine.in_slot(1, 0), DRIVE, "it has not released it yet");
            machine.eject(1 << 1);
            assert_eq!(asking.join().unwrap(), Ok(Answer::Done));
        }
        assert_eq!(machine.in_slot(1, 0), NOTHING);
        assert_eq!(
            (machine.host.held(), machine.registers.slots()),
            (held, slots)
        );
        assert_eq!(machine.passthrough.empty_slots(&machine.pci), empty);
    }
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

#[test]
fn devices_that_a_guest_starts_with_sit_where_they_were_planned_and_leave_from_there() {
    let first = [(FIRST, true), (SECOND, false), (THIRD, true)];
    let Some(mut machine) = Machine::made(1 << 20, false, 16 << 30, &first) else {
        return;
    };
    assert_eq!((machine.read(ADDED), machine.read(PRESENT)), (0, 0b110));
    assert_eq!([1, 2].map(|slot| machine.in_slot(slot, 0)), [DRIVE; 2]);
    assert_eq!(machine.in_slot(2, 0x80) >> 20 & 0xf, 0b1001);
    let seen = machine.passthrough.observed(machine.pci.seats(), false);
    let places: Vec<_> = seen.iter().filter_map(|one| one.guest.as_deref()).collect();
    assert_eq!(places[..1], ["0000:00:01.0"]);
    assert!(!places[1].starts_with("0000:00:"), "{places:?}");
    assert_eq!(places[2..], ["0000:00:02.0"]);
    // Firmware finds them there.
    let path = |host: &str| machine.pci.boot_path(|called| called == host);
    assert_eq!(path(THIRD).as_deref(), Some("/pci@i0cf8/device@2"));
    assert!(path(SECOND).unwrap().contains("/pci-bridge@"));
    // What comes later has the next slot.
    assert_eq!(
        machine.add("later", "0000:fe:05.0"),
        added("later", "0000:00:03.0")
    );
    let asking = machine.remove(FIRST, false, false);
    assert_eq!(machine.read(WANTED), 1 << 1);
    machine.eject(1 << 1);
    assert_eq!(asking.join().unwrap(), Ok(Answer::Done));
    assert_eq!(machine.in_slot(1, 0), NOTHING);
    assert_eq!(machine.host.held()[0], 3);
}

#[test]
fn a_place_that_there_is_not_or_that_is_taken_is_refused_with_what_helps() {
    let Some(mut machine) = Machine::with_root_bus(16 << 30) else {
        return;
    };
    let at = |path, pci_segment, pci_device_id| DeviceConfig {
        pci_segment,
        pci_device_id,
        ..DeviceConfig::new(path).unwrap()
    };
    for (segment, device, words) in [
        (1, None, "num_pci_segments"),
        (0, Some(0), "1 to 31"),
        (0, Some(32), "1 to 31"),
    ] {
        let answer = machine.add_all(vec![at(FIRST, segment, device)]);
        let why = answer.unwrap_err().to_string();
        assert!(why.contains(words), "{why}");
    }
    // On bus 0, and behind the port of that number.
    for (path, device, address) in [(FIRST, 7, "0000:00:07.0"), (SECOND, 16, "0000:01:00.0")] {
        let mut one = at(path, 0, Some(device));
        one.root_port = Some(device == 16);
        let Ok(Answer::Added(added)) = machine.add_all(vec![one]) else {
            panic!("not added");
        };
        assert_eq!(added.first.address, address);
    }
    let mut taken = at(THIRD, 0, Some(16));
    taken.root_port = Some(true);
    let why = machine.add_all(vec![taken]).unwrap_err().to_string();
    assert!(why.contains("pci_device_id=16"), "{why}");
}

#[test]
fn a_guest_that_refuses_a_device_on_bus_0_keeps_it_and_one_that_does_not_answer_can_lose_it() {
    let Some(mut machine) = Machine::with_root_bus(16 << 30) else {
        return;
    };
    machine.add("drive", FIRST).unwrap();
    let asking = machine.remove("drive", false, false);
    machine.write(OUTCOME, 1 | 0x82 << 8 | u32::from(EJECT_REQUEST) << 16);
    let refused = Event::Refused {
        slot: FIRST_SLOT,
        status: 0x82,
    };
    let mut told = std::iter::from_fn(|| machine.events.take());
    assert!(told.any(|event| event == refused));
    let seats = machine.pci.seats();
    machine
        .passthrough
        .attached
        .on_refused(FIRST_SLOT, 0x82, seats);
    let why = asking.join().unwrap().unwrap_err().to_string();
    assert!(why.contains("busy") && why.contains("--force"), "{why}");
    // It does not look at all, and then looks and does nothing.
    for (looks, words) in [
        (false, "was not there to be asked"),
        (true, "did not release"),
    ] {
        let asking = machine.remove("drive", false, false);
        if looks {
            machine.write(WANTED, machine.read(WANTED));
        }
        let deadline = machine.passthrough.deadline().unwrap();
        machine.passthrough.on_time(&mut machine.pci, deadline);
        let why = asking.join().unwrap().unwrap_err().to_string();
        assert!(why.contains(words) && why.contains("30 s"), "{why}");
        assert_eq!((machine.in_slot(1, 0), machine.read(WANTED)), (DRIVE, 0));
    }
    // By force the host has it back, and the guest is told to look.
    let asking = machine.remove("drive", true, false);
    machine.write(WANTED, machine.read(WANTED));
    let deadline = machine.passthrough.deadline().unwrap();
    machine.passthrough.on_time(&mut machine.pci, deadline);
    assert_eq!(asking.join().unwrap(), Ok(Answer::Done));
    machine.passthrough.attached.settle();
    assert_eq!(machine.host.held(), [0; 4]);
    assert_eq!(
        (machine.in_slot(1, 0), machine.read(WANTED)),
        (NOTHING, 1 << 1)
    );
    // Its slot is another's when the guest has released it.
    assert_eq!(machine.add("drive", FIRST), added("drive", "0000:00:02.0"));
    machine.eject(1 << 1);
    assert_eq!(machine.in_slot(2, 0), DRIVE);
    assert_eq!(machine.add("other", SECOND), added("other", "0000:00:01.0"));
}

#[test]
fn a_restart_settles_what_was_asked_of_bus_0_and_what_has_come_stays() {
    let Some(mut machine) = Machine::with_root_bus(16 << 30) else {
        return;
    };
    machine.add("first", FIRST).unwrap();
    machine.add("second", SECOND).unwrap();
    machine.add("third", THIRD).unwrap();
    machine.pull_out_only("first");
    let asking = machine.remove("second", false, false);
    let seats = machine.pci.seats();
    machine.passthrough.attached.on_restart(seats);
    seats.restart();
    assert_eq!(asking.join().unwrap(), Ok(Answer::Done));
    let registers = [ADDED, WANTED, PRESENT].map(|at| machine.read(at));
    assert_eq!(registers, [0, 0, 1 << 3]);
    machine.pci.topology().reset();
    machine.pci.assign().unwrap();
    let there = [1, 2, 3].map(|slot| machine.in_slot(slot, 0));
    assert_eq!(there, [NOTHING, NOTHING, DRIVE]);
    assert_eq!(machine.add("first", FIRST), added("first", "0000:00:01.0"));
}

#[test]
fn several_functions_and_what_finds_no_slot_of_bus_0_come_behind_ports() {
    let Some(mut machine) = Machine::with_root_bus(16 << 30) else {
        return;
    };
    let both = ["0000:fe:01.0", "0000:fe:01.1"].map(|path| DeviceConfig::new(path).unwrap());
    let Ok(Answer::Added(several)) = machine.add_all(both.to_vec()) else {
        panic!("not added");
    };
    let addresses = [&several.first, &several.others[0]].map(|one| one.address.clone());
    assert!(
        addresses
            .iter()
            .all(|address| !address.starts_with("0000:00:")),
        "{addresses:?}"
    );
    assert_eq!(machine.read(PRESENT), 0);
    // One that is said to be behind a port is, and one is on bus 0 that is said to be there.
    let mut behind = DeviceConfig::new(SECOND).unwrap();
    behind.root_port = Some(true);
    let Ok(Answer::Added(one)) = machine.add_all(vec![behind]) else {
        panic!("not added");
    };
    assert!(!one.first.address.starts_with("0000:00:"), "{one:?}");
    machine.pull_out(SECOND);
    let anywhere = PciPlace::default();
    let seats = machine.pci.seats();
    while seats.claim(Owner::Virtio, anywhere).is_some() {}
    let Ok(Answer::Added(one)) = machine.add_all(vec![DeviceConfig::new(THIRD).unwrap()]) else {
        panic!("not added");
    };
    assert!(!one.first.address.starts_with("0000:00:"), "{one:?}");
    let why = machine.add("more", SECOND).unwrap_err().to_string();
    assert!(why.contains("each of the VM's 2 slots"), "{why}");
}

#[test]
fn a_device_that_finds_no_room_on_bus_0_leaves_its_slot_free() {
    let Some(mut machine) = Machine::with_root_bus(32 << 20) else {
        return;
    };
    let why = machine.add("large", LARGE).unwrap_err().to_string();
    assert!(why.contains("no room"), "{why}");
    assert_eq!(machine.host.held(), [0; 4]);
    assert_eq!(machine.read(PRESENT), 0);
    assert_eq!(machine.add("drive", FIRST), added("drive", "0000:00:01.0"));
}
