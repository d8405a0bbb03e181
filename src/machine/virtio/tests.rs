use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use tempfile::TempDir;

use super::*;
use crate::arch::layout;
use crate::config::{CoreScheduling, DiskConfig, FsConfig, NetConfig, PlatformConfig, RngConfig};
use crate::devices::pci_hotplug::{
    ADDED, EJECT, EJECT_REQUEST, OUTCOME, PRESENT, PciHotplug, WANTED,
};
use crate::kvm::{BusDevice, Buses, Vm};
use crate::machine::address_plan::SegmentAddresses;
use crate::machine::removal::Removal;
use crate::machine::requests::{Added, Control, Request, Requests};
use crate::memory::{Area, Regions, Slots};
use crate::virtio::rng::Rng;
use crate::virtio::testing::{CountingRoutes, eventually, ram};
use busway_pci::{Bdf, Device, FunctionId, InterruptLevel, Segment, Windows};

/// An interrupt line that leads nowhere.
#[derive(Debug)]
struct Line;

impl InterruptLevel for Line {
    fn set(&self, _asserted: bool) {}
}

/// A machine's virtio devices, a guest that is played by the test, and somebody who asks.
pub(super) struct Machine {
    devices: VirtioDevices,
    registers: Arc<PciHotplug>,
    pub(super) pci: Pci,
    events: Arc<Events>,
    requests: Requests,
    control: Control,
    pub(super) folder: TempDir,
    _vm: Vm,
}

/// Who waits for an answer.
type Asking = JoinHandle<Result<Answer, RequestError>>;

/// Nothing, said on standard error, where there is no KVM. The machine starts with the disk `root`, in slot 1, and has a
/// source of randomness in slot 2, and a window above RAM of `room` bytes for BARs.
fn machine(room: u64) -> Option<Machine> {
    made(room, 1)
}

/// The same with one or two PCI segments.
pub(super) fn made(room: u64, segments: u16) -> Option<Machine> {
    let vm = Vm::new()
        .inspect_err(|error| eprintln!("skipped: {error}"))
        .ok()?;
    let high = HIGH..HIGH + room;
    let windows = Windows {
        io: layout::PCI_IO,
        memory32: vec![layout::mmio32(layout::MMIO32_START, &[]).remove(0)],
        memory64: vec![high],
    };
    let regions = Arc::new(Regions::default());
    let lines = vm.irq_router().ok()?.shared_lines();
    let above = HIGH + room..HIGH + 2 * room;
    let second = Windows {
        io: 0..0,
        memory32: Vec::new(),
        memory64: vec![above],
    };
    let ecams = layout::ecams(&[0, 0]).unwrap();
    let addresses = [windows, second].into_iter().zip(ecams);
    let addresses = addresses.map(|(windows, ecam)| SegmentAddresses { windows, ecam });
    let mut pci = Pci::new(
        addresses.take(segments.into()).collect(),
        &Buses::default(),
        regions,
        vm.doorbells(),
        lines,
        false,
    )
    .unwrap();
    let events = Events::new().unwrap();
    let routes = Arc::new(CountingRoutes::default());
    let ram = ram();
    let slots = Slots::new(&ram, &Arc::default(), Area::new(4 << 30..8 << 30));
    let mut devices =
        VirtioDevices::new(&ram, &Arc::default(), slots, routes, pci.seats(), &events);
    let folder = tempfile::tempdir().unwrap();
    let config = VmConfig {
        disk: vec![disk(&image(&folder, "root"), Some("root"))],
        platform: PlatformConfig {
            num_pci_segments: Some(segments),
            ..PlatformConfig::default()
        },
        ..VmConfig::default()
    };
    devices
        .add_first(&config, &BTreeMap::new(), &mut pci)
        .unwrap();
    let rng = Rng::new("rng", &RngConfig::default()).unwrap();
    devices.add_fixed(Box::new(rng), &mut pci).unwrap();
    let segment = Segment(0);
    let free = pci.free_slots(segment);
    let registers = pci.seats().open(segment, free, Arc::new(Line), &events);
    for segment in pci.segments().skip(1) {
        let free = pci.free_slots(segment);
        let _registers = pci.seats().open(segment, free, Arc::new(Line), &events);
    }
    pci.assign().unwrap();
    let requests = Requests::new().unwrap();
    Some(Machine {
        devices,
        registers,
        pci,
        events,
        control: requests.control(),
        requests,
        folder,
        _vm: vm,
    })
}

