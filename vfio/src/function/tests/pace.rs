//! What a guest that has a device do the same over and over costs the host.

use std::sync::Arc;
use std::time::Duration;

use busway_pci::pace::{Clock, INTERRUPTS, RESET, SWITCH, StoppedClock};
use busway_pci::{BarIndex, PciFunction};

use super::{nvme, write};
use crate::fake::{FakeDevice, FakeLines, FakeRoutes};
use crate::{AssignOptions, AssignedFunction, Placement, Wiring};

/// A device, and the time that its guest spends waiting.
fn paced() -> (Arc<StoppedClock>, Arc<FakeDevice>, Arc<AssignedFunction>) {
    let (clock, fake) = (Arc::<StoppedClock>::default(), Arc::new(nvme()));
    let wiring = Wiring {
        routes: Arc::new(FakeRoutes::default()),
        lines: Arc::new(FakeLines::default()),
        resets: Arc::default(),
        clock: clock.clone(),
        placement: Placement::default(),
    };
    let options = AssignOptions::default();
    let function = AssignedFunction::new("fake", fake.clone(), wiring, &options).unwrap();
    (clock, fake, function)
}

fn enable_msix(function: &AssignedFunction, on: bool) {
    let control: u16 = if on { 0x8000 } else { 0 };
    function.config_write(0x42, &control.to_le_bytes());
}

/// Asks for a function level reset, with decoding off.
fn reset_itself(function: &AssignedFunction) {
    function.config_write(0x88, &0xa010_u16.to_le_bytes());
    function.run_deferred();
}

/// To D3hot and back.
fn sleep_and_wake(function: &AssignedFunction) {
    function.config_write(0x64, &[3, 0]);
    function.run_deferred();
    function.config_write(0x64, &[0, 0]);
}

#[test]
fn twenty_reloads_of_a_driver_in_a_row_wait_for_nothing() {
    let (clock, _fake, function) = paced();
    for _ in 0..20 {
        reset_itself(&function);
        function.reset();
        function.config_write(4, &[6]);
        enable_msix(&function, true);
        for vector in 0..65 {
            function.bar_write(BarIndex::Bar(0), 0x2000 + vector * 16 + 12, &[0; 4]);
        }
        enable_msix(&function, false);
        function.config_write(4, &[0]);
        sleep_and_wake(&function);
    }
    // The clock stands still: not even the time that a reload takes is counted.
    assert_eq!(clock.now(), Duration::ZERO);
}

#[test]
fn storms_are_paced_by_what_they_cost() {
    type Storm = (fn(&AssignedFunction), Duration);
    let storms: [Storm; 4] = [
        (reset_itself, RESET),
        (|function| function.reset(), RESET),
        (
            |function| {
                enable_msix(function, true);
                enable_msix(function, false);
            },
            INTERRUPTS * 2,
        ),
        (sleep_and_wake, SWITCH * 2),
    ];
    for (number, (act, price)) in storms.into_iter().enumerate() {
        let (clock, _fake, function) = paced();
        // The allowance goes first.
        while clock.now().is_zero() {
            act(&function);
        }
        let start = clock.now();
        for _ in 0..100 {
            act(&function);
        }
        assert_eq!(clock.now() - start, price * 100, "storm {number}");
    }
}

#[test]
fn what_costs_the_kernel_nothing_is_free() {
    let (clock, fake, function) = paced();
    fake.forget_irq_calls();
    enable_msix(&function, true);
    for round in 0..20_000_u32 {
        // The interrupt disable bit, as a driver in the guest's user space that masks by it.
        function.config_write(5, &[(round % 2) as u8 * 4]);
        // A vector that was connected is masked and unmasked, and gets another message.
        function.bar_write(BarIndex::Bar(0), 0x200c, &(round % 2).to_le_bytes());
        function.bar_write(
            BarIndex::Bar(0),
            0x2000,
            &(0xfee0_0000 | round << 12).to_le_bytes(),
        );
        enable_msix(&function, true);
        write(&function, 0x10, u32::MAX);
    }
    assert_eq!(clock.now(), Duration::ZERO);
    assert!(fake.irq_calls().len() < 10, "{:?}", fake.irq_calls());
}
