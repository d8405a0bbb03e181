//! Resets and power states.

use std::sync::Arc;
use std::thread;

use busway_pci::{BarIndex, PciFunction, spec};

use super::{function, nvme, read, write};
use crate::fake::held_up;
use crate::{AssignedFunction, IrqIndex};

#[test]
fn a_device_sleeps_only_when_nothing_is_mapped_and_is_left_alone_until_it_wakes() {
    let (fake, _, function) = function(nvme());
    let state = || fake.config_at::<1>(0x64)[0] & 3;
    let bar = BarIndex::Bar(0);
    function.config_write(4, &[6]);
    assert_eq!(function.decoded().len(), 1);
    function.config_write(0x64, &[3, 0]);
    assert_eq!((function.decoded(), state()), (vec![], 0));
    assert!(!function.run_deferred());
    assert_eq!((function.decoded(), state()), (vec![], 3));
    let mut data = [0; 4];
    function.bar_read(bar, 0, &mut data);
    function.bar_write(bar, 0, &data);
    assert_eq!(data, [0xff; 4]);
    assert!(fake.bar_writes.lock().unwrap().is_empty());
    // The rest of the register is written without waking it; waking is done at once.
    function.config_write(0x64, &[3, 2]);
    assert_eq!((state(), fake.config_at::<2>(0x64)[1]), (3, 2));
    function.config_write(0x64, &[0, 0]);
    assert_eq!((function.decoded().len(), state()), (1, 0));
    // Asked for and taken back before it came to it.
    function.config_write(0x64, &[3, 0]);
    function.config_write(0x64, &[0, 0]);
    assert!(!function.run_deferred());
    assert_eq!((function.decoded().len(), state()), (1, 0));
    function.bar_read(bar, 0, &mut data);
    assert_eq!(data, [0x5a; 4]);
}

#[test]
fn a_reset_wakes_the_device_first() {
    let (fake, _, function) = function(nvme());
    function.config_write(0x64, &[3, 0]);
    function.run_deferred();
    function.reset();
    assert_eq!(fake.config_at::<1>(0x64)[0] & 3, 0);
    function.config_write(4, &[6]);
    assert_eq!(function.decoded().len(), 1);
}

#[test]
fn interrupts_are_disabled_in_an_awake_device_whatever_resets_it() {
    let by: [fn(&Arc<AssignedFunction>); 3] = [
        |function| function.reset(),
        |function| {
            function.config_write(0x88, &0xa010_u16.to_le_bytes());
            function.run_deferred();
        },
        |function| function.retire(),
    ];
    for reset in by {
        let (fake, _, function) = function(nvme());
        function.config_write(0x42, &0x8000_u16.to_le_bytes());
        function.bar_write(BarIndex::Bar(0), 0x200c, &[0; 4]);
        function.config_write(0x64, &[3, 0]);
        function.run_deferred();
        assert_eq!(fake.kind(), Some(IrqIndex::Msix));
        assert_eq!(fake.config_at(0x64), [3]);
        fake.power_when_disabled.lock().unwrap().clear();
        reset(&function);
        let states = fake.power_when_disabled.lock().unwrap().clone();
        assert_eq!(states, [0]);
    }
}

#[test]
fn msix_and_its_table_are_changed_only_in_an_awake_device() {
    let (fake, _, function) = function(nvme());
    let sleep = || {
        function.config_write(0x64, &[3, 0]);
        function.run_deferred();
        assert_eq!(fake.config_at(0x64), [3]);
    };
    let wake = || function.config_write(0x64, &[0, 0]);
    let set = |control: u16| function.config_write(0x42, &control.to_le_bytes());
    let enabled = || read(&function, 0x42) & 0x8000 != 0;
    // A vector that stays unmasked, so that enabling MSI-X connects it.
    function.bar_write(BarIndex::Bar(0), 0x200c, &[0; 4]);
    let before = fake.kind();
    sleep();
    set(0x8000);
    assert!(enabled());
    assert_eq!(fake.kind(), before);
    wake();
    assert_eq!(fake.kind(), Some(IrqIndex::Msix));
    sleep();
    // A write to the table that comes late, of another vCPU.
    let connected = function.summary().vectors_connected;
    function.bar_write(BarIndex::Bar(0), 0x201c, &[0; 4]);
    assert_eq!(function.summary().vectors_connected, connected);
    let mut entry = [0; 4];
    function.bar_read(BarIndex::Bar(0), 0x201c, &mut entry);
    assert_eq!(entry, [0xff; 4]);
    fake.power_when_disabled.lock().unwrap().clear();
    set(0);
    assert!(!enabled());
    assert_eq!(fake.kind(), Some(IrqIndex::Msix));
    wake();
    assert_eq!(fake.kind(), before);
    assert_eq!(*fake.power_when_disabled.lock().unwrap(), [0]);
    // What is taken back before it wakes never happened.
    sleep();
    set(0x8000);
    set(0);
    wake();
    assert_eq!(fake.kind(), before);
}

