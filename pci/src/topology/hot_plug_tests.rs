use std::iter;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use proptest::collection::vec;
use proptest::prelude::*;

use super::busy_tests::{Busy, MOMENT};
use super::tests::{bdf, device, read32, write16, write32};
use super::*;
use crate::address::{Function, Segment};
use crate::bar::BarIndex;
use crate::fake::{FakeFunction, FakeMapper, FakeRoutes, MEMORY_32};
use crate::link::Link;
use crate::root_port::RootPort;
use crate::slot::SlotListener;
use crate::windows::{Reserve, Windows};

#[derive(Debug, Default)]
pub(super) struct Heard(pub(super) Mutex<Vec<bool>>);

impl SlotListener for Heard {
    fn power_switched(&self, _slot: u16, on: bool) {
        self.0.lock().unwrap().push(on);
    }

    fn steadied(&self, _slot: u16) {}
}

pub(super) const PORT: &str = "00:10.0";
pub(super) const BEHIND: &str = "01:00.0";
/// Slot control and status of a root port, whose PCI Express capability comes first.
pub(super) const CONTROL: u16 = 0x40 + spec::EXP_SLOT_CONTROL;
pub(super) const STATUS: u16 = 0x40 + spec::EXP_SLOT_STATUS;
/// What Linux' driver turns on, and the indicator on.
pub(super) const DRIVEN: u16 = 0x1129;

pub(super) struct Fixture {
    pub(super) mapper: Arc<FakeMapper>,
    pub(super) topology: Topology,
    pub(super) port: FunctionId,
    pub(super) heard: Arc<Heard>,
}

pub(super) fn function() -> Arc<FakeFunction> {
    FakeFunction::new(&[(BarIndex::Bar(0), MEMORY_32, 0x1000)])
}

impl Fixture {
    /// A hot-plug port on bus 0, with bus 1 behind it and everything on.
    pub(super) fn new(behind: Arc<FakeFunction>) -> Self {
        Self::on(FakeMapper::new(false), behind)
    }

    pub(super) fn on(mapper: Arc<FakeMapper>, behind: Arc<FakeFunction>) -> Self {
        let topology = Topology::new(mapper.clone());
        let heard = Arc::new(Heard::default());
        let routes = Arc::new(FakeRoutes::default());
        let port = RootPort::new(16, Link::default(), routes).hot_plug(heard.clone());
        let port = topology.add(Place::root(device(16)), Arc::new(port));
        let port = port.unwrap();
        topology.add(Place::behind(port), behind).unwrap();
        write32(&topology, bdf(PORT), spec::PRIMARY_BUS, 0x0001_0100);
        write32(&topology, bdf(PORT), spec::MEMORY_BASE, 0xc010_c000);
        write16(&topology, bdf(PORT), spec::COMMAND, 7);
        Self {
            mapper,
            topology,
            port,
            heard,
        }
    }

    pub(super) fn id(&self) -> u32 {
        read32(&self.topology, bdf(BEHIND), 0)
    }

    pub(super) fn start_driver(&self) {
        write32(&self.topology, bdf(BEHIND), 0x10, 0xc000_0000);
        write16(&self.topology, bdf(BEHIND), spec::COMMAND, 2);
    }

    pub(super) fn control(&self, bits: u16) {
        write16(&self.topology, bdf(PORT), CONTROL, bits);
    }
}

#[test]
fn a_guest_that_switches_power_off_finds_the_device_fresh_when_it_comes_back() {
    let behind = function();
    let f = Fixture::new(behind.clone());
    f.start_driver();
    assert_eq!(f.mapper.mapped().len(), 1);
    f.control(DRIVEN | spec::EXP_SLOT_CONTROL_POWER_OFF);
    assert_eq!((f.id(), f.mapper.mapped().len()), (u32::MAX, 0));
    assert_eq!(behind.resets.load(Ordering::Relaxed), 1);
    f.control(DRIVEN);
    assert_eq!(f.id(), 0x5678_1234);
    assert_eq!(read32(&f.topology, bdf(BEHIND), 0x10), 0, "as at power-on");
    assert_eq!(*f.heard.0.lock().unwrap(), [false, true]);
}

