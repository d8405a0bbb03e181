use super::*;
use crate::fake::{FakeDevice, FakeLines, FakeRoutes, IrqCall};
use crate::{Area, IrqIndex, IrqInfo, Region};
use busway_pci::{BarKind, HostAddress, capabilities, extended_capabilities};
use proptest::prelude::*;

/// QEMU's NVMe drive as VFIO shows it, with an SR-IOV capability first in its extended list.
pub(super) fn nvme() -> FakeDevice {
    let mut fake = FakeDevice::default();
    fake.set_bar(0, 0x4000);
    fake.intx.count = 1;
    fake.msix = IrqInfo {
        count: 65,
        resizable: true,
    };
    let put = |offset, value: u32| fake.set_config(offset, &value.to_le_bytes());
    put(0x00, 0x0010_1b36);
    put(0x04, 0x0010_0007);
    put(0x08, 0x0108_0202);
    put(0x0c, 0x8000_0000 | 0x0080_0000);
    put(0x10, 0x0000_0004);
    put(0x2c, 0x1100_1af4);
    put(0x34, 0x40);
    put(0x3c, 0x0000_010b);
    // MSI-X at 0x40, power management at 0x60, PCI Express at 0x80.
    put(0x40, 0x0040_6011);
    put(0x44, 0x0000_2000);
    put(0x48, 0x0000_3000);
    put(0x60, 0x0003_8001);
    put(0x80, 0x0002_0010);
    put(0x84, 0x1000_8000);
    put(0x88, 0x0000_2010);
    put(0x94, 0xffff_ffff);
    // SR-IOV at 0x100, AER at 0x140, ARI at 0x180, serial number at 0x190.
    put(0x100, 0x1401_0010);
    put(0x104, 0xdead_beef);
    put(0x140, 0x1802_0001);
    put(0x148, 0x0046_2030);
    put(0x180, 0x1901_000e);
    put(0x184, 0x0000_0100);
    put(0x190, 0x0001_0003);
    put(0x194, 0x1234_5678);
    fake
}

fn function(fake: FakeDevice) -> (Arc<FakeDevice>, Arc<FakeRoutes>, Arc<AssignedFunction>) {
    let fake = Arc::new(fake);
    let routes = Arc::new(FakeRoutes::default());
    let function = assign("0000:01:00.0", fake.clone(), routes.clone()).unwrap();
    (fake, routes, function)
}

fn assign(
    name: &str,
    fake: Arc<FakeDevice>,
    routes: Arc<FakeRoutes>,
) -> Result<Arc<AssignedFunction>, AssignError> {
    assign_with(name, fake, routes, &AssignOptions::default())
}

pub(super) fn assign_with(
    name: &str,
    fake: Arc<FakeDevice>,
    routes: Arc<FakeRoutes>,
    options: &AssignOptions,
) -> Result<Arc<AssignedFunction>, AssignError> {
    let wiring = Wiring {
        routes,
        lines: Arc::new(FakeLines::default()),
        resets: Arc::default(),
    };
    AssignedFunction::new(name, fake, wiring, options)
}

/// What sets the pin up in the device.
fn pin_set_up() -> Vec<IrqCall> {
    vec![
        IrqCall::Set(IrqIndex::Intx, 0, vec![true]),
        IrqCall::UnmaskOn(IrqIndex::Intx),
    ]
}

pub(super) fn read(function: &AssignedFunction, offset: u16) -> u32 {
    let mut data = [0; 4];
    function.config_read(offset, &mut data);
    u32::from_le_bytes(data)
}

pub(super) fn write(function: &AssignedFunction, offset: u16, value: u32) {
    function.config_write(offset, &value.to_le_bytes());
}

