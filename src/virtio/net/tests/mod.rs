//! The card on a real tap: the host's side is a packet socket on the interface. Skipped where the
//! kernel does not let us make one.

mod batches;
mod limits;
mod wire;

use super::*;
use crate::virtio::life::WaitingPacket;
use crate::virtio::spec::pci::common;
use crate::virtio::spec::status;
use crate::virtio::testing::{Driver, Ring, eventually};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use wire::{ETHERTYPE, Wire, frame};

const GUEST: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const HOST: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];

fn config(num_queues: u16) -> NetConfig {
    NetConfig {
        mac: Some(busway_host::Mac(GUEST)),
        num_queues,
        queue_size: 64,
        vhost: Choice::Off,
        ..NetConfig::default()
    }
}

/// A card, or a reason why there can be none here.
fn card(num_queues: u16) -> Option<Net> {
    match Net::new("net0", &config(num_queues), &[]) {
        Ok(net) => Some(net),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// Brings up a card's driver with its first pair of queues.
fn bring_up(driver: &mut Driver, features: u64) -> (Ring, Ring) {
    let queues = u16::from_le_bytes(driver.common(common::NUM_QUEUES));
    driver.enable_msix(queues + 1);
    driver.negotiate(features);
    let rings = (driver.queue(0, 64), driver.queue(1, 64));
    driver.ready();
    assert_eq!(driver.status() & status::DEVICE_NEEDS_RESET, 0);
    rings
}

/// Receives packets until one of ours comes, as the header and the frame; refills with buffers of
/// `size`.
fn receive(driver: &Driver, ring: &mut Ring, buffers: &[u64], size: u32) -> (u16, Vec<u8>) {
    loop {
        let (head, len) = ring.wait_used();
        let read =
            |head: u32, len: u32| driver.read(buffers[head as usize % buffers.len()], len as usize);
        let mut packet = read(head, len);
        let count = u16::from_le_bytes([packet[10], packet[11]]);
        let mut heads = vec![head];
        for _ in 1..count {
            // The others are there already.
            let (head, len) = ring.poll_used().expect("all of a packet at once");
            packet.extend(read(head, len));
            heads.push(head);
        }
        for head in heads {
            ring.submit(&[(buffers[head as usize % buffers.len()], size, true)]);
        }
        driver.notify(ring);
        if packet.get(24..26) == Some(&ETHERTYPE.to_be_bytes()) {
            return (count, packet[net::HEADER_SIZE..].to_vec());
        }
    }
}

fn provide(driver: &mut Driver, ring: &mut Ring, count: u64, size: u32) -> Vec<u64> {
    let buffers: Vec<u64> = (0..count).map(|_| driver.alloc(size.into())).collect();
    let chains: Vec<_> = buffers
        .iter()
        .map(|&buffer| vec![(buffer, size, true)])
        .collect();
    ring.submit_together(&chains);
    driver.notify(ring);
    buffers
}

#[test]
fn packets_go_both_ways() {
    let Some(net) = card(2) else { return };
    let wire = Wire::new(net.tap_name());
    let mut driver = Driver::new(net);
    assert_eq!(driver.bar_read::<6>(driver.device), GUEST);
    assert_eq!(driver.bar_read::<2>(driver.device + 6), [1, 0]);
    let (mut rx, mut tx) = bring_up(&mut driver, net::F_MRG_RXBUF);
    let buffers = provide(&mut driver, &mut rx, 64, 2048);
    for seed in 0..100 {
        let packet = frame(GUEST, HOST, 600, seed);
        wire.send(&packet);
        assert_eq!(receive(&driver, &mut rx, &buffers, 2048), (1, packet));
        let packet = frame(HOST, GUEST, 900, seed);
        let at = driver.alloc(0x1000) & 0xff_ffff;
        driver.write(at, &[0; net::HEADER_SIZE]);
        driver.write(at + 12, &packet);
        driver.run(
            &mut tx,
            &[(at, 12, false), (at + 12, packet.len() as u32, false)],
        );
        assert_eq!(wire.receive(), packet);
    }
    assert!(driver.route(0).wait() >= 1);
    assert_eq!(driver.route(1).wait(), 100);
    // The host's own stack may have sent some of its own meanwhile.
    match driver.function.sight().seen().totals {
        crate::virtio::Totals::Net(totals) => {
            assert!(totals.rx_frames >= 100 && totals.rx_bytes >= 61_400);
            assert_eq!((totals.tx_frames, totals.tx_bytes), (100, 91_400));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_large_packet_is_spread_over_merged_buffers() {
    let Some(net) = card(2) else { return };
    let wire = Wire::new(net.tap_name());
    wire.set_mtu(net.tap_name(), 9000);
    let mut driver = Driver::new(net);
    let features = net::F_MRG_RXBUF | spec::feature::EVENT_IDX;
    let (mut rx, _tx) = bring_up(&mut driver, features);
    let buffers = provide(&mut driver, &mut rx, 64, 1024);
    for seed in 0..20 {
        let packet = frame(GUEST, HOST, 8000, seed);
        wire.send(&packet);
        assert_eq!(receive(&driver, &mut rx, &buffers, 1024), (8, packet));
    }
}

#[test]
fn a_packet_waits_for_buffers_and_one_that_never_fits_is_dropped() {
    let Some(net) = card(2) else { return };
    let wire = Wire::new(net.tap_name());
    wire.set_mtu(net.tap_name(), 9000);
    let mut driver = Driver::new(net);
    let (mut rx, _tx) = bring_up(&mut driver, 0);
    wire.send(&frame(GUEST, HOST, 8000, 1));
    let small = frame(GUEST, HOST, 100, 2);
    wire.send(&small);
    std::thread::sleep(std::time::Duration::from_millis(20));
    let buffers = provide(&mut driver, &mut rx, 32, 2048);
    assert_eq!(receive(&driver, &mut rx, &buffers, 2048), (1, small));
}

#[test]
fn pairs_of_queues_are_used_as_the_driver_asks() {
    let Some(net) = card(4) else { return };
    let wire = Wire::new(net.tap_name());
    let mut driver = Driver::new(net);
    driver.enable_msix(6);
    driver.negotiate(net::F_MQ | net::F_CTRL_VQ | net::F_MRG_RXBUF);
    let mut rings: Vec<Ring> = (0..5).map(|index| driver.queue(index, 64)).collect();
    driver.ready();
    assert_eq!(driver.bar_read::<2>(driver.device + 8), [2, 0]);
    let mut control = rings.pop().unwrap();
    let at = driver.alloc(64);
    let mut command = |bytes: &[u8]| {
        driver.write(at, bytes);
        let len = bytes.len() as u32;
        assert_eq!(
            driver.run(&mut control, &[(at, len, false), (at + 32, 1, true)]),
            1
        );
        driver.read(at + 32, 1)[0]
    };
    assert_eq!(command(&[4, 0, 2, 0]), net::CTRL_OK);
    assert_eq!(command(&[4, 0, 2, 0]), net::CTRL_OK);
    assert_eq!(command(&[4, 0, 3, 0]), net::CTRL_ERR);
    assert_eq!(command(&[4, 0, 0, 0]), net::CTRL_ERR);
    assert_eq!(command(&[4, 0]), net::CTRL_ERR);
    assert_eq!(command(&[9, 9, 9]), net::CTRL_ERR);
    // The second pair transmits.
    let packet = frame(HOST, GUEST, 60, 3);
    driver.write(at, &[0; net::HEADER_SIZE]);
    driver.write(at + 12, &packet);
    let len = 12 + packet.len() as u32;
    driver.run(&mut rings[3], &[(at, len, false)]);
    assert_eq!(wire.receive(), packet);
    // Back to one pair: everything comes on the first.
    driver.write(at, &[4, 0, 1, 0]);
    driver.run(&mut control, &[(at, 4, false), (at + 32, 1, true)]);
    assert_eq!(driver.read(at + 32, 1), [net::CTRL_OK]);
    let mut first = rings.remove(0);
    let buffers = provide(&mut driver, &mut first, 64, 2048);
    for seed in 0..10 {
        let packet = frame(GUEST, HOST, 100, seed);
        wire.send(&packet);
        assert_eq!(receive(&driver, &mut first, &buffers, 2048).1, packet);
    }
}

#[test]
fn offloads_are_the_drivers_to_choose_among_what_it_negotiated() {
    let Some(net) = card(2) else { return };
    let mut driver = Driver::new(net);
    let features =
        net::F_CTRL_VQ | net::F_CTRL_GUEST_OFFLOADS | net::F_GUEST_CSUM | net::F_GUEST_TSO4;
    driver.negotiate(features);
    driver.queue(0, 64);
    driver.queue(1, 64);
    let mut control = driver.queue(2, 64);
    driver.ready();
    let at = driver.alloc(64);
    for (offloads, answer) in [
        (net::F_GUEST_CSUM, net::CTRL_OK),
        (net::F_GUEST_CSUM | net::F_GUEST_TSO4, net::CTRL_OK),
        (net::F_GUEST_CSUM | net::F_GUEST_TSO6, net::CTRL_ERR),
        (0, net::CTRL_OK),
    ] {
        driver.write(
            at,
            &[net::CTRL_GUEST_OFFLOADS, net::CTRL_GUEST_OFFLOADS_SET],
        );
        driver.write(at + 2, &offloads.to_le_bytes());
        driver.run(&mut control, &[(at, 10, false), (at + 32, 1, true)]);
        assert_eq!(driver.read(at + 32, 1), [answer], "{offloads:#x}");
    }
}

/// Counts what a driver could fill the log with.
struct Complaints;

static COMPLAINTS: AtomicUsize = AtomicUsize::new(0);

impl log::Log for Complaints {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) && record.target().contains("net::control") {
            COMPLAINTS.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

#[test]
fn offloads_that_the_kernel_would_refuse_are_refused_without_a_word() {
    let Some(net) = card(2) else { return };
    log::set_logger(&Complaints).unwrap();
    log::set_max_level(log::LevelFilter::Warn);
    let mut driver = Driver::new(net);
    let offloads = net::F_GUEST_CSUM | net::F_GUEST_TSO4 | net::F_GUEST_TSO6 | net::F_GUEST_ECN;
    driver.negotiate(net::F_CTRL_VQ | net::F_CTRL_GUEST_OFFLOADS | offloads);
    driver.queue(0, 64);
    driver.queue(1, 64);
    let mut control = driver.queue(2, 64);
    driver.ready();
    let at = driver.alloc(64);
    for offloads in [
        net::F_GUEST_TSO4,
        net::F_GUEST_TSO6 | net::F_GUEST_ECN,
        net::F_GUEST_CSUM | net::F_GUEST_ECN,
    ] {
        driver.write(
            at,
            &[net::CTRL_GUEST_OFFLOADS, net::CTRL_GUEST_OFFLOADS_SET],
        );
        driver.write(at + 2, &offloads.to_le_bytes());
        driver.run(&mut control, &[(at, 10, false), (at + 32, 1, true)]);
        assert_eq!(driver.read(at + 32, 1), [net::CTRL_ERR], "{offloads:#x}");
    }
    assert_eq!(COMPLAINTS.load(Ordering::Relaxed), 0);
}

#[test]
fn a_reset_in_mid_traffic_leaves_a_card_that_works() {
    let Some(net) = card(2) else { return };
    let wire = Wire::new(net.tap_name());
    let mut driver = Driver::new(net);
    for round in 0..10 {
        let (mut rx, _tx) = bring_up(&mut driver, net::F_MRG_RXBUF);
        let buffers = provide(&mut driver, &mut rx, 4, 2048);
        let packet = frame(GUEST, HOST, 200, round);
        wire.send(&packet);
        // What came before the reset may come first.
        loop {
            if receive(&driver, &mut rx, &buffers, 2048).1 == packet {
                break;
            }
        }
        for seed in 0..8 {
            wire.send(&frame(GUEST, HOST, 200, 100 + seed));
        }
        driver.set_common(common::DEVICE_STATUS, &[0]);
    }
}

fn state(driver: &Driver) -> NetState {
    match driver.function.state().unwrap().progress.device {
        DeviceState::Net(state) => state,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_pause_keeps_pairs_offloads_and_packets_and_a_reset_drops_them() {
    let Some(net) = card(4) else { return };
    let wire = Wire::new(net.tap_name());
    let mut driver = Driver::new(net);
    driver.enable_msix(6);
    driver.negotiate(net::F_MQ | net::F_CTRL_VQ | net::F_CTRL_GUEST_OFFLOADS | net::F_GUEST_CSUM);
    let mut rings: Vec<Ring> = (0..5).map(|index| driver.queue(index, 64)).collect();
    driver.ready();
    let mut control = rings.pop().unwrap();
    let at = driver.alloc(64);
    let mut command = |bytes: &[u8]| {
        driver.write(at, bytes);
        let len = bytes.len() as u32;
        driver.run(&mut control, &[(at, len, false), (at + 32, 1, true)]);
        assert_eq!(driver.read(at + 32, 1), [net::CTRL_OK]);
    };
    command(&[4, 0, 2, 0]);
    command(&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    command(&[4, 0, 1, 0]);
    // There are no buffers: the first packet waits with the card, the others in the tap.
    let packets: Vec<_> = (0..3).map(|seed| frame(GUEST, HOST, 90, seed)).collect();
    packets.iter().for_each(|packet| wire.send(packet));
    eventually("a packet waits", || {
        driver.function.pause();
        let waiting = !state(&driver).waiting.is_empty();
        driver.function.resume();
        waiting
    });
    driver.function.pause();
    let saved = state(&driver);
    assert_eq!((saved.pairs, saved.offloads), (1, 0));
    driver.function.resume();
    let buffers = provide(&mut driver, &mut rings[0], 64, 2048);
    for packet in packets {
        assert_eq!(receive(&driver, &mut rings[0], &buffers, 2048).1, packet);
    }
    driver.set_common(common::DEVICE_STATUS, &[0]);
    driver.function.pause();
    let dropped = driver.function.state().unwrap().progress.device;
    assert_eq!(dropped, DeviceState::None);
}

#[test]
fn a_card_takes_only_what_one_of_its_runs_could_have_left() {
    let Some(net) = card(4) else { return };
    let features = net::F_MQ | net::F_CTRL_VQ | net::F_GUEST_CSUM;
    let fine = NetState {
        pairs: 2,
        offloads: net::F_GUEST_CSUM,
        waiting: vec![WaitingPacket {
            pair: 1,
            bytes: vec![0; 100],
        }],
    };
    let takes = |change: fn(&mut NetState)| {
        let mut state = fine.clone();
        change(&mut state);
        net.takes(features, &DeviceState::Net(state))
    };
    assert!(takes(|_| ()) && net.takes(features, &DeviceState::None));
    assert!(!net.takes(features & !net::F_MQ, &DeviceState::Net(fine.clone())));
    for spoil in [
        (|state| state.pairs = 0) as fn(&mut NetState),
        |state| state.pairs = 3,
        |state| state.offloads = net::F_GUEST_TSO4,
        |state| state.waiting[0].pair = 2,
        |state| state.waiting[0].bytes.truncate(11),
        |state| state.waiting[0].bytes.resize(1 << 17, 0),
        |state| state.waiting = vec![state.waiting[0].clone(); 3],
    ] {
        assert!(!takes(spoil));
    }
}

#[test]
fn packets_of_a_card_whose_cable_is_pulled_are_lost_and_its_driver_sees_the_link() {
    let Some(net) = card(2) else { return };
    let wire = Wire::new(net.tap_name());
    let cable = net.cable();
    let mut driver = Driver::new(net);
    let (mut rx, mut tx) = bring_up(&mut driver, net::F_MRG_RXBUF);
    driver.set_common(common::CONFIG_MSIX_VECTOR, &3_u16.to_le_bytes());
    let buffers = provide(&mut driver, &mut rx, 64, 2048);
    let at = driver.alloc(0x1000);
    let mut send = |packet: &[u8]| {
        driver.write(at, &[0; net::HEADER_SIZE]);
        driver.write(at + 12, packet);
        driver.run(&mut tx, &[(at, 12 + packet.len() as u32, false)]);
    };
    cable.plug(false);
    assert_eq!(driver.bar_read::<2>(driver.device + 6), [0, 0]);
    assert_eq!(driver.route(3).wait(), 1);
    send(&frame(HOST, GUEST, 100, 1));
    wire.send(&frame(GUEST, HOST, 100, 1));
    std::thread::sleep(std::time::Duration::from_millis(50));
    cable.plug(true);
    assert_eq!(driver.bar_read::<2>(driver.device + 6), [1, 0]);
    let packet = frame(HOST, GUEST, 100, 2);
    send(&packet);
    assert_eq!(wire.receive(), packet);
    let packet = frame(GUEST, HOST, 100, 2);
    wire.send(&packet);
    assert_eq!(receive(&driver, &mut rx, &buffers, 2048).1, packet);
}

#[test]
fn features_without_what_they_stand_on_are_refused() {
    let Some(net) = card(2) else { return };
    assert!(net.accepts(net.features()));
    for features in [
        net::F_GUEST_TSO4,
        net::F_HOST_TSO6,
        net::F_GUEST_CSUM | net::F_GUEST_ECN,
        net::F_MQ,
    ] {
        assert!(!net.accepts(features), "{features:#x}");
    }
}

#[test]
fn a_receive_buffer_too_short_for_a_header_breaks_the_device_only() {
    let Some(net) = card(2) else { return };
    let wire = Wire::new(net.tap_name());
    let mut driver = Driver::new(net);
    let (mut rx, _tx) = bring_up(&mut driver, net::F_MRG_RXBUF);
    rx.submit(&[(0x1000, 4, true)]);
    driver.notify(&rx);
    wire.send(&frame(GUEST, HOST, 100, 0));
    eventually("needs reset", || {
        driver.status() & status::DEVICE_NEEDS_RESET != 0
    });
}

#[test]
fn a_card_that_is_to_be_the_kernels_says_why_it_cannot_be() {
    let Some(mut net) = card(2) else { return };
    let ram = crate::virtio::testing::ram();
    let memory = Arc::default();
    net.serve_in_kernel(Choice::Off, &ram, &memory).unwrap();
    assert_eq!(net.served_by(), ServedBy::Busway);
    let there = std::fs::File::open("/dev/vhost-net").is_ok();
    net.serve_in_kernel(Choice::Auto, &ram, &memory).unwrap();
    assert_eq!(net.served_by() == ServedBy::Kernel, there);
    let asked = net.serve_in_kernel(Choice::On, &ram, &memory);
    assert_eq!(asked.is_ok(), there);
    if let Err(error) = asked {
        let said = error.to_string();
        let expected = "net net0: vhost=on: cannot open /dev/vhost-net: ";
        assert!(said.starts_with(expected), "{said}");
        assert!(
            said.ends_with("or leave vhost= out, and Busway serves it"),
            "{said}"
        );
    }
}

#[test]
fn a_tap_in_use_is_named() {
    let Some(net) = card(2) else { return };
    let again = NetConfig {
        tap: Some(net.tap_name().to_owned()),
        ..config(2)
    };
    let error = Net::new("net1", &again, &[]).unwrap_err().to_string();
    let expected = format!(
        "net net1: tap {} is in use by another program",
        net.tap_name()
    );
    assert!(error.starts_with(&expected), "{error}");
}

#[test]
fn a_tap_that_somebody_else_has_opened_serves_by_its_descriptors_and_nothing_else_does() {
    let Some(opener) = card(4) else { return };
    let queue = |pair| OwnedFd::from(opener.tap.queue(pair).unwrap().try_clone().unwrap());
    let queues = [queue(0), queue(1)];
    let net = Net::new("net1", &config(4), &queues).unwrap();
    assert_eq!(net.tap_name(), opener.tap_name());
    // It works when whoever opened it has closed theirs.
    drop((opener, queues));
    let wire = Wire::new(net.tap_name());
    let mut driver = Driver::new(net);
    let (mut rx, _tx) = bring_up(&mut driver, net::F_MRG_RXBUF);
    rx.submit(&[(0x1000, 2048, true)]);
    driver.notify(&rx);
    wire.send(&frame(GUEST, HOST, 100, 0));
    rx.wait_used();

    let refuse = |files: &[OwnedFd]| Net::new("net2", &config(2), files).unwrap_err().to_string();
    let pipe = || OwnedFd::from(io::pipe().unwrap().0);
    let none = refuse(&[pipe()]);
    assert!(none.contains("is no tap's"), "{none}");
    let many = refuse(&[pipe(), pipe()]);
    assert!(
        many.contains("2 descriptors") && many.contains("needs 1"),
        "{many}"
    );
    let (Some(one), Some(other), Some(single)) = (card(4), card(4), card(2)) else {
        return;
    };
    let of = |net: &Net| OwnedFd::from(net.tap.queue(0).unwrap().try_clone().unwrap());
    let lacks = Net::new("net2", &config(4), &[of(&single), of(&single)]).unwrap_err();
    assert!(lacks.to_string().contains("IFF_MULTI_QUEUE"), "{lacks}");
    let two = Net::new("net2", &config(4), &[of(&one), of(&other)]).unwrap_err();
    assert!(two.to_string().contains("of two taps"), "{two}");
}

#[test]
fn a_tap_that_was_inherited_serves_by_the_numbers_of_its_descriptors_which_are_taken_over() {
    let Some(opener) = card(4) else { return };
    // As a parent does: open on exec, and known by number alone.
    let inherit = |file: &dyn AsRawFd| {
        // SAFETY: F_DUPFD makes a new descriptor, and touches no memory.
        let new = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD, 3) };
        u32::try_from(new).unwrap()
    };
    let is_open = |number| std::path::Path::new(&format!("/proc/self/fd/{number}")).exists();
    let handed = |num_queues, fd: &[u32]| NetConfig {
        fd: fd.to_vec(),
        ..config(num_queues)
    };
    let pair = |pair| inherit(&**opener.tap.queue(pair).unwrap());
    let fds = [pair(0), pair(1)];
    let net = Net::new("net1", &handed(4, &fds), &[]).unwrap();
    assert_eq!(net.tap_name(), opener.tap_name());
    let name = net.tap_name().to_owned();
    drop(opener);
    // Another test's interface can have the name next, and not the number.
    let index = || std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok();
    let first = index();
    assert!(first.is_some(), "it is held");
    drop(net);
    // With the last descriptor goes the interface: nothing was left open.
    eventually("it is gone", || index() != first);

    let refuse = |num_queues, fds: &[u32]| {
        let error = Net::new("net2", &handed(num_queues, fds), &[]).unwrap_err();
        error.to_string()
    };
    let pipe = io::pipe().unwrap().0;
    let (closed, own) = (1 << 20, u32::try_from(pipe.as_raw_fd()).unwrap());
    for number in [closed, own, 1] {
        let why = refuse(2, &[number]);
        assert!(
            why.starts_with(&format!("net net2: fd={number} ")) && why.contains("inherit"),
            "{why}"
        );
    }
    assert!(is_open(own), "what is this process's own is left alone");
    let why = refuse(2, &[inherit(&pipe)]);
    assert!(
        why.contains("is no tap's") && why.contains("pipe:"),
        "{why}"
    );
    let why = refuse(4, &[7]);
    assert!(why.contains("num_queues=2"), "{why}");
    let both = NetConfig {
        tap: Some("vmtap0".into()),
        ..handed(2, &[7])
    };
    let why = Net::new("net2", &both, &[]).unwrap_err().to_string();
    assert!(why.contains("leave one out"), "{why}");
}

#[test]
fn impossible_configurations_are_refused_with_what_would_be_possible() {
    let refuse = |change: fn(&mut NetConfig)| {
        let mut config = config(2);
        change(&mut config);
        Net::new("net0", &config, &[]).unwrap_err().to_string()
    };
    let odd = refuse(|config| config.num_queues = 3);
    assert!(odd.contains("must be even, from 2 to 128"), "{odd}");
    let size = refuse(|config| config.queue_size = 100);
    assert!(size.contains("a power of two from 32 to 4096"), "{size}");
}

#[test]
fn no_chain_on_any_queue_panics_and_the_card_works_after_a_reset() {
    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestRunner};
    let chain = proptest::collection::vec(
        (
            0_u64..crate::virtio::testing::RAM_SIZE,
            0_u32..4096,
            any::<bool>(),
        ),
        1..6,
    );
    let chains = proptest::collection::vec((0_usize..3, chain), 1..40);
    let mut runner = TestRunner::new(Config::with_cases(24));
    runner
        .run(&chains, |chains| {
            let Some(net) = card(2) else { return Ok(()) };
            let wire = Wire::new(net.tap_name());
            let mut driver = Driver::new(net);
            driver.negotiate(!spec::feature::EVENT_IDX);
            let mut rings: Vec<Ring> = (0..3).map(|index| driver.queue(index, 64)).collect();
            driver.ready();
            for (queue, chain) in chains {
                rings[queue].submit(&chain);
                driver.notify(&rings[queue]);
                wire.send(&frame(GUEST, HOST, 300, 0));
            }
            let (mut rx, _tx) = bring_up(&mut driver, net::F_MRG_RXBUF);
            let buffers = provide(&mut driver, &mut rx, 16, 2048);
            let packet = frame(GUEST, HOST, 60, 77);
            wire.send(&packet);
            prop_assert_eq!(receive(&driver, &mut rx, &buffers, 2048), (1, packet));
            Ok(())
        })
        .unwrap();
}
