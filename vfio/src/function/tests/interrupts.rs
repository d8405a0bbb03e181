//! The pin, MSI and MSI-X, and changes between them.

use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use busway_pci::pace::StoppedClock;
use busway_pci::{BarIndex, InterruptMode, InterruptPin, PciFunction, spec};

use super::{assign, function, nvme, read, write};
use crate::fake::{FakeDevice, FakeLines, FakeRoutes, IrqCall};
use crate::function::AssignedFunction;
use crate::{AssignOptions, IrqIndex, IrqInfo, Placement, Wiring};

/// What sets the pin up in the device.
fn pin_set_up() -> Vec<IrqCall> {
    vec![
        IrqCall::Set(IrqIndex::Intx, 0, vec![true]),
        IrqCall::UnmaskOn(IrqIndex::Intx),
    ]
}

#[test]
fn a_vector_costs_nothing_until_the_guest_unmasks_it() {
    let (fake, routes, function) = function(nvme());
    let (bar, sight) = (BarIndex::Bar(0), function.sight());
    let shown = || {
        let seen = sight.activity.seen();
        (seen.mode, seen.connected)
    };
    assert_eq!(shown(), (InterruptMode::Pin, 1));
    assert_eq!((sight.vectors, sight.direct_bytes > 0), (65, true));
    // Enabled and masked, as Linux does first; then the table, then the function's mask goes.
    function.config_write(0x42, &0xc000_u16.to_le_bytes());
    for vector in 0..3_u64 {
        let at = 0x2000 + vector * 16;
        function.bar_write(bar, at, &0xfee0_1000_u32.to_le_bytes());
        function.bar_write(bar, at + 8, &(0x40 + vector as u32).to_le_bytes());
    }
    function.config_write(0x42, &0x8000_u16.to_le_bytes());
    // The device is in that mode, and that is all.
    let msix = IrqIndex::Msix;
    let mut calls = pin_set_up();
    calls.extend([
        IrqCall::Disable(IrqIndex::Intx),
        IrqCall::Set(msix, 0, vec![false]),
    ]);
    assert_eq!(
        (fake.irq_calls(), routes.made.lock().unwrap().len()),
        (calls.clone(), 0)
    );
    for vector in [1_u64, 0] {
        function.bar_write(bar, 0x2000 + vector * 16 + 12, &[0; 4]);
    }
    calls.extend([
        IrqCall::Set(msix, 1, vec![true]),
        IrqCall::Set(msix, 0, vec![true]),
    ]);
    assert_eq!(fake.irq_calls(), calls);
    assert_eq!(function.summary().vectors_connected, 2);
    assert_eq!(shown(), (InterruptMode::Msix, 2));
    let mut entry = [0; 8];
    function.bar_read(bar, 0x2010, &mut entry);
    assert_eq!(u64::from_le_bytes(entry), 0xfee0_1000);
    assert_eq!(read(&function, 0x40), 0x8040_6011);
    function.config_write(0x42, &[0, 0]);
    calls.push(IrqCall::Disable(msix));
    calls.extend(pin_set_up());
    assert_eq!(fake.irq_calls(), calls);
    assert!(fake.bar_writes.lock().unwrap().is_empty());
}

/// A card with a pin whose driver takes no eventfd to unmask it by.
fn unmasked_by_hand() -> (FakeDevice, mpsc::Receiver<()>) {
    let (unmasked, was) = mpsc::channel();
    let fake = FakeDevice {
        mediated: true,
        no_unmask_events: true,
        intx: IrqInfo {
            count: 1,
            resizable: true,
        },
        ..FakeDevice::default()
    };
    *fake.on_unmask.0.lock().unwrap() = Some(Box::new(move || unmasked.send(()).unwrap()));
    fake.set_config(0, &0x3253_4348_u32.to_le_bytes());
    fake.set_config(8, &0x0700_0210_u32.to_le_bytes());
    fake.set_config(0x3c, &[0, 1]);
    (fake, was)
}