const ROOM: u64 = 1 << 20;
/// What a guest has to release a device.
const LIMIT: Duration = Duration::from_secs(30);
/// Where the window for 64-bit BARs begins.
const HIGH: u64 = 64 << 30;

pub(super) fn image(folder: &TempDir, name: &str) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, [0; 4096]).unwrap();
    path
}

pub(super) fn disk(path: &std::path::Path, id: Option<&str>) -> DiskConfig {
    DiskConfig {
        id: id.map(str::to_owned),
        ..DiskConfig::new(path)
    }
}

impl Machine {
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

    /// Adds a device, and gives what was answered when it has come.
    pub(super) fn add(&mut self, config: VirtioConfig) -> Result<Answer, RequestError> {
        let (asker, asking) = self.asker();
        let taken = |id: &str| id == "nvme";
        let cores = Cores::keep_apart(CoreScheduling::Off).unwrap();
        self.devices
            .add(config, Files::default(), &cores, taken, asker);
        while !asking.is_finished() {
            self.devices.on_attached(&mut self.pci);
        }
        asking.join().unwrap()
    }

    fn add_disk(&mut self, name: &str) -> Result<Answer, RequestError> {
        let path = image(&self.folder, name);
        self.add(VirtioConfig::Disk(disk(&path, Some(name))))
    }

    fn remove(&mut self, id: &str, force: bool, held: bool) -> Asking {
        self.remove_within(LIMIT, id, force, held)
    }

    /// Asks for a removal, and does not wait for what comes of it.
    fn remove_at_once(&mut self, id: &str, force: bool) -> Result<Answer, RequestError> {
        let (asker, asking) = self.asker();
        let removal = Removal::new(asker, false, force, LIMIT);
        let other = self.devices.remove(id, removal, false);
        assert!(other.is_none(), "{id} is one of them");
        asking.join().unwrap()
    }

    /// What the VM is said to have.
    fn shown(&self) -> Vec<String> {
        let configs = self.devices.configs();
        let names = configs.filter_map(|config| config.id().map(str::to_owned));
        names.collect()
    }

