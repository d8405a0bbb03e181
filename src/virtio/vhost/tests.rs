//! Rings in a back end's hands, by a back end that notes what it is told.

use std::sync::{Arc, Mutex, mpsc};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::memory::Follower;
use super::testing::{FEATURE, FakeBackEnd, FakeDevice};
use super::{Handed, MemoryTable, Rings};
use crate::memory::{GuestRam, RamMap, Region, RegionListener, Regions};
use crate::virtio::life::QueuePosition;
use crate::virtio::queue::QueueSetup;
use crate::virtio::spec::pci::common;
use crate::virtio::spec::{NO_VECTOR, feature, isr, status};
use crate::virtio::testing::{Driver, RAM_SIZE, Ring, eventually};
use busway_pci::ConfigRead;
use busway_vfio::EventFd;

/// A device that its driver can use.
struct Machine {
    driver: Driver,
    back_end: Arc<FakeBackEnd>,
    memory: Arc<MemoryTable>,
}

impl Machine {
    fn new() -> Self {
        let (back_end, memory) = (Arc::default(), Arc::<MemoryTable>::default());
        memory.added(&ram("ram", 0, RAM_SIZE)).unwrap();
        Self {
            driver: Driver::new(FakeDevice::new(&back_end, &memory)),
            back_end,
            memory,
        }
    }

    /// Both queues, the first of 64 descriptors.
    fn bring_up(&mut self) -> (Ring, Ring) {
        self.driver.negotiate(FEATURE);
        let rings = (self.driver.queue(0, 64), self.driver.queue(1, 16));
        self.driver.ready();
        rings
    }

    /// The device's vector of a queue is another.
    fn set_vector(&self, queue: u16, vector: u16) {
        let driver = &self.driver;
        driver.set_common(common::QUEUE_SELECT, &queue.to_le_bytes());
        driver.set_common(common::QUEUE_MSIX_VECTOR, &vector.to_le_bytes());
    }

    fn needs_reset(&self) -> bool {
        self.driver.status() & status::DEVICE_NEEDS_RESET != 0
    }
}

/// A region of RAM that nobody touches.
fn ram(name: &str, guest: u64, size: u64) -> Arc<Region> {
    let mapped = vm_memory::MmapRegion::new(usize::try_from(size).unwrap()).unwrap();
    let mapped = vm_memory::GuestRegionMmap::new(mapped, GuestAddress(guest)).unwrap();
    Arc::new(Region::ram(name, Arc::new(mapped)))
}

#[test]
fn rings_are_handed_over_with_their_places_and_looked_at_once() {
    let mut machine = Machine::new();
    machine.driver.enable_msix(3);
    let (first, second) = machine.bring_up();
    let features = FEATURE | feature::VERSION_1;
    let expected = [
        format!("features {features:#x}"),
        format!("memory 0x0+{RAM_SIZE:#x}"),
        "num 0: 64".to_owned(),
        "base 0: 0".to_owned(),
        format!(
            "addr 0: {:#x} {:#x} {:#x}",
            first.desc, first.avail, first.used
        ),
        "call 0".to_owned(),
        "err 0".to_owned(),
        "kick 0".to_owned(),
        "num 1: 16".to_owned(),
        "base 1: 0".to_owned(),
        format!(
            "addr 1: {:#x} {:#x} {:#x}",
            second.desc, second.avail, second.used
        ),
        "call 1".to_owned(),
        "err 1".to_owned(),
        "kick 1".to_owned(),
        "begin [0, 1]".to_owned(),
    ];
    assert_eq!(machine.back_end.calls(), expected);
    for ring in [0, 1] {
        assert_eq!(machine.back_end.event("kick", ring).take(), 1);
    }
    machine.driver.notify(&second);
    assert_eq!(machine.back_end.event("kick", 1).take(), 1);
    assert_eq!(machine.back_end.event("kick", 0).take(), 0);
}

