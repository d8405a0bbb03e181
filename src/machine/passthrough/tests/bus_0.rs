//! Devices on bus 0 by themselves: how they come, where they sit, and how they leave.

use busway_pci::Device;

use super::*;
use crate::devices::pci_hotplug::{ADDED, EJECT_REQUEST, OUTCOME, PRESENT};
use crate::machine::events::Event;

/// A third device of the host's.
const THIRD: &str = "0000:fe:04.0";

/// The first slot for devices on bus 0 of segment 0.
const FIRST_SLOT: RootSlot = RootSlot {
    segment: Segment(0),
    device: Device::new(1).unwrap(),
};

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
