//! What a card lets pass: packets as long as its MTU, from its own address, unfinished as was agreed on.

use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use super::*;
use crate::virtio::counts::NetTotals;

fn with(change: impl FnOnce(&mut NetConfig)) -> Option<Net> {
    let mut config = config(2);
    change(&mut config);
    match Net::new("net0", &config, &[]) {
        Ok(net) => Some(net),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

fn totals(driver: &Driver) -> NetTotals {
    match driver.function.sight().seen().totals {
        crate::virtio::Totals::Net(totals) => totals,
        other => panic!("{other:?}"),
    }
}

/// Sends a frame behind `header`.
fn send(driver: &mut Driver, tx: &mut Ring, header: [u8; net::HEADER_SIZE], packet: &[u8]) {
    let at = driver.alloc((net::HEADER_SIZE + packet.len()) as u64);
    driver.write(at, &header);
    driver.write(at + net::HEADER_SIZE as u64, packet);
    let length = (net::HEADER_SIZE + packet.len()) as u32;
    driver.run(tx, &[(at, length, false)]);
}

const WHOLE: [u8; net::HEADER_SIZE] = [0; net::HEADER_SIZE];

#[test]
fn an_mtu_is_the_taps_and_the_drivers_and_nothing_longer_passes() {
    let Some(net) = with(|net| net.mtu = Some(1400)) else {
        return;
    };
    let tap = net.tap_name().to_owned();
    let wire = Wire::new(&tap);
    let mtu = std::fs::read_to_string(format!("/sys/class/net/{tap}/mtu")).unwrap();
    assert_eq!(mtu.trim(), "1400");
    let mut driver = Driver::new(net);
    assert!(driver.offered() & net::F_MTU != 0);
    let offset = driver.device + 10;
    assert_eq!(u16::from_le_bytes(driver.bar_read::<2>(offset)), 1400);
    let (mut rx, mut tx) = bring_up(&mut driver, net::F_MRG_RXBUF | net::F_MTU);
    let buffers = provide(&mut driver, &mut rx, 16, 2048);
    // Payloads: 14 bytes are the header.
    let longest = frame(HOST, GUEST, 1400, 1);
    send(&mut driver, &mut tx, WHOLE, &frame(HOST, GUEST, 1401, 2));
    send(&mut driver, &mut tx, WHOLE, &longest);
    assert_eq!(wire.receive(), longest);
    assert_eq!(totals(&driver).tx_dropped, 1);
    // Somebody changes the tap's.
    wire.set_mtu(&tap, 2000);
    wire.send(&frame(GUEST, HOST, 1401, 3));
    let longest = frame(GUEST, HOST, 1400, 4);
    wire.send(&longest);
    assert_eq!(receive(&driver, &mut rx, &buffers, 2048), (1, longest));
    assert_eq!(totals(&driver).rx_dropped, 1);
}

#[test]
fn a_driver_that_knows_of_no_mtu_is_held_to_none_and_a_card_without_one_offers_none() {
    let Some(net) = with(|net| net.mtu = Some(1400)) else {
        return;
    };
    let wire = Wire::new(net.tap_name());
    let mut driver = Driver::new(net);
    let (_rx, mut tx) = bring_up(&mut driver, 0);
    let packet = frame(HOST, GUEST, 1450, 1);
    send(&mut driver, &mut tx, WHOLE, &packet);
    assert_eq!(wire.receive(), packet);
    let Some(net) = card(2) else { return };
    assert_eq!(net.features() & net::F_MTU, 0);
}

#[test]
fn an_mtu_that_a_tap_does_not_take_is_refused_with_what_it_takes() {
    let Some(_) = card(2) else { return };
    let mut config = config(2);
    config.mtu = Some(u16::MAX);
    let why = Net::new("net0", &config, &[]).unwrap_err().to_string();
    assert!(
        why.contains("does not take mtu=65535") && why.contains("68 to 65521"),
        "{why}"
    );
    let forbidden = TapError::MtuNotPermitted {
        name: "vmtap0".into(),
        now: 1500,
        mtu: 9000,
    };
    let why = forbidden.to_string();
    assert!(
        why.contains("has an MTU of 1500")
            && why.contains("`ip link set dev vmtap0 mtu 9000`")
            && why.contains("leave mtu= out"),
        "{why}"
    );
}

#[test]
fn a_tap_that_has_its_mtu_already_needs_no_right_for_it() {
    let Some(net) = with(|net| net.mtu = Some(1400)) else {
        return;
    };
    let tap = Arc::clone(&net.tap);
    let unprivileged = std::thread::spawn(move || {
        let none = CapabilitySet::empty();
        let none = CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        };
        set_capabilities(None, none).unwrap();
        (tap.set_mtu(1400), tap.set_mtu(1300))
    });
    let (same, other) = unprivileged.join().unwrap();
    same.unwrap();
    let refused = matches!(other, Err(TapError::MtuNotPermitted { now: 1400, .. }));
    assert!(refused, "{other:?}");
}

#[test]
fn what_is_from_another_address_is_dropped_and_counted_where_that_is_looked_at() {
    let Some(net) = with(|net| net.spoofchk = true) else {
        return;
    };
    let wire = Wire::new(net.tap_name());
    let mut driver = Driver::new(net);
    let (_rx, mut tx) = bring_up(&mut driver, 0);
    let ours = frame(HOST, GUEST, 100, 1);
    send(&mut driver, &mut tx, WHOLE, &frame(HOST, HOST, 100, 2));
    send(&mut driver, &mut tx, WHOLE, &ours);
    assert_eq!(wire.receive(), ours);
    let totals = totals(&driver);
    assert_eq!((totals.tx_spoofed, totals.tx_dropped), (1, 1));
    assert_eq!(totals.tx_frames, 1);
}

#[test]
fn a_card_that_looks_at_addresses_is_not_the_kernels() {
    let Some(mut net) = with(|net| net.spoofchk = true) else {
        return;
    };
    let ram = crate::virtio::testing::ram();
    net.serve_in_kernel(Choice::Auto, &ram, &Arc::default())
        .unwrap();
    assert_eq!(net.served_by(), ServedBy::Busway);
}

#[test]
fn a_guest_may_use_any_address_where_nobody_looks() {
    let Some(net) = card(2) else { return };
    let wire = Wire::new(net.tap_name());
    let mut driver = Driver::new(net);
    let (_rx, mut tx) = bring_up(&mut driver, 0);
    let packet = frame(GUEST, HOST, 100, 2);
    send(&mut driver, &mut tx, WHOLE, &packet);
    assert_eq!(wire.receive(), packet);
}

/// A datagram of `length` bytes over IPv4, to be cut into segments of 1000 bytes, and virtio's header for that.
fn datagram(length: u16) -> ([u8; net::HEADER_SIZE], Vec<u8>) {
    let mut frame = HOST.to_vec();
    frame.extend(GUEST);
    frame.extend([8, 0]);
    // RFC 791 §3.1: version, length, lifetime, UDP, and no checksum, which is not looked at here.
    frame.extend([0x45, 0]);
    frame.extend((28 + length).to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    // RFC 768
    frame.extend([0x12, 0x34, 0x56, 0x78]);
    frame.extend((8 + length).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend((0..length).map(|i| i as u8));
    let mut header = [0; net::HEADER_SIZE];
    header[..2].copy_from_slice(&[net::HDR_F_NEEDS_CSUM, net::GSO_UDP_L4]);
    for (at, field) in [(2, 42_u16), (4, 1000), (6, 34), (8, 6)] {
        header[at..at + 2].copy_from_slice(&field.to_le_bytes());
    }
    (header, frame)
}

#[test]
fn udp_to_be_cut_passes_where_the_tap_takes_it_and_the_driver_has_agreed_on_it() {
    let Some(net) = card(2) else { return };
    let (there, offered) = (net.tap.has_uso(), net.features());
    assert_eq!(offered & features::USO == features::USO, there);
    assert_eq!(offered & features::USO != 0, there);
    if !there {
        eprintln!("skipped: this kernel's taps have no segments of UDP");
        return;
    }
    let wire = Wire::of(net.tap_name(), 0x0800);
    let mut driver = Driver::new(net);
    let (_rx, mut tx) = bring_up(&mut driver, net::F_CSUM | net::F_HOST_USO);
    let (header, packet) = datagram(3500);
    send(&mut driver, &mut tx, header, &packet);
    let came = wire.receive();
    // The kernel has it whole, or in its segments.
    assert!(came.len() == packet.len() || came.len() == 14 + 28 + 1000);
    assert_eq!(totals(&driver).tx_frames, 1);
    for spoiled in [(0, 0_u8), (4, 0), (8, 16)] {
        let mut header = header;
        header[spoiled.0] = spoiled.1;
        header[5] = if spoiled.0 == 4 { 0 } else { header[5] };
        send(&mut driver, &mut tx, header, &packet);
    }
    assert_eq!(totals(&driver).tx_dropped, 3);
    let (_rx, mut tx) = bring_up(&mut driver, net::F_CSUM);
    send(&mut driver, &mut tx, header, &packet);
    assert_eq!(totals(&driver).tx_dropped, 4, "it was not agreed on");
}

#[test]
fn a_tap_hands_over_what_the_driver_has_chosen_and_no_more_from_then_on() {
    let Some(net) = card(2) else { return };
    if !net.tap.has_uso() {
        eprintln!("skipped: this kernel's taps have no segments of UDP");
        return;
    }
    let tap = Arc::clone(&net.tap);
    let mut driver = Driver::new(net);
    let all = net::F_GUEST_CSUM | net::F_GUEST_TSO4 | features::GUEST_USO;
    driver.negotiate(net::F_CTRL_VQ | net::F_CTRL_GUEST_OFFLOADS | all);
    driver.queue(0, 64);
    driver.queue(1, 64);
    let mut control = driver.queue(2, 64);
    driver.ready();
    assert_eq!(tap.offloads(), all);
    let at = driver.alloc(64);
    let mut set = |offloads: u64| {
        driver.write(
            at,
            &[net::CTRL_GUEST_OFFLOADS, net::CTRL_GUEST_OFFLOADS_SET],
        );
        driver.write(at + 2, &offloads.to_le_bytes());
        driver.run(&mut control, &[(at, 10, false), (at + 32, 1, true)]);
        driver.read(at + 32, 1)[0]
    };
    let csum = net::F_GUEST_CSUM;
    for (offloads, answer) in [
        (csum | features::GUEST_USO, net::CTRL_OK),
        (csum | net::F_GUEST_USO4, net::CTRL_OK),
        (csum, net::CTRL_OK),
        (features::GUEST_USO, net::CTRL_ERR),
        (csum | net::F_HOST_USO, net::CTRL_ERR),
    ] {
        let before = tap.offloads();
        assert_eq!(set(offloads), answer, "{offloads:#x}");
        let now = if answer == net::CTRL_OK {
            offloads
        } else {
            before
        };
        assert_eq!(tap.offloads(), now);
    }
}