    fn remove_within(&mut self, limit: Duration, id: &str, force: bool, held: bool) -> Asking {
        let (asker, asking) = self.asker();
        let removal = Removal::new(asker, true, force, limit);
        let other = self.devices.remove(id, removal, held);
        assert!(other.is_none(), "{id} is one of them");
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

    /// The guest looks what it is asked for, and releases that.
    fn release(&mut self) {
        let wanted = self.read(WANTED);
        self.write(WANTED, wanted);
        self.write(EJECT, wanted);
        self.devices.on_ejected();
    }

    /// The device id of the function in a slot.
    fn in_slot(&self, slot: u8) -> u16 {
        let mut data = [0; 2];
        let bdf = Bdf::new(0, slot, 0).unwrap();
        self.pci.topology().config_read(bdf, 2, &mut data);
        u16::from_le_bytes(data)
    }

    /// Whether nobody has the image open. A program that another test starts has it for a moment.
    fn is_free(&self, name: &str) -> bool {
        Blk::new("probe", &disk(&self.folder.path().join(name), None)).is_ok()
    }

    fn functions(&self) -> Vec<FunctionId> {
        let functions = self.pci.topology().functions();
        functions.into_iter().map(|(id, _)| id).collect()
    }
}

/// A slot of bus 0 of segment 0.
fn root_slot(slot: u8) -> RootSlot {
    RootSlot {
        segment: Segment(0),
        device: Device::new(slot).unwrap(),
    }
}

fn added(id: &str, slot: u8) -> Result<Answer, RequestError> {
    let address = format!("0000:00:{slot:02x}.0");
    Ok(Answer::Added(Added::one(id.to_owned(), address)))
}

fn failure(answer: Result<Answer, RequestError>) -> String {
    let Err(RequestError::Failed(why)) = answer else {
        panic!("{answer:?}");
    };
    why
}

pub(super) const DISK: u16 = 0x1042;
const NOTHING: u16 = 0xffff;

#[test]
fn a_device_comes_into_the_first_free_slot_and_leaves_nothing_when_the_guest_lets_go_of_it() {
    let Some(mut machine) = machine(ROOM) else {
        return;
    };
    assert_eq!(
        machine.pci.seats().open_slots(Segment(0)),
        0xfffa,
        "not the bridge's, nor the fixed one's"
    );
    let before = machine.functions();
    for _ in 0..3 {
        assert_eq!(machine.add_disk("hot"), added("hot", 3));
        assert_eq!((machine.in_slot(3), machine.read(ADDED)), (DISK, 1 << 3));
        assert!(!machine.is_free("hot"));
        assert_eq!(machine.devices.info()[1].address, "0000:00:03.0");
        let asking = machine.remove("hot", false, false);
        assert_eq!(machine.read(WANTED), 1 << 3);
        assert_eq!(machine.in_slot(3), DISK, "it has not released it yet");
        machine.release();
        assert_eq!(machine.in_slot(3), NOTHING);
        assert_eq!(asking.join().unwrap(), Ok(Answer::Done));
        eventually("it is closed", || machine.is_free("hot"));
        assert_eq!(machine.functions(), before);
        assert_eq!(machine.read(PRESENT), 1 << 1);
    }
    // One that was there from the start leaves as well, and its slot is as good.
    let asking = machine.remove("root", false, false);
    machine.release();
    assert_eq!(asking.join().unwrap(), Ok(Answer::Done));
    assert_eq!(machine.add_disk("other"), added("other", 1));
}

#[test]
fn a_guest_that_lets_go_unasked_has_let_go() {
    let Some(mut machine) = machine(ROOM) else {
        return;
    };
    machine.write(EJECT, u32::MAX);
    // Before the event loop hears of it, and the fixed device stays.
    assert_eq!((machine.in_slot(1), machine.in_slot(2)), (NOTHING, 0x1044));
    machine.devices.on_ejected();
    eventually("it is closed", || machine.is_free("root"));
    assert!(machine.devices.info().is_empty());
}

#[test]
fn what_cannot_be_added_is_told_why_and_changes_nothing() {
    let Some(mut machine) = machine(ROOM) else {
        return;
    };
    let before = machine.functions();
    for id in ["root", "nvme"] {
        let config = VirtioConfig::Disk(disk(&machine.folder.path().join("root"), Some(id)));
        assert_eq!(
            machine.add(config),
            Err(RequestError::Exists(id.to_owned()))
        );
    }
    let missing = VirtioConfig::Disk(disk(&machine.folder.path().join("missing"), None));
    let why = failure(machine.add(missing));
    assert!(
        why.starts_with("disk disk0: ") && why.contains("missing"),
        "{why}"
    );
    let twice = VirtioConfig::Disk(disk(&machine.folder.path().join("root"), None));
    let why = failure(machine.add(twice));
    assert!(why.contains("root"), "{why}");
    let uneven = VirtioConfig::Net(NetConfig {
        num_queues: 3,
        ..NetConfig::default()
    });
    let why = failure(machine.add(uneven));
    assert!(why.contains("num_queues=3"), "{why}");
    assert_eq!(machine.functions(), before);
    assert_eq!(machine.read(ADDED), 0);
    // Nothing is kept for them.
    for slot in 3..16 {
        assert_eq!(
            machine.add_disk(&format!("d{slot}")),
            added(&format!("d{slot}"), slot)
        );
    }
    let why = failure(machine.add_disk("more"));
    assert!(
        why.contains("each of the 14 slots") && why.contains("(it has root, d3, d4, "),
        "{why}"
    );
}

#[test]
fn a_device_of_another_processs_is_refused_where_ram_is_private_whoever_listens() {
    let Some(mut machine) = machine(ROOM) else {
        return;
    };
    let socket = machine.folder.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let disk = DiskConfig {
        vhost_user: true,
        socket: Some(socket.clone()),
        ..DiskConfig::new("")
    };
    let fs = FsConfig::new("share", socket);
    for config in [VirtioConfig::Disk(disk), VirtioConfig::Fs(fs)] {
        let Err(RequestError::Invalid(why)) = machine.add(config) else {
            panic!("it was added");
        };
        assert!(why.contains("--memory shared=on"), "{why}");
    }
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "nobody has connected");
}

