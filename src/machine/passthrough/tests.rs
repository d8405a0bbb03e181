//! An add that fails, at each step that it has: each call of the host's and of KVM's is made to fail in turn.
//!
//! The calls are not listed anywhere. An add is played once for each that it makes, with that one failing, until one
//! makes fewer: a call that is new is among them.

use std::collections::BTreeSet;
use std::io;
use std::process::Command;
use std::thread::JoinHandle;

use busway_pci::{Reserve, Windows};

use super::fake::{FakeHost, FaultyWires, LARGE};
use super::*;
use crate::arch::layout;
use crate::config::{Choice, MemoryConfig, PlatformConfig};
use crate::kvm::Buses;
use crate::machine::handed::Files;
use crate::machine::removal::Removal;
use crate::machine::requests::{Control, Request, Requests};
use crate::memory::Ram;

/// A machine of two empty slots, and somebody who asks.
struct Machine {
    passthrough: Passthrough,
    pci: Pci,
    host: FakeHost,
    router: IrqRouter,
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
                ..PlatformConfig::default()
            },
            ..VmConfig::default()
        };
        let ram = Ram::new(&config.memory, false).unwrap();
        let memory = Arc::<Regions>::default();
        for region in ram.regions() {
            memory.add(region).unwrap();
        }
        let high = 64 << 30..80 << 30;
        let windows = Windows {
            io: layout::PCI_IO,
            memory32: vec![layout::mmio32(layout::MMIO32_START, &[]).remove(0)],
            memory64: vec![high],
        };
        let router = vm.irq_router().unwrap();
        let lines = router.shared_lines();
        let buses = Buses::default();
        let mut pci = Pci::new(
            windows,
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
        pci.add_empty_ports(2, reserve, &(routes as _), &(slots as _))
            .unwrap();
        pci.assign().unwrap();
        let host = FakeHost::new();
        let wires = Arc::new(FaultyWires {
            router: router.clone(),
            faults: host.faults.clone(),
        });
        let spaces = Box::new(host.clone());
        let open = OpenDevices::default();
        let passthrough =
            Passthrough::opening(&config, spaces, wires, &memory, &router, &events, open).unwrap();
        let requests = Requests::new().unwrap();
        Some(Self {
            passthrough,
            pci,
            host,
            router,
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
        let (asker, asking) = self.asker();
        self.passthrough
            .attach(vec![config], Files::default(), &self.pci, asker);
        while !asking.is_finished() {
            self.passthrough.on_attached();
            self.passthrough.on_time(&mut self.pci, Instant::now());
            std::thread::yield_now();
        }
        self.passthrough.attached.settle();
        asking.join().unwrap()
    }

    /// Pulls a device out of a guest that does not run.
    fn pull_out(&mut self, id: &str) {
        let (asker, asking) = self.asker();
        let removal = Removal::new(asker, true, true, LIMIT);
        let topology = self.pci.topology();
        self.passthrough.remove(id, removal, topology, true);
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
            empty_slots: self.passthrough.empty_slots(&self.pci),
            ids: self.passthrough.attached.ids().into_values().collect(),
            on_their_way: self.passthrough.on_their_way.len(),
            waiting: self.passthrough.waiting.len(),
            memory: format!("{:?}", self.memory),
        }
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
    for beside in [false, true] {
        let Some(mut machine) = Machine::new(1 << 20) else {
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
        eprintln!("beside another: {beside}; fail: {fatal:?}; are borne: {borne:?}");
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
