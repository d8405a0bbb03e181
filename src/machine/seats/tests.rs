use std::collections::BTreeSet;
use std::io;
use std::sync::Barrier;
use std::thread;

use busway_pci::{BarMapper, BarRegion, Device, HostBridge, Place};
use proptest::prelude::*;

use super::*;
use crate::devices::pci_hotplug::{EJECT, PRESENT, WANTED};
use crate::kvm::BusDevice;

/// What has no BAR asks for nothing.
struct Nothing;

impl BarMapper for Nothing {
    fn map(&self, _: Segment, _: &Arc<dyn PciFunction>, _: &BarRegion) -> io::Result<()> {
        Ok(())
    }

    fn unmap(&self, _: &Arc<dyn PciFunction>, _: &BarRegion) {}
}

/// A line that leads nowhere.
#[derive(Debug)]
struct Line;

impl InterruptLevel for Line {
    fn set(&self, _asserted: bool) {}
}

const ANYWHERE: PciPlace = PciPlace {
    segment: 0,
    device: None,
};

/// A slot of bus 0 of segment 0.
fn root(slot: u8) -> RootSlot {
    RootSlot {
        segment: Segment(0),
        device: Device::new(slot).unwrap(),
    }
}

fn low(slot: u8) -> Seat {
    Seat::Low(root(slot))
}

struct Bus {
    topology: Arc<Topology>,
    seats: Seats,
    registers: Arc<PciHotplug>,
    events: Arc<Events>,
}

impl Bus {
    /// Of which these slots are open.
    fn new(free: u32) -> Self {
        let topology = Arc::new(Topology::new(Arc::new(Nothing)));
        let seats = Seats::new(topology.clone());
        let events = Events::new().unwrap();
        let registers = seats.open(Segment(0), free, Arc::new(Line), &events);
        Self {
            topology,
            seats,
            registers,
            events,
        }
    }

    fn plug(&self, slot: u8, owner: Owner) {
        self.plug_at(root(slot), owner);
    }

    fn plug_at(&self, slot: RootSlot, owner: Owner) {
        let place = Place::root(slot.device).in_segment(slot.segment);
        let function = Arc::new(HostBridge::new());
        let id = self.topology.add(place, function).unwrap();
        self.seats.take(slot, owner, id);
        self.seats.tell(slot);
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn eject(&self, slots: u32) {
        self.registers.write(EJECT, &slots.to_le_bytes());
    }
}

#[test]
fn a_device_that_the_guest_releases_while_it_is_pulled_out_is_given_out_once() {
    let bus = Bus::new(0b1110);
    for round in 0..200 {
        let slot = bus.seats.claim(Owner::Assigned, ANYWHERE).unwrap();
        assert_eq!(slot, root(1), "round {round}: the slot is free again");
        bus.plug_at(slot, Owner::Assigned);
        let both = Barrier::new(2);
        let functions = thread::scope(|scope| {
            scope.spawn(|| {
                both.wait();
                bus.eject(1 << 1);
            });
            both.wait();
            bus.seats.take_out(Seat::Low(slot))
        });
        assert_eq!(functions.len(), 1);
        assert_eq!(bus.topology.functions().len(), 0);
        // Whoever was first, nothing is left to be released.
        assert_eq!((bus.read(PRESENT), bus.read(WANTED)), (0, 0));
        assert!(bus.seats.released(Owner::Assigned).is_empty());
    }
}

#[test]
fn each_owner_hears_of_its_own_once_and_the_event_loop_is_woken() {
    let bus = Bus::new(0b1110);
    bus.plug(1, Owner::Virtio);
    bus.plug(2, Owner::Assigned);
    bus.eject(0b110);
    assert!(bus.events.take().is_some());
    assert_eq!(bus.seats.released(Owner::Assigned), [root(2)]);
    assert!(bus.seats.released(Owner::Assigned).is_empty());
    assert_eq!(bus.seats.released(Owner::Virtio), [root(1)]);
    // They are not free before they are taken out.
    assert_eq!(bus.seats.claim(Owner::Virtio, ANYWHERE), Some(root(3)));
    assert_eq!(bus.seats.take_out(low(2)).len(), 1);
    assert_eq!(bus.seats.claim(Owner::Virtio, ANYWHERE), Some(root(2)));
    assert_eq!(bus.seats.claim(Owner::Virtio, ANYWHERE), None);
    assert_eq!(bus.seats.clear().len(), 1, "the one that nobody took");
}

#[test]
fn a_slot_that_the_guest_is_not_told_of_is_free_when_its_device_is_taken_out() {
    let topology = Arc::new(Topology::new(Arc::new(Nothing)));
    let seats = Seats::new(topology.clone());
    let place = Place::root(Device::new(1).unwrap());
    let id = topology.add(place, Arc::new(HostBridge::new())).unwrap();
    seats.take(root(1), Owner::Assigned, id);
    assert!(!seats.attended(low(1)) && !seats.ask(low(1)));
    assert_eq!(seats.take_out(low(1)).len(), 1);
    assert_eq!(seats.count(Owner::Assigned), 0);
}

#[test]
fn a_function_that_somebody_is_in_the_middle_of_is_taken_out_when_nobody_has_it_any_more() {
    let topology = Arc::new(Topology::new(Arc::new(Nothing)));
    let seats = Seats::new(topology.clone());
    let place = Place::root(Device::new(1).unwrap());
    let function = Arc::new(HostBridge::new());
    let id = topology.add(place, function.clone()).unwrap();
    seats.take(root(1), Owner::Assigned, id);
    let access = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        drop(function);
    });
    let taken = seats.take_out(low(1));
    assert_eq!(Arc::strong_count(&taken[0]), 1);
    access.join().unwrap();
}