#[test]
fn a_device_whose_bar_would_find_no_room_is_refused_before_the_guest_sees_it() {
    // For the disk and the source of randomness, 32 KiB each, and one more.
    let Some(mut machine) = machine(3 * 0x8000) else {
        return;
    };
    assert_eq!(machine.add_disk("one"), added("one", 3));
    let why = failure(machine.add_disk("two"));
    assert!(why.contains("two") && why.contains("no room"), "{why}");
    assert_eq!(machine.in_slot(4), NOTHING);
    eventually("it is closed", || machine.is_free("two"));
    // And the guest can start anew with all.
    machine.pci.assign().unwrap();
}

#[test]
fn names_are_made_where_none_are_given() {
    let Some(mut machine) = machine(ROOM) else {
        return;
    };
    let path = image(&machine.folder, "a");
    assert_eq!(
        machine.add(VirtioConfig::Disk(disk(&path, None))),
        added("disk0", 3)
    );
    let path = image(&machine.folder, "b");
    assert_eq!(
        machine.add(VirtioConfig::Disk(disk(&path, None))),
        added("disk1", 4)
    );
    let asking = machine.remove("disk0", false, false);
    machine.release();
    asking.join().unwrap().unwrap();
    let path = image(&machine.folder, "c");
    assert_eq!(
        machine.add(VirtioConfig::Disk(disk(&path, None))),
        added("disk0", 3)
    );
}

#[test]
fn a_nic_is_shown_with_the_tap_that_it_has() {
    let Some(mut machine) = machine(ROOM) else {
        return;
    };
    match machine.add(VirtioConfig::Net(NetConfig::default())) {
        Err(RequestError::Failed(why)) => return eprintln!("skipped: {why}"),
        answer => assert_eq!(answer, added("net0", 3)),
    }
    let info = machine.devices.info();
    let Some(VirtioConfig::Net(net)) = info.last().map(|device| &device.config) else {
        panic!("{info:?}");
    };
    let tap = net.tap.as_deref().unwrap_or_default();
    assert!(tap.starts_with("vmtap"), "{net:?}");
}

#[test]
fn a_guest_that_refuses_keeps_the_device_and_says_why() {
    let Some(mut machine) = machine(ROOM) else {
        return;
    };
    let asking = machine.remove("root", false, false);
    machine.write(OUTCOME, 1 | 0x82 << 8 | u32::from(EJECT_REQUEST) << 16);
    let Some(crate::machine::events::Event::Refused { slot, status }) = machine.events.take()
    else {
        panic!("nothing was told");
    };
    machine.devices.on_refused(slot, status);
    let why = failure(asking.join().unwrap());
    assert!(
        why.contains("busy") && why.contains("0x82") && why.contains("--force"),
        "{why}"
    );
    assert_eq!(machine.devices.deadline(), None);
    assert!(!machine.is_free("root"));
}

#[test]
fn a_guest_that_takes_too_long_keeps_it_and_it_is_said_whether_it_knows() {
    let Some(mut machine) = machine(ROOM) else {
        return;
    };
    for (seen, words) in [(false, "was not there to be asked"), (true, "it still can")] {
        let asking = machine.remove("root", false, false);
        let again = machine.remove("root", false, false);
        assert!(matches!(again.join().unwrap(), Err(RequestError::State(_))));
        if seen {
            machine.write(WANTED, machine.read(WANTED));
        }
        let deadline = machine.devices.deadline().unwrap();
        machine.devices.on_time(deadline - Duration::from_millis(1));
        assert!(!asking.is_finished());
        machine.devices.on_time(deadline);
        let why = failure(asking.join().unwrap());
        assert!(why.contains(words) && why.contains("within 30 s"), "{why}");
        assert_eq!((machine.read(WANTED), machine.in_slot(1)), (0, DISK));
    }
    // It can, and later does.
    machine.write(EJECT, 1 << 1);
    machine.devices.on_ejected();
    eventually("it is closed", || machine.is_free("root"));
}

