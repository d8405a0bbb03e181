use super::*;
use crate::virtio::spec::pci::common;
use crate::virtio::spec::status;
use crate::virtio::testing::{Driver, Ring};
use busway_pci::ConfigRead;
use proptest::prelude::*;

use crate::config::RngConfig;
use crate::virtio::rng::Rng;

fn rng() -> Rng {
    Rng::new("rng0", &RngConfig::default()).unwrap()
}

/// A driver of an entropy source that has come up, with MSI-X.
fn running(features: u64) -> (Driver, Ring) {
    let mut driver = Driver::new(rng());
    driver.enable_msix(2);
    driver.negotiate(features);
    let ring = driver.queue(0, 16);
    driver.set_common(common::CONFIG_MSIX_VECTOR, &1_u16.to_le_bytes());
    driver.ready();
    (driver, ring)
}

#[test]
fn the_function_is_a_modern_virtio_device_of_its_type() {
    let driver = Driver::new(rng());
    assert_eq!(driver.read_dword(0), 0x1044_1af4);
    assert_eq!(driver.read_dword(8) & 0xff, 1);
    assert_eq!(driver.read_dword(0x2c), 0x0044_1af4);
    let regions = driver.function.decoded();
    assert_eq!(regions.len(), 1);
    assert!(driver.function.parts(regions[0].index).len() == 1);
}

#[test]
fn each_completion_interrupts_once_by_its_queues_vector() {
    let (mut driver, mut ring) = running(0);
    let buffer = driver.alloc(64);
    for _ in 0..20 {
        assert_eq!(driver.run(&mut ring, &[(buffer, 64, true)]), 64);
        assert_eq!(driver.route(0).wait(), 1);
    }
    assert!(driver.route(1).silent());
    assert_ne!(driver.read(buffer, 64), vec![0; 64]);
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    let (mut driver, mut ring) = running(0);
    let buffer = driver.alloc(64);
    ring.set_no_interrupt(true);
    driver.run(&mut ring, &[(buffer, 64, true)]);
    assert!(driver.route(0).silent());
    ring.set_no_interrupt(false);
    driver.run(&mut ring, &[(buffer, 64, true)]);
    assert_eq!(driver.route(0).wait(), 1);
}

#[test]
fn with_event_idx_the_interrupt_comes_after_the_completion_that_was_named() {
    let (mut driver, mut ring) = running(spec::feature::EVENT_IDX);
    let buffer = driver.alloc(64);
    ring.set_used_event(2);
    for _ in 0..2 {
        driver.run(&mut ring, &[(buffer, 64, true)]);
    }
    assert!(driver.route(0).silent());
    driver.run(&mut ring, &[(buffer, 64, true)]);
    assert_eq!(driver.route(0).wait(), 1);
}

#[test]
fn what_completes_while_its_vector_was_never_unmasked_is_delivered_at_unmasking() {
    let mut driver = Driver::new(rng());
    driver.enable_msix(0);
    driver.negotiate(0);
    let mut ring = driver.queue(0, 16);
    driver.ready();
    let buffer = driver.alloc(64);
    driver.run(&mut ring, &[(buffer, 64, true)]);
    crate::virtio::testing::eventually("pending", || driver.bar_read::<1>(0x5000) == [1]);
    driver.set_vector(0, false);
    assert_eq!(driver.route(0).wait(), 1);
    assert_eq!(driver.bar_read::<1>(0x5000), [0]);
    assert_eq!(driver.function.connected_vectors(), 1);
}

#[test]
fn without_msix_the_isr_says_it_and_reading_clears_it() {
    let mut driver = Driver::new(rng());
    driver.negotiate(0);
    let mut ring = driver.queue(0, 16);
    driver.ready();
    let buffer = driver.alloc(64);
    driver.run(&mut ring, &[(buffer, 64, true)]);
    crate::virtio::testing::eventually("isr", || driver.bar_read::<1>(driver.isr) == [1]);
    assert_eq!(driver.bar_read::<1>(driver.isr), [0]);
}