#[test]
fn a_pause_keeps_the_positions_that_the_back_end_gives_back_and_a_reset_drops_them() {
    let mut machine = Machine::new();
    machine.driver.enable_msix(3);
    let (first, _) = machine.bring_up();
    machine.back_end.calls();
    machine
        .back_end
        .bases
        .lock()
        .unwrap()
        .extend([(0, 70), (1, 3)]);
    let used = GuestAddress(first.used + 2);
    machine.driver.ram.memory().write_obj(68_u16, used).unwrap();

    machine.driver.function.pause();
    assert_eq!(machine.back_end.calls(), ["end [0, 1]", "get 0", "get 1"]);
    let state = machine.driver.function.state().unwrap();
    let queue = state.progress.queue(0);
    assert_eq!((queue.next_avail, queue.next_used), (70, 68));
    assert_eq!(state.progress.queue(1).next_avail, 3);

    machine.driver.function.resume();
    let calls = machine.back_end.calls();
    for base in ["base 0: 70", "base 1: 3"] {
        assert!(calls.iter().any(|call| call == base), "{calls:?}");
    }
    machine.bring_up();
    let calls = machine.back_end.calls();
    let base = calls.iter().rfind(|call| call.starts_with("base 0"));
    assert_eq!(base.map(String::as_str), Some("base 0: 0"));
}

#[test]
fn a_back_end_that_does_not_say_where_it_was_goes_on_behind_what_it_completed() {
    let mut machine = Machine::new();
    let (first, _) = machine.bring_up();
    *machine.back_end.refuses.lock().unwrap() = Some("get");
    let used = GuestAddress(first.used + 2);
    machine.driver.ram.memory().write_obj(5_u16, used).unwrap();
    machine.driver.function.pause();
    let queue = machine.driver.function.state().unwrap().progress.queue(0);
    assert_eq!((queue.next_avail, queue.next_used), (5, 5));
}

#[test]
fn a_connected_vector_is_signalled_by_the_back_end_itself_also_while_it_is_masked() {
    let mut machine = Machine::new();
    machine.driver.enable_msix(3);
    machine.bring_up();
    let call = machine.back_end.event("call", 0);
    call.signal();
    assert_eq!(machine.driver.route(0).wait(), 1);
    machine.back_end.calls();
    for masked in [true, false] {
        machine.driver.set_vector(0, masked);
        call.signal();
        assert_eq!(machine.driver.route(0).wait(), 1, "masked: {masked}");
    }
    // The route holds it back; the back end hears nothing of masks.
    assert_eq!(machine.back_end.calls(), Vec::<String>::new());
}

#[test]
fn a_vector_that_is_chosen_or_unmasked_later_is_handed_over_and_interrupts_once() {
    let mut machine = Machine::new();
    machine.driver.enable_msix(0);
    machine.bring_up();
    // Pending until it is unmasked: it comes by this process.
    let pba = machine
        .driver
        .read_dword(machine.driver.msix_capability + 8)
        & !7;
    let pba = u64::from(pba);
    machine.back_end.event("call", 1).signal();
    eventually("the interrupt is not held back", || {
        machine.driver.bar_read::<1>(pba) == [0b10]
    });
    machine.back_end.calls();
    machine.driver.set_vector(1, false);
    eventually("the vector is not handed over", || {
        machine.back_end.calls() == ["call 1"]
    });
    machine.driver.route(1).wait();
    machine.back_end.event("call", 1).signal();
    assert!(machine.driver.route(1).wait() >= 1);

    machine.driver.set_vector(2, false);
    machine.set_vector(1, 2);
    eventually("the other vector is not handed over", || {
        machine.back_end.calls() == ["call 1"]
    });
    machine.driver.route(2).wait();
    machine.back_end.event("call", 1).signal();
    machine.driver.route(2).wait();
}

#[test]
fn a_queue_without_a_vector_says_so_in_the_isr_where_there_are_no_messages() {
    let mut machine = Machine::new();
    let (_, _) = machine.bring_up();
    machine.set_vector(0, NO_VECTOR);
    machine.back_end.event("call", 0).signal();
    let isr = machine.driver.isr;
    eventually("no bit of the ISR", || {
        machine.driver.bar_read::<1>(isr) == [isr::QUEUE]
    });
}

#[test]
fn an_error_of_the_back_end_has_the_device_ask_for_a_reset() {
    let mut machine = Machine::new();
    machine.driver.enable_msix(3);
    machine.bring_up();
    assert!(!machine.needs_reset());
    machine.back_end.event("err", 1).signal();
    eventually("no reset is asked for", || machine.needs_reset());
    machine.bring_up();
    assert!(!machine.needs_reset());
}

