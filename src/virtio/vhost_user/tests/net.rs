//! NICs of another process's: pairs of queues, the control queue, the link, an MTU, and who listens.

use busway_host::Mac;

use super::*;
use crate::virtio::spec::{feature, net as spec_net};

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

/// A NIC with two pairs of queues, and what else `change` makes of it.
pub(super) fn kind(change: impl FnOnce(&mut NetConfig)) -> Kind {
    let mut config = NetConfig {
        num_queues: 4,
        queue_size: 64,
        ..NetConfig::default()
    };
    change(&mut config);
    Kind::net(&config, Mac(MAC))
}

fn nic(fake: &Fake, change: impl FnOnce(&mut NetConfig)) -> Result<Guest, VhostUserError> {
    let at = (&*fake.socket(), VhostMode::Client);
    opened(kind(change), "net net0", at, Duration::ZERO, true).map(Guest::of)
}

fn why_not(fake: &Fake, change: impl FnOnce(&mut NetConfig)) -> String {
    let why = nic(fake, change).map(drop).unwrap_err().to_string();
    assert!(why.starts_with("net net0: "), "{why}");
    why
}

/// The queues of a driver that knows of two pairs, and its control queue.
fn begin(guest: &mut Guest) -> ([Ring; 4], Ring) {
    let features = guest.driver.negotiate(u64::MAX);
    assert_ne!(features & spec_net::F_MQ, 0);
    guest.driver.enable_msix(5);
    let rings = [0, 1, 2, 3].map(|index| guest.driver.queue(index, 16));
    let control = guest.driver.queue(4, 16);
    guest.driver.ready();
    (rings, control)
}

/// Has `pairs` pairs of queues used: the answer, and how long it took.
fn use_pairs(guest: &mut Guest, control: &mut Ring, pairs: u16) -> (u8, Duration) {
    let at = guest.driver.alloc(64);
    let [low, high] = pairs.to_le_bytes();
    let command = [
        spec_net::CTRL_MQ,
        spec_net::CTRL_MQ_VQ_PAIRS_SET,
        low,
        high,
        9,
    ];
    guest.driver.write(at, &command);
    let start = Instant::now();
    guest
        .driver
        .run(control, &[(at, 4, false), (at + 4, 1, true)]);
    (guest.driver.read(at + 4, 1)[0], start.elapsed())
}

/// The state of the link, as its driver reads it.
fn status(guest: &Guest) -> u16 {
    let at = guest.driver.device + spec_net::CONFIG_STATUS as u64;
    u16::from_le_bytes(guest.driver.bar_read(at))
}

#[test]
fn a_nic_is_offered_what_its_back_end_does_with_packets_and_the_rest_is_its_own() {
    // What DPDK's vhost offers: segments with ECN, and none without.
    let lame = spec_net::F_HOST_ECN | spec_net::F_MRG_RXBUF | 1 << 30;
    let fake = Fake::start().with(|script| script.features = feature::VERSION_1 | lame);
    let own = spec_net::F_MAC | spec_net::F_STATUS;
    let mut guest = nic(&fake, |net| net.num_queues = 2).unwrap();
    let packets = spec_net::F_MRG_RXBUF;
    assert_eq!(
        guest.driver.offered(),
        feature::VERSION_1 | own | packets,
        "no control queue for one pair, and no ECN without segments"
    );
    let config: [u8; 10] = guest.driver.bar_read(guest.driver.device);
    assert_eq!(config, [&MAC[..], &[1, 0, 1, 0]].concat()[..]);
    let [mut receive, mut transmit] = guest.begin();
    guest.ask(&mut receive);
    guest.ask(&mut transmit);
    let agreed = fake.script().agreed.clone();
    let expected = feature::VERSION_1 | packets | 1 << 30;
    assert!(agreed.iter().all(|set| *set == expected), "{agreed:x?}");

    let fake = Fake::start();
    let several = nic(&fake, |net| net.mtu = Some(9000)).unwrap().driver;
    let more = spec_net::F_MQ | spec_net::F_CTRL_VQ | spec_net::F_MTU | own;
    assert_eq!(several.offered() & more, more);
    assert_eq!(several.offered() & spec_net::F_CTRL_GUEST_OFFLOADS, 0);
    let config: [u8; 12] = several.bar_read(several.device);
    assert_eq!(config[8..], [2, 0, 0x28, 0x23]);
}