#[test]
fn a_device_that_is_pulled_out_leaves_no_bar_and_no_reference_behind() {
    let (first, second) = (function(), function());
    let f = Fixture::new(first.clone());
    let place = Place::behind(f.port).with_function(Function::new(1).unwrap());
    f.topology.add(place, second).unwrap();
    f.start_driver();
    f.control(DRIVEN);
    let out = f.topology.unplug(f.port);
    assert_eq!(out.len(), 2, "all functions of the slot");
    drop(out);
    assert_eq!(Arc::strong_count(&first), 1);
    assert_eq!((f.id(), f.mapper.mapped().len()), (u32::MAX, 0));
    let status = read32(&f.topology, bdf(PORT), STATUS - 2) >> 16;
    assert_eq!(status, 0x108, "left, link down");
    assert!(f.topology.unplug(f.port).is_empty());
}

/// One whose slot has a busy function.
fn with_busy() -> (Fixture, Arc<Busy>) {
    let f = Fixture::new(function());
    drop(f.topology.unplug(f.port));
    let busy = Busy::new(&f.mapper);
    f.topology.add(Place::behind(f.port), busy.clone()).unwrap();
    (f, busy)
}

#[test]
fn a_device_is_out_when_what_a_vcpu_had_it_do_is_done_and_not_before() {
    let ((f, busy), second) = (with_busy(), function());
    let place = Place::behind(f.port).with_function(Function::new(1).unwrap());
    f.topology.add(place, second.clone()).unwrap();
    let out = || {
        assert_eq!(f.topology.unplug(f.port).len(), 2);
        let resets = [&busy.inner, &second].map(|function| function.resets.load(Ordering::Relaxed));
        assert_eq!(resets, [1, 1]);
    };
    let power_off = || f.control(DRIVEN | spec::EXP_SLOT_CONTROL_POWER_OFF);
    assert!(!busy.while_it_is_busy(MOMENT, power_off, out));

    let (f, busy) = with_busy();
    let out = || {
        assert_eq!(f.topology.unplug(f.port).len(), 1);
        assert_eq!(busy.done.load(Ordering::Relaxed), 1);
    };
    let ask = || write32(&f.topology, bdf(BEHIND), 0x40, 1);
    assert!(!busy.while_it_is_busy(MOMENT, ask, out));
}

#[test]
fn a_write_that_comes_after_its_function_is_out_is_lost() {
    let (f, busy) = with_busy();
    let node = f.topology.tree().find(bdf(BEHIND)).cloned().unwrap();
    assert_eq!(f.topology.unplug(f.port).len(), 1);
    f.topology.write_dword(&node, 0x40, &[1]);
    assert_eq!(busy.done.load(Ordering::Relaxed), 0);
}

#[derive(Clone, Debug)]
enum Step {
    Guest(u16, u32),
    Port(u16, u32),
    Unplug,
    Button,
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    vec(
        prop_oneof![
            (0..16u16, any::<u32>()).prop_map(|(at, value)| Step::Guest(at * 4, value)),
            Just(Step::Guest(spec::COMMAND, 7)),
            Just(Step::Guest(0x10, 0xc000_0000)),
            (0..32u16, any::<u32>()).prop_map(|(at, value)| Step::Port(at * 4, value)),
            any::<u32>().prop_map(|value| Step::Port(CONTROL, value)),
            Just(Step::Port(CONTROL, DRIVEN.into())),
            Just(Step::Unplug),
            Just(Step::Button),
            Just(Step::Reset),
        ],
        0..60,
    )
}

proptest! {
    /// The mapper, too, checks what it is asked.
    #[test]
    fn whatever_the_guest_does_meanwhile_nothing_of_an_empty_slot_is_reached(steps in steps()) {
        let f = Fixture::new(function());
        let mut plugged = true;
        for step in steps {
            match step {
                Step::Guest(at, value) => write32(&f.topology, bdf(BEHIND), at, value),
                Step::Port(at, value) => write32(&f.topology, bdf(PORT), at, value),
                Step::Unplug => {
                    let out = f.topology.unplug(f.port);
                    prop_assert_eq!(out.len(), usize::from(plugged));
                    prop_assert!(out.iter().all(|function| Arc::strong_count(function) == 1));
                    plugged = false;
                }
                Step::Button => {
                    f.topology.with_slot(f.port, |slot| slot.press_button());
                }
                Step::Reset => f.topology.reset(),
            }
            let powered = f.topology.with_slot(f.port, |slot| slot.powered()) == Some(true);
            if !plugged || !powered {
                prop_assert!(f.mapper.mapped().is_empty());
                prop_assert_eq!(f.id(), u32::MAX);
            }
        }
    }
}