#[test]
fn each_removal_has_the_time_that_whoever_asked_gives_the_guest() {
    let Some(mut machine) = machine(ROOM) else {
        return;
    };
    assert_eq!(machine.add_disk("hot"), added("hot", 3));
    let (short, long) = (Duration::from_secs(2), Duration::from_secs(3600));
    let start = std::time::Instant::now();
    let first = machine.remove_within(long, "root", false, false);
    let second = machine.remove_within(short, "hot", false, false);
    let due = machine.devices.deadline().unwrap();
    assert!(due >= start + short && due < start + LIMIT, "the nearest");
    machine.devices.on_time(due);
    let why = failure(second.join().unwrap());
    assert!(why.contains("within 2 s"), "{why}");
    assert!(!first.is_finished());
    let due = machine.devices.deadline().unwrap();
    assert!(due >= start + long);
    machine.devices.on_time(due);
    let why = failure(first.join().unwrap());
    assert!(why.contains("within 3600 s"), "{why}");
}

#[test]
fn by_force_the_host_has_it_back_and_the_guest_an_empty_function_until_it_lets_go_or_restarts() {
    let Some(mut machine) = machine(ROOM) else {
        return;
    };
    for restarts in [false, true] {
        assert_eq!(machine.add_disk("hot"), added("hot", 3));
        // The guest does not run; else the time would have to be up.
        let asking = machine.remove("hot", true, true);
        assert_eq!(asking.join().unwrap(), Ok(Answer::Done));
        eventually("it is closed", || machine.is_free("hot"));
        assert_eq!(machine.in_slot(3), DISK);
        assert_eq!(machine.devices.info().len(), 1);
        // Its name is free, its slot is not.
        assert_eq!(machine.add_disk("hot"), added("hot", 4));
        machine.write(EJECT, 1 << 4);
        if restarts {
            machine.devices.on_restart();
        } else {
            machine.write(EJECT, 1 << 3);
        }
        machine.devices.on_ejected();
        assert_eq!((machine.in_slot(3), machine.in_slot(4)), (NOTHING, NOTHING));
        eventually("it is closed", || machine.is_free("hot"));
        assert_eq!(machine.read(PRESENT), 1 << 1);
    }
}

#[test]
fn a_restart_settles_what_was_asked_and_what_has_come_stays() {
    let Some(mut machine) = machine(ROOM) else {
        return;
    };
    assert_eq!(machine.add_disk("hot"), added("hot", 3));
    let asking = machine.remove("root", false, false);
    machine.devices.on_restart();
    assert_eq!(asking.join().unwrap(), Ok(Answer::Done));
    eventually("it is closed", || machine.is_free("root"));
    let registers = [ADDED, WANTED, PRESENT].map(|offset| machine.read(offset));
    assert_eq!(registers, [0, 0, 1 << 3]);
    machine.pci.topology().reset();
    machine.pci.assign().unwrap();
    assert_eq!((machine.in_slot(1), machine.in_slot(3)), (NOTHING, DISK));
}

#[test]
fn who_does_not_wait_is_answered_at_once_and_shown_a_vm_without_the_device() {
    let Some(mut machine) = machine(ROOM) else {
        return;
    };
    machine.add_disk("data").unwrap();
    machine.add_disk("more").unwrap();
    assert_eq!(machine.remove_at_once("data", false), Ok(Answer::Done));
    assert_eq!(machine.shown(), ["root", "more"]);
    assert!(machine.devices.is_leaving("data") && machine.devices.has("data"));
    assert!(!machine.devices.is_leaving("more"));
    // As often as it is asked. Who waits does so beside them.
    assert_eq!(machine.remove_at_once("data", false), Ok(Answer::Done));
    let waiting = machine.remove("data", false, false);
    assert_eq!(machine.shown(), ["root", "more"]);
    machine.release();
    assert_eq!(waiting.join().unwrap(), Ok(Answer::Done));
    assert!(!machine.devices.has("data"));
    // Its name is free when it is closed.
    eventually("it is closed", || !machine.devices.is_leaving("data"));
    assert!(machine.is_free("data"));
    // A guest that does not let go of it keeps it, and that is shown again.
    assert_eq!(machine.remove_at_once("more", false), Ok(Answer::Done));
    assert_eq!(machine.shown(), ["root"]);
    machine.devices.on_refused(root_slot(4), 0x82);
    assert_eq!(machine.shown(), ["root", "more"]);
    assert!(!machine.devices.is_leaving("more"));
    // By force it is gone at once, whatever the guest says.
    assert_eq!(machine.remove_at_once("more", true), Ok(Answer::Done));
    machine.devices.on_refused(root_slot(4), 0x82);
    eventually("it is closed", || machine.is_free("more"));
    assert_eq!(machine.shown(), ["root"]);
}
