use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::bar::BarIndex;
use crate::capability::{ConfigRead, capabilities};
use crate::fake::{FakeRoutes, MEMORY_32, PREFETCHABLE_64};
use crate::link::LinkSpeed;

impl ConfigRead for RootPort {
    fn read_dword(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }
}

fn port() -> RootPort {
    let link = Link {
        speed: LinkSpeed::Gt16,
        width: 4,
    };
    RootPort::new(3, link, Arc::new(FakeRoutes::default()))
}

fn write(port: &RootPort, offset: u16, value: u32) {
    port.config_write(offset, &value.to_le_bytes());
}

fn region(kind: BarKind, address: u64, size: u64) -> BarRegion {
    BarRegion {
        index: BarIndex::Bar(0),
        kind,
        address,
        size,
    }
}

#[test]
fn firmware_is_told_what_to_reserve_by_the_capability_that_it_knows() {
    let routes = Arc::new(FakeRoutes::default());
    let reserve = Reserve {
        memory32: 32 << 20,
        memory64: 4 << 30,
    };
    let port = RootPort::new(3, Link::default(), routes).reserving(reserve);
    assert!(
        capabilities(&port)
            .iter()
            .all(|capability| capability.id != spec::CAP_VENDOR)
    );
    let port = port.without_io().hinting();
    let found = capabilities(&port);
    let vendor = found
        .iter()
        .find(|capability| capability.id == spec::CAP_VENDOR);
    let at = vendor.expect("the capability").offset;
    let mut bytes = [0; 32];
    for (dword, offset) in bytes.chunks_mut(4).zip((at..).step_by(4)) {
        port.config_read(offset, dword);
    }
    let number = |from: usize, to: usize| {
        let mut value = [0; 8];
        value[..to - from].copy_from_slice(&bytes[from..to]);
        u64::from_le_bytes(value)
    };
    assert_eq!(bytes[2..4], [32, 1]);
    assert_eq!(number(4, 8), 0xffff_ffff, "buses are firmware's choice");
    assert_eq!((number(8, 16), number(16, 20)), (0, 32 << 20));
    assert_eq!((number(20, 24), number(24, 32)), (0xffff_ffff, 4 << 30));
}

#[test]
fn the_link_is_up_at_the_speed_and_width_it_was_given() {
    let port = port();
    let express = capabilities(&port)[0];
    assert_eq!(express.id, spec::CAP_PCI_EXPRESS);
    let read = |register| port.read_dword(express.offset + register);
    assert_eq!(read(0) >> 16, 0x0142, "version 2, root port, slot");
    assert_eq!(read(spec::EXP_LINK_CAPABILITIES) & 0x3ff, 0x044);
    assert_eq!(read(spec::EXP_LINK_CONTROL) >> 16, 0x3044);
    assert_eq!(read(spec::EXP_LINK_CAPABILITIES_2), 0b11110);
    assert_eq!(read(spec::EXP_SLOT_CAPABILITIES) >> 19, 3);
    let capabilities = read(spec::EXP_LINK_CAPABILITIES);
    assert_eq!(Link::from_capabilities(capabilities).width, 4);
}

#[test]
fn at_reset_nothing_is_let_through_even_with_decoding_on() {
    let port = port();
    let all = [
        region(MEMORY_32, 0, 0x1000),
        region(BarKind::Io, 0, 0x20),
        region(PREFETCHABLE_64, 1 << 36, 1 << 30),
    ];
    write(&port, spec::COMMAND, 7);
    assert!(all.iter().all(|region| !port.forwards(region)));
}

#[test]
fn a_region_is_let_through_where_it_lies_wholly_in_a_window() {
    let port = port();
    write(&port, spec::COMMAND, 3);
    write(&port, spec::IO_BASE, 0xd0c0);
    write(&port, spec::MEMORY_BASE, 0xc010_c000);
    write(&port, spec::PREFETCHABLE_BASE, 0xfff0_0000);
    write(&port, spec::PREFETCHABLE_BASE_UPPER, 0x10);
    write(&port, spec::PREFETCHABLE_LIMIT_UPPER, 0xffff_ffff);
    for (kind, address, size, through) in [
        (BarKind::Io, 0xc000, 0x20, true),
        (BarKind::Io, 0xdfe0, 0x20, true),
        (BarKind::Io, 0xe000, 0x20, false),
        (MEMORY_32, 0xc000_0000, 1 << 21, true),
        (MEMORY_32, 0xc000_0000, 1 << 22, false),
        (MEMORY_32, 0xbfff_f000, 0x1000, false),
        (PREFETCHABLE_64, 0x10_0000_0000, 1 << 36, true),
        (PREFETCHABLE_64, 1 << 63, 1 << 63, true),
        (PREFETCHABLE_64, 0xf_0000_0000, 1 << 30, false),
    ] {
        let region = region(kind, address, size);
        assert_eq!(port.forwards(&region), through, "{region:x?}");
    }
    write(&port, spec::COMMAND, 1);
    assert!(!port.forwards(&region(MEMORY_32, 0xc000_0000, 0x1000)));
    assert!(port.forwards(&region(BarKind::Io, 0xc000, 4)));
}