#[test]
fn pairs_of_queues_are_begun_and_ended_at_the_drivers_command_also_by_the_next_back_end() {
    let mut fake = Fake::start();
    let mut guest = nic(&fake, |_| {}).unwrap();
    let (mut rings, mut control) = begin(&mut guest);
    guest.ask(&mut rings[0]);
    guest.ask(&mut rings[1]);
    assert_eq!(fake.script().enabled, [(0, 1), (1, 1)]);
    let buffer = guest.driver.alloc(64);
    rings[2].submit(&[(buffer, 8, true)]);
    guest.driver.notify(&rings[2]);
    for pairs in [0, 3, u16::MAX] {
        assert_eq!(
            use_pairs(&mut guest, &mut control, pairs).0,
            spec_net::CTRL_ERR
        );
    }
    assert_eq!(rings[2].poll_used(), None);
    assert_eq!(use_pairs(&mut guest, &mut control, 2).0, spec_net::CTRL_OK);
    assert_eq!(rings[2].wait_used(), (0, 8));
    guest.ask(&mut rings[3]);
    assert_eq!(fake.script().enabled[2..], [(2, 1), (3, 1)]);
    // The choice outlives a pause and a back end.
    guest.driver.function.pause();
    guest.driver.function.resume();
    rings.iter_mut().for_each(|ring| guest.ask(ring));
    fake.die();
    fake.listen();
    eventually("another serves", || fake.connections() == 2);
    rings.iter_mut().for_each(|ring| guest.ask(ring));
    // The answer comes when the back end has ended them.
    assert_eq!(use_pairs(&mut guest, &mut control, 1).0, spec_net::CTRL_OK);
    let enabled = fake.script().enabled.clone();
    assert_eq!(enabled[enabled.len() - 2..], [(2, 0), (3, 0)]);
    rings[2].submit(&[(buffer, 8, true)]);
    guest.driver.notify(&rings[2]);
    guest.ask(&mut rings[0]);
    assert_eq!(rings[2].poll_used(), None);
    // And not a reset.
    assert_eq!(use_pairs(&mut guest, &mut control, 2).0, spec_net::CTRL_OK);
    guest.reset();
    let before = fake.script().enabled.len();
    let (mut rings, _) = begin(&mut guest);
    guest.ask(&mut rings[0]);
    guest.ask(&mut rings[1]);
    assert_eq!(fake.script().enabled[before..], [(0, 1), (1, 1)]);
    assert!(!guest.needs_reset());
}

#[test]
fn a_choice_of_pairs_is_taken_while_no_back_end_serves_and_none_is_waited_for() {
    let mut fake = Fake::start();
    let mut guest = nic(&fake, |_| {}).unwrap();
    fake.die();
    eventually("the link is down", || status(&guest) == 0);
    let (mut rings, mut control) = begin(&mut guest);
    let (answer, took) = use_pairs(&mut guest, &mut control, 2);
    assert_eq!(answer, spec_net::CTRL_OK);
    assert!(took < Duration::from_millis(500), "{took:?}");
    fake.listen();
    rings.iter_mut().for_each(|ring| guest.ask(ring));
    assert_eq!(status(&guest), spec_net::S_LINK_UP);
}

#[test]
fn packets_flow_again_within_a_second_after_a_back_end_died_with_some_in_hand_and_the_link_says_so()
{
    for protocol in [!0, !fake::INFLIGHT] {
        let mut fake = Fake::start().with(|script| script.protocol &= protocol);
        let mut guest = nic(&fake, |_| {}).unwrap();
        let [mut receive, mut transmit] = guest.begin();
        guest.ask(&mut receive);
        guest.ask(&mut transmit);
        fake.script().keeps = true;
        let buffer = guest.driver.alloc(64);
        for _ in 0..3 {
            receive.submit(&[(buffer, 8, true)]);
            transmit.submit(&[(buffer, 8, true)]);
        }
        guest.driver.notify(&receive);
        guest.driver.notify(&transmit);
        fake.die();
        eventually("the link is down", || status(&guest) == 0);
        fake.script().keeps = false;
        let start = Instant::now();
        fake.listen();
        for head in 1..=3 {
            assert_eq!(receive.wait_used(), (head, 8));
            assert_eq!(transmit.wait_used(), (head, 8));
        }
        let took = start.elapsed();
        assert!(took < Duration::from_secs(1), "{took:?}");
        guest.ask(&mut receive);
        assert_eq!(status(&guest), spec_net::S_LINK_UP);
        assert!(!guest.needs_reset());
    }
}

