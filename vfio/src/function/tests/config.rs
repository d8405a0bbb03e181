//! What a guest finds in configuration space: the device's own, emulated, read-only, hidden.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use busway_pci::{BarIndex, BarKind, PciFunction, capabilities, extended_capabilities, spec};

use super::{AssignedFunction, assign, function, nvme, on_root_bus, read, write};
use crate::fake::{FakeDevice, FakeRoutes};

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
fn a_device_that_is_gone_has_no_identity_though_vfio_tells_it() {
    let (fake, _, function) = function(nvme());
    fake.silent.store(true, Ordering::Relaxed);
    assert_eq!([0, 8].map(|at| read(&function, at)), [u32::MAX; 2]);
    let mut device = [0; 2];
    function.config_read(2, &mut device);
    assert_eq!(device, [0xff; 2]);
    fake.silent.store(false, Ordering::Relaxed);
    assert_eq!(read(&function, 0), 0x0010_1b36);
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

/// Shadow functions, which VFIO unlinks, are at 0x100, then AER, L1 substates, one of the vendor's with
/// 0x20 bytes, and DOE; in the header's list a hot swap handle behind MSI-X.
fn with_what_vfio_unlinks() -> FakeDevice {
    let mut fake = nvme();
    let put = |offset, value: u32| fake.set_config(offset, &value.to_le_bytes());
    put(0x40, 0x0040_f011);
    put(0xf0, 0x0008_6006);
    put(0x100, 0x1401_002d);
    put(0x140, 0x1a02_0001);
    put(0x1a0, 0x2001_001e);
    put(0x1a8, 0x0000_000f);
    put(0x200, 0x3001_000b);
    put(0x204, 0x0200_0001);
    put(0x300, 0x0001_002e);
    put(0x308, 0x0000_0001);
    fake.unlink();
    fake
}

/// Writes ones everywhere from `start` to `end`, and tells where in the device that came to.
fn written(fake: &FakeDevice, function: &impl PciFunction, start: u16, end: u16) -> Vec<u16> {
    let places = (start..end).step_by(4);
    let written = places.filter(|&at| {
        let before = fake.config_at::<4>(at.into());
        function.config_write(at, &[0xff; 4]);
        fake.config_at::<4>(at.into()) != before
    });
    written.collect()
}

#[test]
fn what_vfio_unlinked_reads_zero_where_the_host_says_where_it_is_and_is_written_nowhere() {
    for shown in [true, false] {
        let mut fake = with_what_vfio_unlinks();
        if !shown {
            fake.own_config = None;
        }
        let (fake, _, function) = function(fake);
        let config = |offset| read(&function, offset);
        let standard: Vec<_> = capabilities(&config).iter().map(|c| c.id).collect();
        assert_eq!(standard, [0x11, 0x01, 0x10]);
        let extended: Vec<_> = extended_capabilities(&config)
            .iter()
            .map(|c| (c.id, c.offset))
            .collect();
        assert_eq!(extended, [(0, 0x100), (1, 0x140), (0xb, 0x200)]);
        let (substates, mailbox) = if shown { (0, 0) } else { (0xf, 1) };
        assert_eq!((config(0x1a8), config(0x308)), (substates, mailbox));
        assert_eq!(config(0xf0) == 0, shown);
        // Errors are cleared by ones; the vendor's are the guest's to write.
        let expected = [0x144, 0x150].into_iter();
        let expected: Vec<u16> = expected.chain((0x204..0x220).step_by(4)).collect();
        assert_eq!(written(&fake, &*function, 0x100, 0x1000), expected);
    }
}

#[test]
fn what_is_of_no_capability_is_written_below_0x100_only() {
    let (fake, _, function) = function(nvme());
    write(&function, 0x194, 0);
    assert_eq!(u32::from_le_bytes(fake.config_at(0x194)), 0x1234_5678);
    assert_eq!(written(&fake, &*function, 0xe0, 0xe8), [0xe0, 0xe4]);
    // Behind AER, and behind the last.
    assert!(written(&fake, &*function, 0x16c, 0x180).is_empty());
    assert!(written(&fake, &*function, 0x1a0, 0x1000).is_empty());
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

/// The PCI Express capability's type and the doublewords that tell of a link.
fn type_and_link(function: &AssignedFunction) -> (u32, [u32; 4]) {
    let link = [0x8c, 0x90, 0xac, 0xb0].map(|at| read(function, at));
    (read(function, 0x80) >> 20 & 0xf, link)
}

#[test]
fn on_bus_0_every_endpoint_is_integrated_and_has_no_link() {
    for own in [0, 0b1001_u32] {
        let fake = nvme();
        fake.set_config(0x80, &(0x0002_0010 | own << 20).to_le_bytes());
        for at in [0x8c, 0x90, 0xac, 0xb0] {
            fake.set_config(at, &0x0043_0043_u32.to_le_bytes());
        }
        let (fake, function) = on_root_bus(fake);
        assert_eq!(type_and_link(&function), (0b1001, [0; 4]));
        // The host's stay as they are, and a reset changes nothing of it.
        assert!(written(&fake, &*function, 0x8c, 0x94).is_empty());
        assert!(written(&fake, &*function, 0xac, 0xb4).is_empty());
        function.reset();
        assert_eq!(type_and_link(&function), (0b1001, [0; 4]));
        // What is of no link is the device's, its function level reset too.
        assert_eq!(read(&function, 0x84) & 1 << 28, 1 << 28);
        let config = |offset| read(&function, offset);
        let standard: Vec<_> = capabilities(&config).iter().map(|c| c.id).collect();
        assert_eq!(standard, [0x11, 0x01, 0x10]);
    }
}

#[test]
fn on_bus_0_a_legacy_endpoint_is_a_conventional_function_and_no_capability_tells_of_a_link() {
    let fake = nvme();
    fake.set_config(0x80, &0x0012_0010_u32.to_le_bytes());
    // LTR and the physical layer's in place of what stands there.
    fake.set_config(0x180, &(0x0018_u32 | 1 << 16 | 0x300 << 20).to_le_bytes());
    fake.set_config(0x300, &(0x0026_u32 | 1 << 16).to_le_bytes());
    let (fake, function) = on_root_bus(fake);
    let config = |offset| read(&function, offset);
    let standard: Vec<_> = capabilities(&config).iter().map(|c| c.id).collect();
    assert_eq!(standard, [0x11, 0x01]);
    assert!((0x80..0xbc).step_by(4).all(|at| config(at) == 0));
    assert!(written(&fake, &*function, 0x80, 0xbc).is_empty());
    let extended: Vec<_> = extended_capabilities(&config)
        .iter()
        .map(|c| c.id)
        .collect();
    assert!(
        !extended.contains(&0x18) && !extended.contains(&0x26),
        "{extended:x?}"
    );
    // Behind a port it is what it is.
    let fake = nvme();
    fake.set_config(0x80, &0x0012_0010_u32.to_le_bytes());
    let (_, _, function) = super::function(fake);
    assert_eq!(read(&function, 0x80), 0x0012_0010);
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
        seen(include_str!("../../../testdata/nvme.txt")),
        (
            vec![0x11, 0x10, 0x01],
            vec![],
            vec![(0, long(false), 0x4000)]
        )
    );
    assert_eq!(
        seen(include_str!("../../../testdata/e1000e.txt")),
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
        seen(include_str!("../../../testdata/igb.txt")),
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
        seen(include_str!("../../../testdata/igbvf.txt")),
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
    gone.silent.store(true, Ordering::Relaxed);
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
fn atomic_ops_are_the_drivers_to_enable_in_the_device() {
    let fake = nvme();
    // Completers of 32 and 64 bits.
    fake.set_config(0xa4, &0x180_u32.to_le_bytes());
    let (fake, _, function) = function(fake);
    assert_eq!(read(&function, 0xa4), 0x180);
    write(&function, 0xa8, 0x40);
    assert_eq!(fake.config_at::<4>(0xa8), [0x40, 0, 0, 0]);
    assert_eq!(read(&function, 0xa8), 0x40);
    function.reset();
    assert_eq!(fake.config_at::<4>(0xa8), [0; 4]);
}