#[test]
fn a_reset_device_can_be_driven_again_and_goes_away_with_its_function() {
    let (mut driver, mut ring) = running(0);
    let buffer = driver.alloc(64);
    for _ in 0..10 {
        driver.run(&mut ring, &[(buffer, 64, true)]);
        driver.set_common(common::DEVICE_STATUS, &[0]);
        assert_eq!(
            driver.function.registers(),
            Driver::new(rng()).function.registers()
        );
        ring.submit(&[(buffer, 64, true)]);
        driver.notify(&ring);
        driver.negotiate(0);
        ring = driver.queue(0, 16);
        driver.ready();
    }
    driver.run(&mut ring, &[(buffer, 64, true)]);
    let function = Arc::downgrade(&driver.function);
    drop(driver);
    assert!(function.upgrade().is_none());
}

#[test]
fn the_access_capability_reaches_the_bar() {
    let driver = Driver::new(rng());
    let capability = driver.access_capability;
    let access = |offset: u64, length: u32| {
        driver
            .function
            .config_write(capability + 8, &(offset as u32).to_le_bytes());
        driver
            .function
            .config_write(capability + 12, &length.to_le_bytes());
    };
    access(driver.common + common::NUM_QUEUES, 2);
    assert_eq!(driver.read_dword(capability + 16), 1);
    access(driver.common + common::DEVICE_STATUS, 1);
    driver.function.config_write(capability + 16, &[3]);
    assert_eq!(driver.status(), 3);
    access(driver.common + 1, 4);
    driver.function.config_write(capability + 16, &[0xff; 4]);
    assert_eq!(driver.status(), 3);
}

type Breakage = fn(&mut Ring);

#[test]
fn a_bad_ring_sets_needs_reset_with_a_configuration_interrupt_and_a_reset_heals() {
    let breakages: [(&str, Breakage); 6] = [
        ("outside of RAM", |ring| {
            ring.submit(&[(u64::MAX - 100, 64, true)]);
        }),
        ("longer than RAM", |ring| {
            ring.submit(&[(0x1000, u32::MAX, true)]);
        }),
        ("a loop", |ring| {
            ring.describe(0, 0x1000, 16, 3, 1);
            ring.describe(1, 0x1000, 16, 3, 0);
            ring.make_available(0);
        }),
        ("a head beyond the table", |ring| ring.make_available(500)),
        ("an indirect table that is none", |ring| {
            ring.describe(0, 0x1000, 17, 4, 0);
            ring.make_available(0);
        }),
        ("more available than there are", |ring| {
            for _ in 0..40 {
                ring.make_available(0);
            }
        }),
    ];
    for (what, break_it) in breakages {
        let (mut driver, mut ring) = running(spec::feature::INDIRECT_DESC);
        break_it(&mut ring);
        driver.notify(&ring);
        assert_eq!(driver.route(1).wait(), 1, "{what}");
        assert!(driver.status() & status::DEVICE_NEEDS_RESET != 0, "{what}");
        driver.negotiate(0);
        let mut ring = driver.queue(0, 16);
        driver.ready();
        let buffer = driver.alloc(64);
        assert_eq!(driver.run(&mut ring, &[(buffer, 64, true)]), 64, "{what}");
    }
}

#[test]
fn a_queue_outside_of_ram_never_starts() {
    for (offset, value) in [
        (common::QUEUE_DESC, u64::MAX << 4),
        (common::QUEUE_DRIVER, crate::virtio::testing::RAM_SIZE - 2),
        (common::QUEUE_DEVICE, 3),
    ] {
        let mut driver = Driver::new(rng());
        driver.negotiate(0);
        driver.set_common(common::QUEUE_DESC, &0x1000_u64.to_le_bytes());
        driver.set_common(common::QUEUE_DRIVER, &0x2000_u64.to_le_bytes());
        driver.set_common(common::QUEUE_DEVICE, &0x3000_u64.to_le_bytes());
        driver.set_common(offset, &value.to_le_bytes());
        driver.set_common(common::QUEUE_ENABLE, &[1, 0]);
        driver.ready();
        assert!(driver.status() & status::DEVICE_NEEDS_RESET != 0);
        driver.negotiate(0);
        driver.queue(0, 16);
        driver.ready();
        assert_eq!(driver.status() & status::DEVICE_NEEDS_RESET, 0);
    }
}