#[test]
fn the_mtu_is_in_the_configuration_and_said_to_the_back_end_of_a_driver_that_took_it() {
    let mtu = |net: &mut NetConfig| net.mtu = Some(1400);
    let fake = Fake::start();
    let mut guest = nic(&fake, mtu).unwrap();
    let [mut ring, _] = guest.begin();
    guest.ask(&mut ring);
    assert_eq!(fake.script().mtus, [1400]);
    guest.reset();
    guest.driver.negotiate(!spec_net::F_MTU);
    let mut ring = guest.driver.queue(0, 16);
    guest.driver.ready();
    guest.ask(&mut ring);
    assert_eq!(fake.script().mtus, [1400]);
    // One that does not want to hear it serves as well.
    let fake = Fake::start().with(|script| script.protocol &= !fake::NET_MTU);
    let mut guest = nic(&fake, mtu).unwrap();
    let [mut ring, _] = guest.begin();
    guest.ask(&mut ring);
    assert!(fake.script().mtus.is_empty());
}

#[test]
fn a_nic_that_listens_is_served_by_who_connects_and_by_the_next_and_its_socket_goes_with_it() {
    let mut fake = Fake::start();
    fake.call();
    let socket = fake.socket();
    let serve = |patience| {
        let at = (&*socket, VhostMode::Server);
        opened(kind(|_| {}), "net net0", at, patience, true)
    };
    let mut guest = Guest::of(serve(PATIENCE).unwrap());
    let (mut rings, mut control) = begin(&mut guest);
    assert_eq!(use_pairs(&mut guest, &mut control, 2).0, spec_net::CTRL_OK);
    rings.iter_mut().for_each(|ring| guest.ask(ring));
    // Nobody else has it.
    let why = serve(Duration::ZERO).map(drop).unwrap_err().to_string();
    assert!(why.contains("listens there"), "{why}");
    fake.die();
    eventually("the link is down", || status(&guest) == 0);
    let start = Instant::now();
    fake.call();
    rings.iter_mut().for_each(|ring| guest.ask(ring));
    assert!(start.elapsed() < Duration::from_secs(1));
    drop(guest);
    assert!(!socket.exists());
    fake.die();
    let why = serve(Duration::from_millis(1)).map(drop).unwrap_err();
    assert!(
        why.to_string().contains("no back end has connected"),
        "{why}"
    );
    assert!(!socket.exists());
}

#[test]
fn a_back_end_that_cannot_be_what_a_nic_is_to_be_is_named_with_what_is_missing() {
    type Change = fn(&mut Script);
    let cases: [(Change, &str); 5] = [
        (|script| script.features &= !(1 << 22), "one pair of queues"),
        (|script| script.protocol &= !fake::MQ, "one pair of queues"),
        (
            |script| script.queues = 1,
            "serves 1 pairs of queues, and this device has 2",
        ),
        (
            |script| script.features &= !spec_net::F_MTU,
            "does not hold itself to an MTU",
        ),
        (|script| script.features &= !(1 << 32), "legacy"),
    ];
    for (change, words) in cases {
        let fake = Fake::start().with(change);
        let why = why_not(&fake, |net| net.mtu = Some(1500));
        assert!(why.contains(words), "{why}");
    }
    // It counts pairs: two are four queues.
    let fake = Fake::start().with(|script| script.queues = 2);
    let mut guest = nic(&fake, |_| {}).unwrap();
    let (mut rings, mut control) = begin(&mut guest);
    assert_eq!(use_pairs(&mut guest, &mut control, 2).0, spec_net::CTRL_OK);
    rings.iter_mut().for_each(|ring| guest.ask(ring));
}