#[test]
fn identity_and_pin_are_the_devices_and_rom_bist_and_multi_function_are_not() {
    let (_, _, function) = function(nvme());
    assert_eq!(read(&function, 0x00), 0x0010_1b36);
    assert_eq!(read(&function, 0x08), 0x0108_0202);
    assert_eq!(read(&function, 0x0c), 0);
    assert_eq!(read(&function, 0x2c), 0x1100_1af4);
    assert_eq!(read(&function, 0x30), 0);
    assert_eq!(read(&function, 0x3c), 0x0100);
    function.config_write(0x3c, &[0x0b, 0x02]);
    assert_eq!(read(&function, 0x3c), 0x010b);
    write(&function, 0x00, 0);
    assert_eq!(read(&function, 0x00), 0x0010_1b36);
}

#[test]
fn hidden_capabilities_leave_both_chains_and_their_bytes_read_zero() {
    let (_, _, function) = function(nvme());
    let config = |offset| read(&function, offset);
    let standard: Vec<_> = capabilities(&config)
        .iter()
        .map(|c| (c.id, c.offset))
        .collect();
    assert_eq!(standard, [(0x11, 0x40), (0x01, 0x60), (0x10, 0x80)]);
    let extended: Vec<_> = extended_capabilities(&config)
        .iter()
        .map(|c| (c.id, c.offset))
        .collect();
    assert_eq!(extended, [(0, 0x100), (1, 0x140), (3, 0x190)]);
    assert_eq!(config(0x104), 0);
    assert_eq!(config(0x184), 0);
    assert_eq!(config(0x148), 0x0046_2030);
    assert_eq!(config(0x194), 0x1234_5678);
    write(&function, 0x104, 1);
    assert_eq!(config(0x104), 0);
    // Slot registers of an endpoint.
    assert_eq!(config(0x94), 0);
}

#[test]
fn decoding_is_the_guests_and_stays_on_in_the_device() {
    let (fake, _, function) = function(nvme());
    let command = || u16::from_le_bytes(fake.config_at(4));
    let held = spec::COMMAND_MEMORY;
    assert_eq!(command(), held);
    assert_eq!(read(&function, 4) as u16, 0);
    write(&function, 0x10, 0xffff_ffff);
    write(&function, 0x14, 0xffff_ffff);
    assert_eq!(
        [read(&function, 0x10), read(&function, 0x14)],
        [0xffff_c004, 0xffff_ffff]
    );
    write(&function, 0x10, 0xe000_0000);
    write(&function, 0x14, 1);
    assert_eq!(function.decoded(), []);
    function.config_write(4, &6_u16.to_le_bytes());
    assert_eq!(command(), held | spec::COMMAND_BUS_MASTER);
    assert_eq!(read(&function, 4) as u16, 6);
    let decoded = function.decoded();
    assert_eq!((decoded.len(), decoded[0].address), (1, 0x1_e000_0000));
    function.config_write(4, &[0]);
    assert_eq!(command(), held);
    assert_eq!(function.decoded(), []);
}

#[test]
fn a_device_sleeps_only_when_nothing_is_mapped_and_is_left_alone_until_it_wakes() {
    let (fake, _, function) = function(nvme());
    let state = || fake.config_at::<1>(0x64)[0] & 3;
    let bar = BarIndex::Bar(0);
    function.config_write(4, &[6]);
    assert_eq!(function.decoded().len(), 1);
    function.config_write(0x64, &[3, 0]);
    assert_eq!((function.decoded(), state()), (vec![], 0));
    assert!(!function.settle());
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
    assert!(!function.settle());
    assert_eq!((function.decoded().len(), state()), (1, 0));
    function.bar_read(bar, 0, &mut data);
    assert_eq!(data, [0x5a; 4]);
}