#[test]
fn a_pin_whose_driver_takes_no_eventfd_is_unmasked_at_each_end_of_its_interrupt() {
    let (fake, unmasked) = unmasked_by_hand();
    let fake = Arc::new(fake);
    let lines = Arc::new(FakeLines::default());
    let wiring = Wiring {
        routes: Arc::new(FakeRoutes::default()),
        lines: lines.clone(),
        resets: Arc::default(),
        clock: Arc::new(StoppedClock::default()),
        placement: Placement::default(),
    };
    let name = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
    let function =
        AssignedFunction::new(name, fake.clone(), wiring, &AssignOptions::default()).unwrap();
    let set = IrqCall::Set(IrqIndex::Intx, 0, vec![true]);
    assert_eq!(fake.irq_calls(), [set]);
    assert!(!function.is_peer());
    let over = lines.resamples.lock().unwrap()[0].clone();
    for _ in 0..3 {
        over.signal();
        unmasked.recv_timeout(Duration::from_secs(60)).unwrap();
    }
    // Nothing is unmasked any more that is disconnected.
    drop(function);
    let calls = fake.irq_calls();
    let (last, before) = calls.split_last().unwrap();
    assert_eq!(*last, IrqCall::Disable(IrqIndex::Intx));
    assert_eq!(before[1..], vec![IrqCall::Unmask(IrqIndex::Intx); 3]);
    over.signal();
    assert_eq!(fake.irq_calls(), calls);
}

#[test]
fn pending_bits_of_vectors_that_were_never_unmasked_are_the_devices() {
    let (_, _, function) = function(nvme());
    let bar = BarIndex::Bar(0);
    let pending = || {
        let mut data = [0; 8];
        function.bar_read(bar, 0x3000, &mut data);
        data
    };
    assert_eq!(pending(), [0; 8]);
    function.config_write(0x42, &0x8000_u16.to_le_bytes());
    assert_eq!(pending(), [0x5a; 8]);
    function.bar_write(bar, 0x201c, &[0; 4]);
    assert_eq!(pending(), [0x58, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a]);
}

#[test]
fn msi_connects_all_its_vectors_in_one_call() {
    let fake = FakeDevice {
        msi: IrqInfo {
            count: 4,
            resizable: false,
        },
        ..FakeDevice::default()
    };
    fake.set_config(0, &0x11e8_1234_u32.to_le_bytes());
    fake.set_config(6, &[0x10, 0]);
    fake.set_config(0x34, &[0x40]);
    // Four vectors, 64-bit.
    fake.set_config(0x40, &0x0084_0005_u32.to_le_bytes());
    let (fake, _, function) = function(fake);
    write(&function, 0x44, 0xfee0_0000);
    function.config_write(0x4c, &[0x30, 0]);
    function.config_write(0x42, &0x00a1_u16.to_le_bytes());
    let set = |event| IrqCall::Set(IrqIndex::Msi, 0, vec![event; 4]);
    let tried = [set(false), IrqCall::Disable(IrqIndex::Msi)];
    assert_eq!(fake.irq_calls()[..2], tried);
    assert_eq!(fake.irq_calls()[2..], [set(true)]);
    assert_eq!(function.summary().vectors_connected, 4);
    assert_eq!(read(&function, 0x40) >> 16, 0x00a5);
}

#[test]
fn a_host_with_fewer_msi_vectors_is_what_the_guest_is_told_of() {
    let fake = msi_only(2);
    let (fake, _, function) = function(fake);
    // Two of eight.
    assert_eq!(read(&function, 0x40) >> 16, 0x0082);
    function.config_write(0x42, &0x00b1_u16.to_le_bytes());
    assert_eq!(fake.connected(), [true; 2]);
}