#[derive(Clone, Debug)]
enum Access {
    ConfigRead(u16, usize),
    ConfigWrite(u16, Vec<u8>),
    BarRead(u64, usize),
    BarWrite(u64, Vec<u8>),
}

fn access() -> impl Strategy<Value = Access> {
    let width = prop_oneof![Just(1_usize), Just(2), Just(4), Just(8)];
    let data = width
        .clone()
        .prop_flat_map(|width| proptest::collection::vec(any::<u8>(), width));
    let config = prop_oneof![0_u16..0x100, 0_u16..4096];
    let bar = prop_oneof![
        4 => 0_u64..64,
        1 => 0x1000_u64..0x1004,
        2 => 0x3000_u64..0x3010,
        2 => 0x4000_u64..0x4040,
        1 => any::<u64>(),
        1 => 0_u64..0x8000,
    ];
    prop_oneof![
        (config.clone(), width.clone()).prop_map(|(at, width)| Access::ConfigRead(at, width)),
        (config, data.clone()).prop_map(|(at, data)| Access::ConfigWrite(at, data)),
        (bar.clone(), width).prop_map(|(at, width)| Access::BarRead(at, width)),
        (bar, data).prop_map(|(at, data)| Access::BarWrite(at, data)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_access_whatever_panics_and_the_device_works_after_a_reset(
        accesses in proptest::collection::vec(access(), 0..200),
    ) {
        let mut driver = Driver::new(rng());
        for access in accesses {
            match access {
                Access::ConfigRead(at, width) => driver.function.config_read(at, &mut vec![0; width]),
                Access::ConfigWrite(at, data) => driver.function.config_write(at, &data),
                Access::BarRead(at, width) => {
                    driver.function.bar_read(BarIndex::Bar(0), at, &mut vec![0; width]);
                }
                Access::BarWrite(at, data) => driver.function.bar_write(BarIndex::Bar(0), at, &data),
            }
        }
        driver.function.reset();
        driver.enable_msix(1);
        driver.negotiate(0);
        let mut ring = driver.queue(0, 16);
        driver.ready();
        let buffer = driver.alloc(64);
        prop_assert_eq!(driver.run(&mut ring, &[(buffer, 64, true)]), 64);
    }

    #[test]
    fn no_ring_whatever_panics_or_hangs(
        bytes in proptest::collection::vec(any::<u8>(), 16 * 16),
        small in any::<bool>(),
        heads in proptest::collection::vec(0_u16..20, 1..16),
    ) {
        let (mut driver, mut ring) = running(spec::feature::INDIRECT_DESC);
        for (index, raw) in (0..).zip(bytes.chunks(16)) {
            let mut address = u64::from_le_bytes(raw[..8].try_into().unwrap());
            let mut len = u32::from_le_bytes(raw[8..12].try_into().unwrap());
            if small {
                // Mostly well-formed: within RAM, and short.
                address %= crate::virtio::testing::RAM_SIZE;
                len %= 512;
            }
            ring.describe(index, address, len, raw[12].into(), (raw[14] % 18).into());
        }
        for head in heads {
            ring.make_available(head);
        }
        driver.notify(&ring);
        driver.set_common(common::DEVICE_STATUS, &[0]);
        prop_assert_eq!(driver.status(), 0);
        driver.negotiate(0);
        let mut ring = driver.queue(0, 16);
        driver.ready();
        let buffer = driver.alloc(64);
        prop_assert_eq!(driver.run(&mut ring, &[(buffer, 64, true)]), 64);
    }
}