#[test]
fn a_nics_back_end_that_lies_about_its_pairs_is_refused_and_one_that_refuses_an_mtu_not_asked_in_haste()
 {
    for says in [
        vec![0xff; 20],
        [17, 5, u32::MAX, 0, 0].map(u32::to_ne_bytes).concat(),
        [17, 1, 8, 9, 0].map(u32::to_ne_bytes).concat(),
        [18, 5, 8, 9, 0].map(u32::to_ne_bytes).concat(),
    ] {
        let fake = Fake::start();
        let vice = Vice::Says(says.clone());
        fake.script().vices.insert(fake::GET_QUEUE_NUM, vice);
        let why = why_not(&fake, |_| {});
        assert!(why.contains("GET_QUEUE_NUM"), "{says:?}: {why}");
    }
    for vice in [Vice::Refuse, Vice::Close, Vice::Says(vec![7; 64])] {
        let fake = Fake::start();
        fake.script().vices.insert(fake::NET_SET_MTU, vice.clone());
        let mut guest = nic(&fake, |net| net.mtu = Some(1500)).unwrap();
        let start = Instant::now();
        let [mut ring, _] = guest.begin();
        eventually("it is tried again", || fake.connections() >= 3);
        let took = start.elapsed();
        assert!(took > Duration::from_millis(200), "{vice:?}: {took:?}");
        fake.script().vices.clear();
        guest.ask(&mut ring);
        assert!(!guest.needs_reset());
    }
}

#[test]
fn a_back_end_that_does_not_answer_a_choice_of_pairs_holds_up_its_command_alone_and_that_for_a_second()
 {
    let fake = Fake::start();
    let mut guest = nic(&fake, |_| {}).unwrap();
    let (mut rings, mut control) = begin(&mut guest);
    // The last of the start is over then.
    guest.ask(&mut rings[1]);
    let late = Vice::Late(Duration::from_millis(1500));
    fake.script().vices.insert(fake::SET_VRING_ENABLE, late);
    let (answer, took) = use_pairs(&mut guest, &mut control, 2);
    assert_eq!(answer, spec_net::CTRL_ERR);
    assert!(took < Duration::from_millis(1400), "{took:?}");
    // What was refused is undone, and can be asked for anew.
    fake.script().vices.clear();
    eventually("the first pair is left", || {
        let enabled = fake.script().enabled.clone();
        enabled[enabled.len() - 2..] == [(2, 0), (3, 0)]
    });
    assert_eq!(use_pairs(&mut guest, &mut control, 2).0, spec_net::CTRL_OK);
    guest.ask(&mut rings[3]);
    // A driver that resets the device does not wait for it.
    fake.script()
        .vices
        .insert(fake::SET_VRING_ENABLE, Vice::Silent);
    let at = guest.driver.alloc(64);
    let command = [spec_net::CTRL_MQ, spec_net::CTRL_MQ_VQ_PAIRS_SET, 1, 0];
    guest.driver.write(at, &command);
    control.submit(&[(at, 4, false), (at + 4, 1, true)]);
    let asked = fake.script().asked.len();
    guest.driver.notify(&control);
    eventually("it was asked", || fake.script().asked.len() > asked);
    let start = Instant::now();
    let reset = spec::pci::common::DEVICE_STATUS;
    guest.driver.set_common(reset, &[0]);
    assert!(start.elapsed() < Duration::from_millis(500));
    fake.script().vices.clear();
    eventually("the reset is over", || guest.driver.status() == 0);
    let (mut rings, _) = begin(&mut guest);
    guest.ask(&mut rings[1]);
    assert!(!guest.needs_reset());
}

#[test]
fn a_nic_goes_on_in_another_process_with_the_pairs_that_its_driver_chose() {
    let fake = Fake::start();
    let mut guest = nic(&fake, |_| {}).unwrap();
    let (mut rings, mut control) = begin(&mut guest);
    assert_eq!(use_pairs(&mut guest, &mut control, 2).0, spec_net::CTRL_OK);
    rings.iter_mut().for_each(|ring| guest.ask(ring));
    let other = Fake::start();
    let at = (&*other.socket(), VhostMode::Client);
    let (ram, memory) = (guest.driver.ram.clone(), guest.table.clone());
    let device = VhostUser::open(
        "net0",
        "net net0".into(),
        kind(|_| {}),
        at,
        Duration::ZERO,
        &ram,
        &memory,
    );
    guest.driver.move_to(device.unwrap());
    guest.driver.function.resume();
    rings.iter_mut().for_each(|ring| guest.ask(ring));
    assert_eq!(use_pairs(&mut guest, &mut control, 1).0, spec_net::CTRL_OK);
}
