//! Devices of any kind: what is passed on between a driver and a back end that this process knows nothing of.

use super::*;
use crate::config::GenericConfig;

/// Bytes of the configuration.
const SIZE: usize = 8;

/// A device of a kind that nobody has, whose back end is `fake`.
fn guest(fake: &Fake) -> Guest {
    let config = GenericConfig {
        config_size: Some(SIZE as u16),
        ..GenericConfig::new(45, fake.socket(), vec![64, 32])
    };
    let kind = super::super::generic::kind(&config);
    let (socket, described) = (fake.socket(), "vhost-user vhost-user0");
    let at = (&*socket, VhostMode::Client);
    Guest::of(opened(kind, described, at, Duration::ZERO, true).unwrap())
}

fn config(guest: &Guest) -> [u8; SIZE] {
    guest.driver.bar_read(guest.driver.device)
}

fn said(value: u8) -> Fake {
    Fake::start().with(|script| script.config = vec![value; SIZE])
}

#[test]
fn a_device_of_any_kind_is_what_its_back_end_offers_and_is_served_by_it() {
    let fake = said(7).with(|script| script.features |= 1 << 34 | 1 << 35 | 1 << 55);
    let mut guest = guest(&fake);
    assert_eq!(config(&guest), [7; SIZE]);
    let offered = guest.driver.offered();
    assert_eq!(offered & 0xff_ffff, 0xff_ffff);
    assert_eq!(
        offered >> 33,
        1 << (55 - 33),
        "no feature of the rings' but those that are known"
    );
    let mut rings = guest.begin();
    for ring in &mut rings {
        guest.ask(ring);
    }
    guest.driver.function.pause();
    guest.driver.function.resume();
    guest.ask(&mut rings[1]);
    guest.reset();
    let mut rings = guest.begin();
    guest.ask(&mut rings[0]);
}

#[test]
fn what_the_driver_writes_is_the_back_ends_when_it_is_read_again() {
    let fake = said(0);
    let guest = guest(&fake);
    guest.driver.bar_write(guest.driver.device + 2, &[1, 2]);
    guest
        .driver
        .bar_write(guest.driver.device + 6, &[3, 4, 5, 6]);
    assert_eq!(config(&guest), [0, 0, 1, 2, 0, 0, 3, 4]);
    assert_eq!(fake.script().config, [0, 0, 1, 2, 0, 0, 3, 4]);
    // What it does not take is as before.
    let vice = Vice::Refuse;
    fake.script().vices.insert(fake::SET_CONFIG, vice);
    fake.script().config = vec![9; SIZE];
    guest.driver.bar_write(guest.driver.device, &[1]);
    assert_eq!(config(&guest), [9; SIZE]);
    assert!(!guest.needs_reset());
}

#[test]
fn a_back_end_that_comes_back_has_another_configuration_and_the_driver_hears_of_it() {
    let mut fake = said(1);
    let mut guest = guest(&fake);
    let _rings = guest.begin();
    let before = guest
        .driver
        .common::<1>(spec::pci::common::CONFIG_GENERATION);
    fake.die();
    // What is written while nobody is there is the next one's.
    guest.driver.bar_write(guest.driver.device, &[5]);
    fake.script().config = vec![2; SIZE];
    fake.listen();
    let expected = [5, 2, 2, 2, 2, 2, 2, 2];
    eventually("the new one's configuration", || config(&guest) == expected);
    assert_eq!(fake.script().config, expected);
    let after = guest
        .driver
        .common::<1>(spec::pci::common::CONFIG_GENERATION);
    assert_ne!(before, after);
}

#[test]
fn a_back_end_without_a_configuration_has_none_to_read_or_write() {
    let fake = Fake::start().with(|script| script.protocol &= !fake::CONFIG);
    let mut guest = guest(&fake);
    assert_eq!(config(&guest), [0xff; SIZE]);
    guest.driver.bar_write(guest.driver.device, &[1; SIZE]);
    assert_eq!(config(&guest), [0xff; SIZE]);
    let mut rings = guest.begin();
    guest.ask(&mut rings[0]);
    let asked = fake.script().asked.clone();
    assert!(!asked.contains(&fake::GET_CONFIG) && !asked.contains(&fake::SET_CONFIG));
}

#[test]
fn one_that_answers_no_configuration_change_keeps_the_driver_for_a_moment_only() {
    let fake = said(0);
    let guest = guest(&fake);
    fake.script().vices.insert(fake::SET_CONFIG, Vice::Silent);
    guest.driver.bar_write(guest.driver.device, &[1]);
    let start = Instant::now();
    let _stale = config(&guest);
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn memory_that_no_other_process_can_map_is_not_told_to_a_back_end() {
    use crate::memory::Region;
    use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

    let fake = said(0);
    let mut guest = guest(&fake);
    let mut rings = guest.begin();
    guest.ask(&mut rings[0]);
    let mapping = MmapRegion::new(0x1000).unwrap();
    let private = GuestRegionMmap::new(mapping, GuestAddress(RAM_SIZE * 4)).unwrap();
    let private = Region::ram("private", Arc::new(private));
    guest._regions.add(Arc::new(private)).unwrap();
    guest.ask(&mut rings[1]);
    let asked = fake.script().asked.clone();
    let tables = asked.iter().filter(|one| **one == fake::SET_MEM_TABLE);
    assert!(tables.count() >= 2, "{asked:?}");
}