#[test]
fn its_interrupt_is_routed_when_the_guest_enables_msi() {
    let port = port();
    let msi = capabilities(&port)[1];
    assert_eq!(msi.id, spec::CAP_MSI);
    write(&port, msi.offset, 1 << 16);
    assert_eq!(port.state().msi.connected(), 1);
    assert_eq!(port.read_dword(msi.offset) >> 16 & 1, 1);
    port.reset();
    assert_eq!(port.state().msi.connected(), 0);
    assert_eq!(port.read_dword(msi.offset) >> 16 & 1, 0);
}

#[derive(Debug, Default)]
struct Heard(Mutex<Vec<(u16, bool)>>, Mutex<Vec<u16>>);

impl SlotListener for Heard {
    fn power_switched(&self, slot: u16, on: bool) {
        self.0.lock().unwrap().push((slot, on));
    }

    fn steadied(&self, slot: u16) {
        self.1.lock().unwrap().push(slot);
    }
}

/// A pin, and whether it is held up.
#[derive(Debug, Default)]
struct Pin(Mutex<bool>);

impl InterruptLevel for Pin {
    fn set(&self, asserted: bool) {
        *self.0.lock().unwrap() = asserted;
    }
}

#[test]
fn without_messages_its_pin_is_up_for_as_long_as_the_guest_has_something_to_hear_of() {
    let (routes, pin) = (Arc::new(FakeRoutes::default()), Arc::new(Pin::default()));
    let port = RootPort::new(16, Link::default(), routes.clone())
        .hot_plug(Arc::new(Heard::default()))
        .wired(pin.clone());
    let up = || *pin.0.lock().unwrap();
    let pending = |port: &RootPort| port.read_dword(spec::COMMAND) >> 19 & 1 == 1;
    let [express, msi] = capabilities(&port)[..] else {
        panic!("two capabilities");
    };
    assert_eq!(port.read_dword(spec::INTERRUPT_LINE) >> 8 & 0xff, 4);
    let slot = express.offset + spec::EXP_SLOT_CONTROL;
    let clear_all = 0xffff << 16;
    port.set_present(true);
    assert!(!up(), "nobody asked for it");
    write(&port, slot, 0x1729);
    assert!(up() && pending(&port), "what came before it was asked for");
    // The guest can hold it back, and it is there all the same.
    write(&port, spec::COMMAND, spec::COMMAND_INTX_DISABLE.into());
    assert!(!up() && pending(&port));
    write(&port, spec::COMMAND, 0);
    assert!(up());
    write(&port, slot, 0x1729 | clear_all);
    assert!(!up() && !pending(&port));
    assert!(routes.arrived().is_empty());
    // A message takes its place.
    assert!(port.press_button() && up());
    write(&port, msi.offset + 4, 0xfee0_0000);
    write(&port, msi.offset, 1 << 16);
    assert!(!up() && !pending(&port));
    write(&port, slot, 0x1729 | clear_all);
    assert!(port.press_button() && !up());
    assert_eq!(routes.arrived().len(), 1);
    write(&port, msi.offset, 0);
    assert!(up());
    port.reset();
    assert!(!up() && !pending(&port));
}

#[test]
fn a_listener_hears_when_the_guest_is_done_with_a_slot() {
    let (routes, heard) = (Arc::new(FakeRoutes::default()), Arc::new(Heard::default()));
    let port = RootPort::new(16, Link::default(), routes).hot_plug(heard.clone());
    port.prepare(true);
    let slot = capabilities(&port)[0].offset + spec::EXP_SLOT_CONTROL;
    // On; blinks; without power; off; blinks with power; on.
    for (control, steady) in [
        (0x1129, true),
        (0x1229, false),
        (0x1629, false),
        (0x1729, true),
        (0x1229, false),
        (0x1129, true),
        // Power goes first, where the guest does not blink.
        (0x1529, false),
        (0x1729, true),
    ] {
        write(&port, slot, control);
        assert_eq!(port.steady(), steady, "{control:#x}");
    }
    assert_eq!(*heard.1.lock().unwrap(), [16, 16, 16]);
}