/// A hot-plug port without anything behind it, which reserves room.
pub(super) fn empty_slot(reserve: Reserve) -> Fixture {
    let mapper = FakeMapper::new(false);
    let topology = Topology::new(mapper.clone());
    let heard = Arc::new(Heard::default());
    let routes = Arc::new(FakeRoutes::default());
    let port = RootPort::new(16, Link::default(), routes)
        .hot_plug(heard.clone())
        .reserving(reserve);
    let port = topology.add(Place::root(device(16)), Arc::new(port));
    let fixture = Fixture {
        mapper,
        topology,
        port: port.unwrap(),
        heard,
    };
    fixture.assign();
    fixture
}

impl Fixture {
    pub(super) fn assign(&self) {
        let windows = Windows {
            io: 0xc000..0x1_0000,
            memory32: iter::once(0xc000_0000..0xe000_0000).collect(),
            memory64: iter::once(1 << 36..1 << 40).collect(),
        };
        self.topology.assign(Segment(0), &windows).unwrap();
    }
}

#[test]
fn what_is_plugged_is_there_with_its_link_and_told_of_once() {
    let slot = empty_slot(Reserve::SMALL);
    slot.control(DRIVEN | spec::EXP_SLOT_CONTROL_POWER_OFF);
    assert_eq!(slot.id(), u32::MAX);
    let number = |number| Function::new(number).unwrap();
    let two = [(number(0), function() as _), (number(3), function() as _)];
    let ids = slot.topology.plug(slot.port, two).unwrap();
    assert_eq!(slot.topology.behind(slot.port), ids);
    let status = || read32(&slot.topology, bdf(PORT), CONTROL) >> 16;
    assert_ne!(status() & u32::from(spec::EXP_SLOT_STATUS_PRESENCE), 0);
    // What Linux's driver has on where there is a button: it looks at any change of the link.
    assert_ne!(status() & u32::from(spec::EXP_SLOT_STATUS_LINK), 0);
    assert_ne!(status() & u32::from(spec::EXP_SLOT_STATUS_PRESENT), 0);
    // The link comes with the power, which the guest's driver gives.
    slot.control(DRIVEN);
    assert_ne!(status() & u32::from(spec::EXP_SLOT_STATUS_LINK), 0);
    assert_ne!(slot.id(), u32::MAX);
    assert_ne!(read32(&slot.topology, bdf("01:00.3"), 0), u32::MAX);
    assert!(slot.mapper.mapped().is_empty());
    // A slot that is taken stays as it is.
    let before = slot.topology.behind(slot.port);
    assert!(
        slot.topology
            .plug(slot.port, [(number(0), function() as _)])
            .is_err()
    );
    assert_eq!(slot.topology.behind(slot.port), before);
    // And is empty again as it was.
    assert_eq!(slot.topology.unplug(slot.port).len(), 2);
    assert!(slot.topology.behind(slot.port).is_empty());
    let again = slot
        .topology
        .plug(slot.port, [(number(0), function() as _)]);
    assert_eq!(again.unwrap().len(), 1);
}

#[test]
fn a_plug_that_fails_leaves_nothing_behind() {
    let slot = empty_slot(Reserve::SMALL);
    let number = |number| Function::new(number).unwrap();
    let twice = [(number(0), function() as _), (number(0), function() as _)];
    assert!(slot.topology.plug(slot.port, twice).is_err());
    assert!(slot.topology.behind(slot.port).is_empty());
    let status = read32(&slot.topology, bdf(PORT), CONTROL) >> 16;
    assert_eq!(status & u32::from(spec::EXP_SLOT_STATUS_PRESENT), 0);
}

#[test]
fn an_empty_slot_has_the_room_that_is_reserved_for_it() {
    let windows = |slot: &Fixture| slot.topology.with_slot(slot.port, |its| its.windows());
    let small = windows(&empty_slot(Reserve::SMALL)).unwrap();
    let length = |range: &std::ops::Range<u64>| range.end - range.start;
    assert_eq!(length(&small.memory32[0]), 2 << 20);
    assert_eq!(length(&small.memory64[0]), 2 << 20);
    assert_eq!(small.io, 0..0, "none is reserved, and the window is closed");
    let reserve = Reserve {
        memory32: 32 << 20,
        memory64: 6 << 30,
    };
    let large = windows(&empty_slot(reserve)).unwrap();
    assert_eq!(length(&large.memory32[0]), 32 << 20);
    assert_eq!(length(&large.memory64[0]), 6 << 30);
    // A BAR of 4 GiB fits into it.
    assert_eq!(large.memory64[0].start % (4 << 30), 0);
    assert_eq!(large.memory32[0].start % (32 << 20), 0);
}