/// A device with a pin and eight MSI vectors, of which the host can give some.
fn msi_only(given: u32) -> FakeDevice {
    let mut fake = FakeDevice {
        msi: IrqInfo {
            count: 8,
            resizable: false,
        },
        most_vectors: given,
        ..FakeDevice::default()
    };
    fake.intx.count = 1;
    fake.set_config(0, &0x11e8_1234_u32.to_le_bytes());
    fake.set_config(6, &[0x18, 0]);
    fake.set_config(0x34, &[0x40]);
    fake.set_config(0x3d, &[2]);
    fake.set_config(0x40, &0x0086_0005_u32.to_le_bytes());
    fake
}

#[test]
fn the_pin_is_connected_exactly_while_no_message_is() {
    let fake = Arc::new(msi_only(8));
    let routes = Arc::new(FakeRoutes::default());
    let lines = Arc::new(FakeLines::default());
    let wiring = Wiring {
        routes,
        lines: lines.clone(),
        resets: Arc::default(),
        clock: Arc::new(StoppedClock::default()),
        placement: Placement::default(),
    };
    let options = AssignOptions::default();
    let function = AssignedFunction::new("fake", fake.clone(), wiring, &options).unwrap();
    let pin = InterruptPin::B;
    assert_eq!(function.summary().pin, Some((pin, true)));
    assert!(function.summary().to_string().contains("8 vectors, INTB, "));
    fake.forget_irq_calls();
    // MSI on and off, as a driver that is reloaded does.
    for _ in 0..3 {
        function.config_write(0x42, &1_u16.to_le_bytes());
        assert_eq!(function.summary().pin, Some((pin, false)));
        assert_eq!(fake.kind(), Some(IrqIndex::Msi));
        function.config_write(0x42, &0_u16.to_le_bytes());
        assert_eq!(fake.kind(), Some(IrqIndex::Intx));
    }
    let mut round = vec![
        IrqCall::Disable(IrqIndex::Intx),
        IrqCall::Set(IrqIndex::Msi, 0, vec![true]),
        IrqCall::Disable(IrqIndex::Msi),
    ];
    round.extend(pin_set_up());
    assert_eq!(fake.irq_calls(), [&round[..]; 3].concat());
    assert_eq!(*lines.made.lock().unwrap(), [pin; 4]);
    drop(function);
    assert_eq!(fake.kind(), None);
}

#[test]
fn interrupt_disable_goes_to_the_device_only_while_the_pin_is_connected() {
    let (fake, _, function) = function(msi_only(8));
    let disabled = || u16::from_le_bytes(fake.config_at(4)) & spec::COMMAND_INTX_DISABLE != 0;
    let seen = || read(&function, 4) as u16 & spec::COMMAND_INTX_DISABLE != 0;
    let set = |disable| {
        let bit = if disable {
            spec::COMMAND_INTX_DISABLE
        } else {
            0
        };
        function.config_write(4, &(bit | spec::COMMAND_PARITY).to_le_bytes());
    };
    assert_eq!((disabled(), seen()), (false, false));
    set(true);
    assert_eq!((disabled(), seen()), (true, true));
    set(false);
    assert_eq!((disabled(), seen()), (false, false));
    // It takes nothing down: a guest may do it at each interrupt.
    assert_eq!(fake.irq_calls().len(), 4);
    function.config_write(0x42, &[1, 0]);
    assert_eq!((disabled(), seen()), (true, false));
    set(false);
    assert_eq!((disabled(), seen()), (true, false));
    set(true);
    function.config_write(0x42, &[0, 0]);
    assert_eq!((disabled(), seen()), (true, true));
    set(false);
    assert_eq!((disabled(), seen()), (false, false));
    let command = u16::from_le_bytes(fake.config_at(4));
    assert_ne!(command & spec::COMMAND_PARITY, 0, "the rest is kept");
}