#[test]
fn a_hot_plug_port_asks_by_its_msi_and_hears_when_power_goes() {
    let (routes, heard) = (Arc::new(FakeRoutes::default()), Arc::new(Heard::default()));
    let port = RootPort::new(16, Link::default(), routes.clone()).hot_plug(heard.clone());
    let [express, msi] = capabilities(&port)[..] else {
        panic!("two capabilities");
    };
    let read = |register| port.read_dword(express.offset + register);
    let link_up =
        |port: &RootPort| port.read_dword(express.offset + spec::EXP_LINK_CONTROL) >> 29 & 1 == 1;
    assert!(!link_up(&port) && port.in_reset() && !port.press_button());
    port.prepare(true);
    assert!(link_up(&port) && !port.in_reset() && port.powered());
    assert_eq!(read(spec::EXP_SLOT_CAPABILITIES), 16 << 19 | 0x4_0073);
    assert_eq!(read(spec::EXP_SLOT_CONTROL), 0x0040_0100);
    assert!(!port.press_button(), "nobody listens");

    write(&port, msi.offset + 4, 0xfee0_0000);
    write(&port, msi.offset, 1 << 16);
    write(&port, express.offset + spec::EXP_SLOT_CONTROL, 0x1129);
    assert!(port.press_button());
    assert_eq!(routes.arrived().len(), 1);
    write(&port, express.offset + spec::EXP_SLOT_CONTROL, 0x0001_1729);
    assert_eq!(*heard.0.lock().unwrap(), [(16, false)]);
    assert!(!link_up(&port) && port.in_reset());
    port.set_present(false);
    port.reset();
    assert!(!port.powered());
    let listened = heard.0.lock().unwrap().len();
    assert_eq!(listened, 1, "a reset is no doing of the guest's");
}

#[test]
fn a_port_without_io_lets_no_port_through() {
    let port = port().without_io();
    write(&port, spec::COMMAND, 3);
    write(&port, spec::IO_BASE, 0xf000);
    assert_eq!(port.read_dword(spec::IO_BASE) & 0xffff, 0);
    assert!(!port.forwards(&region(BarKind::Io, 0xc000, 4)));
    assert!(!port.forwards(&region(BarKind::Io, 0, 4)));
}

#[test]
fn atomic_ops_are_completed_for_as_long_as_the_device_is_there() {
    let completed = |port: &RootPort| {
        let express = capabilities(port)[0].offset;
        port.read_dword(express + spec::EXP_DEVICE_CAPABILITIES_2)
    };
    let heard = Arc::new(Heard::default());
    assert_eq!(completed(&port().hot_plug(heard.clone())), 0);
    // Whatever else the register of the host's port says is not this one's.
    let atomics = AtomicOps::from_capabilities(0xffff_fdff);
    let port = port().completing(atomics).hot_plug(heard);
    port.prepare(true);
    assert_eq!(completed(&port), 0b011 << 7);
    write(
        &port,
        capabilities(&port)[0].offset + spec::EXP_DEVICE_CAPABILITIES_2,
        0,
    );
    port.reset();
    assert_eq!(completed(&port), 0b011 << 7);
    port.set_present(false);
    assert_eq!(completed(&port), 0);
}

proptest! {
    #[test]
    fn no_write_changes_who_it_is_or_panics(
        writes in vec((0..1024u16, any::<u32>(), 0..5usize), 0..80),
        address: u64,
        log2 in 0..64u32,
    ) {
        let port = port();
        let list = capabilities(&port);
        for (dword, value, width) in writes {
            port.config_write(dword % 64 * 4, &value.to_le_bytes()[..width]);
            port.config_write(dword * 4, &value.to_le_bytes()[..width]);
            port.forwards(&region(PREFETCHABLE_64, address, 1 << log2));
            prop_assert_eq!(port.read_dword(0), 0x000c_1b36);
            prop_assert_eq!(capabilities(&port), list.clone());
        }
    }
}