#[test]
fn what_decodes_is_told_while_the_device_is_reset_and_that_is_nothing() {
    let (fake, _, function) = function(nvme());
    function.config_write(4, &[6]);
    assert_eq!(function.decoded().len(), 1);
    let (go_on, begun) = held_up(&fake);
    thread::scope(|scope| {
        let reset = scope.spawn(|| function.reset());
        begun.recv().unwrap();
        assert_eq!(function.decoded(), []);
        assert!(!reset.is_finished());
        drop(go_on);
    });
    function.config_write(4, &[6]);
    assert_eq!(function.decoded().len(), 1);
}

#[test]
fn a_state_that_the_device_has_not_leaves_it_awake() {
    let mut fake = nvme();
    fake.only_d0 = true;
    let (_, _, function) = function(fake);
    function.config_write(4, &[6]);
    function.config_write(0x64, &[1, 0]);
    assert_eq!(function.decoded(), []);
    assert!(function.run_deferred());
    assert_eq!(function.decoded().len(), 1);
}

#[test]
fn what_the_guest_wrote_in_the_device_is_put_back_though_the_kernels_reset_restores_it() {
    let (fake, _, function) = function(nvme());
    // Device control (0x2010 at power-on), cache line size, AER's masks and severities.
    function.config_write(0x88, &0x5910_u16.to_le_bytes());
    function.config_write(0x0c, &[0x10, 0x40]);
    write(&function, 0x148, 0);
    write(&function, 0x14c, u32::MAX);
    assert_eq!(fake.config_at::<2>(0x88), 0x5910_u16.to_le_bytes());
    assert_eq!(fake.config_at::<2>(0x0c), [0x10, 0x40]);
    assert_eq!(
        [read(&function, 0x148), read(&function, 0x14c)],
        [0, u32::MAX]
    );
    assert_eq!(u32::from_le_bytes(fake.config_at(0x148)), 0x0046_2030);
    function.reset();
    assert_eq!(fake.config_at::<2>(0x88), 0x2010_u16.to_le_bytes());
    assert_eq!(fake.config_at::<2>(0x0c), [0, 0]);
    assert_eq!(
        [read(&function, 0x148), read(&function, 0x14c)],
        [0x0046_2030, 0]
    );
}

#[test]
fn a_reset_takes_bus_mastering_and_interrupts_first_and_forgets_what_the_guest_wrote() {
    let (fake, _, function) = function(nvme());
    let held = spec::COMMAND_MEMORY | spec::COMMAND_INTX_DISABLE;
    function.config_write(4, &[6]);
    write(&function, 0x10, 0xe000_0000);
    function.config_write(0x42, &0x8000_u16.to_le_bytes());
    function.bar_write(BarIndex::Bar(0), 0x200c, &[0; 4]);
    // By the guest's own function level reset.
    function.config_write(0x88, &0xa010_u16.to_le_bytes());
    assert_eq!((fake.resets().len(), function.decoded()), (1, vec![]));
    assert!(!function.run_deferred());
    assert_eq!(fake.resets()[1..], [held]);
    assert_eq!(fake.kind(), Some(IrqIndex::Intx), "as at power-on");
    assert_eq!(read(&function, 4) as u16, 0);
    assert_eq!(read(&function, 0x10), 4);
    assert_eq!(read(&function, 0x40), 0x0040_6011);
    assert_eq!(u16::from_le_bytes(fake.config_at(0x88)), 0x2010);
    function.reset();
    assert_eq!(fake.resets().len(), 3);
    // The guest is done with it only if it has begun.
    drop(function);
    assert_eq!(fake.resets().len(), 3);
}

#[test]
fn a_device_that_a_guest_used_is_reset_when_it_is_let_go() {
    let (fake, _, function) = function(nvme());
    assert_eq!(fake.resets().len(), 1);
    function.config_write(4, &[6]);
    drop(function);
    let held = spec::COMMAND_MEMORY | spec::COMMAND_INTX_DISABLE;
    assert_eq!(fake.resets()[1..], [held]);
}

#[test]
fn without_a_way_to_reset_it_is_at_least_quiet() {
    let mut fake = nvme();
    fake.can_reset = false;
    let (fake, _, function) = function(fake);
    function.config_write(4, &[6]);
    drop(function);
    assert!(fake.resets().is_empty());
    assert_eq!(fake.config_at::<2>(4)[0] & 4, 0);
}