#[test]
fn each_segment_has_slots_and_registers_of_its_own_and_one_that_is_asked_for_is_that_one() {
    let bus = Bus::new(0b1110);
    let second = bus
        .seats
        .open(Segment(1), 0b110, Arc::new(Line), &bus.events);
    assert_eq!(
        [0, 1, 2].map(|segment| bus.seats.open_slots(Segment(segment))),
        [0b1110, 0b110, 0]
    );
    let at = |segment, device| PciPlace { segment, device };
    let slot = bus.seats.claim(Owner::Virtio, at(1, Some(2))).unwrap();
    assert_eq!(slot.to_string(), "0001:00:02.0");
    assert_eq!(bus.seats.claim(Owner::Virtio, at(1, Some(2))), None);
    assert_eq!(bus.seats.claim(Owner::Virtio, at(1, Some(3))), None);
    assert_eq!(bus.seats.claim(Owner::Virtio, at(2, None)), None);
    bus.plug_at(slot, Owner::Virtio);
    bus.plug(2, Owner::Virtio);
    assert_eq!(second.slots().added, 1 << 2);
    assert!(bus.seats.ask(Seat::Low(slot)));
    assert_eq!((second.slots().wanted, bus.read(WANTED)), (1 << 2, 0));
    // What is released in one segment is that one's.
    second.write(EJECT, &(1_u32 << 2).to_le_bytes());
    assert_eq!(bus.seats.released(Owner::Virtio), [slot]);
    assert_eq!(bus.seats.take_out(Seat::Low(slot)).len(), 1);
    assert_eq!((second.slots().present, bus.read(PRESENT)), (0, 1 << 2));
    assert_eq!(bus.seats.free_slots(), 2 + 2);
}

#[derive(Clone, Debug)]
enum Step {
    Come(Owner, bool),
    TakeOut(u8),
    Ask(u8),
    Withdraw(u8),
    Eject(u32),
    Hear(Owner),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let owner = || prop_oneof![Just(Owner::Assigned), Just(Owner::Virtio)];
    prop_oneof![
        (owner(), any::<bool>()).prop_map(|(owner, comes)| Step::Come(owner, comes)),
        (0_u8..6).prop_map(Step::TakeOut),
        (0_u8..6).prop_map(Step::Ask),
        (0_u8..6).prop_map(Step::Withdraw),
        (0_u32..64).prop_map(Step::Eject),
        owner().prop_map(Step::Hear),
        Just(Step::Restart),
    ]
}

proptest! {
    #[test]
    fn whatever_is_done_each_device_is_given_out_once_and_no_slot_has_two(
        steps in proptest::collection::vec(step(), 0..48)
    ) {
        let bus = Bus::new(0b1_1110);
        let (mut came, mut given) = (0, 0);
        for step in steps {
            match step {
                Step::Come(owner, comes) => {
                    let taken: BTreeSet<_> = bus.seats.low.state().taken.keys().copied().collect();
                    let slot = bus.seats.claim(owner, ANYWHERE);
                    prop_assert_eq!(slot.is_none(), taken.len() == 4);
                    let Some(slot) = slot else { continue };
                    prop_assert!(!taken.contains(&slot) && (1..5).contains(&slot.device.number()));
                    if comes {
                        bus.plug_at(slot, owner);
                        came += 1;
                    } else {
                        bus.seats.give_up(Seat::Low(slot));
                    }
                }
                Step::TakeOut(slot) => given += bus.seats.take_out(low(slot)).len(),
                Step::Ask(slot) => drop(bus.seats.ask(low(slot))),
                Step::Withdraw(slot) => drop(bus.seats.withdraw(low(slot))),
                Step::Eject(slots) => bus.eject(slots),
                Step::Hear(owner) => drop(bus.seats.released(owner)),
                Step::Restart => bus.seats.restart(),
            }
            // The registers say a slot has a device where it does, and until the guest has released what was there.
            let state = bus.seats.low.state();
            for slot in 1..5 {
                let there = matches!(
                    state.taken.get(&root(slot)),
                    Some((_, Occupant::Function(_) | Occupant::Absent))
                );
                prop_assert_eq!(bus.registers.slots().present & 1 << slot != 0, there);
            }
        }
        prop_assert_eq!(came - given, bus.topology.functions().len() + bus.seats.clear().len());
    }
}