#[test]
fn a_step_that_is_refused_takes_everything_back() {
    for step in [
        "features", "memory", "num", "base", "addr", "call", "err", "kick", "begin",
    ] {
        let mut machine = Machine::new();
        *machine.back_end.refuses.lock().unwrap() = Some(step);
        machine.bring_up();
        assert!(machine.needs_reset(), "{step}");
        let calls = machine.back_end.calls();
        assert!(
            calls.contains(&"end [0, 1]".to_owned()),
            "{step}: {calls:?}"
        );
        // It is told of no memory any more.
        machine.memory.added(&ram("more", 1 << 30, 0x1000)).unwrap();
        assert_eq!(machine.back_end.calls(), Vec::<String>::new(), "{step}");
    }
}

#[test]
fn a_ring_has_to_be_in_one_piece_of_ram_and_may_end_where_that_ends() {
    let machine = Machine::new();
    let (first, second) = (GuestAddress(0), GuestAddress(0x10000));
    let two = RamMap::from_ranges(&[(first, 0x10000), (second, 0x10000)]).unwrap();
    let two = GuestRam::new(two);
    // 64 descriptors are 0x400 bytes.
    let try_at = |desc| {
        let setup = QueueSetup {
            index: 0,
            size: 64,
            desc,
            avail: 0x2000,
            used: 0x3000,
            event_idx: false,
            position: QueuePosition::default(),
            kick: EventFd::new().unwrap(),
            call: machine.driver.function.call(0),
        };
        let handed = Handed {
            name: "fake".to_owned(),
            first: 0,
            queues: vec![setup],
            features: 0,
            active: u16::MAX,
        };
        let back_end = Arc::clone(&machine.back_end);
        Rings::start(back_end, handed, &two, &machine.memory).map(drop)
    };
    for whole in [0x1000, 0x10000 - 0x400, 0x10000, 0x20000 - 0x400] {
        try_at(whole).unwrap();
    }
    machine.back_end.calls();
    for split in [0x10000 - 0x3f0, 0x20000 - 0x3f0, 0x20000, u64::MAX - 0xf] {
        let error = try_at(split).unwrap_err();
        assert_eq!(
            error.to_string(),
            "vhost: SET_VRING_ADDR failed: invalid virtqueue"
        );
    }
    let calls = machine.back_end.calls();
    let said = |what| calls.iter().any(|call| call.starts_with(what));
    assert!(!said("addr") && !said("begin"), "{calls:?}");
}

#[test]
fn rings_that_are_held_lie_until_they_go_on_or_are_stopped() {
    let machine = Machine::new();
    let handed = Handed {
        name: "fake".to_owned(),
        first: 0,
        queues: Vec::new(),
        features: 0,
        active: u16::MAX,
    };
    let (back_end, ram) = (&machine.back_end, &machine.driver.ram);
    let rings = Rings::start(Arc::clone(back_end), handed, ram, &machine.memory).unwrap();
    back_end.calls();
    for hold in [false, true, true, false, false, true] {
        rings.hold(hold);
    }
    assert_eq!(back_end.calls(), ["end []", "begin []", "end []"]);
    rings.stop();
    rings.hold(false);
    assert_eq!(back_end.calls(), ["end []"]);
}

#[test]
fn memory_that_comes_and_goes_reaches_the_back_end_while_it_serves() {
    let mut machine = Machine::new();
    machine.bring_up();
    machine.back_end.calls();
    let more = ram("more", 1 << 32, 0x1000);
    machine.memory.added(&more).unwrap();
    let both = format!("memory 0x0+{RAM_SIZE:#x} 0x100000000+0x1000");
    assert_eq!(machine.back_end.calls(), [both]);
    machine.memory.removed(&more);
    let one = format!("memory 0x0+{RAM_SIZE:#x}");
    assert_eq!(machine.back_end.calls(), std::slice::from_ref(&one));

    // One that is stopped hears of it when it starts.
    machine.driver.function.pause();
    machine.back_end.calls();
    machine.memory.added(&more).unwrap();
    assert_eq!(machine.back_end.calls(), Vec::<String>::new());
    machine.memory.removed(&more);
    machine.driver.function.resume();
    assert!(machine.back_end.calls().contains(&one));
}

type Told = Arc<Mutex<Vec<String>>>;

struct Witness {
    name: &'static str,
    refuses: usize,
    told: Told,
}