#[test]
fn a_reset_wakes_the_device_first() {
    let (fake, _, function) = function(nvme());
    function.config_write(0x64, &[3, 0]);
    function.settle();
    function.reset();
    assert_eq!(fake.config_at::<1>(0x64)[0] & 3, 0);
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
    assert!(function.settle());
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
fn a_bit_that_the_guest_may_read_only_keeps_its_value_when_its_neighbours_are_written() {
    let fake = nvme();
    // LTR enabled by the host, in device control 2.
    fake.set_config(0xa8, &[0x00, 0x04]);
    let (fake, _, function) = function(fake);
    function.config_write(0xa8, &[0x09, 0x02]);
    assert_eq!(fake.config_at::<2>(0xa8), [0x09, 0x06]);
    assert_eq!(read(&function, 0xa8) as u16, 0x0609);
}

#[test]
fn the_host_hears_of_errors_whatever_the_guest_wants_and_after_each_reset() {
    let fake = nvme();
    fake.set_config(5, &[(spec::COMMAND_SERR >> 8) as u8]);
    // All four are reported, and ordering is relaxed.
    fake.set_config(0x88, &[0x1f, 0x20]);
    let (fake, _, function) = function(fake);
    let reports = |fake: &FakeDevice| {
        let [control, _] = fake.config_at(0x88);
        let command = u16::from_le_bytes(fake.config_at(4));
        (control & 0xf, command & spec::COMMAND_SERR != 0)
    };
    assert_eq!(read(&function, 4) as u16 & spec::COMMAND_SERR, 0);
    for (command, control) in [(spec::COMMAND_SERR, 0x05), (0, 0x10)] {
        function.config_write(4, &command.to_le_bytes());
        function.config_write(0x88, &[control, 0x20]);
        assert_eq!(read(&function, 0x88) as u8, control, "the guest's notes");
        assert_eq!(read(&function, 4) as u16 & spec::COMMAND_SERR, command);
        assert_eq!(fake.config_at::<1>(0x88), [(control & 0xf0) | 0xf]);
        assert_eq!(reports(&fake), (0xf, true));
    }
    function.reset();
    assert_eq!(reports(&fake), (0xf, true));
    assert_eq!(read(&function, 0x88) as u8, 0x1f);
    drop(function);
    assert_eq!(reports(&fake), (0xf, true));
}

#[test]
fn a_capability_that_is_read_only_is_not_written_and_what_lies_behind_it_is() {
    let (fake, _, function) = function(nvme());
    write(&function, 0x194, 0);
    write(&function, 0x1a0, 7);
    assert_eq!(u32::from_le_bytes(fake.config_at(0x194)), 0x1234_5678);
    assert_eq!(u32::from_le_bytes(fake.config_at(0x1a0)), 7);
}

#[test]
fn everything_but_the_tables_and_pending_bits_pages_is_mapped() {
    let (_, _, function) = function(nvme());
    let parts = function.parts(BarIndex::Bar(0));
    let [BarPart::Memory { offset, size, host }] = parts[..] else {
        panic!("{parts:?}");
    };
    assert_eq!((offset, size), (0, 0x2000));
    assert_ne!(host, HostAddress(0));
    assert_eq!(function.summary().mapped, [(0, 0, 0x2000)]);
}

#[test]
fn a_vector_costs_nothing_until_the_guest_unmasks_it() {
    let (fake, routes, function) = function(nvme());
    let bar = BarIndex::Bar(0);
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

#[test]
fn registers_beside_the_table_are_reached_at_every_width_and_place() {
    let (fake, _, function) = function(nvme());
    let bar = BarIndex::Bar(0);
    let region = RegionIndex::bar(0).unwrap();
    // The table ends at 0x2410.
    for width in [1_usize, 2, 4, 8] {
        for offset in [0x2410_u64, 0x2413, 0x2ff7, 0x3010] {
            let mut data = [0; 8];
            function.bar_read(bar, offset, &mut data[..width]);
            assert_eq!(data[..width], [0x5a; 8][..width]);
            function.bar_write(bar, offset, &data[..width]);
            let written = fake.bar_writes.lock().unwrap().pop();
            assert_eq!(written, Some((region, offset, vec![0x5a; width])));
        }
    }
}

#[test]
fn an_access_that_is_half_a_register_and_half_of_the_table_is_both() {
    let (fake, _, function) = function(nvme());
    let bar = BarIndex::Bar(0);
    let region = RegionIndex::bar(0).unwrap();
    // Into the table's first address, out of its last mask, into and out of the pending bits.
    function.bar_write(bar, 0x1ffc, &[1, 1, 1, 1, 0x04, 0x10, 0xe0, 0xfe]);
    function.bar_write(bar, 0x240c, &[0, 0, 0, 0, 2, 2, 2, 2]);
    function.bar_write(bar, 0x2ffe, &[3; 4]);
    function.bar_write(bar, 0x300c, &[4; 8]);
    let writes = std::mem::take(&mut *fake.bar_writes.lock().unwrap());
    assert_eq!(
        writes,
        [
            (region, 0x1ffc, vec![1; 4]),
            (region, 0x2410, vec![2; 4]),
            (region, 0x2ffe, vec![3; 2]),
            (region, 0x3010, vec![4; 4]),
        ]
    );
    let mut data = [0; 8];
    function.bar_read(bar, 0x1ffc, &mut data);
    assert_eq!(data, [0x5a, 0x5a, 0x5a, 0x5a, 0x04, 0x10, 0xe0, 0xfe]);
    function.bar_read(bar, 0x240c, &mut data);
    assert_eq!(data, [0, 0, 0, 0, 0x5a, 0x5a, 0x5a, 0x5a]);
    function.bar_read(bar, 0x2ffd, &mut data);
    assert_eq!(data, [0x5a, 0x5a, 0x5a, 0, 0, 0, 0, 0]);
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
    assert!(!function.settle());
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

#[test]
fn a_table_beyond_its_bar_hides_msix_and_the_rest_works() {
    let fake = nvme();
    fake.set_config(0x44, &0x3ff8_u32.to_le_bytes());
    let (_, _, function) = function(fake);
    let config = |offset| read(&function, offset);
    let ids: Vec<_> = capabilities(&config).iter().map(|c| c.id).collect();
    assert_eq!(ids, [0x01, 0x10]);
    assert_eq!(config(0x40), 0);
    assert_eq!(function.summary().mapped, [(0, 0, 0x4000)]);
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
fn an_integrated_endpoint_becomes_one_with_a_link() {
    let fake = nvme();
    fake.set_config(0x80, &0x0092_0010_u32.to_le_bytes());
    let (_, _, function) = function(fake);
    assert_eq!(read(&function, 0x80), 0x0002_0010);
    assert_eq!(read(&function, 0x8c), 0x11);
    assert_eq!(read(&function, 0x90), 0x11_0000);
}

/// What the guest sees of a device: standard and extended capabilities, and BARs.
type Seen = (Vec<u8>, Vec<u16>, Vec<(u8, BarKind, u64)>);

fn seen(recorded: &str) -> Seen {
    let (_, _, function) = function(FakeDevice::recorded(recorded));
    let config = |offset| read(&function, offset);
    let bars = function.bars().into_iter().map(|bar| match bar.index {
        BarIndex::Bar(number) => (number, bar.kind, bar.size),
        BarIndex::Rom => panic!("{bar:?}"),
    });
    (
        capabilities(&config).iter().map(|c| c.id).collect(),
        extended_capabilities(&config)
            .iter()
            .map(|c| c.id)
            .collect(),
        bars.collect(),
    )
}

#[test]
fn recorded_devices_show_what_they_are_and_nothing_of_the_hosts() {
    let plain = BarKind::Memory32 {
        prefetchable: false,
    };
    let long = |prefetchable| BarKind::Memory64 { prefetchable };
    assert_eq!(
        seen(include_str!("../testdata/nvme.txt")),
        (
            vec![0x11, 0x10, 0x01],
            vec![],
            vec![(0, long(false), 0x4000)]
        )
    );
    assert_eq!(
        seen(include_str!("../testdata/e1000e.txt")),
        (
            vec![0x01, 0x05, 0x10, 0x11],
            vec![0x01, 0x03],
            vec![
                (0, plain, 0x2_0000),
                (1, plain, 0x2_0000),
                (2, BarKind::Io, 0x20),
                (3, plain, 0x4000)
            ]
        )
    );
    // The PF's SR-IOV and ARI are gone, and so is the VF's ARI.
    assert_eq!(
        seen(include_str!("../testdata/igb.txt")),
        (
            vec![0x01, 0x05, 0x11, 0x10],
            vec![0x01],
            vec![
                (0, plain, 0x2_0000),
                (1, plain, 0x2_0000),
                (2, BarKind::Io, 0x20),
                (3, long(false), 0x4000)
            ]
        )
    );
    assert_eq!(
        seen(include_str!("../testdata/igbvf.txt")),
        (
            vec![0x10, 0x11],
            vec![0x01],
            vec![(0, long(true), 0x4000), (3, long(true), 0x4000)]
        )
    );
}

#[test]
fn what_cannot_be_given_is_refused_with_the_reason() {
    let refuse = |fake: FakeDevice| {
        let routes = Arc::new(FakeRoutes::default());
        assign("0000:01:00.0", Arc::new(fake), routes)
            .unwrap_err()
            .to_string()
    };
    let gone = nvme();
    gone.set_config(0, &[0xff; 4096]);
    assert!(refuse(gone).contains("does not answer"));
    let bridge = nvme();
    bridge.set_config(0x0e, &[0x81]);
    assert!(refuse(bridge).contains("no endpoint (header type 1)"));
    let mut odd = nvme();
    odd.set_bar(0, 0x3000);
    assert!(refuse(odd).contains("BAR 0 of 0x3000 bytes is impossible"));
    let mut cut = nvme();
    cut.set_bar(5, 0x4000);
    cut.set_config(0x24, &[4]);
    assert!(refuse(cut).contains("no BAR 6"));
}

#[test]
fn a_conventional_device_has_no_extended_space() {
    let fake = nvme();
    fake.config.lock().unwrap().truncate(256);
    let (_, _, function) = function(fake);
    assert_eq!(read(&function, 0x100), 0);
    assert_eq!(read(&function, 0xffc), 0);
    write(&function, 0x100, 1);
}

#[derive(Clone, Debug)]
enum Step {
    Config(u16, Vec<u8>),
    Bar(u8, u64, Vec<u8>),
    Reset,
    Settle,
}

fn access() -> impl Strategy<Value = Vec<u8>> {
    let width = prop::sample::select(vec![1_usize, 2, 3, 4, 8]);
    width.prop_flat_map(|width| prop::collection::vec(any::<u8>(), width))
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let offset = prop_oneof![0_u16..0x200, any::<u16>()];
    let place = prop_oneof![0_u64..0x5000, any::<u64>()];
    prop::collection::vec(
        prop_oneof![
            8 => (offset, access()).prop_map(|(at, data)| Step::Config(at, data)),
            8 => (0_u8..7, place, access()).prop_map(|(bar, at, data)| Step::Bar(bar, at, data)),
            1 => Just(Step::Reset),
            2 => Just(Step::Settle),
        ],
        0..60,
    )
}

/// A configuration space of noise, in which lists hold together here and there.
fn hostile() -> impl Strategy<Value = FakeDevice> {
    let noise = prop_oneof![
        Just(vec![0xff; 4096]),
        Just(vec![0; 4096]),
        prop::collection::vec(any::<u8>(), 4096),
    ];
    let pointer = || prop_oneof![0x40_u8..0xff, Just(0)];
    let id = prop::sample::select(vec![
        0x01_u8, 0x05, 0x09, 0x10, 0x11, 0x13, 0x14, 0x00, 0xff,
    ]);
    let standard = prop::collection::vec((pointer(), id, pointer()), 0..20);
    let link = || prop_oneof![0x100_u16..0xfff, Just(0)];
    let extended = prop::collection::vec((link(), 0_u16..0x30, link()), 0..20);
    let size = prop_oneof![
        3 => Just(0_u64),
        4 => (4_u32..14).prop_map(|log2| 1 << log2),
        1 => (14_u32..64).prop_map(|log2| 1 << log2),
        1 => any::<u64>(),
    ];
    let bars = prop::collection::vec((size, prop::sample::select(vec![0_u8, 1, 4, 8, 12])), 6);
    let interrupts = (0_u32..70, 0_u32..40, any::<bool>(), 0_u32..70);
    let rom = prop::sample::select(vec![0_usize, 512, 2048, 3000, 1 << 16]);
    let first = (pointer(), any::<bool>(), rom);
    (noise, standard, extended, bars, interrupts, first).prop_map(
        |(noise, standard, extended, bars, (msix, msi, resizable, most), (first, tame, rom))| {
            let mut fake = FakeDevice {
                config: Mutex::new(noise),
                rom: vec![0xa5; rom],
                most_vectors: most,
                msix: IrqInfo {
                    count: msix,
                    resizable,
                },
                msi: IrqInfo {
                    count: msi,
                    resizable: false,
                },
                ..FakeDevice::default()
            };
            fake.intx.count = msix % 2;
            if tame {
                fake.set_config(0x3d, &[first % 6]);
                fake.set_config(0, &[0x86, 0x80]);
                fake.set_config(6, &[0x10]);
                fake.set_config(0x0e, &[0]);
                fake.set_config(0x34, &[first]);
            }
            for (at, id, next) in standard {
                fake.set_config(usize::from(at & !3), &[id, next]);
            }
            for (at, id, next) in extended {
                let header = u32::from(id) | 1 << 16 | u32::from(next) << 20;
                fake.set_config(usize::from(at & !3), &header.to_le_bytes());
            }
            for (number, (size, flags)) in bars.into_iter().enumerate() {
                fake.bars[number] = Region {
                    size,
                    readable: true,
                    writable: true,
                    areas: vec![Area { offset: 0, size }],
                };
                fake.set_config(0x10 + number * 4, &[flags]);
            }
            fake
        },
    )
}

proptest! {
    /// Whatever a device says and a guest does: nothing panics, both lists of the guest's end, none
    /// of what the table hides is in them, and no vector is connected that is not enabled.
    #[test]
    fn a_hostile_device_and_a_hostile_guest_harm_nothing(fake in hostile(), steps in steps()) {
        let fake = Arc::new(fake);
        let routes = Arc::new(FakeRoutes::default());
        if let Ok(function) = assign("fake", fake.clone(), routes) {
            for step in steps {
                match step {
                    Step::Config(at, mut data) => {
                        function.config_write(at, &data);
                        function.config_read(at, &mut data);
                    }
                    Step::Bar(bar, at, mut data) => {
                        let bar = if bar == 6 { BarIndex::Rom } else { BarIndex::Bar(bar) };
                        function.bar_write(bar, at, &data);
                        function.bar_read(bar, at, &mut data);
                    }
                    Step::Reset => function.reset(),
                    Step::Settle => {
                        function.settle();
                    }
                }
                for region in function.decoded() {
                    prop_assert!(function.bars().contains(&region));
                }
                prop_assert_eq!(read(&function, 0x30) & 0x7fe, 0);
                let connected = function.summary().pin.is_some_and(|(_, connected)| connected);
                prop_assert_eq!(connected, fake.kind() == Some(IrqIndex::Intx));
                let messages = function.lock().uses_messages();
                prop_assert_eq!(connected, function.summary().pin.is_some() && !messages);
            }
            function.reset();
            let config = |offset| read(&function, offset);
            for found in extended_capabilities(&config) {
                prop_assert!(found.id == 0 || !matches!(
                    crate::policy::find(crate::policy::EXTENDED, found.id).map(|rule| rule.keep),
                    Some(crate::policy::Keep::No(_))
                ), "{:?}", found);
            }
            prop_assert!(capabilities(&config).len() <= 48);
            drop(function);
            prop_assert_eq!(fake.kind(), None);
        }
    }
}