#[test]
fn messages_that_are_disconnected_leave_the_pin_disabled_in_the_device_itself() {
    let disabled = |fake: &FakeDevice| fake.pin_disabled.load(Ordering::Relaxed);
    let (fake, _, function) = function(msi_only(8));
    function.config_write(0x42, &[1, 0]);
    function.retire();
    assert_eq!((fake.kind(), disabled(&fake)), (None, true));
    // Its line cannot be had.
    let mut fake = msi_only(8);
    fake.intx_refused = Some(libc::EBUSY);
    let (fake, _, function) = super::function(fake);
    assert!(disabled(&fake));
    function.config_write(0x42, &[1, 0]);
    assert!(disabled(&fake));
    function.config_write(0x42, &[0, 0]);
    assert_eq!((fake.kind(), disabled(&fake)), (None, true));
    function.config_write(4, &[6, 1]);
    assert_eq!(fake.config_at::<1>(5), [4], "the rest is kept");
}

#[test]
fn interrupt_status_is_the_devices_where_it_has_a_pin_and_zero_elsewhere() {
    for (pin, status) in [(2, 0x18), (0, 0x10)] {
        let fake = msi_only(8);
        fake.set_config(0x3d, &[pin]);
        let (_, _, function) = function(fake);
        assert_eq!(read(&function, 4) >> 16, status);
        assert_eq!(read(&function, 0x3c) >> 8, u32::from(pin));
    }
    let mut unusable = msi_only(8);
    unusable.intx.count = 0;
    let (_, _, function) = function(unusable);
    assert_eq!((read(&function, 4) >> 16, read(&function, 0x3c)), (0x10, 0));
}

#[test]
fn a_host_line_that_cannot_be_had_is_fatal_only_where_there_is_nothing_else() {
    let mut fake = msi_only(8);
    fake.intx_refused = Some(libc::EBUSY);
    let (fake, _, function) = function(fake);
    assert_eq!(function.summary().pin, Some((InterruptPin::B, false)));
    function.config_write(0x42, &[1, 0]);
    assert_eq!(fake.kind(), Some(IrqIndex::Msi));
    function.config_write(0x42, &[0, 0]);
    assert_eq!(fake.kind(), None);

    let mut fake = msi_only(8);
    fake.intx_refused = Some(libc::EBUSY);
    fake.set_config(0x34, &[0]);
    let routes = Arc::new(FakeRoutes::default());
    let error = assign("fake", Arc::new(fake), routes).unwrap_err();
    assert!(
        error.to_string().contains("no interrupt but its pin"),
        "{error}"
    );
}

#[test]
fn devices_with_one_kind_of_interrupt_or_none_are_as_good_as_others() {
    let without_pin = |mut fake: FakeDevice| {
        fake.intx.count = 0;
        fake.set_config(0x3d, &[0]);
        fake
    };
    let without_msix = |fake: FakeDevice| {
        fake.set_config(0x34, &[0x60]);
        fake
    };
    let (msi, msix, pin) = (
        Some(IrqIndex::Msi),
        Some(IrqIndex::Msix),
        Some(IrqIndex::Intx),
    );
    for (fake, before, enabled) in [
        (without_pin(msi_only(8)), None, msi),
        (without_pin(nvme()), None, msix),
        (without_msix(nvme()), pin, pin),
        (without_msix(without_pin(nvme())), None, None),
    ] {
        let (fake, _, function) = function(fake);
        assert_eq!(fake.kind(), before);
        // MSI's enable bit, or MSI-X's, where the capability is; and a mask goes.
        function.config_write(0x42, &[1, 0x80]);
        function.bar_write(BarIndex::Bar(0), 0x200c, &[0; 4]);
        assert_eq!(fake.kind(), enabled);
        let vectors = usize::from(enabled == msi || enabled == msix);
        assert_eq!(function.summary().vectors_connected, vectors);
        function.reset();
        assert_eq!(fake.kind(), before);
        drop(function);
        assert_eq!(fake.kind(), None);
    }
}