impl Follower for Witness {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn memory_is(&self, regions: &[Arc<Region>]) -> Result<(), vhost::Error> {
        if regions.len() == self.refuses {
            return Err(vhost::Error::InvalidGuestMemory);
        }
        let names: Vec<_> = regions.iter().map(|region| region.name()).collect();
        let line = format!("{}: {}", self.name, names.join(" "));
        self.told.lock().unwrap().push(line);
        Ok(())
    }
}

#[test]
fn memory_that_one_back_end_cannot_have_does_not_come_and_the_others_are_told() {
    let (told, table) = (Told::default(), Arc::<MemoryTable>::default());
    let witness = |name, refuses| -> Arc<dyn Follower> {
        let told = Arc::clone(&told);
        Arc::new(Witness {
            name,
            refuses,
            told,
        })
    };
    let regions = Regions::default();
    regions.listen(table.clone()).unwrap();
    regions.add(ram("low", 0, 0x1000)).unwrap();
    let (first, second) = (witness("first", 9), witness("second", 2));
    table.follow(&first).unwrap();
    table.follow(&second).unwrap();
    told.lock().unwrap().clear();
    let error = regions.add(ram("high", 1 << 32, 0x1000)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "high at 0x100000000..=0x100000fff was refused by the virtio devices' back ends: second: \
         invalid guest memory object"
    );
    let lines = std::mem::take(&mut *told.lock().unwrap());
    assert_eq!(lines, ["first: low high", "first: low"]);
    // Who is dropped or forgotten is not asked.
    drop(second);
    regions.add(ram("high", 1 << 32, 0x1000)).unwrap();
    table.forget(&*first);
    regions.clear();
    assert_eq!(*told.lock().unwrap(), ["first: low high"]);
}

/// A back end that does not answer for a while: it says that it was asked, and waits to be let go.
struct Slow {
    asked: Mutex<mpsc::Sender<usize>>,
    go_on: Mutex<mpsc::Receiver<()>>,
}

impl Follower for Slow {
    fn name(&self) -> String {
        "slow".to_owned()
    }

    fn memory_is(&self, regions: &[Arc<Region>]) -> Result<(), vhost::Error> {
        self.asked.lock().unwrap().send(regions.len()).unwrap();
        self.go_on.lock().unwrap().recv().unwrap();
        Ok(())
    }
}

#[test]
fn a_back_end_that_is_slow_to_take_its_memory_keeps_no_other_waiting_and_has_the_newest_in_the_end()
{
    let table = Arc::<MemoryTable>::default();
    let ((asked, was_asked), (go_on, wait)) = (mpsc::channel(), mpsc::channel());
    let slow: Arc<dyn Follower> = Arc::new(Slow {
        asked: Mutex::new(asked),
        go_on: Mutex::new(wait),
    });
    let told = Told::default();
    let other: Arc<dyn Follower> = Arc::new(Witness {
        name: "other",
        refuses: 9,
        told: told.clone(),
    });
    let more = ram("more", 0, 0x1000);
    std::thread::scope(|scope| {
        let follows = scope.spawn(|| table.follow(&slow));
        assert_eq!(was_asked.recv().unwrap(), 0);
        table.follow(&other).unwrap();
        table.forget(&*other);
        // The same back end is asked by who adds memory, and then again by who has it follow.
        let adds = scope.spawn(|| table.added(&more));
        assert_eq!(was_asked.recv().unwrap(), 1);
        for _ in 0..2 {
            go_on.send(()).unwrap();
        }
        assert_eq!(was_asked.recv().unwrap(), 1);
        go_on.send(()).unwrap();
        follows.join().unwrap().unwrap();
        adds.join().unwrap().unwrap();
    });
    assert_eq!(*told.lock().unwrap(), ["other: "]);
}

#[test]
fn memory_that_is_not_ram_is_no_back_end_s() {
    let (told, table) = (Told::default(), Arc::<MemoryTable>::default());
    let follower: Arc<dyn Follower> = Arc::new(Witness {
        name: "it",
        refuses: 9,
        told: told.clone(),
    });
    table.follow(&follower).unwrap();
    let mapped = vm_memory::MmapRegion::new(0x1000).unwrap();
    let mapped = vm_memory::GuestRegionMmap::new(mapped, GuestAddress(0)).unwrap();
    let rom = Arc::new(Region::rom("rom", Arc::new(mapped)));
    table.added(&rom).unwrap();
    table.removed(&rom);
    assert_eq!(*told.lock().unwrap(), ["it: "]);
}
