//! BARs that move while devices come and go, and what a slot is after resets.

use std::sync::atomic::Ordering;
use std::thread;

use proptest::collection::vec;
use proptest::prelude::*;

use super::hot_plug_tests::{BEHIND, CONTROL, DRIVEN, Fixture, PORT, STATUS, empty_slot, function};
use super::tests::{bdf, device, read32, write16, write32};
use super::*;
use crate::address::Function;
use crate::fake::{FakeMapper, key};
use crate::windows::Reserve;

/// What a guest and the machine do at the same time.
#[derive(Clone, Copy, Debug)]
enum Meanwhile {
    /// The guest places the BAR of the function beside, or switches its decoding.
    Address(u8),
    Decoding(bool),
    /// The same of what is in the slot.
    Behind(u8),
    BehindDecoding(bool),
    Power(bool),
    Plug,
    Unplug,
}

fn meanwhile() -> impl Strategy<Value = Vec<Meanwhile>> {
    let step = prop_oneof![
        (0..4u8).prop_map(Meanwhile::Address),
        any::<bool>().prop_map(Meanwhile::Decoding),
        (0..4u8).prop_map(Meanwhile::Behind),
        any::<bool>().prop_map(Meanwhile::BehindDecoding),
        any::<bool>().prop_map(Meanwhile::Power),
        Just(Meanwhile::Plug),
        Just(Meanwhile::Unplug),
    ];
    vec(step, 0..80)
}

const BESIDE: &str = "00:02.0";

/// A slot as in [`Fixture::new`] with nothing in it, and a function beside its port on bus 0 whose BAR can be
/// where those behind the port can be. The machine refuses what overlaps.
fn slot_and_neighbour() -> Fixture {
    let fixture = Fixture::on(FakeMapper::new(true), function());
    drop(fixture.topology.unplug(fixture.port));
    let beside = Place::root(device(2));
    fixture.topology.add(beside, function()).unwrap();
    fixture
}

impl Fixture {
    fn act(&self, step: Meanwhile) {
        let address = |place| 0xc000_0000 + 0x1000 * u32::from(place);
        let decoding = |on| if on { 2 } else { 0 };
        match step {
            Meanwhile::Address(place) => {
                write32(&self.topology, bdf(BESIDE), 0x10, address(place));
            }
            Meanwhile::Decoding(on) => {
                write16(&self.topology, bdf(BESIDE), spec::COMMAND, decoding(on));
            }
            Meanwhile::Behind(place) => {
                write32(&self.topology, bdf(BEHIND), 0x10, address(place));
            }
            Meanwhile::BehindDecoding(on) => {
                write16(&self.topology, bdf(BEHIND), spec::COMMAND, decoding(on));
            }
            Meanwhile::Power(true) => self.control(DRIVEN),
            Meanwhile::Power(false) => self.control(DRIVEN | spec::EXP_SLOT_CONTROL_POWER_OFF),
            Meanwhile::Plug => {
                let first = Function::new(0).unwrap();
                let _taken = self.topology.plug(self.port, [(first, function() as _)]);
            }
            Meanwhile::Unplug => {
                let out = self.topology.unplug(self.port);
                let mapped = self.mapper.mapped();
                assert!(out.iter().all(|function| {
                    let its = key(function);
                    mapped.keys().all(|(of, _)| *of != its)
                }));
            }
        }
    }

    /// What each function decodes and its bridge lets through, as far as there is room for it: where two want
    /// the same place, one of them has it.
    fn is_mapped_as_it_decodes(&self) {
        let mapped = self.mapper.mapped();
        let mut wanted = Vec::new();
        for (id, function) in self.topology.functions() {
            let reached = self.topology.tree().reachable(id);
            wanted.extend(reached.into_iter().map(|region| (key(&function), region)));
        }
        for ((of, index), region) in &mapped {
            let known = wanted
                .iter()
                .any(|(its, wants)| its == of && wants.index == *index && wants == region);
            assert!(known, "{region:x?} is mapped for nobody");
        }
        for (of, region) in &wanted {
            let has = mapped.contains_key(&(*of, region.index));
            let held = mapped.values().any(|one| one.address == region.address);
            assert!(has || held, "{region:x?} is free and not mapped");
        }
    }
}

proptest! {
    /// The mapper keeps what is mapped, and refuses what overlaps, or is mapped twice.
    #[test]
    fn a_bar_that_moves_while_devices_come_and_go_is_mapped_where_it_is_and_nowhere_else(
        steps in meanwhile(),
    ) {
        let fixture = slot_and_neighbour();
        for step in steps {
            fixture.act(step);
            fixture.is_mapped_as_it_decodes();
        }
    }

    /// The same by a vCPU that moves BARs, one that switches the slot, and the machine, at once.
    #[test]
    fn moves_and_adds_at_once_end_as_one_after_the_other(
        steps in (meanwhile(), meanwhile(), meanwhile()),
    ) {
        let fixture = slot_and_neighbour();
        thread::scope(|scope| {
            for steps in [&steps.0, &steps.1, &steps.2] {
                let fixture = &fixture;
                scope.spawn(move || steps.iter().for_each(|step| fixture.act(*step)));
            }
        });
        fixture.is_mapped_as_it_decodes();
    }
}

#[test]
fn a_reset_of_the_bus_by_the_guest_is_no_change_of_the_slot() {
    let behind = function();
    let f = Fixture::new(behind.clone());
    f.control(DRIVEN);
    for _ in 0..50 {
        f.start_driver();
        write16(
            &f.topology,
            bdf(PORT),
            spec::BRIDGE_CONTROL,
            spec::BRIDGE_CONTROL_RESET,
        );
        assert_eq!(f.id(), u32::MAX, "in reset");
        write16(&f.topology, bdf(PORT), spec::BRIDGE_CONTROL, 0);
        assert_eq!(read32(&f.topology, bdf(BEHIND), 0x10), 0, "as at power-on");
    }
    assert_eq!(behind.resets.load(Ordering::Relaxed), 50);
    let status = read32(&f.topology, bdf(PORT), STATUS - 2) >> 16;
    assert_eq!(
        status,
        u32::from(spec::EXP_SLOT_STATUS_PRESENT),
        "present, and no event"
    );
    assert!(f.heard.0.lock().unwrap().is_empty());
}

#[test]
fn after_a_reset_of_the_machine_a_slot_is_as_what_is_in_it_says() {
    let slot = empty_slot(Reserve::SMALL);
    let first = Function::new(0).unwrap();
    slot.topology
        .plug(slot.port, [(first, function() as _)])
        .unwrap();
    // Whatever the guest was at, and whatever it was told of.
    for control in [
        0,
        DRIVEN,
        DRIVEN | 0x600,
        DRIVEN | spec::EXP_SLOT_CONTROL_POWER_OFF,
    ] {
        slot.control(control);
        slot.topology.with_slot(slot.port, |its| its.press_button());
        slot.topology.reset();
        slot.assign();
        assert_ne!(slot.id(), u32::MAX, "it is found without a scan");
        let register = read32(&slot.topology, bdf(PORT), CONTROL);
        assert_eq!(
            register, 0x0040_0100,
            "present, powered, the indicator on, no event"
        );
        let steady = slot.topology.with_slot(slot.port, |its| its.steady());
        assert_eq!(steady, Some(true));
    }
    drop(slot.topology.unplug(slot.port));
    slot.topology.reset();
    slot.assign();
    let register = read32(&slot.topology, bdf(PORT), CONTROL);
    assert_eq!(
        register, 0x0000_0700,
        "empty, without power, the indicator off"
    );
}
